"""The public names, and a job that is trained in this process."""

import ast
import functools
import json
import re
import subprocess
import sys
import threading
import time

import pytest
import torch
import yaml
from support.launching import ROOT

import hvdlarge
from hvdlarge.checkpoint.folder import CheckpointFolder
from hvdlarge.data.in_memory import InMemory
from hvdlarge.exits import (
    CheckpointError,
    CheckpointWriteError,
    DivergedError,
    InvalidEnvironmentError,
    JobError,
)
from hvdlarge.telemetry.run_folder import FolderLock

JOB = {
    "name": "api",
    "epochs": 1,
    "precision": "fp64",
    "data": {"name": "digits"},
    "model": {"name": "mlp"},
    "batch": {"base": 128, "micro": 64},
    "lr": {"base": 1.0},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("best_parts", None)  # the next test has one of the same name


def test_a_job_from_a_dict_gives_its_summary(folder):
    summary = hvdlarge.run_job(JOB)
    assert summary["steps"] == 12
    assert summary["accuracy"] > 0.2
    assert summary == json.loads((folder / "runs/api/summary.json").read_text())


def test_a_job_is_trained_in_a_thread_too(folder):
    """Where Python allows no signal handlers."""
    found = []
    thread = threading.Thread(target=lambda: found.append(hvdlarge.run_job(JOB)))
    thread.start()
    thread.join()
    assert found[0]["steps"] == 12


def test_a_finished_job_is_left_alone_and_a_fresh_one_is_trained_again(folder):
    first = hvdlarge.run_job(JOB)
    assert hvdlarge.run_job(JOB) == first
    again = hvdlarge.run_job(JOB, fresh=True)
    assert (folder / "runs/api.1").exists()
    assert again["loss"] == first["loss"]


def test_a_job_from_a_file_with_overrides(folder):
    (folder / "my.yaml").write_text(json.dumps(JOB))
    summary = hvdlarge.run_job(folder / "my.yaml", "epochs=0.5", "run_dir=elsewhere")
    assert summary["epochs"] == pytest.approx(0.5, abs=1e-3)
    assert (folder / "elsewhere/checkpoints/last.pt").exists()


def test_deterministic_algorithms_are_those_of_the_job_alone(folder):
    """And not those of a job that this process has run before."""
    for number, wanted in enumerate([True, False]):
        hvdlarge.run_job(JOB | {"name": f"job{number}", "epochs": 0.1, "deterministic": wanted})
        assert torch.are_deterministic_algorithms_enabled() == wanted


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_ends_with_an_error_unlocks_its_folder_when_nothing_writes_to_it_any_more(
    folder, monkeypatch, capsys, fails
):
    events, write, release = [], CheckpointFolder._write, FolderLock.release
    diverged = threading.Event()

    def slow_write(self, *arguments):
        assert diverged.wait(60)
        time.sleep(0.3)
        write(self, *arguments)
        if fails:
            self._failure = CheckpointWriteError("disk full")
        events.append("written")

    def diverge(parts, state, decision, *others):
        if decision.step == 1:
            diverged.set()
            raise DivergedError("as the test wants it")

    monkeypatch.setattr(CheckpointFolder, "_write", slow_write)
    monkeypatch.setattr(
        FolderLock, "release", lambda lock: (events.append("unlocked"), release(lock))
    )
    monkeypatch.setattr("hvdlarge.training.loop.record", diverge)
    with pytest.raises(DivergedError):
        hvdlarge.run_job(JOB | {"checkpoint": {"every_steps": 1}})
    assert events == ["written", "unlocked"]
    assert ("disk full" in capsys.readouterr().err) == fails


def test_a_wrong_job_is_an_exception_and_leaves_nothing(folder):
    with pytest.raises(JobError, match="lr.bsae"):
        hvdlarge.run_job(JOB | {"lr": {"bsae": 1.0}})
    with pytest.raises(JobError, match="no such job file"):
        hvdlarge.run_job("nothing.yaml")
    with pytest.raises(JobError, match="a value is not a number, .*PosixPath"):
        hvdlarge.run_job(JOB | {"run_dir": folder / "run"})
    assert list(folder.iterdir()) == []


def test_a_folder_of_another_job_is_refused(folder):
    hvdlarge.run_job(JOB)
    with pytest.raises(CheckpointError, match="another job"):
        hvdlarge.run_job(JOB | {"seed": 1})


def test_under_a_launcher_whose_world_mpi_does_not_see_it_is_refused(folder, monkeypatch):
    for name, value in {"RANK": "0", "SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    with pytest.raises(InvalidEnvironmentError, match="Open MPI started 2 workers, but MPI sees 1"):
        hvdlarge.run_job(JOB)


def test_under_torchrun_it_is_refused_too(folder, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        InvalidEnvironmentError, match="2 independent runs of one worker would start"
    ):
        hvdlarge.run_job(JOB)
    assert list(folder.iterdir()) == []


PAIRS = """
import torch
from hvdlarge import InMemory

def numbers(tested=True):
    inputs = torch.arange(64.0).reshape(32, 2)
    pairs = InMemory(inputs, inputs.sum(dim=1, keepdim=True) / 64)
    return pairs, pairs if tested else None
"""
REGRESSION = JOB | {
    "data": {"name": "best_parts:numbers"},
    "model": {"name": "torch.nn:Linear", "args": {"in_features": 2, "out_features": 1}},
    "loss": {"name": "mse"},
    "batch": {"base": 8, "micro": 8},
    "lr": {"base": 1e-3},
}


def test_a_best_checkpoint_by_a_result_without_a_test_set_is_refused(folder):
    (folder / "best_parts.py").write_text(PAIRS)
    untested = REGRESSION | {"data": {"name": "best_parts:numbers", "args": {"tested": False}}}
    with pytest.raises(JobError, match="'test_loss' is never measured, since best_parts:numbers"):
        hvdlarge.run_job(untested | {"checkpoint": {"best": "test_loss"}})
    assert not (folder / "runs").exists()
    hvdlarge.run_job(untested)


@pytest.mark.parametrize(
    ("best", "is_noted"), [("accuracy", True), ("ema_accuracy", True), ("test_loss", False)]
)
def test_a_best_checkpoint_by_a_metric_that_does_not_apply_is_noted(folder, capsys, best, is_noted):
    (folder / "best_parts.py").write_text(PAIRS)
    hvdlarge.run_job(REGRESSION | {"checkpoint": {"best": best}, "ema": {"half_life_samples": 10}})
    note = f"note     checkpoint.best: {best} does not apply to the first samples of the test set"
    assert (note in capsys.readouterr().out) == is_noted
    assert (folder / "runs/api/checkpoints/best.pt").exists() != is_noted


def test_every_public_name_is_there():
    assert all(getattr(hvdlarge, name) is not None for name in hvdlarge.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hvdlarge.nothing


def test_the_public_names_are_those_of_the_documentation_and_of_type_checkers():
    documented = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), flags=re.MULTILINE)
    assert sorted(documented) == sorted(f"{home}.{name}" for name, home in hvdlarge._PUBLIC.items())
    block = next(
        node
        for node in ast.parse((ROOT / "hvdlarge/__init__.py").read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == hvdlarge._PUBLIC
    assert (ROOT / "hvdlarge/py.typed").exists()
    assert "hvdlarge = py.typed" in (ROOT / "setup.cfg").read_text()


def test_the_package_is_imported_without_torch():
    program = "import sys, hvdlarge; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def pairs():
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    return InMemory(inputs, inputs[:, :3].argmax(dim=1)), None


@pytest.mark.parametrize("optimizer", ["lars", "lamb"])  # torch's own import it in their steps
def test_a_run_does_not_import_torchs_compiler(folder, optimizer):
    """It takes more than a second on every worker, and hundreds of files of a shared file system."""
    job = {**JOB, "optimizer": {"name": optimizer}, "lr": {"base": 1e-3}}
    program = (
        f"import sys, hvdlarge; hvdlarge.run_job({job!r});"
        "print(*[name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=600
    )
    assert done.stdout.splitlines()[-1] == ""


def test_an_object_leaves_the_other_keys_of_its_section(folder):
    sections = {
        "data": {"name": "digits", "args": {}, "prefetch_steps": 3},
        "model": {"name": "mlp", "args": {"classes": 3}, "freeze": ["0.*"]},
    }
    (folder / "my.yaml").write_text(json.dumps(JOB | sections))
    weights = {}
    for form in (JOB | sections, folder / "my.yaml"):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
        before = model[0].weight.clone()
        hvdlarge.run_job(form, "batch={base: 8, micro: 4}", model=model, data=pairs(), fresh=True)
        assert torch.equal(model[0].weight, before)  # frozen
        weights[str(form)] = model[1].weight
        resolved = yaml.safe_load((folder / "runs/api/job.resolved.yaml").read_text())
        assert resolved["model"]["freeze"] == ["0.*"]
        assert resolved["model"]["name"] == "object:Sequential"
        assert resolved["model"]["args"] == {}
        assert resolved["data"]["prefetch_steps"] == 3
    assert torch.equal(*weights.values())


class Shared(torch.nn.Module):
    """A loss that shares a layer of the model, and trains it too."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, outputs, targets):
        return (
            torch.nn.functional.cross_entropy(outputs, targets) + self.layer.weight.square().mean()
        )


def test_a_loss_that_shares_a_part_of_the_model_shares_that_of_its_copy(folder):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    loss = Shared(model[1])
    before = model[1].weight.clone()
    hvdlarge.run_job(JOB, "batch={base: 8, micro: 4}", model=model, data=pairs(), loss=loss)
    assert model[1].weight is loss.layer.weight
    assert not torch.equal(model[1].weight, before)
    kept = torch.load(folder / "runs/api/checkpoints/last.pt", weights_only=True)
    assert torch.equal(kept["model"]["1.weight"], kept["loss"]["layer.weight"])
    assert [name for name in kept["optimizer"] if "loss" in name] == []  # updated once


class Penalty:
    """A loss that is an object, and no module."""

    def __init__(self, held):
        self.held = held

    def __call__(self, outputs, targets):
        return penalized(outputs, targets, self.held)


def with_the_global_model(model):
    """As in a notebook: the model is a global variable, and an inner function uses it."""
    names = {"torch": torch, "model": model}
    exec(NOTEBOOK, names)
    return names["loss"]


NOTEBOOK = """
def loss(outputs, targets):
    penalty = [weight.square().sum() for weight in (lambda: model.parameters())()]
    return torch.nn.functional.cross_entropy(outputs, targets) + sum(penalty)
"""


def penalized(outputs, targets, held):
    weight = held if isinstance(held, torch.Tensor) else held.weight
    return torch.nn.functional.cross_entropy(outputs, targets) + weight.mean()


@pytest.mark.parametrize(
    "make",
    [
        lambda model: lambda outputs, targets: penalized(outputs, targets, model[0]),
        lambda model: (lambda layer: lambda outputs, targets: penalized(outputs, targets, layer))(
            model[0]
        ),
        lambda model: functools.partial(penalized, held=model[0].weight),
        lambda model: functools.partial(Penalty.__call__, Penalty(model[0])),
        lambda model: Penalty(model[0]),
        lambda model: Penalty([model[0]]),
        lambda model: with_the_global_model(model),
    ],
)
def test_a_loss_that_holds_a_part_of_the_model_is_refused(folder, make):
    model = torch.nn.Sequential(torch.nn.Linear(6, 3))
    with pytest.raises(JobError, match="it holds the model or a part of it"):
        hvdlarge.run_job(
            JOB, "batch={base: 8, micro: 4}", model=model, data=pairs(), loss=make(model)
        )


def test_a_function_with_a_variable_without_a_value_is_a_loss(folder):
    def loss(outputs, targets):
        if len(outputs) < 0:
            return later
        return torch.nn.functional.cross_entropy(outputs, targets)

    model = torch.nn.Sequential(torch.nn.Linear(6, 3))
    hvdlarge.run_job(JOB, "batch={base: 8, micro: 4}", model=model, data=pairs(), loss=loss)
    if len(pairs()) < 0:
        later = None


class Expanded(torch.nn.Linear):
    """Its buffer holds one value under many indices."""

    def __init__(self):
        super().__init__(6, 3)
        self.register_buffer("scale", torch.ones(1).expand(3))


def test_a_model_with_an_expanded_buffer_holds_the_trained_weights(folder):
    model = Expanded()
    before = model.weight.clone()
    hvdlarge.run_job(JOB, "batch={base: 8, micro: 4}", model=model, data=pairs())
    kept = torch.load(folder / "runs/api/checkpoints/last.pt", weights_only=True)["model"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name].to(value.dtype))
    assert not torch.equal(model.weight, before)
