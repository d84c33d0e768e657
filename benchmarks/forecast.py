"""The forecast of `hvdlarge plan --allreduce` against measured runs: step times of three models on
1, 2 and 4 workers of this machine.

    python benchmarks/forecast.py [--rounds 3] [--keep FOLDER]

The forecast knows the run on one worker, bound to one core, and `bench allreduce` on two. Runs on
different numbers of workers take turns; each figure is the median of the rounds' medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

JOB = """\
name: {name}
epochs: 1
data: {{name: synthetic_images, args: {{samples: {samples}, size: 32}}}}
model: {model}
batch: {{base: 64, micro: 16}}
lr: {{base: 0.01}}
optimizer: {{name: lars, weight_decay: 1e-4}}
log: {{every_steps: 5}}
"""
MODELS = {
    "resnet20": ("{name: resnet20}", 64 * 40),
    "mlp 1M": ("{name: mlp, args: {inputs: 3072, hidden: [320]}}", 64 * 300),
    "mlp 10M": ("{name: mlp, args: {inputs: 3072, hidden: [2048, 2048]}}", 64 * 60),
}
SIZES = (1, 2, 4)
PHASES = ("decide", "fetch", "forward", "backward", "allreduce", "update", "measure")


def main():
    """Measure, forecast, and print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", metavar="FOLDER", help="leave the runs there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        measured = measure(folder, options.rounds)
        print(f"{'':10}{'workers':>9}{'measured ms':>13}{'forecast ms':>13}{'ratio':>8}")
        for name, by_size in measured.items():
            for size, predicted in forecast(folder, name).items():
                found = statistics.median(by_size[size])
                ratio = predicted / found
                print(
                    f"{name:10}{size:9}{1e3 * found:13.2f}{1e3 * predicted:13.2f}{ratio:8.2f}",
                    flush=True,
                )


def launch(workers, folder, *command):
    """Run a module on so many workers."""
    line = ["mpirun", "--oversubscribe", "-np", str(workers), sys.executable, "-m", *command]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(line)}: {done.returncode}\n{done.stdout}{done.stderr}")


def measure(folder, rounds):
    """Seconds of a step by model and number of workers, one for each round."""
    for name, (model, samples) in MODELS.items():
        text = JOB.format(name=name.replace(" ", "_"), model=model, samples=samples)
        (folder / f"{name}.yaml").write_text(text)
    found = {name: {size: [] for size in SIZES} for name in MODELS}
    for number in range(rounds):
        launch(2, folder, "hvdlarge.bench", "allreduce", "--json", f"net-{number}.json")
        for name, by_size in found.items():
            for size in SIZES[:: 1 if number % 2 == 0 else -1]:
                run = f"run_dir={name.replace(' ', '_')}-{size}-{number}"
                launch(size, folder, "hvdlarge.train", f"{name}.yaml", run, "--fresh")
                by_size[size].append(step_seconds(folder / run.partition("=")[2]))
    return found


def step_seconds(run):
    """The median over the lines of a run's metrics, the first left out."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    seconds = [
        sum(line[f"{phase}_seconds"] for phase in PHASES) / 5
        for line in lines
        if "forward_seconds" in line and line["step"] % 5 == 4
    ]
    return statistics.median(seconds[1:])


def forecast(folder, name):
    """Seconds of a step by number of workers, the median over the rounds."""
    found = {size: [] for size in SIZES}
    for net in sorted(folder.glob("net-*.json")):
        run = f"{name.replace(' ', '_')}-1-{net.stem.partition('-')[2]}"
        plan = [sys.executable, "-m", "hvdlarge.plan", f"{name}.yaml", "--world-size", "1,2,4"]
        plan += ["--measured", run, "--allreduce", net.name, "--workers-per-host", "4", "--json"]
        shown = subprocess.run(plan, cwd=folder, check=True, capture_output=True, text=True).stdout
        for row in json.loads(shown)["forecast"]["world_sizes"]:
            found[row["world_size"]].append(row["stages"][0]["step_seconds"])
    return {size: statistics.median(values) for size, values in found.items()}


if __name__ == "__main__":
    main()
