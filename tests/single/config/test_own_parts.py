"""Schedule policies of the user's own, named in the job by their import path, are read as the built-in ones are."""

import subprocess
import sys

import jsonschema
import pytest
import yaml

from hvdlarge.checkpoint import resume
from hvdlarge.config.job_file import parse_job, read_job
from hvdlarge.config.json_schema import job_schema
from hvdlarge.config.planning import plan_run
from hvdlarge.controller import Controller, PolicyError
from hvdlarge.exits import CheckpointError, JobError

PARTS = '''
from __future__ import annotations
import random
from dataclasses import dataclass
from typing import ClassVar, Literal
from hvdlarge.schedule.decay import Decay
from hvdlarge.schedule.growth import Growth
from hvdlarge.schedule.warmup import Warmup

@dataclass(frozen=True)
class Halving(Decay):
    """Halves the rate."""
    depends_on_length: ClassVar[bool] = False
    policy: Literal["halving"] = "halving"
    """A name that an own policy need not have."""
    every: float = 10.0
    """Epochs."""
    points: tuple[float, ...] = ()
    def __post_init__(self):
        if self.every <= 0:
            raise ValueError(f"every must be above 0, got {self.every}")
    def factor(self, epoch, warmup_end, epochs):
        return 0.5 ** (epoch / self.every)

@dataclass(frozen=True)
class Later(Warmup):
    epochs: float
    on_growth: ClassVar[str] = "jump"
    def length(self, batch_factor): return self.epochs
    def ramp_length(self, epoch, before, after): return 0.0

@dataclass(frozen=True)
class Endless(Warmup):
    on_growth: ClassVar[str] = "jump"
    def length(self, batch_factor): return 500.0
    def ramp_length(self, epoch, before, after): return 0.0

@dataclass(frozen=True)
class Adding(Growth):
    samples: int = 2
    def next_batch(self, initial, current, epoch, measured):
        return initial + int(epoch) * self.samples

class NotFrozen(Decay):
    def factor(self, epoch, warmup_end, epochs): return 1.0

@dataclass(frozen=True)
class NoFactor(Decay):
    pass

@dataclass(frozen=True)
class Above(Halving):
    def factor(self, epoch, warmup_end, epochs): return 1 + epoch

@dataclass(frozen=True)
class Rises(Halving):
    def factor(self, epoch, warmup_end, epochs): return epoch / 100

@dataclass(frozen=True)
class Draws(Halving):
    def factor(self, epoch, warmup_end, epochs): return random.random()

@dataclass(frozen=True)
class Divides(Halving):
    def factor(self, epoch, warmup_end, epochs): return 1 / 0

@dataclass(frozen=True)
class Lies(Halving):
    def factor(self, epoch, warmup_end, epochs): return 1 - epoch / epochs

@dataclass(frozen=True)
class Shrinks(Growth):
    def next_batch(self, initial, current, epoch, measured): return initial - int(epoch)

@dataclass(frozen=True)
class TooLarge(Growth):
    def next_batch(self, initial, current, epoch, measured): return 2**63

@dataclass(frozen=True)
class RaisesErrors(Halving):
    def errors(self, epochs): raise KeyError("errors")

@dataclass(frozen=True)
class YieldsTexts(Halving):
    def errors(self, epochs): yield "every is odd"

@dataclass(frozen=True)
class RaisesNotes(Halving):
    def notes(self, epochs): raise TypeError("notes")

@dataclass(frozen=True)
class RaisesAtFirst(Adding):
    def check_initial(self, initial): raise ZeroDivisionError("first")

@dataclass(frozen=True)
class RaisesBetween(Adding):
    depends_on_measurement: ClassVar[bool] = True
    def acts_between(self, before, epoch): raise IndexError("between")

@dataclass(frozen=True)
class Measures(Adding):
    depends_on_measurement: ClassVar[bool] = True
    def next_batch(self, initial, current, epoch, measured):
        return current / 2 if len(measured) == 3 else measured["accuracy"]
'''
JOB = """\
name: own
epochs: 4
data: {name: digits, samples: 100}
model: {name: mlp}
batch:
  base: 10
  micro: 5
  growth: {policy: "policies_for_test:Adding", samples: 10}
lr:
  base: 0.5
  warmup: {policy: "policies_for_test:Later", epochs: 1}
  decay:
    policy: policies_for_test:Halving
    every: 2
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A job and its policies beside each other; the current folder is another one."""
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "policies_for_test.py").write_text(PARTS)
    (beside / "job.yaml").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("policies_for_test", None)
    yield beside
    sys.modules.pop("policies_for_test", None)


def test_they_decide_what_they_say(folder):
    job = read_job(str(folder / "job.yaml"))
    stages = plan_run(job, 100, 2).stages
    assert [stage.global_batch for stage in stages] == [10, 20, 30, 40]
    assert stages[-1].last_lr == pytest.approx(0.5 * 0.5 ** (stages[-1].start / 2), rel=0.3)
    assert job.lr.decay.policy == "policies_for_test:Halving"
    assert parse_job(job.to_yaml(), str(folder / "again.yaml")) == job


def test_the_resume_signature_holds_them(folder):
    job = read_job(str(folder / "job.yaml"))
    other = read_job(str(folder / "job.yaml"), ["lr.decay.every=3"])
    built_in = read_job(str(folder / "job.yaml"), ["lr.decay={policy: cosine}"])
    assert job.resume_signature()["lr"]["decay"]["policy"] == "policies_for_test:Halving"
    for changed, words in ((other, "lr.decay.every is 2.0"), (built_in, "lr.decay.policy is")):
        with pytest.raises(CheckpointError, match=words):
            resume._check_same_run(folder, *({"job": each.resume_signature()} for each in (job, changed)))  # fmt: skip


def test_the_schema_accepts_them(folder):
    jsonschema.validate(yaml.safe_load(JOB), job_schema())
    wrong = yaml.safe_load(JOB)
    wrong["lr"]["decay"]["policy"] = "halving"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, job_schema())


def test_a_plan_needs_no_torch(folder):
    blocked = "import sys\nfor name in ('torch', 'horovod', 'mpi4py'): sys.modules[name] = None\n"
    command = "from hvdlarge.plan import main\nsys.exit(main(['beside/job.yaml', 'optimizer={name: torch.optim:NAdam}', 'hooks=[my:Hook]']))"
    ended = subprocess.run(
        [sys.executable, "-c", blocked + command], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "40" in ended.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lr.decay.evry=3", "unknown key 'lr.decay.evry'; did you mean 'every'"),
        ("lr.policy=os.path:join", r"unknown key 'lr.policy'; .*base"),
        ("model={name: 'policies_for_test:Later', chanels_last: true}", "unknown key 'model.chanels_last'; did you mean 'channels_last'"),
        ("lr.warmup={policy: 'policies_for_test:Endless'}", "lr.warmup: the warmup takes 500 epochs"),
        ("lr.decay.every=often", "lr.decay.every is \"often\": input should be a valid number"),
        ("lr.decay.every=-1", "lr.decay: every must be above 0, got -1"),
        ("lr.decay.points=3", "lr.decay.points is 3: "),
        ("lr.warmup={policy: 'policies_for_test:Later'}", "the key 'lr.warmup.epochs' is missing"),
        ("lr.decay.policy=nowhere:Decay", "lr.decay.policy: there is no module 'nowhere'.*beside too"),
        ("lr.decay.policy=policies_for_test:Halvin", "has no 'Halvin'"),
        ("lr.decay.policy='policies_for_test:'", "lr.decay.policy: .*not of the form package.module:attribute"),
        ("lr.decay.policy=policies_for_test:Later", "not a subclass of Decay of hvdlarge.schedule.decay"),
        ("lr.decay.policy=policies_for_test:random", "is not callable"),
        ("lr.decay={policy: 'policies_for_test:NotFrozen'}", "must be a frozen dataclass"),
        ("lr.decay={policy: 'policies_for_test:NoFactor'}", "lacks factor"),
        ("lr.decay.policy=policies_for_test:Above", "the factor is 1.02 at epoch 0.02"),
        ("lr.decay.policy=policies_for_test:Rises", "rises from epoch .* above what highest_factor"),
        ("lr.decay.policy=policies_for_test:Draws", "when asked again"),
        ("lr.decay.policy=policies_for_test:Divides", r"ZeroDivisionError: .*policies_for_test.py, line \d+, in factor"),
        ("lr.decay.policy=policies_for_test:Lies", "depends_on_length is False, but"),
        ("lr.decay.policy=policies_for_test:RaisesErrors", r"KeyError: 'errors' .*line \d+, in errors"),
        ("lr.decay.policy=policies_for_test:YieldsTexts", r"errors\(\) gives 'every is odd': it must yield pairs"),
        ("lr.decay.policy=policies_for_test:RaisesNotes", r"TypeError: notes .*line \d+, in notes"),
        ("batch.growth={policy: 'policies_for_test:RaisesAtFirst'}", r"batch: policies_for_test:RaisesAtFirst: ZeroDivisionError: first .*in check_initial"),
        ("batch.growth={policy: 'policies_for_test:RaisesBetween'}", r"IndexError: between .*in acts_between"),
        ("batch.growth={policy: 'policies_for_test:Shrinks'}", "batch.growth.policy: the batch is 9 at epoch 1"),
        ("batch.growth={policy: 'policies_for_test:TooLarge'}", f"the batch is {2**63} at epoch 0: it must be a whole number of samples from 10 to {2**62}"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_the_users_words(folder, change, message):
    with pytest.raises(JobError, match=f"(?s)(command line|yaml:[0-9]+): .*{message}"):
        read_job(str(folder / "job.yaml"), [change])


def test_an_error_in_the_run_names_the_policy(folder):
    change = "batch.growth={policy: 'policies_for_test:Measures'}"
    plan = plan_run(read_job(str(folder / "job.yaml"), [change]), 100, 2)
    controller = Controller(plan)
    controller.decide()
    for measured, message in (
        ({}, r"KeyError: 'accuracy' \(policies_for_test.py, line \d+, in next_batch\)\n"),
        ({"loss": 1.0, "a": 1, "b": 1}, "ValueError: Measures gives a batch of 5.0 at epoch 0.1"),
    ):
        controller._measured, controller._steps_taken = measured, 1
        with pytest.raises(PolicyError, match=f"^policies_for_test:Measures: .*{message}"):
            controller.decide()


def test_the_line_of_the_file_is_told(folder):
    (folder / "job.yaml").write_text(JOB.replace("every: 2", "evry: 2"))
    with pytest.raises(JobError, match=r"job.yaml:14: unknown key 'lr.decay.evry'"):
        read_job(str(folder / "job.yaml"))
    (folder / "job.yaml").write_text(JOB.replace("Halving", "Halvin"))
    with pytest.raises(JobError, match=r"job.yaml:13: lr.decay.policy: .* has no 'Halvin'"):
        read_job(str(folder / "job.yaml"))


def test_an_error_in_its_module_is_told_with_its_line(folder):
    (folder / "policies_for_test.py").write_text("import math\nmath.nothing\n")
    with pytest.raises(JobError, match=r"cannot be imported: AttributeError: .*policies_for_test.py, line 2"):  # fmt: skip
        read_job(str(folder / "job.yaml"))


def test_the_current_folder_comes_before_that_of_the_job(folder, tmp_path):
    own = PARTS.replace("0.5 ** (epoch / self.every)", "0.25 ** (epoch / self.every)")
    (tmp_path / "policies_for_test.py").write_text(own)
    assert read_job(str(folder / "job.yaml")).lr.decay.factor(2, 0, 4) == 0.25
