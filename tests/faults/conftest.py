"""Runs in which something goes wrong on purpose. Each test asserts that the fault happened; none leaves a process behind."""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from support.launching import MPIRUN, TRAIN, EndedRun, core_of_its_own, environment

__all__ = ["core_of_its_own"]  # a fixture

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """Mark what is not short as long, so that one expression selects from several suites."""
    for item in items:
        if item.path.parent == HERE and not item.get_closest_marker("short"):
            item.add_marker("long")


@dataclass
class EndedFaultyRun(EndedRun):
    """A run that has ended, how long it took, and the faults that happened in it."""

    seconds: float = 0.0
    fired: list[str] = field(default_factory=list)


class Bench:
    """A folder with the faulty job, and the means to run it."""

    def __init__(self, folder):
        self.folder = folder
        self.started = []
        self.rows = []  # of the table of cases: exit code, seconds, what was printed

    def begin(self, workers, *arguments, launch=None, **environ):
        """Start a run in a session of its own."""
        launch = launch or ([] if workers is None else [*MPIRUN, "-np", str(workers)])
        return self.begin_command([*launch, *TRAIN, "job.yaml", *arguments], **environ)

    def begin_command(self, command, **environ):
        """Start any command in a session of its own."""
        log = (self.folder / f"log{len(self.started)}").open("w+")
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment(**environ),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.started.append((process, log, time.monotonic()))
        return process

    def end(self, process, timeout=600):
        """Wait for a run; every process of it must be gone a few seconds later."""
        _, log, began = next(entry for entry in self.started if entry[0] is process)
        try:
            code = process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            states = "\n".join(map(self.state, self.left()))
            self.stop(process)
            raise AssertionError(
                f"still running after {timeout} s\n{states}\n{self.text(log)}"
            ) from None
        seconds = time.monotonic() - began
        deadline = time.monotonic() + 8
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, f"left behind: {left}\n{self.text(log)}"
        self.rows.append((code, seconds, self.text(log)))
        fired = sorted(path.name for path in self.folder.glob("fired-*"))
        return EndedFaultyRun(code, self.text(log), seconds=seconds, fired=fired)

    def run(self, workers, *arguments, timeout=600, **options):
        """Start a run and wait for its end."""
        return self.end(self.begin(workers, *arguments, **options), timeout)

    def text(self, log):
        log.flush()
        return Path(log.name).read_text()

    def left(self):
        """Processes that work in this bench's folder, zombies left out."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                where = os.readlink(process / "cwd")
                state = (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except (OSError, IndexError):
                continue
            if (
                state != "Z"
                and Path(where).is_relative_to(self.folder)
                and int(process.name) != os.getpid()
            ):
                found.append(int(process.name))
        return found

    @staticmethod
    def state(pid):
        """What a process is doing, for the report of a test that waits in vain."""
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            return f"{pid} {lines[0]} {lines[2]} in {Path(f'/proc/{pid}/wchan').read_text()}"
        except OSError:
            return f"{pid} is gone"

    def ranks(self):
        """Process ids of the ranks that run in this bench's folder, in rising order."""
        found = []
        for pid in self.left():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[1:3] == [b"-m", b"hvdlarge.train"]:
                found.append(pid)
        return sorted(found)

    def stop(self, process):
        for pid in self.left():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()

    def until(self, condition, timeout=600):
        """Wait for something to be true."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, "waited in vain\n" + "\n".join(
                self.text(log) for _, log, _ in self.started
            )
            time.sleep(0.02)

    def run_folder(self, name="runs/faults"):
        return self.folder / name

    def checkpoint(self, name="runs/faults"):
        """The newest checkpoint, which must be whole."""
        return torch.load(self.run_folder(name) / "checkpoints" / "last.pt", weights_only=True)

    def has_checkpoint(self, name="runs/faults"):
        return any((self.run_folder(name) / "checkpoints").glob("step_*.pt"))


def said(text):
    """The line that tells the user what happened."""
    words = (
        "hvdlarge: error:",
        "stopped after",
        "back to step",
        "already finished",
        "skipped runs/",
        "resuming from",
        "done:",
    )
    lines = text.splitlines()
    return next((line for word in words for line in lines if word in line), "")


@contextlib.contextmanager
def bench_in(folder):
    """A bench with the faulty job; in the end none of its processes is left."""
    for name in ("faulty.py", "job.yaml"):
        shutil.copy(HERE / name, folder)
    made = Bench(folder)
    try:
        yield made
    finally:
        for process, log, _ in made.started:
            made.stop(process)
            log.close()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The last checkpoint of a run without faults, by its workers and arguments; each runs once."""
    with bench_in(tmp_path_factory.mktemp("undisturbed")) as bench:

        @functools.cache
        def checkpoint_of(workers, *arguments):
            name = f"runs/{len(bench.rows)}"
            ended = bench.run(workers, f"run_dir={name}", *arguments)
            assert ended.code == 0, ended.text
            return bench.checkpoint(name)

        yield checkpoint_of


@pytest.fixture
def bench(tmp_path, request):
    with bench_in(tmp_path) as made:
        yield made
    if table := os.environ.get(
        "FAULT_TABLE"
    ):  # where the table of cases is written, a line for each run
        with open(table, "a") as file:
            for code, seconds, text in made.rows:
                file.write(f"{request.node.name}\t{code}\t{seconds:.1f}\t{said(text)}\n")
