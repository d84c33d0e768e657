"""Both loaders give the announced micro-batches, in order, whatever is known when."""

import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, Subset

from hvdlarge.data.digits import _pixels_and_labels, digits
from hvdlarge.data.in_memory import InMemory, rows
from hvdlarge.data.loader import MicroBatchDataset, TensorLoader, WorkerLoader
from hvdlarge.data.order import samples
from hvdlarge.schedule.batch import BatchLayout, MicroBatch


class Numbers(Dataset):
    """Item i is (i, what the random generators draw for it)."""

    def __len__(self):
        return 100

    def __getitem__(self, index):
        return torch.tensor(index), torch.tensor(
            [torch.rand(()).item(), random.random(), np.random.random()]
        )


class ManyNumbers(Numbers):
    """The same, many at once."""

    def __getitems__(self, indices):
        drawn = torch.rand(len(indices))
        return [(torch.tensor(index), drawn[number]) for number, index in enumerate(indices)]


class Shifted(Subset):
    """The usual way to give a half of random_split a transform of its own."""

    def __getitem__(self, index):
        return super().__getitem__(index)[0] + 1000, 0

    def __getitems__(self, indices):
        return [self[index] for index in indices]


class ShiftedTensors(InMemory):
    def __getitem__(self, index):
        return super().__getitem__(index)[0] + 1000, 0


class Delegating(Dataset):
    """Hands on what it lacks to the set inside, whose way to many samples it has not been asked to take."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index][0] + 1000, 0


class DrawnTensors(InMemory):
    def batch(self, indices):
        return torch.tensor(
            [torch.rand(()).item(), random.random(), np.random.random()]
        ), super().batch(indices)[1]


TENSORS = InMemory(torch.arange(20), torch.zeros(20, dtype=torch.int64))


@pytest.mark.parametrize(
    ("dataset", "first"),
    [
        (Shifted(TENSORS, range(4, 12)), 1004),
        (ShiftedTensors(torch.arange(20), torch.arange(20)), 1000),
        (Delegating(ManyNumbers()), 1000),
        (Subset(Shifted(TENSORS, range(4, 12)), range(2, 8)), 1006),
        (Subset(Subset(TENSORS, range(4, 12)), range(2, 8)), 6),
    ],
    ids=[
        "subclass of Subset",
        "subclass of InMemory",
        "delegating wrapper",
        "subset of a subclass",
        "subset of a subset",
    ],
)
def test_a_sample_is_read_as_the_users_class_reads_it(dataset, first):
    loaded = MicroBatchDataset(dataset, seed=0, shuffled=False)[MicroBatch(0, 0, 4)]
    assert loaded.inputs.tolist() == list(range(first, first + 4))


def test_what_a_batch_draws_belongs_to_the_micro_batch():
    fetch = MicroBatchDataset(
        DrawnTensors(torch.arange(20), torch.arange(20)), seed=5, shuffled=True
    )
    drawn = [fetch[MicroBatch(0, start, start + 4)].inputs for start in (0, 4, 0)]
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.any(drawn[0] == drawn[1])


def steps_of(sizes, micro=8):
    start, steps = 0, []
    for size in sizes:
        steps.append(BatchLayout(size, micro, 2).of_rank(1, start) if size else [])
        start += size
    return steps


def run(loader, steps, ahead):
    """Announce `ahead` steps before they are fetched, as the decision feed does."""
    fetched, announced = [], 0
    for number, step in enumerate(steps):
        while announced < min(len(steps), number + ahead + 1):
            loader.enqueue(steps[announced], announced == len(steps) - 1)
            announced += 1
        fetched.append([loaded.micro_batch for loaded in loader.fetch(len(step))])
    return fetched


@pytest.mark.parametrize("ahead", [0, 1, 5])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_worker_loader_follows_growing_steps_and_idle_ones(num_workers, ahead):
    steps = steps_of([16, 16, 8, 8, 64, 3, 200, 31])
    loader = WorkerLoader(
        MicroBatchDataset(Numbers(), seed=3, shuffled=True), num_workers, prefetch_factor=2
    )
    assert run(loader, steps, ahead) == steps
    loader.close()


def test_every_loader_gives_the_stream():
    steps = steps_of([16, 40, 120])
    inputs = torch.arange(100)
    stream = MicroBatchDataset(InMemory(inputs, inputs), seed=3, shuffled=True)
    direct, ahead = TensorLoader(stream), TensorLoader(stream, reads_ahead=True)
    worker = WorkerLoader(
        MicroBatchDataset(Numbers(), seed=3, shuffled=True), num_workers=2, prefetch_factor=2
    )
    for loader in (direct, ahead, worker):
        for number, step in enumerate(steps):
            loader.enqueue(step, number == 2)
        for step in steps:
            for micro, loaded in zip(step, loader.fetch(len(step)), strict=True):
                assert loaded.inputs.tolist() == samples(3, 100, micro.start, micro.stop).tolist()
                loader.read_ahead()
        loader.close()


@pytest.mark.parametrize("dataset", [Numbers, ManyNumbers])
def test_what_is_drawn_for_a_sample_belongs_to_it_and_not_to_the_process(dataset):
    drawn = []
    for num_workers in (0, 1, 2):
        loader = WorkerLoader(
            MicroBatchDataset(dataset(), seed=3, shuffled=True), num_workers, prefetch_factor=2
        )
        step = BatchLayout(48, 8, 1).of_rank(0, 0)
        loader.enqueue(step, True)
        drawn.append(torch.cat([loaded.targets for loaded in loader.fetch(6)]))
        loader.close()
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert len(drawn[0].unique(dim=0)) == 48


def test_evaluation_counts_the_set_itself():
    fetch = MicroBatchDataset(Numbers(), seed=0, shuffled=False)
    assert fetch[MicroBatch(0, 5, 9)].inputs.tolist() == [5, 6, 7, 8]
    assert fetch[None] is None


def test_digits_are_real_and_split_once_and_for_all():
    train, test = digits()
    assert (len(train), len(test)) == (1437, 360)
    assert train.inputs.shape == (1437, 1, 8, 8)
    assert 0 <= train.inputs.min() < train.inputs.max() <= 1
    together = torch.cat([train.inputs, test.inputs]).flatten(1)
    assert len(together) == 1797
    assert torch.bincount(torch.cat([train.targets, test.targets])).tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]
    assert torch.bincount(test.targets, minlength=10).min() > 20
    again = digits()[1]
    assert torch.equal(again.inputs, test.inputs)


def test_the_digits_are_those_of_scikit_learn_also_where_its_file_lies_elsewhere(monkeypatch):
    read = _pixels_and_labels()
    monkeypatch.setattr(Path, "exists", lambda path: False)
    for ours, theirs, own in zip(
        read, _pixels_and_labels(), load_digits(return_X_y=True), strict=True
    ):
        assert np.array_equal(ours, theirs)
        assert np.array_equal(ours, own)


def test_sets_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="3 inputs and 2 targets"):
        InMemory(torch.zeros(3), torch.zeros(2))


class Slow(Numbers):
    """Takes a while for each sample, and says in a file how many it has given."""

    def __init__(self, counts):
        self.counts = counts

    def __getitem__(self, index):
        with self.counts.open("a") as file:
            file.write(".")
        time.sleep(0.01)
        return super().__getitem__(index)


def processes():
    return {process.pid for process in multiprocessing.active_children()}


def test_a_closed_loader_has_no_thread_and_no_process_left(tmp_path):
    before, threads = processes(), threading.active_count()
    loader = WorkerLoader(
        MicroBatchDataset(Slow(tmp_path / "counts"), seed=3, shuffled=True),
        num_workers=2,
        prefetch_factor=2,
    )
    loader.enqueue(BatchLayout(800, 8, 1).of_rank(0, 0), is_last=False)
    assert len(list(loader.fetch(3))) == 3
    assert len(processes() - before) == 2
    assert threading.active_count() > threads
    loader.close()
    assert processes() == before
    # The feeder threads of torch's queues to its processes were told to end, and nothing joins them
    until = time.monotonic() + 30
    while threading.active_count() > threads and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() == threads, threading.enumerate()


def test_the_end_of_a_loader_does_not_wait_for_another(monkeypatch):
    """That of evaluations goes on after that of training has ended."""
    loaders = [WorkerLoader(MicroBatchDataset(Numbers(), 3, True), 1, 2) for _ in range(2)]
    for loader in loaders:
        loader.enqueue(BatchLayout(16, 8, 1).of_rank(0, 0), is_last=True)
        assert len(list(loader.fetch(2))) == 2
    join, waited_for = threading.Thread.join, []

    def recorded(thread, timeout=None):
        waited_for.append(thread)
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", recorded)
    for loader in loaders:
        loader.close()
        assert len(waited_for) >= 2  # its own thread, and the one that fed its process
        assert not any(thread.is_alive() for thread in waited_for)
        waited_for.clear()


def test_no_more_is_loaded_ahead_than_was_asked_for(tmp_path):
    loader = WorkerLoader(
        MicroBatchDataset(Slow(tmp_path / "counts"), seed=3, shuffled=True),
        num_workers=1,
        prefetch_factor=2,
    )
    loader.enqueue(BatchLayout(400, 4, 1).of_rank(0, 0), is_last=False)
    list(loader.fetch(1))
    time.sleep(1.0)  # enough for 25 micro-batches
    loader.close()
    # One fetched, two taken over, two in hand of the process, and one more of each kind under way.
    assert 5 * 4 <= len((tmp_path / "counts").read_text()) <= 7 * 4


def test_a_sample_that_takes_very_long_does_not_hold_up_the_end():
    program = (
        "import time, torch\n"
        "from hvdlarge.schedule.batch import BatchLayout; from hvdlarge.data.loader import MicroBatchDataset, WorkerLoader\n"
        "from test_loader import Stuck\n"
        "loader = WorkerLoader(MicroBatchDataset(Stuck(), 0, False), 1, 2)\n"
        "loader.enqueue(BatchLayout(80, 8, 1).of_rank(0, 0), False)\n"
        "print(next(loader.fetch(1)).micro_batch.size)\n"
        "loader.close()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "8\n", "")


class Stuck(Numbers):
    """Has a sample that never comes."""

    def __getitem__(self, index):
        time.sleep(1000 if index == 11 else 0)
        return super().__getitem__(index)


class Broken(Numbers):
    """Has one sample that cannot be read."""

    def __getitem__(self, index):
        if index == 17:
            raise OSError("sample 17 is damaged")
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_the_set_comes_out_where_its_micro_batch_is_asked_for(num_workers):
    loader = WorkerLoader(
        MicroBatchDataset(Broken(), seed=0, shuffled=False), num_workers, prefetch_factor=2
    )
    loader.enqueue(BatchLayout(40, 8, 1).of_rank(0, 0), is_last=True)
    fetched = loader.fetch(5)
    assert [next(fetched).micro_batch.number for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="sample 17 is damaged"):
        next(fetched)
    loader.close()


def test_a_program_that_closes_nothing_ends_nevertheless():
    program = (
        "from hvdlarge.schedule.batch import BatchLayout; from hvdlarge.data.loader import MicroBatchDataset, WorkerLoader\n"
        "loader = WorkerLoader(MicroBatchDataset([(number, number) for number in range(100)], 3, True), 1, 2)\n"
        "loader.enqueue(BatchLayout(80, 8, 1).of_rank(0, 0), False)\n"
        "print(next(loader.fetch(1)).micro_batch.size)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "8\n", "")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int64", "bool", "bfloat16", "complex64"])
def test_rows_of_any_dtype_are_gathered(dtype):
    tensor = torch.arange(12).reshape(6, 2).to(getattr(torch, dtype))
    gathered = rows(tensor, torch.tensor([5, 0, 5]))
    assert gathered.dtype == tensor.dtype
    assert gathered.tolist() == [tensor[index].tolist() for index in (5, 0, 5)]
