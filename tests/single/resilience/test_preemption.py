import os
import signal
import subprocess
import sys
import time

import pytest

from hvdlarge.resilience.preemption import StopRequest


@pytest.fixture
def handlers():
    kept = {
        number: signal.getsignal(number)
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
    }
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_a_signal_only_sets_a_flag(handlers, number):
    stop = StopRequest()
    stop.install_handlers()
    assert not stop.requested()
    os.kill(os.getpid(), number)
    assert stop.requested()
    assert stop.reason == signal.Signals(number).name


def test_the_file_and_the_clock(tmp_path, monkeypatch):
    (tmp_path / "STOP").touch()
    stop = StopRequest()
    stop.watch(tmp_path / "STOP", None)
    assert not stop.requested()  # one from before does not count, and is gone
    assert not (tmp_path / "STOP").exists()
    (tmp_path / "STOP").touch()
    stop._next_poll = 0.0
    assert stop.requested()
    stop.consume_file()
    assert not (tmp_path / "STOP").exists()
    limited = StopRequest()
    limited.watch(None, 1.0)
    assert not limited.requested()
    now = time.monotonic()
    monkeypatch.setattr("hvdlarge.resilience.preemption.time.monotonic", lambda: now + 61)
    assert limited.requested()
    assert limited.reason == "the time limit of 1 minutes"


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM, SIGINT"])
def test_a_second_ctrl_c_leaves_at_once(first):
    program = (
        "import os, signal, time\nfrom hvdlarge.resilience.preemption import StopRequest\n"
        "stop = StopRequest(); stop.install_handlers()\n"
        f"for name in '{first}'.split(', '): os.kill(os.getpid(), getattr(signal, name))\n"
        "print(stop.requested(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stdout) == (130, "True\n")
