"""The content of metrics.jsonl and decisions.jsonl, as series of bounded size.

Positions of all series are (updates, epoch, seconds): the weight updates after which a line was
written, the epochs of training up to there, and the seconds of training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from hvdlarge.reporting.jsonl import finite, number
from hvdlarge.reporting.targets import Target
from hvdlarge.reporting.thinning import IntervalSums, LayerMeans, LogSeries, Row, Series

_SECONDS = "_seconds"
_STEP_VALUES = ("loss", "lr", "global_batch", "samples_per_second")
_POSITION = ("step", "epoch", "samples_seen", "time", "global_batch")
_MOST_RESULTS = 40  # metrics of an evaluation
_MOST_STAGES = 1000
_MOST_NAMES = 1000  # of anything else in a file that may be foreign
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Start(NamedTuple):
    """A start of a run, from starts.jsonl.

    Attributes:
        time: in seconds since 1970; None if unknown.
        step: the first that it takes.
        world_size: its workers; None if unknown.
    """

    time: float | None
    step: float
    world_size: int | None


class Stretch(NamedTuple):
    """A part of a run, in updates."""

    first: float
    last: float


@dataclass
class NonFinite:
    """Values that were not finite: how many, and the epoch of the first."""

    count: int
    epoch: float


class MetricsLog:
    """Collects the records of metrics.jsonl.

    Seconds of training are those between lines by their `time`. The time from the last line before
    a stop to the next start is left out. Where lines have no `time` (an older run), the seconds of
    the phases are summed.

    Args:
        starts: of the run, in order.
        targets: results whose first evaluation that reaches them is to be recorded.
        job: the run's, as its resolved YAML holds it.
    """

    def __init__(
        self, starts: Sequence[Start], targets: Sequence[Target], job: Mapping[str, Any]
    ) -> None:
        self._starts, self._targets, self._job = starts, targets, job
        self._time: float | None = None  # of the line before
        self._seconds = 0.0
        self._samples = 0.0  # seen after the step line before
        self._stretch: tuple[float, float, float] | None = None  # lr, first and last update
        self._next_start = 0
        self.records = self.foreign = 0
        self.position: Row = (0.0, 0.0, 0.0)
        self.samples_seen = 0.0
        self.without_time = 0  # step lines
        self.evaluate_seconds = 0.0
        self.steps = {name: Series(4) for name in _STEP_VALUES}
        self.trust = Series(5, low=3, high=4)  # smallest and largest ratio of any layer
        self.results: dict[str, Series] = {}
        self.phases = IntervalSums()
        self.layers: dict[str, LayerMeans] = {}
        self.quantiles: dict[str, Series] = {}
        self.noise, self.noise_missing = Series(4), 0
        self.omitted_results: set[str] = set()  # beyond the most that are held
        self.distance = LogSeries(4)
        self.distances: dict[str, float] = {}  # of the last such line, by parameter
        self.nonfinite: dict[str, NonFinite] = {}
        self.reached: dict[Target, Row] = {}
        self.resumed: list[Row] = []  # where the second and later starts went on
        self.constant_lr: Stretch | None = None  # the longest stretch

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in a line. One without step and epoch is no line of a run, and counted as such."""
        step, epoch = number(record.get("step")), number(record.get("epoch"))
        if step is None or epoch is None or not (math.isfinite(step) and math.isfinite(epoch)):
            self.foreign += 1
            return
        self.records += 1
        self._move_to(step, epoch, record)
        kinds = {
            "test_loss": self._add_evaluation,
            "loss": self._add_step,
            "layers": self._add_layers,
            "noise_scale": self._add_noise,
            "weight_distance": self._add_distance,
        }
        next((add for key, add in kinds.items() if key in record), self._add_evaluation)(record)

    def _move_to(self, step: float, epoch: float, record: Mapping[str, Any]) -> None:
        before = self.position
        time = number(record.get("time"))
        if time is not None and math.isfinite(time):
            began = self._time
            for start in self._starts:
                if start.time is not None and (began is None or began < start.time <= time):
                    began = start.time
            if began is None:  # no start is known either
                self._seconds += sum(_phases(record).values())
            else:
                self._seconds += max(0.0, time - began)
            self._time = time
        elif "loss" in record:
            self.without_time += 1
            self._seconds += sum(_phases(record).values())
        self.position = (step + 1, epoch, self._seconds)
        while self._next_start < len(self._starts) and (
            self._starts[self._next_start].step <= step
        ):
            if self._next_start > 0:
                self.resumed.append(before)
            self._next_start += 1

    def _value(self, record: Mapping[str, Any], key: str) -> float | None:
        """A finite number; one that is not finite is counted."""
        value = number(record.get(key))
        if value is None or math.isfinite(value):
            return value
        if key in self.nonfinite or len(self.nonfinite) < _MOST_NAMES:
            self.nonfinite.setdefault(key, NonFinite(0, self.position[1])).count += 1
        return None

    def _add_step(self, record: Mapping[str, Any]) -> None:
        for name, series in self.steps.items():
            if (value := self._value(record, name)) is not None:
                series.add((*self.position, value))
        low, high = self._value(record, "trust_ratio_min"), self._value(record, "trust_ratio_max")
        if low is not None and high is not None:
            self.trust.add((*self.position, low, high))
        samples = finite(record.get("samples_seen")) or 0.0
        room = len(self.phases.totals) < _MOST_NAMES
        phases = {
            name: value
            for name, value in _phases(record).items()
            if room or name in self.phases.totals
        }
        updates = max(0.0, self.position[0] - self._updates_before())
        intervals = {"updates": updates, **phases}
        self.phases.add(self.position, intervals | {"samples": max(0.0, samples - self._samples)})
        self._samples = self.samples_seen = samples
        if (lr := number(record.get("lr"))) is not None:
            self._follow_lr(lr)

    def _updates_before(self) -> float:
        """Updates at the end of the step line before; 0 before the first."""
        end = self.phases.last_end
        return 0.0 if end is None else end[0]

    def _follow_lr(self, lr: float) -> None:
        updates = self.position[0]
        if self._stretch is None or lr != self._stretch[0]:
            self._stretch = (lr, updates, updates)
        self._stretch = (lr, self._stretch[1], updates)
        stretch = Stretch(*self._stretch[1:])
        longest = self.constant_lr
        if longest is None or stretch.last - stretch.first >= longest.last - longest.first:
            self.constant_lr = stretch

    def _add_evaluation(self, record: Mapping[str, Any]) -> None:
        self.evaluate_seconds += _phases(record).get("evaluate", 0.0)
        for name in record:
            if name in _POSITION or name.endswith(_SECONDS):
                continue
            value = self._value(record, name)
            if value is None:
                continue
            if name not in self.results and len(self.results) >= _MOST_RESULTS:
                if len(self.omitted_results) < _MOST_NAMES:
                    self.omitted_results.add(name)
                continue
            self.results.setdefault(name, Series(4)).add((*self.position, value))
            for target in self._targets:
                if target.name == name and target.reached(value, self._job):
                    self.reached.setdefault(target, self.position)

    def _add_layers(self, record: Mapping[str, Any]) -> None:
        layers = record["layers"]
        if not isinstance(layers, Mapping):
            return
        for kind in ("trust_ratio", "update_ratio"):
            values = {
                name: value
                for name, layer in layers.items()
                if isinstance(layer, Mapping) and (value := number(layer.get(kind))) is not None
            }
            if not values:
                continue
            self.layers.setdefault(kind, LayerMeans()).add(self.position, values)
            finite = [value for value in values.values() if math.isfinite(value)]
            if finite:
                spread = np.quantile(finite, QUANTILES).tolist()
                series = self.quantiles.setdefault(kind, Series(8, low=3, high=7))
                series.add((*self.position, *spread))

    def _add_noise(self, record: Mapping[str, Any]) -> None:
        value = self._value(record, "noise_scale")
        if value is None:
            self.noise_missing += 1
        else:
            self.noise.add((*self.position, value))

    def _add_distance(self, record: Mapping[str, Any]) -> None:
        if (value := self._value(record, "weight_distance")) is not None:
            self.distance.add((*self.position, value))
        distances = record.get("distances")
        if isinstance(distances, Mapping):
            values = {str(name): number(value) for name, value in distances.items()}
            self.distances = {
                name: value
                for name, value in values.items()
                if value is not None and math.isfinite(value)
            }


def _phases(record: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by phase of a line; the names of the phases are those of the log."""
    seconds = {
        name.removesuffix(_SECONDS): finite(value)
        for name, value in record.items()
        if name.endswith(_SECONDS)
    }
    return {name: value for name, value in seconds.items() if value is not None and value >= 0}


@dataclass
class Stage:
    """Neighbouring decisions with one batch.

    Attributes:
        stage: its number.
        batch: samples in a step.
        micro_batch: samples in a pass on one worker; None if unknown.
        first_epoch: where it begins.
        last_epoch: where its last step begins.
        first_step: from 0.
        steps: taken in it.
        samples: trained on in it.
        lrs: of the first step, the highest, and that of the last.
    """

    stage: int
    batch: float
    micro_batch: float | None
    first_epoch: float
    last_epoch: float
    first_step: float
    steps: int = 0
    samples: float = 0.0
    lrs: list[float] = field(default_factory=list)


class DecisionsLog:
    """Collects the records of decisions.jsonl."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.omitted = 0  # steps of stages beyond the most that are held
        self.lr = Series(3)  # updates before the step, epoch, lr
        self.batch = Series(3)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in a decision; a record of another form is left out."""
        keys = ("step", "epoch", "stage", "stage_batch", "global_batch", "lr")
        values = [number(record.get(key)) for key in keys]
        if any(value is None or not math.isfinite(value) for value in values):
            return
        step, epoch, stage, batch, global_batch, lr = (value or 0.0 for value in values)
        self.lr.add((step, epoch, lr))
        self.batch.add((step, epoch, global_batch))
        last = self.stages[-1] if self.stages else None
        if last is None or (last.stage, last.batch) != (stage, batch):
            if len(self.stages) >= _MOST_STAGES:
                self.omitted += 1
                return
            micro = finite(record.get("micro_batch"))
            last = Stage(int(stage), batch, micro, epoch, epoch, step)
            self.stages.append(last)
            last.lrs = [lr, lr, lr]
        last.last_epoch = epoch
        last.steps += 1
        last.samples += global_batch
        last.lrs[1:] = [max(last.lrs[1], lr), lr]
