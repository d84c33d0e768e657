"""Kills runs by SIGKILL of a random rank at a random moment, restarts each with the same command
until it ends, and holds the final weights against those of an undisturbed run.

    python trials/kill_trial.py --runs 50                     identical to the last bit
    python trials/kill_trial.py --runs 20 --change-workers    another number of workers at each
                                                              restart: equal to 1e-12 relative

Every third run is killed while rank 0 is writing a checkpoint. Prints a line for each run and a
summary; exit code 0 if all agree.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.comparing import weight_distance
from support.launching import MPIRUN, TRAIN

JOB = """
name: trial
epochs: 4
precision: fp64
data: {name: digits}
model: {name: convnet, args: {width: 8, dropout: 0.2}}
batch: {base: 32, micro: 8, growth: {policy: adabatch, every_epochs: 1, max: 200}}
lr: {base: 4, scaling: sqrt, warmup: {policy: legw, epochs: 0.3}, decay: {policy: polynomial}}
optimizer: {name: lars, weight_decay: 1e-4}
checkpoint: {every_steps: 7, keep: 2}
evaluate: {every_epochs: 2}
"""


def ranks_of(mpirun: int) -> list[int]:
    """Process ids of the ranks that an mpirun has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = next(
                line for line in status.read_text().splitlines() if line.startswith("PPid:")
            ).split()[1]
            if (
                parent == str(mpirun)
                and b"hvdlarge.train" in (status.parent / "cmdline").read_bytes()
            ):
                found.append(int(status.parent.name))
        except (OSError, StopIteration):
            continue
    return sorted(found)


def start(folder: Path, workers: int, log: Any) -> subprocess.Popen[bytes]:
    """Start the job in a folder."""
    command = [*MPIRUN, "-np", str(workers), *TRAIN, "job.yaml", "run_dir=run"]
    return subprocess.Popen(
        command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def wait_for_a_write(folder: Path, process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Return when rank 0 is writing a checkpoint, or after so many seconds."""
    deadline = time.monotonic() + seconds
    checkpoints = folder / "run" / "checkpoints"
    while time.monotonic() < deadline and process.poll() is None:
        if any(checkpoints.glob(".step_*.part")):
            return True
    return False


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's last checkpoint."""
    return torch.load(folder / "run" / "checkpoints" / "last.pt", weights_only=True)["model"]


def undisturbed(folder: Path, workers: int) -> tuple[dict[str, torch.Tensor], float]:
    """Weights and seconds of a run that nobody kills."""
    folder.mkdir()
    (folder / "job.yaml").write_text(JOB)
    begin = time.monotonic()
    with (folder / "log").open("w") as log:
        code = start(folder, workers, log).wait(timeout=120)
    assert code == 0, (folder / "log").read_text()
    weights = weights_of(folder)
    assert all(torch.isfinite(value).all() for value in weights.values())
    return weights, time.monotonic() - begin


def kill_one(
    folder: Path,
    process: subprocess.Popen[bytes],
    longest: float,
    in_save: bool,
    chance: random.Random,
) -> tuple[bool, bool]:
    """SIGKILL to one rank at a random moment; returns (killed, in a write), (False, False) where
    the run had ended before.
    """
    moment = chance.uniform(0.3, 0.7) if in_save else chance.uniform(0.1, 0.95)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=moment * longest)
    in_write = in_save and wait_for_a_write(folder, process, 3)
    ranks = ranks_of(process.pid)
    if not ranks:
        return False, False
    os.kill(ranks[0] if in_save else chance.choice(ranks), signal.SIGKILL)
    return True, in_write


def trial(
    folder: Path,
    workers: int,
    next_workers: Any,
    longest: float,
    in_save: bool,
    chance: random.Random,
) -> Any:
    """One run, killed once or more; returns (kills, kills in a write, starts, seconds).

    A machine's speed wanders, so a run can end before its moment has come; it then shows nothing,
    and begins anew with the moment drawn from the time that it took.
    """
    folder.mkdir()
    (folder / "job.yaml").write_text(JOB)
    kills = in_write = starts = escapes = 0
    begin = time.monotonic()
    with (folder / "log").open("w") as log:
        while True:
            starts += 1
            started = time.monotonic()
            process = start(folder, workers, log)
            if kills == 0 or (kills < 3 and chance.random() < 0.3):
                killed, writing = kill_one(folder, process, longest, in_save, chance)
                kills += killed
                in_write += writing
            code = process.wait(timeout=120)
            if code == 0 and kills == 0:
                escapes += 1
                assert escapes < 10, "ten runs in a row ended before they could be killed"
                longest = time.monotonic() - started
                shutil.rmtree(folder / "run")
                continue
            if code == 0:
                return kills, in_write, starts, time.monotonic() - begin
            assert code == 137, f"exit code {code}\n{(folder / 'log').read_text()[-3000:]}"
            assert starts - escapes < 10, (folder / "log").read_text()[-3000:]
            workers = next_workers(workers)


def main() -> int:
    """Kill and restart runs; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--change-workers", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    place = Path(tempfile.mkdtemp(prefix="kill-trial-"))
    try:
        whole, longest = undisturbed(place / "whole", options.workers)
        print(f"undisturbed: {longest:.1f} s on {options.workers} workers", flush=True)
        totals = {
            "runs": 0,
            "kills": 0,
            "kills while a checkpoint was written": 0,
            "starts": 0,
            "agree": 0,
        }
        worst = 0.0
        for number in range(options.runs):
            others = (
                (lambda now: chance.choice([n for n in (1, 2, 3, 4) if n != now]))
                if options.change_workers
                else (lambda now: now)
            )
            kills, in_write, starts, seconds = trial(
                place / f"run{number}", options.workers, others, longest, number % 3 == 2, chance
            )
            weights = weights_of(place / f"run{number}")
            if options.change_workers:
                away = weight_distance(weights, whole)
                agree = away <= 1e-12
                worst = max(worst, away)
            else:
                agree = all(torch.equal(weights[name], value) for name, value in whole.items())
            lines = [
                json.loads(line)
                for line in (place / f"run{number}/run/decisions.jsonl").read_text().splitlines()
            ]
            agree = agree and [line["step"] for line in lines] == list(range(len(lines)))
            for name, value in zip(totals, (1, kills, in_write, starts, int(agree)), strict=True):
                totals[name] += value
            print(
                f"run {number}: {kills} kills, {starts} starts, {seconds:.1f} s, "
                f"{'agrees' if agree else 'DIFFERS'}",
                flush=True,
            )
            shutil.rmtree(place / f"run{number}")
        print(
            ", ".join(f"{name} {value}" for name, value in totals.items())
            + (f", largest distance {worst:.1e}" if worst else "")
        )
        return (
            0
            if totals["agree"] == totals["runs"] == options.runs and totals["kills"] >= options.runs
            else 1
        )
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
