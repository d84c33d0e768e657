"""torch's SGD with momentum, under the engine's rule for parameters without a gradient.

Formula:  v ← m·v + (g + β·w);    w ← w − lr·v
          A tensor whose gradient is zero throughout is left alone in that step (norms.py), as with LARS.
Source:   torch.optim.SGD (Polyak's momentum, the rate outside the buffer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from hvdlarge.optim.norms import MeasuresGradients


class SGD(MeasuresGradients, torch.optim.SGD):
    """Stochastic gradient descent with momentum.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        momentum: m.
        weight_decay: β.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.0, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move the weights once, with the gradients in `.grad`, already averaged over all workers.

        Raises:
            ValueError: if a closure is given, or for a sparse gradient.
        """
        if closure is not None:
            raise ValueError("SGD takes no closure: its gradients would not be averaged over the workers")
        self.take_gradient_norms()
        super().step()
