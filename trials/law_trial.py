"""Laws 1 to 3 on whole jobs: compares the final weights on 1, 2, 3 and 4 workers.

    python trials/law_trial.py                 three jobs: about eleven minutes on two cores
    python trials/law_trial.py --jobs lstm     one of them

Law 1: every tensor of the final weights and buffers is within 1e-12 relative (float64) or 1e-5
(float32) of the run on one worker. Law 2: a run that is stopped and resumed has bit-identical
weights, buffers and momentum to an uninterrupted run. Law 3, exact mode: the SHA-256 of all of them
is the same on 1, 2 and 4 workers. Prints a line for each run; exit code 0 if all laws hold.

In float32 a long run amplifies rounding errors: a gradient jumps when an input of a ReLU changes
its sign. So float32 is judged over the first steps only. For the whole run a control is printed
too: one worker compared with one worker whose first weight was perturbed by one bit.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.launching import MPIRUN, ROOT, TRAIN, environment


class Trial(NamedTuple):
    """A job to test the laws on."""

    file: str
    changes: list[str]
    model: str
    arguments: dict
    short: str  # override for its first 45 steps, over which float32 is judged

    def command(self, *more: str, model: str = "{name}") -> list[str]:
        """Arguments of train, with the job's model or a `model` that wraps it."""
        arguments = self.arguments if model == "{name}" else {"name": self.model, **self.arguments}
        section = json.dumps({"name": model.format(name=self.model), "args": arguments})
        return [self.file, *self.changes, f"model={section}", *more]


JOBS = {
    "digits": Trial("jobs/digits.yaml", [], "convnet", {}, "epochs=1"),
    "lstm": Trial("jobs/digits_lstm.yaml", [], "row_lstm", {}, "epochs=16"),
    "batch norm and dropout": Trial(
        "jobs/digits.yaml",
        ["batch.micro=8", "epochs=12", "batch.growth.every_epochs=3"],
        "convnet",
        {"width": 8, "dropout": 0.3},
        "epochs=1",
    ),
}
BOUNDS = {"fp64": 1e-12, "fp32": 1e-5}
NUDGED = """
import torch
from hvdlarge.config import registry

def model(name, **arguments):
    built = registry.instantiate("model.name", name, arguments, registry.MODELS)
    with torch.no_grad():
        first = next(built.parameters()).view(-1)
        first[0] = torch.nextafter(first[0], first.new_tensor(9.0))
    return built
"""


def run(
    folder: Path, name: str, workers: int, *arguments: str, stop: bool = False
) -> tuple[Any, float]:
    """Train a job in `folder / name`, or stop it after a few steps; returns its last checkpoint and
    its duration in seconds.
    """
    launch = [] if workers == 1 else [*MPIRUN, "-np", str(workers)]
    run_folder = folder / name
    command = [*launch, *TRAIN, *arguments, f"run_dir={run_folder}"]
    started = time.monotonic()
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(PYTHONPATH=str(folder)), stdout=log, stderr=log
        )
        metrics = run_folder / "metrics.jsonl"
        while stop and process.poll() is None:
            if metrics.exists() and metrics.stat().st_size > 500:
                (run_folder / "STOP").touch()
                break
            time.sleep(0.02)
        code = process.wait(timeout=600)
    assert code == (75 if stop else 0), (
        f"{command}: exit code {code}\n{(folder / 'log').read_text()}"
    )
    checkpoint = torch.load(run_folder / "checkpoints/last.pt", weights_only=True)
    return checkpoint, time.monotonic() - started


def tensors_of(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of the model and the optimizer, by name."""
    tensors = dict(checkpoint["model"])
    for name, state in checkpoint["optimizer"].items():
        tensors |= {
            f"{name}.{key}": value
            for key, value in state.items()
            if isinstance(value, torch.Tensor)
        }
    return tensors


def distance(checkpoint: dict[str, Any], expected: dict[str, Any]) -> tuple[float, str]:
    """The largest relative distance of any weight or buffer, and its name."""
    model, expected_model = checkpoint["model"], expected["model"]
    assert model.keys() == expected_model.keys()
    distances = {}
    for name, value in expected_model.items():
        assert torch.isfinite(value).all()
        norm = value.double().norm().item()
        distances[name] = (model[name].double() - value.double()).norm().item() / (norm or 1.0)
    worst = max(distances, key=lambda name: distances[name])
    return distances[worst], worst


def digest(checkpoint: dict[str, Any]) -> str:
    """SHA-256 over all tensors."""
    sha256 = hashlib.sha256()
    for name, value in sorted(tensors_of(checkpoint).items()):
        sha256.update(name.encode() + value.contiguous().numpy().tobytes())
    return sha256.hexdigest()


def report(law: str, job: str, workers: int, text: str, holds: bool | None = None) -> bool:
    """Print a result; returns False for a broken law, True for any other result."""
    verdict = {True: "holds", False: "BROKEN", None: ""}[holds]
    unit = "worker " if workers == 1 else "workers"
    print(f"{law:12} {job:24} {workers} {unit}: {text} {verdict}", flush=True)
    return holds is not False


def check_worlds(folder: Path, name: str, trial: Trial) -> tuple[bool, dict[int, dict[str, Any]]]:
    """Law 1; returns whether it holds, and the checkpoints of the full float32 runs by workers."""
    holds = True
    for precision, length in (("fp64", []), ("fp32", [trial.short]), ("fp32", [])):
        arguments = trial.command(f"precision={precision}", *length)
        is_judged = precision == "fp64" or bool(length)
        checkpoints: dict[int, dict[str, Any]] = {}
        for workers in (1, 2, 3, 4):
            run_name = f"{name}-{precision}-{len(length)}-{workers}"
            checkpoints[workers], seconds = run(folder, run_name, workers, *arguments)
            if workers == 1:
                continue
            largest, worst = distance(checkpoints[workers], checkpoints[1])
            text = (
                f"{precision}, {checkpoints[workers]['progress']['step']} steps: {largest:.1e} "
                f"({worst}), {seconds:.0f} s"
            )
            is_close = largest < BOUNDS[precision] if is_judged else None
            holds &= report("1 world", name, workers, text, is_close)
    command = trial.command("precision=fp32", model="nudged:model")
    nudged, _ = run(folder, f"{name}-nudged", 1, *command)
    largest, worst = distance(nudged, checkpoints[1])
    text = f"fp32, first weight perturbed by one bit: {largest:.1e} ({worst})"
    report("1 control", name, 1, text)
    return holds, checkpoints


def check_resume(
    folder: Path, name: str, trial: Trial, full_runs: dict[int, dict[str, Any]]
) -> bool:
    """Law 2, in float32."""
    holds = True
    for workers, full_run in full_runs.items():
        arguments, run_name = trial.command("precision=fp32"), f"{name}-resume-{workers}"
        stopped, _ = run(folder, run_name, workers, *arguments, stop=True)
        resumed, _ = run(folder, run_name, workers, *arguments)
        step, last = stopped["progress"]["step"], full_run["progress"]["step"]
        is_same = digest(resumed) == digest(full_run) and 0 < step < last
        text = f"stopped after step {step} of {last}, then resumed:"
        holds &= report("2 resume", name, workers, text, is_same)
    return holds


def check_exact(folder: Path, name: str, trial: Trial) -> bool:
    """Law 3."""
    holds, digests = True, {}
    for workers in (1, 2, 4):
        checkpoint, seconds = run(
            folder, f"{name}-exact-{workers}", workers, *trial.command("reduction=exact")
        )
        digests[workers] = digest(checkpoint)
        text = f"SHA-256 {digests[workers][:16]}…, {seconds:.0f} s"
        holds &= report("3 exact", name, workers, text, digests[workers] == digests[1])
    return holds


def main() -> int:
    """Test the laws; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="*", default=list(JOBS))
    options = parser.parse_args()
    all_hold = True
    with tempfile.TemporaryDirectory(prefix="law-trial-") as path:
        folder = Path(path)
        (folder / "nudged.py").write_text(NUDGED)
        for name in options.jobs:
            trial = JOBS[name]
            holds, full_runs = check_worlds(folder, name, trial)
            all_hold &= holds
            all_hold &= check_resume(folder, name, trial, full_runs)
            all_hold &= check_exact(folder, name, trial)
    return 0 if all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
