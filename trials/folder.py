"""Checks the folder of a finished run: files missing, left over or inconsistent."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hvdlarge.config.job_file import read_job

_FILES = {
    "job.yaml",
    "job.resolved.yaml",
    "environment.json",
    "starts.jsonl",
    "decisions.jsonl",
    "metrics.jsonl",
    "summary.json",
}
_FILES |= {".lock", "checkpoints/last.pt", "checkpoints/best.pt", "checkpoints/SHA256SUMS"}
_MAY_LACK = {"checkpoints/best.pt"}  # without a test set
_STEP = re.compile(r"checkpoints/step_([0-9]{9})\.pt")


def flaws(folder: Path) -> Iterator[str]:
    """A message for each problem.

    Args:
        folder: of a finished run.
    """
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    steps = {name: int(match[1]) for name in files if (match := _STEP.fullmatch(name))}
    if unexpected := sorted((files - steps.keys() ^ _FILES) - _MAY_LACK):
        yield f"files missing or left over: {unexpected}"
        return
    job = read_job(str(folder / "job.resolved.yaml"))
    keeps_one_more = job.on_nonfinite.policy == "rollback"
    if len(steps) > job.checkpoint.keep + keeps_one_more:
        yield f"{len(steps)} checkpoints, not {job.checkpoint.keep}"
    yield from _checksum_flaws(folder, sorted(steps))
    decisions = read_lines(folder / "decisions.jsonl")
    if [line["step"] for line in decisions] != list(range(len(decisions))):
        yield f"decisions of the steps {[line['step'] for line in decisions]}"
    if not decisions or not decisions[-1]["is_last"]:
        yield "the last decision is not marked as the last"
    elif max(steps.values()) != decisions[-1]["step"] + 1:
        yield f"the newest checkpoint is of step {max(steps.values())}, of {len(decisions)}"
    metrics = read_lines(folder / "metrics.jsonl")
    for key in ("loss", "test_loss"):
        numbers = [line["step"] for line in metrics if key in line]
        if numbers != sorted(set(numbers)) or (numbers and numbers[-1] != len(decisions) - 1):
            yield f"metrics ({key}) of the steps {numbers}"


def _checksum_flaws(folder: Path, names: list[str]) -> Iterator[str]:
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    expected = "".join(f"{digests[name]}  {Path(name).name}\n" for name in names)
    if (folder / "checkpoints/SHA256SUMS").read_text(encoding="utf-8") != expected:
        yield "SHA256SUMS does not list the checkpoints as they are"
    if not (folder / "checkpoints/last.pt").samefile(folder / names[-1]):
        yield "last.pt is not the newest checkpoint"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a run, except those that each start changes."""
    paths = {
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("starts.jsonl", ".lock")
    }
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }
