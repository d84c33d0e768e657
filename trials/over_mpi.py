"""Runs the cases in one world over MPI and Horovod: rank 0 draws and judges, every rank runs."""

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
from trials.engine import Interruption, Outcome, StopAtStep
from trials.judge import Verdict
from trials.laws import Tally

_LIMIT_SECONDS = 60.0  # of one run; a rank that waits longer is taken as deadlocked


class RealWorld:
    """The channels of this rank, and the runs that rank 0 orders."""

    def __init__(self) -> None:
        """Start MPI and Horovod. Every rank calls this together."""
        launch = detect(os.environ)
        assert launch is not None  # started by mpirun
        os.environ.update(starting_settings(os.environ, launch.local_size, len(bound_cores())))
        self.control = open_control(launch)
        self.tensors = open_tensors(launch, self.control)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message from rank 0 to the other ranks, which call `receive`."""
        self.control.allgather(json.dumps(message).encode())

    def receive(self) -> dict[str, Any]:
        """Wait for the next message of rank 0."""
        return json.loads(self.control.allgather(b"")[0])

    def run(self, order: Mapping[str, Any]) -> Outcome | None:
        """Run a job; returns the outcome on rank 0. Every rank calls this together."""
        folder, interruption = Path(order["folder"]), Interruption(**order["interruption"])
        accepted = engine.read(order["job"], folder)
        if not isinstance(accepted, Job):
            return accepted if self.control.rank == 0 else None
        receives_stop = self.control.rank == interruption.by_rank % self.control.size
        stop = StopAtStep(interruption.stop_at if receives_stop else None)
        code, message = exits.FINISHED, ""
        with self._limited(order), engine.preserved_settings(), engine.silenced():
            try:
                code, message = engine.run_rank(accepted, folder, self.control, self.tensors, stop)
            except BaseException:
                self._abort(f"rank {self.control.rank}: {traceback.format_exc()}", order)
            endings = [
                tuple(json.loads(ending))
                for ending in self.control.allgather(json.dumps([code, message]).encode())
            ]
        if self.control.rank:
            return None
        broken = None if len(set(endings)) == 1 else f"the ranks ended differently: {endings}"
        return engine.read_folder(Outcome(code, message, broken, steps=stop.steps), folder)

    def _limited(self, order: Mapping[str, Any]) -> _Alarm:
        return _Alarm(
            lambda: self._abort(
                f"rank {self.control.rank} has waited for {_LIMIT_SECONDS:g} s", order
            )
        )

    def _abort(self, reason: str, order: Mapping[str, Any]) -> None:
        sys.__stderr__.write(f"VIOLATION {reason}\n  {json.dumps(dict(order))}\n")  # type: ignore[union-attr]
        sys.__stderr__.flush()  # type: ignore[union-attr]
        time.sleep(1.0)  # let other ranks report too
        self.control.abort(1)


class _Alarm:
    """Calls `action` if its `with` block takes longer than _LIMIT_SECONDS."""

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
    world, started = RealWorld(), time.monotonic()
    if world.control.rank:
        while (order := world.receive())["job"] is not None:
            world.run(order)
        return _close(world, world.receive()["code"])
    tally = Tally(options.found, options.shrink_seconds, started + 60 * options.minutes)

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
        world.send(order)
        outcome = world.run(order)
        assert outcome is not None  # this is rank 0
        return outcome

    def judged(case: Case) -> Verdict:
        with engine.scratch() as folder:
            return judge.judge(case, folder, start)

    tally.draw(options.jobs, options.seed, judged, largest_world=world.control.size, threads=False)
    world.send({"job": None})
    code = 1 if tally.violations else 0
    world.send({"code": code})
    print(
        "\n".join(
            [
                f"over MPI and Horovod, {world.control.size} workers:",
                *tally.lines(time.monotonic() - started),
            ]
        ),
        flush=True,
    )
    return _close(world, code)


def _close(world: RealWorld, code: int) -> int:
    world.tensors.close()
    world.control.close()
    return code
