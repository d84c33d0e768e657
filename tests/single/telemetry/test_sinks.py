"""What receives the records of a run: the log files, byte by byte, and a sink of one's own after the run log."""

import json

import pytest

from hvdlarge.config.job_file import read_job
from hvdlarge.controller import Controller
from hvdlarge.exits import CheckpointWriteError
from hvdlarge.replica.train_state import TrainState
from hvdlarge.schedule.decision import Decision
from hvdlarge.schedule.plan import RunProgress
from hvdlarge.telemetry.run_log import RunLog
from hvdlarge.telemetry.sinks import JsonlFiles, Sink, decision_record

PLAN = read_job("jobs/digits.yaml").plan(1437, 2)
DECISION = Decision(7, 224, 0.25, 0, 32, 32, 16, 0.1, False)


class Received(Sink):
    """A sink that keeps what it receives."""

    def __init__(self):
        self.calls = []
        self.failure = None

    def decision(self, record):
        """Keep it."""
        self.calls.append(("decision", record))

    def metrics(self, record):
        """Keep it, or fail."""
        if self.failure is not None:
            raise self.failure
        self.calls.append(("metrics", record))

    def roll_back(self, step, offsets):
        """Keep it."""
        self.calls.append(("roll_back", step))

    def close(self):
        """Keep it."""
        self.calls.append(("close",))


def open_log(folder, sink):
    return RunLog(folder, PLAN, {}, RunProgress(), TrainState(), [sink])


def test_a_sink_behind_the_run_log_receives_what_the_files_hold(tmp_path):
    sink, controller = Received(), Controller(PLAN)
    log = open_log(tmp_path, sink)
    for decision in iter(controller.decide, None):
        log.decision(decision)
        log.metrics({"step": decision.step, "loss": 1 / (decision.step + 1)})
    log.close()
    for name, kind in (("decisions", "decision"), ("metrics", "metrics")):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [
            call[1] for call in sink.calls if call[0] == kind
        ]
        assert len(lines) == 524
    assert sum("grew_from" in call[1] for call in sink.calls if call[0] == "decision") == 4
    assert sink.calls[-1] == ("close",)


def test_a_sink_when_the_run_is_rolled_back_is_told_the_step_that_is_taken_again(tmp_path):
    sink, controller = Received(), Controller(PLAN)
    log = open_log(tmp_path, sink)
    given = [controller.decide() for _ in range(10)]
    for decision in given[:4]:
        log.decision(decision)
    offsets = log.offsets()
    for decision in given[4:]:
        log.decision(decision)
    log.roll_back(offsets, controller.progress_after(given[3]))
    assert sink.calls[-1] == ("roll_back", 4)
    log.decision(given[4])
    log.close()
    lines = (tmp_path / "decisions.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4]


def test_a_sink_that_cannot_write_ends_the_run_as_a_failed_write_and_is_closed(tmp_path):
    sink = Received()
    log = open_log(tmp_path, sink)
    sink.failure = OSError(28, "No space left on device")
    log.metrics({"step": 0})
    assert log.failed
    with pytest.raises(CheckpointWriteError, match="No space left"):
        log.check()
    log.close()
    assert sink.calls == [("close",)]


def test_the_lines_of_the_log_files_are_these(tmp_path):
    files = JsonlFiles(tmp_path, {})
    files.decision(decision_record(DECISION, 16))
    files.decision(decision_record(DECISION, 32))
    files.metrics({"step": 7, "epoch": 0.25, "samples_seen": 256, "loss": float("inf")})
    files.close()
    plain = (
        '{"step": 7, "samples_seen": 224, "epoch": 0.25, "stage": 0, "stage_batch": 32, '
        '"global_batch": 32, "micro_batch": 16, "lr": 0.1, "is_last": false'
    )
    assert (tmp_path / "decisions.jsonl").read_bytes().decode() == (
        f'{plain}, "grew_from": 16}}\n{plain}}}\n'
    )
    assert (tmp_path / "metrics.jsonl").read_bytes() == (
        b'{"step": 7, "epoch": 0.25, "samples_seen": 256, "loss": "inf"}\n'
    )


def test_log_files_go_on_at_their_offsets(tmp_path):
    files = JsonlFiles(tmp_path, {})
    files.metrics({"step": 0})
    offsets = files.offsets()
    assert offsets == {"metrics": len('{"step": 0}\n'), "decisions": 0}
    files.metrics({"step": 1})
    files.close()
    files = JsonlFiles(tmp_path, offsets)
    files.metrics({"step": 2})
    files.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 2}\n'
