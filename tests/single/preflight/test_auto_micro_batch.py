"""The search for the largest micro-batch: by a real limit of a process's memory, and leaving nothing behind."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from hvdlarge.comm.solo import SoloChannel
from hvdlarge.config.job_file import parse_job
from hvdlarge.config.planning import plan_run
from hvdlarge.data.samples import SampleForm
from hvdlarge.data.transforms import Transforms
from hvdlarge.exits import JobError
from hvdlarge.optim.precision import Precision
from hvdlarge.preflight.auto_micro_batch import (
    keep_micro_batches,
    largest_micro_batch,
    largest_that_fits,
    with_largest_micro_batch,
)
from hvdlarge.replica.objective import Objective
from hvdlarge.replica.train_state import TrainState
from hvdlarge.training.build import build_learning, first_sample, load_data

CPU = Precision("fp32", torch.device("cpu"))


def unmoved(batch):
    return batch


def samples(size):
    return torch.ones(size, 3, 32, 32), torch.zeros(size, dtype=torch.int64)


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.Dropout(0.5),
        torch.nn.Flatten(),
        torch.nn.Linear(7200, 10),
    )


def test_what_is_found_is_the_largest_to_within_a_sixteenth():
    for limit in (0, 1, 2, 3, 7, 100, 4097):
        for most in (1, 2, 5, 64, 5000):
            tried = []
            found = largest_that_fits(
                lambda size, limit=limit, tried=tried: tried.append(size) or size <= limit, most
            )
            assert min(limit, most) * 15 / 16 - 1 <= found <= min(limit, most)
            assert found > 0 or limit == 0
            assert max(tried) <= most
            assert len(tried) == len(set(tried)) <= 20


def test_the_search_leaves_no_trace():
    model = net().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert largest_micro_batch(Objective(model, cross_entropy, CPU, unmoved), samples, 6) == 6
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


LIMITED = """
import resource, torch
from test_auto_micro_batch import *
model = net()
largest_micro_batch(Objective(model, cross_entropy, CPU, unmoved), samples, 2)  # threads and caches are there before the limit is set
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20, used + 400 * 2**20))
print(largest_micro_batch(Objective(model, cross_entropy, CPU, unmoved), samples, 10**6))
"""


def test_memory_that_really_ends_is_found_out():
    path = [f"import sys; sys.path[:0] = {[*sys.path, str(__file__).rpartition('/')[0]]}"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*path, LIMITED])],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    # A sample takes 12 kB of input and some 8 × 30 × 30 × 4 bytes at each of five places, forwards and backwards.
    assert 200 < int(done.stdout) < 10_000, done.stdout


JOB = """
name: built
epochs: 1
data: {name: digits}
model: {name: convnet, args: {width: 2}}
batch: {base: 8, micro: auto}
lr: {base: 1}
"""


def test_the_search_for_the_largest_micro_batch_stops_at_the_largest_share():
    job = parse_job(
        JOB, "job", ["batch.growth={policy: adabatch, factor: 2, every_epochs: 0.5, max: 16}"]
    )
    training_set, _ = load_data(job.data, job.seed)
    plan = plan_run(job, len(training_set), 1)
    objective, *_ = build_learning(job, CPU)
    sample = first_sample(job.data, SampleForm(), training_set, Transforms())
    plan = with_largest_micro_batch(plan, objective, sample, SoloChannel())
    assert plan.largest_micro_batch == 16


def test_a_model_that_does_not_fit_its_data_is_an_error_of_the_job():
    job = parse_job(JOB, "job")
    training_set, _ = load_data(job.data, job.seed)
    plan = plan_run(job, len(training_set), 1)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 10))
    objective = Objective(model, cross_entropy, CPU, unmoved)
    sample = first_sample(job.data, SampleForm(), training_set, Transforms())
    with pytest.raises(JobError, match="^model.name: a micro-batch .* RuntimeError: mat1 and mat2"):
        with_largest_micro_batch(plan, objective, sample, SoloChannel())


def test_a_first_sample_that_cannot_be_read_is_an_error_of_the_job():
    job = parse_job(JOB, "job")
    objective, *_ = build_learning(job, CPU)

    def sample():
        raise OSError("image 0 is truncated")

    with pytest.raises(
        JobError, match="^data.name: .* training set cannot be read: OSError: image"
    ):
        with_largest_micro_batch(plan_run(job, 1437, 1), objective, sample, SoloChannel())


def test_steps_are_cut_as_before_an_interruption_on_as_many_workers_if_that_still_fits():
    job = parse_job(JOB, "job")

    def kept(now, state, workers=2):
        plan = replace(plan_run(job, 1437, workers), largest_micro_batch=now)
        plan, notes = keep_micro_batches(plan, state)
        return plan.largest_micro_batch, len(notes)

    state = TrainState()
    assert kept(None, state) == (None, 0)  # on a CPU
    assert state == TrainState()
    assert kept(100, state) == (100, 0)
    assert (state.largest_micro_batch, state.workers) == (100, 2)
    assert kept(120, state) == (100, 0)
    assert kept(90, state) == (90, 1)
    assert kept(200, state, workers=1) == (200, 0)
    assert (state.largest_micro_batch, state.workers) == (200, 1)
