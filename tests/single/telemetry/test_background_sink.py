"""Sinks that a job names: what they receive, how they are dropped, and what is refused before the first step."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from hvdlarge.config.job import SinkPart
from hvdlarge.config.job_file import parse_job
from hvdlarge.exits import JobError
from hvdlarge.telemetry.background_sink import (
    CAPACITY,
    BackgroundSink,
    NamedSink,
    find_sinks,
    open_sinks,
)
from hvdlarge.telemetry.sinks import Sink, SinkRun

RUN = SinkRun("run", Path("run"), {"seed": 0}, 2, 100, None, 0, 0)
JOB = "name: a\nepochs: 1\ndata: {name: digits}\nmodel: {name: mlp}\nbatch: {base: 8, micro: 4}\nlr: {base: 1}\n"
LONG = 60.0  # seconds: no test waits for them


class Received(Sink):
    """Keeps what it receives; may wait for a signal, or raise, at an event."""

    def __init__(self, waits=None, raises=None):
        self.calls, self.threads = [], set()
        self.waits, self.raises = waits, raises
        self.reached, self.go_on = threading.Event(), threading.Event()

    def _take(self, event, *arguments):
        self.calls.append((event, *arguments))
        self.threads.add(threading.current_thread().name)
        if event == self.waits:
            self.reached.set()
            assert self.go_on.wait(LONG)
        if event == self.raises:
            raise RuntimeError(f"{event} is out of order")

    def start(self, run):
        self._take("start", run)

    def decision(self, record):
        self._take("decision", record["step"])

    def metrics(self, record):
        self._take("metrics", record["step"])

    def roll_back(self, step, offsets):
        self._take("roll_back", step)

    def end(self, status):
        self._take("end", status)

    def close(self):
        self._take("close")


def behind(build, close_seconds=LONG, **changes):
    notes = []
    sink = BackgroundSink("own", build, RUN, notes.append, close_seconds=close_seconds, **changes)
    return sink, notes


def finish(sink, status="finished"):
    sink.end(status)
    sink.close()
    assert sink._ended.is_set() or sink._dropped


def test_a_sink_receives_everything_in_order_in_a_thread_of_its_own():
    own = Received()
    sink, notes = behind(lambda: own)
    for step in range(3):
        sink.decision({"step": step})
        sink.metrics({"step": step})
    sink.roll_back(2, {})
    sink.decision({"step": 2})
    finish(sink, "stopped")
    records = [(event, step) for step in range(3) for event in ("decision", "metrics")]
    ending = [("roll_back", 2), ("decision", 2), ("end", "stopped"), ("close",)]
    assert own.calls == [("start", RUN), *records, *ending]
    assert own.threads == {"sink own"}
    assert notes == []


def test_records_are_copies_and_decisions_hold_the_time_of_the_call():
    records = []

    class Keeps:
        def metrics(self, record):
            records.append(record)

        def decision(self, record):
            records.append(record)

    sink, _ = behind(Keeps)
    given = {"step": 0, "time": 5.0}
    sink.metrics(given)
    sink.decision({"step": 1})
    given["step"] = 2
    finish(sink)
    assert records[0] == {"step": 0, "time": 5.0}
    assert records[1].keys() == {"step", "time"}
    assert records[1]["time"] > 1.7e9


def test_what_a_sink_lacks_is_not_called_and_is_not_kept():
    seen = []

    class OnlyMetrics(Sink):
        def metrics(self, record):
            seen.append(record["step"])

    sink, notes = behind(OnlyMetrics, capacity=2)
    sink.metrics({"step": 0})
    while not sink._not_wanted:  # set by the thread
        sink._ended.wait(0.001)
    for step in range(1000):  # more than the queue holds
        sink.decision({"step": step})
    finish(sink)
    assert seen == [0]
    assert notes == []


@pytest.mark.parametrize("event", ["start", "decision", "metrics", "roll_back", "end", "close"])
def test_a_sink_that_raises_is_dropped_with_one_note_and_closed(event):
    own = Received(raises=event)
    sink, notes = behind(lambda: own)
    for step in range(3):
        sink.decision({"step": step})
        sink.metrics({"step": step})
        sink.roll_back(step, {})
    finish(sink)
    assert sink._ended.wait(LONG)
    assert len(notes) == 1
    assert notes[0].startswith(
        "log.sinks: own was dropped, and the run goes on without it: "
        f"{event} raises RuntimeError: {event} is out of order (test_background_sink.py, line "
    )
    assert "\n" not in notes[0]
    assert [call[0] for call in own.calls].count(event) == 1
    assert [call[0] for call in own.calls].count("close") == 1


def test_a_system_without_threads_drops_the_sink(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    sink, notes = behind(Received)
    sink.metrics({"step": 0})
    finish(sink)
    assert len(notes) == 1
    assert "can't start new thread" in notes[0]


class CannotBeBuilt:
    def __init__(self):
        raise SystemExit("no server answers")  # as some libraries do


def test_a_sink_that_cannot_be_built_is_dropped_with_one_note():
    sink, notes = behind(CannotBeBuilt)
    sink.metrics({"step": 0})
    finish(sink)
    sink.metrics({"step": 1})
    assert len(notes) == 1
    assert "build raises SystemExit: no server answers" in notes[0]


def test_what_takes_no_records_is_dropped_with_one_note():
    sink, notes = behind(dict)
    sink.metrics({"step": 0})
    finish(sink)
    assert len(notes) == 1
    assert "TypeError: a dict has neither of decision and metrics" in notes[0]


@pytest.mark.parametrize("event", ["start", "metrics"])
def test_a_sink_that_is_too_slow_is_dropped_while_training_goes_on(event):
    own = Received(waits=event)
    sink, notes = behind(lambda: own, capacity=10)
    sink.metrics({"step": -1})
    assert own.reached.wait(LONG)
    for step in range(100_000):  # nothing here waits for the sink
        sink.metrics({"step": step})
    assert notes == [
        "log.sinks: own was dropped, and the run goes on without it: it cannot keep up with "
        "training: 10 records are waiting"
    ]
    assert sink._waiting.qsize() <= 1  # nothing is kept for it
    finish(sink)  # at once
    own.go_on.set()
    assert sink._ended.wait(LONG)
    assert own.calls[-1] == ("close",)
    assert len(notes) == 1


def test_a_sink_that_starts_slowly_gets_what_was_recorded_meanwhile():
    own = Received(waits="start")
    sink, notes = behind(lambda: own)
    for step in range(CAPACITY - 2):  # and the end, and the close
        sink.metrics({"step": step})
    sink.end("finished")
    own.go_on.set()
    sink.close()
    assert [call[1] for call in own.calls if call[0] == "metrics"] == list(range(CAPACITY - 2))
    assert notes == []


def test_a_sink_that_never_finishes_is_dropped_after_a_limited_time():
    own = Received(waits="close")
    sink, notes = behind(lambda: own, close_seconds=0.01)
    sink.metrics({"step": 0})
    finish(sink)
    assert notes == [
        "log.sinks: own was dropped, and the run goes on without it: it has not finished 0.01 s "
        "after the end of the run, and what it had not written may be lost"
    ]
    own.raises = "close"
    own.go_on.set()
    assert sink._ended.wait(LONG)
    assert len(notes) == 1  # what it raises later is not reported


def test_sinks_finish_at_the_same_time():
    first, second = Received(waits="end"), Received()
    sinks = [behind(lambda own=own: own)[0] for own in (first, second)]
    for sink in sinks:
        sink.end("finished")
    assert sinks[1]._ended.wait(LONG)  # although the first one goes on
    first.go_on.set()
    for sink in sinks:
        sink.close()


def test_the_other_ranks_do_not_wait_longer_than_a_step_may_take():
    named = [NamedSink("own", Received)]
    assert open_sinks(named, RUN, step_seconds=300)[0]._close_seconds == 10
    assert open_sinks(named, RUN, step_seconds=5)[0]._close_seconds == 2.5


def entries(*given):
    return [
        SinkPart(**entry) if isinstance(entry, dict) else SinkPart(name=entry) for entry in given
    ]


def test_the_log_files_are_always_there_and_may_be_named():
    assert find_sinks(entries("jsonl")) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["tensorbord"], "log.sinks: unknown name 'tensorbord'; did you mean 'tensorboard'"),
        (["nowhere:Sink"], "log.sinks: there is no module 'nowhere'"),
        (["json:Nothing"], "log.sinks: the module 'json' has no 'Nothing'"),
        (["mlperf"], r"arguments \(none\) do not fit mlperf"),
        ([{"name": "mlperf", "args": {"benchmrk": "x"}}], r"arguments \(benchmrk\) do not fit mlperf"),
        (["jsonl", "jsonl"], "log.sinks: jsonl is named twice"),
        ([{"name": "jsonl", "args": {"a": 1}}], "log.sinks: jsonl takes no arguments"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_before_the_first_step(given, message):
    with pytest.raises(JobError, match=message):
        find_sinks(entries(*given))


@pytest.mark.parametrize("found", [None, SimpleNamespace(origin=None)], ids=["nothing", "folder"])
@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_refused_with_its_extra(name, found, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: found)
    with pytest.raises(JobError, match=rf"{name}.*: pip install 'hvdlarge\[{name}\]'"):
        find_sinks(entries(name))


def test_a_job_names_sinks_by_name_or_with_arguments():
    job = parse_job(JOB, "job", ["log.sinks=[jsonl, {name: 'my:Sink', args: {a: 1}}]"])
    assert [(each.name, each.args) for each in job.log.sinks] == [
        ("jsonl", {}),
        ("my:Sink", {"a": 1}),
    ]
    assert parse_job(job.to_yaml(), "job", []).log == job.log
    assert job.resume_signature() == parse_job(JOB, "job", []).resume_signature()
    with pytest.raises(JobError, match=r"log.sinks"):
        parse_job(JOB, "job", ["log.sinks=[{name: a, arg: {}}]"])
