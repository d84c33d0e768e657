"""The launcher's command line: what it refuses before it starts mpirun."""

import subprocess
import sys

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
