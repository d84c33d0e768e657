"""The states that a model carries along lanes, against plain loops; any number of workers: tests/parallel/test_own_parts.py."""

import functools
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support.whole_runs import job_of, train
from torch import nn

from hvdlarge.comm.solo import SoloChannel, SoloCollectives
from hvdlarge.data.lanes import Lanes
from hvdlarge.exits import JobError
from hvdlarge.optim.precision import Precision
from hvdlarge.replica.carried import CarriedLanes, LaneStates, StateError, StateForm
from hvdlarge.schedule.batch import BatchLayout, MicroBatch
from hvdlarge.training import build

CPU = torch.device("cpu")


@pytest.mark.parametrize(("size", "number"), [(1, 1), (7, 1), (7, 7), (53, 31), (1000, 17)])
def test_an_epoch_visits_every_sample_once_each_lane_in_the_order_of_the_text(size, number):
    lanes = Lanes(size, number)
    indices, places = lanes.samples(0, size), lanes.positions(0, size)
    assert sorted(indices.tolist()) == list(range(size))
    assert (lanes.samples(size, 2 * size) == indices).all()
    assert (lanes.samples(3, size // 2) == indices[3 : size // 2]).all()
    for lane in range(number):
        own = indices[places.lanes == lane]
        assert (np.diff(own) == 1).all()
        assert places.begins[places.lanes == lane].tolist() == [True] + [False] * (len(own) - 1)
    # The lanes one after the other are the text
    assert indices[np.argsort(places.lanes, kind="stable")].tolist() == list(range(size))


def test_lanes_that_cannot_be_cut():
    for number in (0, 8):
        with pytest.raises(ValueError, match=f"7 samples cannot be cut into {number} lanes"):
            Lanes(7, number)


@pytest.mark.parametrize("world_size", [1, 2, 3, 64])
@pytest.mark.parametrize(("global_batch", "micro_batch"), [(1, 1), (10, 3), (8192, 64)])
def test_the_worker_of_each_sample(global_batch, micro_batch, world_size):
    layout = BatchLayout(global_batch, micro_batch, world_size)
    sizes = [sum(each.size for each in layout.of_rank(rank, 0)) for rank in range(world_size)]
    assert layout.samples_of_ranks() == sizes


def net():
    torch.manual_seed(1)
    return nn.ModuleList([nn.Embedding(7, 6), nn.LSTM(6, 4, 2, batch_first=True), nn.Linear(4, 7)])


def losses_of(parts, inputs, targets, state):
    outputs, state = parts[1](parts[0](inputs), state)
    loss = nn.functional.cross_entropy(parts[2](outputs).movedim(-1, 1), targets)
    return loss, tuple(part.detach() for part in state)


@pytest.mark.parametrize(("batch", "lanes"), [(4, 4), (3, 6), (2, 7)])
def test_a_run_is_that_of_a_plain_loop_over_streams(tmp_path, monkeypatch, batch, lanes):
    """22 windows: 4 lanes of 5 and 6 windows, 2 and a bit epochs; and less than a sample of each lane in a step."""
    monkeypatch.syspath_prepend(
        str(build.__file__).replace("hvdlarge/training/build.py", "tests/parallel")
    )
    changes = [
        f"data={{name: 'own_parts:windows', args: {{samples: 22}}, lanes: {lanes}}}",
        f"batch={{base: {batch}, micro: {batch}}}",
        *("epochs=2.5", "model.name=own_parts:Carrying", "lr.base=0.3", "evaluate.micro_batch=2"),
        *("optimizer={name: sgd, momentum: 0}", "log.every_steps=1"),
    ]
    job = job_of(changes)
    objective, _, _ = build.build_learning(job, Precision("fp64", CPU))
    model = objective.model
    parts = [model.embedding, model.lstm, model.last]
    (train_set, test_set), seen = build.load_data(job.data, job.seed), {}

    def step(numbers):
        where = [number % 22 for number in numbers]
        bounds = np.cumsum([0] + [22 // lanes + (lane < 22 % lanes) for lane in range(lanes)])
        indices = [bounds[p % lanes] + p // lanes for p in where]
        zero = torch.zeros(2, 4, dtype=torch.float64)
        states = [seen[p % lanes] if p >= lanes else (zero, zero) for p in where]
        state = tuple(torch.stack(kind, dim=1) for kind in zip(*states, strict=True))
        loss, after = losses_of(parts, train_set.inputs[indices], train_set.targets[indices], state)
        for number, p in enumerate(where):
            seen[p % lanes] = tuple(kind[:, number] for kind in after)
        loss.backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.3 * weight.grad
                weight.grad = None

    for start in range(0, 55, batch):
        step(range(start, min(start + batch, 55)))
    found = train(job, SoloChannel(), SoloCollectives(), tmp_path / "run")
    for name, value in model.state_dict().items():
        assert torch.allclose(found["model"][name], value, rtol=1e-12, atol=1e-14), name
    for lane, state in seen.items():
        saved = found["carried"]["carried.0"][lane], found["carried"]["carried.1"][lane]
        for ours, theirs in zip(saved, state, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)

    # The evaluation: each lane of the test text from its first window to its last
    total, bounds = 0.0, np.cumsum([0] + [70 // lanes + (k < 70 % lanes) for k in range(lanes)])
    with torch.no_grad():
        for begin, end in itertools.pairwise(bounds):
            state = None
            for index in range(begin, end):
                one = slice(index, index + 1)
                loss, state = losses_of(parts, test_set.inputs[one], test_set.targets[one], state)
                total += loss.item()
    assert found["state"]["results"]["test_loss"] == pytest.approx(total / 70, rel=1e-12)


def form_of(size=3):
    """The state of an LSTM and a number for each sample."""

    def state(n):
        return {"layers": [(torch.zeros(2, n, 4), torch.zeros(2, n, 4))], "count": torch.zeros(n)}

    return StateForm.of(state(size), state(2 * size), size), state


def test_states_of_any_form_come_back_as_they_were():
    form, state = form_of()
    states = LaneStates(Lanes(10, 5), form)
    assert [tuple(each.shape) for each in states.tensors] == [(5, 2, 4), (5, 2, 4), (5,)]
    written = state(2)
    for value in (*written["layers"][0], written["count"]):
        value.copy_(torch.randn(value.shape))
    states.window(MicroBatch(0, 1, 3)).after(written)
    states.accept()
    read = states.window(MicroBatch(0, 6, 8)).before()
    assert torch.equal(read["layers"][0][1], written["layers"][0][1])
    assert torch.equal(read["count"], written["count"])
    assert isinstance(read["layers"], list)
    assert isinstance(read["layers"][0], tuple)
    # In the next epoch they begin anew, and other lanes have never begun
    for start in (11, 8):
        assert not states.window(MicroBatch(0, start, start + 2)).before()["count"].any()


def test_a_lane_that_occurs_twice_keeps_its_later_state():
    """7 samples in 4 lanes: samples 6, 7, 8, 9, 10 are in lanes 2, 0, 1, 2, 3."""
    form, _ = form_of()
    states = LaneStates(Lanes(7, 4), form)
    rows = [torch.full((4, 2, 4), 0.0), torch.full((4, 2, 4), 0.0), torch.tensor([6.0, 7, 8, 9])]
    after = form.state(rows)
    states.window(MicroBatch(0, 6, 10)).after(after)
    states.accept()
    assert states.tensors[2].tolist() == [7, 8, 9, 0]


def test_a_step_that_is_skipped_leaves_the_states_but_for_lanes_that_it_began():
    """8 samples in 4 lanes: samples 8 and 9 begin lanes 0 and 1 anew."""
    form, _ = form_of()
    states = LaneStates(Lanes(8, 4), form)
    carried = CarriedLanes(states, 0, 1, None)

    def step(start, size, value, applied):
        carried.begin_step(BatchLayout(size, size, 1), start)
        window = carried.window(MicroBatch(0, start, start + size))
        rows = [torch.ones(size, 2, 4), torch.ones(size, 2, 4), torch.full((size,), value)]
        window.after(form.state(rows))
        carried.end_step(applied)
        return states.tensors[2].tolist()

    assert step(0, 4, 1.0, True) == [1, 1, 1, 1]
    assert step(4, 2, 2.0, False) == [1, 1, 1, 1]
    assert step(6, 4, 3.0, False) == [0, 0, 1, 1]
    assert step(10, 2, 4.0, True) == [0, 0, 4, 4]


def test_states_are_kept_as_they_were_when_they_were_returned():
    """A model may use the memory of a state again."""
    form, state = form_of()
    states = LaneStates(Lanes(10, 5), form)
    returned = state(2)
    returned["count"].fill_(1.0)
    states.window(MicroBatch(0, 0, 2)).after(returned)
    returned["count"].fill_(2.0)
    states.accept()
    assert states.tensors[2].tolist() == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    ("batch", "lanes", "changes_hands"),
    [(6, 6, False), (2, 6, False), (4, 6, True), (3, 5, True)],
)
def test_states_are_shared_only_where_a_lane_changes_hands(size, batch, lanes, changes_hands):
    """Ranks are threads."""
    form, _ = form_of()
    barrier, slots, shared = threading.Barrier(size, timeout=60), [None] * size, []

    def sum_ranks(rank, bits, name):
        slots[rank] = bits
        barrier.wait()
        total = sum(slots)
        barrier.wait()
        if name == "carried.2" and rank == 0:
            shared.append(name)
        return total

    def run(rank):
        states = LaneStates(Lanes(30, lanes), form)
        carried = CarriedLanes(states, rank, size, functools.partial(sum_ranks, rank))
        newest = np.zeros(lanes)
        for start in range(0, 60, batch):
            layout = BatchLayout(batch, 1, size)
            carried.begin_step(layout, start)
            for each in layout.of_rank(rank, start):
                position = each.start % 30
                expected = 0 if position < lanes else newest[position % lanes]
                window = carried.window(each)
                assert window.before()["count"].item() == expected
                others = [torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)]
                window.after(form.state([*others, torch.full((1,), -float(each.start))]))
            carried.end_step(True)
            for sample in range(start, start + batch):
                newest[sample % 30 % lanes] = -float(sample)
        carried.share()
        return torch.signbit(states.tensors[2]).tolist()  # −0.0 too, of sample 0

    with ThreadPoolExecutor(size) as pool:
        signs = list(pool.map(run, range(size)))
    assert signs == [[True] * lanes] * size
    assert (len(shared) > 1) == (size > 1 and changes_hands)  # once at the end


@pytest.mark.parametrize(
    ("state", "twice", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 2), "one dimension for the samples"),
        (torch.zeros(3, 3), torch.zeros(6, 6), "one dimension for the samples"),
        (torch.zeros(3, 2), torch.zeros(6, 4), "one dimension for the samples"),
        (torch.zeros(3).long(), torch.zeros(6).long(), "torch.int64, and must be of real numbers"),
        ([torch.zeros(3), 5], [torch.zeros(6), 5], "holds 5, which is no tensor"),
        ([], [], "this state is empty"),
        ([torch.zeros(3)], [torch.zeros(6)] * 2, "has 1 tensors, of 6 samples 2"),
    ],
)  # fmt: skip
def test_a_state_that_cannot_be_carried(state, twice, message):
    with pytest.raises(StateError, match=message):
        StateForm.of(state, twice, 3)


def test_a_state_that_changes_its_form():
    form, state = form_of()
    window = LaneStates(Lanes(10, 5), form).window(MicroBatch(0, 0, 3))
    for changed in (state(2), {"layers": []}, {**state(3), "count": 7}):
        with pytest.raises(StateError, match="the state (of 3 samples was|had 3 tensors)"):
            window.after(changed)


def test_more_samples_than_lanes_in_a_step_end_the_run():
    """A growth by measurement may ask for them; others are refused before the run."""
    form, _ = form_of()
    carried = CarriedLanes(LaneStates(Lanes(20, 5), form), 0, 1, None)
    with pytest.raises(JobError, match="data.lanes: the global batch has grown to 6 samples"):
        carried.begin_step(BatchLayout(6, 3, 1), 0)


def test_a_rollback_returns_to_the_states_of_the_checkpoint():
    form, _ = form_of()
    carried = CarriedLanes(LaneStates(Lanes(20, 4), form), 0, 1, None)

    def step(start, value):
        carried.begin_step(BatchLayout(4, 4, 1), start)
        rows = [torch.full((4, 2, 4), value), torch.full((4, 2, 4), value), torch.full((4,), value)]
        carried.window(MicroBatch(0, start, start + 4)).after(form.state(rows))
        carried.end_step(True)

    step(0, 1.5)
    saved = {name: tensor.clone() for name, tensor in carried.named_tensors().items()}
    step(4, 2.5)
    carried.restore(saved)
    assert all((tensor == 1.5).all() for tensor in carried.named_tensors().values())
    carried.restore(None)
    assert not any(tensor.any() for tensor in carried.named_tensors().values())
