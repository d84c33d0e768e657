"""Checks in every step that the ranks agree, and shares their requests to stop or save.

Formula:  a Max-allreduce of float64 numbers: [v, −v] for each value v that must be the same on
          every rank, and a flag for each request. The maximum and the minimum of v differ exactly
          when two ranks differ.
Source:   docs/design.md. Horovod does not notice that a rank is one step behind, has another
          learning rate, or sends zeros for a missing gradient; this check does, in the same step.
          It uses MPI, since Horovod would delay it by a cycle.
Contract: started before waiting for the gradients, finished before the update is applied. What
          follows (apply, skip, save, stop) depends on reduced values only, so every rank takes the
          same branch.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from hvdlarge.comm.interfaces import ControlChannel
from hvdlarge.comm.rank_checks import disagreement, missing_gradient
from hvdlarge.schedule.decision import Decision

_VALUES = (
    "step",
    "samples_seen",
    "global_batch",
    "lr",  # the upper half of its bits, and the lower half
    "lr",
    "set of gradients",
    "job",
    "digest",  # its upper half, and its lower half
    "digest",
)
_FLAGS = ("stop", "save", "failed", "uneven")


class StepFlags(NamedTuple):
    """The requests of all ranks; the same on every rank."""

    stop: bool  # a rank was asked to stop
    save: bool  # rank 0's clock requests a checkpoint
    failed: bool  # rank 0 could not write the last checkpoint or a log
    # A rank used a layer with running statistics not exactly once for each micro-batch
    uneven: bool


class ConsistencyCheck:
    """The check of each step.

    Args:
        control: the channel between the ranks.
        job: a fingerprint of the job.
        requests: returns this rank's requests by the field names of `StepFlags`.
    """

    def __init__(
        self, control: ControlChannel, job: int, requests: Callable[[], Mapping[str, bool]]
    ) -> None:
        self._control = control
        self._job = job
        self._requests = requests
        self._wait: Callable[[], list[float]] | None = None
        self._local_texts: Mapping[str, str] = {}  # values by name, for messages
        self._with_gradient: list[str] | None = None

    def start(
        self,
        decision: Decision,
        with_gradient: list[str] | None,
        digest: int | None,
        uneven: bool = False,
    ) -> None:
        """Send this rank's values. Every rank calls this together, once per step, then `finish`.

        Args:
            decision: of this step.
            with_gradient: names of the parameters that got a gradient on this rank; None on an idle
                worker.
            digest: 64 bits over weights and optimizer state; None in steps that do not compare
                them.
            uneven: see `StepFlags`.
        """
        high, low = struct.unpack(">II", struct.pack(">d", decision.lr))
        gradients = None if with_gradient is None else zlib.crc32("\n".join(with_gradient).encode())
        values = [
            decision.step,
            decision.samples_seen,
            decision.global_batch,
            high,
            low,
            gradients,
            self._job,
        ]
        values += [None, None] if digest is None else [digest >> 32, digest & 0xFFFFFFFF]
        requests = {**self._requests(), "uneven": uneven}
        self._with_gradient = with_gradient
        self._local_texts = {
            "step": str(decision.step),
            "samples_seen": str(decision.samples_seen),
            "global_batch": str(decision.global_batch),
            "lr": repr(decision.lr),
            "job": str(self._job),
            "digest": "nothing" if digest is None else f"{digest:016x}",
        }
        # -inf, which no maximum takes, for a value that this rank does not have
        own = [float("-inf") if value is None else float(value) for value in values]
        negated = [float("-inf") if value is None else -float(value) for value in values]
        flags = [float(requests.get(name, False)) for name in _FLAGS]
        self._wait = self._control.start_max([*own, *negated, *flags])

    def finish(self) -> StepFlags:
        """Wait for the other ranks' values and compare them. Every rank calls this together.

        Raises:
            RanksDisagreeError: on every rank, naming the field and every rank's value.
        """
        assert self._wait is not None
        maxima = self._wait()
        self._wait = None
        count = len(_VALUES)
        largest, negated, flags = maxima[:count], maxima[count : 2 * count], maxima[2 * count :]
        for index, name in enumerate(_VALUES):
            if largest[index] != float("-inf") and largest[index] != -negated[index]:
                if name == "set of gradients":
                    raise missing_gradient(self._control, self._with_gradient)
                raise disagreement(self._control, name, self._local_texts[name])
        return StepFlags(*(flag > 0 for flag in flags))
