from itertools import pairwise

import pytest

from hvdlarge.schedule.batch import BatchLayout

CASES = [
    (32, 16, 2),
    (100, 16, 3),
    (1, 1, 1),
    (5, 64, 4),
    (8192, 64, 64),
    (203, 8, 7),
    (10, 3, 16),
    (17, 5, 2),
]


@pytest.mark.parametrize(("global_batch", "micro_batch", "world_size"), CASES)
def test_the_identity_holds_and_every_sample_is_dealt_once(global_batch, micro_batch, world_size):
    layout = BatchLayout(global_batch, micro_batch, world_size)
    dealt = [layout.of_rank(rank, start=1000) for rank in range(world_size)]
    assert sum(micro.size for rank in dealt for micro in rank) == global_batch
    flat = [micro for rank in dealt for micro in rank]
    assert [micro.number for micro in flat] == list(range(layout.num_micro_batches))
    assert flat[0].start == 1000
    assert flat[-1].stop == 1000 + global_batch
    assert all(before.stop == after.start for before, after in pairwise(flat))
    counts = [len(rank) for rank in dealt]
    assert max(counts) == layout.accumulation_steps
    assert max(counts) - min(counts) <= 1
    assert counts.count(0) == layout.idle_workers


@pytest.mark.parametrize(("global_batch", "micro_batch", "world_size"), CASES)
def test_micro_batches_do_not_depend_on_the_world(global_batch, micro_batch, world_size):
    alone = BatchLayout(global_batch, micro_batch, 1).of_rank(0, start=7)
    layout = BatchLayout(global_batch, micro_batch, world_size)
    assert [micro for rank in range(world_size) for micro in layout.of_rank(rank, start=7)] == alone


def test_the_equation_is_arithmetic():
    assert BatchLayout(8192, 64, 64).equation() == "8192 = 64 × 2 × 64"
    assert BatchLayout(100, 16, 3).equation() == "100 = 16 × 6 + 4, dealt 3+2×2 to 3 workers"
    assert BatchLayout(32, 16, 16).equation() == "32 = 16 × 2, dealt 1×2 to 16 workers"
    assert BatchLayout(100, 10, 4).equation() == "100 = 10 × 10, dealt 3×2+2×2 to 4 workers"
    assert BatchLayout(10, 16, 2).equation() == "10 = 10, dealt 1 to 2 workers"


def test_a_world_of_any_size_is_planned_at_once():
    layout = BatchLayout(8192, 64, 10**9)
    assert layout.equation() == "8192 = 64 × 128, dealt 1×128 to 1000000000 workers"


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        BatchLayout(*sizes)
