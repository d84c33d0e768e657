"""Runs the trials and repetitions of a study, alone or beside other processes on its folder."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from hvdlarge import exits
from hvdlarge.config.job import Job
from hvdlarge.config.job_file import parse_job
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
from hvdlarge.study.results import FINALIST, REPETITION, TRIAL, Cell, RunResult, Setup
from hvdlarge.study.search import Journal, Tried, suggest
from hvdlarge.study.study_file import Study
from hvdlarge.telemetry.console import print_error, print_status

Records = dict[RunName, RunResult]
Best = Mapping[Cell | None, Mapping[str, Any]]  # settings, of each cell whose tuning has ended
Ranked = Mapping[Cell, Sequence[RunResult]]  # trials, of each cell whose trials have ended
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_POLL_SECONDS = 0.05
_WAIT_SECONDS = 0.5  # for runs of other processes, at first
_LONGEST_WAIT_SECONDS = 5.0
_PRUNE_SECONDS = 1.0
_MOST_FAILURES = 3  # of a process beside others
# Ends that say nothing of the settings: the study ends with them
_NOT_RESULTS = (exits.WRONG_ENVIRONMENT, exits.CHECKPOINT_WRITE_FAILED)


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
        self._plan_of = {plan.slug: plan for plan in plans}
        self._jobs, self._mpirun, self._gpus = jobs, mpirun, gpus
        self._running: list[_Running] = []
        self._signals, self._signal_name = 0, ""
        self._began = time.monotonic()
        self._seconds: list[float] = []  # of runs of this process
        self._waits = False
        self._ended = False  # all runs of the study have
        self._works = False  # a run of this process has ended as it should, or by its settings
        self._failures: list[RunName] = []  # of this process before that, not recorded
        self._budget = ""  # why nothing more is started
        self._failure: exits.RunExit | None = None
        self._journal = None
        if study.tune is not None:
            lower = setup.score_lower_is_better if setup.tuned_by else setup.lower_is_better
            self._journal = Journal(folder.path / JOURNAL, study.tune, lower)
        finalists = 0 if study.tune is None else study.tune.finalist_runs
        kinds = ((TRIAL, setup.trials), (FINALIST, finalists), (REPETITION, setup.repetitions))
        self._names = [
            RunName(plan.slug, kind, number)
            for kind, count in kinds
            for number in range(count)
            for plan in plans
            if plan.search or kind == REPETITION
        ]

    def run(self) -> int:
        """Work; returns the exit code.

        Raises:
            RunExit: if a run ended for a reason that concerns all of them.
        """
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # as SIGHUP under nohup
                signal.signal(number, self._on_signal)
        with writing(self._folder.path):
            self._joined = self._folder.join()
        try:
            self._work()
            self._remove_remains()
            self._tell_all()
        finally:
            for each in self._running:
                each.child.kill()
                each.child.close()
            self._joined.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._failure is not None:
            raise self._failure
        if self._signals:
            tell("stopped; the same command goes on")
            return exits.STOPPED
        if self._budget:
            tell(f"{self._budget}; {self.total() - self.ended():,} runs are left")
        return exits.FINISHED

    def _remove_remains(self) -> None:
        """Of runs that ended, if a process was killed between their record and that."""
        with writing(self._folder.path), self._folder.exclusive():
            for name in self._folder.records():
                if (self._folder.run_folder(name) / "checkpoints").exists():
                    remove_large_files(self._folder.run_folder(name))

    def _tell_all(self) -> None:
        """Leave a journal that has all results, for Optuna's tools."""
        if self._journal is None:
            return
        with writing(self._folder.path), self._folder.exclusive():
            records = self._folder.records()
            for plan in self._plans.values():
                if plan.search:
                    # Not beyond the first that is open: its settings depend on results to come
                    trials = (RunName(plan.slug, TRIAL, at) for at in range(self._setup.trials))
                    ended = list(itertools.takewhile(records.__contains__, trials))
                    self._suggested(plan, len(ended), records)
                    self._tell_ended(plan, records)

    def total(self) -> int:
        """Runs of the whole study."""
        return len(self._names)

    def ended(self) -> int:
        """Those that have ended. Other processes may have runs of an extended study."""
        records = self._folder.records()
        return sum(name in records for name in self._names)

    # --- the loop

    def _work(self) -> None:
        next_try, wait = 0.0, _WAIT_SECONDS
        while self._running or not (self._ended or self._stops()):
            self._pass_on_signals()
            if self._may_start() and time.monotonic() >= next_try:
                if self._start_next():
                    continue
                next_try, wait = time.monotonic() + wait, min(1.5 * wait, _LONGEST_WAIT_SECONDS)
            for each in list(self._running):
                if self._look_at(each):
                    next_try, wait = 0.0, _WAIT_SECONDS
            if next_try and not (self._running or self._ended or self._stops() or self._waits):
                self._waits = True
                tell("waiting for runs of other processes")
            time.sleep(_POLL_SECONDS)

    def _may_start(self) -> bool:
        return not self._stops() and len(self._running) < self._jobs

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
            tell(
                f"{name}: stopping {count} {'run' if count == 1 else 'runs'} with a checkpoint; "
                "again: at once"
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
        try:
            with writing(self._folder.path), self._folder.exclusive():
                self._folder.check_unchanged()
                chosen = self._choose()
                if chosen is None:
                    return False
                try:
                    self._begin(*chosen)
                except BaseException:
                    chosen[-1].close()
                    raise
        except exits.RunExit as error:
            self._fail(error)
            return False
        return True

    def _begin(self, name: RunName, plan: CellPlan, how: Mapping[str, Any], claim: IO[str]) -> None:
        self._waits = False
        self._check_unchanged(plan)
        run_dir = self._folder.run_folder(name)
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
            job = self._source.read(settings)
        except exits.JobError as error:  # these values in combination
            reason = " ".join(str(error).split())
            self._record(name, RunResult(**how, state="failed", reason=reason))
            claim.close()
            return
        if _holds_another_job(run_dir, job, self._source):
            shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir(parents=True, exist_ok=True)
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
        ranked = self._ranked(records)
        self._discard_outdated(lambda name: self._finalist(name, ranked), records)
        best = self._best(ranked, records)
        self._discard_outdated(lambda name: self._repeated(name, best), records)
        self._ended = all(name in records for name in self._names)
        most, begun, chosen = self._most_begun(records), len(records), None
        for name in self._open_runs(ranked, best, records):
            if self._signals or (most is not None and begun >= most):
                break
            claim = self._folder.claim(name)
            if claim is None:
                begun += 1
            elif chosen is None:
                chosen = (name, claim)
                if most is None:
                    break
            else:
                claim.close()
        if most is not None and begun >= most:
            self._budget = f"budget.trials: {most:,} runs have been started"
        if chosen is None:
            return None
        name, claim = chosen
        if self._signals or self._budget:
            claim.close()
            return None
        plan = self._plan_of[name.slug]
        return name, plan, self._details(name, plan, ranked, best, records), claim

    def _most_begun(self, records: Records) -> int | None:
        """The limit of runs that all processes begin, if it is less than all of them."""
        most = self._study.budget.trials
        if most is None:
            return None
        others = len(records.keys() - set(self._names))  # of an extended study
        return most if most < self.total() + others else None

    def _ranked(self, records: Records) -> Ranked:
        """The trials of each cell whose trials have all ended, the best one first."""
        found = {}
        for plan in self._plans.values():
            names = [RunName(plan.slug, TRIAL, number) for number in range(self._setup.trials)]
            if plan.search and all(name in records for name in names):
                found[plan.cell] = sorted(  # stable: of equal ones the first
                    (records[name] for name in names), key=self._setup.loss
                )
        return found

    def _best(self, ranked: Ranked, records: Records) -> Best:
        """The settings of repetitions, by the cells that they are tuned at."""
        best: dict[Cell | None, Mapping[str, Any]] = {None: {}}
        for cell, trials in ranked.items():
            assert self._study.tune is not None
            count, seeds = self._study.tune.finalist_runs, self._study.tune.finalist_seeds
            names = [RunName(self._plans[cell].slug, FINALIST, at) for at in range(count)]
            if all(name in records for name in names):
                losses = [self._setup.loss(records[name]) for name in names]
                best[cell] = best_settings(trials, losses, seeds, self._setup.loss)
        return best

    def _finalist(self, name: RunName, ranked: Ranked) -> Mapping[str, Any] | None:
        """The settings of a finalist; None if it is none, or they are not known yet."""
        trials = ranked.get(self._plan_of[name.slug].cell)
        if name.kind != FINALIST or trials is None:
            return None
        assert self._study.tune is not None
        return trials[name.number // self._study.tune.finalist_seeds].settings

    def _repeated(self, name: RunName, best: Best) -> Mapping[str, Any] | None:
        """The settings of a repetition; None if it is none, or they are not known yet."""
        return best.get(self._plan_of[name.slug].tuned_at) if name.kind == REPETITION else None

    def _discard_outdated(
        self, settings_of: Callable[[RunName], Mapping[str, Any] | None], records: Records
    ) -> None:
        """Discard runs of settings that are no longer the best ones, after failed trials were
        trained again; also those that another process trained meanwhile.
        """
        for name in self._names:
            settings = settings_of(name)
            if settings is None or name not in records or records[name].settings == settings:
                continue
            del records[name]  # if it cannot be discarded now, it is waited for
            if self._folder.discard(name):
                title = self._title(self._plan_of[name.slug], name)
                tell(f"{title} is trained again, with the new best settings")

    def _open_runs(self, ranked: Ranked, best: Best, records: Records) -> list[RunName]:
        """Runs without a record whose settings can be decided, in the order of the work."""
        found = [
            name
            for name in self._names
            if name not in records
            and (
                self._may_begin(name, records)
                if name.kind == TRIAL
                else self._finalist(name, ranked) is not None
                or self._repeated(name, best) is not None
            )
        ]
        return sorted(found, key=self._failures.__contains__)  # those that failed here last

    def _details(
        self, name: RunName, plan: CellPlan, ranked: Ranked, best: Best, records: Records
    ) -> Mapping[str, Any]:
        """What a run trains."""
        if name.kind == TRIAL:
            return self._trial(plan, name.number, records)
        finalist = self._finalist(name, ranked)
        if finalist is not None:
            assert self._study.tune is not None
            seed = self._study.tune.seed_of_finalist(name.number)
            return _how(plan, FINALIST, name.number, seed, finalist)
        seed = self._study.seed_list[name.number]
        return _how(plan, REPETITION, name.number, seed, best[plan.tuned_at])

    def _may_begin(self, name: RunName, records: Records) -> bool:
        """Whether the trials of earlier rounds have ended."""
        assert self._study.tune is not None
        first = name.number - name.number % self._study.tune.round
        return all(name._replace(number=number) in records for number in range(first))

    def _trial(self, plan: CellPlan, number: int, records: Records) -> Mapping[str, Any]:
        assert self._journal is not None
        assert self._study.tune is not None
        if self._journal.has_finished(plan.slug, number):  # its record was discarded
            self._journal.begin_anew()
        suggested = self._suggested(plan, number + 1, records)
        self._tell_ended(plan, records)
        return _how(plan, TRIAL, number, self._study.tune.seed, suggested[number])

    def _suggested(
        self, plan: CellPlan, count: int, records: Records
    ) -> Sequence[Mapping[str, Any]]:
        """The settings of the first trials. Of those that the journal has not, it gets the recorded
        ones, else what the records of earlier rounds suggest.
        """
        assert self._journal is not None
        journaled = self._journal.settings(plan.slug)
        found: list[Mapping[str, Any]] = []
        for number in range(count):
            result = records.get(RunName(plan.slug, TRIAL, number))
            if result is not None:
                found.append(result.settings)
            elif number < len(journaled):
                found.append(journaled[number])
            else:
                found.append(self._suggestion(plan, found, records))
            if number >= len(journaled):
                self._journal.add(plan.slug, found[number], plan.search)
        return found

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
            try:
                self._maybe_prune(each)
            except exits.RunExit as error:
                self._fail(error)
            return False
        self._running.remove(each)
        reason = printable(each.child.reason()) if code else ""
        try:
            with writing(self._folder.path):
                self._finish(each, code, reason)
        except exits.RunExit as error:
            self._fail(error)
        finally:
            each.child.close()
        return True

    def _finish(self, each: _Running, code: int, reason: str) -> None:
        end = self._end(each, code, reason)
        if end is None:
            return
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
            with contextlib.suppress(OSError):
                self._folder.output_path(each.name).unlink(missing_ok=True)

    def _end(self, each: _Running, code: int, reason: str) -> tuple[State, str] | None:
        """How a run ended; None if it is to go on, here or elsewhere.

        Raises:
            RunExit: if the reason concerns the other runs of this process too.
        """
        stopping = bool(self._signals or self._failure)
        if each.pruned and code != exits.FINISHED:
            return "pruned", f"after {len(each.values)} evaluations"
        if code in _NOT_RESULTS:
            raise exits.run_exit(code, f"{self._title(each.plan, each.name)}: {reason}")
        if code == exits.STOPPED or -code in _SIGNALS:
            if not stopping:
                self._fail(
                    exits.Stopped(f"{each.name.slug} {each.name.text} was stopped: {reason}")
                )
            return None
        # A launcher that ends its ranks, after the grace time or a second signal, has mpirun's code
        if stopping and code not in (exits.FINISHED, exits.DIVERGED):
            return None
        end = end_of(code, reason)
        if end[0] == "failed":
            return end if self._is_result(each, code, end[1]) else None
        self._works, self._failures = True, []
        return end

    def _is_result(self, each: _Running, code: int, reason: str) -> bool:
        """Whether a failure is one of the run. It may be one of this process: of its host, say.

        Where others share the study, this process must have shown that it can train, or they would
        lose all runs to it. What fails before is not recorded: any process tries it again, this one
        after all other runs. A process alone records it: with nothing left but runs that do fail,
        a study could not end otherwise, and --retry-failed repeats them.

        Raises:
            RunExit: if this process is to end.
        """
        where = f"{reason}; its output is in {self._folder.output_path(each.name)}"
        title, code = self._title(each.plan, each.name), code if code > 0 else exits.INTERNAL_ERROR
        if not any(result.state == "finished" for result in self._folder.records().values()):
            raise exits.run_exit(
                code, f"{title} failed, and no run of the study has finished yet: {where}"
            )
        if self._works or not self._folder.is_shared(self._joined):
            return True
        self._failures.append(each.name)
        if len(self._failures) == _MOST_FAILURES:
            raise exits.run_exit(
                code,
                f"{_MOST_FAILURES} runs in a row failed, and none of this process has finished: "
                f"they are left to the other processes. The last, {title}: {where}",
            )
        tell(printable(f"{title} failed and is not recorded yet: {where}"))
        return False

    def _record(self, name: RunName, result: RunResult) -> None:
        self._folder.write_record(name, result)
        ended = self.ended()
        settings = ", ".join(f"{key} {_short(value)}" for key, value in result.settings.items())
        outcome = (
            f"{self._setup.metric} {result.value:.6g}" if result.value is not None else result.state
        )
        reason = f" ({result.reason[:120]})" if result.reason else ""
        title = self._title(self._plans[result.cell], name)
        tell(
            printable(
                f"{ended:>{len(str(self.total()))}}/{self.total()} | "
                f"{title}{f' | {settings}' if settings else ''} | "
                f"{outcome}{reason} | {self._time_left(ended)}"
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
            with contextlib.suppress(OSError):
                print_error(str(error))

    # --- pruning

    def _maybe_prune(self, each: _Running) -> None:
        tune, now = self._study.tune, time.monotonic()
        if tune is None or tune.pruner == "none" or each.name.kind != TRIAL or each.pruned:
            return
        if now < each.next_look:
            return
        each.next_look = now + _PRUNE_SECONDS
        count = len(each.values)
        with contextlib.suppress(OSError):  # it is read again the next time
            self._read_evaluations(each)
        if len(each.values) == count:
            return
        assert self._journal is not None
        with writing(self._folder.path), self._folder.exclusive():
            if self._journal.prune(each.name.slug, each.name.number, each.values):
                each.pruned = True
                each.child.kill()

    def _read_evaluations(self, each: _Running) -> None:
        if not each.evaluations.continues():  # it has resumed
            each.evaluations, each.values = JsonLines(each.evaluations.path), []
        for record in each.evaluations.read():
            value = finite(record.get(self._setup.tuned_by or self._study.metric))
            if value is not None:
                each.values.append(value)


def tell(text: str) -> None:
    """Print a line for the user; a terminal that is gone, or a full disk, ends no run."""
    with contextlib.suppress(OSError):
        print_status(text)


def _holds_another_job(folder: Path, job: Job, source: JobSource) -> bool:
    """Whether a folder was left by a run of other settings, which this one could not go on with."""
    try:
        text = (folder / "job.resolved.yaml").read_text(encoding="utf-8")
        return parse_job(text, str(source.place)).resume_signature() != job.resume_signature()
    except (OSError, ValueError, exits.JobError):  # the run says what is wrong with it
        return False


def best_settings(
    trials: Sequence[RunResult],
    losses: Sequence[float],
    seeds: int,
    loss: Callable[[RunResult], float],
) -> Mapping[str, Any]:
    """The settings of a cell's repetitions: of the finalist with the best mean over all its seeds,
    of equal ones the first; without finalists of the best trial.

    Args:
        trials: of the cell, the best one first.
        losses: of the finalists' runs with further seeds: those of the first, then of the second…
        seeds: how many a finalist has.
        loss: by which runs are compared.
    """
    finalists = range(max(1, len(losses) // seeds))
    means = [
        statistics.fmean([loss(trials[at]), *losses[at * seeds : (at + 1) * seeds]])
        for at in finalists
    ]
    return trials[means.index(min(means))].settings


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
