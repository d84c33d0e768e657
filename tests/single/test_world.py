"""What a rank leaves behind where the others cannot be reached."""

import os
import signal
import threading

import pytest

from hvdlarge import world


@pytest.fixture
def handlers():
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
    kept = {number: signal.getsignal(number) for number in numbers}
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
