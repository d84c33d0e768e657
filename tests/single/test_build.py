"""From the job's sections to objects: what a section asks for is there."""

from dataclasses import replace

import pytest
import torch

from hvdlarge import build
from hvdlarge.comm.solo import SoloChannel, SoloCollectives
from hvdlarge.config.job_file import parse_job
from hvdlarge.config.planning import plan_run
from hvdlarge.optim.precision import Precision
from hvdlarge.run import Components, _keep_cutting
from hvdlarge.train_state import TrainState

JOB = """
name: built
epochs: 1
data: {name: digits}
model: {name: convnet, args: {width: 2}}
batch: {base: 8, micro: 4}
lr: {base: 1}
"""


def built(*changes):
    job = parse_job(JOB, "job", changes)
    arithmetic = Precision(job.precision, torch.device("cpu"))
    model, loss, optimizer, _ = build.build_learning(
        job.model, job.loss, job.optimizer, arithmetic, job.seed
    )
    learner = build.build_replica(
        model, loss, optimizer, arithmetic, job.gradients, None, job.model.channels_last,
        SoloChannel(), SoloCollectives(), job.seed, exact=False,
    )  # fmt: skip
    return job, learner


@pytest.mark.parametrize("wanted", [False, True])
def test_channels_last_lays_out_images_and_nothing_else(wanted):
    _, learner = built(f"model.channels_last={str(wanted).lower()}")
    moved = learner.to_device(
        {"images": torch.rand(2, 3, 5, 5), "rows": (torch.rand(4, 6), torch.arange(3))}
    )
    assert moved["images"].is_contiguous(memory_format=torch.channels_last) == wanted
    assert moved["rows"][0].is_contiguous()
    assert moved["rows"][1].dtype == torch.int64


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # torch's own, at the import of its compiler
@pytest.mark.parametrize("wanted", [False, True])
def test_compile_prepares_the_model_and_keeps_its_names(wanted):
    _, learner = built(f"model.compile={str(wanted).lower()}")
    assert (learner.model._compiled_call_impl is not None) == wanted
    assert all(not name.startswith("_orig_mod") for name in learner.model.state_dict())


def test_floats_take_the_type_of_the_weights():
    _, learner = built("precision=fp64")
    assert learner.to_device(torch.rand(2, 1, 8, 8)).dtype == torch.float64


def test_steps_that_only_overflowed_do_not_count_against_the_limit_of_skipped_ones():
    job, learner = built("precision=fp16", "on_nonfinite={policy: skip, limit: 2}")
    policy = build.build_policy(
        job.on_nonfinite, TrainState(skipped=7, overflows=6, loss_scale=1.0), learner
    )
    assert policy._then.skipped == 1


def test_the_search_for_the_largest_micro_batch_stops_at_the_largest_share():
    job, learner = built(
        "batch.micro=auto", "batch.growth={policy: adabatch, factor: 2, every_epochs: 0.5, max: 16}"
    )
    training_set, _ = build.load_data(job.data, job.seed)
    plan = plan_run(job, len(training_set), 1)
    model, loss, *_ = build.build_learning(
        job.model, job.loss, job.optimizer, learner.arithmetic, job.seed
    )
    found = build.largest_micro_batch(
        plan, model, loss, learner.arithmetic, training_set, job.data, True, SoloChannel()
    )
    assert found == 16


def test_steps_are_cut_as_before_an_interruption_on_as_many_workers_if_that_still_fits():
    job, learner = built("batch.micro=auto")
    plan = plan_run(job, 1437, 2)

    def kept(now, state, workers=2):
        found = Components(
            learner.arithmetic,
            None,
            None,
            {},
            replace(plan, largest_micro_batch=now),
            None,
            None,
            None,
            {},
        )
        found, notes = _keep_cutting(found, state, workers)
        return found.plan.largest_micro_batch, len(notes)

    state = TrainState()
    assert kept(None, state) == (None, 0)  # on a CPU
    assert state == TrainState()
    assert kept(100, state) == (100, 0)
    assert (state.largest_micro_batch, state.workers) == (100, 2)
    assert kept(120, state) == (100, 0)
    assert kept(90, state) == (90, 1)
    assert kept(200, state, workers=1) == (200, 0)
    assert (state.largest_micro_batch, state.workers) == (200, 1)
