"""The job file: what is accepted, what every mistake is answered with."""

import json
import re

import jsonschema
import pytest
from support.launching import ROOT

from hvdlarge.config import yaml_source
from hvdlarge.config.job_file import parse_job, read_job
from hvdlarge.config.json_schema import job_schema
from hvdlarge.exits import JobError
from hvdlarge.schedule.growth import AdaBatchGrowth
from hvdlarge.schedule.warmup import LegwWarmup

GOOD = """\
name: trial
epochs: 3
data: {name: digits}
model: {name: convnet}
batch:
  base: 32
  micro: 16
  growth: {policy: adabatch, factor: 2, every_epochs: 6, max: 512}
lr:
  base: 1e-1
  warmup: {policy: legw, epochs: 0.2}
"""


def test_a_job_is_read_with_its_defaults():
    job = parse_job(GOOD, "job.yaml")
    assert job.lr.base == 0.1
    assert job.batch.growth == AdaBatchGrowth(factor=2, every_epochs=6, max=512)
    assert job.lr.warmup == LegwWarmup(epochs=0.2, on_growth="ramp")
    assert (job.batch.first, job.precision, str(job.run_folder)) == (32, "fp32", "runs/trial")


def test_the_resolved_job_is_the_same_job():
    job = parse_job(
        GOOD,
        "job.yaml",
        [
            "run_dir='$${HOME}/1e3'",
            "name='1e3'",
            "optimizer={name: sgd, exclude: [a.*, b]}",
            "model.args={width: 4}",
            "lr.decay={policy: polynomial}",
        ],
    )
    assert parse_job(job.to_yaml(), "resolved") == job
    assert parse_job(job.to_yaml(), "resolved").fingerprint() == job.fingerprint()


def test_any_change_changes_the_fingerprint():
    seen = {
        parse_job(GOOD, "job.yaml", [change]).fingerprint()
        for change in ("seed=1", "lr.base=0.2", "epochs=3.5", "seed=0")
    }
    assert len(seen) == 4


@pytest.mark.parametrize("path", ["jobs/digits.yaml", "jobs/digits_lstm.yaml"])
def test_the_shipped_jobs_are_read(path):
    assert read_job(path).name in path


def test_overrides_on_the_command_line():
    job = parse_job(
        GOOD,
        "job.yaml",
        ["lr.base=2", "batch.growth={policy: none}", "run_dir=elsewhere", "data.num_workers=3"],
    )
    assert (job.lr.base, job.batch.growth.policy, str(job.run_folder), job.data.num_workers) == (
        2.0,
        "none",
        "elsewhere",
        3,
    )


@pytest.mark.parametrize(
    ("old", "new", "messages"),
    [
        (
            "micro",
            "mirco",
            [
                "job.yaml:7: unknown key 'batch.mirco'; did you mean 'micro'?",
                "the key 'batch.micro' is missing",
            ],
        ),
        (
            "factor",
            "facotr",
            ["job.yaml:8: unknown key 'batch.growth.facotr'; did you mean 'factor'?"],
        ),
        (
            "adabatch",
            "adabach",
            ["job.yaml:8: batch.growth.policy is 'adabach'; did you mean 'adabatch'?"],
        ),
        (
            "policy: legw, ",
            "",
            ["job.yaml:11: the key 'lr.warmup.policy' is missing; it is one of legw, linear, none"],
        ),
        (
            "max: 512",
            "max: 8",
            ["job.yaml:5: batch: growth.max is 8, below the first global batch of 32"],
        ),
        ("1e-1", "-1", ["job.yaml:10: lr.base is -1: input should be greater than 0"]),
        ("1e-1", ".nan", ["lr.base is nan"]),
        ("1e-1", ".inf", ["lr.base is"]),
        ("epochs: 3\n", "epochs: true\n", ["job.yaml:2: epochs is true"]),
        ("epochs: 3\n", "epochs: 0\n", ["job.yaml:2: epochs is 0"]),
        ("epochs: 3\n", "", ["the key 'epochs' is missing"]),
        ("base: 32", "base: '32'", ['job.yaml:6: batch.base is "32"']),
        ("base: 32", "base: 1.5", ["batch.base is 1.5"]),
        ("base: 32", "base: 0", ["batch.base is 0"]),
        (
            "micro: 16",
            "micro: 5000000000000000000",
            ["batch.micro is 5000000000000000000: input should be less than or equal"],
        ),
        (
            "every_epochs: 6",
            "every_epochs: 6, at_epochs: [1]",
            ["batch.growth: give either every_epochs or at_epochs"],
        ),
        ("every_epochs: 6", "at_epochs: [2, 1]", ["rising positive epochs"]),
        ("factor: 2", "factor: 1", ["factor must be a number above 1, got 1"]),
        ("name: trial", "name: ../trial", ["job.yaml:1: name is"]),
        ("{name: digits}", "digits", ['job.yaml:3: data is "digits"']),
    ],
)
def test_mistakes_are_named_with_their_line(old, new, messages):
    with pytest.raises(JobError) as raised:
        parse_job(GOOD.replace(old, new, 1), "job.yaml")
    for message in messages:
        assert message in str(raised.value)
    assert raised.value.code == 2


def test_all_mistakes_are_told_at_once():
    text = (
        GOOD.replace("micro", "mirco").replace("1e-1", "-1").replace("epochs: 3", "epochs: x")
        + "momentun: 0.9\n"
    )
    with pytest.raises(JobError, match="5 problems") as raised:
        parse_job(text, "job.yaml")
    assert str(raised.value).count("\n") == 5


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "just words", "42"])
def test_what_is_no_mapping_is_refused(text):
    with pytest.raises(JobError, match="job.yaml: a job file is|job.yaml: the job file is empty"):
        parse_job(text, "job.yaml")


def test_a_job_file_that_is_a_list_is_told_what_it_must_be():
    with pytest.raises(JobError) as raised:
        parse_job("- name: x\n", "job.yaml")
    assert str(raised.value) == (
        "job.yaml: a job file is a mapping of keys to values (`key: value`), not a list"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [("lr.base", "not of the form"), ("=3", "not of the form"), ("lr..base=3", "not of the form"), ("lr.base.x=1", "lr.base is not a section"),
     ("lr.bas=1", "command line: unknown key 'lr.bas'; did you mean 'base'"), ("lr.base=[", "command line"), ("lr.base=-3", "command line: lr.base is -3")],
)  # fmt: skip
def test_mistakes_on_the_command_line_are_named_as_such(override, message):
    with pytest.raises(JobError, match=message):
        parse_job(GOOD, "job.yaml", [override])


def test_an_override_reaches_into_sections_that_are_null_or_a_short_form():
    resolved = parse_job(GOOD, "job.yaml").to_yaml()
    assert "ema: null" in resolved
    job = parse_job(resolved, "job.resolved.yaml", ["ema.half_life_samples=100"])
    assert job.ema.half_life_samples == 100
    job = parse_job(GOOD + "init_from: w.pt\n", "job.yaml", ["init_from.strict=false"])
    assert (job.init_from.path, job.init_from.strict) == ("w.pt", False)
    with pytest.raises(JobError, match="the key 'init_from.path' is missing"):
        parse_job(resolved, "job.yaml", ["init_from.strict=false"])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(JobError, match="no such job file"):
        read_job(str(tmp_path / "none.yaml"))
    with pytest.raises(JobError, match="cannot be read"):
        read_job(str(tmp_path))


# --- invalid combinations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["batch.micro=64"], "batch.micro: a micro-batch of 64 samples is more than the first global batch of 32"),
        (["lr.warmup.epochs=4"], "lr.warmup.epochs: the warmup takes 4 epochs (4 × 1, the first batch over the base batch)"),
        (["batch.initial=320", "lr.warmup.epochs=0.4"], "takes 4 epochs (0.4 × 10,"),
        (["lr.warmup={policy: linear, epochs: 500}"], "the warmup takes 500 epochs, the run has 3; it is given in epochs, not in steps"),
        (["lr.decay={policy: multistep, milestones: [1, 2, 3]}"], "lr.decay.milestones: 3 is not before the end of the run at epoch 3"),
        (["batch.growth={policy: adabatch, at_epochs: [1, 30, 60]}"], "batch.growth.at_epochs: 30, 60 is not before the end"),
        (["lr.decay={policy: one_cycle}"], "lr.warmup: one_cycle is its own warmup"),
        (["evaluate.metrics=[accuracy, 'mine:accuracy']"], "evaluate.metrics: two metrics have the same name"),
        (["evaluate.metrics=['mine:steps']"], "evaluate.metrics: 'steps' is a reserved field of metrics.jsonl or summary.json"),
        (["checkpoint.best=top5"], "checkpoint.best: 'top5' is not an evaluation result; known: test_loss, accuracy"),
        (["checkpoint.best=accuracy", "evaluate.metrics=[]"], "checkpoint.best: 'accuracy' is not an evaluation result"),
        (["checkpoint.best=ema_accuracy"], "checkpoint.best: 'ema_accuracy' is not an evaluation result"),
        (["checkpoint.best=ema_f1", "ema.half_life_samples=9"], "known: test_loss, accuracy, ema_test_loss, ema_accuracy"),
        (["evaluate.metrics=[accuracy, 'mine:ema_accuracy']", "ema.half_life_samples=9"], "'ema_accuracy' is a reserved field"),
    ],
)  # fmt: skip
def test_impossible_combinations_are_refused(changes, message):
    with pytest.raises(JobError) as raised:
        parse_job(GOOD, "job.yaml", changes)
    assert message in str(raised.value)
    assert "command line: " in str(raised.value) or "job.yaml:11: " in str(raised.value)


def test_the_best_checkpoint_may_go_by_the_loss_or_any_metric():
    for best, metrics in (("accuracy", "[accuracy]"), ("test_loss", "[]"), ("f1", "['mine:f1']")):
        changes = [f"checkpoint.best={best}", f"evaluate.metrics={metrics}"]
        assert parse_job(GOOD, "job.yaml", changes).checkpoint.best == best


def test_the_best_checkpoint_may_go_by_the_averaged_weights():
    for best in ("ema_accuracy", "ema_test_loss"):
        changes = [f"checkpoint.best={best}", "ema.half_life_samples=9"]
        assert parse_job(GOOD, "job.yaml", changes).checkpoint.best == best


def test_initial_weights_are_a_path_or_a_section():
    short = parse_job(GOOD, "job.yaml", ["init_from=a.pt"])
    assert short == parse_job(GOOD, "job.yaml", ["init_from={path: a.pt}"])
    assert parse_job(short.to_yaml(), "job.yaml") == short
    patterns = {"z.*": "a.*", "b.*": "c.*", "*": "d.*"}  # their order counts
    long = parse_job(GOOD, "job.yaml", [f"init_from={{path: a.pt, map: {json.dumps(patterns)}}}"])
    assert list(long.init_from.map.items()) == list(patterns.items())
    assert list(parse_job(long.to_yaml(), "x").init_from.map.items()) == list(patterns.items())
    for wrong, message in {
        "{prefix: a}": "the key 'init_from.path' is missing",
        "{path: a, prefx: b}": "unknown key 'init_from.prefx'; did you mean 'prefix'?",
        "3": "init_from is 3: it must be a section with the keys path, strict, prefix, map",
    }.items():
        with pytest.raises(JobError, match=re.escape(message)):
            parse_job(GOOD, "job.yaml", [f"init_from={wrong}"])


def test_what_weights_come_from_what_is_averaged_and_frozen_decide_the_weights():
    before = parse_job(GOOD, "job.yaml").resume_signature()
    assert "freeze" not in before["model"]  # as in checkpoints of before there was any
    signatures = [
        parse_job(GOOD, "job.yaml", [change]).resume_signature()
        for change in (
            "init_from=a.pt",
            "init_from={path: a.pt, prefix: b}",
            "model.freeze=[a]",
            "ema.half_life_samples=9",
            "ema.half_life_samples=8",
        )
    ]
    assert before not in signatures
    assert all(signatures.count(signature) == 1 for signature in signatures)
    moved = parse_job(GOOD, "job.yaml", ["init_from=b.pt"]).resume_signature()
    assert moved == signatures[0]


def test_metrics_do_not_decide_the_weights():
    """So that a run may go on with others, and one of before there were any goes on."""
    before = parse_job(GOOD, "job.yaml").resume_signature()
    assert (
        parse_job(GOOD, "job.yaml", ["evaluate.metrics=['mine:f1']"]).resume_signature() == before
    )


def test_all_impossible_combinations_are_told_at_once():
    with pytest.raises(JobError, match="3 problems"):
        parse_job(
            GOOD,
            "job.yaml",
            [
                "batch.micro=64",
                "lr.warmup.epochs=4",
                "lr.decay={policy: multistep, milestones: [5]}",
            ],
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("deterministic=on", "write true"), ("deterministic=no", "write false"), ("epochs='3'", "write 3, without quotes"),
        ("epochs=1_000", "write 1000, without quotes"), ("epochs=90 epochs", "the unit is in the key's name"),
        ("name=17", "put it in quotes"), ("lr=0.1", "lr is 0.1: it must be a section with the keys base, scaling"),
        ("lr.decay=cosine", "with a policy or name, one of constant, cosine"), ("optimizer=sgd", "one of adagrad, adam, adamw, lamb, lars, rmsprop, sgd"),
    ],
)  # fmt: skip
def test_hints_for_what_was_perhaps_meant(change, message):
    with pytest.raises(JobError) as raised:
        parse_job(GOOD, "job.yaml", [change])
    assert message in str(raised.value)


def test_the_optimizer_may_leave_out_its_name():
    assert parse_job(GOOD + "optimizer: {momentum: 0.8}\n", "job.yaml").optimizer.name == "lars"


@pytest.mark.parametrize(
    ("given", "changes", "section"),
    [
        ("", ["batch.growth.policy=none"], ("batch", "growth", {"policy": "none"})),
        ("", ["lr.warmup.policy=none"], ("lr", "warmup", {"policy": "none"})),
        (
            "  decay: {policy: multistep, gamma: 0.1, milestones: [1, 2]}\n",
            ["lr.decay.policy=cosine"],
            ("lr", "decay", {"policy": "cosine", "end_factor": 0.0, "after_warmup": True}),
        ),
        (
            "  decay: {policy: multistep, gamma: 0.1, milestones: [1, 2]}\n",
            ["lr.decay.power=3", "lr.decay.policy=polynomial"],  # in any order
            ("lr", "decay", {"policy": "polynomial", "power": 3.0}),
        ),
        (
            "optimizer: {trust_coefficient: 0.01}\n",  # lars, by default
            ["optimizer.name=sgd", "optimizer.momentum=0.8"],
            ("optimizer", None, {"name": "sgd", "momentum": 0.8}),
        ),
        ("loss: {label_smoothing: 0.1}\n", ["loss.name=mse"], ("loss", None, {"name": "mse", "label_smoothing": None})),
        ("", ["data.name=mine:data", "data.args.size=3"], ("data", None, {"name": "mine:data", "args": {"size": 3}})),
        ("", ["model.name=mlp"], ("model", None, {"name": "mlp", "args": {}})),
        ("on_nonfinite: {policy: rollback, lr_factor: 0.3}\n", ["on_nonfinite.policy=skip"], ("on_nonfinite", None, {"policy": "skip", "limit": 10})),
    ],
)  # fmt: skip
def test_another_policy_or_name_on_the_command_line_replaces_its_section(given, changes, section):
    text = GOOD.replace("{name: digits}", "{name: digits, args: {a: 1}, num_workers: 2}")
    text = text.replace("{name: convnet}", "{name: convnet, args: {width: 4}}") + given
    outer, inner, expected = section
    found = parse_job(text, "job.yaml", changes).resolved()[outer]
    found = found if inner is None else found[inner]
    assert {key: found[key] for key in expected} == expected
    assert set(found) == set(expected) or inner is None or "power" in expected


@pytest.mark.parametrize(
    "change",
    [
        "lr.warmup.policy=legw",
        "name=other",
        "model.args.name=big",
        "model.args={name: big, width: 4}",
    ],
)
def test_a_name_that_selects_nothing_else_replaces_nothing(change):
    text = GOOD.replace("{name: convnet}", "{name: convnet, args: {name: small, width: 4}}")
    job = parse_job(text, "job.yaml", [change])
    assert job.lr.warmup == LegwWarmup(epochs=0.2)
    assert job.model.args["width"] == 4
    assert job.batch.micro == 16


# --- files that extend others


def extended(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return lambda *overrides: read_job(str(folder / "job.yaml"), overrides)


def test_a_file_changes_some_keys_of_another(tmp_path):
    read = extended(
        tmp_path,
        base=GOOD,
        job="extends: base.yaml\nname: other\nbatch: {base: 64}\nlr: {base: 0.2}\n",
    )
    job = read("seed=5")
    assert (job.name, job.batch.base, job.batch.micro, job.lr.base, job.lr.warmup.epochs) == (
        "other",
        64,
        16,
        0.2,
        0.2,
    )
    assert (job.batch.growth.max, job.seed) == (512, 5)


def test_a_section_of_another_kind_replaces_the_whole(tmp_path):
    read = extended(
        tmp_path,
        base=GOOD + "optimizer: {name: lars, trust_coefficient: 0.01}\n",
        job="extends: base.yaml\nbatch: {growth: {policy: none}}\nmodel: {name: mlp}\noptimizer: {name: sgd}\n",
    )
    assert (read().batch.growth.policy, read().model.name, read().optimizer.name) == (
        "none",
        "mlp",
        "sgd",
    )


def test_a_kind_that_was_left_to_its_default_counts(tmp_path):
    base = GOOD + "optimizer: {trust_coefficient: 0.01}\nloss: {label_smoothing: 0.1}\n"
    read = extended(
        tmp_path, base=base, job="extends: base.yaml\noptimizer: {name: sgd}\nloss: {name: mse}\n"
    )
    assert (read().optimizer.name, read().loss.label_smoothing) == ("sgd", None)
    read = extended(
        tmp_path, base=base, job="extends: base.yaml\noptimizer: {name: lars, momentum: 0.8}\n"
    )
    assert (read().optimizer.trust_coefficient, read().optimizer.momentum) == (0.01, 0.8)


def test_chains_of_files_and_folders(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/middle.yaml").write_text("extends: ../base.yaml\nseed: 1\nepochs: 4\n")
    assert extended(tmp_path, base=GOOD, job="extends: deep/middle.yaml\nseed: 2\n")().epochs == 4
    assert extended(tmp_path, base=GOOD, job="extends: deep/middle.yaml\nseed: 2\n")().seed == 2


def test_a_problem_is_told_with_the_file_that_it_stands_in(tmp_path):
    read = extended(
        tmp_path,
        base=GOOD.replace("epochs: 3", "epochs: 0"),
        job="extends: base.yaml\nlr: {bas: 3}\n",
    )
    with pytest.raises(JobError) as raised:
        read()
    assert f"{tmp_path}/base.yaml:2: epochs is 0" in str(raised.value)
    assert f"{tmp_path}/job.yaml:2: unknown key 'lr.bas'" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: job.yaml\n", "is circular"), ("extends: a.yaml\n", "is circular"),
        ("extends: none.yaml\n", "no such file to extend"), ("extends: 3\n", "extends is 3: it must name another job file"),
        ("extends: ~\n", "extends is null"), ("extends: empty.yaml\n", "empty.yaml: the job file is empty"),
        ("extends: .\n", "cannot be read"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_extended(tmp_path, text, message):
    read = extended(tmp_path, a="extends: job.yaml\n", empty="", job=text)
    with pytest.raises(JobError) as raised:
        read()
    assert message in str(raised.value)


def test_variables_of_the_environment_are_filled_in(monkeypatch):
    monkeypatch.setenv("JOB_EPOCHS", "7")
    monkeypatch.delenv("JOB_LR", raising=False)
    text = GOOD.replace("epochs: 3\n", "epochs: ${JOB_EPOCHS}\n").replace("1e-1", "${JOB_LR:-0.25}")
    job = parse_job(text, "job.yaml", ["name=run-${JOB_EPOCHS}"])
    assert (job.epochs, job.lr.base, job.name) == (7, 0.25, "run-7")
    with pytest.raises(JobError, match=r"job.yaml:10: lr.base: the variable JOB_LR is not set"):
        parse_job(text.replace(":-0.25", ""), "job.yaml")


# --- the schema for editors


def test_the_schema_in_the_repository_is_the_one_of_the_code():
    assert json.loads((ROOT / "jobs/job.schema.json").read_text()) == job_schema(), (
        "write it anew: python -m hvdlarge.plan --schema > jobs/job.schema.json"
    )


def test_the_schema_takes_jobs_and_refuses_mistakes():
    jsonschema.Draft202012Validator.check_schema(job_schema())
    check = jsonschema.Draft202012Validator(job_schema())
    for path in sorted((ROOT / "jobs").glob("*.yaml")):
        check.validate(yaml_source.read(path.read_bytes()).values)
    good = yaml_source.read(GOOD).values
    check.validate(good)
    check.validate(good | {"epochs": "${EPOCHS:-3}", "deterministic": "${D}"})
    check.validate({"extends": "base.yaml", "seed": 3})
    check.validate(good | {"optimizer": {"momentum": 0.5}})
    check.validate(good | {"init_from": "a.pt", "ema": {"half_life_samples": 9}})
    check.validate(good | {"init_from": {"path": "a.pt", "map": {"a.*": "b.*"}}})
    for wrong in (
        {"epochs": "3"},
        {"epochz": 3},
        {"lr": 0.1},
        {"batch": {"base": 0, "micro": 1}},
        {"optimizer": {"name": "x"}},
        {"init_from": {"prefix": "a"}},
        {"ema": {}},
    ):
        assert list(check.iter_errors(good | wrong)), wrong
    assert list(check.iter_errors({"seed": 3}))


SECRETS = """\
name: run-${JOB}
epochs: ${EPOCHS}
data: {name: digits, args: {token: "${TOKEN}", nested: {keys: ["a", "$${X}-${TOKEN}"]}, size: "${EPOCHS}"}}
model: {name: convnet, args: {}}
batch: {base: 32, micro: 16}
lr: {base: 1e-1}
"""


def test_texts_that_the_environment_gives_to_args_are_known_to_the_run_alone(monkeypatch, tmp_path):
    for name, value in (("TOKEN", "s3cret"), ("JOB", "17"), ("EPOCHS", "3")):
        monkeypatch.setenv(name, value)
    (tmp_path / "base.yaml").write_text(SECRETS)
    (tmp_path / "job.yaml").write_text(
        "extends: base.yaml\nloss: {args: {proxy: 'http://${TOKEN}@far'}}\n"
    )
    job = read_job(
        str(tmp_path / "job.yaml"),
        ["model.args.key=x${TOKEN:-y}", "data.args.more={deep: ['${TOKEN}']}"],
    )
    assert (job.name, job.epochs, job.loss.args, job.model.args) == (
        "run-17", 3, {"proxy": "http://s3cret@far"}, {"key": "xs3cret"},
    )  # fmt: skip
    assert job.data.args == {
        "token": "s3cret", "nested": {"keys": ["a", "${X}-s3cret"]}, "size": "3", "more": {"deep": ["s3cret"]},
    }  # fmt: skip
    for seen in (job.to_yaml(), json.dumps(job.resolved()), json.dumps(job.resume_signature())):
        assert "s3cret" not in seen
    assert "token: '${TOKEN}'" in job.to_yaml()
    again = parse_job(job.to_yaml(), "resolved")
    assert again == job
    assert again.data.args == job.data.args
    assert again.resume_signature() == job.resume_signature()
    monkeypatch.setenv("TOKEN", "other")
    assert parse_job(job.to_yaml(), "resolved").resume_signature() != job.resume_signature()
    assert (
        read_job(str(tmp_path / "job.yaml"), ["data.args={token: none}", "loss.args={}"])
        .to_yaml()
        .count("${")
        == 0
    )


METRICS = """
evaluate:
  metrics:
    bleu: {name: "mine:Bleu", args: {token: "${TOKEN}", deep: [{args: "${TOKEN}"}]}}
    args: {name: "mine:${BLEU}", args: {token: "${TOKEN}"}}
"""


def test_texts_that_the_environment_gives_to_args_of_metrics_are_known_to_the_run_alone(
    monkeypatch,
):
    monkeypatch.setenv("TOKEN", "s3cret")
    monkeypatch.setenv("BLEU", "Bleu")
    job = parse_job(GOOD + METRICS, "job.yaml")
    assert job.evaluate.metrics["bleu"].args == {"token": "s3cret", "deep": [{"args": "s3cret"}]}
    for seen in (job.to_yaml(), json.dumps(job.resolved())):
        assert "s3cret" not in seen
        assert seen.count("mine:Bleu") == 2  # names are no secrets, whatever the result is called
    again = parse_job(job.to_yaml(), "resolved")
    assert again == job
    assert again.resolved() == job.resolved()


@pytest.mark.parametrize("name", ["cross_entropy", "mse", "torch.nn:L1Loss"])
@pytest.mark.parametrize(
    "argument",
    ["reduction: sum", "reduction: none", "reduction: ~", "size_average: false", "reduce: false"],
)
def test_a_loss_of_torch_that_is_no_mean_is_refused(name, argument):
    loss = f"loss={{name: '{name}', args: {{{argument}}}}}"
    with pytest.raises(
        JobError,
        match=f"loss.args.{argument.split(':')[0]}: .* makes the loss no mean over its micro-batch",
    ) as raised:
        parse_job(GOOD, "job.yaml", [loss])
    assert raised.value.code == 2


@pytest.mark.parametrize(
    "loss",
    [
        "{args: {reduction: mean}}",
        "{args: {reduce: true}}",
        "{name: 'mine:loss', args: {reduction: sum}}",
    ],
)
def test_a_loss_that_is_a_mean_or_ones_own_is_taken(loss):
    assert parse_job(GOOD, "job.yaml", [f"loss={loss}"]).loss.args


def test_exact_mode_asks_for_a_micro_batch_that_no_number_of_workers_changes():
    with pytest.raises(
        JobError, match="batch.micro: reduction: exact adds up micro-batches that are the same"
    ):
        parse_job(GOOD, "job", ["reduction=exact", "batch.micro=auto"])
