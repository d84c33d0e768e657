"""Metrics of torchmetrics: their states, combined over the workers by the engine's collectives.

Formula:  a state is combined as its `dist_reduce_fx` specifies: sums, maxima, minima, or
          concatenation in the order of the test set.
Source:   torchmetrics.Metric.add_state; torchmetrics itself combines states by torch.distributed.
Contract: each sample counts once on any number of workers. Workers tell each other the shapes and
          dtypes of their states first, as an update may change both, and a worker without samples
          has only the defaults. torchmetrics is not imported here: a metric is recognised by what
          it has.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from hvdlarge.comm.interfaces import Collectives
from hvdlarge.comm.solo import SoloCollectives
from hvdlarge.evaluation.parts import MetricError, part
from hvdlarge.exits import JobError, is_out_of_memory

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
        self._has_samples = False
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
        self._has_samples = False

    def update(self, outputs: Any, targets: Any) -> None:
        """Take a micro-batch into account."""
        output, target = self._parts
        self._metric.update(part(outputs, output), part(targets, target))
        self._has_samples = True

    def combine(self, tensors: Collectives) -> None:
        """Combine the workers' states. Every rank calls this together.

        Raises:
            JobError: on every rank, naming a state whose shapes on the workers do not fit.
            MetricError: on one rank, naming a state that cannot be sent.
        """
        for state, reduction in self._reductions.items():
            exchange = _Exchange(tensors, self._name, state, self._metric.device)
            value = getattr(self._metric, state)
            if reduction == "cat":
                whole = exchange.concatenated(_listed(value) if self._has_samples else [])
                value = [whole] if isinstance(value, list) else whole
            elif reduction == "list":
                value = exchange.listed(value)
            else:
                value = exchange.reduced(value, reduction, self._has_samples)
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
            if is_out_of_memory(error):
                raise
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
            JobError: if its states cannot be combined, or its result is not one number.
            MetricError: naming a state that cannot be sent.
        """
        self.begin(device)
        self.update(outputs, targets)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about so few samples
            alone = self._tentative()
            # As in an evaluation, so that what cannot be sent is known before the first step
            self.combine(SoloCollectives())
            if math.isnan(self._tentative()):
                return math.nan
            number = self.result()
        if not math.isnan(alone) and not math.isclose(number, alone, rel_tol=1e-3, abs_tol=1e-6):
            raise JobError(
                f"evaluate.metrics: {self._name}: compute() gives {alone:g} before its states are "
                f"combined and {number:g} afterwards, for the same samples: it depends on how many "
                "entries its lists have, and so on the number of workers"
            )
        return number

    def _tentative(self) -> float:
        """The metric so far; NaN if compute() raises, infinite if its result is not a number."""
        try:
            value = self._metric.compute()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return math.nan  # raised again by the first evaluation, if it is not the samples
        finally:
            self._metric._computed = None
        return float(value) if _is_number(value) else math.inf


def _held_metrics(metric: Any) -> str:
    """What of a metric is not among its own states, in words; empty if all of it is."""
    modules = list(metric.modules())[1:] if isinstance(metric, torch.nn.Module) else []
    if any(hasattr(module, "_reductions") for module in modules):
        return "holds other metrics"
    return "" if metric._reductions else "has no states of its own"


def _is_number(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex()


def _reduction_of(name: str, state: str, function: Any, default: Any) -> str:
    kind, is_list = getattr(function, "__name__", None), isinstance(default, list)
    if kind == "dim_zero_cat":
        return "cat"
    if function is None and is_list:
        return "list"
    if kind not in _REDUCTIONS:
        raise JobError(
            f"evaluate.metrics: {name}: its state {state!r} is combined by {kind or function}, "
            "which depends on the number of workers: only states that are added, concatenated, or "
            "of which the largest or smallest counts can be combined"
        )
    if is_list:
        raise JobError(
            f"evaluate.metrics: {name}: its state {state!r} is a list, and is combined by "
            f'{kind}: give it dist_reduce_fx="cat", or a tensor as its default'
        )
    if _REDUCTIONS[kind] == "sum" and bool(torch.as_tensor(default).any()):
        raise JobError(
            f"evaluate.metrics: {name}: its state {state!r} is added up over the workers and does "
            "not start at 0, so its start would count once for each worker"
        )
    return _REDUCTIONS[kind]


class _Layout(NamedTuple):
    """How a worker holds a state."""

    counts: bool  # whether it decides on shape and dtype: its worker had samples
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Exchange:
    """The exchange of one state between the workers.

    Args:
        tensors: the channel between the workers.
        metric: its name, for messages.
        state: its name.
        device: of the metric.
    """

    def __init__(self, tensors: Collectives, metric: str, state: str, device: torch.device) -> None:
        self._tensors, self._device = tensors, device
        self._name = f"evaluation.{metric}.{state}"
        self._what = f"evaluate.metrics: {metric}: its state {state!r}"

    def reduced(self, value: torch.Tensor, reduction: str, has_samples: bool) -> torch.Tensor:
        """The sum, maximum or minimum of the workers' values.

        Args:
            value: of this worker: the default if it had no samples.
            reduction: sum, max or min.
            has_samples: whether it had.
        """
        layouts = self._layouts(value, has_samples)
        counts = [layout.counts for layout in layouts]
        if not any(counts):
            return value
        dtype = _promoted(layouts)
        shape = self._broadcast([layout.shape for layout in layouts if layout.counts])
        # A worker without samples adds nothing to a sum, and is left out of the others
        if has_samples:
            value = value.to(dtype).broadcast_to(shape)
        else:
            value = torch.zeros(shape, dtype=dtype, device=self._device)
        if reduction == "sum" and not dtype.is_complex:
            # Horovod adds few types; in these no sum of the workers overflows
            wide = torch.float64 if dtype.is_floating_point else torch.int64
            total = self._tensors.sum(value.to(wide).contiguous(), self._name)
            return total if dtype == torch.bool else total.to(dtype)
        gathered = self._gather(value, self._name, len(counts))
        every = gathered[torch.tensor(counts, device=self._device)]
        if reduction == "sum":
            return every.sum(dim=0)
        return every.amax(dim=0) if reduction == "max" else every.amin(dim=0)

    def concatenated(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The parts of all ranks in their order, which is that of the test set."""
        parts = [part.unsqueeze(0) if part.ndim == 0 else part for part in parts]
        own = torch.cat(list(parts)) if parts else torch.zeros(0, device=self._device)
        every = self._layouts(own, has_samples=len(own) > 0)
        dtype, counting = _promoted(every), [layout for layout in every if layout.counts]
        if len({layout.shape[1:] for layout in counting}) > 1:
            raise self._unfit([layout.shape for layout in counting])
        if not counting:
            return own
        rows = [layout.shape[0] if layout.counts else 0 for layout in every]
        padded = torch.zeros((max(rows), *counting[0].shape[1:]), dtype=dtype, device=self._device)
        if len(own):  # an idle worker's has no shape
            padded[: len(own)] = own
        gathered = self._gather(padded, self._name, len(rows))
        return torch.cat([part[:count] for part, count in zip(gathered, rows, strict=True)])

    def listed(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The parts of all ranks in their order, each by itself."""
        name, device = f"{self._name}.parts", self._device
        count = torch.tensor([len(parts)], device=device)
        counts = self._tensors.gather(count, f"{name}.count").reshape(-1).tolist()
        lengths = torch.zeros(max(counts), dtype=torch.int64, device=device)
        lengths[: len(parts)] = torch.tensor([len(part) if part.ndim else 1 for part in parts])
        every = self._gather(lengths, name, len(counts)).tolist()
        rows = [length for own, count in zip(every, counts, strict=True) for length in own[:count]]
        return list(self.concatenated(parts).split(rows)) if rows else []

    def _layouts(self, value: Any, has_samples: bool) -> list[_Layout]:
        """How each worker holds the state."""
        if not isinstance(value, torch.Tensor):
            raise MetricError(f"{self._what} is a {type(value).__name__}, not a tensor")
        if value.dtype not in _DTYPES or value.ndim > _MOST_DIMENSIONS:
            raise MetricError(f"{self._what}, {value.dtype}{list(value.shape)}, cannot be sent")
        header = [has_samples, _DTYPES.index(value.dtype), value.ndim, *value.shape]
        header += [0] * (3 + _MOST_DIMENSIONS - len(header))
        sent = torch.tensor(header, dtype=torch.int64, device=self._device)
        return [
            _Layout(bool(counts), _DTYPES[dtype], tuple(shape[:ndim]))
            for counts, dtype, ndim, *shape in self._tensors.gather(
                sent, f"{self._name}.shape"
            ).tolist()
        ]

    def _broadcast(self, shapes: Sequence[tuple[int, ...]]) -> Sequence[int]:
        try:
            return torch.broadcast_shapes(*shapes)
        except RuntimeError:
            raise self._unfit(shapes) from None

    def _unfit(self, shapes: Sequence[tuple[int, ...]]) -> JobError:
        shown = " and ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        return JobError(f"{self._what} has shapes that cannot be combined on the workers: {shown}")

    def _gather(self, value: torch.Tensor, name: str, workers: int) -> torch.Tensor:
        """Every worker's tensor, of one shape and dtype on all, stacked."""
        if not value.numel():
            return value.expand(workers, *value.shape)
        # As bytes: Horovod does not carry every dtype
        raw = value.contiguous().reshape(-1).view(torch.uint8)
        every = self._tensors.gather(raw, name)
        return every.view(value.dtype).reshape(len(every), *value.shape)


_MOST_DIMENSIONS = 8
_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip


def _promoted(layouts: Sequence[_Layout]) -> torch.dtype:
    """The dtype that the workers with samples have."""
    counting = [layout.dtype for layout in layouts if layout.counts]
    return functools.reduce(torch.promote_types, counting or [layouts[0].dtype])


def _listed(value: Any) -> list[torch.Tensor]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _described(value: Any) -> str:
    keys = f" of {', '.join(map(str, value))}" if isinstance(value, Mapping) else ""
    return f"a {type(value).__name__}{keys}"
