"""Whole runs as users start them: by python, by mpirun and by horovodrun, in an empty folder of their own."""

import shutil
import subprocess

import pytest
from support.launching import MPIRUN, ROOT, TRAIN, EndedRun, core_of_its_own, environment

__all__ = ["core_of_its_own"]  # a fixture


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    return tmp_path


@pytest.fixture
def start(folder):
    def run(command, timeout=600, **environ):
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(**environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:  # of this limit or pytest's own
            process.terminate()  # a launcher ends its ranks then; one that is killed leaves them
            process.communicate()
            raise
        return EndedRun(process.returncode, out, err)

    return run


@pytest.fixture
def train(start):
    """Run a job: train(2, "jobs/digits.yaml", …) on two workers by mpirun, train(None, …) without a launcher."""

    def run(workers, *arguments, launcher=None, timeout=600, **environ):
        launch = [] if workers is None else (launcher or [*MPIRUN, "-np", str(workers)])
        return start([*launch, *TRAIN, *arguments], timeout, **environ)

    return run
