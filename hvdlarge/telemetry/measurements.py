"""What is measured within the steps of a run, beside its loss: norms by layer, gradient noise, and
the distance from the start.

`train_step` calls these methods; a run that measures nothing has `NoMeasurements`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from hvdlarge.comm.interfaces import ControlChannel
from hvdlarge.optim.interface import GradientNorms
from hvdlarge.replica.replica import Replica
from hvdlarge.replica.train_state import TrainState
from hvdlarge.schedule.decision import Decision
from hvdlarge.telemetry.gradient_noise import ENOUGH, GradientNoise, estimate
from hvdlarge.telemetry.layer_statistics import LayerStatistics
from hvdlarge.telemetry.pass_gradients import PassGradients
from hvdlarge.telemetry.weight_distance import WeightDistance, is_on_grid


class Measurements:
    """The measurements of one rank. Every rank makes one, with the same settings.

    Args:
        replica: whose steps are measured.
        control: the channel between the ranks.
        state: of the run; holds the average of the gradient noise.
        layers_every: steps between measurements of layers; None for none.
        noise_every: steps between measurements of the gradient noise; None for none.
        distance: of the weights from the start; None for none, and on all ranks but 0.
    """

    def __init__(
        self,
        replica: Replica,
        control: ControlChannel,
        state: TrainState,
        layers_every: int | None,
        noise_every: int | None,
        distance: WeightDistance | None,
    ) -> None:
        self._control, self._state, self._distance = control, state, distance
        self._scaler = replica.loss_scaler
        self._layers_every = layers_every if control.rank == 0 else None
        self._noise_every = noise_every
        self._layers = LayerStatistics(replica.names, replica.update.optimizer)
        self._passes = PassGradients(replica.names)
        self._observes_noise = self._observes_layers = False
        self._scale = 1.0  # of the losses of this step
        self._total_square: float | None = None  # of this step's mean gradient, once it is known
        self._record: dict[str, Any] = {}

    @contextmanager
    def step(self, decision: Decision) -> Iterator[None]:
        """Measure the step within the `with` block."""
        number = decision.step + 1
        self._observes_noise = _is_due(number, self._noise_every)
        self._observes_layers = _is_due(number, self._layers_every)
        self._scale, self._total_square, self._record = self._scaler.value, None, {}
        with self._passes.observed() if self._observes_noise else nullcontext():
            yield

    def end_pass(self, weight: torch.Tensor | float) -> None:
        """A backward pass is complete, whose loss has this weight, such as its samples."""
        if self._observes_noise:
            self._passes.end_pass(weight)

    def before_update(self, norms: GradientNorms) -> None:
        """The weights will be updated by gradients of these norms, not clipped yet."""
        if self._observes_noise:
            self._total_square = sum(size**2 for size in norms.gradients.values())
        if self._observes_layers:
            self._layers.before_update(norms)

    def after_update(self) -> None:
        """The weights were updated."""
        if self._observes_layers:
            self._record["layers"] = self._layers.after_update()

    def finish(self, decision: Decision) -> list[Mapping[str, Any]]:
        """The records of the step, one for each kind. Every rank calls this together after it."""
        records: list[Mapping[str, Any]] = [self._record] if self._record else []
        if self._observes_noise:
            records.append(self._measure_noise(decision))
        if self._distance is not None and is_on_grid(decision.step + 1):
            records.append(self._distance.measure())
        return records

    def _measure_noise(self, decision: Decision) -> dict[str, Any]:
        """The record of the noise: that of this step, and the average."""
        gradients = self._passes.gather(self._control, decision.global_batch, self._scale)
        noise = None
        if self._total_square is not None:
            noise = estimate(gradients, self._total_square, decision.global_batch)
        if noise is not None:
            average = noise.averaged(self.average)
            self._state.gradient_square, self._state.gradient_variance = average
            self._state.noise_measurements += 1
        return {
            "global_batch": decision.global_batch,
            "noise_scale": self.noise_scale,
            "gradient_square": None if noise is None else noise.square,
            "gradient_variance": None if noise is None else noise.variance,
        }

    @property
    def average(self) -> GradientNoise | None:
        """The average of the noise over measurements; None before the first."""
        square, variance = self._state.gradient_square, self._state.gradient_variance
        return None if square is None or variance is None else GradientNoise(square, variance)

    @property
    def noise_scale(self) -> float | None:
        """The noise scale, averaged, in samples; None if it is not available."""
        return None if self.average is None else self.average.scale

    @property
    def settled_noise_scale(self) -> float | None:
        """The noise scale once it is an average of ten measurements; None before."""
        return self.noise_scale if self._state.noise_measurements >= ENOUGH else None


class NoMeasurements:
    """Measures nothing."""

    settled_noise_scale = None

    def step(self, decision: Decision) -> nullcontext[None]:
        """Do nothing."""
        return nullcontext()

    def end_pass(self, weight: torch.Tensor | float) -> None:
        """Do nothing."""

    def before_update(self, norms: GradientNorms) -> None:
        """Do nothing."""

    def after_update(self) -> None:
        """Do nothing."""

    def finish(self, decision: Decision) -> list[Mapping[str, Any]]:
        """There are no records."""
        return []


def _is_due(number: int, every: int | None) -> bool:
    return every is not None and number % every == 0
