"""Sinks that a job names (log.sinks), each in a thread of its own. Rank 0 only.

Contract: training never waits for a sink. What it records is put into a queue; a sink that raises,
or that falls so far behind that its queue is full, is dropped with one message, and the run goes
on. Only the end of a run waits, for a limited time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from hvdlarge.config import registry
from hvdlarge.config.job import SinkPart
from hvdlarge.config.part_errors import first_line
from hvdlarge.exits import JobError
from hvdlarge.telemetry.console import print_status
from hvdlarge.telemetry.sinks import Sink, SinkRun, Status

# Half a minute of a run with a hundred steps a second: more than a sink needs to start
CAPACITY = 5000  # records
# After the end of a run, for all its sinks together
CLOSE_SECONDS = 10.0
_RECORDS = ("decision", "metrics")
_EVENTS = ("start", *_RECORDS, "roll_back", "end", "close")


class NamedSink(NamedTuple):
    """A sink that was found and not built yet."""

    name: str  # as the job has it
    build: Callable[[], Any]


class BackgroundSink(Sink):
    """Passes records to a sink that is built, called and closed in a thread of its own.

    Nothing raises here, and nothing but `close` waits.

    Args:
        name: of the sink, for the message when it is dropped.
        build: returns the sink.
        run: handed to the sink's `start`.
        report: gets the message, at most once.
        capacity: records that may wait; one more drops the sink.
        close_seconds: how long the sink may take to finish, from `end` on.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], Any],
        run: SinkRun,
        report: Callable[[str], None],
        capacity: int = CAPACITY,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        self._name, self._build, self._run, self._report = name, build, run, report
        self._close_seconds, self._close_by = close_seconds, 0.0
        self._waiting: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(capacity)
        self._not_wanted: frozenset[str] = frozenset()  # known once the sink is built
        self._dropped, self._drop_once = False, threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, name=f"sink {name}", daemon=True)

    def decision(self, record: Mapping[str, Any]) -> None:
        """Queue it, with the `time` of the call in Unix seconds."""
        self._put("decision", {**record, "time": time.time()})

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Queue it."""
        self._put("metrics", dict(record))

    def roll_back(self, step: int, offsets: Mapping[str, int]) -> None:
        """Queue it, after the records before it."""
        self._put("roll_back", step, offsets)

    def end(self, status: Status) -> None:
        """Queue the end, so that the sink finishes while others do."""
        self._close_by = time.monotonic() + self._close_seconds
        self._put("end", status)
        self._put("close")

    def close(self) -> None:
        """Wait until the sink has finished, or drop it. `end` was called before."""
        if not self._dropped and not self._ended.wait(max(0.0, self._close_by - time.monotonic())):
            self._drop(
                f"it has not finished {self._close_seconds:g} s after the end of the run, and what "
                "it had not written may be lost"
            )

    def _put(self, event: str, *arguments: Any) -> None:
        if self._dropped or (event in self._not_wanted and event != "close"):
            return
        try:
            if self._thread.ident is None:
                self._thread.start()
            self._waiting.put_nowait((event, arguments))
        except RuntimeError as error:  # the system has no thread left
            self._drop(str(error))
        except queue.Full:
            self._drop(
                f"it cannot keep up with training: {self._waiting.maxsize:,} records are waiting"
            )

    def _drop(self, reason: str) -> None:
        """Stop passing records on, and say so, unless this has happened before. Called from both
        threads.
        """
        with self._drop_once:
            if self._dropped:
                return
            self._dropped = True
        self._report(
            f"log.sinks: {self._name} was dropped, and the run goes on without it: {reason}"
        )
        with contextlib.suppress(queue.Empty):  # they may be many
            while True:
                self._waiting.get_nowait()
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(("close", ()))  # the thread may be about to wait for a record

    def _serve(self) -> None:
        """The thread: build the sink and pass everything on, until its end or until it is
        dropped.
        """
        sink, event, closing = None, "build", False
        try:
            sink = self._build()
            self._not_wanted = _missing_calls(sink)
            event, arguments = "start", (self._run,)
            while not self._dropped:
                closing = event == "close"
                if event not in self._not_wanted:
                    getattr(sink, event)(*arguments)
                if closing:
                    break
                event, arguments = self._waiting.get()
        except BaseException as error:  # libraries may raise SystemExit, which would go unseen
            self._drop(f"{event} raises {first_line(error)}")
        if not closing and sink is not None and "close" not in self._not_wanted:
            with contextlib.suppress(BaseException):  # to free what it holds
                sink.close()
        self._ended.set()


def _missing_calls(sink: Any) -> frozenset[str]:
    """The events for which a sink has nothing to do.

    Raises:
        TypeError: if it takes no records.
    """
    missing = frozenset(
        event
        for event in _EVENTS
        if not callable(getattr(sink, event, None))
        or getattr(type(sink), event, None) is getattr(Sink, event)
    )
    if missing.issuperset(_RECORDS):
        raise TypeError(f"a {type(sink).__name__} has neither of {' and '.join(_RECORDS)}")
    return missing


def find_sinks(entries: Sequence[SinkPart]) -> list[NamedSink]:
    """Find the sinks of a job, check their arguments, and check that the packages they need are
    installed. Nothing is built.

    Args:
        entries: of log.sinks; `jsonl` is left out, since the run log always writes it.

    Raises:
        JobError: for an unknown name, a module or attribute that does not exist, arguments that do
            not fit, a missing package, or a built-in sink that is named twice.
    """
    key, sinks = "log.sinks", []
    for number, entry in enumerate(entries):
        if entry.name in registry.SINKS and entry.name in [each.name for each in entries[:number]]:
            raise JobError(f"{key}: {entry.name} is named twice")
        if entry.name == "jsonl":
            if entry.args:
                raise JobError(f"{key}: jsonl takes no arguments")
            continue
        part = registry.load_fitting(key, entry.name, entry.args, registry.SINKS)
        if entry.name in registry.SINKS:
            _require(key, entry.name, getattr(part, "package", None))
        sinks.append(NamedSink(entry.name, functools.partial(part, **entry.args)))
    return sinks


def _require(key: str, name: str, package: str | None) -> None:
    """Raise JobError unless a package is installed; it is imported later, by the sink's thread."""
    if package is None:
        return
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:  # a folder of that name is no package
        raise JobError(
            f"{key}: {name} needs the package {package!r}, which is not installed: "
            f"pip install 'hvdlarge[{name}]'"
        )


def open_sinks(
    sinks: Sequence[NamedSink], run: SinkRun, step_seconds: float
) -> list[BackgroundSink]:
    """The sinks of a run, each behind a thread that starts with the first record.

    Args:
        sinks: as found by `find_sinks`.
        run: what they record.
        step_seconds: limit of a step: the other ranks wait that long while the sinks finish.
    """
    return [
        BackgroundSink(
            sink.name,
            sink.build,
            run,
            lambda message: print_status(f"note     {message}"),
            close_seconds=min(CLOSE_SECONDS, step_seconds / 2),
        )
        for sink in sinks
    ]
