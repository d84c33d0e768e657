"""Checks that training changes neither saved buffers, except those of batch norm, nor extra state.

The rehearsal refuses a model whose first forward pass changes them; this detects a model that does
so later, before anything is saved.
"""

from __future__ import annotations

import torch

from hvdlarge.comm.interfaces import ControlChannel
from hvdlarge.comm.rank_checks import raise_on_all_ranks
from hvdlarge.exits import JobError
from hvdlarge.models.state import extra_states, pack, saved_tensors
from hvdlarge.replica.replica import Replica
from hvdlarge.resilience.digest import tensor_digests


class BufferGuard:
    """Digests of the buffers and extra state that must not change."""

    def __init__(self) -> None:
        self._before: dict[str, int] = {}

    def begin(self, replica: Replica) -> None:
        """Record the digests at the start of training; running statistics are partial by then."""
        self._before = _digests(replica)

    def check_unchanged(self, control: ControlChannel, replica: Replica) -> None:
        """Compare the digests with those at the start. Every rank calls this together.

        Raises:
            JobError: on every rank, naming a buffer or extra state that has changed.
        """
        after = _digests(replica)
        changed = [name for name, digest in self._before.items() if after.get(name) != digest]

        def refuse() -> None:
            if changed:
                raise JobError(
                    f"model.name: {changed[0]!r}, which is saved with the model, changes during "
                    "training; its value would depend on how many micro-batches a worker "
                    "processes (a cache may be a buffer with persistent=False)"
                )

        raise_on_all_ranks(control, refuse, name_ranks=False)


def _digests(replica: Replica) -> dict[str, int]:
    running_statistics = replica.statistics.followed_buffers()
    constant = {
        name: value
        for name, value in saved_tensors(replica.modules).items()
        if not isinstance(value, torch.nn.Parameter) and id(value) not in running_statistics
    }
    for name, value in extra_states(replica.modules).items():
        constant[name] = torch.frombuffer(bytearray(pack({name: value})), dtype=torch.uint8)
    return tensor_digests(constant)
