"""Runs the trials and repetitions of a study, alone or beside other processes on its folder."""

from __future__ import annotations

import contextlib
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from hvdlarge import exits
from hvdlarge.reporting.jsonl import JsonLines, finite
from hvdlarge.reporting.run_reader import printable
from hvdlarge.study.cells import CellPlan, JobSource, in_words
from hvdlarge.study.child import Child, gpus_of_slot
from hvdlarge.study.collect import State, end_of, remove_large_files, result_of_run
from hvdlarge.study.folder import (
    JOURNAL,
    RunName,
    StudyFolder,
    differing_keys,
    write_atomically,
    writing,
)
from hvdlarge.study.results import REPETITION, TRIAL, RunResult, Setup
from hvdlarge.study.search import Journal, Tried, suggest
from hvdlarge.study.study_file import Study
from hvdlarge.telemetry.console import print_error, print_status

Records = Mapping[RunName, RunResult]
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_POLL_SECONDS = 0.05
_WAIT_SECONDS = 0.5  # for runs of other processes
_PRUNE_SECONDS = 1.0
# Ends that say nothing of the settings: the study ends with them
_NOT_RESULTS = (exits.WRONG_JOB, exits.WRONG_ENVIRONMENT, exits.CHECKPOINT_WRITE_FAILED)


@dataclass
class _Running:
    """A run of this process."""

    name: RunName
    plan: CellPlan
    how: Mapping[str, Any]
    slot: int
    child: Child
    evaluations: JsonLines
    values: list[float] = field(default_factory=list)
    pruned: bool = False
    next_look: float = 0.0


class Session:
    """Works on a study until every run has ended, or a limit or a signal ends it.

    Args:
        study: the file's content.
        plans: of all cells.
        setup: metric and direction.
        source: of the job.
        folder: of the study, opened.
        jobs: runs at the same time.
        mpirun: the command and its options, for runs on several workers.
        gpus: to share among the runs, as CUDA_VISIBLE_DEVICES names them; empty: not shared here.
    """

    def __init__(
        self,
        study: Study,
        plans: Sequence[CellPlan],
        setup: Setup,
        source: JobSource,
        folder: StudyFolder,
        jobs: int,
        mpirun: str,
        gpus: Sequence[str] = (),
    ) -> None:
        self._study, self._setup, self._source, self._folder = study, setup, source, folder
        self._plans = {plan.cell: plan for plan in plans}
        self._jobs, self._mpirun, self._gpus = jobs, mpirun, gpus
        self._running: list[_Running] = []
        self._signals, self._signal_name = 0, ""
        self._began = time.monotonic()
        self._seconds: list[float] = []  # of runs of this process
        self._waits = False
        self._budget = ""  # why nothing more is started
        self._failure: exits.RunExit | None = None
        with writing(folder.path), folder.exclusive():
            self._journal = (
                None
                if study.tune is None
                else Journal(
                    folder.path / JOURNAL,
                    study.tune,
                    setup.score_lower_is_better if setup.tuned_by else setup.lower_is_better,
                )
            )

    def run(self) -> int:
        """Work; returns the exit code.

        Raises:
            RunExit: if a run ended for a reason that concerns all of them.
        """
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # as SIGHUP under nohup
                signal.signal(number, self._on_signal)
        try:
            self._remove_remains()
            self._work()
            self._tell_all()
        finally:
            for each in self._running:
                each.child.kill()
                each.child.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._failure is not None:
            raise self._failure
        if self._signals:
            print_status("stopped; the same command goes on")
            return exits.STOPPED
        if self._budget:
            left = self.total() - len(self._folder.records())
            print_status(f"{self._budget}; {left:,} runs are left")
        return exits.FINISHED

    def _remove_remains(self) -> None:
        """Of runs that ended, if a process was killed between their record and that."""
        for name in self._folder.records():
            if (self._folder.run_folder(name) / "checkpoints").exists():
                remove_large_files(self._folder.run_folder(name))

    def _tell_all(self) -> None:
        """Leave a journal that has all results, for Optuna's tools."""
        if self._journal is None:
            return
        with writing(self._folder.path), self._folder.exclusive():
            for plan in self._plans.values():
                if plan.search:
                    self._tell_ended(plan, self._folder.records())

    def total(self) -> int:
        """Runs of the whole study."""
        trials = sum(self._setup.trials for plan in self._plans.values() if plan.search)
        return trials + len(self._plans) * self._setup.repetitions

    # --- the loop

    def _work(self) -> None:
        next_try = 0.0
        while True:
            self._pass_on_signals()
            try:
                while (
                    not self._stops()
                    and len(self._running) < self._jobs
                    and time.monotonic() >= next_try
                ):
                    if not self._start_next():
                        next_try = time.monotonic() + _WAIT_SECONDS
            except exits.RunExit as error:
                self._fail(error)
            for each in list(self._running):
                if self._look_at(each):
                    next_try = 0.0
            if not self._running:
                if self._stops() or len(self._folder.records()) >= self.total():
                    return
                if next_try and not self._waits:
                    self._waits = True
                    print_status("waiting for runs of other processes")
            time.sleep(_POLL_SECONDS)

    def _stops(self) -> bool:
        """Whether no further run is started."""
        return bool(self._signals or self._failure or self._budget)

    def _on_signal(self, number: int, _: Any) -> None:
        self._signals += 1
        if self._signals == 1:
            self._signal_name = signal.Signals(number).name

    def _pass_on_signals(self) -> None:
        """Stop the runs after the first signal; end them after the second."""
        if self._signals and self._signal_name:
            name, self._signal_name = self._signal_name, ""
            count = len(self._running)
            with contextlib.suppress(OSError):  # a terminal that is gone
                print_status(
                    f"{name}: stopping {count} {'run' if count == 1 else 'runs'} with a "
                    "checkpoint; again: at once"
                )
        for each in self._running:
            if self._signals > 1:
                each.child.kill()
            elif self._signals or self._failure:
                each.child.stop()

    def _start_next(self) -> bool:
        """Start the next run that nobody else has; whether there was one."""
        minutes = (time.monotonic() - self._began) / 60
        if self._study.budget.minutes is not None and minutes >= self._study.budget.minutes:
            self._budget = f"budget.minutes: {self._study.budget.minutes:g} are over"
            return False
        with writing(self._folder.path), self._folder.exclusive():
            chosen = self._choose()
            if chosen is None:
                return False
            name, plan, how, claim = chosen
            try:
                self._begin(name, plan, how, claim)
            except BaseException:
                claim.close()
                raise
        return True

    def _begin(self, name: RunName, plan: CellPlan, how: Mapping[str, Any], claim: IO[str]) -> None:
        self._waits = False
        self._check_unchanged(plan)
        run_dir = self._folder.run_folder(name)
        run_dir.mkdir(parents=True, exist_ok=True)
        settings = {
            **self._study.set,
            **plan.settings,
            **how["settings"],
            "name": f"{self._study.name[:40]}-{name.slug}-{name.text}",
            "run_dir": str(run_dir.absolute()),
            "seed": how["seed"],
        }
        if self._source.text is not None:
            write_atomically(self._source.path, self._source.text)
        try:
            self._source.read(settings)
        except exits.JobError as error:  # these values in combination
            reason = " ".join(str(error).split())
            self._record(name, RunResult(**how, state="failed", reason=reason))
            claim.close()
            return
        taken = {each.slot for each in self._running}
        slot = next(slot for slot in range(self._jobs) if slot not in taken)
        child = Child(
            self._source,
            settings,
            self._study.workers,
            self._study.threads,
            self._mpirun,
            gpus_of_slot(self._gpus, slot, self._study.workers),
            self._folder.output_path(name),
            claim,
        )
        evaluations = JsonLines(run_dir / "metrics.jsonl")
        self._running.append(_Running(name, plan, how, slot, child, evaluations))

    def _check_unchanged(self, plan: CellPlan) -> None:
        """See that the file of the job is what it was when the study was checked.

        Raises:
            JobError: if it is not.
        """
        job = self._source.read({**self._study.set, **plan.settings}).resolved()
        if changed := differing_keys(plan.job.resolved(), job):
            raise exits.JobError(
                f"{self._source.path} has changed since this process began: "
                f"{', '.join(changed[:8])}"
            )

    # --- what to run next; under the lock of all processes

    def _choose(self) -> tuple[RunName, CellPlan, Mapping[str, Any], IO[str]] | None:
        records = self._folder.records()
        most = self._study.budget.trials
        claimed = 0
        chosen = None
        for name, plan, how_of in self._open_runs(records):
            if self._signals:
                break
            claim = self._folder.claim(name)
            if claim is None:
                claimed += 1
            elif chosen is None:
                chosen = (name, plan, how_of, claim)
                if most is None:
                    break
            else:
                claim.close()
        if chosen is None:
            return None
        if self._signals:
            chosen[3].close()
            return None
        if most is not None and len(records) + claimed >= most:
            chosen[3].close()
            self._budget = f"budget.trials: {most:,} runs have been started"
            return None
        name, plan, how_of, claim = chosen
        return name, plan, how_of(), claim

    def _open_runs(
        self, records: Records
    ) -> list[tuple[RunName, CellPlan, Callable[[], Mapping[str, Any]]]]:
        """Runs without a record whose settings can be decided, in the order of the work."""
        found = []
        for number in range(self._setup.trials):
            for plan in self._plans.values():
                name = RunName(plan.slug, TRIAL, number)
                if plan.search and name not in records and self._may_begin(plan, number, records):
                    found.append((name, plan, self._trial(plan, number, records)))
        for number in range(self._setup.repetitions):
            for plan in self._plans.values():
                name = RunName(plan.slug, REPETITION, number)
                if name not in records and self._is_tuned(plan, records):
                    found.append((name, plan, self._repetition(plan, number, records)))
        return found

    def _may_begin(self, plan: CellPlan, number: int, records: Records) -> bool:
        """Whether the trials of earlier rounds have ended."""
        assert self._study.tune is not None
        first = number - number % self._study.tune.round
        return all(RunName(plan.slug, TRIAL, each) in records for each in range(first))

    def _is_tuned(self, plan: CellPlan, records: Records) -> bool:
        if plan.tuned_at is None:
            return True
        slug = self._plans[plan.tuned_at].slug
        return all(RunName(slug, TRIAL, each) in records for each in range(self._setup.trials))

    def _trial(
        self, plan: CellPlan, number: int, records: Records
    ) -> Callable[[], Mapping[str, Any]]:
        def how() -> Mapping[str, Any]:
            assert self._journal is not None
            assert self._study.tune is not None
            self._tell_ended(plan, records)
            suggested = self._journal.settings(plan.slug)
            while len(suggested) <= number:
                settings = self._suggestion(plan, suggested, records)
                self._journal.add(plan.slug, settings, plan.search)
                suggested = self._journal.settings(plan.slug)
            return _how(plan, TRIAL, number, self._study.tune.seed, suggested[number])

        return how

    def _suggestion(
        self, plan: CellPlan, suggested: Sequence[Mapping[str, Any]], records: Records
    ) -> Mapping[str, Any]:
        """The settings of the trial after those that were suggested."""
        tune, number = self._study.tune, len(suggested)
        assert tune is not None
        if number == 0 and tune.sampler != "grid":
            return plan.base
        first = number - number % tune.round
        tried = [
            Tried(settings, self._setup.loss(records[RunName(plan.slug, TRIAL, at)]))
            if at < first
            else Tried(settings, None)
            for at, settings in enumerate(suggested)
        ]
        return suggest(tune, plan.search, plan.slug, tried)

    def _repetition(
        self, plan: CellPlan, number: int, records: Records
    ) -> Callable[[], Mapping[str, Any]]:
        def how() -> Mapping[str, Any]:
            settings: Mapping[str, Any] = {}
            if plan.tuned_at is not None:
                settings = best_settings(records, self._plans[plan.tuned_at].slug, self._setup.loss)
            return _how(plan, REPETITION, number, self._study.seed_list[number], settings)

        return how

    def _tell_ended(self, plan: CellPlan, records: Records) -> None:
        """Tell the journal of the trials that have ended."""
        assert self._journal is not None
        for number in range(len(self._journal.settings(plan.slug))):
            result = records.get(RunName(plan.slug, TRIAL, number))
            if result is not None:
                score = result.score if self._setup.tuned_by else result.value
                self._journal.finish(plan.slug, number, score, result.state == "pruned")

    # --- what has ended

    def _look_at(self, each: _Running) -> bool:
        """See how a run stands; whether it has ended."""
        code = each.child.code()
        if code is None:
            self._maybe_prune(each)
            return False
        self._running.remove(each)
        reason = printable(each.child.reason()) if code else ""
        try:
            self._finish(each, code, reason)
        except exits.RunExit as error:
            self._fail(error)
        finally:
            each.child.close()
        return True

    def _finish(self, each: _Running, code: int, reason: str) -> None:
        if each.pruned and code != exits.FINISHED:
            end: tuple[State, str] = ("pruned", f"after {len(each.values)} evaluations")
        elif code == exits.STOPPED or ((self._signals or self._failure) and code < 0):
            if not self._signals and self._failure is None:
                self._fail(
                    exits.Stopped(f"{each.name.slug} {each.name.text} was stopped: {reason}")
                )
            return
        elif code in _NOT_RESULTS:
            raise exits.run_exit(code, f"{self._title(each.plan, each.name)}: {reason}")
        else:
            end = end_of(code, reason)
            if end[0] == "failed" and not any(
                result.state == "finished" for result in self._folder.records().values()
            ):
                raise exits.run_exit(
                    code if code > 0 else exits.INTERNAL_ERROR,
                    f"{self._title(each.plan, each.name)} failed, and no run of the study has "
                    f"finished yet: {reason}; its output is in "
                    f"{self._folder.output_path(each.name)}",
                )
        result = result_of_run(
            self._folder.run_folder(each.name),
            each.how,
            self._study.metric,
            self._setup.tuned_by,
            end,
        )
        self._seconds.append(time.monotonic() - each.child.begun)
        self._record(each.name, result)
        remove_large_files(self._folder.run_folder(each.name))
        if result.state == "finished":
            self._folder.output_path(each.name).unlink(missing_ok=True)

    def _record(self, name: RunName, result: RunResult) -> None:
        self._folder.write_record(name, result)
        records = self._folder.records()
        settings = ", ".join(f"{key} {_short(value)}" for key, value in result.settings.items())
        outcome = (
            f"{self._setup.metric} {result.value:.6g}" if result.value is not None else result.state
        )
        reason = f" ({result.reason[:120]})" if result.reason else ""
        plan = self._plans[result.cell]
        print_status(
            printable(
                f"{len(records):>{len(str(self.total()))}}/{self.total()} | "
                f"{self._title(plan, name)}{f' | {settings}' if settings else ''} | "
                f"{outcome}{reason} | {self._time_left(len(records))}"
            )
        )

    def _time_left(self, ended: int) -> str:
        """The time left, at the pace of this process's own runs."""
        left = self.total() - ended
        if not left:
            return "the last run"
        if not self._seconds:
            return f"{left:,} left"
        seconds = statistics.fmean(self._seconds[-50:]) * left / self._jobs
        return f"about {_duration(seconds)} left"

    def _title(self, plan: CellPlan, name: RunName) -> str:
        return f"{in_words(self._study, plan.cell)}, {name.kind} {name.number}"

    def _fail(self, error: exits.RunExit) -> None:
        if self._failure is None:
            self._failure = error
        else:
            print_error(str(error))

    # --- pruning

    def _maybe_prune(self, each: _Running) -> None:
        tune, now = self._study.tune, time.monotonic()
        if tune is None or tune.pruner == "none" or each.name.kind != TRIAL or each.pruned:
            return
        if now < each.next_look:
            return
        each.next_look = now + _PRUNE_SECONDS
        if not each.evaluations.continues():  # it has resumed
            each.evaluations, each.values = JsonLines(each.evaluations.path), []
        count = len(each.values)
        for record in each.evaluations.read():
            value = finite(record.get(self._setup.tuned_by or self._study.metric))
            if value is not None:
                each.values.append(value)
        if len(each.values) == count:
            return
        assert self._journal is not None
        with writing(self._folder.path), self._folder.exclusive():
            if self._journal.prune(each.name.slug, each.name.number, each.values):
                each.pruned = True
                each.child.kill()


def best_settings(
    records: Records, slug: str, loss: Callable[[RunResult], float]
) -> Mapping[str, Any]:
    """The settings of the best trial of a cell; of equal ones the first. If all have failed, those
    of the first.
    """
    trials = sorted(
        (each for name, each in records.items() if name.slug == slug and name.kind == TRIAL),
        key=lambda each: each.number,
    )
    return min(trials, key=loss).settings


def _how(
    plan: CellPlan, kind: str, number: int, seed: int, settings: Mapping[str, Any]
) -> Mapping[str, Any]:
    return {
        "cell": plan.cell,
        "kind": kind,
        "number": number,
        "seed": seed,
        "settings": dict(settings),
    }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    """A time in words.

    >>> _duration(30), _duration(600), _duration(9000)
    ('30 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def folder_of(study: Study, given: str | None) -> Path:
    """The folder of a study: as given, or runs/NAME."""
    return Path("runs") / study.name if given is None else Path(given)
