"""Wrong jobs end in one message and exit code 2 on all ranks; a wrong environment in 3; ranks that differ in 71."""

import os
import sys
import time

import pytest
from support.launching import MPIRUN, TRAIN

JOBS = {
    "missing": (None, "no such job file"),
    "empty": ("", "the job file is empty"),
    "not YAML": ("name: [digits\n", "not valid YAML"),
    "unknown key": ("name: a\nepochz: 3\n", "unknown key 'epochz'; did you mean 'epochs'?"),
    "binary": ("\x00\x01", "not valid YAML"),
}


@pytest.mark.parametrize("workers", [None, 2, 3])
@pytest.mark.parametrize("kind", JOBS)
def test_a_wrong_job_file_ends_with_one_message(train, folder, kind, workers):
    text, message = JOBS[kind]
    if text is not None:
        (folder / "bad.yaml").write_text(text)
    ended = train(workers, "bad.yaml")
    assert ended.code == 2
    assert len(ended.errors) == 1
    assert message in ended.err
    assert "Traceback" not in ended.out + ended.err
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.name=convnt", "did you mean 'convnet'"),
        ("epochs=0.0001", "the warmup takes 0.5 epochs"),
        ("lr.bas=3", "unknown key 'lr.bas'"),
        ("lr.base", "not of the form key.sub=value"),
    ],
)
def test_a_job_that_cannot_run_ends_with_one_message(train, folder, change, message):
    ended = train(2, "jobs/digits.yaml", change)
    assert ended.code == 2
    assert len(ended.errors) == 1
    assert message in ended.err
    assert not (folder / "runs").exists()


def test_a_command_line_without_a_job_ends_with_one_message(train):
    ended = train(2)
    assert ended.code == 2
    assert ended.err.count("the following arguments are required") == 1


def test_a_job_file_that_only_one_host_lacks_is_refused(start, folder):
    """Rank 1 runs in another folder, as on a host where the file was not copied."""
    (folder / "elsewhere").mkdir()
    ended = start(
        [
            *MPIRUN,
            "-np",
            "1",
            *TRAIN,
            "jobs/digits.yaml",
            ":",
            "-np",
            "1",
            "-wdir",
            str(folder / "elsewhere"),
            *TRAIN,
            "jobs/digits.yaml",
        ]
    )
    assert ended.code == 2
    assert len(ended.errors) == 1
    assert "on rank 1: jobs/digits.yaml: no such job file" in ended.err


def test_a_worker_with_another_job_is_refused(start, folder):
    (folder / "other.yaml").write_text(
        (folder / "jobs/digits.yaml").read_text().replace("max: 512", "max: 256")
    )
    ended = start(
        [*MPIRUN, "-np", "1", *TRAIN, "jobs/digits.yaml", ":", "-np", "2", *TRAIN, "other.yaml"]
    )
    assert ended.code == 71
    assert len(ended.errors) == 1
    assert "batch.growth.max is 512 on rank 0 and 256 on rank 1" in ended.err
    assert not (folder / "runs").exists()


def test_a_folder_of_something_else_is_not_touched(train, folder):
    (folder / "runs/digits").mkdir(parents=True)
    (folder / "runs/digits/thesis.tex").write_text("years of work")
    ended = train(2, "jobs/digits.yaml")
    assert ended.code == 2
    assert "holds no run" in ended.err
    assert (folder / "runs/digits/thesis.tex").read_text() == "years of work"


def test_a_run_that_diverges_ends_with_one_message(train):
    ended = train(
        2, "jobs/digits.yaml", "model={name: mlp}", "optimizer={name: sgd}", "lr.base=1e30"
    )
    assert ended.code == 73
    assert len(ended.errors) == 1
    assert "lower lr.base" in ended.err


IGNORED_PARTS = """
import torch
from hvdlarge.data.digits import digits
from hvdlarge.data.in_memory import InMemory
from hvdlarge.data.order import Stream

def data():  # a set whose targets are left out of the mean, as those of padding, after the first
    train, test = digits()
    targets, first = torch.full_like(train.targets, -100), Stream(0, len(train)).samples(0, 16)
    targets[first] = train.targets[first]
    return InMemory(train.inputs, targets), test
"""


@pytest.mark.parametrize("workers", [None, 2])
def test_a_loss_that_is_not_finite_while_the_gradients_are_ends_the_run(train, folder, workers):
    (folder / "ignored_parts.py").write_text(IGNORED_PARTS)
    job = ["jobs/digits.yaml", "data.name=ignored_parts:data", "model={name: mlp}", "epochs=1"]
    job.append("loss={name: 'torch.nn:CrossEntropyLoss'}")
    ended = train(workers, *job, "on_nonfinite={policy: stop}", "log.every_steps=1000")
    assert ended.code == 73, ended.out + ended.err
    assert len(ended.errors) == 1
    assert "the loss is nan at step 44 " in ended.err  # the last one
    assert "most often all targets of a micro-batch are ignored" in ended.err


@pytest.mark.parametrize("package", ["horovod", "mpi4py"])
def test_a_launch_without_a_part_is_never_many_solo_runs(train, folder, package):
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text("raise ImportError('made to fail')")
    ended = train(2, "jobs/digits.yaml", PYTHONPATH=str(folder))
    assert ended.code == 3
    assert len(ended.errors) == 1
    assert "install-horovod.sh" in ended.err
    assert not (folder / "runs").exists()
    assert (
        train(None, "jobs/digits.yaml", "epochs=1", PYTHONPATH=str(folder)).code == 0
    )  # alone, neither is needed


def test_a_launcher_that_mpi_does_not_know_of_is_refused(train, folder):
    """What `horovodrun --gloo` and a launcher of another MPI look like: two processes that each see a world of one."""
    ended = train(
        None,
        "jobs/digits.yaml",
        HOROVOD_RANK="0",
        HOROVOD_SIZE="2",
        HOROVOD_LOCAL_RANK="0",
        HOROVOD_LOCAL_SIZE="2",
    )
    assert ended.code == 3
    assert "started 2 workers, but MPI sees 1" in ended.err


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_several_processes_without_mpi_are_never_many_solo_runs(train, folder, more):
    started = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ended = train(None, "jobs/digits.yaml", *more, RANK="0", LOCAL_RANK="0", **started)
    assert ended.code == 3
    assert len(ended.errors) == 1
    assert "`hvdlarge launch -np 2 job.yaml`" in ended.err
    other = train(None, "jobs/digits.yaml", *more, RANK="1", LOCAL_RANK="1", **started)
    assert (other.code, other.text) == (3, "")
    assert not (folder / "runs").exists()


def test_torchrun_is_refused_with_what_to_use_instead(start, folder):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    ended = start([*torchrun, "-m", "hvdlarge.train", "jobs/digits.yaml"])
    assert ended.code == 1  # torchrun's own
    assert len(ended.errors) == 1
    assert "RANK=0 and WORLD_SIZE=2 are set as by torchrun" in ended.err
    assert "exitcode  : 3" in ended.err
    assert not (folder / "runs").exists()


def test_elastic_horovod_is_refused(train, folder):
    ended = train(2, "jobs/digits.yaml", HOROVOD_ELASTIC="1")
    assert ended.code == 3
    assert len(ended.errors) == 1
    assert "elastic Horovod is not supported" in ended.err


def test_hosts_with_other_versions_are_refused(start, folder):
    """Rank 1 finds another numpy's metadata first, as on a host with another installation."""
    (folder / "site/numpy-0.9.dist-info").mkdir(parents=True)
    (folder / "site/numpy-0.9.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: numpy\nVersion: 0.9\n"
    )
    other = ["env", f"PYTHONPATH={folder / 'site'}", *TRAIN, "jobs/digits.yaml"]
    ended = start([*MPIRUN, "-np", "1", *TRAIN, "jobs/digits.yaml", ":", "-np", "1", *other])
    assert ended.code == 71
    assert len(ended.errors) == 1
    assert 'and "0.9" on rank 1' in ended.err


def test_hosts_with_other_settings_are_refused(start, folder):
    other = ["env", "HOROVOD_CYCLE_TIME=3", *TRAIN, "jobs/digits.yaml"]
    ended = start([*MPIRUN, "-np", "1", *TRAIN, "jobs/digits.yaml", ":", "-np", "1", *other])
    assert ended.code == 71
    assert len(ended.errors) == 1
    assert 'HOROVOD_CYCLE_TIME is null on rank 0 and "3" on rank 1' in ended.err


FAILING = """
import torch
from mpi4py import MPI

class Failing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.passes = 0

    def forward(self, images):
        self.passes += 1
        if self.passes == 20 and MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1:
            raise RuntimeError("made to fail")
        return self.layer(images.flatten(1))
"""


@pytest.mark.parametrize("workers", [None, 2, 3])
def test_one_rank_that_fails_ends_the_run_with_one_traceback(train, folder, workers):
    (folder / "failing.py").write_text(FAILING)
    ended = train(workers, "jobs/digits.yaml", "model={name: 'failing:Failing'}")
    assert ended.code == 70
    assert len(ended.errors) == 1
    rank = f"rank {(workers or 1) - 1} of {workers or 1}"
    assert f"hvdlarge: error: in your own code, on {rank}" in ended.errors[0]
    assert "RuntimeError: made to fail (" in ended.errors[0]
    assert "failing.py, line 14, in forward)" in ended.errors[0]
    assert ended.err.count("Traceback") == 1
    assert "hvdlarge/training/loop.py" not in ended.err


EVERYWHERE = """
import torch

class Everywhere(torch.nn.Linear):
    def __init__(self, features=64, breaks_when_trained=False):
        super().__init__(features, 10)  # the digits have 64 pixels
        self.breaks_when_trained = breaks_when_trained

    def forward(self, images):
        breaks = self.breaks_when_trained and self.bias.any()  # which begins with zeros
        return super().forward(images.flatten(1)[:, : 7 if breaks else 64])

    def reset_parameters(self):
        super().reset_parameters()
        torch.nn.init.zeros_(self.bias)
"""


@pytest.mark.parametrize("workers", [None, 3])
def test_a_model_that_does_not_fit_its_data_is_refused_before_the_first_step(
    train, folder, workers
):
    (folder / "everywhere.py").write_text(EVERYWHERE)
    ended = train(
        workers, "jobs/digits.yaml", "model={name: 'everywhere:Everywhere', args: {features: 7}}"
    )
    assert ended.code == 2
    assert len(ended.errors) == 1
    assert (
        "the first micro-batch fails in the model or the loss: RuntimeError: mat1 and mat2"
        in ended.errors[0]
    )
    assert "everywhere.py, line 11, in forward" in ended.errors[0]
    assert ended.err.count("Traceback") == 1
    assert not (folder / "runs").exists()


def test_a_mistake_on_every_rank_is_reported_once(train, folder):
    (folder / "everywhere.py").write_text(EVERYWHERE)
    ended = train(
        3,
        "jobs/digits.yaml",
        "model={name: 'everywhere:Everywhere', args: {breaks_when_trained: true}}",
    )
    assert ended.code == 70
    assert len(ended.errors) == 1
    # rank 0 has no micro-batch in these steps
    assert "in your own code, on rank 1 of 3" in ended.err
    assert "everywhere.py, line 11, in forward" in ended.errors[0]
    assert ended.err.count("Traceback") == 1


UNBUILT = """
def part(*arguments, **named):
    return open_files()

def open_files():
    raise FileNotFoundError("weights.bin")
"""


@pytest.mark.parametrize(
    ("workers", "key", "change"),
    [
        (2, "model.name", "model={name: 'unbuilt:part'}"),
        (None, "data.name", "data={name: 'unbuilt:part'}"),
        (None, "loss.name", "loss={name: 'unbuilt:part'}"),
        (None, "evaluate.metrics", "evaluate.metrics=['unbuilt:part']"),
    ],
)
def test_an_own_part_that_cannot_be_built_is_told_with_its_line(
    train, folder, workers, key, change
):
    (folder / "unbuilt.py").write_text(UNBUILT)
    ended = train(workers, "jobs/digits.yaml", change)
    assert ended.code == 2, ended.text
    place = "unbuilt.py, line 6, in open_files"
    words = f"{key}: unbuilt:part raises FileNotFoundError: weights.bin ({place})"
    assert ended.errors == [f"hvdlarge: error: {words}"]
    assert ended.err.count("Traceback") == 1
    assert "hvdlarge/" not in ended.err
    assert not (folder / "runs").exists()


LATE = """
import torch

class Set(torch.utils.data.Dataset):
    def __init__(self, corrupt):
        self.corrupt = corrupt

    def __len__(self):
        return 640

    def __getitem__(self, index):
        if index == 500 and self.corrupt == "raises":
            raise ValueError(f"sample {index} is corrupt")
        return torch.ones(64), 77 if index == 500 and self.corrupt == "class" else index % 10

def data(corrupt="no", tested=None):
    return Set(corrupt), None if tested is None else Set(tested)

class Loss(torch.nn.CrossEntropyLoss):
    calls = 0

    def forward(self, outputs, targets):
        Loss.calls += 1
        if Loss.calls > 12:
            raise ArithmeticError("the loss is tired")
        return super().forward(outputs, targets)

class Late:
    num_totals = 1
    higher_is_better = True

    def totals(self, outputs, targets):
        if (targets == 77).any():
            raise LookupError("there is no class 77")
        return torch.zeros(1)

    def result(self, totals):
        return 0.0
"""
LATE_JOB = """
name: late
epochs: 1
data: {name: 'late_parts:data'}
model: {name: 'torch.nn:Linear', args: {in_features: 64, out_features: 10}}
batch: {base: 32, micro: 8}
lr: {base: 0.1}
"""


@pytest.mark.parametrize(
    ("changes", "where", "words"),
    [
        (["data.args.corrupt=raises"], "your own code", "ValueError: sample 500 is corrupt ({}, line 13, in __getitem__)"),
        (["data.args.corrupt=raises", "data.num_workers=1"], "your own code", "ValueError: sample 500 is corrupt ({}, line 13, in __getitem__)"),
        (["data.args.corrupt=class"], "the model or the loss", "IndexError: Target 77 is out of bounds."),
        (["loss.name=late_parts:Loss"], "your own code", "ArithmeticError: the loss is tired ({}, line 25, in forward)"),
        (["data.args.tested=class", "loss.args.ignore_index=77", "evaluate.metrics=['late_parts:Late']"], "your own code",
         "LookupError: there is no class 77 ({}, line 34, in totals)"),
    ],
    ids=["data", "data in a loader process", "class", "loss", "metric"],
)  # fmt: skip
def test_a_mistake_of_the_user_in_the_middle_of_training_is_told_as_such(
    train, folder, changes, where, words
):
    (folder / "late_parts.py").write_text(LATE)
    (folder / "late.yaml").write_text(LATE_JOB)
    ended = train(None, "late.yaml", *changes)
    assert ended.code == 70, ended.text
    assert len(ended.errors) == 1
    expected = words.format("late_parts.py")
    assert ended.errors[0].startswith(f"hvdlarge: error: in {where}, on rank 0 of 1 (")
    assert ended.errors[0].endswith(f"): {expected}")
    assert ended.err.count("Traceback") == 1
    assert "internal error" not in ended.err
    assert "step" in (folder / "runs/late/decisions.jsonl").read_text()


def test_a_full_shared_memory_leads_to_the_doctor(start, folder):
    """A namespace of its own with a /dev/shm of 100 KB; only root may make one."""
    (folder / "late_parts.py").write_text(LATE.replace("torch.ones(64)", "torch.ones(64, 512)"))
    job = LATE_JOB.replace("64, out", "512, out").replace("name: late\n", "name: late\nseed: 1\n")
    (folder / "late.yaml").write_text(job)
    small = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=100k tmpfs /dev/shm && exec "$@"', "sh"]  # fmt: skip
    if start([*small, "true"]).code:
        pytest.skip("this user cannot make a small file system")
    ended = start([*small, *TRAIN, "late.yaml", "data.num_workers=1"])
    assert ended.code == 3, ended.text
    assert len(ended.errors) == 1
    assert "the loader processes have no shared memory left (" in ended.errors[0]
    assert "`hvdlarge doctor` checks /dev/shm" in ended.errors[0]
    checked = start([*small, sys.executable, "-m", "hvdlarge.doctor"])
    assert "warning  /dev/shm: 0 MiB: loader processes and MPI on one host need more" in checked.out


WORKERS = """
import os, time
import torch

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 500
    def __getitem__(self, index):
        with open("pids", "a") as file:
            file.write(f"{os.getpid()}\\n")
        return torch.ones(64), 1

class Failing(torch.nn.Linear):
    def __init__(self):
        super().__init__(64, 10)
        self.passes = 0
    def forward(self, x):
        self.passes += 1
        if self.passes > 5:
            raise RuntimeError("made to fail")
        return super().forward(x)

def data():
    return Slow(), None
"""


@pytest.mark.parametrize("workers", [None, 2])
def test_loader_processes_end_with_a_run_that_fails(train, folder, workers):
    (folder / "slow_parts.py").write_text(WORKERS)
    ended = train(
        workers,
        "jobs/digits.yaml",
        "model={name: 'slow_parts:Failing'}",
        "data={name: 'slow_parts:data', num_workers: 2}",
        timeout=600,
    )
    assert ended.code == 70
    pids = {int(line) for line in (folder / "pids").read_text().split()}
    assert pids
    deadline = time.monotonic() + 10
    while (
        left := {pid for pid in pids if os.path.exists(f"/proc/{pid}")}
    ) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
