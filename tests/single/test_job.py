"""The job file: what is accepted, what every mistake is answered with."""

import pytest

from hvdlarge.exits import JobError
from hvdlarge.job import parse_job, read_job
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
        ["optimizer={name: sgd, not_adapted: [a.*, b]}", "model.args={width: 4}", "lr.decay={policy: polynomial}"],
    )
    assert parse_job(job.to_yaml(), "resolved") == job
    assert parse_job(job.to_yaml(), "resolved").fingerprint() == job.fingerprint()


def test_any_change_changes_the_fingerprint():
    seen = {parse_job(GOOD, "job.yaml", [change]).fingerprint() for change in ("seed=1", "lr.base=0.2", "epochs=3.5", "seed=0")}
    assert len(seen) == 4


@pytest.mark.parametrize("path", ["jobs/digits.yaml", "jobs/digits_lstm.yaml"])
def test_the_shipped_jobs_are_read(path):
    assert read_job(path).name in path


def test_overrides_on_the_command_line():
    job = parse_job(GOOD, "job.yaml", ["lr.base=2", "batch.growth={policy: none}", "run_dir=elsewhere", "data.num_workers=3"])
    assert (job.lr.base, job.batch.growth.policy, str(job.run_folder), job.data.num_workers) == (2.0, "none", "elsewhere", 3)


@pytest.mark.parametrize(
    ("old", "new", "messages"),
    [
        (
            "micro",
            "mirco",
            ["job.yaml:7: unknown key 'batch.mirco'; did you mean 'micro'?", "the key 'batch.micro' is missing"],
        ),
        ("factor", "facotr", ["job.yaml:8: unknown key 'batch.growth.facotr'; did you mean 'factor'?"]),
        ("adabatch", "adabach", ["job.yaml:8: batch.growth.policy is 'adabach'; did you mean 'adabatch'?"]),
        ("policy: legw, ", "", ["job.yaml:11: the key 'lr.warmup.policy' is missing; it is one of legw, linear, none"]),
        ("max: 512", "max: 8", ["job.yaml:5: batch: growth.max is 8, below the first global batch of 32"]),
        ("1e-1", "-1", ["job.yaml:10: lr.base is -1: input should be greater than 0"]),
        ("1e-1", ".nan", ["lr.base is nan"]),
        ("1e-1", ".inf", ["lr.base is"]),
        ("epochs: 3\n", "epochs: true\n", ["job.yaml:2: epochs is true"]),
        ("epochs: 3\n", "epochs: 0\n", ["job.yaml:2: epochs is 0"]),
        ("epochs: 3\n", "", ["the key 'epochs' is missing"]),
        ("base: 32", "base: '32'", ['job.yaml:6: batch.base is "32"']),
        ("base: 32", "base: 1.5", ["batch.base is 1.5"]),
        ("base: 32", "base: 0", ["batch.base is 0"]),
        ("every_epochs: 6", "every_epochs: 6, at_epochs: [1]", ["batch.growth: give either every_epochs or at_epochs"]),
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
    text = GOOD.replace("micro", "mirco").replace("1e-1", "-1").replace("epochs: 3", "epochs: x") + "momentun: 0.9\n"
    with pytest.raises(JobError, match="5 problems") as raised:
        parse_job(text, "job.yaml")
    assert str(raised.value).count("\n") == 5


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "just words", "42"])
def test_what_is_no_mapping_is_refused(text):
    with pytest.raises(JobError, match="job.yaml: a job file is|job.yaml: the job file is empty"):
        parse_job(text, "job.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [("lr.base", "not of the form"), ("=3", "not of the form"), ("lr..base=3", "not of the form"), ("lr.base.x=1", "lr.base is not a section"),
     ("lr.bas=1", "command line: unknown key 'lr.bas'; did you mean 'base'"), ("lr.base=[", "command line"), ("lr.base=-3", "command line: lr.base is -3")],
)  # fmt: skip
def test_mistakes_on_the_command_line_are_named_as_such(override, message):
    with pytest.raises(JobError, match=message):
        parse_job(GOOD, "job.yaml", [override])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(JobError, match="no such job file"):
        read_job(str(tmp_path / "none.yaml"))
    with pytest.raises(JobError, match="cannot be read"):
        read_job(str(tmp_path))
