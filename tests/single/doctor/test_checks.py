"""The doctor's checks, with what they ask the system replaced."""

import os
import shutil
from types import SimpleNamespace

import pytest

from hvdlarge.doctor import checks

MIB = 2**20


@pytest.mark.parametrize(
    ("total", "free", "level", "words"),
    [
        (64, 64, "warning", "64 MiB: loader processes and MPI on one host need more"),
        (8192, 100, "warning", "100 MiB of 8.0 GiB are free"),
        (8192, 8000, "ok", "8.0 GiB"),
    ],
)
def test_shared_memory_that_is_small_or_full_is_a_warning(
    monkeypatch, tmp_path, total, free, level, words
):
    usage = SimpleNamespace(total=total * MIB, free=free * MIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    (finding,) = checks._shared_memory(tmp_path)
    assert (finding.level, bool(finding.fix)) == (level, level == "warning")
    assert finding.text.startswith(words)
    assert list(checks._shared_memory(tmp_path / "missing")) == []


def test_a_launch_that_puts_no_worker_on_this_host_has_no_cores_to_check():
    (finding,) = checks._cores([{"host": "another host", "cores": [0]}], None)
    assert (finding.level, finding.text.split(":")[0]) == ("ok", "no worker runs on this host")


@pytest.mark.parametrize(
    ("devices", "level", "words"),
    [
        ([], "ok", "none on this host: runs use the CPU"),
        (["kfd"], "warning", "AMD GPUs on this host (/dev/kfd): runs on ROCm are untested"),
    ],
)
def test_gpus_of_amd_are_found(tmp_path, devices, level, words):
    for name in devices:
        (tmp_path / name).touch()
    (finding,) = checks._gpus({"__version__": "2.11"}, None, tmp_path)
    assert (finding.name, finding.level, finding.text) == ("GPUs", level, words)


@pytest.mark.parametrize(
    ("version", "warned"),
    [
        ("mpirun (Open MPI) 4.1.4", True),
        ("HYDRA build details:\n    Version:    4.2.0", False),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.12", False),
    ],
)
def test_only_open_mpi_refuses_root(monkeypatch, tmp_path, version, warned):
    (tmp_path / "mpirun").write_text(f"#!/bin/sh\ncat <<'END'\n{version}\nEND\n")
    (tmp_path / "mpirun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert [finding.name for finding in checks._variables({})] == ["root"] * warned
