"""The same cases in one long-lived world over real MPI and Horovod: rank 0 draws and judges, every
rank runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvdlarge import exits
from hvdlarge.comm.connect import open_control, open_tensors
from hvdlarge.comm.launcher import bound_cores, detect, starting_settings
from hvdlarge.config.job import Job
from trials import engine, judge
from trials.cases import Case
from trials.engine import AskedFor, Interruption, Outcome
from trials.judge import Verdict
from trials.laws import Tally

_LIMIT_SECONDS = 60.0  # of one run; a rank that waits longer waits for ever


class RealWorld:
    """Both channels of this rank, and what it has to do with them when rank 0 says so."""

    def __init__(self) -> None:
        """Start MPI and Horovod. Every rank calls this together."""
        launch = detect(os.environ)
        assert launch is not None  # started by mpirun
        os.environ.update(starting_settings(os.environ, launch.local_size, len(bound_cores())))
        self.control = open_control(launch)
        self.tensors = open_tensors(launch, self.control)

    def tell(self, message: Mapping[str, Any]) -> None:
        """Rank 0 tells the others what to do."""
        self.control.allgather(json.dumps(message).encode())

    def hear(self) -> dict[str, Any]:
        """What rank 0 tells; the others wait for it."""
        return json.loads(self.control.allgather(b"")[0])

    def run(self, order: Mapping[str, Any]) -> Outcome | None:
        """Start a job together; how it ended on rank 0, None elsewhere."""
        folder, breaks = Path(order["folder"]), Interruption(**order["interruption"])
        accepted = engine.read(order["job"], folder)
        if not isinstance(accepted, Job):
            return accepted if self.control.rank == 0 else None
        stop = AskedFor(
            breaks.stop_at if self.control.rank == breaks.by_rank % self.control.size else None
        )
        code, message = exits.FINISHED, ""
        with self._limited(order), engine.unchanged_settings(), engine.quietly():
            try:
                code, message = engine.one_rank(accepted, folder, self.control, self.tensors, stop)
            except BaseException:
                self._end(f"rank {self.control.rank}: {traceback.format_exc()}", order)
            heard = [
                tuple(json.loads(other))
                for other in self.control.allgather(json.dumps([code, message]).encode())
            ]
        if self.control.rank:
            return None
        broken = None if len(set(heard)) == 1 else f"the ranks ended differently: {heard}"
        return engine.read_folder(Outcome(code, message, broken, steps=stop.steps), folder)

    def _limited(self, order: Mapping[str, Any]) -> _Alarm:
        return _Alarm(
            lambda: self._end(
                f"rank {self.control.rank} has waited for {_LIMIT_SECONDS:g} s", order
            )
        )

    def _end(self, what: str, order: Mapping[str, Any]) -> None:
        sys.__stderr__.write(f"VIOLATION {what}\n  {json.dumps(dict(order))}\n")  # type: ignore[union-attr]
        sys.__stderr__.flush()  # type: ignore[union-attr]
        time.sleep(1.0)  # others may have something to say too
        self.control.abort(1)


class _Alarm:
    """Does something if its `with` block lasts too long."""

    def __init__(self, action: Any) -> None:
        self._timer = threading.Timer(_LIMIT_SECONDS, action)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def main(options: argparse.Namespace) -> int:
    """Draw cases on rank 0 and judge them there; returns the exit code. Every rank calls this
    together.
    """
    world, began = RealWorld(), time.monotonic()
    if world.control.rank:
        while (order := world.hear())["job"] is not None:
            world.run(order)
        return _leave(world, world.hear()["code"])
    tally = Tally(options.found, options.shrink_seconds, began + 60 * options.minutes)

    def start(
        job: Mapping[str, Any],
        folder: Path,
        workers: int,
        seed: int,
        interruption: Interruption | None,
    ) -> Outcome:
        if workers == 1:
            return engine.train(job, folder, 1, seed, interruption)
        order = {
            "job": dict(job),
            "folder": str(folder),
            "interruption": vars(interruption or Interruption()),
        }
        world.tell(order)
        outcome = world.run(order)
        assert outcome is not None  # this is rank 0
        return outcome

    def judged(case: Case) -> Verdict:
        with engine.scratch() as place:
            return judge.judge(case, place, start)

    tally.draw(options.jobs, options.seed, judged, largest_world=world.control.size, threads=False)
    world.tell({"job": None})
    code = 1 if tally.violations else 0
    world.tell({"code": code})
    print(
        "\n".join(
            [
                f"over MPI and Horovod, {world.control.size} workers:",
                *tally.lines(time.monotonic() - began),
            ]
        ),
        flush=True,
    )
    return _leave(world, code)


def _leave(world: RealWorld, code: int) -> int:
    world.tensors.close()
    world.control.close()
    return code
