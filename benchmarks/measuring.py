"""What measuring costs: the step of ResNet-20 on two workers without it, with norms by layer every
10 steps, and with the gradient noise every 20, each started by the same command, in turn.

    python benchmarks/measuring.py [--rounds 9] [--steps 40]

16 samples in a micro-batch, two of them on each worker. Prints the medians of all rounds, in
milliseconds a step, and the median of the ratios of each round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

VARIANTS = {
    "nothing": [],
    "layers": ["log.layers_every_steps=10"],
    "noise": ["log.noise_every_steps=20"],
    "distances": ["log.distances=true"],
}


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    found = {name: [] for name in VARIANTS}
    for number in range(options.rounds):
        for name in list(VARIANTS)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(step_seconds(VARIANTS[name], options.steps))
    for name, seconds in found.items():
        ratios = [ours / base for ours, base in zip(seconds, found["nothing"], strict=True)]
        middle = statistics.median(ratios)
        print(f"{name:10}{1e3 * statistics.median(seconds):9.2f} ms{middle:8.3f}")


def step_seconds(changes, steps):
    """The engine's median step in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "step.json"
        command = ["mpirun", "-np", "2", sys.executable, "-m", "hvdlarge.bench", "step"]
        command += ["batch.base=64", "batch.micro=16", *changes, "--only", "engine"]
        command += ["--rounds", "1", "--steps", str(steps), "--json", str(file)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(file.read_text())["variants"]["engine"]["median"]


if __name__ == "__main__":
    main()
