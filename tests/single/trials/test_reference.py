"""The plain loop beside the engine: its updates by hand, its reading of data sets, and that the two agree on a whole job."""

import json

import pytest
import torch

from hvdlarge.config.job_file import parse_job
from hvdlarge.data.in_memory import InMemory
from trials import blocks, engine, judge, reference

SMALL = {
    "name": "small",
    "epochs": 2,
    "precision": "fp64",
    "reduction": "fast",
    "data": {
        "name": "trials.blocks:data",
        "args": {"kind": "listed", "samples": 11, "test_samples": 5, "source": "all"},
    },
    "model": {
        "name": "trials.blocks:model",
        "args": {"blocks": [{"kind": "linear"}, {"kind": "batch_norm"}, {"kind": "dropout"}]},
    },
    "loss": {"name": "trials.blocks:loss", "args": {"kind": "cross_entropy"}},
    "batch": {"base": 6, "micro": 2},
    "lr": {"base": 2.0},
    "optimizer": {"name": "lars", "weight_decay": 0.01},
    "checkpoint": {"every_steps": 2},
    "gradients": {},
}
CASE = {
    "job": SMALL,
    "workers": 3,
    "seed": 1,
    "interruptions": [{"how": "kill", "at": 0.6, "by_rank": 0, "workers": 3}],
}


def options(optimizer):
    return parse_job(json.dumps(SMALL | {"optimizer": optimizer}), "job.yaml")


def moved(optimizer, grads, lr=0.5, apart=()):
    """The weight (3, 4) after updates with these gradients, in their order."""
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    job = options(optimizer)
    update = reference.TEXTBOOK[job.optimizer.name](job, {"w": weight}, set(apart))
    for grad in grads:
        update({"w": torch.tensor(grad, dtype=torch.float64)}, lr)
    return weight.tolist()


def test_lars_by_hand():
    # ‖w‖ = 5, ‖g‖ = 1, η = 0.001: λ = 0.005 without decay.
    assert moved({"name": "lars"}, [[0.6, 0.8]], lr=2.0) == pytest.approx(
        [3 - 2 * 0.005 * 0.6, 4 - 2 * 0.005 * 0.8], rel=1e-14
    )
    ratio = 0.001 * 5 / (1 + 0.1 * 5)
    expected = [3 - 2 * ratio * (0.6 + 0.3), 4 - 2 * ratio * (0.8 + 0.4)]
    assert moved({"name": "lars", "weight_decay": 0.1}, [[0.6, 0.8]], lr=2.0) == pytest.approx(
        expected, rel=1e-14
    )
    joint = [3 - 2 * 0.001 * 5 / 1.5 * 0.9, 4 - 2 * 0.001 * 5 / 1.5 * 1.2]
    assert moved(
        {"name": "lars", "preset": "optax", "weight_decay": 0.1}, [[0.6, 0.8]], lr=2.0
    ) == pytest.approx(joint, rel=1e-14)
    assert moved({"name": "lars"}, [[0.6, 0.8]], lr=2.0, apart=["w"]) == pytest.approx(
        [3 - 1.2, 4 - 1.6], rel=1e-14
    )


def test_momentum_goes_on():
    plain = moved({"name": "lars"}, [[0.6, 0.8], [0.6, 0.8]], lr=2.0, apart=["w"])
    assert plain == pytest.approx(
        [3 - 1.2 - (1.2 * 0.9 + 1.2), 4 - 1.6 - (1.6 * 0.9 + 1.6)], rel=1e-14
    )
    assert moved(
        {"name": "sgd", "momentum": 0.9}, [[0.6, 0.8], [0.6, 0.8]], lr=2.0
    ) == pytest.approx(plain, rel=1e-14)


def test_lamb_by_hand():
    # The first direction is the gradient's sign (ε aside): ‖r‖ = √2.
    found = moved({"name": "lamb", "eps": 1e-30}, [[0.6, 0.8]])
    assert found == pytest.approx([3 - 0.5 * 5 / 2**0.5, 4 - 0.5 * 5 / 2**0.5], rel=1e-12)


@pytest.mark.parametrize("name", ["adam", "adamw", "adagrad", "rmsprop"])
def test_torchs_own_classes_move_the_other_way_of_the_gradient(name):
    found = moved({"name": name}, [[0.6, -0.8]], lr=0.01)
    assert found[0] < 3 < 4 < found[1]


def test_clipping_and_gradients_that_are_zero():
    grads = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0]), "c": torch.zeros(2)}
    assert {name: grad.tolist() for name, grad in reference.clipped(grads, 2.5).items()} == {
        "a": [1.5],
        "b": [2.0],
    }
    assert {name: grad.tolist() for name, grad in reference.clipped(grads, None).items()} == {
        "a": [3.0],
        "b": [4.0],
    }


KEYS = [11, 12, 13]


def drawn(key, source):
    reference.seed_all(key)
    return 0.2 * blocks.drawn(source, torch.zeros(2))


@pytest.mark.parametrize("source", ["torch", "numpy", "random", "all"])
def test_each_sample_is_drawn_under_its_own_key(source):
    base = InMemory(torch.arange(10.0).reshape(5, 2), torch.arange(5))
    inputs, targets = reference.fetch(blocks.Listed(base, source), [4, 0, 2], KEYS)
    assert targets.tolist() == [4, 0, 2]
    for row, index, key in zip(inputs, [4, 0, 2], KEYS, strict=True):
        assert torch.equal(row, base.inputs[index] + drawn(key, source))


def test_the_way_to_many_samples_is_taken_where_the_sets_own_class_has_it():
    base = InMemory(torch.arange(10.0).reshape(5, 2), torch.arange(5))
    many, _ = reference.fetch(blocks.ListedMany(base, "numpy"), [4, 0], KEYS[:2])
    reference.seed_all(KEYS[0])
    shift = 0.2 * blocks.drawn("numpy", torch.zeros(1))
    assert torch.equal(many, base.inputs[[4, 0]] + shift)
    own, _ = reference.fetch(blocks.OwnItem(base), [4, 0], KEYS[:2])
    assert torch.allclose(
        own, 0.7 * base.inputs[[4, 0]] + 0.3
    )  # not by InMemory.batch, which would pass it over
    wrapped, _ = reference.fetch(blocks.Delegating(blocks.ListedMany(base)), [4, 0], KEYS[:2])
    assert torch.allclose(
        wrapped, 0.7 * base.inputs[[4, 0]] + 0.3
    )  # not by the inner set's way to many


def test_a_subset_is_looked_through_and_a_class_below_it_is_not():
    base = InMemory(torch.arange(10.0).reshape(5, 2), torch.arange(5))
    chosen = torch.utils.data.Subset(torch.utils.data.Subset(base, [3, 1, 0]), [2, 0])
    assert reference.fetch(chosen, [0, 1], KEYS[:2])[1].tolist() == [0, 3]
    below = blocks.TransformedMany(base)
    inputs, targets = reference.fetch(below, [0], KEYS[:1])
    assert torch.allclose(inputs, 0.7 * base.inputs[targets] + 0.3)


def test_types():
    wide, narrow = reference.type_of, torch.float32
    assert [wide(kind, "fp64") for kind in (torch.bfloat16, torch.float32, torch.complex64, torch.int64)] == [
        torch.float64, torch.float64, torch.complex128, torch.int64,
    ]  # fmt: skip
    assert [wide(kind, "fp32") for kind in (torch.bfloat16, torch.float64, torch.complex64, torch.bool)] == [
        narrow, torch.float64, torch.complex64, torch.bool,
    ]  # fmt: skip


def test_a_step_that_is_not_finite_is_skipped_or_ends_the_loop():
    poisoned = SMALL | {
        "data": {
            "name": "trials.blocks:data",
            "args": {"kind": "in_memory", "samples": 11, "poisoned": 3},
        }
    }
    learnt = reference.train(
        parse_job(json.dumps(poisoned | {"on_nonfinite": {"policy": "skip"}}), "job.yaml")
    )
    assert all(torch.isfinite(value).all() for value in learnt.model.values())
    with pytest.raises(FloatingPointError):
        reference.train(parse_job(json.dumps(poisoned), "job.yaml"))


# --- that the judge sees what is wrong: the engine, broken on purpose


@pytest.fixture
def judged(tmp_path):
    numbers = iter(range(9))

    def verdict(**changes):
        place = tmp_path / str(next(numbers))
        place.mkdir()
        return judge.judge(CASE | changes, place)

    return verdict


def test_a_sound_job_holds_all_laws(judged):
    verdict = judged()
    assert (verdict.kind, verdict.laws) == ("held", ["0 reference", "1 world", "2 resume"])
    verdict = judged(job=SMALL | {"reduction": "exact"}, workers=2)
    assert (verdict.kind, verdict.laws) == (
        "held",
        ["0 reference", "1 world", "3 exact", "2 resume"],
    )


def test_draws_that_nobody_seeds_are_seen(judged, monkeypatch):
    monkeypatch.setattr("hvdlarge.training.step.seed_all", torch.manual_seed)
    noisy = SMALL | {
        "model": {
            "name": "trials.blocks:model",
            "args": {"blocks": [{"kind": "noise", "source": "numpy"}]},
        }
    }
    assert "law 0" in judged(job=noisy).reason


def test_a_transform_that_is_passed_over_is_seen(judged, monkeypatch):
    monkeypatch.setattr(
        "hvdlarge.data.loader.reads_batches", lambda dataset: isinstance(dataset, InMemory)
    )
    own = SMALL | {
        "data": {"name": "trials.blocks:data", "args": {"kind": "own_item", "samples": 11}}
    }
    assert "law 0" in judged(job=own).reason


def test_running_statistics_of_one_rank_are_seen(judged, monkeypatch):
    def begin_from_where_they_are(statistics):
        statistics._parts = [torch.zeros_like(buffer) for buffer in statistics._buffers()]

    monkeypatch.setattr(
        "hvdlarge.reduction.batch_norm.RunningStatistics.begin_step", begin_from_where_they_are
    )
    assert "running_mean differs" in judged().reason


def test_gradients_that_are_weighed_by_worker_are_seen(judged, monkeypatch):
    from trials.thread_world import ThreadOptimizer

    plain = ThreadOptimizer._of
    monkeypatch.setattr(
        ThreadOptimizer, "_of", lambda self, weight: plain(self, weight) * (1 + 1e-6)
    )
    assert "law 1" in judged(interruptions=[]).reason


def test_a_momentum_that_is_not_saved_is_seen(judged, monkeypatch):
    monkeypatch.setattr("hvdlarge.checkpoint.saver.optimizer_state", lambda replica: {})
    stopped = [{"how": "stop", "at": 0.5, "by_rank": 1, "workers": 2}]
    assert "law 2" in judged(interruptions=stopped).reason


def test_a_rank_that_calls_less_is_seen(judged, monkeypatch):
    from hvdlarge.training import loop

    plain = loop.compare_states
    monkeypatch.setattr(
        loop,
        "compare_states",
        lambda control, replica: control.rank == 1 or plain(control, replica),
    )
    verdict = judged()  # its next message matches another of the same kind: the calls do not match, or a rank cannot parse what it receives
    assert verdict.kind == "violation"
    assert "do not match" in verdict.reason or "exit code 70" in verdict.reason


def test_a_sum_in_another_order_is_seen_in_exact_mode(judged, monkeypatch):
    from hvdlarge.reduction import tree

    monkeypatch.setattr(
        tree,
        "combine",
        lambda values, add: sum(value for value in reversed(values) if value is not None),
    )
    verdict = judged(
        job=SMALL | {"reduction": "exact", "batch": {"base": 7, "micro": 1}},
        workers=4,
        interruptions=[],
    )
    assert "law 3" in verdict.reason


def test_an_error_of_one_rank_is_seen(judged, monkeypatch):
    from hvdlarge.training import step

    plain = step.train_step

    def train_step(decision, layout, fetched, replica, *rest):
        assert not (replica.rank == 2 and decision.step == 1)
        return plain(decision, layout, fetched, replica, *rest)

    monkeypatch.setattr("hvdlarge.training.loop.train_step", train_step)
    assert judged().reason.startswith("exit code 70 on 3 workers: AssertionError")


def test_a_sound_job_that_is_refused_is_seen(judged, monkeypatch):
    from hvdlarge.exits import JobError

    def refuse(*given, **more):
        raise JobError("model.name: no")

    monkeypatch.setattr("hvdlarge.training.build.build_learning", refuse)
    assert judged().reason == "a sound job is refused: model.name: no"


def test_rounding_of_a_chaotic_job_is_no_violation(judged, monkeypatch):
    trial = judge._Trial(CASE, None, None)
    trial._amplified = 1e-6
    one, other = {"w": torch.ones(2)}, {"w": torch.ones(2) * (1 + 1e-5)}
    trial.check_close(one, other, 1e-9)
    assert trial.chaotic
    trial._amplified = 1e-9
    with pytest.raises(judge.Broken, match="w differs by 1.0e-05"):
        trial.check_close(one, other, 1e-9)


def test_a_last_bit_is_moved_in_every_weight(tmp_path):
    plain = blocks.model([{"kind": "linear"}])
    torch.manual_seed(0)
    try:
        blocks.nudged = "fp64"
        torch.manual_seed(0)
        moved_model = blocks.model([{"kind": "linear"}])
    finally:
        blocks.nudged = None
    torch.manual_seed(0)
    plain = blocks.model([{"kind": "linear"}])
    for ours, theirs in zip(moved_model.parameters(), plain.parameters(), strict=True):
        away = (ours - theirs.double()).abs()
        assert 0 < away.max() < 1e-15
        assert away.count_nonzero() == 1


def test_settings_of_the_process_are_as_before(tmp_path):
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    outcome = engine.train(SMALL | {"deterministic": True}, tmp_path / "run", 2)
    assert outcome.code == 0
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (
        threads,
        deterministic,
    )
