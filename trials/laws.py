"""Holds jobs drawn at random against the engine's laws, on worlds of threads or over real MPI and
Horovod.

    python trials/laws.py --jobs 5000 --processes 2        ranks are threads of one process
    mpirun -np 3 python trials/laws.py --jobs 200          one world over the real channels
    python trials/laws.py --replay trials/found/x.json     one case, or all of a folder

Each job must be refused before its first step, in the same words on every number of workers, or
hold: law 0, one worker comes to what a plain loop comes to (reference.py); law 1, n workers come to
what one comes to; law 2, stopped or killed and started again, on as many workers or others, a run
comes to what it comes to undisturbed; law 3, exact mode, to the last bit. Exit code 1 if one does
not. A violation is written to a file as soon as it is found, as a case that --replay takes.
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
_CHUNK = 200  # cases that are drawn together


class _Enough(BaseException):
    """Time is up; Hypothesis does not catch it."""


class Tally:
    """What has been found so far.

    Args:
        found: the file for violations, one JSON object a line.
        shrink_seconds: how long a new kind of violation is made smaller.
        until: when to end, by time.monotonic().
    """

    def __init__(self, found: Path, shrink_seconds: float, until: float) -> None:
        self.jobs = 0
        self.kinds: Counter[str] = Counter()
        self.laws: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.violations: dict[str, dict[str, Any]] = {}  # the smallest case of each kind
        self.times: Counter[str] = Counter()  # how often each kind of violation was found
        self._found, self._shrink_seconds, self._until = found, shrink_seconds, until
        self._shrinking: tuple[str, float] | None = None

    def draw(self, number: int, seed: int, judged: Judge, **drawn: Any) -> None:
        """Draw and judge `number` cases; a new kind of violation ends a chunk of them, when it has
        been made smaller.
        """
        chunk = 0
        while self.jobs < number:
            before = self.jobs
            try:
                self._chunk(min(_CHUNK, number - self.jobs), seed * 100_003 + chunk, judged, drawn)
            except _Enough:
                if time.monotonic() >= self._until:
                    return
            except AssertionError:  # the smallest case has been noted
                pass
            self._shrinking = None
            chunk += 1
            if self.jobs == before:
                raise RuntimeError("Hypothesis draws nothing")

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
        """Judge one case; a new kind of violation is raised, so that Hypothesis makes it
        smaller.
        """
        if time.monotonic() >= self._until:
            raise _Enough
        if self._shrinking is not None and time.monotonic() >= self._shrinking[1]:
            raise _Enough
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
            with self._found.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.violations[kind]) + "\n")
        if self._shrink_seconds and (new or self._shrinking is not None):
            if self._shrinking is None:
                self._shrinking = (kind, time.monotonic() + self._shrink_seconds)
            raise AssertionError(kind)

    def add(self, other: Tally) -> None:
        """Take another process's findings in."""
        self.jobs += other.jobs
        for name in ("kinds", "laws", "refusals", "times"):
            getattr(self, name).update(getattr(other, name))
        self.violations = other.violations | self.violations

    def lines(self, seconds: float) -> list[str]:
        """The summary."""
        found = [
            f"{self.jobs} jobs in {seconds:.0f} s ({self.jobs / max(seconds, 1e-9):.1f} a second)"
        ]
        found += [f"  {kind:10} {count}" for kind, count in self.kinds.most_common()]
        found += [f"  law {law:12} held by {count}" for law, count in sorted(self.laws.items())]
        found += [
            f"  refused {count:4}: {reason}" for reason, count in self.refusals.most_common(40)
        ]
        for kind, violation in self.violations.items():
            found += [
                f"VIOLATION ({self.times[kind]} times) {violation['reason'][:600]}",
                f"  {json.dumps(violation['case'])}",
            ]
        return found


def kind_of(verdict: Verdict) -> str:
    """What two violations share that are probably the same: the reason without its numbers."""
    words = verdict.reason.split()[:9]
    return " ".join("#" if any(letter.isdigit() for letter in word) else word for word in words)


def judge_here(case: Case) -> Verdict:
    """Judge a case on worlds of threads."""
    with engine.scratch() as place:
        return judge.judge(case, place)


def main() -> int:
    """Draw cases and judge them; returns the exit code."""
    options = _parse()
    if options.replay is not None:
        return replay(options.replay)
    began = time.monotonic()
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
    print("\n".join(tally.lines(time.monotonic() - began)))
    return 1 if tally.violations else 0


def _share(number: int, options: argparse.Namespace) -> Tally:
    """One process's share of the jobs."""
    warnings.simplefilter("ignore")
    jobs = options.jobs // options.processes + (number < options.jobs % options.processes)
    tally = Tally(options.found, options.shrink_seconds, time.monotonic() + 60 * options.minutes)
    tally.draw(jobs, options.seed * 1000 + number, judge_here)
    return tally


def replay(path: Path) -> int:
    """Judge the case in a file, or in each file of a folder; returns 1 if one violates a law."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    violated = False
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            read = json.loads(line)
            verdict = judge_here(read.get("case", read))
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
    parser.add_argument("--minutes", type=float, default=24 * 60, help="end after so long")
    parser.add_argument(
        "--shrink-seconds",
        type=float,
        default=20.0,
        help="for each kind of violation; 0: as it was found",
    )
    parser.add_argument(
        "--found",
        type=Path,
        default=Path("violations.jsonl"),
        help="where violations are written down",
    )
    parser.add_argument("--replay", type=Path, help="a file of cases, or a folder of such files")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
