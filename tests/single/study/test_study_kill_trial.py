"""`trials/study_kill_trial.py` itself: what it reports as violated."""

import importlib.util
import random
from pathlib import Path

PROGRAM = Path(__file__).parents[3] / "trials" / "study_kill_trial.py"


class Ended:
    """A process of a study that ended before it could be killed."""

    def poll(self):
        return 0

    def wait(self):
        return 0


def test_a_trial_that_killed_nothing_fails(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("study_kill_trial", PROGRAM)
    trial = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trial)
    monkeypatch.setattr(trial, "_start", lambda folder, name: Ended())
    problems = trial._trial(tmp_path, 3, random.Random(0))
    assert "no process was killed: all had ended before" in problems
