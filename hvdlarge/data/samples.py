"""The form of a data set's samples: how they become a batch, and what of a batch are the targets.

A sample is a pair (input, target), a dict, a tuple, or an input alone; so is the batch that a
collate function makes of many. `data.targets` names the targets in a dict or tuple. Without it a
pair is split, and everything else goes to the model whole: the loss then gets the whole batch in
the place of the targets.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import default_collate

from hvdlarge.exits import PartError

Key = str | int  # of a dict, or the position in a tuple


class Targets(enum.Enum):
    """What stands in the place of a micro-batch's targets."""

    WHOLE_BATCH = "the whole batch"  # an Enum: the same object in every process


class SampleError(PartError):
    """Samples do not have the form that the job names."""

    origin = "the data set"


class SampleForm:
    """How samples become inputs and targets.

    Args:
        targets: the key or keys of the targets. An empty tuple: the whole batch goes to the model.
            None: a pair is split, anything else goes to the model whole.
        collate: makes a batch of a list of samples; by default torch's `default_collate`, which
            stacks tensors and keeps the structure of dicts and tuples.
    """

    def __init__(
        self,
        targets: Key | tuple[Key, ...] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self._targets = targets
        self._collate = collate

    def __call__(self, samples: Sequence[Any]) -> tuple[Any, Any]:
        """The inputs and targets of a micro-batch.

        Raises:
            SampleError: if samples cannot be stacked, or lack a target.
        """
        samples = list(samples)
        if self._collate is not None:
            return self.split(self._collate(samples))
        try:
            batch = default_collate(samples)
        except (RuntimeError, TypeError) as error:
            if "shared memory" in str(error):  # of a loader process: not about the samples
                raise
            reason = (str(error).splitlines() or [""])[0]
            raise SampleError(
                f"samples cannot be stacked: {_shortened(reason, 55)} (data.collate names a "
                "function that pads)"
            ) from error
        return self.split(_as_sampled(batch, samples[0]))

    def split(self, batch: Any) -> tuple[Any, Any]:
        """Inputs and targets of a batch; `Targets.WHOLE_BATCH` if it has no separate targets.

        Raises:
            SampleError: if a target is not in the batch.
        """
        keys = self._targets
        if keys is None and is_pair(batch):
            return batch[0], batch[1]
        if keys is None or keys == ():
            return batch, Targets.WHOLE_BATCH
        wanted = keys if isinstance(keys, tuple) else (keys,)
        if isinstance(batch, Mapping):
            inputs, targets = _split_mapping(batch, wanted)
        elif isinstance(batch, (tuple, list)):
            inputs, targets = _split_sequence(batch, wanted)
        else:
            raise SampleError(
                f"data.targets is {_named(wanted)}, but a batch is a {type(batch).__name__}: it "
                "must be a dict or a tuple"
            )
        return inputs, targets if isinstance(keys, tuple) else next(iter(_values(targets)))


def is_pair(batch: Any) -> bool:
    """Whether a batch is (inputs, targets)."""
    return isinstance(batch, (tuple, list)) and len(batch) == 2 and not hasattr(batch, "_fields")


def _split_mapping(batch: Mapping[Any, Any], wanted: tuple[Key, ...]) -> tuple[Any, Any]:
    if missing := [key for key in wanted if key not in batch]:
        raise SampleError(
            f"data.targets: {missing[0]!r} is not a key of the samples, which have "
            f"{_shortened(', '.join(map(str, batch)), 90)}"
        )
    inputs = {key: value for key, value in batch.items() if key not in wanted}
    return inputs, {key: batch[key] for key in wanted}


def _split_sequence(batch: Sequence[Any], wanted: tuple[Key, ...]) -> tuple[Any, Any]:
    size = len(batch)
    if wrong := [key for key in wanted if isinstance(key, str) or not -size <= key < size]:
        raise SampleError(
            f"data.targets: {wrong[0]!r} is not a position in the samples, which are tuples of "
            f"{size}: 0 to {size - 1}, or -1 for the last"
        )
    positions = [int(key) % size for key in wanted]
    inputs = tuple(value for place, value in enumerate(batch) if place not in positions)
    return (
        inputs[0] if len(inputs) == 1 else inputs,
        tuple(batch[place] for place in positions),
    )


def _values(targets: Any) -> Sequence[Any]:
    return list(targets.values()) if isinstance(targets, Mapping) else targets


def _as_sampled(batch: Any, sample: Any) -> Any:
    """`batch` with tuples where the sample has tuples, which `default_collate` makes lists of, and
    lists of texts, which it makes tuples of.
    """
    if type(sample) is tuple and isinstance(batch, list):
        return tuple(_as_sampled(part, one) for part, one in zip(batch, sample, strict=True))
    if type(sample) is list and isinstance(batch, list):
        return [_as_sampled(part, one) for part, one in zip(batch, sample, strict=True)]
    if isinstance(sample, (str, bytes)):
        return list(batch)
    if isinstance(sample, Mapping) and isinstance(batch, Mapping):
        return {key: _as_sampled(value, sample[key]) for key, value in batch.items()}
    return batch


def _named(keys: tuple[Key, ...]) -> str:
    return ", ".join(map(repr, keys))


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
