"""Batches and losses in any form give the same run on any number of workers, or are refused with the form that is wanted."""

import pytest
import torch
from support.comparing import distance, read_lines
from support.whole_runs import alone, job_of, train, worlds

from hvdlarge.exits import JobError, Stopped

TAGGING = [
    "data={name: 'own_forms:sequences', targets: label, collate: 'own_forms:pad'}",
    "evaluate.micro_batch=3",
]
FORMS = {
    "dict of two keys": [
        "data={name: 'own_forms:sets', args: {form: of_two_keys}, targets: label}",
        "model.name=own_forms:Features",
    ],
    "dict of three keys": [
        "data={name: 'own_forms:sets', args: {form: of_three_keys}, targets: label, num_workers: 1}",
        "model.name=own_forms:Features",
    ],
    "nested dict": [
        "data={name: 'own_forms:sets', args: {form: nested}, targets: label}",
        "model.name=own_forms:Parts",
    ],
    "tuple of inputs": [
        "data={name: 'own_forms:sets', args: {form: tuple_of_inputs}, num_workers: 1}",
        "model.name=own_forms:Two",
    ],
    "target in the middle of a tuple": [
        "data={name: 'own_forms:sets', args: {form: triple}, targets: 1}",
        "model.name=own_forms:Two",
    ],
    "input alone": [
        "data={name: 'own_forms:sets', args: {form: alone}}",
        "model.name=own_forms:Autoencoder",
        "loss.name=mse",
    ],
    "labels inside the model": [
        "data={name: 'own_forms:sets', args: {form: of_two_keys}, num_workers: 1}",
        "model.name=own_forms:OwnLoss",
        "loss.name=from_model",
    ],
    "an attribute of the output": [
        "data={name: 'own_forms:sets', args: {form: of_two_keys}, targets: label}",
        "model={name: 'own_forms:OwnLoss', output: logits}",
    ],
    "ragged samples": [*TAGGING, "model.name=own_forms:Tagger", "loss.name=own_forms:token_sum"],
    "ignored targets": [
        *TAGGING,
        "model.name=own_forms:Tagger",
        "loss={name: cross_entropy, args: {ignore_index: -100}}",
    ],
    "class weights": ["loss={name: cross_entropy, args: {weight: [1.0, 0.5, 3.0]}}"],
    "a function as loss": ["loss={name: 'own_forms:function', args: {power: 2.0}}"],
    "a module as loss": ["loss={name: 'own_forms:Module', args: {power: 2.0}}"],
    "a factory of a loss": ["loss={name: 'own_forms:factory', args: {power: 2.0}}"],
    "a loss as it is": ["loss={name: 'own_forms:instance'}"],
    "a sum and its weight": ["loss={name: 'own_forms:token_sum'}"],
}


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS.keys())
def test_any_form_gives_the_same_run_on_any_number_of_workers(control, tensors, folder, changes):
    job = job_of(changes)
    expected = alone(job, control, folder)
    result = train(job, control, tensors, folder / "whole")
    assert distance(result, expected) < 1e-12
    assert result["state"]["results"] == pytest.approx(expected["state"]["results"], rel=1e-9)
    with pytest.raises(Stopped):
        train(job, control, tensors, folder / "parts", stop_after=3)
    control.barrier()
    assert distance(train(job, control, tensors, folder / "parts"), result) == 0.0


LOSSES = {
    "a sum and its weight": ["model.name=own_forms:Tagger", "loss.name=own_forms:token_sum"],
    "ignored targets": [
        "model.name=own_forms:Tagger",
        "loss={name: cross_entropy, args: {ignore_index: -100, label_smoothing: 0.1}}",
    ],
    "a model that reports its tokens": [
        "model.name=own_forms:OwnLossTagger",
        "data.targets=null",
        "loss={name: from_model, args: {weight: tokens}}",
    ],
    "a model whose labels are counted": [
        "model.name=own_forms:OwnLossTagger",
        "data.targets=null",
        "loss={name: from_model, args: {labels: label}}",
    ],
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_a_mean_over_tokens_does_not_depend_on_the_micro_batch(control, tensors, folder, loss):
    batch = "batch={base: 20, micro: 20}"
    expected = alone(job_of([*TAGGING, *loss, batch]), control, folder)
    for micro in (5, 20):
        job = job_of([*TAGGING, *loss, batch, f"batch.micro={micro}"])
        result = train(job, control, tensors, folder / f"micro-{micro}")
        assert distance(result, expected) < 1e-12
        assert result["state"]["results"] == pytest.approx(expected["state"]["results"], rel=1e-9)


def test_large_weights_do_not_overflow_where_gradients_travel_in_16_bits(control, tensors, folder):
    jobs = {
        name: job_of(
            [f"loss.name=own_forms:{name}", "precision=fp32", "gradients.compression=fp16"]
        )
        for name in ("token_sum", "heavy_sum")
    }
    results = {name: train(job, control, tensors, folder / name) for name, job in jobs.items()}
    assert distance(results["heavy_sum"], results["token_sum"]) < 2e-3


@pytest.mark.parametrize("more", [[], ["on_nonfinite={policy: skip, limit: 1}", "precision=fp32"]])
def test_a_step_without_any_target_updates_nothing(control, tensors, folder, capsys, more):
    job = job_of(
        [
            "data.name=own_forms:few_targets",
            "loss={name: cross_entropy, args: {ignore_index: -100}}",
            "batch={base: 3, micro: 1}",
            "log.every_steps=1",
            *more,
        ]
    )
    expected = alone(job, control, folder)
    capsys.readouterr()
    result = train(job, control, tensors, folder / "whole")
    notes = [line for line in capsys.readouterr().out.splitlines() if "no target that" in line]
    assert len(notes) == (control.rank == 0)
    assert distance(result, expected) < (1e-12 if not more else 1e-5)
    steps = read_lines(folder / "whole/metrics.jsonl")
    without = [step for step in steps if step.get("loss") == "nan"]
    assert 1 < len(without) == result["state"]["without_loss"] == result["state"]["skipped"]
    assert len(without) < len(steps) / 2
    with pytest.raises(Stopped):
        train(job, control, tensors, folder / "parts", stop_after=30)
    control.barrier()
    assert distance(train(job, control, tensors, folder / "parts"), result) == 0.0


def test_a_mean_over_tokens_is_bit_identical_in_exact_mode(control, tensors, folder):
    if control.size & (control.size - 1):
        pytest.skip("exact mode needs 1, 2, 4, 8, … workers")
    job = job_of([*TAGGING, *LOSSES["a sum and its weight"], "reduction=exact", "precision=fp32"])
    many = train(job, control, tensors, folder / "many")
    assert distance(many, alone(job, control, folder)) == 0.0


def test_the_loss_that_is_logged_is_that_of_the_whole_batch(control, tensors, folder):
    changes = [*TAGGING, *LOSSES["a sum and its weight"], "log.every_steps=1", "lr.base=1e-30"]
    job = job_of([*changes, "batch={base: 53, micro: 4}", "epochs=1"])
    train(job, control, tensors, folder / "run")
    if control.rank != 0:
        return
    import own_forms

    from hvdlarge.optim.precision import Precision
    from hvdlarge.training.build import build_learning

    model = build_learning(job, Precision("fp64", torch.device("cpu")))[0].model
    batch = own_forms.pad([own_forms.Sequences()[index] for index in range(53)])
    total, tokens = own_forms.token_sum(model(batch["features"].double()), batch["label"])
    logged = read_lines(folder / "run/metrics.jsonl")[0]["loss"]
    assert logged == pytest.approx((total / tokens).item(), rel=1e-12)


WRONG = {
    "loss.name=own_forms:plain_sum": "loss.name: .* it is a sum, .* pair .sum, number of samples",
    "loss.name=own_forms:mean_with_weight": "loss.name: .* the first is a mean: return the sum",
    "loss.name=own_forms:sum_with_constant_weight": "loss.name: .* sum doubles .*, and the weight",
    "loss.name=own_forms:python_float": "loss.name: a loss must return a mean .* returned a float",
    "loss.name=own_forms:nothing": "loss.name: a loss must return a mean .* returned a NoneType",
    "loss.name=own_forms:triple_of_losses": "loss.name: a loss must return a mean .* pair",
    "loss.name=own_parts:Unreduced": 'loss.name: a loss must return a mean .*reduction="none"',
    "loss.name=own_forms:negative_weight": "loss.name: the weight of the first micro-batch is -4",
    "loss.name=own_forms:not_finite": "loss.name: the loss of the first micro-batch is inf",
    "loss.name=own_forms:number_factory": "loss.name: .* must return a loss, a callable of .outputs",
    "data.name=own_forms:generator": "data.name: the training set .* is a generator.*map-style",
    "data.name=own_forms:lonely": "data.name: .* must return a pair .training set, test set",
    "data.name=own_forms:strings": "model.name: the first micro-batch fails in the model or the loss.*list",
    "data.name=own_forms:ragged": "data.name: the first samples .* cannot be stacked.*data.collate",
    "data.targets=label": "data.name: .*data.targets: 'label' is not a position .* tuples of 2",
    "data.collate=own_forms:padd": "data.collate: the module 'own_forms' has no 'padd'",
    "model.output=logits": "model.output: there is no 'logits' in a Tensor",
    "model.name=own_forms:Two": "model.name: the first micro-batch fails in .*missing 1 required",
}


@pytest.mark.parametrize(("changes", "message"), WRONG.items())
def test_a_wrong_form_is_refused_with_the_one_that_is_wanted(
    control, tensors, folder, changes, message
):
    job = job_of([changes])
    for where, channels in worlds(control, tensors).items():
        with pytest.raises(JobError, match=f"(?s){message}") as raised:
            train(job, *channels, folder / where)
        assert len(str(raised.value).splitlines()[0]) <= 200
        assert not (folder / where).exists()
    control.barrier()


def test_metrics_of_torchmetrics_count_every_sample_once(control, tensors, folder):
    metrics = {
        "f1": ("MulticlassF1Score", "{num_classes: 3, average: macro}"),
        "auroc": ("MulticlassAUROC", "{num_classes: 3}"),
    }
    sections = ", ".join(
        f"{name}: {{name: 'torchmetrics.classification:{kind}', args: {args}}}"
        for name, (kind, args) in metrics.items()
    )
    own = "own_f1: {name: f1, args: {num_classes: 3}}, top5: {name: top5}"
    names = f"evaluate.metrics={{{sections}, {own}}}"
    job = job_of([names, "checkpoint.best=f1", "evaluate.micro_batch=3"])
    expected = alone(job, control, folder)["state"]
    result = train(job, control, tensors, folder / "run")["state"]
    assert result["results"].keys() == {"loss", "test_loss", "f1", "auroc", "own_f1"}
    assert result["results"] == pytest.approx(expected["results"], rel=1e-6)
    assert result["results"]["f1"] == pytest.approx(result["results"]["own_f1"], rel=1e-6)
    assert result["best"]["by"] == "f1"


@pytest.mark.parametrize(
    ("metrics", "message"),
    {
        "{r: {name: 'torchmetrics:PearsonCorrCoef'}}": "r: its state 'mean_x' is combined by",
        "{f1: {name: f1}}": "evaluate.metrics: .*do not fit f1.*num_classes",
        "{f1: {name: f1, args: {num_classes: 7}}}": "num_classes is 7, the outputs have 3 classes",
        "{a: {name: accuracy, output: logits}}": "there is no 'logits' in a Tensor",
        "{c: {name: 'torchmetrics.classification:MulticlassConfusionMatrix', args: {num_classes: 3}}}": "c: compute.. gives .*: a result is one number",
    }.items(),
)
def test_a_metric_that_cannot_be_taken_is_refused(control, tensors, folder, metrics, message):
    for where, channels in worlds(control, tensors).items():
        with pytest.raises(JobError, match=f"(?s){message}"):
            train(job_of([f"evaluate.metrics={metrics}"]), *channels, folder / where)
    control.barrier()
