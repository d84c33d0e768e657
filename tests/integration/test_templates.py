"""The batch files of docker/templates for schedulers that no test has: run by bash, with a host file, the signals and the commands of the scheduler."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support.launching import ROOT, environment

TEMPLATES = ROOT / "docker/templates"
# As LSF and PBS write it: a line for each slot
HOSTS = "localhost\nlocalhost\n"


@pytest.fixture
def batch(folder):
    """Start a batch file: batch("lsf.bsub", LSB_DJOB_HOSTFILE=…); what it starts ends with the test."""
    (folder / "hosts").write_text(HOSTS)
    commands = folder / "commands"
    commands.mkdir()
    (commands / "qsub").write_text(f'#!/bin/sh\necho "$@" >> {folder}/submitted\n')
    (commands / "qsub").chmod(0o755)
    # The temporary files of the script are looked at too
    (folder / "temporary").mkdir()
    started = []

    def start(file, **environ):
        settings = environment(
            HVDLARGE_PYTHON=sys.executable,
            PYTHONPATH=str(ROOT),
            JOB="jobs/digits.yaml",
            TMPDIR=str(folder / "temporary"),
            OMPI_ALLOW_RUN_AS_ROOT="1",
            OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
            OMPI_MCA_mpi_yield_when_idle="1",
            OMPI_MCA_hwloc_base_binding_policy="none",
            OMPI_MCA_btl_tcp_if_include="lo",
            OMPI_MCA_oob_tcp_if_include="lo",
        )
        settings["PATH"] = f"{commands}:{settings['PATH']}"
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                ["bash", TEMPLATES / file],
                cwd=folder,
                env={**settings, **environ},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def summary(folder):
    return json.loads((folder / "runs/digits/summary.json").read_text())


def end(process, folder):
    """Wait for the end; exit code and log."""
    return process.wait(timeout=300), (folder / "log").read_text()


def until_it_trains(process, folder):
    """Wait until the run has made some steps."""
    decisions = folder / "runs/digits/decisions.jsonl"
    while not decisions.exists() or decisions.read_text().count("\n") < 30:
        assert process.poll() is None, end(process, folder)
        time.sleep(0.02)


def assert_stopped(folder, log):
    assert "stopped after step" in log
    assert (folder / "runs/digits/checkpoints/last.pt").exists()
    left = [path for path in (folder / "temporary").iterdir() if path.is_file()]
    assert not left


def test_lsf_stops_near_the_limit_and_goes_on(batch, folder):
    hosts = {"LSB_DJOB_HOSTFILE": str(folder / "hosts")}
    process = batch("lsf.bsub", **hosts)
    until_it_trains(process, folder)
    # LSF signals all processes of the job
    os.killpg(process.pid, signal.SIGUSR2)
    code, log = end(process, folder)
    assert code == 75, log  # -Q 75 puts the job back into the queue
    assert_stopped(folder, log)
    code, log = end(batch("lsf.bsub", **hosts), folder)
    assert code == 0, log
    assert "2 workers on localhost:2" in log
    assert (summary(folder)["steps"], summary(folder)["world_size"]) == (524, 2)
    assert summary(folder)["accuracy"] >= 0.98


def test_pbs_submits_a_job_again_that_its_own_clock_has_stopped_and_none_after_qdel(batch, folder):
    place = {"PBS_NODEFILE": str(folder / "hosts"), "PBS_O_WORKDIR": str(folder)}
    process = batch("pbs.sh", **place)
    until_it_trains(process, folder)
    os.killpg(process.pid, signal.SIGTERM)
    code, log = end(process, folder)
    assert code == 75, log
    assert_stopped(folder, log)
    assert not (folder / "submitted").exists()
    code, log = end(batch("pbs.sh", STOP_AFTER_MINUTES="0.01", **place), folder)
    assert code == 75, log
    assert "resuming from" in log
    assert_stopped(folder, log)
    assert (folder / "submitted").read_text() == f"-v JOB=jobs/digits.yaml {TEMPLATES}/pbs.sh\n"


def test_a_host_file_says_how_many_workers_there_are(folder):
    """What docker/templates/hostfile.sh starts, by the command line of a mpirun that prints it."""
    commands = folder / "commands"
    commands.mkdir()
    (commands / "mpirun").write_text('#!/bin/sh\necho "$@"\n')
    (commands / "mpirun").chmod(0o755)
    environ = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"}

    def started(text):
        (folder / "hosts").write_text(text)
        return subprocess.run(
            [TEMPLATES / "hostfile.sh", "hosts", "job.yaml", "lr.base=2"],
            cwd=folder,
            env=environ,
            capture_output=True,
            text=True,
        )

    done = started("# the hosts\na slots=4\n\nb slots=2 max_slots=8\nc\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("-np 7 --hostfile hosts")
    assert done.stdout.endswith("-m hvdlarge.train job.yaml lr.base=2\n")
    done = started("# none\n")
    assert done.returncode == 2
    assert "hosts has no slots" in done.stderr
