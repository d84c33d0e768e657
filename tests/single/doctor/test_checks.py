"""The doctor's checks, with what they ask the system replaced."""

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
