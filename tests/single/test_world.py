"""What a rank leaves behind where the others cannot be reached."""

import contextlib
import os
import signal
import threading
from pathlib import Path

import pytest

from hvdlarge import world
from hvdlarge.comm import environment
from hvdlarge.comm.launcher import YIELD_WHEN_IDLE, Launch
from hvdlarge.comm.solo import SoloChannel, SoloCollectives
from hvdlarge.config.job import Horovod, Job, Timeouts
from hvdlarge.exits import Stopped

NUMBERS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def handlers():
    kept = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_a_wrong_environment_leaves_no_watchdog_behind(handlers, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", os.environ | {"HOROVOD_ELASTIC": "1"})
    armed = []

    class Timer:
        def __init__(self, code):
            pass

        def arm(self, seconds, message):
            armed.append(seconds)

        def disarm(self):
            armed.clear()

    monkeypatch.setattr("hvdlarge.resilience.watchdog.HardExit", Timer)
    code = world.run_on_all_ranks(None, lambda: None, {}, lambda *_: None, watched=True)
    assert code == 3
    assert "elastic Horovod is not supported" in capsys.readouterr().err
    assert not armed
    for thread in threading.enumerate():
        if thread.name == "watchdog":
            thread.join(timeout=60)
            assert not thread.is_alive()


def test_a_program_gets_its_process_back_and_each_run_its_own_settings(monkeypatch, capfd):
    launch = Launch("mpirun", rank=0, size=1, local_rank=0, local_size=1)
    monkeypatch.setattr(world, "open_control", lambda launch: SoloChannel())
    monkeypatch.setattr(world, "open_tensors", lambda launch, control: SoloCollectives())
    monkeypatch.setattr(environment, "_read_by_mpi", {})
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("HOROVOD_CYCLE_TIME", None)
    os.environ.pop(YIELD_WHEN_IDLE, None)

    def kept():
        handlers = [signal.getsignal(number) for number in NUMBERS]
        return handlers, dict(os.environ), Path("/proc/self/timers").read_text()

    before, seen = kept(), []

    def work(context, job):
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, before[0][2])
        seen.append(os.environ["HOROVOD_CYCLE_TIME"])
        if len(seen) == 2:
            raise Stopped("as asked")

    for cycle, yields in ((3, True), (7, False), (9, True)):
        job = Job.model_construct(
            timeouts=Timeouts(), horovod=Horovod(cycle_ms=cycle, yield_when_idle=yields)
        )
        monkeypatch.setattr(world, "_check_equal", lambda *_: None)
        with pytest.raises(Stopped) if cycle == 7 else contextlib.nullcontext():
            world.on_all_ranks(launch, lambda job=job: job, {}, work, watched=True, last=False)
        assert kept() == before
    assert seen == ["3", "7", "9"]
    notes = [line for line in capfd.readouterr().out.splitlines() if line.startswith("note")]
    assert len(notes) == 1
    assert notes[0].endswith(f"run of this process, and keeps {YIELD_WHEN_IDLE}=1")
