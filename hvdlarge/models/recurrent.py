"""Parts of the recurrent models: LSTM layers with one bias for each gate, and uniform weights.

Contract: one `nn.LSTM` for each layer, with dropout between them as a module of its own. On a GPU
          the dropout inside an `nn.LSTM` of several layers has a random state that cuDNN keeps
          across calls: it would not follow torch's generators, which the engine seeds for each
          micro-batch.
"""

from __future__ import annotations

import torch
from torch import nn

LSTMState = tuple[torch.Tensor, torch.Tensor]  # hidden and cell state, (1, n, hidden) each


def lstm_layer(inputs: int, hidden: int, bidirectional: bool = False) -> nn.LSTM:
    """One layer, batch first, with one trained bias for each gate, as papers write LSTMs and count
    their parameters: torch's second bias, `bias_hh`, stays zero.
    """
    layer = nn.LSTM(inputs, hidden, batch_first=True, bidirectional=bidirectional)
    for name, weight in layer.named_parameters():
        if name.startswith("bias_hh"):
            nn.init.zeros_(weight).requires_grad_(False)
    return layer


def initialise_uniformly(model: nn.Module, bound: float) -> None:
    """Draw every trained parameter uniformly from [−bound, bound].

    Raises:
        ValueError: unless the bound is above 0.
    """
    if not bound > 0:
        raise ValueError(f"init_range must be above 0, got {bound}")
    for weight in model.parameters():
        if weight.requires_grad:
            nn.init.uniform_(weight, -bound, bound)
