"""LSTM language models, in the sizes of the experiments on the Penn Treebank.

Formula:  with h⁰ the embedding of a token, dropout D and L layers at each position:
              hˡ = LSTM(D(hˡ⁻¹), hˡ of the position before);    logits = W·D(hᴸ) + b
Source:   Zaremba, Sutskever, Vinyals, "Recurrent Neural Network Regularization" (2014): dropout on
          the connections that are not recurrent, section 3; sizes in section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hvdlarge.models.inputs import check_tokens
from hvdlarge.models.recurrent import LSTMState, initialise_uniformly, lstm_layer


class LSTMLanguageModel(nn.Module):
    """Embedding, LSTM layers of the same width, and a linear layer with weights of its own.

    The sizes of the paper, with 10,000 tokens and 2 layers:

    | size   | hidden | dropout | init_range | length | parameters |
    |--------|--------|---------|------------|--------|------------|
    | small  | 200    | 0       | 0.1        | 20     | 4,651,600  |
    | medium | 650    | 0.5     | 0.05       | 35     | 19,775,200 |
    | large  | 1500   | 0.65    | 0.04       | 35     | 66,022,000 |

    Args:
        tokens: size of the vocabulary.
        hidden: width of the embedding and of every layer.
        layers: number of LSTM layers.
        dropout: probability on the embedding, between layers, and before the linear layer.
        init_range: bound of the uniform initial weights and biases.

    Raises:
        ValueError: for sizes below 1 or an impossible `init_range`; in `forward` for tokens that
            the vocabulary does not have.
    """

    def __init__(
        self,
        tokens: int = 10_000,
        hidden: int = 200,
        layers: int = 2,
        dropout: float = 0.0,
        init_range: float = 0.1,
    ) -> None:
        super().__init__()
        if min(tokens, hidden, layers) < 1:
            raise ValueError(
                f"tokens, hidden and layers must be at least 1, got {tokens}, {hidden}, {layers}"
            )
        self.embedding = nn.Embedding(tokens, hidden)
        self.layers = nn.ModuleList(lstm_layer(hidden, hidden) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden, tokens)
        initialise_uniformly(self, init_range)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the token after each, shape (n, vocabulary, length), of ids of the shape (n,
        length); the state begins at zero.
        """
        logits, _ = self.advance(tokens)
        return logits

    # tokens: (n, length)
    def advance(
        self, tokens: torch.Tensor, state: Sequence[LSTMState] | None = None
    ) -> tuple[torch.Tensor, list[LSTMState]]:
        """Logits, shape (n, tokens, length), and the state of each layer after the last position.

        Args:
            tokens: integers, shape (n, length).
            state: of each layer after the position before; None: zero.
        """
        check_tokens("tokens", tokens, self.embedding.num_embeddings)
        before = [None] * len(self.layers) if state is None else state
        outputs = self.dropout(self.embedding(tokens))  # (n, length, hidden)
        new_state = []
        for layer, layer_state in zip(self.layers, before, strict=True):
            outputs, layer_state = layer(outputs, layer_state)
            outputs = self.dropout(outputs)
            new_state.append(layer_state)
        return self.classifier(outputs).movedim(-1, 1), new_state
