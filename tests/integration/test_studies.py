"""Studies as users start them: whole, shared, stopped, killed, with runs that diverge or fail, and refused."""

import collections
import json
import re
import signal
import subprocess
import sys
import time

import pytest
from support.launching import MPIRUN, environment

STUDY = [sys.executable, "-m", "hvdlarge.study"]
# A run of it takes a quarter of a second beside its start
SMALL = """\
name: small
job:
  epochs: 1
  data: {name: digits}
  model: {name: mlp}
  batch: {base: 64, micro: 64}
  lr: {base: 0.2}
  optimizer: {name: sgd, momentum: 0.9}
factors:
  batch.initial: [64, 256]
tune:
  search: {lr.base: {low: 0.05, high: 1, log: true}}
  trials: 2
  round: 2
seeds: 2
"""
LINE = re.compile(r"^ *(\d+)/(\d+) \| (.*)$", flags=re.MULTILINE)


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "study.yaml"

    def write(text=SMALL, **changes):
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        path.write_text(text)
        return path

    write()
    return path, write


@pytest.fixture
def start(tmp_path):
    """Start the command in the folder of the study; what it prints goes to a file."""
    started = []

    def run(*arguments, wait=True, **environ):
        output = tmp_path / f"output-{len(started)}"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*STUDY, "study.yaml", *arguments], cwd=tmp_path, env=environment(**environ), stdout=file, stderr=subprocess.STDOUT
            )  # fmt: skip
        started.append(process)
        process.output = output
        if wait:
            process.wait(300)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def text_of(process):
    return process.output.read_text()


def records(folder):
    return {
        f"{path.parent.name}/{path.stem}": json.loads(path.read_text())
        for path in sorted((folder / "runs").glob("*/*.json"))
    }


def starts(folder):
    """How often each run was started."""
    return collections.Counter(
        {
            f"{path.parent.parent.name}/{path.parent.name}": len(path.read_text().splitlines())
            for path in (folder / "runs").glob("*/*/starts.jsonl")
        }
    )


def without_times(found):
    return {name: {**each, "seconds": None} for name, each in found.items()}


def test_two_processes_share_a_study_of_which_one_is_killed(study, start, tmp_path):
    """With a cell all of whose runs diverge."""
    arms = "  arm:\n    good: {}\n    diverges: {lr.base: 1.0e+37, tune: {lr.base: {low: 1.0e+37, high: 1.0e+38}}}"
    study[1](**{"  batch.initial: [64, 256]": arms, "seeds: 2": "seeds: 1"})
    killed, other = [start(wait=False) for _ in range(2)]
    folder = tmp_path / "runs/small"
    deadline = time.monotonic() + 200
    while not LINE.findall(text_of(killed)) and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert other.wait(300) == 0, text_of(other)
    found = records(folder)
    assert len(found) == 6
    states = collections.Counter((each["cell"][0], each["state"]) for each in found.values())
    assert states == {("good", "finished"): 3, ("diverges", "diverged"): 3}
    assert "finite" in found["diverges/trial-000"]["reason"]
    # The one that was killed may have left a run, which was started again
    counts = starts(folder)
    assert set(counts.values()) <= {1, 2}
    assert sum(counts.values()) <= 7
    lines = LINE.findall(text_of(killed)) + LINE.findall(text_of(other))
    assert 5 <= len(lines) <= 6
    assert all(total == "6" for _, total, _ in lines)
    # Repetitions have a new seed and the best settings
    trials = [found["good/trial-000"], found["good/trial-001"]]
    best = max(trials, key=lambda each: each["value"])
    assert found["good/repetition-000"]["settings"] == best["settings"]
    assert found["good/repetition-000"]["seed"] == 1
    assert (folder / "report.html").exists()
    assert "compare" in text_of(other)
    assert not list(folder.glob("runs/*/*/checkpoints"))
    # The same command again starts nothing
    again = start()
    assert again.returncode == 0
    assert not LINE.findall(text_of(again))


SEEN = """\
import os
import pathlib
import torch

def model():
    seen = pathlib.Path(__file__).parent / "seen"
    seen.mkdir(exist_ok=True)
    (seen / str(os.getpid())).write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
"""


@pytest.mark.long
def test_runs_at_the_same_time_see_gpus_of_their_own(study, start, tmp_path):
    """There are no such GPUs: all train on the CPU."""
    (tmp_path / "parts.py").write_text(SEEN)
    study[1](**{"{name: mlp}": "{name: parts:model}"})
    done = start("--jobs", "2", CUDA_VISIBLE_DEVICES="5,7")
    assert done.returncode == 0, text_of(done)
    seen = [path.read_text() for path in (tmp_path / "seen").iterdir()]
    assert len(seen) == 8
    assert set(seen) == {"5", "7"}
    assert "2 runs at once: each sees 1 of 2 GPUs" in text_of(done)


@pytest.mark.long
def test_a_study_killed_goes_on_and_ends_as_one_that_was_not(study, start, tmp_path):
    whole = start("--folder", "whole", "--jobs", "2", wait=False)
    killed = start("--folder", "killed", wait=False)
    deadline = time.monotonic() + 120
    while len(records(tmp_path / "killed")) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    before = records(tmp_path / "killed")
    goes_on = start("--folder", "killed", "--jobs", "2")
    assert whole.wait(300) == goes_on.returncode == 0, text_of(goes_on)
    after = records(tmp_path / "killed")
    assert {name: after[name] for name in before} == before
    assert without_times(after) == without_times(records(tmp_path / "whole"))
    counts = starts(tmp_path / "killed")
    assert all(counts[name] == 1 for name in before)
    assert sum(counts.values()) <= len(after) + 1


@pytest.mark.long
def test_runs_that_diverge_or_fail_are_results(study, start, tmp_path):
    """A rate at which the loss is not finite; and a model that fails on purpose."""
    (tmp_path / "parts.py").write_text(
        "import os, torch\n"
        "def net(break_it):\n"
        "    if break_it == 'now':\n"
        "        os._exit(70)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    text = """\
name: small
job:
  epochs: 1
  data: {name: digits}
  model: {name: "parts:net", args: {break_it: never}}
  batch: {base: 64, micro: 64}
  lr: {base: 0.2}
  optimizer: {name: sgd}
factors:
  arm:
    good: {}
    diverges: {lr.base: 1.0e+37}
    fails: {model.args: {break_it: now}}
seeds: 1
"""
    study[1](text)
    ended = start()
    assert ended.returncode == 0, text_of(ended)
    found = {each["cell"][0]: each for each in records(tmp_path / "runs/small").values()}
    assert found["good"]["state"] == "finished"
    assert found["diverges"]["state"] == "diverged"
    assert "finite" in found["diverges"]["reason"]
    assert found["fails"]["state"] == "failed"
    assert (tmp_path / "runs/small/runs/fails/repetition-000.txt").exists()
    assert "diverged" in text_of(ended)
    again = start("--retry-failed")
    assert again.returncode == 0
    assert "1 run is trained again" in text_of(again)
    assert len(LINE.findall(text_of(again))) == 1


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGUSR1])
def test_a_stop_is_orderly_and_the_study_goes_on(study, start, tmp_path, how):
    study[1](**{"epochs: 1": "epochs: 60"})
    process = start("--jobs", "2", wait=False)
    folder = tmp_path / "runs/small"
    deadline = time.monotonic() + 120
    while len(list(folder.glob("runs/*/*/metrics.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(how)
    assert process.wait(60) == 75, text_of(process)
    assert f"{how.name}: stopping 2 runs with a checkpoint" in text_of(process)
    assert "the same command goes on" in text_of(process)
    assert records(folder) == {}
    assert len(list(folder.glob("runs/*/*/checkpoints/last.pt"))) == 2
    goes_on = start("--jobs", "2")
    assert goes_on.returncode == 0, text_of(goes_on)
    assert max(starts(folder).values()) == 2
    assert len(records(folder)) == 8


# A model that trains in the first run, and in the next one waits for minutes in its first training step: until then no
# request to stop is seen
BLOCKS = """\
import pathlib
import time
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.all = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        self.folder = pathlib.Path(__file__).parent
        self.first = not list(self.folder.glob("runs/small/runs/*/*.json"))

    def forward(self, x):
        started = list(self.folder.glob("runs/small/runs/*/trial-000/starts.jsonl"))
        if not self.first and self.training and len(started) > 1:
            (self.folder / "blocked").touch()
            time.sleep(300)
        return self.all(x)
"""


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_interrupt_ends_at_once(study, start, tmp_path, workers):
    """A run that does not come to a stop. The launcher of several workers, which then ends them, has mpirun's exit code."""
    (tmp_path / "parts.py").write_text(BLOCKS)
    study[1](**{"{name: mlp}": '{name: "parts:Net"}', "micro: 64": "micro: 32", "seeds: 2": f"seeds: 2\nworkers: {workers}"})  # fmt: skip
    mpirun = ["--mpirun", " ".join(MPIRUN)] if workers > 1 else []
    process = start(*mpirun, wait=False)
    deadline = time.monotonic() + 120
    while not (tmp_path / "blocked").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    time.sleep(2)
    assert process.poll() is None, text_of(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 75, text_of(process)
    assert "SIGINT: stopping 1 run with a checkpoint; again: at once" in text_of(process)
    assert list(records(tmp_path / "runs/small")) == ["64/trial-000"]
    assert (tmp_path / "runs/small/runs/256/trial-000/starts.jsonl").exists()


@pytest.mark.long
def test_budgets_end_a_session_and_say_so(study, start, tmp_path):
    study[1](**{"seeds: 2": "seeds: 2\nbudget: {trials: 3}"})
    both = [start("--jobs", "2", wait=False) for _ in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    assert len(records(tmp_path / "runs/small")) == 3
    assert any("budget.trials: 3 runs have been started" in text_of(each) for each in both)
    study[1](**{"seeds: 2": "seeds: 2\nbudget: {minutes: 0.02}"})
    ended = start()
    assert ended.returncode == 0
    assert "budget.minutes: 0.02 are over" in text_of(ended)
    assert 3 <= len(records(tmp_path / "runs/small")) < 8
    study[1]()  # a budget may change
    assert start("--jobs", "2").returncode == 0
    assert len(records(tmp_path / "runs/small")) == 8


@pytest.mark.long
def test_results_do_not_depend_on_how_many_run_at_once(study, start, tmp_path):
    study[1](**{"trials: 2": "trials: 5"})
    for jobs in ("1", "3"):
        assert start("--jobs", jobs, "--folder", f"jobs{jobs}").returncode == 0
    one, three = (without_times(records(tmp_path / f"jobs{jobs}")) for jobs in ("1", "3"))
    assert one == three
    assert len(one) == 14


@pytest.mark.long
def test_runs_on_two_workers_are_those_of_one_by_the_world_law(study, start, tmp_path):
    changes = {"epochs: 1": "epochs: 1\n  precision: fp64", "base: 64, micro: 64": "base: 64, micro: 32"}  # fmt: skip
    study[1](**changes)
    assert start("--folder", "one").returncode == 0
    study[1](**{**changes, "seeds: 2": "seeds: 2\nworkers: 2"})
    ended = start("--folder", "two", "--mpirun", " ".join(MPIRUN))
    assert ended.returncode == 0, text_of(ended)
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, each in one.items():
        assert each["settings"] == two[name]["settings"]
        assert each["value"] == pytest.approx(two[name]["value"], rel=1e-9)
    environments = list((tmp_path / "two").glob("runs/*/*/environment.json"))
    assert all(json.loads(path.read_text())["world_size"] == 2 for path in environments)
    workers = json.loads(environments[0].read_text())["workers"]
    assert [worker["threads"] for worker in workers] == [1, 1]


@pytest.mark.long
def test_a_pruner_ends_hopeless_trials(study, start, tmp_path):
    changes = {
        "epochs: 1": "epochs: 40\n  evaluate: {every_epochs: 1}", "trials: 2": "trials: 8\n  pruner: median\n  sampler: random",
        "low: 0.05": "low: 0.00001", "[64, 256]": "[64]", "round: 2": "round: 1",
    }  # fmt: skip
    study[1](**changes)
    ended = start()
    assert ended.returncode == 0, text_of(ended)
    states = collections.Counter(
        each["state"] for each in records(tmp_path / "runs/small").values()
    )
    assert states["pruned"] >= 1
    assert states["finished"] >= 5


@pytest.mark.long
def test_a_study_whose_first_run_fails_ends_with_its_reason(study, start, tmp_path):
    (tmp_path / "parts.py").write_text("def net():\n    raise RuntimeError('no such weights')\n")
    study[1](**{"model: {name: mlp}": "model: {name: 'parts:net'}"})
    ended = start()
    assert ended.returncode == 2
    assert "no such weights" in text_of(ended)
    assert records(tmp_path / "runs/small") == {}


@pytest.mark.long
def test_a_full_disk_ends_a_study_that_goes_on_later(study, start, tmp_path):
    """A limit on the size of files stands for the full disk."""
    limited = subprocess.run(
        ["bash", "-c", f"ulimit -f 4; exec {' '.join(STUDY)} study.yaml"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip
    assert limited.returncode == 74, limited.stdout + limited.stderr
    assert "could not be written" in limited.stderr
    assert "Traceback" not in limited.stderr
    assert start("--jobs", "2").returncode == 0
    assert len(records(tmp_path / "runs/small")) == 8


@pytest.mark.long
def test_the_best_rate_of_a_quadratic_is_found_within_10_percent(start, study, tmp_path):
    """Gradient descent on ½ h w² with h = 2 from w = 1: after n steps w = (1 − 2 lr)^n, best at lr = 0.5. Real runs; the
    logarithm of the distance is the metric, as a float64 of 20 steps can be zero.
    """
    (tmp_path / "parts.py").write_text(
        "import torch\n"
        "from hvdlarge.data.in_memory import InMemory\n"
        "def data():\n"
        "    samples = InMemory(torch.ones(64, 1, dtype=torch.float64), torch.zeros(64))\n"
        "    return samples, samples\n"
        "class Point(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.w = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))\n"
        "    def forward(self, x):\n"
        "        return x * self.w\n"
        "def loss(outputs, targets):\n"
        "    return (outputs ** 2).mean()\n"
    )
    study[1](
        """\
name: quadratic
job:
  epochs: 2
  precision: fp64
  data: {name: "parts:data"}
  model: {name: "parts:Point"}
  loss: {name: "parts:loss"}
  batch: {base: 32, micro: 32}
  lr: {base: 0.05}
  optimizer: {name: sgd, momentum: 0}
tune:
  search: {lr.base: {low: 0.01, high: 0.9, log: true}}
  sampler: gp
  trials: 20
seeds: 0
metric: test_loss
"""
    )
    ended = start("--jobs", "2")
    assert ended.returncode == 0, text_of(ended)
    trials = records(tmp_path / "runs/quadratic").values()
    best = min(trials, key=lambda each: each["value"])["settings"]["lr.base"]
    assert abs(best / 0.5 - 1) < 0.1
