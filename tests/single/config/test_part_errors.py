"""Errors of the parts that a job names: the user's line first, and distinguished from errors of the engine."""

from pathlib import Path

import pytest
import torch

from hvdlarge.config.part_errors import describe, origin
from hvdlarge.data.in_memory import InMemory
from hvdlarge.data.loader import MicroBatchDataset, WorkerLoader
from hvdlarge.evaluation.metric import MetricError
from hvdlarge.models.convnet import ConvNet
from hvdlarge.resilience.nonfinite import SkipPolicy
from hvdlarge.schedule.batch import MicroBatch


class Corrupt(torch.utils.data.Dataset):
    def __init__(self, unequal=False):
        self.unequal = unequal

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5 and not self.unequal:
            raise KeyError(f"sample {index}")
        return torch.zeros(index + 1 if self.unequal else 2), 0


def read(num_workers, unequal=False):
    loader = WorkerLoader(MicroBatchDataset(Corrupt(unequal), 0, shuffled=False), num_workers, 2)
    loader.enqueue([MicroBatch(0, 0, 8)], is_last=True)
    try:
        return list(loader.fetch(1))
    finally:
        loader.close()


def error_of(action, *arguments):
    with pytest.raises(Exception) as raised:
        action(*arguments)
    # As in a run: the frames begin within the engine
    frames = raised.tb
    while frames.tb_next and "hvdlarge/" not in frames.tb_frame.f_code.co_filename:
        frames = frames.tb_next
    return raised.value.with_traceback(frames)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_corrupt_sample_is_the_users_in_any_process(num_workers):
    error = error_of(read, num_workers)
    assert origin(error) == "your own code"
    first, *others = describe(error).splitlines()
    assert first == f"KeyError: 'sample 5' ({Path(__file__).name}, line 26, in __getitem__)"
    assert others[0] == "Traceback (most recent call last):"
    assert others[-1] == "KeyError: 'sample 5'"
    assert not any("hvdlarge/data" in line or "torch/" in line for line in others)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_samples_that_do_not_fit_together_are_the_sets(num_workers):
    error = error_of(read, num_workers, True)
    assert origin(error) == "the data set"
    assert "stack expects each tensor to be equal size" in describe(error).splitlines()[0]


def test_an_error_in_a_built_in_model_is_not_the_engines():
    error = error_of(ConvNet(), torch.rand(2, 1))
    assert origin(error) == "the model or the loss"


def test_a_graph_that_cannot_be_passed_again_is_the_models():
    weight = torch.ones(2, requires_grad=True)
    loss = (weight * weight).sum()
    loss.backward()
    assert origin(error_of(loss.backward)) == "the backward pass"


def test_a_loader_process_that_was_ended_is_not_the_engines():
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    assert origin(killed) == "a loader process"


def test_a_metric_of_another_shape_is_the_jobs():
    error = MetricError("evaluate.metrics: f1: totals() must return a tensor of 2 real numbers")
    assert origin(error) == "a part that the job names"
    assert describe(error) == str(error)


def test_an_error_of_the_engine_is_the_engines():
    assert origin(error_of(SkipPolicy(1, 0).check, None, None, None)) is None
    assert origin(error_of(InMemory, torch.zeros(2), torch.zeros(3))) is None


def test_causes_are_shown_too_without_the_engines_frames():
    class Wrapping(Corrupt):
        def __getitem__(self, index):
            try:
                return super().__getitem__(index)
            except KeyError as error:
                raise ValueError("the index is stale") from error

    error = error_of(
        MicroBatchDataset(Wrapping(), 0, shuffled=False).__getitem__, MicroBatch(0, 0, 8)
    )
    text = describe(error)
    assert text.splitlines()[0].startswith(
        f"ValueError: the index is stale ({Path(__file__).name}, line "
    )
    assert "KeyError: 'sample 5'" in text
    assert "hvdlarge/data/loader.py" not in text
