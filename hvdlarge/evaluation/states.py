"""Metrics of torchmetrics: their states, combined over the workers by the engine's collectives.

Formula:  a state is combined as its `dist_reduce_fx` specifies: sums, maxima, minima, or
          concatenation in the order of the test set.
Source:   torchmetrics.Metric.add_state; torchmetrics itself combines states by torch.distributed.
Contract: each sample counts once on any number of workers. torchmetrics is not imported here: a
          metric is recognised by what it has.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from hvdlarge.comm.interfaces import Collectives
from hvdlarge.evaluation.parts import part
from hvdlarge.exits import JobError

_REDUCTIONS = {"dim_zero_sum": "sum", "dim_zero_max": "max", "dim_zero_min": "min"}


class StateMetric:
    """A metric that is updated with each micro-batch.

    Args:
        name: of the result, for messages.
        metric: of torchmetrics.
        parts: key, attribute or position of what it gets, in the outputs and in the targets; None:
            the whole.
        higher_is_better: None if it is not known.

    Raises:
        JobError: naming a state that cannot be combined.
    """

    def __init__(
        self,
        name: str,
        metric: Any,
        parts: tuple[str | int | None, str | int | None],
        higher_is_better: bool | None,
    ) -> None:
        self.higher_is_better, self._parts = higher_is_better, parts
        self._name, self._metric = name, metric
        if holds := _held_metrics(metric):
            raise JobError(
                f"evaluate.metrics: {name}: this {type(metric).__name__} {holds}, so its states "
                "cannot be combined over the workers: name the metrics themselves"
            )
        metric._to_sync = metric.sync_on_compute = False  # the engine combines the states
        self._reductions = {
            state: _reduction_of(name, state, function, metric._defaults[state])
            for state, function in metric._reductions.items()
        }

    @staticmethod
    def fits(metric: Any) -> bool:
        """Whether this is a metric of torchmetrics."""
        attributes = ("update", "compute", "reset", "_reductions", "_defaults")
        return all(hasattr(metric, attribute) for attribute in attributes)

    def begin(self, device: torch.device) -> None:
        """Forget all samples."""
        self._metric.to(device)
        self._metric.reset()

    def update(self, outputs: Any, targets: Any) -> None:
        """Take a micro-batch into account."""
        output, target = self._parts
        self._metric.update(part(outputs, output), part(targets, target))

    def combine(self, tensors: Collectives) -> None:
        """Combine the workers' states. Every rank calls this together."""
        for state, reduction in self._reductions.items():
            value, name = getattr(self._metric, state), f"evaluation.{self._name}.{state}"
            if reduction == "cat":
                whole = _concatenated(value, tensors, name, self._metric.device)
                value = [whole] if isinstance(value, list) else whole
            elif reduction == "sum":
                value = tensors.sum(value, name)
            else:
                every = tensors.gather(value, name)
                value = every.amax(dim=0) if reduction == "max" else every.amin(dim=0)
            setattr(self._metric, state, value)
        # compute() warns, or refuses, where nothing was updated, as on an idle worker
        self._metric._update_count = max(1, self._metric._update_count)
        self._metric._computed = None

    def result(self) -> float:
        """The metric over all samples. Ranks with the same states do the same here.

        Raises:
            JobError: if it raises, or its result is not one number.
        """
        try:
            value: Any = self._metric.compute()
        except Exception as error:
            raise JobError(
                f"evaluate.metrics: {self._name}: compute() raises {type(error).__name__}: {error}"
            ) from error
        if not _is_number(value) or math.isnan(number := float(value)):
            what = repr(value.tolist()) if isinstance(value, torch.Tensor) else _described(value)
            raise JobError(
                f"evaluate.metrics: {self._name}: compute() gives {what}: a result is one number"
            )
        self._metric.reset()  # states may be as large as the test set
        return number

    def try_out(self, outputs: Any, targets: Any, device: torch.device) -> float:
        """The metric of one micro-batch, on a device; not a number where so few samples have none.

        Raises:
            JobError: if its result is not one number.
        """
        self.begin(device)
        self.update(outputs, targets)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about so few samples
            try:
                value = self._metric.compute()
            except Exception:  # raised again by the first evaluation, if it is not the samples
                return math.nan
        return float(value) if _is_number(value) and math.isnan(float(value)) else self.result()


def _held_metrics(metric: Any) -> str:
    """What of a metric is not among its own states, in words; empty if all of it is."""
    modules = list(metric.modules())[1:] if isinstance(metric, torch.nn.Module) else []
    if any(hasattr(module, "_reductions") for module in modules):
        return "holds other metrics"
    return "" if metric._reductions else "has no states of its own"


def _is_number(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex()


def _reduction_of(name: str, state: str, function: Any, default: Any) -> str:
    kind = getattr(function, "__name__", None)
    if kind == "dim_zero_cat" or (function is None and isinstance(default, list) and not default):
        return "cat"
    if kind in _REDUCTIONS:
        return _REDUCTIONS[kind]
    raise JobError(
        f"evaluate.metrics: {name}: its state {state!r} is combined by {kind or function}, which "
        "depends on the number of workers: only states that are added, concatenated, or of which "
        "the largest or smallest counts can be combined"
    )


def _concatenated(
    value: Any, tensors: Collectives, name: str, device: torch.device
) -> torch.Tensor:
    """The parts of all ranks in their order, which is that of the test set."""
    parts = [part.unsqueeze(0) if part.ndim == 0 else part for part in _listed(value)]
    # An idle worker does not know the shape and dtype of the others' parts
    own = torch.cat(parts) if parts else torch.zeros(0, device=device)
    described = torch.zeros(10, dtype=torch.int64, device=device)
    described[:3] = torch.tensor([len(own), own.ndim, _DTYPES.index(own.dtype)])
    described[3 : 2 + own.ndim] = torch.tensor(own.shape[1:], dtype=torch.int64)
    every = tensors.gather(described, f"{name}.shape").tolist()
    filled = [shape for shape in every if shape[0]] or every
    _, ndim, dtype, *rest = filled[0]
    longest = max(shape[0] for shape in every)
    padded = torch.zeros((longest, *rest[: ndim - 1]), dtype=_DTYPES[dtype], device=device)
    if len(own):  # an idle worker's has no shape
        padded[: len(own)] = own
    carried = padded.to(torch.uint8) if padded.dtype == torch.bool else padded
    gathered = tensors.gather(carried, name).to(padded.dtype)
    return torch.cat([rows[: shape[0]] for rows, shape in zip(gathered, every, strict=True)])


_DTYPES = [torch.float32, torch.float64, torch.int64, torch.int32, torch.bool, torch.float16]


def _listed(value: Any) -> list[torch.Tensor]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _described(value: Any) -> str:
    keys = f" of {', '.join(map(str, value))}" if isinstance(value, Mapping) else ""
    return f"a {type(value).__name__}{keys}"
