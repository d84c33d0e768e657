"""Laws 1 to 3 on whole jobs: the final weights at 1, 2, 3 and 4 workers held against each other.

    python trials/law_trial.py                 three jobs: about eleven minutes on two cores
    python trials/law_trial.py --jobs lstm     one of them

Law 1, the world law: every tensor of the final weights and buffers within 1e-12 relative (float64)
or 1e-5 (float32) of the run on one worker. Law 2, the resume law: a run that was stopped in its
middle and started again ends with the same bits, momentum included, as one that was not. Law 3,
exact mode: the same SHA-256 of all of it at 1, 2 and 4 workers. Prints a line for each run; exit
code 0 if all hold.

In float32 a long run on real data magnifies its own rounding: where an input of a ReLU changes its
sign, a gradient jumps. So float32 is judged over the first steps, and for the whole run a control
is shown beside it: one worker against one worker whose first weight was moved by its last bit.
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
    """A job to hold against the laws."""

    file: str
    changes: list[str]
    model: str
    arguments: dict
    short: str  # its first 45 steps, in which float32 is judged

    def command(self, *more: str, model: str = "{name}") -> list[str]:
        """The job with a model: the built-in one, or one that builds it and changes it."""
        given = self.arguments if model == "{name}" else {"name": self.model, **self.arguments}
        section = json.dumps({"name": model.format(name=self.model), "args": given})
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
    place: Path, name: str, workers: int, *arguments: str, stops: bool = False
) -> tuple[Any, float]:
    """Train a job, or stop it as soon as it has some steps behind it; returns its last checkpoint
    and the seconds.
    """
    launch = [] if workers == 1 else [*MPIRUN, "-np", str(workers)]
    command, folder = [*launch, *TRAIN, *arguments, f"run_dir={place / name}"], place / name
    begin = time.monotonic()
    with (place / "log").open("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(PYTHONPATH=str(place)), stdout=log, stderr=log
        )
        while stops and process.poll() is None:
            if (folder / "metrics.jsonl").exists() and (
                folder / "metrics.jsonl"
            ).stat().st_size > 500:
                (folder / "STOP").touch()
                break
            time.sleep(0.02)
        code = process.wait(timeout=600)
    assert code == (75 if stops else 0), (
        f"{command}: exit code {code}\n{(place / 'log').read_text()}"
    )
    return torch.load(folder / "checkpoints/last.pt", weights_only=True), time.monotonic() - begin


def tensors_of(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name."""
    found = dict(checkpoint["model"])
    for name, state in checkpoint["optimizer"].items():
        found |= {
            f"{name}.{key}": value
            for key, value in state.items()
            if isinstance(value, torch.Tensor)
        }
    return found


def distance(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, str]:
    """The largest relative distance of any weight or buffer, and its name."""
    ours, theirs = ours["model"], theirs["model"]
    assert ours.keys() == theirs.keys()
    away = {}
    for name, value in theirs.items():
        assert torch.isfinite(value).all()
        size = value.double().norm().item()
        away[name] = (ours[name].double() - value.double()).norm().item() / (size or 1.0)
    worst = max(away, key=lambda name: away[name])
    return away[worst], worst


def digest(checkpoint: dict[str, Any]) -> str:
    """SHA-256 over all tensors."""
    whole = hashlib.sha256()
    for name, value in sorted(tensors_of(checkpoint).items()):
        whole.update(name.encode() + value.contiguous().numpy().tobytes())
    return whole.hexdigest()


def main() -> int:
    """Try the laws; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="*", default=list(JOBS))
    options = parser.parse_args()
    held = True

    def report(law: str, job: str, workers: int, text: str, holds: bool | None = None) -> None:
        nonlocal held
        held &= holds is not False
        verdict = {True: "holds", False: "BROKEN", None: ""}[holds]
        print(
            f"{law:12} {job:24} {workers} {'worker ' if workers == 1 else 'workers'}: {text} "
            f"{verdict}",
            flush=True,
        )

    with tempfile.TemporaryDirectory(prefix="law-trial-") as folder:
        place = Path(folder)
        (place / "nudged.py").write_text(NUDGED)
        for name, trial in ((name, JOBS[name]) for name in options.jobs):
            lengths = [("fp64", []), ("fp32", [trial.short]), ("fp32", [])]
            whole = {}
            for precision, length in lengths:
                given = trial.command(f"precision={precision}", *length)
                judged = precision == "fp64" or length
                for workers in (1, 2, 3, 4):
                    found, took = run(
                        place, f"{name}-{precision}-{len(length)}-{workers}", workers, *given
                    )
                    whole[workers] = found  # of the last, which is the whole run in float32
                    if workers == 1:
                        alone = found
                        continue
                    away, where = distance(found, alone)
                    text = (
                        f"{precision}, {found['position']['step']} steps: {away:.1e} ({where}), "
                        f"{took:.0f} s"
                    )
                    report(
                        "1 world", name, workers, text, away < BOUNDS[precision] if judged else None
                    )
            nudged, _ = run(
                place, f"{name}-nudged", 1, *trial.command("precision=fp32", model="nudged:model")
            )
            away, where = distance(nudged, alone)
            report(
                "1 control",
                name,
                1,
                f"fp32, one bit of one first weight changed: {away:.1e} ({where})",
            )
            for workers in (1, 2, 3, 4):
                end, given = whole[workers]["position"]["step"], trial.command("precision=fp32")
                first, _ = run(place, f"{name}-resume-{workers}", workers, *given, stops=True)
                again, _ = run(place, f"{name}-resume-{workers}", workers, *given)
                at = first["position"]["step"]
                same = digest(again) == digest(whole[workers])
                report(
                    "2 resume",
                    name,
                    workers,
                    f"stopped after step {at} of {end}, then",
                    same and 0 < at < end,
                )
            digests = {}
            for workers in (1, 2, 4):
                found, took = run(
                    place, f"{name}-exact-{workers}", workers, *trial.command("reduction=exact")
                )
                digests[workers] = digest(found)
                text = f"SHA-256 {digests[workers][:16]}…, {took:.0f} s"
                report("3 exact", name, workers, text, digests[workers] == digests[1])
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
