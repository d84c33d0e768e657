"""The exponential moving average of the weights: a second set of them, evaluated beside the first.

Formula:  a ← d·a + (1 − d)·w after each applied step,  d = 0.5^(B / h); a = average, w = weight,
          B = global batch of the step and h = half-life, both in samples. a starts at the first w
Source:   Busbridge, Ramapuram, Ablin, Likhomanenko, Dhekane, Suau, Webb, "How to Scale Your EMA"
          (2023): where the batch is multiplied by k, the decay becomes d^k. With a half-life in
          samples it does, so a growth of the batch does not change the average's memory.
Contract: every rank averages the same weights with the same d, so the averages agree as the weights
          do: bit for bit in exact mode. Trained parameters are averaged; frozen ones and buffers,
          running statistics among them, are those of the current weights. A skipped step does not
          count. Between steps the averages are part of checkpoints, digests and rollbacks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


class WeightAverage:
    """The averages of the trained parameters.

    Args:
        names: name of each parameter; the averages start at the parameters' current values.
        half_life: in samples, above 0.
    """

    def __init__(self, names: Mapping[torch.nn.Parameter, str], half_life: float) -> None:
        self._names = names
        self._half_life = half_life
        self._weights: list[torch.Tensor] = list(names)
        self._averages = [weight.detach().clone() for weight in self._weights]

    @torch.no_grad()
    def follow(self, global_batch: int) -> None:
        """Average the weights after an update; one pass over both.

        Args:
            global_batch: samples of the step.
        """
        share = -math.expm1(-math.log(2) * global_batch / self._half_life)  # 1 − d, exactly
        torch._foreach_lerp_(self._averages, self._weights, share)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The model has the averages as its weights during the `with` block, and afterwards the
        bits that it had before.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # By value: cuDNN's recurrent layers, for one, need each weight to stay where it is
        for weight, average in zip(self._weights, self._averages, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """The averages, by the parameter's name and `, ema`; not copied."""
        names = self._names.values()
        return {
            f"{name}, ema": average for name, average in zip(names, self._averages, strict=True)
        }

    def state_of(self, module: torch.nn.Module, copied: Mapping[str, Any]) -> dict[str, Any]:
        """The state_dict that a module has with the averages as its weights.

        Args:
            module: one of those whose parameters are averaged.
            copied: a copy of its state_dict on the CPU; what is not averaged is shared with it.
        """
        averages = dict(zip(map(id, self._weights), self._averages, strict=True))
        return {
            name: averages[id(value)].cpu().clone() if id(value) in averages else copied[name]
            for name, value in module.state_dict(keep_vars=True).items()
        }

    @torch.no_grad()
    def load(self, saved: Mapping[str, Any]) -> None:
        """Continue from saved averages.

        Args:
            saved: tensors by the parameter's full name.
        """
        for name, average in zip(self._names.values(), self._averages, strict=True):
            average.copy_(saved[name])
