"""A user's model and data in which something goes wrong, as FAULT says: kind@rank:pass, e.g. kill@1:20. Leaves a file `fired`."""

import ctypes
import faulthandler
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from mpi4py import MPI

from hvdlarge.data.digits import digits


def rank():
    return MPI.COMM_WORLD.rank if MPI.Is_initialized() else 0


def _die(number):
    faulthandler.disable()
    signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
    os.kill(os.getpid(), number)
    time.sleep(60)


def _hold_the_interpreter_lock():
    ctypes.PyDLL(None).sleep(600)  # a C call that keeps the lock


def _freeze(seconds):
    """SIGSTOP this process; a helper wakes it after so many seconds."""
    if os.fork() == 0:
        time.sleep(seconds)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)


def _limit_files():
    """Let no file of this process grow beyond 600 KB: the next large write fails in its middle, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, resource.RLIM_INFINITY))


def _slow_disk():
    """The next two flushes to disk take 8 s each: 16 s for a checkpoint."""
    flush, left = os.fsync, [8, 8]
    os.fsync = lambda file: (time.sleep(left.pop() if left else 0), flush(file))[1]


ACTIONS = {
    "slowdisk": _slow_disk,
    "limit": _limit_files,
    "kill": lambda: _die(signal.SIGKILL),
    "segv": lambda: _die(signal.SIGSEGV),
    "abort": lambda: _die(signal.SIGABRT),
    "exit0": lambda: sys.exit(0),
    "osexit": lambda: os._exit(0),
    "memory": lambda: torch.empty(2**55),
    "pymemory": lambda: bytearray(2**55),
    "sleep": lambda: time.sleep(600),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "freeze": lambda: _freeze(3),
    "lock": _hold_the_interpreter_lock,
    "usr1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "usr2": lambda: os.kill(os.getpid(), signal.SIGUSR2),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "twice": lambda: [os.kill(os.getpid(), signal.SIGUSR1) for _ in range(2)],
}


def _raise():
    raise RuntimeError("made to fail")


ACTIONS["raise"] = _raise


def fault(moment, passes):
    """The action due now, once in the life of the folder; None otherwise."""
    for described in os.environ.get("FAULT", "").split():
        kind, _, where = described.partition("@")
        number, _, at = where.partition(":")
        mark = f"fired-{kind}-{number}-{at}"
        if not moment and kind.startswith(("eval-", "build-", "hook-")):
            continue
        if (
            kind.startswith(moment)
            and int(number) == rank()
            and int(at) == passes
            and not os.path.exists(mark)
        ):
            with open(mark, "w") as file:
                file.write(str(os.getpid()))
            return kind.removeprefix(moment)
    return None


def starts():
    """How often a run has begun to train in this folder: the rehearsal comes before that, and no fault is meant for it."""
    return sum(path.read_text().count("\n") for path in Path().rglob("starts.jsonl"))


class Net(torch.nn.Module):
    """A small net with batch norm and dropout."""

    def __init__(self, hidden=32, shape_by_rank=False):
        super().__init__()
        kind = fault("build-", 0)
        if kind is not None:
            time.sleep(5) if kind == "slow" else ACTIONS[kind]()
        width = hidden + (rank() if shape_by_rank else 0)
        self.body = torch.nn.Sequential(
            torch.nn.Linear(64, width),
            torch.nn.BatchNorm1d(width),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.1),
        )
        self.extra = torch.nn.Linear(width, width)
        self.head = torch.nn.Linear(width, 10)
        self.register_buffer("gain", torch.ones(()))
        self.passes = 0
        self.starts_before = starts()

    def forward(self, images):
        if not self.training:
            kind = fault("eval-", self.passes)
            if kind is not None:
                ACTIONS[kind]()
            return self.head(self.body(images.flatten(1)))
        if self.passes == 0 and starts() == self.starts_before:
            features = self.body(images.flatten(1))
            return self.head(self.gain * features + 0.1 * self.extra(features))
        self.passes += 1
        kind = fault("", self.passes)
        features = self.body(images.flatten(1))
        if kind == "nan":
            features = features * float("nan")
        elif kind == "inf":
            features = features * float("inf")
        elif kind == "nograd":
            return self.head(features)
        elif kind == "drift":
            with torch.no_grad():
                self.head.weight += 1e-3
        elif kind == "bufferdrift":
            self.gain += 1e-3
        elif kind is not None:
            ACTIONS[kind]()
        return self.head(self.gain * features + 0.1 * self.extra(features))


class Hook:
    """Called after each step."""

    def after_step(self, step):
        kind = fault("hook-", step.step)
        if kind is not None:
            ACTIONS[kind]()


class Slow(torch.utils.data.Dataset):
    """The digits one by one, with faults of their own."""

    def __init__(self, dataset, size=None):
        self.dataset = dataset
        self.size = size or len(dataset)
        self.starts_before = starts()

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        described = os.environ.get("DATA_FAULT", "")
        if described and not os.path.exists("fired-data") and index == 77:
            with open("fired-data", "w") as file:
                file.write(str(os.getpid()))
            if described == "raise":
                raise ValueError("sample 77 is corrupt")
            if described == "slow":
                time.sleep(10)
            if described == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if described == "block":
                os.mkfifo("fifo")
                os.open("fifo", os.O_RDONLY)  # nobody ever writes
        if os.environ.get("LOG_SAMPLES") and starts() > self.starts_before:
            with open(os.environ["LOG_SAMPLES"], "a") as file:
                file.write(f"{index}\n")
        return self.dataset[index]


def data(size=None):
    train, test = digits()
    return Slow(train, size), test
