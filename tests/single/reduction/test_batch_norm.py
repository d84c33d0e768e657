"""Batch statistics of several ranks add up to those of one, whatever the split."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hvdlarge.reduction.batch_norm import ModeChangedError, RunningStatistics, tracking_layers
from hvdlarge.reduction.exact_batch_norm import ExactStatistics
from hvdlarge.schedule.batch import BatchLayout


def no_messages(tensor, name):
    raise AssertionError(
        "a step in which each layer is used once for each micro-batch costs no message"
    )


def run(model, rank, world_size, steps):
    """One rank's part of a few steps; returns its statistics object."""
    statistics = RunningStatistics({"": model}, rank, world_size, no_messages)
    statistics.to_partial()
    for data, micro in steps:
        layout = BatchLayout(len(data), micro, world_size)
        mine = layout.numbers_of_rank(rank)
        statistics.begin_step()
        for piece in layout.of_rank(rank, 0):
            model(data[piece.start : piece.stop])
        assert not statistics.count_uses(len(mine))
        statistics.end_step(layout, uneven=False)
    return statistics


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 9])
def test_any_number_of_ranks_gives_what_one_gives(world_size):
    torch.manual_seed(0)
    start = torch.nn.Sequential(
        torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3, momentum=0.3)
    ).double()
    start[0].running_mean.uniform_()
    start[0].num_batches_tracked.fill_(7)
    steps = [(torch.randn(20, 5, dtype=torch.float64) * number, 4) for number in range(1, 4)]
    steps.append((torch.randn(8, 5, dtype=torch.float64), 3))
    alone = copy.deepcopy(start)
    for data, micro in steps:
        for piece in BatchLayout(len(data), micro, 1).of_rank(0, 0):
            alone(data[piece.start : piece.stop])

    models = [copy.deepcopy(start) for _ in range(world_size)]
    statistics = [run(model, rank, world_size, steps) for rank, model in enumerate(models)]
    for name in ("running_mean", "running_var"):
        for layer in (0, 2):
            total = sum(getattr(model[layer], name) for model in models)
            expected = getattr(alone[layer], name)
            assert torch.allclose(total, expected, rtol=1e-12, atol=1e-14)
            assert not torch.equal(expected, getattr(start[layer], name))
    sums = {}
    for rank in range(world_size):  # gather by hand: every rank sees the sum of all
        order = iter([sum(getattr(model[layer], name) for model in models)
                      for layer in (0, 2) for name in ("running_mean", "running_var")])  # fmt: skip
        sums[rank] = list(order)
    used = sum(model[0].num_batches_tracked.item() - 7 for model in models)
    assert used == alone[0].num_batches_tracked.item() - 7
    for rank, model in enumerate(models):
        pieces = iter([torch.tensor([used, used]), *sums[rank]])
        statistics[rank].all_reduce(lambda tensor, name, pieces=pieces: next(pieces))
        assert model[0].num_batches_tracked.item() == alone[0].num_batches_tracked.item()
        assert torch.allclose(model[2].running_var, alone[2].running_var, rtol=1e-12)


def test_a_layer_that_does_not_train_keeps_its_statistics():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2))
    model[0].eval()
    model[0].running_mean.fill_(5.0)
    statistics = RunningStatistics({"": model}, 1, 2, no_messages)
    statistics.to_partial()
    statistics.begin_step()
    model(torch.randn(4, 2))
    assert not statistics.count_uses(1)
    statistics.end_step(BatchLayout(8, 4, 2), uneven=False)
    assert model[0].running_mean.tolist() == [5.0, 5.0]
    assert statistics._buffers()[0] is model[1].running_mean
    assert statistics.partial_buffers() == {id(buffer) for buffer in model[1].buffers()}


class Uneven(torch.nn.Module):
    """A layer used twice, one used where the batch says so, one never."""

    def __init__(self):
        super().__init__()
        self.twice, self.sometimes, self.never = (
            torch.nn.BatchNorm1d(3, momentum=momentum) for momentum in (0.1, 0.3, 0.2)
        )

    def forward(self, inputs):
        outputs = self.twice(self.twice(inputs) * 2 + 1)
        return self.sometimes(outputs) if inputs.sum() > 0 else outputs


@pytest.mark.parametrize("kind", [RunningStatistics, ExactStatistics])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_layers_used_twice_or_sometimes_give_what_one_worker_gives(kind, world_size):
    torch.manual_seed(1)
    start = Uneven().double()
    start.sometimes.running_mean.uniform_()
    steps = [
        torch.randn(5, 4, 3, dtype=torch.float64) for _ in range(3)
    ]  # five micro-batches of four samples
    alone = copy.deepcopy(start)
    for data in steps:
        for piece in data:
            alone(piece)

    models = [copy.deepcopy(start) for _ in range(world_size)]
    world = ThreadWorld(world_size)

    def rank_of(rank):
        model = models[rank]
        statistics = kind(
            {"": model}, rank, world_size, lambda tensor, name: world.gather(rank, tensor)
        )
        statistics.to_partial()
        for data in steps:
            layout = BatchLayout(20, 4, world_size)
            mine = layout.numbers_of_rank(rank)
            statistics.begin_step()
            for number in mine:
                model(data[number])
            uneven = bool(world.gather(rank, torch.tensor(statistics.count_uses(len(mine)))).any())
            statistics.end_step(layout, uneven)
        statistics.all_reduce(lambda tensor, name: world.gather(rank, tensor).sum(dim=0))

    world.run(rank_of)
    assert int(alone.sometimes.num_batches_tracked) not in (0, 15)
    for model in models:
        for (name, ours), theirs in zip(
            model.state_dict().items(), alone.state_dict().values(), strict=True
        ):
            assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14), name
            assert kind is RunningStatistics or torch.equal(ours, models[0].state_dict()[name])


def test_a_layer_that_changes_its_mode_in_a_forward_pass_is_refused():
    layer = torch.nn.BatchNorm1d(2)
    statistics = RunningStatistics(
        {"": torch.nn.Sequential(layer)}, 0, 1, lambda tensor, name: tensor.unsqueeze(0)
    )
    statistics.to_partial()
    statistics.begin_step()
    layer.eval()
    assert statistics.count_uses(1)
    with pytest.raises(ModeChangedError, match="'0' changed between training and evaluation"):
        statistics.end_step(BatchLayout(4, 4, 1), uneven=True)


class ThreadWorld:
    """Ranks as threads that gather from each other."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size)
        self.given = [None] * size

    def gather(self, rank, tensor):
        self.given[rank] = tensor.clone()
        self.barrier.wait(30)
        stacked = torch.stack(self.given)
        self.barrier.wait(30)
        return stacked

    def run(self, rank_of):
        with ThreadPoolExecutor(len(self.given)) as pool:
            list(pool.map(rank_of, range(len(self.given))))


def test_gathering_twice_does_nothing_the_second_time():
    model = torch.nn.BatchNorm1d(2)
    statistics = RunningStatistics({"": model}, 0, 2, no_messages)
    statistics.to_partial()
    statistics.all_reduce(lambda tensor, name: tensor + tensor.is_floating_point())
    before = model.running_mean.clone()
    statistics.all_reduce(lambda tensor, name: tensor + 1)
    assert torch.equal(model.running_mean, before)


def test_a_cumulative_average_is_refused_and_layers_without_statistics_pass():
    with pytest.raises(ValueError, match="momentum=None"):
        tracking_layers({"": torch.nn.Sequential(torch.nn.BatchNorm1d(2, momentum=None))})
    first, second = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    second.running_var = first.running_var
    with pytest.raises(ValueError, match="'0' and '1' share their running statistics"):
        tracking_layers({"": torch.nn.Sequential(first, second)})
    with pytest.raises(ValueError, match="instance normalisation"):
        tracking_layers({"": torch.nn.InstanceNorm1d(2, track_running_stats=True)})
    assert (
        tracking_layers({"": torch.nn.BatchNorm1d(2, track_running_stats=False, momentum=None)})
        == []
    )
