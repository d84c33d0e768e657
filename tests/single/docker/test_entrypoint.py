"""The entry point of the images, with hosts that listen on this machine's loopback addresses."""

import os
import signal
import socket
import subprocess
import time

import pytest
from support.launching import ROOT

ENTRY_POINT = ROOT / "docker/entrypoint.sh"


@pytest.fixture
def listener():
    """A socket that listens on 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


@pytest.fixture
def port(listener):
    return listener.getsockname()[1]


@pytest.fixture
def begin(tmp_path, port):
    """Start the entry point with a hostfile of some text: begin("127.0.0.1 slots=2\n", "echo", "ran")."""
    started = []

    def run(hostfile, *command, seconds="20", **environ):
        settings = {
            name: value for name, value in os.environ.items() if not name.startswith("OMPI_")
        }
        settings |= {"HVDLARGE_SSH_PORT": str(port), "HVDLARGE_HOSTS_SECONDS": seconds}
        if hostfile is not None:
            (tmp_path / "hostfile").write_text(hostfile)
            settings["OMPI_MCA_orte_default_hostfile"] = str(tmp_path / "hostfile")
        process = subprocess.Popen(
            [ENTRY_POINT, *command],
            env={**settings, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell cannot trap a signal that it was started without, as by a shell's `&`
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def end(process):
    """Exit code, what was printed, and the error lines."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_without_a_hostfile_the_command_runs_at_once(begin):
    assert end(begin(None, "sh", "-c", "echo ran; exit 75")) == (75, "ran\n", "")


def test_hosts_that_answer_are_not_waited_for(begin):
    """One line of each form, a comment, an empty line, and a host twice."""
    hosts = "# ours\n127.0.0.1 slots=2\n\n127.0.0.1:2\n127.0.0.1  # again\n"
    assert end(begin(hosts, "echo", "ran")) == (0, "ran\n", "")


def test_a_host_that_comes_late_is_waited_for(begin, port):
    process = begin("127.0.0.1 slots=1\n127.0.0.2 slots=1\n", "echo", "ran")
    said = process.stderr.readline()
    assert said == "hvdlarge-entrypoint: waiting at most 20 s for: 127.0.0.2\n"
    assert process.poll() is None
    with socket.create_server(("127.0.0.2", port)):
        assert end(process) == (0, "ran\n", "")


def test_a_host_that_never_comes_is_named(begin, port):
    began = time.monotonic()
    code, out, err = end(
        begin("127.0.0.1\nnowhere.invalid\n127.0.0.2\n", "echo", "ran", seconds="1")
    )
    assert (code, out) == (1, "")
    message = f"error: no answer on port {port} after 1 s from: 127.0.0.2 nowhere.invalid"
    assert err.splitlines()[-1] == f"hvdlarge-entrypoint: {message}"
    assert time.monotonic() - began < 20


def test_the_own_host_needs_no_server(begin, listener):
    listener.close()
    hosts = f"{os.uname().nodename}.some.domain slots=1\nlocalhost slots=1\n"
    assert end(begin(hosts, "echo", "ran", seconds="0")) == (0, "ran\n", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_waiting_ends_by_a_signal(begin, number):
    process = begin("127.0.0.2\n", "echo", "ran")
    process.stderr.readline()
    process.send_signal(number)
    assert end(process)[:2] == (143, "")


@pytest.mark.parametrize(
    ("hostfile", "command", "environ", "message"),
    [
        (None, [], {}, "no command; try: hvdlarge doctor"),
        ("# none\n\n", ["true"], {}, "names no host"),
        (None, ["true"], {"OMPI_MCA_orte_default_hostfile": "/nowhere"}, "no hostfile /nowhere"),
        (None, ["true"], {"HVDLARGE_SSH_PORT": "ssh"}, "HVDLARGE_SSH_PORT=ssh"),
        (None, ["sshd"], {"HOME": "/nowhere"}, "there is no /nowhere/.ssh/authorized_keys"),
    ],
)
def test_what_is_wrong_is_said(begin, hostfile, command, environ, message):
    code, out, err = end(begin(hostfile, *command, **environ))
    assert (code, out) == (1, "")
    assert err.startswith("hvdlarge-entrypoint: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_mpirun_connects_to_the_port(begin, port):
    arguments = 'echo "$OMPI_MCA_plm_rsh_args"'
    process = begin(None, "sh", "-c", arguments, OMPI_MCA_plm_rsh_args="-o ConnectionAttempts=10")
    assert end(process)[1] == f"-o ConnectionAttempts=10 -p {port}\n"
    process = begin(None, "sh", "-c", arguments, HVDLARGE_SSH_PORT="2222")
    assert end(process)[1] == "\n"


def test_a_hostfile_runs_nothing(begin, tmp_path):
    """A name is never taken for a command."""
    end(begin(f"$(touch${{IFS}}{tmp_path}/ran)\n`touch {tmp_path}/ran`\n", "true", seconds="0"))
    assert not (tmp_path / "ran").exists()
