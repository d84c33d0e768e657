"""torch's own optimizers, under the engine's rule for parameters without a gradient.

Formula:  torch's, see each class there.
          A tensor whose gradient is zero throughout is skipped in that step (interface.py), as
          with LARS: weights, state, decay.
Source:   torch.optim: SGD (Polyak's and Nesterov's momentum, the rate outside the buffer), Adam,
          AdamW, Adagrad, RMSprop.
Contract: that of interface.py.
"""

from __future__ import annotations

from typing import Any

import torch

from hvdlarge.optim.interface import GradientNorms, MeanGradientOptimizer


class TorchOptimizer(MeanGradientOptimizer):
    """Moves the weights as the torch optimizer among a class's bases does."""

    def _update_measured(self, norms: GradientNorms) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight not in norms.gradients:
                    weight.grad = None
        # Of the class after MeanGradientOptimizer in the order of resolution: torch's own
        super(MeanGradientOptimizer, self).step()


class SGD(TorchOptimizer, torch.optim.SGD):
    """Stochastic gradient descent with momentum: v ← m·v + (g + β·w); w ← w − lr·v, or Nesterov's w
    ← w − lr·(g + β·w + m·v).
    """


class Adam(TorchOptimizer, torch.optim.Adam):
    """Adam, the decay added to the gradient."""


class AdamW(TorchOptimizer, torch.optim.AdamW):
    """Adam, the decay apart from the gradient."""


class Adagrad(TorchOptimizer, torch.optim.Adagrad):
    """Adagrad."""

    def __init__(self, params: Any, **options: Any) -> None:
        # torch fills Adagrad's state when it is built; here, as with the others, a tensor has state
        # once it has moved, so that Horovod's rule (no state before wrapping) and a resume see the
        # same thing.
        super().__init__(params, **options)
        self.state.clear()

    def _update_measured(self, norms: GradientNorms) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight in norms.gradients and not self.state[weight]:
                    self.state[weight]["step"] = torch.tensor(0.0)
                    self.state[weight]["sum"] = torch.full_like(
                        weight,
                        group["initial_accumulator_value"],
                        memory_format=torch.preserve_format,
                    )
        super()._update_measured(norms)


class RMSprop(TorchOptimizer, torch.optim.RMSprop):
    """RMSprop."""
