"""The engine's step against other ways to train ResNet-20 on two workers, each started by the same
command, in turn.

    python benchmarks/against_peers.py [--rounds 5] [--steps 15]

64 samples of 32×32 pixels on each worker. Prints the medians of all rounds, in milliseconds a step,
and the ratios.
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PYTHON = sys.executable
LAUNCHERS = {"mpirun": ["mpirun", "-np", "2"], "horovodrun": ["horovodrun", "-np", "2"]}


def run(command):
    """Run a command; returns what it prints."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def engine(launcher, steps):
    """Seconds of the engine's step."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "step.json"
        asked = [
            "step",
            "--only",
            "engine",
            "--rounds",
            "1",
            "--steps",
            str(steps),
            "--json",
            str(found),
        ]
        run([*launcher, PYTHON, "-m", "hvdlarge.bench", *asked])
        return json.loads(found.read_text())["variants"]["engine"]["median"]


def printed(launcher, script, steps, *more):
    """The seconds that a script prints."""
    text = run([*launcher, PYTHON, str(HERE / script), "--steps", str(steps), *more])
    return float(
        re.search(r"seconds a step: ([0-9.e-]+)", text)[1]
    )  # horovodrun prints the rank's mark after it


def free_port():
    """A port of this host that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def main():
    """Measure every variant in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    plain = LAUNCHERS["mpirun"]
    variants = {
        f"{what}, {name}": variant
        for name, launcher in LAUNCHERS.items()
        for what, variant in (
            ("engine", lambda launcher=launcher: engine(launcher, options.steps)),
            (
                "stock Horovod loop",
                lambda launcher=launcher: printed(launcher, "stock_horovod.py", options.steps),
            ),
        )
    }
    variants["DDP (gloo), mpirun"] = lambda: printed(
        plain, "ddp_textbook.py", options.steps, "--port", free_port()
    )
    seconds = {name: [] for name in variants}
    for number in range(options.rounds):
        for name in list(variants)[:: 1 if number % 2 == 0 else -1]:
            seconds[name].append(variants[name]())
            print(f"round {number}: {name}: {1e3 * seconds[name][-1]:.1f} ms", flush=True)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(
            f"{name}: {1e3 * median[name]:.1f} ms ({1e3 * min(values):.1f} to "
            f"{1e3 * max(values):.1f})"
        )
    for name in LAUNCHERS:
        print(
            f"stock / engine under {name}: "
            f"{median[f'stock Horovod loop, {name}'] / median[f'engine, {name}']:.2f}"
        )
    print(f"DDP / engine: {median['DDP (gloo), mpirun'] / median['engine, mpirun']:.2f}")


if __name__ == "__main__":
    main()
