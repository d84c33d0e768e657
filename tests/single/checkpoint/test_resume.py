"""What is found in a run folder, and whether it is the run that is being started."""

import pytest

from hvdlarge.checkpoint import resume
from hvdlarge.checkpoint.content import RunFacts
from hvdlarge.checkpoint.folder import CheckpointFolder
from hvdlarge.config.job_file import parse_job
from hvdlarge.exits import CheckpointError
from hvdlarge.telemetry.run_folder import write_documents

JOB = """\
name: trial
epochs: 3
data: {name: digits}
model: {name: convnet}
batch: {base: 32, micro: 16}
lr: {base: 1e-1}
"""
WORDS = "model.args={mode: on, other: off, yes: no, at: 12:30:45, day: 2020-01-01, price: 1_000, home: '$${HOME}'}"


def begin(folder, job):
    """A start that left no checkpoint."""
    given = folder.parent / "given.yaml"
    given.write_text(JOB)
    folder.mkdir(exist_ok=True)
    write_documents(
        folder, given, job.to_yaml(), {"world_size": 1, "versions": {}}, resume.RunProgress(), []
    )


def find(folder, job):
    facts = RunFacts(job.resume_signature(), {"training samples": 1437}, {}, 1)
    return resume.find_resume_point(
        folder, CheckpointFolder(folder / "checkpoints", keep=3), facts, length_may_change=True
    )


def test_words_that_yaml_1_1_reads_otherwise_when_a_run_left_no_checkpoint_are_the_same_job(
    tmp_path,
):
    begin(tmp_path / "run", parse_job(JOB, "job", [WORDS]))
    assert find(tmp_path / "run", parse_job(JOB, "job", [WORDS])) is None
    with pytest.raises(
        CheckpointError, match='model.args.mode is "on" in the folder, "off" in this job'
    ):
        find(tmp_path / "run", parse_job(JOB, "job", [WORDS, "model.args.mode=off"]))


def test_a_folder_without_a_checkpoint_is_taken_over_by_its_job_and_by_no_other(tmp_path):
    begin(tmp_path / "run", parse_job(JOB, "job"))
    assert find(tmp_path / "run", parse_job(JOB, "job", ["log.every_steps=3"])) is None
    with pytest.raises(CheckpointError) as raised:
        find(tmp_path / "run", parse_job(JOB, "job", ["seed=1"]))
    assert str(raised.value).splitlines() == [
        f"{tmp_path / 'run'} holds another job:",
        "  seed is 0 in the folder, 1 in this job",
        "  no checkpoint was written there, so nothing that was trained would be lost",
        "  --fresh sets it aside and starts a new run; run_dir=… names another folder",
    ]
    assert raised.value.code == 77


def test_a_job_that_cannot_be_read_when_a_run_left_no_checkpoint_is_refused(tmp_path):
    begin(tmp_path / "run", parse_job(JOB, "job"))
    (tmp_path / "run/job.resolved.yaml").write_text("name: [trial\n")
    with pytest.raises(CheckpointError, match="cannot be read; --fresh sets it aside"):
        find(tmp_path / "run", parse_job(JOB, "job"))


def test_a_text_from_the_environment_is_compared_whether_it_was_written_out_or_not(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TOKEN", "s3cret")
    begin(tmp_path / "run", parse_job(JOB, "job", ["model.args={token: '${TOKEN}'}"]))
    assert find(tmp_path / "run", parse_job(JOB, "job", ["model.args={token: '${TOKEN}'}"])) is None
    assert find(tmp_path / "run", parse_job(JOB, "job", ["model.args={token: s3cret}"])) is None
    with pytest.raises(
        CheckpointError, match='model.args.token is "sha256:.*" in the folder, "other" in this job'
    ) as raised:
        find(tmp_path / "run", parse_job(JOB, "job", ["model.args={token: other}"]))
    assert "s3cret" not in str(raised.value)
    monkeypatch.delenv("TOKEN")
    with pytest.raises(CheckpointError, match="the variable TOKEN is not set"):
        find(tmp_path / "run", parse_job(JOB, "job"))
