"""AdaBatch's batches: FACTS of the paper, sections 6.A.2, 6.A.4, 6.A.5 and 6.A.9."""

import math
from itertools import pairwise

import pytest

from hvdlarge.schedule.growth import AdaBatchGrowth, NoGrowth
from hvdlarge.schedule.lr import LRSchedule
from hvdlarge.schedule.outline import outline
from hvdlarge.schedule.progress import Clock


def batch_at(growth, initial, epoch):
    """Of a growth that depends on nothing else."""
    return growth.next_batch(initial, initial, epoch, {})


def test_the_paper_doubles_128_to_2048():
    growth = AdaBatchGrowth(factor=2, at_epochs=(20, 40, 60, 80))
    assert [batch_at(growth, 128, epoch) for epoch in (0, 20, 40, 60, 80)] == [
        128,
        256,
        512,
        1024,
        2048,
    ]


def test_imagenet_with_factor_8():
    growth = AdaBatchGrowth(factor=8, every_epochs=30)
    assert [batch_at(growth, 8192, epoch) for epoch in (0, 30, 60)] == [8192, 65536, 524288]


def test_a_mark_at_20_changes_epoch_20_and_not_epoch_19():
    growth = AdaBatchGrowth(factor=2, every_epochs=20)
    assert batch_at(growth, 128, 19.9999) == 128
    assert batch_at(growth, 128, 20.0) == 256


def test_update_counts_of_the_paper_with_incomplete_batches_dropped():
    growth = AdaBatchGrowth(factor=2, every_epochs=20, max=2048)
    updates = sum(50_000 // batch_at(growth, 128, epoch) for epoch in range(100))
    assert updates == 15_080
    assert sum(50_000 // batch_at(NoGrowth(), 128, epoch) for epoch in range(100)) == 39_000
    assert sum(50_000 // 2048 for _ in range(100)) == 2_400


def test_max_caps_and_never_shrinks():
    growth = AdaBatchGrowth(factor=3, every_epochs=1, max=100)
    assert [batch_at(growth, 10, epoch) for epoch in range(5)] == [10, 30, 90, 100, 100]
    assert [(stage.start, stage.global_batch) for stage in stages_of(growth, 10, Clock(900, 50))] == [
        (0, 10), (1, 30), (2, 90), (3, 100),
    ]  # fmt: skip
    assert batch_at(AdaBatchGrowth(every_epochs=1, max=5), 10, 3) == 10


def test_factors_need_not_be_whole():
    growth = AdaBatchGrowth(factor=1.5, every_epochs=1)
    assert [batch_at(growth, 10, epoch) for epoch in range(4)] == [10, 15, 22, 34]


def test_growth_without_limit_does_not_overflow():
    assert batch_at(AdaBatchGrowth(factor=10, every_epochs=0.001), 10, 90) >= 2**62


@pytest.mark.parametrize("max_batch", [None, 2**70])
def test_growth_without_limit_ends_at_what_the_record_of_a_decision_holds(max_batch):
    growth = AdaBatchGrowth(factor=3, every_epochs=0.2, max=max_batch)
    assert [batch_at(growth, 32, epoch) for epoch in (7, 8, 30, 1e6)] == [
        32 * 3**35,
        2**62,
        2**62,
        2**62,
    ]


@pytest.mark.timeout(120)
def test_an_outline_of_a_growth_that_has_reached_its_end_is_finished():
    """Every later mark gives the same batch, for ever."""
    stages = stages_of(AdaBatchGrowth(factor=1e20, every_epochs=0.001), 32, Clock(1437, 120))
    assert [(stage.global_batch, stage.end) for stage in stages] == [(32, 32 / 1437), (2**62, 120)]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("factor", "every_epochs"),
    [(1 + 1e-7, 1e-5), (1 + 1e-12, 1e-10), (math.nextafter(1, 2), 1e-14)],
)
def test_marks_that_round_to_no_change_cost_no_time(factor, every_epochs):
    """Millions of them lie between two batches."""
    growth, clock = AdaBatchGrowth(factor=factor, every_epochs=every_epochs), Clock(200, 40)
    stages = stages_of(growth, 32, clock)
    assert len(stages) > 2
    for before, after in pairwise(stages):
        assert batch_at(growth, 32, after.start) == after.global_batch > before.global_batch
        last_start = round(after.start * clock.dataset_size) - before.global_batch
        assert batch_at(growth, 32, clock.epoch(last_start)) == before.global_batch


def stages_of(growth, initial, clock):
    return outline(clock, initial, initial, growth, LRSchedule(1))


@pytest.mark.parametrize("factor", [1, 0.5, 0, -2, math.nan, math.inf])
def test_a_factor_that_does_not_grow_is_refused(factor):
    with pytest.raises(ValueError, match="factor"):
        AdaBatchGrowth(factor=factor, every_epochs=1)


class TooLarge(NoGrowth):
    def next_batch(self, initial, current, epoch, measured):
        return 2**63


def test_a_batch_that_cannot_be_counted_is_told_with_the_limit():
    with pytest.raises(ValueError, match=f"must be a whole number of samples, at most {2**62}$"):
        TooLarge().checked_next_batch(64, 64, 0.0, {})
