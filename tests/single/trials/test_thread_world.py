"""The world of threads: what it carries, and what it notices at once where processes would hang."""

import random

import numpy as np
import pytest
import torch

from hvdlarge.optim.torch_optimizers import SGD
from trials.thread_world import World, run_single, run_world

SIZES = [2, 3, 4]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(5))
def test_collective_calls_give_what_the_channels_promise(size, seed):
    def action(control, tensors):
        assert control.broadcast(b"abc" if control.rank == 0 else None, 3) == b"abc"
        assert control.allgather(bytes([control.rank])) == [bytes([rank]) for rank in range(size)]
        wait = control.start_max([control.rank, -control.rank])
        assert tensors.sum(torch.tensor([1.0, control.rank]), "a").tolist() == [
            size,
            sum(range(size)),
        ]
        assert wait() == [size - 1, 0]
        assert tensors.gather(torch.tensor([control.rank]), "b").tolist() == [
            [rank] for rank in range(size)
        ]
        held = torch.full((2,), float(control.rank + 5))
        tensors.broadcast_([("c", held)])
        assert held.tolist() == [5, 5]
        control.barrier()
        return control.rank

    ends = World(size, seed).run(action)
    assert (ends.results, ends.error, ends.broken, ends.killed) == (
        list(range(size)),
        None,
        None,
        False,
    )
    assert ends.calls == 7 * size - size + size  # each of the seven on each rank


def test_nobody_sees_what_another_rank_does_to_a_tensor_afterwards():
    def action(control, tensors):
        mine = torch.ones(2)
        total = tensors.sum(mine, "a")
        mine.fill_(7)
        total.fill_(9)
        control.barrier()
        return tensors.sum(torch.ones(2), "b").tolist(), total.tolist()

    assert World(3).run(action).results == [([3, 3], [9, 9])] * 3


def test_one_rank_runs_at_a_time_and_its_turn_is_drawn():
    orders = set()
    for seed in range(20):
        order = []

        def action(control, tensors, order=order):
            for _ in range(3):
                order.append(control.rank)
                control.barrier()
                order.append(control.rank)

        World(3, seed).run(action)
        orders.add(tuple(order))
        again = []
        World(3, seed).run(lambda control, tensors, again=again: action(control, tensors, again))
        assert again == order
    assert len(orders) > 10


def test_every_rank_has_random_generators_of_its_own():
    def action(control, tensors):
        drawn = []
        torch.manual_seed(7)
        for _ in range(4):
            drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))
            control.barrier()
        return drawn

    random.seed(3)
    before = random.getstate()
    first, second, third = World(3, seed=1).run(action).results
    assert random.getstate() == before
    assert (
        [value for value, _, _ in first]
        == [value for value, _, _ in second]
        == [value for value, _, _ in third]
    )
    for place in (1, 2):
        assert len({row[place] for rows in (first, second, third) for row in rows}) == 12
    assert World(3, seed=2).run(action).results[0][0][1:] != first[0][1:]


@pytest.mark.parametrize(
    ("calls", "told"),
    [
        (lambda c, t: c.barrier() if c.rank else c.allgather(b""), "'barrier'.*'allgather'|'allgather'.*'barrier'"),
        (lambda c, t: t.sum(torch.ones(2), f"name {c.rank}"), "name 0.*name 1|name 1.*name 0"),
        (lambda c, t: t.sum(torch.ones(2 + c.rank), "a"), r"\(3,\)"),
        (lambda c, t: t.sum(torch.ones(2, dtype=torch.float64 if c.rank else torch.float32), "a"), "float64"),
        (lambda c, t: c.start_max([0.0] * (1 + c.rank)), "start_max"),
        (lambda c, t: t.broadcast_([("a", torch.ones(1))] * (1 + c.rank)), "broadcast_"),
        (lambda c, t: c.barrier() if c.rank else t.sum(torch.ones(1), "a"), "deadlock: rank 0 waits in .*sum.*rank 1 waits in .*barrier"),
        (lambda c, t: c.barrier() if c.rank else None, "deadlock: rank 0 has exited, rank 1 waits in .*barrier"),
    ],
)  # fmt: skip
def test_calls_that_do_not_fit_together_are_told_at_once(calls, told):
    import re

    for seed in range(6):
        ends = World(2, seed).run(calls)
        assert ends.broken is not None
        assert re.search(told, ends.broken), ends.broken


def test_what_one_rank_raises_ends_the_others():
    def action(control, tensors):
        control.barrier()
        if control.rank == 1:
            raise LookupError("mine")
        try:
            control.barrier()
        except Exception:
            return "swallowed"
        return "came through"

    ends = World(3).run(action)
    rank, error = ends.error
    assert (rank, str(error), ends.results) == (1, "mine", [None, None, None])


def test_a_world_can_be_killed_at_each_of_its_calls():
    def action(control, tensors):
        for _ in range(3):
            control.barrier()
        return "whole"

    for size in (1, 2, 3):
        calls = run_world(
            size, action if size > 1 else lambda c, t: [c.allgather(b"") for _ in range(3)]
        ).calls
        assert calls == 3 * size
        for at in range(calls):
            ends = run_world(
                size,
                action if size > 1 else lambda c, t: [c.allgather(b"") for _ in range(3)],
                kill_at=at,
            )
            assert (ends.killed, ends.results, ends.calls) == (True, [None] * size, at)


def test_a_lone_worker_keeps_the_process_as_it_was():
    np.random.seed(4)
    before = np.random.get_state()[1].tolist()
    first, again, other = (
        run_single(lambda c, t: np.random.rand(), seed).results for seed in (1, 1, 2)
    )
    assert first == again != other
    assert np.random.get_state()[1].tolist() == before
    rank, error = run_single(lambda c, t: 1 / 0).error
    assert (rank, type(error)) == (0, ZeroDivisionError)


# --- the sum of gradients, with Horovod's ways


def two_weights():
    return [("b", torch.nn.Parameter(torch.ones(2))), ("a", torch.nn.Parameter(torch.ones(3)))]


def updated(size, backward, passes=1, **options):
    """Let each rank do its backward passes and apply them; the gradients and weights of each."""

    def action(control, tensors):
        named = two_weights()
        update = tensors.distributed_optimizer(
            SGD([{"params": [weight for _, weight in named]}], lr=1.0), named, **options
        )
        update.zero_grad(range(passes), passes * size)
        for number in range(passes):
            backward(control.rank, number, update, *(weight for _, weight in named))
            update.backward_done()
        update.synchronize()
        grads = {name: weight.grad.tolist() for name, weight in named}
        update.apply(update.optimizer.measure(), 1.0)
        return grads, {name: weight.tolist() for name, weight in named}

    return World(size).run(action)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options", [{}, {"groups": 1}, {"groups": 9}, {"compressed": True}], ids=str
)
def test_gradients_are_summed_and_missing_ones_are_zeros(size, options):
    def backward(rank, number, update, b, a):
        update.backward((b * (rank + 1)).sum() + ((a * 2).sum() if rank == 0 else 0))

    ends = updated(size, backward, **options)
    total = float(sum(range(1, size + 1)))
    grads = {"b": [total] * 2, "a": [2.0] * 3}
    assert ends.results == [(grads, {"b": [1 - total] * 2, "a": [-1.0] * 3})] * size


def test_a_parameter_that_no_rank_used_has_a_gradient_of_zeros_all_the_same():
    grads, weights = updated(
        2, lambda rank, number, update, b, a: update.backward(b.sum())
    ).results[1]
    assert grads["a"] == [0.0] * 3
    assert weights["a"] == [1.0] * 3


def test_one_backward_pass_too_many_is_an_error_as_with_horovod():
    def backward(rank, number, update, b, a):
        update.backward((a + b.sum()).sum())
        if rank == 1:
            update.backward(b.sum())

    rank, error = updated(2, backward).error
    assert rank == 1
    assert "more than backward_passes_per_step" in str(error)


def test_passes_add_up_before_they_travel():
    def backward(rank, number, update, b, a):
        if number == 0 or rank == 0:
            b.sum().backward()
        a.sum().backward()

    grads, _ = updated(2, backward, passes=2).results[0]
    assert grads == {"b": [3.0] * 2, "a": [4.0] * 3}


def test_ranks_with_gradients_of_other_kinds_are_told():
    def action(control, tensors):
        weight = torch.nn.Parameter(torch.ones(2 + control.rank))
        update = tensors.distributed_optimizer(SGD([weight], lr=1.0), [("a", weight)])
        update.zero_grad(range(1), 2)
        update.synchronize()

    assert "'a', (3,)" in World(2).run(action).broken


def test_an_optimizer_is_made_anew_from_its_groups():
    def action(control, tensors):
        named = two_weights()
        groups = [{"params": [named[0][1]], "lr": 0.5}, {"params": [named[1][1]], "lr": 2.0}]
        plain = SGD(groups, lr=1.0)
        plain.kept = "lost"
        update = tensors.distributed_optimizer(plain, named)
        return [group["lr"] for group in update.optimizer.param_groups], hasattr(
            update.optimizer, "kept"
        )

    assert World(2).run(action).results == [([0.5, 2.0], False)] * 2
