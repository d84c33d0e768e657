"""Laws 1 to 3 on whole jobs: the final weights at 1, 2, 3 and 4 workers held against each other.

    python tests/integration/law_trial.py                 all jobs, float64, float32 and exact mode: about ten minutes
    python tests/integration/law_trial.py --epochs 3      shorter

Law 1, the world law: every tensor of the final weights and buffers within 1e-12 relative (float64) or 1e-5 (float32) of the run on
one worker. Law 2, the resume law: a run that was stopped in its middle and started again ends with the same
bits, momentum included, as one that was not. Law 3, exact mode: the same SHA-256 of all of it at 1, 2 and 4 workers. Prints a line
for each run; exit code 0 if all hold.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from launching import MPIRUN, ROOT, TRAIN, environment

JOBS = {
    "digits": ["jobs/digits.yaml"],
    "lstm": ["jobs/digits_lstm.yaml"],
    "batch norm and dropout": [
        "jobs/digits.yaml",
        "model={name: convnet, args: {width: 8, dropout: 0.3}}",
        "batch.micro=8",
        "epochs=12",
        "batch.growth.every_epochs=3",
    ],
}
BOUNDS = {"fp64": 1e-12, "fp32": 1e-5}


def run(place, name, workers, *arguments, stop_at=None):
    """Train a job; returns its last checkpoint and the seconds."""
    launch = [] if workers == 1 else [*MPIRUN, "-np", str(workers)]
    command = [*launch, *TRAIN, *arguments, f"run_dir={place / name}"]
    begin = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    wanted = 0 if stop_at is None else 75
    assert done.returncode == wanted, f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return torch.load(place / name / "checkpoints/last.pt", weights_only=True), time.monotonic() - begin


def tensors_of(checkpoint):
    """All tensors of a checkpoint by name."""
    found = dict(checkpoint["model"])
    for name, state in checkpoint["optimizer"].items():
        found |= {f"{name}.{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return found


def distance(ours, theirs):
    """The largest relative distance of any weight or buffer, and its name."""
    ours, theirs = ours["model"], theirs["model"]
    assert ours.keys() == theirs.keys()
    away = {}
    for name, value in theirs.items():
        assert torch.isfinite(value).all()
        size = value.double().norm().item()
        away[name] = (ours[name].double() - value.double()).norm().item() / (size or 1.0)
    worst = max(away, key=away.get)
    return away[worst], worst


def digest(checkpoint):
    whole = hashlib.sha256()
    for name, value in sorted(tensors_of(checkpoint).items()):
        whole.update(name.encode() + value.contiguous().numpy().tobytes())
    return whole.hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=float, help="another length for every job")
    parser.add_argument("--jobs", nargs="*", default=list(JOBS))
    options = parser.parse_args()
    held = True

    def report(law, job, workers, text, holds):
        nonlocal held
        held &= holds
        print(f"{law:12} {job:24} {workers} workers: {text} {'holds' if holds else 'BROKEN'}", flush=True)

    with tempfile.TemporaryDirectory(prefix="law-trial-") as folder:
        for job in options.jobs:
            arguments = JOBS[job] + ([] if options.epochs is None else [f"epochs={options.epochs}"])
            for precision, bound in BOUNDS.items():
                place, given = Path(folder) / f"{job}-{precision}", [*arguments, f"precision={precision}"]
                alone, _ = run(place, "1", 1, *given)
                for workers in (2, 3, 4):
                    ours, seconds = run(place, str(workers), workers, *given)
                    away, where = distance(ours, alone)
                    text = f"{precision} {away:.1e} ({where}), {ours['position']['step']} steps, {seconds:.0f} s"
                    report("1 world", job, workers, text, away < bound)
            place = Path(folder) / f"{job}-resume"
            for workers in (1, 2, 3, 4):
                whole = Path(folder) / f"{job}-fp32" / str(workers)
                end = json.loads((whole / "summary.json").read_text())["steps"]
                stopping = [*arguments, "precision=fp32", "stop_after_minutes=0.02"]
                first, _ = run(place, str(workers), workers, *stopping, stop_at=True)
                again, _ = run(place, str(workers), workers, *arguments, "precision=fp32")
                theirs = torch.load(whole / "checkpoints/last.pt", weights_only=True)
                at = first["position"]["step"]
                same = digest(again) == digest(theirs)
                report("2 resume", job, workers, f"stopped behind step {at} of {end}, then", same and 0 < at < end)
            place, given = Path(folder) / f"{job}-exact", [*arguments, "reduction=exact"]
            digests = {workers: digest(run(place, str(workers), workers, *given)[0]) for workers in (1, 2, 4)}
            for workers, found in digests.items():
                report("3 exact", job, workers, f"SHA-256 {found[:16]}…", found == digests[1])
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
