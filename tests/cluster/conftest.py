"""Runs on several hosts: namespaces of this machine with names, addresses and ssh servers of their own."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.hosts import Hosts, missing
from support.launching import ROOT, EndedRun, environment


@dataclass
class Cluster:
    """Three hosts a, b and c, and a folder that they share."""

    hosts: Hosts
    folder: Path

    def command(self, places, *arguments, program=("-m", "hvdlarge.train"), options=()):
        """The command line on host a for a run by mpirun on some places, such as "a:1,b:2"."""
        workers = sum(int(place.partition(":")[2]) for place in places.split(","))
        launch = [
            "mpirun",
            "--allow-run-as-root",
            "-np",
            workers,
            "--host",
            places,
            "--bind-to",
            "none",
        ]
        # Hosts that do not know of each other's use of the cores would wait for each other with all of them
        exported = ["-x", "PATH", "-x", "PYTHONPATH", "-x", "OMPI_MCA_mpi_yield_when_idle"]
        remote = ["--mca", "plm_rsh_args", self.hosts.ssh_options, "--wdir", self.folder]
        command = [*launch, *exported, *remote, *options, sys.executable, *program, *arguments]
        return self.hosts.hosts[0].inside(*command)

    def begin(self, *arguments, **keywords):
        """Start a run, with its output in the folder's file `output`."""
        with (self.folder / "output").open("w") as output:
            return subprocess.Popen(
                self.command(*arguments, **keywords),
                cwd=self.folder,
                env=environment(PYTHONPATH=str(ROOT), OMPI_MCA_mpi_yield_when_idle="1"),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def end(self, process, seconds=600):
        """Wait for its end."""
        process.wait(timeout=seconds)
        return EndedRun(process.returncode, (self.folder / "output").read_text())

    def run(self, *arguments, **keywords):
        """Run to the end."""
        return self.end(self.begin(*arguments, **keywords))


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    with Hosts(tmp_path_factory.mktemp("hosts") / "hosts", 3) as found:
        yield found


@pytest.fixture
def cluster(hosts, tmp_path):
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    yield Cluster(hosts, tmp_path)
    left = {}
    for host in hosts.hosts:
        sshd = {host.sshd.pid} if host.sshd else set()
        commands = [Path(f"/proc/{pid}/cmdline") for pid in host.processes() if pid not in sshd]
        left[host.name] = [
            path.read_bytes()
            for path in commands
            if path.exists() and b"hvdlarge" in path.read_bytes()
        ]
    assert not any(left.values()), left
    assert os.path.isdir(tmp_path)
