"""GNMT: a deep LSTM encoder and decoder with attention, for translation.

Formula:  attention of a query q to the encoder's outputs xⱼ, normalised and additive:
              eⱼ = g·(v/‖v‖)ᵀ tanh(W·q + U·xⱼ + b);    context = Σ softmax(e)ⱼ·xⱼ
          `previous`: q is the output of the decoder's first layer at the position before (0 at the
          first), and the context is an input of every decoder layer. `current`: q is that output at
          the same position, and the context is an input of every layer but the first.
Source:   Wu et al., "Google's Neural Machine Translation System" (2016): layers, residual
          connections and attention `previous`, section 3. Attention `current` is that of the MLPerf
          reference, there gnmt_v2; all positions of a layer are then computed at once.
          Bahdanau, Cho, Bengio, "Neural Machine Translation by Jointly Learning to Align and
          Translate" (2015), additive attention; Salimans, Kingma, "Weight Normalization" (2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from hvdlarge.models.inputs import check_tokens
from hvdlarge.models.recurrent import LSTMState, initialise_uniformly, lstm_layer

AttentionQuery = Literal["current", "previous"]


class Memory(NamedTuple):
    """What the decoder attends to."""

    values: torch.Tensor  # outputs of the encoder, (n, source length, hidden)
    keys: torch.Tensor  # U·xⱼ + b, (n, source length, hidden)
    is_padding: torch.Tensor  # (n, source length), bool


class GNMT(nn.Module):
    """Encoder and decoder of LSTM layers, the first of the encoder in both directions.

    From the third layer of the encoder and of the decoder on, a layer's input is added to its
    output. The decoder begins with state zero. Where source and target share a vocabulary they
    share the embedding too.

    Args:
        tokens: size of the source vocabulary.
        target_tokens: size of the target vocabulary; None: both languages share one.
        hidden: width of embeddings, layers and attention.
        encoder_layers: at least 2.
        decoder_layers: at least 1.
        dropout: probability on the input of every layer.
        attention: `current` or `previous`, where the query is from.
        init_range: bound of the uniform initial weights and biases.
        padding: token after the last one of a shorter sequence; such positions of the source do
            not count. Those of the target are for the loss to leave out, by its `ignore_index`:
            −100 with `hvdlarge.data.translation:pad`.

    Raises:
        ValueError: for impossible sizes or another attention; in `forward` for tokens that a
            vocabulary does not have, and for padding elsewhere than after the tokens of a source.
    """

    def __init__(
        self,
        tokens: int = 32_000,
        target_tokens: int | None = None,
        hidden: int = 1024,
        encoder_layers: int = 8,
        decoder_layers: int = 8,
        dropout: float = 0.2,
        attention: AttentionQuery = "current",
        init_range: float = 0.04,
        padding: int = 0,
    ) -> None:
        super().__init__()
        sizes = (tokens, target_tokens or tokens, hidden, encoder_layers, decoder_layers)
        if min(sizes) < 1:
            raise ValueError(f"vocabularies, hidden and layers must be at least 1, got {sizes}")
        if not 0 <= padding < tokens:
            raise ValueError(f"padding must be a token, 0 to {tokens - 1}, got {padding}")
        self.source_embedding = nn.Embedding(tokens, hidden)
        self.target_embedding = (
            self.source_embedding if target_tokens is None else nn.Embedding(target_tokens, hidden)
        )
        self.encoder = _Encoder(hidden, encoder_layers, dropout)
        self.attention = _Attention(hidden)
        self.decoder = _Decoder(hidden, decoder_layers, dropout, attention)
        self.classifier = nn.Linear(hidden, target_tokens or tokens)
        self._padding = padding
        initialise_uniformly(self, init_range)
        self.attention.initialise()

    # source: (n, source length), target_in: (n, target length)
    def forward(self, source: torch.Tensor, target_in: torch.Tensor) -> torch.Tensor:
        """Logits of the token after each of `target_in`, shape (n, target tokens, target length).

        Args:
            source: integers, padded after the tokens.
            target_in: integers, from the token that begins a sentence, padded after the tokens.
        """
        logits, _ = self.decode(target_in, self.encode(source))
        return logits

    def encode(self, source: torch.Tensor) -> Memory:
        """What the decoder attends to, for source tokens of the shape (n, source length)."""
        check_tokens("source tokens", source, self.source_embedding.num_embeddings)
        is_padding = source == self._padding
        values = self.encoder(self.source_embedding(source), _lengths(is_padding, self._padding))
        return Memory(values, self.attention.keys(values), is_padding)

    def decode(
        self, target_in: torch.Tensor, memory: Memory, state: Sequence[LSTMState] | None = None
    ) -> tuple[torch.Tensor, list[LSTMState]]:
        """Logits, shape (n, target tokens, target length), and the state of each decoder layer
        after the last position.

        Args:
            target_in: integers, shape (n, target length).
            memory: from `encode`.
            state: of each layer after the position before; None: zero.
        """
        check_tokens("target tokens", target_in, self.target_embedding.num_embeddings)
        embedded = self.target_embedding(target_in)
        outputs, new_state = self.decoder(embedded, memory, self.attention, state)
        return self.classifier(outputs).movedim(-1, 1), new_state

    @torch.no_grad()
    def generate(
        self, source: torch.Tensor, start: int = 2, end: int = 3, max_length: int = 100
    ) -> torch.Tensor:
        """Translations by greedy decoding, with a state that is kept from token to token. Call
        `eval()` first, so that nothing is dropped out.

        Args:
            source: integers, shape (n, source length).
            start: token before the first one.
            end: decoding stops when each sentence has had it.
            max_length: tokens at most.

        Returns:
            Ids, without `start`, shape (n, at most max_length); what follows `end` does not count.
        """
        memory, state = self.encode(source), None
        token = source.new_full((len(source), 1), start)
        ended = torch.zeros_like(token, dtype=torch.bool)
        tokens: list[torch.Tensor] = []
        while len(tokens) < max_length and not bool(ended.all()):
            logits, state = self.decode(token, memory, state)
            token = logits[:, :, -1].argmax(dim=1, keepdim=True)
            ended |= token == end
            tokens.append(token)
        return torch.cat(tokens, dim=1) if tokens else token[:, :0]


class _Encoder(nn.Module):
    def __init__(self, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        if layers < 2:  # a single layer in both directions would give twice the width
            raise ValueError(f"encoder_layers must be at least 2, got {layers}")
        self.first = lstm_layer(hidden, hidden, bidirectional=True)
        widths = [2 * hidden] + [hidden] * (layers - 2)
        self.others = nn.ModuleList(lstm_layer(width, hidden) for width in widths)
        self.dropout = nn.Dropout(dropout)

    # embedded: (n, length, hidden), lengths: (n,), on the CPU
    def forward(self, embedded: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Outputs of the last layer, shape (n, length, hidden)."""
        packed = pack_padded_sequence(
            self.dropout(embedded), lengths, batch_first=True, enforce_sorted=False
        )
        # Packed, so that the direction from the end begins at a sentence's last token
        outputs, _ = pad_packed_sequence(
            self.first(packed)[0], batch_first=True, total_length=embedded.shape[1]
        )
        for number, layer in enumerate(self.others):
            inputs = outputs
            outputs, _ = layer(self.dropout(inputs))
            if number > 0:
                outputs = outputs + inputs
        return outputs


class _Attention(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden, hidden, bias=False)  # W
        self.key = nn.Linear(hidden, hidden)  # U and b
        self.direction = nn.Parameter(torch.empty(hidden))  # v
        self.scale = nn.Parameter(torch.empty(1))  # g

    def initialise(self) -> None:
        """Set g = 1/√hidden and b = 0: scores begin between −1 and 1."""
        nn.init.constant_(self.scale, len(self.direction) ** -0.5)
        nn.init.zeros_(self.key.bias)

    def keys(self, values: torch.Tensor) -> torch.Tensor:
        """The part of the scores that no query changes, computed once."""
        return self.key(values)

    # queries: (n, length, hidden)
    def forward(self, queries: torch.Tensor, memory: Memory) -> torch.Tensor:
        """Contexts, shape (n, length, hidden)."""
        sums = self.query(queries).unsqueeze(2) + memory.keys.unsqueeze(1)
        scores = sums.tanh() @ (self.scale * self.direction / self.direction.norm())
        scores = scores.masked_fill(memory.is_padding.unsqueeze(1), float("-inf"))
        return scores.softmax(dim=-1) @ memory.values


class _Decoder(nn.Module):
    def __init__(self, hidden: int, layers: int, dropout: float, attention: str) -> None:
        super().__init__()
        if attention not in get_args(AttentionQuery):
            raise ValueError(f"attention must be current or previous, got {attention!r}")
        self._previous = attention == "previous"
        self.first = lstm_layer(2 * hidden if self._previous else hidden, hidden)
        self.others = nn.ModuleList(lstm_layer(2 * hidden, hidden) for _ in range(layers - 1))
        self.dropout = nn.Dropout(dropout)

    # embedded: (n, length, hidden)
    def forward(
        self,
        embedded: torch.Tensor,
        memory: Memory,
        attention: _Attention,
        state: Sequence[LSTMState] | None,
    ) -> tuple[torch.Tensor, list[LSTMState]]:
        """Outputs of the last layer, shape (n, length, hidden), and the state of each layer."""
        before = [None] * (1 + len(self.others)) if state is None else state
        if self._previous:
            outputs, contexts, first = self._step_by_step(embedded, memory, attention, before[0])
        else:
            outputs, first = self.first(self.dropout(embedded), before[0])
            contexts = attention(outputs, memory)
        new_state = [first]
        for number, layer in enumerate(self.others, start=1):
            inputs = outputs
            both = self.dropout(torch.cat([inputs, contexts], dim=-1))
            outputs, layer_state = layer(both, before[number])
            if number > 1:
                outputs = outputs + inputs
            new_state.append(layer_state)
        return outputs, new_state

    def _step_by_step(
        self,
        embedded: torch.Tensor,
        memory: Memory,
        attention: _Attention,
        state: LSTMState | None,
    ) -> tuple[torch.Tensor, torch.Tensor, LSTMState]:
        """Outputs of the first layer, contexts, and its state, position by position: each query is
        the output before.
        """
        if state is None:
            zero = embedded.new_zeros(1, len(embedded), embedded.shape[-1])
            state = (zero, zero)
        outputs, contexts = [], []
        for position in embedded.split(1, dim=1):  # (n, 1, hidden)
            context = attention(state[0].transpose(0, 1), memory)
            inputs = self.dropout(torch.cat([position, context], dim=-1))
            output, state = self.first(inputs, state)
            outputs.append(output)
            contexts.append(context)
        return torch.cat(outputs, dim=1), torch.cat(contexts, dim=1), state


def _lengths(is_padding: torch.Tensor, padding: int) -> torch.Tensor:
    """Tokens of each source before its padding, shape (n,); on the CPU, as packing needs them."""
    is_token = ~is_padding.cpu()
    lengths = is_token.sum(dim=1)
    positions = torch.arange(is_token.shape[1])
    if not torch.equal(is_token, positions < lengths.unsqueeze(1)) or not lengths.all():
        raise ValueError(f"a source must be one token or more, then only padding (token {padding})")
    return lengths
