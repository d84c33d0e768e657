"""A growth that depends on measurements, through controller, feed and training loop: the same decisions and weights
with any prefetch depth, on any number of workers, and after any interruption."""

import dataclasses
import itertools
import json
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import torch
from pydantic import Field
from support.comparing import distance, read_lines, same

from hvdlarge import plan as plan_door
from hvdlarge.comm.solo import SoloChannel
from hvdlarge.config.job import Batch, Job
from hvdlarge.config.planning import estimate, plan_run
from hvdlarge.controller import Controller, DecisionFeed
from hvdlarge.data.digits import digits
from hvdlarge.reporting.describe import rule_notes, stage_table
from hvdlarge.schedule.growth import AdaBatchGrowth, Growth, NoGrowth
from hvdlarge.schedule.plan import RunProgress
from hvdlarge.schedule.progress import milestones_reached
from trials.engine import (
    StopAtStep,
    join_checkpoint_writers,
    preserved_settings,
    run_rank,
    silenced,
)
from trials.thread_world import run_world


@dataclass(frozen=True)
class LossGrowth(Growth):
    """Doubles the batch where the loss has fallen below `loss`, and each further time below 0.7 of that."""

    depends_on_measurement = True

    policy: Literal["loss"] = "loss"
    """By the training loss."""
    loss: float = 2.2
    """Mean loss of a step."""
    every_epochs: float | None = 0.5
    """Epochs between two points; null: every step."""

    def next_batch(self, initial, current, epoch, measured):
        """Twice the current batch, or the current one."""
        limit = self.loss * (initial / current) ** 0.5
        return 2 * current if measured.get("loss", float("inf")) < limit else current

    def acts_between(self, before, epoch):
        """At milestones, or always."""
        if self.every_epochs is None:
            return super().acts_between(before, epoch)
        reached = [milestones_reached(at, self.every_epochs, None) for at in (before, epoch)]
        return reached[1] > reached[0]


class LossBatch(Batch):
    """The section with one more policy in its union, as a policy of the package would stand there."""

    growth: Annotated[
        NoGrowth | AdaBatchGrowth | LossGrowth, Field(discriminator="policy")
    ] = NoGrowth()  # fmt: skip


class LossJob(Job):
    """A job whose batch may follow it."""

    batch: LossBatch


JOB = {
    "name": "loss",
    "epochs": 3,
    "reduction": "exact",
    "data": {"name": "digits"},
    "model": {"name": "mlp"},
    "batch": {"base": 64, "micro": 16, "growth": {"policy": "loss"}},
    "lr": {"base": 3.0, "scaling": "sqrt", "warmup": {"policy": "legw", "epochs": 0.3}},
    "checkpoint": {"every_steps": 5},
    "log": {"every_steps": 7},
}


def job_of(**changes):
    return LossJob.model_validate_json(json.dumps({**JOB, **changes}), strict=True)


def start(job, folder, workers, stop_after=None, kill_at=None):
    """Start or continue a run; its exit code."""
    folder.with_suffix(".yaml").write_text(job.to_yaml())
    job = job.model_copy(update={"run_dir": str(folder)})

    def action(control, tensors):
        return run_rank(job, folder, control, tensors, StopAtStep(stop_after))[0]

    with preserved_settings(), silenced():
        ends = run_world(workers, action, kill_at=kill_at)
        join_checkpoint_writers()
    if ends.error is not None:
        raise ends.error[1]
    return "killed" if ends.killed else ends.results[0]


def read_checkpoint(folder):
    return torch.load(folder / "checkpoints/last.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run on one worker, never interrupted, with as few decisions ahead as possible."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert start(job_of(), folder, 1) == 0
    return folder


def decisions(folder):
    return (folder / "decisions.jsonl").read_text()


def test_a_measured_run_grows_where_the_loss_has_fallen_and_nowhere_else(whole):
    lines = read_lines(whole / "decisions.jsonl")
    grown = [line for line in lines if "grew_from" in line]
    points = [
        after
        for before, after in itertools.pairwise(lines)
        if milestones_reached(after["epoch"], 0.5, None)
        > milestones_reached(before["epoch"], 0.5, None)
    ]
    assert len(grown) >= 2
    assert len(points) == 5
    assert all(line in points for line in grown)
    assert len(grown) < len(points)
    progress = read_checkpoint(whole)["progress"]
    assert progress["stage_batch"] == 64 * 2 ** len(grown)
    last_loss = [line["loss"] for line in read_lines(whole / "metrics.jsonl") if "loss" in line][-1]
    assert progress["measured"] == {"loss": pytest.approx(last_loss, rel=1e-12)}


@pytest.mark.parametrize(("workers", "prefetch_steps"), [(1, 4), (1, 30), (2, 1), (2, 4), (4, 30)])
def test_a_measured_run_on_any_number_of_workers_with_any_prefetch_depth_is_the_same(
    whole, tmp_path, workers, prefetch_steps
):
    job = job_of(data={"name": "digits", "prefetch_steps": prefetch_steps})
    assert start(job, tmp_path / "run", workers) == 0
    assert decisions(tmp_path / "run") == decisions(whole)
    ended, expected = read_checkpoint(tmp_path / "run"), read_checkpoint(whole)
    assert same(ended, expected)
    assert ended["progress"] == expected["progress"]


@pytest.mark.parametrize("stop_after", [0, 5, 10, 11, 12, 17, 30])
def test_a_measured_run_stopped_at_any_step_and_resumed_on_other_workers_is_the_same(
    whole, tmp_path, stop_after
):
    """Step 12 is the first point."""
    job = job_of(data={"name": "digits", "prefetch_steps": 4})
    assert start(job, tmp_path / "run", 2, stop_after) == 75
    taken = len(read_lines(tmp_path / "run/decisions.jsonl"))
    assert read_checkpoint(tmp_path / "run")["progress"]["step"] == taken == stop_after + 1
    assert start(job, tmp_path / "run", 1) == 0
    assert decisions(tmp_path / "run") == decisions(whole)
    assert same(read_checkpoint(tmp_path / "run"), read_checkpoint(whole))


@pytest.mark.parametrize("kill_at", [150, 203, 262])
def test_a_measured_run_killed_between_checkpoints_and_resumed_is_the_same(
    whole, tmp_path, kill_at
):
    job = job_of(data={"name": "digits", "prefetch_steps": 4})
    assert start(job, tmp_path / "run", 2, kill_at=kill_at) == "killed"
    assert (tmp_path / "run/checkpoints/last.pt").exists()
    assert start(job, tmp_path / "run", 2) == 0
    assert decisions(tmp_path / "run") == decisions(whole)
    assert same(read_checkpoint(tmp_path / "run"), read_checkpoint(whole))


def test_a_growth_that_acts_at_every_step_is_decided_one_step_at_a_time(tmp_path):
    growth = {"policy": "loss", "every_epochs": None}
    ended = []
    for workers, prefetch_steps in ((1, 1), (2, 8)):
        job = job_of(
            data={"name": "digits", "prefetch_steps": prefetch_steps},
            batch={**JOB["batch"], "growth": growth},
        )
        folder = tmp_path / f"run{workers}"
        assert start(job, folder, workers) == 0
        ended.append((decisions(folder), read_checkpoint(folder)))
    assert ended[0][0] == ended[1][0]
    assert "grew_from" in ended[0][0]
    assert same(ended[0][1], ended[1][1])


def test_a_measured_run_with_fast_sums_makes_the_same_decisions_on_two_workers(tmp_path):
    ends = []
    for workers in (1, 2):
        job = job_of(reduction="fast", precision="fp64")
        assert start(job, tmp_path / f"run{workers}", workers) == 0
        ends.append(tmp_path / f"run{workers}")
    assert decisions(ends[0]) == decisions(ends[1])
    assert distance(*map(read_checkpoint, ends)) < 1e-10


def test_the_plan_of_a_measured_growth_ends_where_the_first_measurement_is_needed(whole, tmp_path):
    job = job_of()
    plan = plan_run(job, len(digits()[0]), 2)
    lines = read_lines(whole / "decisions.jsonl")
    point = next(line for line in lines if line["epoch"] >= 0.5)
    (stage,) = plan.stages
    assert (stage.open_end, stage.steps, stage.end) == (True, point["step"], point["epoch"])
    estimated = estimate(job, plan, None)
    assert (estimated["steps"], estimated["measured_from_epoch"]) == (point["step"], point["epoch"])
    assert estimated["checkpoints"] == point["step"] // 5
    assert stage_table(plan)[-1] == (
        "  from epoch 0.5344 on the batch depends on what is measured (loss)"
    )
    assert not any("full lr" in note for note in rule_notes(job, plan))
    said = "\n".join(plan_door.in_words(job, plan, estimated, None))
    assert f"steps    {point['step']} up to epoch 0.5344, as far as is known" in said
    plan_door.write_decisions(tmp_path / "decisions.jsonl", plan)
    known = (tmp_path / "decisions.jsonl").read_text()
    assert len(known.splitlines()) == point["step"]
    assert json.loads(known.splitlines()[-1]) == lines[point["step"] - 1]
    plan_door.draw(tmp_path / "plan.png", [("loss", plan)])


# --- the controller alone


def test_the_feed_decides_ahead_up_to_a_point_and_no_further():
    plan = plan_run(job_of(), 1437, 1)
    controller, announced = Controller(plan), []
    feed = DecisionFeed(SoloChannel(), controller, 100, announced.append, plan.waits_after)
    for step in range(12):
        assert feed.next().step == step
        assert len(announced) == 12
        controller.observe(step, {"loss": 3.0 if step < 11 else 2.1})
    assert feed.next().stage_batch == 128
    assert [decision.step for decision in announced[12:]] == list(range(12, len(announced)))
    assert not any(map(plan.waits_after, announced[12:-1]))
    assert plan.waits_after(announced[-1])


def test_a_decision_that_depends_on_a_step_that_is_not_observed_is_an_error():
    controller = Controller(plan_run(job_of(), 1437, 1))
    for _ in range(12):
        controller.decide()
    with pytest.raises(RuntimeError, match="step 12 depends on what is measured in step 11, and 0"):
        controller.decide()
    with pytest.raises(ValueError, match="step 1 is observed, step 0 was expected"):
        controller.observe(1, {})


def test_a_skipped_step_leaves_the_last_measurement():
    controller = Controller(plan_run(job_of(), 1437, 1))
    given = [controller.decide() for _ in range(12)]
    for step in range(12):
        controller.observe(step, {"loss": 2.0} if step == 5 else {})
    progress = controller.progress_after(given[-1])
    assert progress.measured == {"loss": 2.0}
    assert controller.decide().stage_batch == 128
    again = Controller(
        plan_run(job_of(), 1437, 1),
        RunProgress.from_plain(json.loads(json.dumps(progress.to_plain()))),
    )
    assert again.decide().stage_batch == 128


def test_a_growth_that_shrinks_the_batch_is_an_error():
    @dataclass(frozen=True)
    class Shrinks(LossGrowth):
        def next_batch(self, initial, current, epoch, measured):
            return current // 2

    plan = dataclasses.replace(plan_run(job_of(), 1437, 1), growth=Shrinks())
    controller = Controller(plan)
    for step in range(12):
        controller.decide()
        controller.observe(step, {})
    with pytest.raises(ValueError, match="Shrinks gives a batch of 32 after 64 at epoch 0.53"):
        controller.decide()
