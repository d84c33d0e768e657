"""The launcher's command line: what it refuses before it starts mpirun."""

import os
import signal
import subprocess
import sys
import time

import pytest
from support.launching import ROOT

JOB = str(ROOT / "jobs/digits.yaml")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--hosts-command", "no-such-command -v"], "No such file or directory: 'no-such-command'"),
        (["--hosts-command", ""], "--hosts-command : "),
        (["--hosts-command", "echo 'a"], "No closing quotation"),
        (["--hosts-command", "false"], "exit code 1"),
        (["--hosts-file", "nothing"], "--hosts-file nothing: No such file"),
        (["--hosts-file", "binary"], "--hosts-file binary: 'utf-8' codec"),
        (["--hosts-file", "binary", "--hosts-command", "echo a"], "either"),
    ],
)
def test_hosts_that_cannot_be_read_are_one_error(tmp_path, options, words):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\n")
    # Overrides may follow options
    command = [sys.executable, "-m", "hvdlarge.launch", "-np", "2", JOB, *options, "epochs=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("hvdlarge: error:") == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stop_while_the_hosts_are_asked_for_starts_nothing(tmp_path):
    (tmp_path / "hosts").write_text("kill -TERM $PPID\nsleep 0.5\necho localhost\n")
    command = [sys.executable, "-m", "hvdlarge.launch", "-np", "1", "--hosts-command", "sh hosts"]
    done = subprocess.run(
        [*command, "--mpirun", "no-such-mpirun", JOB],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 75, done.stdout + done.stderr
    assert "launch: SIGTERM: nothing was started" in done.stdout + done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("mpirun", "code", "words"),
    [
        ("mpirun 'a", 2, "--mpirun mpirun 'a: No closing quotation"),
        ("", 2, "--mpirun is empty"),
        ("./not-executable", 3, "./not-executable cannot be started: Permission denied"),
        ("no-such-mpirun", 3, "no-such-mpirun is not on PATH"),
    ],
)
def test_an_mpirun_that_cannot_be_started_is_one_error(tmp_path, mpirun, code, words):
    (tmp_path / "not-executable").write_text("#!/bin/sh\n")
    command = [sys.executable, "-m", "hvdlarge.launch", "-np", "2", JOB, "--mpirun", mpirun]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("hvdlarge: error:") == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def begin(folder, script, *prefix):
    """Start the launcher with a shell script in place of mpirun; returns once the script runs."""
    (folder / "mpirun").write_text(f"touch started\n{script}\n")
    process = subprocess.Popen(
        [*prefix, sys.executable, "-m", "hvdlarge.launch", "-np", "1", JOB]
        + ["--mpirun", "sh mpirun"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
    )
    deadline = time.monotonic() + 30
    while not (folder / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("script", ["exec sleep 30", "sleep 1; exit 138"])
def test_a_stop_that_meets_ranks_without_handlers_is_an_orderly_stop(tmp_path, script):
    """SIGUSR1 ends mpirun (the first script) or a rank, whose end mpirun reports as 138."""
    if "exit" in script:
        script = f"trap '' USR1; {script}"
    process = begin(tmp_path, script)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=20)
    assert process.returncode == 75, text
    assert "stopped before the ranks were ready" in text


def test_signals_that_are_ignored_from_the_start_stay_ignored(tmp_path):
    """As nohup does for SIGHUP."""
    process = begin(tmp_path, "sleep 2", "nohup")
    os.kill(process.pid, signal.SIGHUP)
    text, _ = process.communicate(timeout=20)
    assert process.returncode == 0, text
    assert "SIGHUP" not in text
