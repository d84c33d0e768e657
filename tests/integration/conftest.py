"""Whole runs as users start them: by python, by mpirun and by horovodrun, in an empty folder of their own."""

import shutil
import subprocess

import pytest
from support.launching import MPIRUN, ROOT, TRAIN, EndedRun, environment


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    return tmp_path


@pytest.fixture
def start(folder):
    def run(command, timeout=120, **environ):
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment(**environ),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return EndedRun(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def train(start):
    """Run a job: train(2, "jobs/digits.yaml", …) on two workers by mpirun, train(None, …) without a launcher."""

    def run(workers, *arguments, launcher=None, timeout=120, **environ):
        launch = [] if workers is None else (launcher or [*MPIRUN, "-np", str(workers)])
        return start([*launch, *TRAIN, *arguments], timeout, **environ)

    return run
