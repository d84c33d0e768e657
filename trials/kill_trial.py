"""Kills a random rank of a run at a random time, restarts the run until it finishes, and compares
the final weights with those of an uninterrupted run.

    python trials/kill_trial.py --runs 50                     must be bit-identical
    python trials/kill_trial.py --runs 20 --change-workers    restarts on another number of workers:
                                                              must agree to 1e-12 relative

Every third run is killed while rank 0 writes a checkpoint. Prints a line for each run and a
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
    """Process ids of the ranks that an mpirun started, sorted."""
    ranks = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = next(
                line for line in status.read_text().splitlines() if line.startswith("PPid:")
            ).split()[1]
            if (
                parent == str(mpirun)
                and b"hvdlarge.train" in (status.parent / "cmdline").read_bytes()
            ):
                ranks.append(int(status.parent.name))
        except (OSError, StopIteration):
            continue
    return sorted(ranks)


def start(folder: Path, workers: int, log: Any) -> subprocess.Popen[bytes]:
    """Start the job in a folder, with its output in `log`."""
    command = [*MPIRUN, "-np", str(workers), *TRAIN, "job.yaml", "run_dir=run"]
    return subprocess.Popen(
        command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def wait_for_save(folder: Path, process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait until rank 0 writes a checkpoint; False if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    checkpoints = folder / "run" / "checkpoints"
    while time.monotonic() < deadline and process.poll() is None:
        if any(checkpoints.glob(".step_*.part")):
            return True
    return False


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's last checkpoint."""
    return torch.load(folder / "run" / "checkpoints" / "last.pt", weights_only=True)["model"]


def run_uninterrupted(folder: Path, workers: int) -> tuple[dict[str, torch.Tensor], float]:
    """The weights and the duration in seconds of a run that is not killed."""
    folder.mkdir()
    (folder / "job.yaml").write_text(JOB)
    started = time.monotonic()
    with (folder / "log").open("w") as log:
        code = start(folder, workers, log).wait(timeout=600)
    assert code == 0, (folder / "log").read_text()
    weights = weights_of(folder)
    assert all(torch.isfinite(value).all() for value in weights.values())
    return weights, time.monotonic() - started


def kill_one(
    folder: Path,
    process: subprocess.Popen[bytes],
    duration: float,
    in_save: bool,
    rng: random.Random,
) -> tuple[bool, bool]:
    """Send SIGKILL to one rank at a random time.

    Args:
        folder: of the run.
        process: the mpirun.
        duration: expected seconds of the run.
        in_save: kill rank 0 while it writes a checkpoint.
        rng: draws the time and the rank.

    Returns:
        Whether a rank was killed (False if the run had ended before), and whether it was writing a
        checkpoint.
    """
    fraction = rng.uniform(0.3, 0.7) if in_save else rng.uniform(0.1, 0.95)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=fraction * duration)
    saving = in_save and wait_for_save(folder, process, 3)
    ranks = ranks_of(process.pid)
    if not ranks:
        return False, False
    os.kill(ranks[0] if in_save else rng.choice(ranks), signal.SIGKILL)
    return True, saving


def trial(
    folder: Path,
    workers: int,
    next_workers: Any,
    duration: float,
    in_save: bool,
    rng: random.Random,
) -> Any:
    """One run, killed at least once; returns (kills, kills during a save, starts, seconds).

    If the run ends before it is killed, because the machine became faster, it starts over with the
    duration just measured.
    """
    folder.mkdir()
    (folder / "job.yaml").write_text(JOB)
    kills = kills_in_save = starts = escapes = 0
    begin = time.monotonic()
    with (folder / "log").open("w") as log:
        while True:
            starts += 1
            started = time.monotonic()
            process = start(folder, workers, log)
            if kills == 0 or (kills < 3 and rng.random() < 0.3):
                killed, saving = kill_one(folder, process, duration, in_save, rng)
                kills += killed
                kills_in_save += saving
            code = process.wait(timeout=600)
            if code == 0 and kills == 0:
                escapes += 1
                assert escapes < 10, "ten runs in a row ended before they could be killed"
                duration = time.monotonic() - started
                shutil.rmtree(folder / "run")
                continue
            if code == 0:
                return kills, kills_in_save, starts, time.monotonic() - begin
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
    rng = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-trial-"))
    try:
        expected, duration = run_uninterrupted(folder / "uninterrupted", options.workers)
        print(f"uninterrupted: {duration:.1f} s on {options.workers} workers", flush=True)
        totals = dict.fromkeys(("runs", "kills", "kills during a save", "starts", "agree"), 0)
        worst = 0.0
        for number in range(options.runs):
            next_workers = (
                (lambda workers: rng.choice([n for n in (1, 2, 3, 4) if n != workers]))
                if options.change_workers
                else (lambda workers: workers)
            )
            run_folder, in_save = folder / f"run{number}", number % 3 == 2
            kills, kills_in_save, starts, seconds = trial(
                run_folder, options.workers, next_workers, duration, in_save, rng
            )
            weights = weights_of(run_folder)
            if options.change_workers:
                difference = weight_distance(weights, expected)
                agree = difference <= 1e-12
                worst = max(worst, difference)
            else:
                agree = all(torch.equal(weights[name], value) for name, value in expected.items())
            text = (run_folder / "run/decisions.jsonl").read_text()
            decisions = [json.loads(line) for line in text.splitlines()]
            agree = agree and [line["step"] for line in decisions] == list(range(len(decisions)))
            counts = (1, kills, kills_in_save, starts, int(agree))
            for name, value in zip(totals, counts, strict=True):
                totals[name] += value
            print(
                f"run {number}: {kills} kills, {starts} starts, {seconds:.1f} s, "
                f"{'agrees' if agree else 'DIFFERS'}",
                flush=True,
            )
            shutil.rmtree(run_folder)
        print(
            ", ".join(f"{name} {value}" for name, value in totals.items())
            + (f", largest distance {worst:.1e}" if worst else "")
        )
        all_agree = totals["agree"] == totals["runs"] == options.runs
        return 0 if all_agree and totals["kills"] >= options.runs else 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
