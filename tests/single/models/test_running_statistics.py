"""Batch statistics of several ranks add up to those of one, whatever the split."""

import copy

import pytest
import torch

from hvdlarge.data.layout import BatchLayout
from hvdlarge.models.running_statistics import RunningStatistics


def run(model, rank, world_size, steps):
    """One rank's part of a few steps; returns its statistics object."""
    statistics = RunningStatistics(model, rank)
    statistics.scatter()
    for data, micro in steps:
        layout = BatchLayout(len(data), micro, world_size)
        mine = layout.numbers_of_rank(rank)
        statistics.begin_step(mine.start)
        for piece in layout.of_rank(rank, 0):
            model(data[piece.start : piece.stop])
        statistics.end_step(layout.num_micro_batches - mine.stop, layout.num_micro_batches)
    return statistics


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 9])
def test_any_number_of_ranks_gives_what_one_gives(world_size):
    torch.manual_seed(0)
    start = torch.nn.Sequential(torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3, momentum=0.3)).double()
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
        statistics[rank].gather(lambda tensor, name, pieces=pieces: next(pieces))
        assert model[0].num_batches_tracked.item() == alone[0].num_batches_tracked.item()
        assert torch.allclose(model[2].running_var, alone[2].running_var, rtol=1e-12)


def test_a_layer_that_does_not_train_keeps_its_statistics():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2))
    model[0].eval()
    model[0].running_mean.fill_(5.0)
    statistics = RunningStatistics(model, rank=1)
    statistics.scatter()
    statistics.begin_step(3)
    model(torch.randn(4, 2))
    statistics.end_step(0, 4)
    assert model[0].running_mean.tolist() == [5.0, 5.0]
    assert statistics._buffers()[0] is model[1].running_mean


def test_a_layer_used_twice_in_a_forward_pass_is_refused():
    layer = torch.nn.BatchNorm1d(2)
    statistics = RunningStatistics(torch.nn.ModuleList([layer]), rank=0)
    statistics.scatter()
    statistics.begin_step(0)
    layer(layer(torch.randn(4, 2)))
    statistics.end_step(0, 1)
    with pytest.raises(ValueError, match="used 2 times for 1 micro-batches"):
        statistics.gather(lambda tensor, name: tensor)


def test_gathering_twice_does_nothing_the_second_time():
    model = torch.nn.BatchNorm1d(2)
    statistics = RunningStatistics(model, 0)
    statistics.scatter()
    statistics.gather(lambda tensor, name: tensor + tensor.is_floating_point())
    before = model.running_mean.clone()
    statistics.gather(lambda tensor, name: tensor + 1)
    assert torch.equal(model.running_mean, before)


def test_a_cumulative_average_is_refused_and_layers_without_statistics_pass():
    with pytest.raises(ValueError, match="momentum=None"):
        RunningStatistics(torch.nn.Sequential(torch.nn.BatchNorm1d(2, momentum=None)), 0)
    with pytest.raises(ValueError, match="instance normalisation"):
        RunningStatistics(torch.nn.InstanceNorm1d(2, track_running_stats=True), 0)
    RunningStatistics(torch.nn.BatchNorm1d(2, track_running_stats=False, momentum=None), 0)
