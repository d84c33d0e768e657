"""One small message in every step that holds the ranks together.

Formula:  a Max-allreduce of float64 numbers [v, −v] for what must be the same on every rank, and of
          plain flags for what one rank may ask of all. The largest v and the smallest differ
          exactly when two ranks differ.
Source:   docs/design.md. Horovod itself never notices that a rank is one step behind, has another
          rate, or sends zeros for a missing gradient; this travels beside the gradients and notices
          in the same step. It goes over MPI: as one more tensor of Horovod's it waited for a
          cycle.
Contract: sent before the gradients are waited for, read before the update is applied; what follows
          from it (apply, skip, save, stop) is a function of reduced values only, so every rank
          takes the same branch.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from hvdlarge.comm.interfaces import ControlChannel
from hvdlarge.comm.rank_checks import disagreement, missing_gradient
from hvdlarge.schedule.decision import Decision

_SAME = (
    "step",
    "samples_seen",
    "global_batch",
    "lr bits, high",
    "lr bits, low",
    "set of gradients",
    "job",
    "digest, high",
    "digest, low",
)
_FLAGS = ("stop", "save", "failed", "uneven")


class StepFlags(NamedTuple):
    """What all ranks together ask for; the same on every rank."""

    stop: bool  # some rank was asked to stop
    save: bool  # rank 0's clock asks for a checkpoint
    failed: bool  # rank 0 could not write the last one
    # Some rank used a layer with running statistics more or less often than once for each
    # micro-batch
    uneven: bool


class ConsistencyCheck:
    """The message of each step.

    Args:
        control: the channel it uses, and on which a disagreement is explained.
        job: a number that stands for the job.
        asks: this rank's wishes by the names of StepFlags's fields, asked for in each step.
    """

    def __init__(
        self, control: ControlChannel, job: int, asks: Callable[[], Mapping[str, bool]]
    ) -> None:
        self._control = control
        self._job = job
        self._asks = asks
        self._waiting: Callable[[], list[float]] | None = None
        self._mine: list[float] = []
        self._with_gradient: list[str] | None = None

    def start(
        self,
        decision: Decision,
        with_gradient: list[str] | None,
        digest: int | None,
        uneven: bool = False,
    ) -> None:
        """Send this rank's view. Every rank calls this together, once in a step, and then `finish`.

        Args:
            decision: what this rank follows.
            with_gradient: names of the parameters that got a gradient here; None on an idle worker,
                which has no view.
            digest: 64 bits over weights and optimizer state, where they are due to be compared;
                else None.
            uneven: a flag of StepFlags's.
        """
        high, low = struct.unpack(">II", struct.pack(">d", decision.lr))
        gradients = None if with_gradient is None else zlib.crc32("\n".join(with_gradient).encode())
        view = [
            decision.step,
            decision.samples_seen,
            decision.global_batch,
            high,
            low,
            gradients,
            self._job,
        ]
        view += [None, None] if digest is None else [digest >> 32, digest & 0xFFFFFFFF]
        wishes = {**self._asks(), "uneven": uneven}
        self._with_gradient = with_gradient
        # Without a view, the value is the one that no maximum takes.
        self._mine = [float("-inf") if value is None else float(value) for value in view]
        opposite = [float("-inf") if value is None else -float(value) for value in view]
        flags = [float(wishes.get(name, False)) for name in _FLAGS]
        self._waiting = self._control.start_max([*self._mine, *opposite, *flags])

    def finish(self) -> StepFlags:
        """What the ranks agree on. Every rank calls this together.

        Raises:
            RanksDisagreeError: on every rank, naming the field and every rank's value.
        """
        assert self._waiting is not None
        heard = self._waiting()
        self._waiting = None
        largest, opposite, flags = (
            heard[: len(_SAME)],
            heard[len(_SAME) : 2 * len(_SAME)],
            heard[2 * len(_SAME) :],
        )
        for number, name in enumerate(_SAME):
            if largest[number] != float("-inf") and largest[number] != -opposite[number]:
                if name == "set of gradients":
                    raise missing_gradient(self._control, self._with_gradient)
                raise disagreement(self._control, name, self._mine[number])
        return StepFlags(*(flag > 0 for flag in flags))
