"""Holds one drawn case against the laws: every run that it asks for is made, and what differs is
told.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hvdlarge import exits
from hvdlarge.config.job import Job
from hvdlarge.controller import Controller
from trials import blocks, engine, reference
from trials.cases import Case
from trials.engine import Interruption, Outcome
from trials.folder import contents
from trials.thread_world import kept_generators

# Largest relative distance of a tensor, by precision: from the reference, and between numbers of
# workers.
FROM_REFERENCE = {"fp64": 1e-9, "fp32": 1e-4}
# In 16 bits only exact mode is drawn
BETWEEN_WORLDS = {"fp64": 1e-10, "fp32": 1e-4, "bf16": 1e-6, "fp16": 1e-6}
CHAOS = 1000.0  # times what a last bit does is still rounding
_LEAST_NORM = 1e-3  # of a tensor that a distance is relative to

# job, run folder, workers, seed of the world, interruption
Start = Callable[[Mapping[str, Any], Path, int, int, Interruption | None], Outcome]


@dataclass
class Verdict:
    """What became of a case.

    Attributes:
        kind: held, refused, chaotic or violation.
        laws: those that were tried and held.
        reason: of a refusal; of a violation, the law and what broke it.
    """

    kind: str
    laws: list[str] = field(default_factory=list)
    reason: str = ""


class Broken(Exception):
    """A law does not hold."""


def judge(case: Case, place: Path, start: Start = engine.train) -> Verdict:
    """Try every law that a case asks for.

    Args:
        case: as `cases.py` draws it.
        place: a folder for its runs.
        start: starts a run; of one worker always in this process.
    """
    trial = _Trial(case, place, start)
    try:
        return trial.verdict()
    except Broken as broken:
        return Verdict("violation", trial.held, str(broken))


class _Trial:
    def __init__(self, case: Case, place: Path, start: Start) -> None:
        self.case, self.place, self.start = case, place, start
        self.job: dict[str, Any] = case["job"]
        self.held: list[str] = []
        self.chaotic = False
        self._folders = 0
        self._amplified: float | None = None

    def verdict(self) -> Verdict:
        """Of the case."""
        alone = self.run(1)
        many = self.run(self.case["workers"]) if self.case["workers"] > 1 else alone
        self.whole(alone, "1 worker")
        self.whole(many, f"{self.case['workers']} workers")
        if (ended := self.ended_alike(alone, many)) is not None:
            return ended
        if self.has_reference():
            self.law("0 reference", self.like_the_reference, alone)
        if many is not alone:
            self.law("1 world", self.like_one_worker, many, alone)
            if self.job["reduction"] == "exact":
                self.law("3 exact", self.same_state, many, alone)
        if self.case["interruptions"]:
            self.law("2 resume", self.interrupted, many, alone)
        if self.case["seed"] % 3 == 0:
            self.law("4 finished", self.left_alone, many)
        return Verdict("chaotic" if self.chaotic else "held", self.held)

    def law(self, name: str, holds: Callable[..., None], *arguments: Any) -> None:
        """Try one law."""
        try:
            holds(*arguments)
        except Broken as broken:
            raise Broken(f"law {name}: {broken}") from None
        self.held.append(name)

    def run(
        self,
        workers: int,
        folder: Path | None = None,
        more: int = 0,
        breaks: Interruption | None = None,
    ) -> Outcome:
        """Start the job on so many workers."""
        return self.start(
            self.job, folder or self.new_folder(), workers, self.case["seed"] + 1000 * more, breaks
        )

    def new_folder(self) -> Path:
        """For one more run."""
        self._folders += 1
        return self.place / f"run{self._folders}"

    @staticmethod
    def whole(outcome: Outcome, where: str) -> None:
        """The ranks stayed together and no internal error ended the run."""
        if outcome.broken is not None:
            raise Broken(f"the ranks fall apart on {where}: {outcome.broken}")
        if outcome.code not in (
            exits.FINISHED,
            exits.WRONG_JOB,
            exits.DIVERGED,
            exits.RANKS_DISAGREE,
        ):
            raise Broken(f"exit code {outcome.code} on {where}: {_first_line(outcome.message)}")
        if outcome.flaws:
            raise Broken(f"in the folder of the run on {where}: {'; '.join(outcome.flaws)}")

    def ended_alike(self, alone: Outcome, many: Outcome) -> Verdict | None:
        """The verdict on a job that is not trained to its end; None for one that is."""
        if alone.code == many.code == exits.FINISHED:
            return None
        text = many.message if many.code else alone.message
        exact = (
            self.job["reduction"] == "exact"
            and many.code == exits.WRONG_JOB
            and "exact needs 1, 2, 4" in many.message
        )
        if exact:
            return Verdict(
                "refused", reason="reduction exact on a number of workers that is no power of two"
            )
        if alone.code in (exits.FINISHED, exits.DIVERGED) and self.misses_gradients(many):
            return Verdict(
                "refused", reason="a gradient is missing on some ranks (gradients.missing: error)"
            )
        if (alone.code, self.told(alone)) != (many.code, self.told(many)):
            raise Broken(
                f"1 worker ends with {alone.code} {alone.message!r}, the others with {many.code} "
                f"{many.message!r}"
            )
        if alone.code == exits.DIVERGED:
            if not self.may_diverge():
                raise Broken(f"diverged: {text}")
            return Verdict("refused", reason=f"diverged: {text}")
        if alone.code != exits.WRONG_JOB:
            raise Broken(f"exit code {alone.code} on every number of workers: {text}")
        if (
            self.job["reduction"] == "exact"
            and self.job["batch"]["micro"] == "auto"
            and "batch.micro: reduction: exact" in text
        ):
            return Verdict("refused", reason="micro-batches that the workers cut, in exact mode")
        patterns = blocks.refusals(self.job)
        if not patterns:
            raise Broken(f"a sound job is refused: {text}")
        if "more than 1 value" in text and not self.has_single_samples():
            raise Broken(f"no micro-batch has a single sample: {text}")
        if alone.steps or many.steps:
            raise Broken(f"refused after {max(alone.steps, many.steps)} steps have begun: {text}")
        if not any(re.search(pattern, text) for pattern in patterns):
            raise Broken(f"the refusal speaks of none of {patterns}: {text}")
        return Verdict("refused", reason=text)

    def told(self, outcome: Outcome) -> str:
        """The message of an end; without its numbers and ranks where a generator of the job's own
        begins anew in each process.
        """
        if not any(block.get("seeded") is False for block in self.job["model"]["args"]["blocks"]):
            return outcome.message
        return re.sub(
            r"[0-9]+\.[0-9]+(e-?[0-9]+)?", "#", re.sub(r"^on rank [0-9, ]+: ", "", outcome.message)
        )

    def has_single_samples(self) -> bool:
        """Whether a micro-batch of the run has one sample only."""
        accepted = engine.read(self.job, self.new_folder())
        assert isinstance(accepted, Job)
        controller = Controller(accepted.plan(self.job["data"]["args"]["samples"], 1))
        return any(
            1 in (step.global_batch % step.micro_batch, step.micro_batch)
            for step in iter(controller.decide, None)
        )

    def misses_gradients(self, outcome: Outcome) -> bool:
        """Whether a run ended as it may: the job leaves layers out by its data or by chance, and
        asks for no zeros instead.
        """
        described = self.job["model"]["args"]["blocks"]
        skips = any(
            block["kind"] == "skipped" or "skipped" in block.get("form", "") for block in described
        )
        if (
            outcome.code != exits.RANKS_DISAGREE
            or not skips
            or self.job["gradients"].get("missing", "error") != "error"
        ):
            return False
        if not re.search(r"gradient.*'(loss|blocks\.[0-9]+|head)\.", outcome.message):
            raise Broken(f"a missing gradient is not named: {outcome.message}")
        return True

    def has_reference(self) -> bool:
        """Whether the plain loop knows this job's arithmetic: no 16 bits and no rollbacks."""
        goes_back = (
            self.job.get("on_nonfinite", {}).get("policy") == "rollback" and self.may_diverge()
        )
        return self.job["precision"] in FROM_REFERENCE and not goes_back

    def may_diverge(self) -> bool:
        """Whether the job has something whose gradient need not be finite."""
        brittle = any(
            block["kind"] in ("brittle", "leashed") for block in self.job["model"]["args"]["blocks"]
        )
        return brittle or self.job["data"]["args"].get("poisoned") is not None

    def like_the_reference(self, alone: Outcome) -> None:
        """One worker comes to what a plain loop comes to."""
        accepted = engine.read(self.job, self.new_folder())
        assert isinstance(accepted, Job)
        with engine.unchanged_settings(), engine.quietly(), kept_generators():
            try:
                learnt = reference.train(accepted)
            except Exception as error:
                raise Broken(
                    f"the plain loop cannot train this job ({type(error).__name__}: {error}), the "
                    "engine did"
                ) from None
        assert alone.checkpoint is not None
        assert alone.results is not None
        bound = FROM_REFERENCE[self.job["precision"]]
        self.near(
            _flat({"model": learnt.model, "loss": learnt.loss}), state_of(alone), bound, alone
        )
        if alone.results["steps"] != learnt.steps:
            raise Broken(f"{alone.results['steps']} steps, not {learnt.steps}")
        ours = {name: alone.results.get(name) for name in learnt.results}
        ours["loss"] = ours["loss"] if len(alone.decisions) else None
        self.near(learnt.results, ours, bound, alone)

    def like_one_worker(self, many: Outcome, alone: Outcome) -> None:
        """Another number of workers comes to what one comes to."""
        self.same_decisions(many, alone)
        bound = BETWEEN_WORLDS[self.job["precision"]]
        self.near(state_of(alone), state_of(many), bound, alone)
        self.near(_results(alone), _results(many), bound, alone)
        self.near(_losses(alone), _losses(many), bound, alone)

    def same_bits(self, ours: Outcome, theirs: Outcome) -> None:
        """Two runs have come to the same to the last bit, results included."""
        self.same_state(ours, theirs)
        for name, value in _results(theirs).items():
            if not _same(value, _results(ours).get(name)):
                raise Broken(f"{name} is {value} and {_results(ours).get(name)}")

    def left_alone(self, many: Outcome) -> None:
        """A run that has finished stays as it is when it is started again."""
        assert many.folder is not None
        before = contents(many.folder)
        again = self.run(self.case["workers"], many.folder, more=9)
        self.whole(again, "a start of a finished run")
        if again.code != exits.FINISHED or again.steps:
            raise Broken(f"exit code {again.code} after {again.steps} steps: {again.message}")
        if (after := contents(many.folder)) != before:
            raise Broken(
                f"other files: {sorted(name for name, _ in before.items() ^ after.items())}"
            )

    @staticmethod
    def same_state(ours: Outcome, theirs: Outcome) -> None:
        """Two runs have learnt the same to the last bit, optimizer state included."""
        one, other = state_of(theirs, optimizer=True), state_of(ours, optimizer=True)
        if one.keys() != other.keys():
            raise Broken(f"other tensors: {sorted(one.keys() ^ other.keys())}")
        for name, value in one.items():
            if not _same(value, other[name]):
                away = _distance(value, other[name])
                raise Broken(
                    f"{name} differs by {away:.1e}: {_show(value)} and {_show(other[name])}"
                )

    def interrupted(self, many: Outcome, alone: Outcome) -> None:
        """Stopped or killed and started again, perhaps with other keys for a while, a run comes to
        what it does undisturbed.
        """
        folder, workers, kept = self.new_folder(), self.case["workers"], True
        steps, told, shorter = max(1, len(many.decisions)), [], False
        for number, interruption in enumerate(self.case["interruptions"]):
            job = self.job_of_part(interruption)
            breaks = _interruption(
                interruption, steps, many.calls * workers // self.case["workers"]
            )
            outcome = self.start(
                job, folder, workers, self.case["seed"] + 1000 * (number + 1), breaks
            )
            told.append(
                f"{interruption['how']} on {workers} "
                f"({'killed' if outcome.killed else outcome.code})"
            )
            kept = kept and not self.moves_bits(interruption)
            if self.misses_gradients(outcome) or self.has_another_length(
                outcome, shorter or "epochs" in interruption
            ):
                return
            shorter = shorter or "epochs" in interruption
            if outcome.broken is not None or not (
                outcome.killed or outcome.code in (exits.FINISHED, exits.STOPPED)
            ):
                raise Broken(
                    f"{outcome.broken or _first_line(outcome.message)} ({', '.join(told)})"
                )
            if outcome.code == exits.STOPPED and breaks.stop_at is None:
                raise Broken(f"stopped by nobody: {outcome.message}")
            if (
                not outcome.killed
                and outcome.code == exits.FINISHED
                and "epochs" not in interruption
            ):
                break
            if self.job["reduction"] == "exact" and interruption["workers"] == 3:
                continue  # exact mode has no such world: as many go on as before
            kept = kept and interruption["workers"] == workers
            workers = interruption["workers"]
        else:
            outcome = self.run(workers, folder, 9)
            told.append(f"then {workers} workers")
            if self.misses_gradients(outcome) or self.has_another_length(outcome, shorter):
                return
        try:
            self.like_undisturbed(outcome, many if kept else alone, kept)
        except Broken as broken:
            raise Broken(f"{broken} ({', '.join(told)})") from None

    def moves_bits(self, interruption: Mapping[str, Any]) -> bool:
        """Whether what was otherwise in a part of a run may change its last bits.

        Running statistics are put together, and so rounded, where the job's cadence has an
        evaluation or a checkpoint; one that a clock asks for is no part of that. (Without any other
        cadence there is one an epoch, which the clock's replaces.)
        """
        changes = interruption.get("changes", {})
        cadence = {"every_steps", "every_epochs"}
        clock_alone = (
            not cadence & changes.get("checkpoint", {}).keys()
            and cadence & self.job["checkpoint"].keys()
        )
        return (
            "epochs" in interruption
            or "evaluate" in changes
            or ("checkpoint" in changes and not clock_alone)
        )

    def job_of_part(self, interruption: Mapping[str, Any]) -> dict[str, Any]:
        """The job as it is until an interruption: with other keys that decide nothing, or
        shorter.
        """
        job = dict(self.job)
        for section, values in interruption.get("changes", {}).items():
            job[section] = (
                {**job.get(section, {}), **values} if isinstance(values, dict) else values
            )
        if "epochs" in interruption:
            job["epochs"] = self.job["epochs"] * interruption["epochs"]
        return job

    @staticmethod
    def has_another_length(outcome: Outcome, changes: bool) -> bool:
        """Whether a start was refused, as it may be, because its length changes.

        It is shorter than its warmup, its growths or what lies behind it; or the run's last step
        had been cut by its end already.
        """
        if not changes or outcome.code not in (exits.WRONG_JOB, exits.BAD_CHECKPOINT):
            return False
        return outcome.code == exits.WRONG_JOB or "epochs is" in outcome.message

    def same_decisions(self, ours: Outcome, theirs: Outcome) -> None:
        """Every decision is the same.

        But for the micro-batches where each number of workers cuts its own, and for what was the
        last step of a shorter run.
        """
        free = {"micro_batch"} if self.job["batch"]["micro"] == "auto" else set()
        if any("epochs" in interruption for interruption in self.case["interruptions"]):
            free.add("is_last")
        read = [[json.loads(line) for line in outcome.decisions] for outcome in (ours, theirs)]
        kept = [
            [{key: value for key, value in line.items() if key not in free} for line in lines]
            for lines in read
        ]
        if kept[0] != kept[1]:
            raise Broken(f"other decisions: {_first_other(*kept)}")

    def like_undisturbed(self, again: Outcome, undisturbed: Outcome, kept: bool) -> None:
        """An interrupted run's end."""
        self.whole(again, "the last start")
        if again.code != exits.FINISHED:
            raise Broken(f"exit code {again.code}: {again.message}")
        if again.results is None:
            raise Broken("there is no summary")
        self.same_decisions(again, undisturbed)
        if kept:
            self.same_bits(again, undisturbed)
            if self.logs_alike():
                self.same_metrics(again, undisturbed)
            return
        if self.job["reduction"] == "exact":
            self.same_state(again, undisturbed)
        bound = BETWEEN_WORLDS[self.job["precision"]]
        self.near(state_of(undisturbed), state_of(again), bound, undisturbed)
        self.near(_results(undisturbed), _results(again), bound, undisturbed)
        if self.logs_alike():
            self.near(_losses(undisturbed), _losses(again), bound, undisturbed)

    @staticmethod
    def same_metrics(ours: Outcome, theirs: Outcome) -> None:
        """Two runs have written down the same to the last bit."""
        if len(ours.metrics) != len(theirs.metrics):
            raise Broken(f"{len(ours.metrics)} lines of metrics, and {len(theirs.metrics)}")
        for one, other in zip(ours.metrics, theirs.metrics, strict=True):
            if one.keys() != other.keys() or not all(
                _same(value, other[name]) for name, value in one.items()
            ):
                raise Broken(f"other metrics: {one} and {other}")

    def logs_alike(self) -> bool:
        """Whether no part of the run wrote down more or less than the others."""
        parts = [
            interruption.get("changes", {}).keys() | interruption.keys()
            for interruption in self.case["interruptions"]
        ]
        return not any(part & {"log", "evaluate", "epochs"} for part in parts)

    def near(
        self, expected: Mapping[str, Any], found: Mapping[str, Any], bound: float, alone: Outcome
    ) -> None:
        """Two states agree but for rounding, or for what rounding alone may make of this job."""
        if expected.keys() != found.keys():
            raise Broken(f"other names: {sorted(map(str, expected.keys() ^ found.keys()))}")
        for name, value in expected.items():
            problem = _unlike(value, found[name])
            if problem:
                raise Broken(f"{name}: {problem}")
            away = _distance(value, found[name])
            if away <= bound:
                continue
            allowed = max(bound, CHAOS * self.amplified())
            if not away <= allowed:
                raise Broken(
                    f"{name} differs by {away:.1e} (allowed {allowed:.0e}): {_show(value)} and "
                    f"{_show(found[name])}"
                )
            self.chaotic = True

    def amplified(self) -> float:
        """The largest distance of any tensor on one worker when the first number of each weight is
        moved by its last bit.

        0 for a job that does not come to the same twice: nothing excuses what it does.
        """
        if self._amplified is None:
            plain, again = self.run(1), self.run(1, more=1)
            blocks.nudged = self.job["precision"]
            try:
                moved = self.run(1)
            finally:
                blocks.nudged = None
            if _furthest(plain, again) > 0:
                self._amplified = 0.0
            else:
                self._amplified = (
                    _furthest(plain, moved) if moved.code == exits.FINISHED else math.inf
                )
        return self._amplified


def state_of(outcome: Outcome, optimizer: bool = False) -> dict[str, Any]:
    """What a run has learnt, by name: the model's state, the loss's, and the optimizer's where it
    is asked for.
    """
    held = outcome.checkpoint or {}
    found = _flat({"model": held.get("model", {}), "loss": held.get("loss") or {}})
    return found | (_flat({"optimizer": held.get("optimizer", {})}) if optimizer else {})


def _furthest(one: Outcome, other: Outcome) -> float:
    """The largest distance of any tensor or result of two runs."""
    pairs = ((state_of(one), state_of(other)), (_results(one), _results(other)))
    return max(
        (
            _distance(value, theirs.get(name))
            for ours, theirs in pairs
            for name, value in ours.items()
        ),
        default=0.0,
    )


def _results(outcome: Outcome) -> dict[str, Any]:
    return dict(outcome.results or {})


def _losses(outcome: Outcome) -> dict[str, Any]:
    """The losses on the way, by step."""
    return {
        f"{name} at {line['step']:g}": line[name]
        for line in outcome.metrics
        for name in ("loss", "test_loss")
        if name in line
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= _flat(value, f"{name}.")
        else:
            found[name] = value
    return found


def _interruption(interruption: Mapping[str, Any], steps: int, calls: int) -> Interruption:
    if interruption["how"] == "stop":
        return Interruption(
            stop_at=int(interruption["at"] * (steps - 1)), by_rank=interruption["by_rank"]
        )
    return Interruption(kill_at=int(interruption["at"] * calls))


def _unlike(one: Any, other: Any) -> str:
    """How two values differ in kind; nothing where only their numbers may differ."""
    if isinstance(one, torch.Tensor) != isinstance(other, torch.Tensor):
        return f"{one!r} and {other!r}"
    if isinstance(one, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return f"{one.dtype}{list(one.shape)} and {other.dtype}{list(other.shape)}"
        if not (one.is_floating_point() or one.is_complex()) and not torch.equal(one, other):
            return f"{_show(one)} and {_show(other)}"
        return ""
    numbers = all(isinstance(value, (int, float)) for value in (one, other))
    return "" if numbers or one == other else f"{one!r} and {other!r}"


def _distance(one: Any, other: Any) -> float:
    """The relative distance of two tensors or numbers; 0 where both are not finite in the same
    places.
    """
    if one is None or other is None or isinstance(one, (str, bool)):
        return 0.0 if one == other else math.inf
    if not isinstance(one, torch.Tensor):
        one, other = (
            torch.tensor(float(one), dtype=torch.float64),
            torch.tensor(float(other), dtype=torch.float64),
        )
    if one.shape != other.shape:
        return math.inf
    wide = torch.complex128 if one.is_complex() else torch.float64
    one, other = one.detach().to(wide), other.detach().to(wide)
    if not torch.equal(one.isfinite(), other.isfinite()):
        return math.inf
    one, other = one[one.isfinite()], other[other.isfinite()]
    return float((one - other).norm() / max(_LEAST_NORM, float(one.norm())))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same_kind = one.dtype == other.dtype and one.shape == other.shape
        return same_kind and torch.equal(torch.nan_to_num(one, 7.0), torch.nan_to_num(other, 7.0))
    return one == other or (one != one and other != other)


def _first_other(ours: list[Any], theirs: list[Any]) -> str:
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            return f"{one} and {other}"
    return f"{len(ours)} and {len(theirs)} of them"


def _show(value: Any) -> str:
    return f"{value.flatten()[:4].tolist()}" if isinstance(value, torch.Tensor) else repr(value)


def _first_line(text: str) -> str:
    return (text.splitlines() or [""])[0]
