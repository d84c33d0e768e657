"""What a checkpoint brings back lies where it belongs."""

from dataclasses import replace

import pytest
import torch

from hvdlarge.checkpoint import resume
from hvdlarge.checkpoint.content import CheckpointContent, RunFacts
from hvdlarge.checkpoint.saver import optimizer_state
from hvdlarge.comm.solo import SoloChannel, SoloCollectives
from hvdlarge.config.job_file import parse_job
from hvdlarge.exits import CheckpointError
from hvdlarge.models.state import trained_modules
from hvdlarge.optim.precision import Precision
from hvdlarge.replica.train_state import TrainState
from hvdlarge.schedule.plan import RunProgress
from hvdlarge.training import build

JOB = """
name: resumed
epochs: 1
data: {name: digits}
model: {name: 'test_resumed_state:Scaled'}
batch: {base: 8, micro: 4}
lr: {base: 1}
"""


class Scaled(torch.nn.Linear):
    """A parameter without dimensions, as CLIP's logit_scale."""

    def __init__(self):
        super().__init__(3, 2)
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, inputs):
        return super().forward(inputs) * self.logit_scale


class Learnt(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.tensor(1.0))
        self.history = {"calls": 0}

    def get_extra_state(self):
        return self.history

    def set_extra_state(self, state):
        self.history = state


def replica_of(monkeypatch, *changes):
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    job = parse_job(JOB, "job", changes)
    precision = Precision("fp32", torch.device("cpu"))
    objective, optimizer, _ = build.build_learning(job, precision)
    components = build.Components(objective, None, None, {}, None, optimizer)
    return build.build_replica(job, components, SoloChannel(), SoloCollectives())


def content(model=None, loss=None, optimizer=None):
    facts = RunFacts({}, {}, {}, 1)
    return CheckpointContent(
        facts, model or {}, loss or {}, optimizer or {}, RunProgress(), False, TrainState(), (), {}
    )


@pytest.mark.parametrize(
    "optimizer", ["lars", "lamb", "sgd", "adam", "adamw", "adagrad", "rmsprop"]
)
def test_optimizer_state_lies_beside_its_weight_and_counts_on_the_cpu(monkeypatch, optimizer):
    """The device "meta" stands for a GPU."""
    replica = replica_of(monkeypatch, f"optimizer={{name: {optimizer}}}")
    replica.objective.model(torch.ones(4, 3)).sum().backward()
    replica.update.optimizer.step()
    entries = resume._without_tensors(content(optimizer=optimizer_state(replica)))
    there = {
        torch.nn.Parameter(weight.detach().to("meta")): name
        for weight, name in replica.names.items()
    }
    replica = replace(replica, names=there)
    resume._share_optimizer(entries["optimizer"], None, replica, SoloCollectives())
    restored = replica.update.optimizer.state
    assert {there[weight] for weight in restored} == {"weight", "bias", "logit_scale"}
    for weight, values in restored.items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                assert value.device.type == ("cpu" if key == "step" else "meta")
                assert key == "step" or value.shape == weight.shape


def test_optimizer_state_of_another_shape_lies_beside_its_weight_too(monkeypatch):
    """Such as the factored second moments of Adafactor."""
    replica = replica_of(monkeypatch, "optimizer={name: sgd}")
    weight = torch.nn.Parameter(replica.objective.model.weight.detach().to("meta"))
    replica = replace(replica, names={weight: "weight"})
    saved = {"weight": {"rows": torch.ones(2), "step": torch.tensor(3.0)}}
    entries = resume._without_tensors(content(optimizer=saved))["optimizer"]
    resume._share_optimizer(entries, None, replica, SoloCollectives())
    state = replica.update.optimizer.state[weight]
    assert {key: value.device.type for key, value in state.items()} == {
        "rows": "meta",
        "step": "cpu",
    }


def test_a_loss_and_extra_state_come_back(monkeypatch, tmp_path):
    model, loss = Scaled(), Learnt()
    modules = trained_modules(model, loss)
    moved = {name: value + 1 for name, value in model.state_dict().items()}
    learnt = {"temperature": torch.tensor(3.0), "_extra_state": {"calls": 5}}
    resume.load_modules(modules, content(moved, learnt), tmp_path)
    assert (loss.temperature.item(), loss.history, model.logit_scale.item()) == (
        3.0,
        {"calls": 5},
        2.0,
    )
    with pytest.raises(
        CheckpointError,
        match=r"'temperature' is float32\[\] in the loss, missing in the checkpoint",
    ):
        resume.load_modules(modules, content(moved, {"_extra_state": {}}), tmp_path)
    assert loss.temperature.item() == 3.0
