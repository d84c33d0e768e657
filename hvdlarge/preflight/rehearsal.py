"""The rehearsal: runs the first micro-batch through data, model and loss before the first step and
rejects, by name, whatever would make results depend on the number of workers or on interruptions.

Formula:  pass A: forward and backward on the initial state;  pass B: the same micro-batch and
          seeds on the restored state, but with the running statistics of batch normalisation
          shifted by δ, their counts by a million, and gradients accumulated onto those of A. A
          model is accepted if no other saved tensor changes and
              loss of B = loss of A;    ‖all gradients after B‖ = 2 · ‖all gradients after A‖;
              running after B − running after A = (1 − m)^u · δ  for u uses in A.
          If the run evaluates, a forward pass in evaluation mode follows each of the two: their
          losses must be equal, and they must not change any state.
Source:   the contract of reduction/batch_norm.py (running statistics are linear, and not read in
          training), and docs/design.md: results depend on the samples, the seeds and the saved
          state only.
Contract: clears gradients, restores saved tensors and counts; only caches that the model keeps
          itself remain. Runs on the model as built, before its optimizer is distributed; every rank
          uses the same samples.
"""

from __future__ import annotations

import contextlib
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch

from hvdlarge.comm.interfaces import ControlChannel
from hvdlarge.comm.rank_checks import check_equal_across_ranks, raise_on_all_ranks
from hvdlarge.data import seeds
from hvdlarge.data.batches import twofold
from hvdlarge.data.loader import LoadedMicroBatch, Loader
from hvdlarge.data.rng import seed_all
from hvdlarge.evaluation.metric import Metric, Metrics, predict_of, result_of, totals_of
from hvdlarge.evaluation.parts import MetricError
from hvdlarge.evaluation.states import StateMetric
from hvdlarge.exits import JobError, RunExit, is_out_of_memory
from hvdlarge.models.state import (
    Modules,
    extra_states,
    named_modules,
    named_parameters,
    pack,
    saved_tensors,
)
from hvdlarge.preflight.trial import clear_gradients, eager, restored
from hvdlarge.preflight.user_code import describe, reading_samples, user_code
from hvdlarge.reduction.batch_norm import NormLayer, tracking_layers
from hvdlarge.replica.objective import LossValue, Objective
from hvdlarge.resilience.digest import tensor_digests
from hvdlarge.resilience.out_of_memory import explain_out_of_memory, oom_hint
from hvdlarge.schedule.batch import MicroBatch
from hvdlarge.schedule.plan import Plan

# Relative tolerance: the order of summation may vary on a GPU
_TOLERANCE = {"fp64": 1e-9, "fp32": 1e-6, "tf32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}
_COUNT_SHIFT = 1_000_000


class Rehearsed(NamedTuple):
    """What the rehearsal found that a run should know; the same on every rank."""

    rounds_differently: bool = False  # whether the ranks do, as different CPUs or GPUs
    weighted_loss: bool = False  # whether the loss returns a sum and its weight
    # Weight of a sample of the first micro-batch, on rank 0; 1 for a mean
    weight_per_sample: float = 1.0
    without_result: tuple[str, ...] = ()  # metrics that do not apply to the first samples, by name


def rehearse(
    plan: Plan,
    objective: Objective,
    metrics: Metrics,
    loader: Loader,
    test_samples: Callable[[], Iterable[LoadedMicroBatch]] | None,
    transform: Callable[[LoadedMicroBatch], LoadedMicroBatch],
    seed: int,
    must_be_finite: bool,
    control: ControlChannel,
) -> Rehearsed:
    """Rehearse the first samples of a run. Every rank calls this together, before the first
    decision is announced.

    Args:
        plan: of the run; its first and its smallest micro-batch are tried.
        objective: see Rehearsal.
        metrics: tried on the first micro-batch of the test set.
        loader: of the training set, not used before.
        test_samples: yields the test set's first micro-batch twice, transformed; None without
            evaluations.
        transform: of a micro-batch of the training set.
        seed: of the run.
        must_be_finite: whether to reject a first loss that is not finite.
        control: the channel between the ranks.

    Raises:
        InvalidEnvironmentError: on every rank, if loader processes run out of shared memory.
        JobError: on every rank, for what Rehearsal rejects, and samples that fail or differ.
        RanksDisagreeError: on every rank, if the ranks read different samples.
        OutOfMemory: on a rank that runs out of memory.
    """
    sizes = _sizes(plan)
    loaded = raise_on_all_ranks(control, lambda: _read(loader, transform, sizes))
    tested = list[LoadedMicroBatch]()
    if test_samples is not None:
        tested = raise_on_all_ranks(control, lambda: _read_again(test_samples, "test set"))
    _compare_samples(control, loaded[0])
    without: list[str] = []

    def passes() -> Outcome:
        rehearsal = Rehearsal(objective, seeds.key(seed, seeds.MICRO_BATCH, 0))
        outcome = rehearsal.run_all(loaded, sizes.where, bool(tested), must_be_finite)
        for batch in tested:
            without.extend(rehearsal.try_metrics(metrics, batch))
        return outcome

    where = f"the rehearsal of the first micro-batch, of {sizes.first:,} samples,"
    with explain_out_of_memory(where, oom_hint(sizes.first, plan.initial_batch)):
        outcome = raise_on_all_ranks(control, passes)
    roundings = set(control.allgather(_rounding(outcome, objective.precision.device)))
    return Rehearsed(
        len(roundings) > 1,
        outcome.weight is not None,
        _weight_per_sample(control, outcome, sizes.first),
        tuple(without),
    )


def _weight_per_sample(control: ControlChannel, outcome: Outcome, size: int) -> float:
    """The weight of a sample in a micro-batch of `size`; 1 for a mean. Every rank calls this
    together.
    """
    weight = 1.0
    if outcome.weight and math.isfinite(outcome.weight):
        weight = outcome.weight / size
    # Of one rank, as others may round it differently, and all must divide by the same
    return struct.unpack("<d", control.allgather(struct.pack("<d", weight))[0])[0]


def _not_finite_message(loss: float) -> str:
    return (
        f"loss.name: the loss of the first micro-batch is {loss} before the first update: look for "
        "samples or initial weights that are not finite, a logarithm of zero, or targets that are "
        "all ignored"
    )


def _compare_samples(control: ControlChannel, first: LoadedMicroBatch) -> None:
    """Raise RanksDisagreeError on every rank unless all have read the same samples. Every rank
    calls this together.
    """
    samples = {"inputs": fingerprint(first.inputs), "targets": fingerprint(first.targets)}
    hint = (
        "do all hosts have the same files, listed in the same order? The first "
        f"{first.micro_batch.size} of the run were compared"
    )
    check_equal_across_ranks(control, samples, f"training samples ({hint}, by a digest)")


def _rounding(outcome: Outcome, device: torch.device) -> bytes:
    """A value that is equal on ranks that round in the same way."""
    # On a GPU the order of summation may differ from one backward pass to the next.
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).encode()
    return struct.pack("<dd", outcome.loss, outcome.gradient)


class _Sizes(NamedTuple):
    """Sizes of micro-batches to try, in samples."""

    first: int  # of the run
    smallest: int  # of the run
    where: str  # describes the smallest one, for messages


def _sizes(plan: Plan) -> _Sizes:
    candidates = []
    for stage in plan.stages:
        for batch in ([stage.global_batch] if stage.steps > 1 else []) + [stage.last_batch]:
            micro = min(batch, plan.micro_batch_of(batch))
            where = (
                f"a micro-batch of {batch % micro or micro}, with which a step of {batch:,} "
                "samples ends,"
            )
            candidates.append(_Sizes(micro, batch % micro or micro, where))
    smallest = min(candidates, key=lambda sizes: sizes.smallest)
    return smallest._replace(first=candidates[0].first)


def _read(
    loader: Loader, transform: Callable[[LoadedMicroBatch], LoadedMicroBatch], sizes: _Sizes
) -> list[LoadedMicroBatch]:
    """The run's first micro-batch, and one of the smallest size if that is smaller.

    Raises:
        JobError: if they cannot be read, or differ when read again.
    """
    counts = [sizes.first, sizes.first, *([sizes.smallest] if sizes.smallest < sizes.first else [])]
    loader.enqueue([MicroBatch(0, 0, count) for count in counts], is_last=False)
    return _read_again(lambda: map(transform, loader.fetch(len(counts))), "training set")


def _read_again(
    read: Callable[[], Iterable[LoadedMicroBatch]], what: str
) -> list[LoadedMicroBatch]:
    """The micro-batches of `read` except the second, which must equal the first."""
    with reading_samples(what):
        first, again, *others = read()
    if fingerprint((first.inputs, first.targets)) != fingerprint((again.inputs, again.targets)):
        raise JobError(
            f"data.name: the {what} returns different samples when read again with the same seeds: "
            "it draws from its own random generator (use torch, numpy.random or random, which are "
            "seeded for each sample), or changes when it is read"
        )
    return [first, *others]


class Outcome(NamedTuple):
    """The result of a forward and backward pass."""

    loss: float
    gradient: float  # L2 norm of all gradients together
    uses: tuple[int, ...]  # of each layer with running statistics in training mode
    weight: float | None = None  # of a loss that is a sum; None for a mean
    is_finite: bool = True  # whether the loss is; a sum and weight of zero are


class Rehearsal:
    """Checks a model and a loss on one micro-batch.

    Args:
        objective: model and loss, on the device, in training mode, with the dtypes of the run.
        key: the seed of the micro-batch.
    """

    def __init__(self, objective: Objective, key: int) -> None:
        self._objective, self._key = objective, key
        self._precision = objective.precision
        self._modules = objective.modules
        self._layers = [layer for layer in tracking_layers(self._modules) if layer.module.training]

    def run(self, inputs: Any, targets: Any, evaluates: bool = False) -> Outcome:
        """Run both passes; returns the outcome of A.

        Args:
            inputs: of the micro-batch, as the loader gives them.
            targets: likewise.
            evaluates: whether to try passes in evaluation mode too.

        Raises:
            JobError: naming the layer, parameter or buffer that would make results depend on the
                number of workers, or the error that user code raised, with its line.
        """
        with _restored(self._modules, self._layers) as restore, eager():
            before, versions = _State.of(self._modules, self._layers), self._versions()
            first, averages = self._pass(inputs, targets), self._averages()
            before.check_unchanged(self._modules, self._layers)
            after = self._versions()
            written = [name for name, version in versions.items() if after.get(name) != version]
            restore()
            evaluated = self._evaluate_without_changes(inputs, targets) if evaluates else None
            shifts = _shift(self._layers)
            second = self._pass(inputs, targets, add=True)
            if not self._same(first, second._replace(gradient=second.gradient / 2)):
                restore()
                self._explain(first, inputs, targets, restore)
            self._refuse_other_rules(first, averages, shifts)
            restore()
            if evaluated is not None:
                self._refuse_other_loss(evaluated, self._evaluate(inputs, targets))
            for sign in (1.0, -1.0) if written else ():
                restore()
                self._refuse_dependent_writes(written, sign, inputs, targets)
            return first

    def run_all(
        self,
        loaded: Sequence[LoadedMicroBatch],
        smallest: str,
        evaluates: bool,
        must_be_finite: bool,
    ) -> Outcome:
        """Everything but metrics: both passes with the first micro-batch, and one with that of the
        smallest size.

        Args:
            loaded: the first micro-batch, and the smallest if that is another.
            smallest: describes the smallest one, for messages.
            evaluates: see `run`.
            must_be_finite: whether to reject a first loss that is not finite.

        Raises:
            JobError: see `run`.
        """
        first, *others = loaded
        if self._objective.carries:
            self.find_state_form(first.inputs)
        outcome = self.run(first.inputs, first.targets, evaluates)
        self.refuse_sums(first.inputs, first.targets)
        if must_be_finite and not outcome.is_finite:
            raise JobError(_not_finite_message(outcome.loss))
        for other in others:
            self.run_once(other.inputs, other.targets, smallest)
        return outcome

    def run_once(self, inputs: Any, targets: Any, what: str) -> Outcome:
        """One pass with a micro-batch of another size, for the errors it may raise.

        Args:
            inputs: of the micro-batch, as the loader gives them.
            targets: likewise.
            what: describes the micro-batch, for messages.

        Returns:
            The outcome of the pass.

        Raises:
            JobError: if user code raises.
        """
        with _restored(self._modules, self._layers), eager():
            return self._pass(inputs, targets, what)

    def find_state_form(self, inputs: Any) -> None:
        """Find the form of the state that the model carries, with which all passes begin.

        Raises:
            JobError: if it cannot be carried, or user code raises.
        """
        with (
            _restored(self._modules, self._layers),
            eager(),
            user_code("the first micro-batch, with a state to carry,"),
        ):
            seed_all(self._key)
            self._objective.find_state_form(inputs)

    def refuse_sums(self, inputs: Any, targets: Any) -> None:
        """Take the loss of the outputs and targets, and of the same twice over.

        A mean stays as it is then, and both parts of (sum, weight) double. A loss that cannot take
        its samples twice, such as one of the model's own, is not tried.

        Raises:
            JobError: for a sum without a weight, or a weight without a sum.
        """
        with _restored(self._modules, self._layers), eager():
            with user_code("the first micro-batch"):
                seed_all(self._key)
                once, outputs, targets = self._objective.evaluate(inputs, targets)
            twice = once
            if isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor):
                seed_all(self._key)
                # Memory for twice the outputs need not be there either
                with contextlib.suppress(Exception), torch.no_grad():
                    twice = self._objective.loss_of(twofold(outputs), twofold(targets))
        if problem := self._sum_problem(once, twice):
            raise JobError(f"loss.name: {problem}")

    def _sum_problem(self, once: LossValue, twice: LossValue) -> str:
        close = _TOLERANCE[self._precision.name]

        def grows(before: torch.Tensor, after: torch.Tensor, factor: float) -> bool:
            value = before.item()
            if value == 0 or not math.isfinite(value):
                return False
            return math.isclose(after.item(), factor * value, rel_tol=close)

        doubles = grows(once.value, twice.value, 2)
        if once.weight is not None and not once.weight.item() >= 0:
            return (
                f"the weight of the first micro-batch is {once.weight.item():g}: it must be 0 or "
                "more, such as the number of targets that count"
            )
        if once.weight is None and doubles:
            return (
                "the loss of twice the samples is twice as large: it is a sum, so the result would "
                "depend on batch.micro; return the mean, or the pair (sum, number of samples)"
            )
        if once.weight is None or twice.weight is None or once.weight.item() == 0:
            return ""
        if doubles and not grows(once.weight, twice.weight, 2):
            return "of the pair, the sum doubles with the samples, and the weight does not"
        if grows(once.weight, twice.weight, 2) and grows(once.value, twice.value, 1):
            return "of the pair (sum, weight) the first is a mean: return the sum"
        return ""

    @torch.no_grad()
    def try_metrics(self, metrics: Metrics, batch: LoadedMicroBatch) -> list[str]:
        """Take the metrics' totals of a micro-batch of the test set, twice.

        Returns:
            The names of those that do not apply to it.

        Raises:
            JobError: naming the metric that raises, has totals of another shape than it promises,
                or gives other totals for the same samples.
        """
        if not metrics:
            return []
        without_result = []
        size = batch.micro_batch.size
        with (
            _restored(self._modules, self._layers),
            eager(),
            self._evaluating(),
            explain_out_of_memory(
                f"an evaluation of {size:,} samples at once", "set evaluate.micro_batch lower"
            ),
            user_code("the first micro-batch of the test set"),
        ):
            seed_all(self._key)
            _, outputs, targets = self._objective.evaluate(batch.inputs, batch.targets)
            for name, metric in metrics.items():
                first, again = (
                    self._totals(name, metric, batch.inputs, outputs, targets) for _ in range(2)
                )
                close = _TOLERANCE[self._precision.name]
                if not torch.allclose(first, again, rtol=close, equal_nan=True):
                    raise JobError(
                        f"evaluate.metrics: {name} gives totals {first.tolist()}, then "
                        f"{again.tolist()}, for the same samples: a metric keeps nothing between "
                        "calls"
                    )
                if isinstance(metric, StateMetric):
                    continue
                with contextlib.suppress(JobError):  # that of the whole test set counts
                    if result_of(name, metric, first.tolist()) is None:
                        without_result.append(name)
        return without_result

    def _totals(
        self, name: str, metric: Metric | StateMetric, inputs: Any, outputs: Any, targets: Any
    ) -> torch.Tensor:
        seed_all(self._key)
        try:
            if isinstance(metric, StateMetric):
                return torch.tensor([metric.try_out(outputs, targets, self._precision.device)])
            if (predict := predict_of(metric)) is not None:
                outputs = self._objective.predict(predict, inputs)
            return totals_of(name, metric, outputs, targets).double()
        except RunExit:
            raise
        except MetricError as error:
            raise JobError(str(error)) from None
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise JobError(f"evaluate.metrics: {name} raises {describe(error)}") from None

    def _pass(
        self, inputs: Any, targets: Any, what: str = "the first micro-batch", add: bool = False
    ) -> Outcome:
        """Forward and backward; gradients are accumulated if `add`, and replaced otherwise."""
        if not add:
            clear_gradients(self._modules)
        counts = [int(layer.uses) for layer in self._layers]
        with user_code(what):
            value = self._forward(inputs, targets)
            value.mean().backward()
        grads = {
            name: weight.grad
            for name, weight in named_parameters(self._modules)
            if weight.grad is not None
        }
        for name, grad in grads.items():
            if grad.is_sparse:
                raise JobError(
                    f"model.name: the parameter {name!r} has a sparse gradient, which cannot be "
                    "averaged with the dense ones of other workers: build the embedding with "
                    "sparse=False"
                )
        norms = [float(torch.linalg.vector_norm(grad)) for grad in grads.values()]
        uses = tuple(
            int(layer.uses) - count for layer, count in zip(self._layers, counts, strict=True)
        )
        weight = None if value.weight is None else value.weight.item()
        finite = bool(value.value.isfinite())
        return Outcome(value.mean().item(), math.hypot(*norms), uses, weight, finite)

    def _forward(self, inputs: Any, targets: Any) -> LossValue:
        seed_all(self._key)
        return self._objective(inputs, targets)

    @torch.no_grad()
    def _evaluate(self, inputs: Any, targets: Any) -> float:
        """The loss in evaluation mode."""
        with self._evaluating(), user_code("the first micro-batch, in evaluation mode,"):
            return self._forward(inputs, targets).mean().item()

    def _evaluate_without_changes(self, inputs: Any, targets: Any) -> float:
        """The same, which must not change saved state: not the running statistics either."""
        before = _State.of(self._modules, [])
        loss = self._evaluate(inputs, targets)
        before.check_unchanged(self._modules, [], "a pass in evaluation mode")
        return loss

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Model and loss are in evaluation mode during the `with` block."""
        self._objective.set_mode(training=False)
        try:
            yield
        finally:
            self._objective.set_mode(training=True)

    def _refuse_other_loss(self, first: float, again: float) -> None:
        if not self._same(Outcome(first, 0.0, ()), Outcome(again, 0.0, ())):
            raise JobError(
                "model.name: in evaluation mode the model or the loss gives a different result for "
                f"the same samples, seeds and state: loss {first!r}, then {again!r}"
            )

    def _versions(self) -> dict[str, tuple[int, int]]:
        """Identity and version of each saved floating-point tensor except the running statistics.

        The version counts writes, except those through `.data`.
        """
        running = {id(buffer) for layer in self._layers for buffer in layer.averages}
        return {
            name: (id(value), value._version)
            for name, value in saved_tensors(self._modules).items()
            if (value.is_floating_point() or value.is_complex())
            and id(value) not in running
            and not value.is_inference()  # read-only here, and without a version
        }

    def _refuse_dependent_writes(
        self, written: list[str], sign: float, inputs: Any, targets: Any
    ) -> None:
        """Reject tensors that a pass updates depending on their values, even if it left the initial
        values unchanged.

        Examples: converged spectral normalisation, an embedding with all rows within its max_norm,
        weights clamped in place. Shifted far up or down, such a tensor does not keep its values. A
        buffer that each pass recomputes returns to its previous values, which is allowed.

        Args:
            written: names of the tensors that a pass writes to.
            sign: 1 or −1, the direction of the shift.
            inputs: of the micro-batch.
            targets: likewise.
        """
        tensors = saved_tensors(self._modules)
        before = {name: tensors[name].detach().clone() for name in written if name in tensors}
        shifted: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for name, value in before.items():
                with contextlib.suppress(RuntimeError):  # elements that share memory
                    tensors[name].add_(sign * 1000 * (1 + value.abs()))
                    shifted[name] = tensors[name].detach().clone()
        # It may raise if it reads such a tensor before writing it, which is allowed
        with contextlib.suppress(JobError):
            self._pass(inputs, targets)
        after = saved_tensors(self._modules)  # a pass may have replaced a tensor
        dependent = [
            name
            for name, value in shifted.items()
            if name in after and not _keeps_values(after[name], value, before[name])
        ]
        with torch.no_grad():
            for name in shifted.keys() & after.keys():
                if after[name].shape == before[name].shape:
                    after[name].copy_(before[name])
        if dependent:
            raise JobError(_changed_message(min(dependent)))

    def _same(self, one: Outcome, other: Outcome) -> bool:
        tolerance = _TOLERANCE[self._precision.name]

        def near(a: float, b: float) -> bool:
            return (
                a == b
                or math.isclose(a, b, rel_tol=tolerance)
                or (not math.isfinite(a) and not math.isfinite(b))
            )

        return (
            near(one.loss, other.loss)
            and near(one.gradient, other.gradient)
            and one.uses == other.uses
        )

    def _averages(self) -> list[torch.Tensor]:
        return [buffer.clone() for layer in self._layers for buffer in layer.averages]

    def _explain(
        self, first: Outcome, inputs: Any, targets: Any, restore: Callable[[], None]
    ) -> None:
        """Raise JobError with the reason why the outcomes of the two passes differ."""
        again = self._pass(inputs, targets)
        if not self._same(first, again):
            raise JobError(
                "model.name: the model or the loss gives a different result for the same samples, "
                f"seeds and state: loss {first.loss!r}, then {again.loss!r}. It draws from its own "
                "random generator (use torch, numpy.random or random, which are seeded for each "
                "micro-batch), or its forward pass changes state that is not saved"
            )
        for layer in self._layers:
            restore()
            _shift([layer])
            if not self._same(first, self._pass(inputs, targets)):
                raise JobError(
                    f"model.name: the layer {layer.name!r} ({type(layer.module).__name__}) reads "
                    "its running statistics while it trains; each worker then holds only its "
                    "part of them, so the result would depend on the number of workers"
                )
        restore()
        self._pass(inputs, targets)
        restore()
        twice = self._pass(inputs, targets, add=True)
        if not self._same(first, twice._replace(gradient=twice.gradient / 2)):
            raise JobError(
                "model.name: the gradients of two micro-batches do not add up: a hook changes "
                "what has been accumulated, so the result would depend on how many micro-batches "
                "a worker processes (a hook on the gradient of one pass does not)"
            )
        raise JobError(
            "model.name: the model reads running statistics of batch normalisation while it trains"
        )

    def _refuse_other_rules(
        self, first: Outcome, averages: list[torch.Tensor], shifts: list[torch.Tensor]
    ) -> None:
        """Reject layers whose running statistics follow another update rule."""
        for number, layer in enumerate(self._layers):
            factor = (1 - layer.momentum) ** first.uses[number]
            for buffer, before, shift in zip(
                layer.averages, averages[2 * number :], shifts[2 * number :], strict=False
            ):
                tolerance = 1e-3 * shift.abs() + 1e-5 * before.abs()
                error = (buffer - before - factor * shift).abs()
                if not bool((error <= tolerance).logical_or(~before.isfinite()).all()):
                    raise JobError(
                        f"model.name: the layer {layer.name!r} ({type(layer.module).__name__}) "
                        "does not follow the rule running = (1 − momentum)·running + "
                        "momentum·batch, so the workers' parts of its running statistics would "
                        "not add up"
                    )


class _State(NamedTuple):
    """Digests of the saved state that a forward and backward pass must not change."""

    digests: Mapping[str, int]
    extra: Mapping[str, bytes]
    modes: Mapping[str, bool]

    @classmethod
    def of(cls, modules: Modules, layers: list[NormLayer]) -> _State:
        running = {id(buffer) for layer in layers for buffer in (*layer.averages, layer.uses)}
        tensors = {
            name: value.detach()
            for name, value in saved_tensors(modules).items()
            if id(value) not in running
        }
        extra = {name: pack({name: value}) for name, value in extra_states(modules).items()}
        return cls(
            tensor_digests(tensors),
            extra,
            {name: module.training for name, module in named_modules(modules)},
        )

    def check_unchanged(
        self, modules: Modules, layers: list[NormLayer], what: str = "the forward or backward pass"
    ) -> None:
        after = _State.of(modules, layers)
        changed = [name for name in self.digests if after.digests.get(name) != self.digests[name]]
        changed += [name for name in self.extra if after.extra.get(name) != self.extra[name]]
        if changed:
            raise JobError(_changed_message(changed[0], what))
        if switched := [
            name for name, mode in after.modes.items() if self.modes.get(name, mode) != mode
        ]:
            raise JobError(
                f"model.name: {what} changes the mode (training or evaluation) of {switched[0]!r}"
            )


def _keeps_values(after: torch.Tensor, shifted: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether each element has its shifted value or, in a buffer, its value before the shift."""
    if after.shape != shifted.shape:
        return False
    kept = (after == shifted) | (after.isnan() & shifted.isnan())
    if not isinstance(after, torch.nn.Parameter):
        kept |= after == before
    return bool(kept.all())


def _changed_message(name: str, what: str = "the forward or backward pass") -> str:
    return (
        f"model.name: {what} changes {name!r}, which is saved with the "
        "model: its value would depend on how many micro-batches a worker processes (a cache may "
        "be a buffer with persistent=False)"
    )


def _restored(
    modules: Modules, layers: list[NormLayer]
) -> AbstractContextManager[Callable[[], None]]:
    """Restore saved buffers and counts, and clear gradients; see `restored`. Caches that are not
    saved stay: a second pass shows whether results depend on them.
    """
    saved = (
        value
        for value in saved_tensors(modules).values()
        if not isinstance(value, torch.nn.Parameter)
    )
    statistics = (buffer for layer in layers for buffer in (*layer.averages, layer.uses))
    return restored(modules, [*saved, *statistics])


@torch.no_grad()
def _shift(layers: list[NormLayer]) -> list[torch.Tensor]:
    """Shift the running statistics and the counts; returns δ of each mean and variance."""
    shifts = []
    for layer in layers:
        mean, var = layer.averages
        shifts += [1 + mean.abs(), 1 + 3 * var.abs()]
        mean.add_(shifts[-2])
        var.add_(shifts[-1])
        layer.uses.add_(_COUNT_SHIFT)
    return shifts


def fingerprint(batch: Any) -> int:
    """CRC-32 of the contents of a batch: tensors, also nested in lists, tuples and dicts, and
    plain values.
    """
    if isinstance(batch, torch.Tensor):
        batch = batch.detach() if batch.layout == torch.strided else batch.detach().to_dense()
        return zlib.crc32(
            batch.cpu()
            .resolve_conj()
            .resolve_neg()
            .contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .numpy()
            .data,
            len(batch.shape),
        )
    if isinstance(batch, Mapping):
        return zlib.crc32(
            repr([(str(key), fingerprint(value)) for key, value in batch.items()]).encode()
        )
    if isinstance(batch, (list, tuple)):
        return zlib.crc32(repr([fingerprint(value) for value in batch]).encode())
    known = isinstance(batch, (str, bytes, int, float, bool, type(None)))
    return zlib.crc32((repr(batch) if known else type(batch).__qualname__).encode())
