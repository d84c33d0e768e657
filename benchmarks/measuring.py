"""What measuring costs: steps of ResNet-20 on two workers with and without measurements, in turn
within one run.

    python benchmarks/measuring.py [--steps 360]

16 samples in a micro-batch, two of them on each worker. Every third step measures norms by layer,
every fourth the gradient noise; those that would measure both are left out. Prints the median of
each kind, and what a measurement costs if it is made every 10th or every 20th step.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

JOB = """\
name: measuring
epochs: 1
data: {{name: synthetic_images, args: {{samples: {samples}, size: 32}}}}
model: {{name: resnet20}}
batch: {{base: 64, micro: 16}}
lr: {{base: 0.1}}
optimizer: {{name: lars, weight_decay: 1e-4}}
log: {{every_steps: 1, layers_every_steps: 3, noise_every_steps: 4}}
"""
WARM_UP = 10  # steps
SPACING = {"layers": 10, "noise": 20}  # steps between measurements, as a job would have them


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=360)
    options = parser.parse_args()
    seconds = {"plain": [], "layers": [], "noise": []}
    for number, passed in steps(options.steps):
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


def steps(count):
    """Number and seconds of each step but the first."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "job.yaml").write_text(JOB.format(samples=64 * count))
        command = ["mpirun", "-np", "2", sys.executable, "-m", "hvdlarge.train", "job.yaml"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        text = (Path(folder) / "runs/measuring/metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if "lr" in line]
    for before, after in itertools.pairwise(lines):
        yield after["step"] + 1, after["time"] - before["time"]


if __name__ == "__main__":
    main()
