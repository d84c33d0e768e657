"""Model and loss on one micro-batch, and how the losses of micro-batches make up that of a step.

Formula:  a loss that is a mean over samples, ℓᵢ on micro-batch i of nᵢ samples, B = Σ nᵢ:
              L = Σ ℓᵢ·nᵢ / B
          a loss that is a sum sᵢ with a weight wᵢ, such as a number of tokens:
              L = Σ sᵢ / Σ wᵢ  =  (B / Σ wᵢ) · Σ sᵢ / B
          The gradients of ℓᵢ·nᵢ / B or sᵢ / B are summed over micro-batches and workers; the factor
          B / Σ wᵢ, known when every worker has finished its passes, multiplies the sum.
Source:   docs/design.md, loss weights.
Contract: Σ wᵢ is summed exactly and rounded once, so it is the same on every rank and on any number
          of workers.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from hvdlarge.comm.interfaces import ControlChannel
from hvdlarge.data.samples import Targets
from hvdlarge.exits import JobError, PartError
from hvdlarge.models.parts import NoSuchPartError, part_of
from hvdlarge.models.state import Modules, trained_modules
from hvdlarge.optim.precision import Precision
from hvdlarge.replica.carried import (
    CarriedWindow,
    StateError,
    StateForm,
    find_state_form,
    number_of_samples,
)


class LossError(PartError):
    """A loss returned something else than a mean, or a sum and its weight, or the output has no
    such part. Not a RunExit, as a single rank may raise it.
    """

    origin = "the model or the loss"

    def __init__(self, message: str, key: str = "loss.name") -> None:
        super().__init__(f"{key}: {message}")


class LossValue(NamedTuple):
    """The loss of a micro-batch."""

    value: torch.Tensor  # shape (); the mean over samples, or the sum
    weight: torch.Tensor | None  # of a sum, float64, shape (); None for a mean

    def mean(self) -> torch.Tensor:
        """The mean over the micro-batch, shape ()."""
        return self.value if self.weight is None else self.value / self.weight

    def totals(self, size: int) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Sum and weight, float64, of a micro-batch of `size` samples."""
        value = self.value.double()
        return (value * size, size) if self.weight is None else (value, self.weight)


class Objective:
    """Model and loss: what a micro-batch goes through, in training and in evaluation.

    Args:
        model: called with the inputs: `model(**inputs)` for a dict, `model(*inputs)` for a plain
            tuple, `model(inputs)` for everything else.
        loss: called with (outputs, targets), or (outputs, batch) if the samples have no separate
            targets; returns a mean over samples, or a sum and its weight.
        precision: of this worker.
        to_device: moves inputs or targets, and gives floats the dtype of the weights.
        output: key, attribute or position of the model's output that loss and metrics get; None:
            the whole output.
        carries: whether the model carries a state along lanes: then its method `advance` is called
            in its place, with the state as the keyword `state`, and returns (outputs, state).

    Attributes:
        modules: model and loss, the loss if it is a module.
        carries: see above.
        state_form: the form of that state, once `find_state_form` has found it.

    Raises:
        ValueError: if the model should carry a state and has no method `advance`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Callable[[Any, Any], Any],
        precision: Precision,
        to_device: Callable[[Any], Any],
        output: str | int | None = None,
        carries: bool = False,
    ) -> None:
        self.model, self.loss, self.precision = model, loss, precision
        self.carries = carries
        self.state_form: StateForm | None = None
        self._advance: Callable[..., Any] = getattr(model, "advance", model)
        if carries and not callable(getattr(model, "advance", None)):
            raise ValueError(
                "data.lanes needs a model with a method advance(inputs, state), which returns "
                "(outputs, new state)"
            )
        self.modules: Modules = trained_modules(model, loss)
        self.to_device, self._output = to_device, output

    def __call__(self, inputs: Any, targets: Any, window: CarriedWindow | None = None) -> LossValue:
        """The loss of a micro-batch, as loaded."""
        return self.evaluate(inputs, targets, window)[0]

    def evaluate(
        self, inputs: Any, targets: Any, window: CarriedWindow | None = None
    ) -> tuple[LossValue, Any, Any]:
        """Loss, outputs and targets of a micro-batch, both on the device.

        Args:
            inputs: as loaded.
            targets: as loaded.
            window: the states with which the samples begin, and that they leave; None: they begin
                with zeros, and no state is kept.

        Raises:
            LossError: if the loss returns anything else than a mean, or a sum and its weight.
            StateError: if the model returns a state of another form than before.
        """
        batch = self.to_device(inputs)
        targets = batch if targets is Targets.WHOLE_BATCH else self.to_device(targets)
        with self.precision.autocast():
            outputs = self._outputs(batch, window)
        return self.loss_of(outputs, targets), outputs, targets

    def loss_of(self, outputs: Any, targets: Any) -> LossValue:
        """The loss of outputs and targets on the device.

        Raises:
            LossError: if it is no mean, and no sum with its weight.
        """
        with self.precision.autocast():
            return loss_value(self.loss(outputs, targets))

    def predict(self, predict: Callable[[torch.nn.Module, Any], Any], inputs: Any) -> Any:
        """What a metric makes of model and inputs, as loaded, in place of the outputs."""
        with self.precision.autocast():
            return predict(self.model, self.to_device(inputs))

    def set_mode(self, training: bool) -> None:
        """Put model and loss into training or evaluation mode."""
        for module in self.modules.values():
            module.train(training)

    def find_state_form(self, inputs: Any) -> None:
        """Find the form of the state that the model carries, from a micro-batch as loaded.

        Raises:
            StateError: if it cannot be carried.
        """
        with self.precision.autocast():
            self.state_form = find_state_form(self._advanced, self.to_device(inputs))

    def compile(self) -> None:
        """Let torch compile what is called of the model."""
        if self.carries:
            self._advance = torch.compile(self._advance)
        else:
            self.model.compile()

    def _outputs(self, batch: Any, window: CarriedWindow | None) -> Any:
        if self.carries:
            outputs, state = self._advanced(batch, self._state(batch, window))
            if window is not None:
                window.after(state)
        else:
            outputs = called(self.model, batch)
        try:
            return outputs if self._output is None else part_of(outputs, self._output)
        except NoSuchPartError as error:
            raise LossError(str(error), "model.output") from None

    def _state(self, batch: Any, window: CarriedWindow | None) -> Any:
        """The state with which a micro-batch begins; None before its form is known."""
        if window is not None:
            return window.before()
        form = self.state_form
        return None if form is None else form.zeros(number_of_samples(batch))

    def _advanced(self, batch: Any, state: Any) -> tuple[Any, Any]:
        returned = called(self._advance, batch, state=state)
        if not (isinstance(returned, (tuple, list)) and len(returned) == 2):
            raise StateError(f"it returned {_described(returned)}")
        return returned[0], returned[1]


def called(function: Callable[..., Any], batch: Any, **more: Any) -> Any:
    """What a function returns for a batch: keyword arguments if that is a dict, positional ones if
    it is a plain tuple, else one argument.
    """
    if isinstance(batch, Mapping):
        return function(**batch, **more)
    if type(batch) is tuple:
        return function(*batch, **more)
    return function(batch, **more)


def loss_value(value: Any) -> LossValue:
    """What a loss has returned, checked.

    Raises:
        LossError: with the forms that are allowed.
    """
    if isinstance(value, torch.Tensor) and value.shape == () and not value.is_complex():
        return LossValue(value, None)
    if isinstance(value, (tuple, list)) and len(value) == 2:
        total, weight = value
        weighs = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if isinstance(weight, torch.Tensor):
            weighs = weight.shape == () and not weight.is_complex()
        if isinstance(total, torch.Tensor) and total.shape == () and weighs:
            weight = torch.as_tensor(weight, dtype=torch.float64, device=total.device).detach()
            return LossValue(total, weight)
    raise LossError(
        "a loss must return a mean over samples, a tensor of shape (), or a pair (sum, weight) of "
        f"these; this one returned {_described(value)}{_hint(value)}"
    )


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return f"({_described(value[0])}, {_described(value[1])})"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _hint(value: Any) -> str:
    if isinstance(value, torch.Tensor) and value.ndim:
        return ' (reduction="none"?)'
    if hasattr(value, "loss") or (isinstance(value, Mapping) and "loss" in value):
        return " (for a model that computes its own loss: `loss: {name: from_model}`)"
    return ""


class SampleMean:
    """A step whose loss is a mean over its samples: every weight is known beforehand."""

    weighted = False
    without_weight = 0  # see WeightedMean

    def share(self, loss: LossValue, size: int, global_batch: int) -> torch.Tensor:
        """The share of a micro-batch of `size` samples in the step's loss, shape ()."""
        if loss.weight is not None:
            raise LossError("the loss returns a sum and its weight; its first value was a mean")
        return loss.value * (size / global_batch)

    def factor(self, global_batch: int) -> float:
        """What multiplies the sum of the shares and their gradients."""
        return 1.0


class WeightedMean:
    """A step whose loss is a sum divided by a weight, which is known once all passes are done.

    Args:
        control: the channel between the ranks.

    Attributes:
        without_weight: micro-batches of the last step whose weight was 0, of all ranks.
    """

    weighted = True

    def __init__(self, control: ControlChannel) -> None:
        self._control = control
        self.without_weight = 0
        self._weights: list[torch.Tensor] = []

    def share(self, loss: LossValue, size: int, global_batch: int) -> torch.Tensor:
        """The share of a micro-batch of `size` samples, up to the factor; its weight is kept."""
        if loss.weight is None:
            raise LossError("the loss returns a mean; its first value was a sum and its weight")
        self._weights.append(loss.weight)
        return loss.value * (1 / global_batch)

    def factor(self, global_batch: int) -> float:
        """What multiplies the sum of the shares and their gradients. Every rank calls this
        together, after its last pass of the step.

        Returns:
            B / Σ wᵢ; not a number if all weights are 0, as the step then has no loss.

        Raises:
            JobError: on every rank, unless the weights are 0 or more.
        """
        own = torch.stack(self._weights).tolist() if self._weights else []
        self._weights = []
        messages = self._control.allgather(struct.pack(f"<{len(own)}d", *own))
        weights = [value for each in messages for (value,) in struct.iter_unpack("<d", each)]
        total = math.fsum(weights) if all(map(math.isfinite, weights)) else math.nan
        self.without_weight = weights.count(0)
        if not (math.isfinite(total) and min(weights) >= 0):
            raise JobError(
                f"loss.name: the weights of a step's micro-batches must be 0 or more; they are "
                f"{', '.join(f'{value:g}' for value in weights[:8])}"
                f"{' …' if len(weights) > 8 else ''}"
            )
        return global_batch / total if total else math.nan
