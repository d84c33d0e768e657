"""Kills one or both processes of a study at random moments, again and again, and compares its end
with that of one that was left alone.

    python trials/study_kill_trial.py --kills 10

After every third kill of one the other goes on for a while. No run that has ended may be lost or
trained again, no run may be started more often than processes were killed, and the results must be
the same but for their times. Exit code 0 if that is so, and if a process was killed at all.
Ten kills take three to five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STUDY = """\
name: killed
job:
  epochs: 4
  data: {name: digits}
  model: {name: mlp}
  batch: {base: 64, micro: 64}
  lr: {base: 0.2}
  optimizer: {name: sgd, momentum: 0.9}
factors:
  batch.initial: [64, 256]
tune: {search: {lr.base: {low: 0.05, high: 1, log: true}}, trials: 6, round: 2}
seeds: 4
"""
RUNS = 20


def main() -> int:
    """Run the trial; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, help="rounds of kills (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="study-") as place:
        folder = Path(place)
        (folder / "study.yaml").write_text(STUDY)
        problems = _trial(folder, options.kills, rng)
    for problem in problems:
        print(f"violated: {problem}", flush=True)
    return 1 if problems else 0


def _trial(folder: Path, kills: int, rng: random.Random) -> list[str]:
    problems: list[str] = []
    seen: dict[str, str] = {}
    killed = 0
    began = time.monotonic()
    problems += _to_the_end(folder, "whole")
    longest = (time.monotonic() - began) / 4  # so that all kills fall within the study
    for number in range(kills):
        both = [_start(folder, "killed") for _ in range(2)]
        _wait(both, rng.uniform(0, longest))
        for place, process in enumerate(both):
            if place == 1 and number % 3 == 2:
                _wait([process], rng.uniform(0, longest))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                killed += 1
        codes = [process.wait() for process in both]
        if set(codes) - {0, -signal.SIGKILL}:
            problems.append(f"exit codes {codes}: {_end_of(folder, 'killed')}")
        records = _records(folder / "runs-killed")
        problems += [f"{name} was lost" for name in seen if name not in records]
        problems += [
            f"{name} has changed"
            for name, record in seen.items()
            if records.get(name, record) != record
        ]
        seen |= records
        print(f"kill {number + 1}: {len(seen)} of {RUNS} runs have ended", flush=True)
    if not killed:
        problems.append("no process was killed: all had ended before")
    problems += _to_the_end(folder, "killed")
    after, whole = _records(folder / "runs-killed"), _records(folder / "runs-whole")
    problems += [f"{name} was trained again" for name in seen if after.get(name) != seen[name]]
    for name in sorted(whole.keys() | after.keys()):
        if _plain(after.get(name)) != _plain(whole.get(name)):
            problems.append(f"{name} differs from that of a study that was left alone")
    if len(whole) != RUNS:
        problems.append(f"{len(whole)} runs instead of {RUNS}")
    starts = _starts(folder / "runs-killed")
    if sum(starts.values()) > RUNS + killed:
        problems.append(f"{sum(starts.values())} starts of {RUNS} runs with {killed} kills")
    for name, count in _starts(folder / "runs-whole").items():
        if count != 1:
            problems.append(f"{name} was started {count} times in the study left alone")
    agree = sum(_plain(after.get(name)) == _plain(each) for name, each in whole.items())
    print(
        f"{killed} processes killed; {sum(starts.values())} starts of {len(after)} runs; "
        f"{agree} of {len(whole)} results agree",
        flush=True,
    )
    return problems


def _to_the_end(folder: Path, name: str) -> list[str]:
    both = [_start(folder, name) for _ in range(2)]
    codes = [process.wait() for process in both]
    return [] if codes == [0, 0] else [f"exit codes {codes}: {_end_of(folder, name)}"]


def _start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "hvdlarge.study", "study.yaml", "--folder", f"runs-{name}"],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )


def _wait(processes: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait, but not for longer than the processes take."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        time.sleep(0.01)


def _records(folder: Path) -> dict[str, str]:
    return {
        f"{path.parent.name}/{path.stem}": path.read_text(encoding="utf-8")
        for path in folder.glob("runs/*/*.json")
    }


def _plain(record: str | None) -> dict[str, Any] | None:
    """A result without its time."""
    return None if record is None else {**json.loads(record), "seconds": None}


def _starts(folder: Path) -> dict[str, int]:
    return {
        f"{path.parent.parent.name}/{path.parent.name}": len(path.read_text().splitlines())
        for path in folder.glob("runs/*/*/starts.jsonl")
    }


def _end_of(folder: Path, name: str) -> str:
    return (folder / f"{name}.txt").read_text(encoding="utf-8", errors="replace")[-500:]


if __name__ == "__main__":
    sys.exit(main())
