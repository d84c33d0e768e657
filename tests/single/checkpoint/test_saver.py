"""Which evaluation is the best so far."""

import dataclasses
import json

from hvdlarge.checkpoint.folder import NoCheckpoints
from hvdlarge.checkpoint.saver import CheckpointSaver
from hvdlarge.comm.solo import SoloChannel, SoloCollectives
from hvdlarge.config.job import Checkpoint
from hvdlarge.config.job_file import read_job
from hvdlarge.controller import Controller
from hvdlarge.evaluation.accuracy import Accuracy
from hvdlarge.evaluation.metric import rankings
from hvdlarge.replica.train_state import TrainState

PLAN = read_job("jobs/digits.yaml").plan(1437, 1)
DECISIONS = list(iter(Controller(PLAN).decide, None))


def best_of(state, best_by, evaluations):
    """The steps that are the best so far, of a part of a run that goes by `best_by`."""
    by = rankings(best_by, {"accuracy": Accuracy()})
    saver = CheckpointSaver(
        SoloChannel(),
        SoloCollectives(),
        None,
        NoCheckpoints(),
        PLAN.clock,
        Checkpoint(best=best_by),
        by,
        None,
        dict,
    )
    return [step for step, found in evaluations if saver.is_best(state, DECISIONS[step - 1], found)]


def resumed(state):
    return TrainState(**json.loads(json.dumps(dataclasses.asdict(state))))


def test_the_best_so_far_when_a_resume_goes_by_another_result_is_begun_anew():
    state = TrainState()
    found = [(45, {"accuracy": 0.26, "test_loss": 2.15}), (90, {"accuracy": 0.2, "test_loss": 2.0})]
    assert best_of(state, "accuracy", found) == [45]
    state = resumed(state)
    later = [(135, {"accuracy": 0.5, "test_loss": 1.2}), (180, {"accuracy": 0.6, "test_loss": 1.3})]
    assert best_of(state, "test_loss", [*later, (225, {"accuracy": 0.7, "test_loss": 0.7})]) == [
        135,
        225,
    ]
    state = resumed(state)
    assert best_of(state, None, [(270, {"accuracy": 0.1, "test_loss": 9})]) == [270]
    assert state.best == {"by": "accuracy", "value": 0.1, "step": 270}


def test_the_best_so_far_when_a_resume_goes_by_the_same_result_stays():
    state = TrainState()
    assert best_of(state, None, [(45, {"accuracy": 0.26, "test_loss": 2.15})]) == [45]
    assert best_of(resumed(state), "accuracy", [(90, {"accuracy": 0.2, "test_loss": 1.0})]) == []
