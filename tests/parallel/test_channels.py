import array

import pytest
import torch

from hvdlarge.comm.rank_checks import check_equal_across_ranks, raise_on_all_ranks
from hvdlarge.exits import CheckpointWriteError, JobError, RanksDisagreeError, RunExit


def test_every_rank_hears_rank_0(control):
    for length in (1, 61, 5000):
        record = bytes(number % 251 for number in range(length))
        assert control.broadcast(record if control.rank == 0 else None, length) == record


def test_every_rank_hears_every_rank_also_what_is_empty(control):
    for factor in (0, 1, 1000):
        messages = [bytes([rank]) * (rank * factor) for rank in range(control.size)]
        assert control.allgather(messages[control.rank]) == messages


def test_sums_and_broadcasts_of_every_type(control, tensors):
    rank, size = control.rank, control.size
    total = size * (size + 1) / 2
    for dtype in (torch.float32, torch.float64, torch.int64):
        found = tensors.sum(torch.full((3, 2), rank + 1, dtype=dtype), f"test.{dtype}")
        assert torch.equal(found, torch.full((3, 2), total, dtype=dtype))
    for dtype in (
        torch.float32,
        torch.float64,
        torch.int64,
        torch.bool,
        torch.bfloat16,
        torch.float16,
        torch.uint8,
    ):
        whole = torch.tensor([[1, 0], [1, 1]]).to(dtype)
        mine = whole.clone() if rank == 0 else torch.zeros_like(whole)
        tensors.broadcast_([("matrix", mine)])
        assert torch.equal(mine, whole)
    scalar = torch.tensor(7 if rank == 0 else 0)
    tensors.broadcast_([("scalar", scalar)])
    assert scalar.item() == 7


def test_what_fails_on_one_rank_is_raised_on_all(control):
    if control.size == 1:
        pytest.skip("one rank is all ranks")

    def action():
        if control.rank == control.size - 1:
            raise CheckpointWriteError("the disk of this one is full")
        return 5

    with pytest.raises(RunExit, match=f"on rank {control.size - 1}: the disk") as raised:
        raise_on_all_ranks(control, action)
    assert raised.value.code == 74

    def wrong():
        raise JobError("the same everywhere")

    with pytest.raises(RunExit, match="^the same everywhere$"):
        raise_on_all_ranks(control, wrong)
    assert raise_on_all_ranks(control, lambda: control.rank) == control.rank


def test_a_difference_between_ranks_is_named_on_all(control):
    if control.size == 1:
        pytest.skip("one rank agrees with itself")
    check_equal_across_ranks(control, {"a": 1, "b": {"c": [1, 2]}}, "job")
    with pytest.raises(
        RanksDisagreeError,
        match=f"same job: batch.max is 512 on rank 0 and 256 on rank {control.size - 1}",
    ):
        check_equal_across_ranks(
            control,
            {"name": "x", "batch": {"max": 256 if control.rank == control.size - 1 else 512}},
            "job",
        )


def test_the_largest_of_each_number_whatever_happens_to_the_memory_meanwhile(control):
    for number in range(500):
        wait = control.start_max(
            [float(control.rank), -float(control.rank), float(number), *[1.0] * 18]
        )
        litter = [
            array.array("d", [9e9] * 21) for _ in range(5)
        ]  # takes any freed memory of the message's size
        assert wait() == [control.size - 1.0, 0.0, float(number), *[1.0] * 18]
        assert all(piece[0] == 9e9 for piece in litter)
