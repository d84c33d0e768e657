"""torch's own optimizers, under the engine's rule for parameters without a gradient.

Formula:  torch's, see each class there.
          A tensor whose gradient is zero throughout is left alone in that step (norms.py), as with
          LARS: weights, state, decay.
Source:   torch.optim: SGD (Polyak's and Nesterov's momentum, the rate outside the buffer), Adam,
          AdamW, Adagrad, RMSprop.
Contract: as in lars.py. Each constructor takes groups that carry every hyper-parameter: Horovod
          re-creates the class from them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hvdlarge.optim.norms import MeasuresGradients


class _Ruled(MeasuresGradients):
    """Puts the rule before torch's step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Move the weights once, with the gradients in `.grad`, already averaged over all
        workers.

        Raises:
            ValueError: if a closure is given, or for a sparse gradient.
        """
        if closure is not None:
            raise ValueError(
                f"{type(self).__name__} takes no closure: its gradients would not be averaged over "
                "the workers"
            )
        self.take_gradient_norms()
        super().step()  # type: ignore[misc]


class SGD(_Ruled, torch.optim.SGD):  # type: ignore[misc]
    """Stochastic gradient descent with momentum: v ← m·v + (g + β·w); w ← w − lr·v, or Nesterov's w
    ← w − lr·(g + β·w + m·v).
    """


class Adam(_Ruled, torch.optim.Adam):  # type: ignore[misc]
    """Adam, the decay added to the gradient."""


class AdamW(_Ruled, torch.optim.AdamW):  # type: ignore[misc]
    """Adam, the decay apart from the gradient."""


class Adagrad(_Ruled, torch.optim.Adagrad):
    """Adagrad."""

    def __init__(self, params: Any, **options: Any) -> None:
        # torch fills Adagrad's state when it is built; here, as with the others, a tensor has state
        # once it has moved, so that Horovod's rule (no state before wrapping) and a resume see the
        # same thing.
        super().__init__(params, **options)
        self.state.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """As the others' step."""
        # Gradients that are zero have been taken away
        self.gradient_norms = self.take_gradient_norms()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and not self.state[weight]:
                    self.state[weight]["step"] = torch.tensor(0.0)
                    self.state[weight]["sum"] = torch.full_like(
                        weight,
                        group["initial_accumulator_value"],
                        memory_format=torch.preserve_format,
                    )
        super().step(closure)


class RMSprop(_Ruled, torch.optim.RMSprop):  # type: ignore[misc]
    """RMSprop."""
