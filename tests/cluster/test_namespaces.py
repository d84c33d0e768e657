"""The hosts themselves, and the reasons for which there are none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import hosts
from support.hosts import Hosts, find, missing
from support.launching import ROOT

pytestmark = pytest.mark.short


@pytest.fixture
def permitted():
    if reason := missing():
        pytest.skip(reason)


def test_hosts_of_two_programs_do_not_meet(permitted, tmp_path):
    with Hosts(tmp_path / "one", 2) as one, Hosts(tmp_path / "two", 1) as two:
        assert one.hosts[0].run("ssh", "b", "hostname") == "b\n"
        assert "10.77.0.2/24" in two.hosts[0].run("ip", "address")
        assert two.hosts[0].run("hostname") == "a\n"
        with pytest.raises(AssertionError, match="Could not resolve hostname b"):
            two.hosts[0].run("ssh", "b", "true")
        assert one.hosts[0].processes() == {}


def left_of(folder):
    """Processes whose command line names the folder."""
    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder) in text(path)]


def test_nothing_is_left_after_an_exception(permitted, tmp_path):
    began = []

    def use():
        with Hosts(tmp_path / "hosts", 1) as made:
            command = made.hosts[0].inside("sh", "-c", "sleep 100 & sleep 100")
            began.append(subprocess.Popen(command))
            assert left_of(tmp_path)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert began[0].wait(timeout=5) == -9
    assert not left_of(tmp_path)


def test_nothing_is_left_of_a_start_that_fails(permitted, tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "SSHD_CONFIG", "no configuration\n")
    monkeypatch.setattr(hosts, "SSHD_SECONDS", 0.5)
    made = Hosts(tmp_path / "hosts", 2)
    with pytest.raises(AssertionError, match="Bad configuration option: no"):
        made.__enter__()
    assert not left_of(tmp_path)
    assert all(host.holder.process.returncode is not None for host in made.hosts)


def text(path):
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_why_there_are_no_hosts(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(hosts, "find", lambda program: None if program == "sshd" else program)
        assert missing().startswith("sshd not installed (Debian: ")
    monkeypatch.setattr(hosts, "find", lambda program: program)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 1000)
        assert missing() == "hosts in namespaces need root"


@pytest.mark.skipif(
    missing() != "" or find("setpriv") is None, reason="needs the permission, to take it away"
)
def test_namespaces_that_are_not_permitted():
    without = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    program = "from support.hosts import missing; print(missing())"
    done = subprocess.run(
        [*without, sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
    )
    assert done.stdout.startswith("no hosts in namespaces here: unshare: "), done.stderr
    assert "Operation not permitted" in done.stdout
