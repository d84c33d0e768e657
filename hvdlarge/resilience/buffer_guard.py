"""Sees to it that nothing changes the saved buffers and extra state of a model while it trains, but
batch normalisation its own.

The rehearsal refuses a model whose forward pass changes them at once; one that does so later, after
some steps or beyond a value, is seen here, before a result of it is kept.
"""

from __future__ import annotations

import torch

from hvdlarge.comm.interfaces import ControlChannel
from hvdlarge.comm.rank_checks import raise_on_all_ranks
from hvdlarge.exits import JobError
from hvdlarge.models.state import extra_states, pack, saved_tensors
from hvdlarge.replica import Replica
from hvdlarge.resilience.digest import tensor_digests


class BufferGuard:
    """What must not change, by digests."""

    def __init__(self) -> None:
        self._before: dict[str, int] = {}

    def begin(self, learner: Replica) -> None:
        """Take the state as it is when training begins; the running statistics are scattered
        already.
        """
        self._before = _digests(learner)

    def refuse_changes(self, control: ControlChannel, learner: Replica) -> None:
        """Compare the state with what it was. Every rank calls this together.

        Raises:
            JobError: on every rank, naming a buffer or extra state that has changed.
        """
        now = _digests(learner)
        changed = [name for name, digest in self._before.items() if now.get(name) != digest]

        def refuse() -> None:
            if changed:
                raise JobError(
                    f"model.name: {changed[0]!r}, which is saved with the model, is changed while "
                    "it trains; what it becomes would depend on how many micro-batches a worker "
                    "processes (a cache may be a buffer with persistent=False)"
                )

        raise_on_all_ranks(control, refuse, name_ranks=False)


def _digests(learner: Replica) -> dict[str, int]:
    followed = learner.statistics.followed_buffers()
    saved = saved_tensors(learner.modules).items()
    resting = {
        name: value
        for name, value in saved
        if not isinstance(value, torch.nn.Parameter) and id(value) not in followed
    }
    for name, value in extra_states(learner.modules).items():
        resting[name] = torch.frombuffer(bytearray(pack({name: value})), dtype=torch.uint8)
    return tensor_digests(resting)
