"""The engine's step in two checkouts of this repository, a round of one after a round of the other,
so that both see the same drifts of the machine.

    git worktree add --detach ../before v0.1.0
    python benchmarks/two_versions.py ../before . [--workers 2] [--rounds 30] [-- JOB key.sub=value]

Both are started at once, and each waits while the other one trains. Prints the median of each in
milliseconds a step, and the median over all rounds of the second's time over the first's. Machines
that are shared drift by 10 % within minutes: two runs one after the other do not tell.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def take_part(turn_file, number, arguments):
    """Run `bench step` of the checkout on the path, whose rounds wait for every second turn."""
    from hvdlarge.bench import step
    from hvdlarge.bench.__main__ import main

    plain = step.run_interleaved
    turn = number

    def run_interleaved(variants, rounds):
        def in_turn(variant):
            def one_round():
                nonlocal turn
                while int(turn_file.read_text()) < turn:
                    time.sleep(0.005)
                time.sleep(0.2)  # the other's last rank may still be at its last step
                seconds = variant()
                turn += 2
                if os.environ["OMPI_COMM_WORLD_RANK"] == "0":
                    with turn_file.with_suffix(f".seconds{number}").open("a") as measured:
                        measured.write(f"{seconds}\n")
                    written = turn_file.with_suffix(f".new{number}")
                    written.write_text(str(turn - 1))
                    written.replace(turn_file)
                return seconds

            return one_round

        return plain({name: in_turn(variant) for name, variant in variants.items()}, rounds)

    step.run_interleaved = run_interleaved
    return main(["step", "--only", "engine", *arguments])


def begin(checkout, number, turn_file, options):
    """Start one side under mpirun."""
    rounds = ["--rounds", str(options.rounds), "--steps", str(options.steps), *options.job]
    return subprocess.Popen(
        ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(options.workers)]
        + [sys.executable, str(Path(__file__).resolve()), "--side", str(number), str(turn_file)]
        + rounds,
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def measure(options, folder):
    """The seconds per step of each side, one for each round.

    Raises:
        SystemExit: with what a side printed, if it fails.
    """
    turn_file = folder / "turn"
    turn_file.write_text("0")
    sides = [
        begin(checkout.resolve(), number, turn_file, options)
        for number, checkout in enumerate(options.checkouts)
    ]
    while any(side.poll() is None for side in sides):
        if any(side.poll() for side in sides):  # the other would wait for ever
            for side in sides:
                side.terminate()
        time.sleep(0.2)
    for side, checkout in zip(sides, options.checkouts, strict=True):
        if side.returncode > 0:
            sys.exit(f"{checkout}:\n{side.stdout.read()}")
    files = [turn_file.with_suffix(f".seconds{number}") for number in (0, 1)]
    # The first round of each is a warm-up
    return [[float(line) for line in file.read_text().splitlines()[1:]] for file in files]


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs=2, type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=4, help="steps per round, after five others")
    parser.epilog = "What follows -- is a job and its overrides, as for `bench step`."
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:cut])
    options.job = given[cut + 1 :]
    return options


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        sys.path.pop(0)  # this folder, which is not the checkout's
        sys.exit(take_part(Path(sys.argv[3]), int(sys.argv[2]), sys.argv[4:]))
    with tempfile.TemporaryDirectory() as scratch:
        first, second = measure(parse(), Path(scratch))
    for checkout, seconds in zip(sys.argv[1:3], (first, second), strict=True):
        print(
            f"{checkout}: {1e3 * statistics.median(seconds):.2f} ms "
            f"({1e3 * min(seconds):.2f} to {1e3 * max(seconds):.2f})"
        )
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    print(f"second / first: {statistics.median(ratios):.3f}")
