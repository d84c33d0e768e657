"""Runs under a real Slurm, a cluster of this machine alone: two nodes, started by the tests and ended by them."""

import os
import sys
from pathlib import Path

import pytest
from support.launching import ROOT
from support.slurm import Cluster, missing

JOB = """\
name: small
epochs: {epochs}
data: {{name: digits}}
model: {{name: "slow_parts:Net"}}
batch: {{base: 32, micro: 8, growth: {{policy: adabatch, every_epochs: 1, max: 128}}}}
lr: {{base: 2, scaling: sqrt, warmup: {{policy: legw, epochs: 0.3}}}}
optimizer: {{name: lars, weight_decay: 1e-4}}
run_dir: run
checkpoint: {{every_steps: 20}}
deterministic: true
"""

# What waits changes no weight. A job that was put back into the queue waits no more.
PARTS = """
import os, time
import torch

class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))

    def forward(self, images):
        if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            time.sleep(float(os.environ.get("WAIT", 0)))
        return super().forward(images)
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as started:
        yield started


class Bench:
    """A folder with a job, and the batch files of docker/slurm."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        self.environ = {
            "HVDLARGE_PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "OMPI_MCA_btl_tcp_if_include": "lo",
            "OMPI_MCA_oob_tcp_if_include": "lo",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }

    def write(self, epochs=3):
        """The job file, and the model beside it."""
        (self.folder / "job.yaml").write_text(JOB.format(epochs=epochs))
        (self.folder / "slow_parts.py").write_text(PARTS)

    def submit(self, *options, file="train.sbatch", arguments=("job.yaml",), **environ):
        """Submit one of the batch files, for CPUs."""
        environ = {**self.environ, **environ}
        exported = ",".join(["ALL", *(f"{name}={value}" for name, value in environ.items())])
        small = ["--gpus-per-node=0", "--cpus-per-task=1", "--ntasks-per-node=1"]
        place = [f"--chdir={self.folder}", f"--export={exported}"]
        path = ROOT / "docker/slurm" / file
        return self.cluster.submit(*place, *small, *options, path, *arguments)

    def logs(self):
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))


@pytest.fixture
def bench(cluster, tmp_path):
    found = Bench(cluster, tmp_path)
    found.write()
    return found


@pytest.fixture(autouse=True)
def no_process_left():
    yield
    left = []
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = status.read_bytes()
            environ = (status.parent / "environ").read_bytes()
        except OSError:
            continue
        if (
            b"hvdlarge.train" in command
            and b"SLURM_CONF=" in environ
            and int(status.parent.name) != os.getpid()
        ):
            left.append(command.replace(b"\0", b" ").decode())
    assert not left
