"""Tests the engine's laws on random jobs, with threads as ranks or over MPI and Horovod.

    python trials/laws.py --jobs 5000 --processes 2        ranks are threads of one process
    mpirun -np 3 python trials/laws.py --jobs 200          one world over the real channels
    python trials/laws.py --replay trials/found/x.json     one case, or all cases of a folder

Each job must be rejected before its first step, with the same message on any number of workers, or
satisfy: law 0, one worker has the results of a plain loop (reference.py); law 1, n workers have the
results of one; law 2, a run that is stopped or killed and resumed, on as many workers or on others,
has the results of an uninterrupted run; law 3, exact mode is bit-identical. Exit code 1 if a law is
violated. Violations are written to a file at once, as cases for --replay.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed

from trials import engine, judge
from trials.cases import Case, cases
from trials.judge import Verdict

Judge = Callable[[Case], Verdict]
_CHUNK = 200  # cases per call of Hypothesis


class _OutOfTime(BaseException):
    """Not caught by Hypothesis."""


class Tally:
    """Counts of verdicts, and the violations.

    Args:
        file: for violations, one JSON object per line.
        shrink_seconds: time to shrink each new kind of violation.
        until: end of the trial, by time.monotonic().
    """

    def __init__(self, file: Path, shrink_seconds: float, until: float) -> None:
        self.jobs = 0
        self.kinds: Counter[str] = Counter()
        self.laws: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.violations: dict[str, dict[str, Any]] = {}  # smallest case by kind
        self.times: Counter[str] = Counter()  # violations by kind
        self._file, self._shrink_seconds, self._until = file, shrink_seconds, until
        self._shrinking: tuple[str, float] | None = None

    def draw(self, number: int, seed: int, judged: Judge, **drawn: Any) -> None:
        """Draw and judge `number` cases, in chunks; a new kind of violation is shrunk and ends its
        chunk.
        """
        chunk, start = 0, time.monotonic()
        while self.jobs < number:
            before = self.jobs
            try:
                self._chunk(min(_CHUNK, number - self.jobs), seed * 100_003 + chunk, judged, drawn)
            except _OutOfTime:
                if time.monotonic() >= self._until:
                    return
            except AssertionError:  # raised by _note, which recorded the case
                pass
            self._shrinking = None
            chunk += 1
            if self.jobs == before:
                raise RuntimeError("Hypothesis drew no case")
            seconds = time.monotonic() - start
            found = f"{self.kinds['violation']} violations"
            message = f"seed {seed}: {self.jobs:,} of {number:,} jobs, {found}, {seconds:.0f} s"
            print(message, file=sys.stderr, flush=True)

    def _chunk(self, number: int, seed: int, judged: Judge, drawn: dict[str, Any]) -> None:
        phases = [Phase.generate, Phase.shrink] if self._shrink_seconds else [Phase.generate]

        @hypothesis_seed(seed)
        @settings(
            max_examples=number,
            deadline=None,
            database=None,
            phases=phases,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        @given(cases(**drawn))
        def one(case: Case) -> None:
            self.one(case, judged)

        one()

    def one(self, case: Case, judged: Judge) -> None:
        """Judge one case; raises AssertionError for a new kind of violation, so that Hypothesis
        shrinks it.
        """
        if time.monotonic() >= self._until:
            raise _OutOfTime
        if self._shrinking is not None and time.monotonic() >= self._shrinking[1]:
            raise _OutOfTime
        verdict = judged(case)
        kind = kind_of(verdict)
        if self._shrinking is None:
            self.jobs += 1
            self.kinds[verdict.kind] += 1
            self.laws.update(verdict.laws)
            if verdict.kind == "refused":
                self.refusals[" ".join(verdict.reason.split()[:8])] += 1
        elif kind != self._shrinking[0]:
            return
        if verdict.kind == "violation":
            self._note(case, verdict, kind)

    def _note(self, case: Case, verdict: Verdict, kind: str) -> None:
        self.times[kind] += self._shrinking is None
        new = kind not in self.violations
        if new or len(json.dumps(case)) <= len(json.dumps(self.violations[kind]["case"])):
            self.violations[kind] = {"kind": kind, "reason": verdict.reason, "case": case}
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.violations[kind]) + "\n")
        if self._shrink_seconds and (new or self._shrinking is not None):
            if self._shrinking is None:
                self._shrinking = (kind, time.monotonic() + self._shrink_seconds)
            raise AssertionError(kind)

    def add(self, other: Tally) -> None:
        """Add the counts and violations of another process."""
        self.jobs += other.jobs
        for name in ("kinds", "laws", "refusals", "times"):
            getattr(self, name).update(getattr(other, name))
        self.violations = other.violations | self.violations

    def lines(self, seconds: float) -> list[str]:
        """The summary."""
        lines = [
            f"{self.jobs} jobs in {seconds:.0f} s ({self.jobs / max(seconds, 1e-9):.1f} a second)"
        ]
        lines += [f"  {kind:10} {count}" for kind, count in self.kinds.most_common()]
        lines += [f"  law {law:12} held by {count}" for law, count in sorted(self.laws.items())]
        lines += [
            f"  refused {count:4}: {reason}" for reason, count in self.refusals.most_common(40)
        ]
        for kind, violation in self.violations.items():
            lines += [
                f"VIOLATION ({self.times[kind]} times) {violation['reason'][:600]}",
                f"  {json.dumps(violation['case'])}",
            ]
        return lines


def kind_of(verdict: Verdict) -> str:
    """The beginning of the reason without numbers, to group violations with the same cause."""
    words = verdict.reason.split()[:9]
    return " ".join("#" if any(letter.isdigit() for letter in word) else word for word in words)


def judge_on_threads(case: Case) -> Verdict:
    """Judge a case on worlds of threads."""
    with engine.scratch() as folder:
        return judge.judge(case, folder)


def main() -> int:
    """Draw cases and judge them; returns the exit code."""
    options = _parse()
    if options.replay is not None:
        return replay(options.replay)
    start = time.monotonic()
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        from trials import over_mpi

        return over_mpi.main(options)
    if options.processes == 1:
        tally = _share(0, options)
    else:
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            tally, *others = pool.starmap(
                _share, [(number, options) for number in range(options.processes)]
            )
        for other in others:
            tally.add(other)
    print("\n".join(tally.lines(time.monotonic() - start)))
    return 1 if tally.violations else 0


def _share(number: int, options: argparse.Namespace) -> Tally:
    """One process's share of the jobs."""
    warnings.simplefilter("ignore")
    jobs = options.jobs // options.processes + (number < options.jobs % options.processes)
    tally = Tally(options.found, options.shrink_seconds, time.monotonic() + 60 * options.minutes)
    tally.draw(jobs, options.seed * 1000 + number, judge_on_threads)
    return tally


def replay(path: Path) -> int:
    """Judge the case in a file, or in each file of a folder; returns 1 if one violates a law."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    violated = False
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            verdict = judge_on_threads(record.get("case", record))
            violated |= verdict.kind == "violation"
            print(f"{file.name}: {verdict.kind} {', '.join(verdict.laws)} {verdict.reason}")
    return int(violated)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=24 * 60, help="time limit")
    parser.add_argument(
        "--shrink-seconds",
        type=float,
        default=20.0,
        help="time to shrink each kind of violation; 0: do not shrink",
    )
    parser.add_argument(
        "--found",
        type=Path,
        default=Path("violations.jsonl"),
        help="file for violations",
    )
    parser.add_argument("--replay", type=Path, help="a file of cases, or a folder of such files")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
