"""What measuring costs: steps of ResNet-20 on two workers, or of ResNet-50 on a GPU, with and
without measurements, in turn within one run.

    python benchmarks/measuring.py [--steps 360] [--gpu]

Two micro-batches on each worker, of 16 samples or of 128 of 3 × 224 × 224 in bf16. Every third step
measures norms by layer, every fourth the gradient noise; those that would measure both are left
out. Prints the median of each kind, and what a measurement costs if it is made every 10th or every
20th step.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ON_CPU = """\
data: {name: synthetic_images, args: {samples: 6400, size: 32}}
model: {name: resnet20}
batch: {base: 64, micro: 16}
"""
ON_GPU = """\
data: {name: synthetic_images, args: {samples: 2560, size: 224, classes: 1000}}
model: {name: resnet50, channels_last: true}
precision: bf16
batch: {base: 256, micro: 128}
"""
JOB = """\
name: measuring
lr: {base: 0.1}
optimizer: {name: lars, weight_decay: 1e-4}
log: {every_steps: 1, layers_every_steps: 3, noise_every_steps: 4}
"""
WARM_UP = 10  # steps
SPACING = {"layers": 10, "noise": 20}  # steps between measurements, as a job would have them


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--gpu", action="store_true", help="ResNet-50 on one worker's GPU")
    options = parser.parse_args()
    seconds = {"plain": [], "layers": [], "noise": []}
    for number, passed in steps(options.steps, options.gpu):
        layers, noise = number % 3 == 0, number % 4 == 0
        if number > WARM_UP and not (layers and noise):
            seconds["layers" if layers else "noise" if noise else "plain"].append(passed)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        line = f"{name:8}{len(seconds[name]):5} steps{1e3 * median:9.2f} ms"
        if name in SPACING:
            share = (median / medians["plain"] - 1) / SPACING[name]
            line += f"   every {SPACING[name]} steps: {share:+.2%}"
        print(line)


def steps(count, gpu):
    """Number and seconds of each step but the first."""
    epochs = count / (10 if gpu else 100)
    with tempfile.TemporaryDirectory() as folder:
        text = f"epochs: {epochs}\n{JOB}{ON_GPU if gpu else ON_CPU}"
        (Path(folder) / "job.yaml").write_text(text)
        launcher = [] if gpu else ["mpirun", "-np", "2"]
        command = [*launcher, sys.executable, "-m", "hvdlarge.train", "job.yaml"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        text = (Path(folder) / "runs/measuring/metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if "lr" in line]
    for before, after in itertools.pairwise(lines):
        yield after["step"] + 1, after["time"] - before["time"]


if __name__ == "__main__":
    main()
