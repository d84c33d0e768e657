"""The English text that ships with Python, the topics of `help()`, as tokens: its bytes."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import torch
from torch.utils.data import Dataset

MASK = 256  # the token behind those of the 256 bytes
IGNORED = -100  # a label that does not count, as in transformers
_TEST_EVERY = 10  # every tenth block is for testing


class Causal(Dataset):
    """Blocks of text to be continued: each token is predicted from those before it.

    Args:
        blocks: tokens, shape (n, length), int64.
    """

    def __init__(self, blocks: torch.Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.blocks[index]
        return {"input_ids": tokens, "labels": tokens}  # the model shifts the labels itself


class Masked(Causal):
    """Blocks of text with gaps, drawn anew whenever a block is read.

    15 % of the tokens are to be predicted: 80 % of them are masked, 10 % replaced by a random one
    and 10 % kept (Devlin et al. 2018, section 3.1). hvdlarge seeds torch's generator by the sample,
    so the gaps do not depend on the number of workers, and a test set has the same ones each time.
    """

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.blocks[index]
        predicted = torch.rand(len(tokens)) < 0.15
        fate = torch.rand(len(tokens))
        seen = torch.where(predicted & (fate < 0.8), MASK, tokens)
        replaced = predicted & (fate >= 0.8) & (fate < 0.9)
        seen = torch.where(replaced, torch.randint(256, tokens.shape), seen)
        return {"input_ids": seen, "labels": torch.where(predicted, tokens, IGNORED)}


def causal(length: int = 128) -> tuple[Causal, Causal]:
    """Training and test set of blocks of `length` bytes, for models such as GPT-2."""
    return _split(Causal, length)


def masked(length: int = 128) -> tuple[Masked, Masked]:
    """Training and test set of blocks of `length` bytes with gaps, for models such as BERT."""
    return _split(Masked, length)


def _split(kind: Any, length: int) -> tuple[Any, Any]:
    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    blocks = tokens[: len(tokens) // length * length].reshape(-1, length)
    is_test = torch.arange(len(blocks)) % _TEST_EVERY == _TEST_EVERY - 1
    return kind(blocks[~is_test]), kind(blocks[is_test])
