"""The distance of the weights from those of the start, at steps on a logarithmic grid.

Formula:  d(t) = ‖w_t − w_0‖, over all trainable parameters and for each
Source:   Hoffer, Hubara, Soudry, "Train longer, generalize better" (2017): d grows like log t, as
          in ultra-slow diffusion; You et al., "The Limit of the Batch Size" (2020).
Contract: rank 0 alone measures. w_0 is kept in host memory and in a file of the run folder, so that
          a resumed run measures from the same start.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

PER_DOUBLING = 8  # measurements while the number of steps doubles
FILE = "initial_weights.pt"


def is_on_grid(steps: int) -> bool:
    """Whether distances are measured after so many steps: all up to 11, then eight times while
    their number doubles.

    >>> [steps for steps in range(1, 33) if is_on_grid(steps)][-10:]
    [15, 16, 18, 20, 21, 23, 25, 27, 30, 32]
    """
    # 2^(k/8) lies between steps − 1 and steps, in whole numbers
    before, after = (steps - 1) ** PER_DOUBLING, steps**PER_DOUBLING
    return after.bit_length() > before.bit_length()


class WeightDistance:
    """Distances of named parameters from their values at the start of the run.

    Args:
        names: of the trainable parameters.
        start: their values at the start, by name, on the CPU.
    """

    def __init__(
        self, names: Mapping[torch.nn.Parameter, str], start: Mapping[str, torch.Tensor]
    ) -> None:
        self._names, self._start = names, start

    @classmethod
    def begin(cls, names: Mapping[torch.nn.Parameter, str], folder: Path) -> WeightDistance:
        """From the weights as they are, which are written to the run folder.

        Raises:
            OSError: if they cannot be written.
        """
        start = {name: weight.detach().cpu().clone() for weight, name in names.items()}
        temporary = folder / f".{FILE}.part"
        with temporary.open("wb") as file:
            torch.save(start, file)
        os.replace(temporary, folder / FILE)
        return cls(names, start)

    @classmethod
    def resume(cls, names: Mapping[torch.nn.Parameter, str], folder: Path) -> WeightDistance | None:
        """From the file that the start of the run wrote; None if it is missing, or holds other
        parameters.
        """
        try:
            start: Any = torch.load(folder / FILE, map_location="cpu", weights_only=True)
        except Exception:  # of whatever is wrong with the file
            return None
        if not isinstance(start, dict) or {
            name: weight.shape for weight, name in names.items()
        } != {name: getattr(value, "shape", None) for name, value in start.items()}:
            return None
        return cls(names, start)

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """`weight_distance`, and `distances` by parameter."""
        distances = {
            name: float(
                torch.linalg.vector_norm(
                    weight.detach() - self._start[name].to(weight.device), dtype=torch.float64
                )
            )
            for weight, name in self._names.items()
        }
        return {"weight_distance": math.hypot(*distances.values()), "distances": distances}
