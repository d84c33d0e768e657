"""The laws hold for models, data sets and losses as people write them, or the job is refused before its first step.

Whole runs through the door that `train` uses, with run folders and checkpoints, on this world and on one worker.
"""

import re

import pytest
import torch
from support.comparing import distance, read_lines
from support.whole_runs import alone, job_of, train, worlds

from hvdlarge.comm.solo import SoloChannel, SoloCollectives
from hvdlarge.exits import DIVERGED, JobError, RanksDisagreeError, RunExit, Stopped

SOUND = {
    "a subset with a transform": ["data={name: 'own_parts:subset'}"],
    "a wrapper that delegates": ["data={name: 'own_parts:subset', args: {kind: Delegating}}"],
    "tensors with an augmentation of their own": [
        "data={name: 'own_parts:tensor_set', args: {kind: AugmentedTensors}}"
    ],
    "tensors whose batches draw": [
        "data={name: 'own_parts:tensor_set', args: {kind: NoisyTensors}}"
    ],
    "an augmentation that draws from three generators": ["data={name: 'own_parts:augmented'}"],
    "transformed images": [
        "data={name: 'own_parts:images', transforms: [{name: random_crop, padding: 2}, {name: random_flip}, "
        "{name: random_resized_crop, size: 6}, {name: normalize, mean: [0.5, 0.5, 0.5], std: [0.3, 0.3, 0.3]}]}",
        "model.name=own_parts:Seeing",
    ],
    "mixed images": [
        "data={name: 'own_parts:images', transforms: [{name: mixup, classes: 3, alpha: 0.5}]}",
        "model.name=own_parts:Seeing",
    ],
    "a model that came in evaluation mode": ["model.name=own_parts:in_evaluation_mode"],
    "a frozen batch norm": ["model.name=own_parts:Frozen"],
    "a batch norm under two names": ["model.name=own_parts:TwoNames"],
    "a batch norm used twice": ["model.name=own_parts:Twice"],
    "a batch norm that is never used": ["model.name=own_parts:Never"],
    "a batch norm that is recomputed": ["model.name=own_parts:Recomputed"],
    "a batch norm with a forward of its own": ["model.name=own_parts:OwnForward"],
    "layers that are skipped": [
        "model.name=own_parts:Skipping",
        "gradients.missing=zero",
        "batch.micro=2",
        "epochs=2",
    ],
    "a model that draws from numpy and random": ["model.name=own_parts:NumpyNoise"],
    "a model that draws in evaluations": ["model.name=own_parts:DrawsAlways"],
    "complex, 0-dimensional and integer parts": ["model.name=own_parts:Spectral"],
    "tied, frozen and unused weights": ["model.name=own_parts:Tied"],
    "extra state": ["model.name=own_parts:Remembering"],
    "a loss with parameters": ["loss.name=own_parts:Temperature"],
    "a loss that draws from numpy": ["loss.name=own_parts:Mixed"],
    "a buffer that is computed anew": ["model.name=own_parts:Rewritten"],
    "a buffer that is read, then computed anew": ["model.name=own_parts:ReadThenRewritten"],
    "a buffer of which a part is computed anew": ["model.name=own_parts:PartlyRewritten"],
    "a buffer that is replaced": ["model.name=own_parts:Replaced"],
    "a buffer that is registered late": ["model.name=own_parts:FirstSeen"],
    "an expanded buffer": ["model.name=own_parts:Expanded"],
    "a hook on the gradient of each pass": ["model.name=own_parts:ClipsEachPass"],
    "more groups than tensors": ["horovod={groups: 80}"],
    "frozen layers": ["model.name=own_parts:Normed", "model.freeze=[first.*, norm.weight]"],
    "a frozen part of a loss": ["loss.name=own_parts:Temperature", "model.freeze=[loss.shift.*]"],
    "averaged weights": ["model.name=own_parts:Normed", "ema={half_life_samples: 40}"],
    "averaged weights of a loss": ["loss.name=own_parts:Temperature", "ema={half_life_samples: 9}"],
    "averaged weights, tied and frozen": ["model.name=own_parts:Tied", "ema.half_life_samples=40"],
    "one of torch's optimizers by its path": [
        "optimizer={name: 'torch.optim:NAdam', weight_decay: 1e-3, excluded_lr_factor: 0.5}",
        "lr.base=0.01",
    ],
    "an optimizer that is built with state": [
        "optimizer={name: 'torch.optim:Adagrad', args: {initial_accumulator_value: 0.1}}",
        "lr.base=0.05",
        "model.name=own_parts:Tied",
    ],
    "an own optimizer": [
        "optimizer={name: 'own_parts:Sharpened', args: {strength: 2, betas: [0.9, 0.8]}, weight_decay: 1e-3}",
        "lr.base=0.05",
        "model.name=own_parts:Tied",
    ],
    "own policies": [
        "batch.growth={policy: 'own_parts:Adding', samples: 5}",
        "lr={base: 0.5, scaling: sqrt, warmup: {policy: 'own_parts:Sudden', epochs: 0.5}, decay: {policy: 'own_parts:Halving', every: 2}}",
    ],
    "a hook": ["hooks=['own_parts:Observer']"],
    "a module that wants to see its version": ["model.name=own_parts:Versioned"],
    "loader processes, and an augmentation that draws from three generators": [
        "data={name: 'own_parts:augmented', num_workers: 2}"
    ],
    "a state that is carried along lanes": [
        "data={name: 'own_parts:windows', lanes: 31}",
        "model.name=own_parts:Carrying",
    ],
    "a state in a dict, and averaged weights": [
        "data={name: 'own_parts:windows', lanes: 33, num_workers: 2}",
        "model.name=own_parts:Gated",
        "evaluate={lanes: 6, micro_batch: 2}",
        "ema.half_life_samples=40",
    ],
    "lanes of which a step is skipped": [
        "data={name: 'own_parts:windows', lanes: 31}",
        "model.name=own_parts:Bursting",
        "on_nonfinite.policy=skip",
    ],
    "a lane for each sample": [
        "data={name: 'own_parts:windows', lanes: 53}",
        "model.name=own_parts:Carrying",
        "batch.micro=auto",
    ],
}


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
@pytest.mark.parametrize("changes", SOUND.values(), ids=SOUND.keys())
def test_any_number_of_workers_and_interruptions_give_the_same_run(
    control, tensors, folder, changes
):
    job = job_of(changes)
    expected = alone(job, control, folder)
    found = train(job, control, tensors, folder / "whole")
    assert distance(found, expected) < 1e-12
    assert found["state"]["results"] == pytest.approx(expected["state"]["results"], rel=1e-9)

    with pytest.raises(Stopped):
        train(job, control, tensors, folder / "parts", stop_after=3)
    control.barrier()
    again = train(job, control, tensors, folder / "parts")
    assert distance(again, found) == 0.0  # on the same number of workers, bit for bit
    if control.rank == 0:  # the rest of a run of many workers on one
        with pytest.raises(Stopped):
            train(job, SoloChannel(), SoloCollectives(), folder / "moved", stop_after=2)
    control.barrier()
    moved = train(job, control, tensors, folder / "moved")
    assert distance(moved, expected) < 1e-12


@pytest.mark.parametrize(
    "name", ["averaged weights", "frozen layers", "a frozen batch norm", "a batch norm used twice", "a batch norm that is recomputed", "layers that are skipped",
             "a state that is carried along lanes", "a state in a dict, and averaged weights", "an own optimizer", "an optimizer that is built with state", "own policies", "a hook",
             "a loss with parameters", "a model that came in evaluation mode", "a model that draws from numpy and random"]
)  # fmt: skip
def test_exact_mode_is_bit_identical(control, tensors, folder, name):
    if control.size & (control.size - 1):
        pytest.skip("exact mode needs 1, 2, 4, 8, … workers")
    job = job_of([*SOUND[name], "reduction=exact", "precision=fp32"])
    assert (
        distance(train(job, control, tensors, folder / "many"), alone(job, control, folder)) == 0.0
    )


def test_a_step_of_lanes_is_really_skipped(control, tensors, folder):
    job = job_of(SOUND["lanes of which a step is skipped"])
    assert train(job, control, tensors, folder / "run")["state"]["skipped"] > 0


def test_exact_mode_takes_deterministic_algorithms_only(control, tensors, folder):
    if control.size & (control.size - 1):
        pytest.skip("exact mode needs 1, 2, 4, 8, … workers")
    train(
        job_of(["model.name=own_parts:OnlyDeterministic", "reduction=exact"]),
        control,
        tensors,
        folder / "run",
    )


def test_the_mode_in_which_a_model_comes_does_not_matter(control, tensors, folder):
    came_training = train(
        job_of(["model.name=own_parts:Normed"]), control, tensors, folder / "training"
    )
    came_in_eval = train(
        job_of(["model.name=own_parts:in_evaluation_mode"]), control, tensors, folder / "evaluation"
    )
    assert distance(came_in_eval, came_training) == 0.0
    assert came_training["model"]["norm.running_mean"].abs().max() > 0.01


def test_frozen_statistics_stay_what_they_were(control, tensors, folder):
    model = train(job_of(["model.name=own_parts:Frozen"]), control, tensors, folder / "frozen")[
        "model"
    ]
    assert model["norm.running_mean"].tolist() == [pytest.approx(0.3)] * 5
    assert model["norm.num_batches_tracked"] == 0


def test_types_stay_as_they_were_built(control, tensors, folder):
    for precision, kinds in {
        "fp32": (torch.complex64, torch.float32),
        "fp64": (torch.complex128, torch.float64),
    }.items():
        model = train(
            job_of(["model.name=own_parts:Spectral", f"precision={precision}"]),
            control,
            tensors,
            folder / precision,
        )["model"]
        assert (model["rotation"].dtype, model["filter"].dtype) == (kinds[0], kinds[0])
        assert model["first.weight"].dtype == kinds[1]
        assert (model["table"].dtype, model["order"].dtype) == (torch.float64, torch.int64)
        assert model["table"].tolist() == [1 / 3] * 5
        assert (model["filter"] == 1 + 1j).all()


def test_parameters_of_a_loss_are_trained_and_saved(control, tensors, folder):
    found = train(job_of(["loss.name=own_parts:Temperature"]), control, tensors, folder / "loss")
    assert found["loss"]["log_scale"].abs() > 1e-4
    assert "loss.shift.weight" in found["optimizer"]
    assert not any(name.startswith("loss") for name in found["model"])


def test_frozen_parameters_stay_and_their_statistics_follow(control, tensors, folder):
    changes = ["model.name=own_parts:Normed", "model.freeze=['first.*', 'norm.*']"]
    found = train(job_of(changes), control, tensors, folder / "frozen")
    assert (found["model"]["norm.weight"] == 1).all()
    assert found["model"]["norm.running_mean"].abs().max() > 0.01
    assert found["optimizer"].keys() == {"last.weight", "last.bias"}
    with pytest.raises(RunExit, match="model.freeze is .* in the folder, null in this job"):
        train(job_of(changes[:1]), control, tensors, folder / "frozen")


def test_weights_from_a_file_that_rank_0_alone_reads(control, tensors, folder, monkeypatch):
    whole = train(job_of(["model.name=own_parts:Normed"]), control, tensors, folder / "source")
    if control.rank == 0:
        torch.save({f"module.{n}": v for n, v in whole["model"].items()}, folder / "weights.pt")
    else:
        monkeypatch.setattr("hvdlarge.training.run.load_initial_weights", None)
    control.barrier()
    job = job_of(
        [
            f"init_from={{path: '{folder}/weights.pt', prefix: module.}}",
            "model.name=own_parts:Normed",
            "seed=1",
        ]
    )
    expected = alone(job, control, folder)
    found = train(job, control, tensors, folder / "whole")
    assert distance(found, expected) < 1e-12
    assert distance(found, whole) > 1e-6
    with pytest.raises(Stopped):
        train(job, control, tensors, folder / "parts", stop_after=3)
    control.barrier()
    if control.rank == 0:
        (folder / "weights.pt").unlink()  # a resumed run does not read it
    control.barrier()
    moved = job.model_copy(
        update={"init_from": job.init_from.model_copy(update={"path": "moved.pt"})}
    )
    assert distance(train(moved, control, tensors, folder / "parts"), found) == 0.0
    with pytest.raises(JobError, match="init_from: .*there is no such file"):
        train(job, control, tensors, folder / "anew")
    control.barrier()
    assert not (folder / "anew").exists()


def test_averages_follow_the_weights_of_a_plain_loop(control, tensors, folder):
    """The average after a growth, from the weights that every step has left."""
    changes = ["checkpoint={every_steps: 1, keep: 1000}", "on_nonfinite={policy: rollback}"]
    job = job_of([*changes, "model.name=own_parts:Normed", "ema={half_life_samples: 40}"])
    found = train(job, control, tensors, folder / "run")
    batches = [line["global_batch"] for line in read_lines(folder / "run/decisions.jsonl")]
    assert len(set(batches)) > 2  # growths, and a short last step
    files = [folder / f"run/checkpoints/step_{step:09d}.pt" for step in range(len(batches) + 1)]
    first, *others = (torch.load(file, weights_only=True)["model"] for file in files)
    averages = dict(first)
    for batch, weights in zip(batches, others, strict=True):
        d = 0.5 ** (batch / 40)
        for name, value in weights.items():
            is_buffer = name.startswith(("norm.running", "norm.num"))
            averages[name] = value if is_buffer else d * averages[name] + (1 - d) * value
    assert distance({"model": averages}, {"model": found["ema"]}) < 1e-12
    results = found["state"]["results"]
    assert {"ema_test_loss", "ema_accuracy"} <= results.keys()
    assert results["ema_test_loss"] != results["test_loss"]


REFUSED = {
    "model.freeze=[frist.*]": "model.freeze: the pattern 'frist.*' matches no parameter; did you mean 'first",
    "init_from=nothing.pt": "init_from: nothing.pt: there is no such file",
    "data={name: 'own_parts:own_generator'}": "training set returns different samples when read again",
    "data={name: 'own_parts:iterable'}": "IterableDataset",
    "data={name: 'own_parts:own_generator_of_the_test_set'}": "the test set returns different samples when read again",
    "model.name=own_parts:RemembersEvaluations": "changes 'evaluations', which is saved",
    "model.name=own_parts:AlwaysInTraining": "a pass in evaluation mode changes 'norm.running_mean', which is saved",
    "model.name=own_parts:NoisyEvaluations": "in evaluation mode the model or the loss gives a different result",
    "model.name=own_parts:ClipsWhatIsAccumulated": "a hook changes what has been accumulated",
    "loss.name=own_parts:Unreduced": r"a loss must return a mean over samples, .* returned a float64 tensor of shape \(4,\)",
    "evaluate.metrics=['own_parts:ShapelessMetric']": r"evaluate.metrics: ShapelessMetric: totals\(\) must return a tensor of 1 real",
    "evaluate.metrics=['own_parts:RememberingMetric']": "evaluate.metrics: RememberingMetric gives totals .* for the same samples",
    "evaluate.metrics=['own_parts:RaisingMetric']": r"evaluate.metrics: RaisingMetric raises ZeroDivisionError.*own_parts.py, line \d+",
    "model.name=own_parts:OwnNoise": "draws from its own random generator",
    "model.name=own_parts:Renormed": "'norm' .Renorm. reads its running statistics while it trains",
    "model.name=own_parts:OtherRule": "'norm' .Geometric. does not follow",
    "model.name=own_parts:ModeSwitch": "changes the mode .* of 'norm'",
    "model.name=own_parts:Counting": "changes '_extra_state'",
    "model.name=own_parts:PowerIteration": "changes 'first.parametrizations.weight.0._u'",
    "model.name=own_parts:SettledPowerIteration": "changes 'first.parametrizations.weight.0._u'",
    "model.name=own_parts:Clamped": "changes 'first.weight'",
    "model.name=own_parts:ClampedFromAbove": "changes 'first.weight'",
    "model.name=own_parts:Rolling": "changes 'window'",
    "model.name=own_parts:ShortRows": "changes 'table.weight'",
    "model.name=own_parts:Sparse": "'table.weight' has a sparse gradient",
    "model.name=own_parts:TrainedComplex": "'filter' is trained and complex128",
    "model.name=own_parts:Raising": r"ValueError: heads must divide the width \(.*own_parts.py, line \d+, in between\)",
    "data.name=own_parts:ignored": r"a target is -100, .*ignore_index: -100",
    "data.name=own_parts:ignored loss.name=torch.nn:CrossEntropyLoss": "loss of the first micro-batch is nan",
    "model.name=convnt": "did you mean 'convnet'",
    "model.name=mlp model.args.widht=3": "do not fit",
    "data.name=nowhere:thing": "there is no module 'nowhere'",
    "optimizer.exclude=[encoder.*]": "^optimizer: .*matches no trainable parameter",
    'optimizer={"name":"torch.optim:LBFGS"}': "optimizer.name: torch.optim:LBFGS: its step.. needs 'closure'",
    'optimizer={"name":"torch.optim:SparseAdam"}': "SparseAdam does not support dense gradients",
    'optimizer={"name":"torch.optim:Muon"}': "Muon only supports 2D parameters",
    'optimizer={"name":"own_parts:Langevin"}': "own_parts:Langevin: .*whose .grad is None",
    'optimizer={"name":"own_parts:RaisingInItsStep"}': r"KeyError: 'no such momentum' \(.*own_parts.py, line \d+, in step\)",
    'optimizer={"name":"own_parts:Net"}': "not a subclass of torch.optim.Optimizer",
    'hooks=["own_parts:Net"]': "hooks: own_parts:Net has none of on_start",
    'hooks=["own_parts:Observe"]': "has no 'Observe'",
    'hooks=[{"name":"own_parts:Observer","args":{"evry":1}}]': "the arguments .evry. do not fit",
    "precision=tf32": "tf32 is not supported on a CPU; supported: fp32, bf16, fp16, fp64",
    "data={name: 'own_parts:windows', lanes: 54} model.name=own_parts:Carrying": "data.lanes: 53 samples cannot be cut into 54 lanes",
    "data={name: 'own_parts:windows', lanes: 29} model.name=own_parts:Carrying": "batch.growth: the global batch reaches 30 samples, .* 29 lanes .data.lanes.; give 30 lanes or more",
    "data={name: 'own_parts:plain', lanes: 31}": r"data.lanes needs a model with a method advance\(inputs, state\)",
    "data={name: 'own_parts:windows', lanes: 31} model.name=own_parts:ForgetsSamples": r"needs one dimension for the samples; the shape is \(7, 5\) for 2 samples and \(7, 5\) for 4",
    "data={name: 'own_parts:windows', lanes: 31} model.name=own_parts:ReturnsOutputs": r"for data.lanes, advance\(\) must return \(outputs, state\): it returned a float64 tensor",
    "model.name=own_parts:Normed batch.micro=1": "the first micro-batch fails in .* more than 1 value per channel",
    "model.name=own_parts:Normed batch.micro=7": "a micro-batch of 1, with which a step of 8 samples ends, fails",
}


if torch.cuda.is_available():
    del REFUSED["precision=tf32"]


@pytest.mark.parametrize(("changes", "message"), REFUSED.items())
def test_a_job_without_one_result_is_refused_before_its_first_step(
    control, tensors, folder, changes, message
):
    job = job_of(
        re.split(r"(?<=['}]) (?=\w+[.])", changes) if "data=" in changes else changes.split()
    )
    for where, channels in worlds(control, tensors).items():
        with pytest.raises(RunExit, match=f"(?s){message}") as raised:
            train(job, *channels, folder / where)
        assert raised.value.code == JobError.code
        assert not (folder / where).exists()
    control.barrier()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["data.args={kept: 4}", "log.every_steps=3"], ["the loss is nan at step 2 "]),
        (["data.args={kept: 4}", "log.every_steps=1000"], ["the loss is nan at step 6 "]),
        (["on_nonfinite={policy: skip}", "log.every_steps=3"], ["the loss is nan at step 2 "]),
        (
            ["on_nonfinite={policy: rollback, limit: 2}", "log.every_steps=3"],
            ["back to step 0", "the run was rolled back 2 times already"],
        ),
    ],
    ids=["stop", "stop in the last step", "skip", "rollback"],
)
def test_a_loss_that_is_not_finite_while_the_gradients_are_ends_the_run(
    control, tensors, folder, capsys, changes, words
):
    names = ["data.name=own_parts:ignored", "loss.name=torch.nn:CrossEntropyLoss"]
    job = job_of([*names, "epochs=1", *changes])
    for where, channels in worlds(control, tensors).items():
        with pytest.raises(RunExit) as raised:
            train(job, *channels, folder / where)
        assert raised.value.code == DIVERGED
        told = str(raised.value) + capsys.readouterr().out
        if channels[0].rank == 0:  # which prints
            for word in ["most often all targets of a micro-batch are ignored", *words]:
                assert word in told
    control.barrier()


@pytest.mark.parametrize("every", [1, 1000])
def test_saved_state_that_changes_later_than_in_the_rehearsal_ends_the_run(
    control, tensors, folder, every
):
    for where, channels in worlds(control, tensors).items():
        with pytest.raises(RunExit, match="'scale'|disagree about the digest|scale is"):
            train(
                job_of(["model.name=own_parts:ChangesLater", f"compare_every_steps={every}"]),
                *channels,
                folder / where,
            )
    control.barrier()


def test_a_gradient_that_is_there_on_some_ranks_only_is_named(control, tensors, folder):
    job = job_of(["model.name=own_parts:Skipping", "batch.micro=2"])
    if control.size == 1:
        pytest.skip("one rank agrees with itself")
    with pytest.raises(
        RanksDisagreeError, match="the parameter '(norm|chance|data).* gradients.missing: zero"
    ):
        train(job, control, tensors, folder / "run")


@pytest.mark.parametrize("reduction", ["fast", "exact"])
def test_a_gradient_of_any_micro_batch_of_a_rank_counts_as_there(
    control, tensors, folder, reduction
):
    if reduction == "exact" and control.size == 3:
        pytest.skip("exact mode has no form on 3 ranks")
    batch = 16 * control.size  # eight passes a rank, of which some use the layer
    changes = [f"reduction={reduction}", f"batch={{base: {batch}, micro: 2}}"]
    trained = job_of(
        ["model.name=own_parts:Sometimes", f"epochs={3 * batch / 53 + 1e-9}", *changes]
    )
    kept = train(trained, control, tensors, folder / "run")
    assert kept["progress"]["step"] == 3


def test_every_rank_reads_the_same_samples_or_the_difference_is_told(
    control, tensors, folder, monkeypatch
):
    if control.size == 1:
        pytest.skip("one rank agrees with itself")
    import own_parts

    def listed_in_another_order(samples=53):
        inputs, targets = own_parts.tensors(samples)
        order = torch.arange(samples) if control.rank == 0 else torch.arange(samples - 1, -1, -1)
        return own_parts.InMemory(inputs[order], targets[order]), None

    monkeypatch.setattr(own_parts, "plain", listed_in_another_order)
    with pytest.raises(
        RanksDisagreeError,
        match=r"do not have the same training samples .* listed in the same order",
    ):
        train(job_of([]), control, tensors, folder / "run")


def test_training_sets_of_other_sizes_are_refused(control, tensors, folder, monkeypatch):
    if control.size == 1:
        pytest.skip("one rank agrees with itself")
    import own_parts

    last = control.rank == control.size - 1
    smaller = own_parts.plain(43 if last else 53)
    monkeypatch.setattr(own_parts, "plain", lambda: smaller)
    words = f"training samples is 53 on rank 0 and 43 on rank {control.size - 1}"
    with pytest.raises(RanksDisagreeError, match=words):
        train(job_of([]), control, tensors, folder / "run")
    assert not (folder / "run").exists()


def test_decisions_are_those_of_one_worker(control, tensors, folder):
    job = job_of([])
    alone(job, control, folder)
    train(job, control, tensors, folder / "many")
    ours, theirs = (read_lines(folder / where / "decisions.jsonl") for where in ("many", "alone"))
    assert ours == theirs


@pytest.mark.parametrize(
    "part", ["model.name=own_parts:NumpyNoise", "loss.name=own_parts:Mixed"], ids=["model", "loss"]
)
def test_loader_processes_change_nothing_that_numpy_and_random_draw(control, tensors, folder, part):
    """Without loader processes, reading a micro-batch seeds the process that trains too."""
    results = []
    for processes in (0, 1):
        data = f"data={{name: 'own_parts:augmented', num_workers: {processes}}}"
        job = job_of([data, part, "epochs=1"])
        results.append(train(job, control, tensors, folder / f"processes-{processes}"))
    assert distance(*results) == 0.0


def test_hooks_see_the_run_on_every_rank_alike(control, tensors, folder):
    import own_parts

    job = job_of(["hooks=['own_parts:Observer']"])
    without = train(job_of([]), control, tensors, folder / "without")
    own_parts.Observer.told = told = []
    with pytest.raises(Stopped):
        train(job, control, tensors, folder / "run", stop_after=3)
    assert told[0] == ("start", 0, control.rank, control.size, 53)
    assert told[-2:] == [("checkpoint", 3), ("end", False, told[-1][2])]
    first, told[:] = list(told), []
    kept = train(job, control, tensors, folder / "run")
    assert distance(kept, without) == 0.0
    assert told[0] == ("start", 4, control.rank, control.size, 53)
    assert told[-1] == ("end", True, kept["state"]["results"])
    steps = [entry for entry in [*first, *told] if entry[0] == "step"]
    assert [entry[1] for entry in steps] == list(range(kept["progress"]["step"]))
    assert steps[-1][2] == kept["progress"]["samples_seen"] == 164
    decided = read_lines(folder / "run/decisions.jsonl")
    assert [entry[3] for entry in steps] == [line["lr"] for line in decided]
    logged = [entry[1] for entry in steps if entry[4] is not None]
    assert logged == [4, 9, steps[-1][1]]
    evaluations = [entry[2] for entry in [*first, *told] if entry[0] == "evaluation"]
    measured = [line for line in read_lines(folder / "run/metrics.jsonl") if "test_loss" in line]
    assert [entry["test_loss"] for entry in evaluations] == [line["test_loss"] for line in measured]
    of_all = control.allgather(repr([first[1:], told[1:]]).encode())
    assert len(set(of_all)) == 1


@pytest.mark.parametrize("event", ["on_start", "after_step", "after_checkpoint", "on_end"])
@pytest.mark.parametrize("ranks", [[0, 1, 2, 3], [0]])
def test_a_hook_that_raises_ends_all_ranks_with_its_line(control, tensors, folder, event, ranks):
    arguments = f"{{ranks: {ranks}, event: {event}}}"
    job = job_of([f"hooks=[{{name: 'own_parts:RaisingHook', args: {arguments}}}]"])
    where = "on rank 0: " if control.size > 1 and ranks == [0] else ""
    words = rf"^{where}hooks: own_parts:RaisingHook: {event} raises LookupError: the dashboard is away \(.*own_parts.py, line \d+, in complain\)"
    with pytest.raises(JobError, match=words):
        train(job, control, tensors, folder / "run")
    control.barrier()


def test_a_hook_that_changes_weights_ends_the_run(control, tensors, folder):
    job = job_of(["hooks=['own_parts:ChangesWeights']"])
    with pytest.raises(JobError, match="own_parts:ChangesWeights: after_step changes 'first.weight'"):  # fmt: skip
        train(job, control, tensors, folder / "run")
    control.barrier()
