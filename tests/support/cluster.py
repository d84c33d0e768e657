"""Runs on several hosts of this machine (hosts.py), started on the first of them."""

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from support.hosts import Hosts
from support.launching import ROOT, TRAIN, EndedRun, environment

# 170 steps, in float64 as other numbers of workers round differently
JOB = [
    "jobs/digits.yaml",
    "epochs=8",
    "batch.growth.every_epochs=2",
    "precision=fp64",
    "checkpoint.every_steps=10",
]


def weights(folder, run="digits"):
    return torch.load(folder / "runs" / run / "checkpoints/last.pt", weights_only=True)["model"]


def distance(first, second):
    return max(
        float((first[name] - value).norm() / value.norm().clamp_min(1e-3))
        for name, value in second.items()
        if value.is_floating_point()
    )


def used_hosts(cluster, run="digits"):
    """The host of each worker."""
    found = json.loads((cluster.folder / "runs" / run / "environment.json").read_text())
    return [worker["host"] for worker in found["workers"]]


@dataclass
class Cluster:
    """Three hosts a, b and c, and a folder that they share."""

    hosts: Hosts
    folder: Path

    def __getitem__(self, name):
        return next(host for host in self.hosts.hosts if host.name == name)

    def mpirun(self, *options):
        """The beginning of mpirun's command line."""
        exported = ["-x", "PATH", "-x", "PYTHONPATH", "-x", "PYTHONDONTWRITEBYTECODE"]
        return ["mpirun", "--allow-run-as-root", "--bind-to", "none", *exported, *options]

    def begin(self, *command, log="output", **environ):
        """Start a command on host a, in the folder."""
        with (self.folder / log).open("w") as output:
            return subprocess.Popen(
                self["a"].inside(*command, folder=self.folder),
                # One host may see other sources than the rest
                env=environment(PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1", **environ),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def begin_training(self, places, *arguments):
        """Start a run by mpirun on some places, such as "a:1,b:2"."""
        workers = sum(int(place.partition(":")[2]) for place in places.split(","))
        launch = self.mpirun("-np", workers, "--host", places)
        return self.begin(*launch, *TRAIN, *arguments)

    def end(self, process, seconds=300, log="output"):
        """Wait for the end of a command."""
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"runs after {seconds} s\n{self.text(log)}") from None
        return EndedRun(process.returncode, self.text(log))

    def text(self, log="output"):
        """What a command has printed so far."""
        return (self.folder / log).read_text()

    def train(self, places, *arguments):
        """Run to the end by mpirun."""
        return self.end(self.begin_training(places, *arguments))

    def left(self):
        """What still runs on the hosts, by name."""
        return {host.name: found for host in self.hosts.hosts if (found := host.processes())}

    def seconds_until(self, condition, limit):
        """How long it takes for something to be true; AssertionError after a limit."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < limit, f"waited in vain\n{self.text()}"
            time.sleep(0.05)
        return time.monotonic() - began
