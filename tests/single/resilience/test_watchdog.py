import subprocess
import sys

import pytest

from hvdlarge.resilience.watchdog import Watchdog

PROGRAM = """
import ctypes, sys, time
from pathlib import Path
from hvdlarge.resilience.watchdog import Watchdog
watchdog = Watchdog(3, {"start": 60, "step": 4.0, "save": 60})
watchdog.start()
watchdog.take_notes(Path(sys.argv[2]))
for step in range(4):
    watchdog.progress("step", step)
    time.sleep(0.5)
with watchdog.during("save"):
    time.sleep(6)
time.sleep(0.5)
if sys.argv[1] == "hangs":
    time.sleep(60)
watchdog.stop()
time.sleep(5)
print("ended well")
"""


@pytest.mark.parametrize("how", ["hangs", "ends"])
def test_a_rank_that_hangs_is_ended_and_one_that_goes_on_is_not(tmp_path, how):
    (tmp_path / "rank_7.json").write_text(
        '{"rank": 7, "step": 1, "phase": "fetch", "time": 0, "host": "far"}'
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    if how == "ends":
        assert (done.returncode, done.stdout) == (0, "ended well\n"), done.stderr
        return
    assert done.returncode == 72
    assert "in phase step of step 3; the limit is 4 s" in done.stderr
    assert "rank 7 (far) was last seen" in done.stderr
    assert 'File "<string>", line' in done.stderr  # the stack of what hangs
    assert (tmp_path / "rank_3.json").exists()


NOT_WATCHING = """
import sys, time
from hvdlarge.resilience.watchdog import Watchdog
watchdog = Watchdog(0, {"start": 0.5, "step": 0.5})
if sys.argv[1] == "stopped":
    watchdog.start()
    watchdog.stop()
for step in range(2):
    time.sleep(1.1)
    watchdog.progress("start", step)
with watchdog.during("start"):
    pass
del watchdog
time.sleep(3.5)
print("ended well")
"""


@pytest.mark.parametrize("how", ["never started", "stopped"])
def test_a_watchdog_that_is_not_watching_leaves_nothing_armed_behind(how):
    """Such a one follows the turns of a benchmark, and the runs of tests in one process."""
    done = subprocess.run(
        [sys.executable, "-c", NOT_WATCHING, how], capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stdout) == (0, "ended well\n"), done.stderr


FETCHES = """
import time
from hvdlarge.resilience import watchdog
watchdog._HARD_EXIT_DELAY_SECONDS = 0
watching = watchdog.Watchdog(0, {"start": 60, "step": 1, "fetch": 60})
watching.start()
time.sleep(1.1)
watching.progress("step", 0)
watching.progress("fetch")  # within the second after the hard exit was armed for a step
time.sleep(3)
watching.stop()
print("ended well")
"""


def test_the_hard_exit_has_the_limit_of_the_phase_too():
    done = subprocess.run(
        [sys.executable, "-c", FETCHES], capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stdout) == (0, "ended well\n"), done.stderr


def test_notes_of_an_earlier_start_are_removed(tmp_path):
    (tmp_path / "rank_7.json").write_text("{}")
    Watchdog(1, {"step": 60}).take_notes(tmp_path)
    assert list(tmp_path.iterdir())
    Watchdog(0, {"step": 60}).take_notes(tmp_path)
    assert not list(tmp_path.iterdir())


HOLDS_THE_LOCK = """
import ctypes, sys, time
from hvdlarge.resilience.hard_exit import HardExit
hard_exit = HardExit(72)
hard_exit.arm(60, "put off")
hard_exit.arm(1.0, "100% stuck %s")
if sys.argv[1] == "disarmed":
    hard_exit.disarm()
    time.sleep(2.5)
    sys.exit("left by itself")
ctypes.PyDLL(None).sleep(20)  # a call into C that keeps the interpreter lock
"""


@pytest.mark.parametrize("how", ["armed", "disarmed"])
def test_the_hard_exit_needs_no_interpreter_lock(how):
    done = subprocess.run(
        [sys.executable, "-c", HOLDS_THE_LOCK, how], capture_output=True, text=True, timeout=600
    )
    if how == "disarmed":
        assert (done.returncode, done.stderr) == (1, "left by itself\n")
        return
    assert done.returncode == 72
    assert "hvdlarge: error: 100% stuck %s\n" in done.stderr
    assert 'File "<string>", line' in done.stderr
