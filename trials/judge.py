"""Judges a case: makes the runs that the laws need and compares them."""

from __future__ import annotations

import functools
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
from trials.thread_world import preserved_generators

# Largest relative distance of a tensor, by precision, from the reference and between numbers of
# workers.
FROM_REFERENCE = {"fp64": 1e-9, "fp32": 1e-4}
# In 16 bits only exact mode is drawn
BETWEEN_WORLDS = {"fp64": 1e-10, "fp32": 1e-4, "bf16": 1e-6, "fp16": 1e-6}
# A distance up to this multiple of the effect of one bit in the initial weights counts as rounding
CHAOS = 1000.0
_MIN_NORM = 1e-3  # distances are relative to the norm of a tensor, but at least to this

# job, run folder, workers, seed of the world, interruption
Start = Callable[[Mapping[str, Any], Path, int, int, Interruption | None], Outcome]


@functools.cache
def lstm_computes_in_fp16() -> bool:
    """Whether torch itself has an LSTM in fp16 on this CPU."""
    try:
        with torch.autocast("cpu", dtype=torch.float16):
            torch.nn.LSTM(2, 2, batch_first=True)(torch.ones(3, 1, 2))
    except RuntimeError:
        return False
    return True


@dataclass
class Verdict:
    """The result of judging a case.

    Attributes:
        kind: held, refused, chaotic (held, up to amplified rounding errors) or violation.
        laws: those that were tested and held.
        reason: of a refusal; for a violation, the law and the difference.
    """

    kind: str
    laws: list[str] = field(default_factory=list)
    reason: str = ""


class Broken(Exception):
    """A law does not hold."""


def judge(case: Case, folder: Path, start: Start = engine.train) -> Verdict:
    """Test every law that applies to a case.

    Args:
        case: see cases.py.
        folder: for its runs.
        start: starts a run.
    """
    trial = _Trial(case, folder, start)
    try:
        return trial.verdict()
    except Broken as broken:
        return Verdict("violation", trial.held, str(broken))


class _Trial:
    def __init__(self, case: Case, folder: Path, start: Start) -> None:
        self.case, self.folder, self.start = case, folder, start
        self.job: dict[str, Any] = case["job"]
        self.held: list[str] = []
        self.chaotic = False
        self._runs = 0
        self._amplified: float | None = None

    def verdict(self) -> Verdict:
        """Judge the case; raises Broken for a violation."""
        alone = self.run(1)
        many = self.run(self.case["workers"]) if self.case["workers"] > 1 else alone
        self.check_sound(alone, "1 worker")
        self.check_sound(many, f"{self.case['workers']} workers")
        if (refusal := self.check_endings(alone, many)) is not None:
            return refusal
        if self.has_reference():
            self.law("0 reference", self.check_reference, alone)
        if many is not alone:
            self.law("1 world", self.check_one_worker, many, alone)
            if self.job["reduction"] == "exact":
                self.law("3 exact", self.check_same_state, many, alone)
        if self.case["interruptions"]:
            self.law("2 resume", self.check_interrupted, many, alone)
        if self.case["seed"] % 3 == 0:
            self.law("4 finished", self.check_finished, many)
        return Verdict("chaotic" if self.chaotic else "held", self.held)

    def law(self, name: str, check: Callable[..., None], *arguments: Any) -> None:
        """Test one law."""
        try:
            check(*arguments)
        except Broken as broken:
            raise Broken(f"law {name}: {broken}") from None
        self.held.append(name)

    def run(
        self,
        workers: int,
        folder: Path | None = None,
        attempt: int = 0,
    ) -> Outcome:
        """Start or resume the job; `attempt` varies the seed of the world."""
        seed = self.case["seed"] + 1000 * attempt
        return self.start(self.job, folder or self.new_folder(), workers, seed, None)

    def new_folder(self) -> Path:
        """A folder for another run."""
        self._runs += 1
        return self.folder / f"run{self._runs}"

    @staticmethod
    def check_sound(outcome: Outcome, where: str) -> None:
        """The ranks made matching calls, the exit code is allowed, and the run folder is sound."""
        if outcome.broken is not None:
            raise Broken(f"the ranks do not match on {where}: {outcome.broken}")
        if outcome.code not in (
            exits.FINISHED,
            exits.WRONG_JOB,
            exits.DIVERGED,
            exits.RANKS_DISAGREE,
        ):
            raise Broken(f"exit code {outcome.code} on {where}: {_first_line(outcome.message)}")
        if outcome.flaws:
            raise Broken(f"in the folder of the run on {where}: {'; '.join(outcome.flaws)}")

    def check_endings(self, alone: Outcome, many: Outcome) -> Verdict | None:
        """The verdict on a job that does not finish; None for one that does."""
        if alone.code == many.code == exits.FINISHED:
            return None
        text = many.message if many.code else alone.message
        needs_power_of_two = (
            self.job["reduction"] == "exact"
            and many.code == exits.WRONG_JOB
            and "exact needs 1, 2, 4" in many.message
        )
        if needs_power_of_two:
            return Verdict(
                "refused", reason="exact mode on a number of workers that is not a power of two"
            )
        if alone.code in (exits.FINISHED, exits.DIVERGED) and self.misses_gradients(many):
            return Verdict(
                "refused", reason="a gradient is missing on some ranks (gradients.missing: error)"
            )
        if (alone.code, self.normalised_message(alone)) != (
            many.code,
            self.normalised_message(many),
        ):
            raise Broken(
                f"1 worker ends with {alone.code} {alone.message!r}, the others with {many.code} "
                f"{many.message!r}"
            )
        if alone.code == exits.DIVERGED:
            if not self.may_diverge():
                raise Broken(f"diverged: {text}")
            return Verdict("refused", reason=f"diverged: {text}")
        # As the rehearsal reports a divergence that is there before the first step
        if "before the first update" in text and self.may_diverge():
            return Verdict("refused", reason=f"diverged: {text}")
        if alone.code != exits.WRONG_JOB:
            raise Broken(f"exit code {alone.code} on every number of workers: {text}")
        if (
            self.job["reduction"] == "exact"
            and self.job["batch"]["micro"] == "auto"
            and "batch.micro: reduction: exact" in text
        ):
            return Verdict("refused", reason="batch.micro: auto in exact mode")
        if self.job.get("precision") == "fp16" and "LSTM" in text and not lstm_computes_in_fp16():
            return Verdict("refused", reason="torch has no LSTM in fp16 on this CPU")
        patterns = blocks.refusals(self.job)
        if not patterns:
            raise Broken(f"a sound job is refused: {text}")
        if "more than 1 value" in text and not self.has_single_samples():
            raise Broken(f"no micro-batch has a single sample: {text}")
        if alone.steps or many.steps:
            raise Broken(f"refused after {max(alone.steps, many.steps)} steps have begun: {text}")
        if not any(re.search(pattern, text) for pattern in patterns):
            raise Broken(f"the refusal matches none of {patterns}: {text}")
        return Verdict("refused", reason=text)

    def normalised_message(self, outcome: Outcome) -> str:
        """The message of an outcome, without numbers and ranks if the job has a generator that is
        seeded differently in each process.
        """
        if not any(block.get("seeded") is False for block in self.job["model"]["args"]["blocks"]):
            return outcome.message
        return re.sub(
            r"[0-9]+\.[0-9]+(e-?[0-9]+)?", "#", re.sub(r"^on rank [0-9, ]+: ", "", outcome.message)
        )

    def has_single_samples(self) -> bool:
        """Whether any micro-batch of the run has a single sample."""
        accepted = engine.read(self.job, self.new_folder())
        assert isinstance(accepted, Job)
        controller = Controller(accepted.plan(self.job["data"]["args"]["samples"], 1))
        return any(
            1 in (step.global_batch % step.micro_batch, step.micro_batch)
            for step in iter(controller.decide, None)
        )

    def misses_gradients(self, outcome: Outcome) -> bool:
        """Whether a run ended because of a missing gradient, as it may: the job skips layers, and
        gradients.missing is error.
        """
        descriptions = self.job["model"]["args"]["blocks"]
        skips = any(
            block["kind"] == "skipped" or "skipped" in block.get("form", "")
            for block in descriptions
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
        """Whether the plain loop supports this job: no 16-bit precision and no rollbacks."""
        may_roll_back = (
            self.job.get("on_nonfinite", {}).get("policy") == "rollback" and self.may_diverge()
        )
        return self.job["precision"] in FROM_REFERENCE and not may_roll_back

    def may_diverge(self) -> bool:
        """Whether gradients of the job may be non-finite."""
        brittle = any(
            block["kind"] in ("brittle", "leashed") for block in self.job["model"]["args"]["blocks"]
        )
        return brittle or self.job["data"]["args"].get("poisoned") is not None

    def check_reference(self, alone: Outcome) -> None:
        """One worker has the results of the plain loop."""
        accepted = engine.read(self.job, self.new_folder())
        assert isinstance(accepted, Job)
        with engine.preserved_settings(), engine.silenced(), preserved_generators():
            try:
                expected = reference.train(accepted)
            except Exception as error:
                raise Broken(
                    f"the plain loop cannot train this job ({type(error).__name__}: {error}), but "
                    "the engine did"
                ) from None
        assert alone.checkpoint is not None
        assert alone.results is not None
        bound = FROM_REFERENCE[self.job["precision"]]
        state = _flat({"model": expected.model, "loss": expected.loss})
        self.check_close(state, state_of(alone), bound)
        if alone.results["steps"] != expected.steps:
            raise Broken(f"{alone.results['steps']} steps, not {expected.steps}")
        results = {name: alone.results.get(name) for name in expected.results}
        results["loss"] = results["loss"] if len(alone.decisions) else None
        self.check_close(expected.results, results, bound)

    def check_one_worker(self, many: Outcome, alone: Outcome) -> None:
        """Several workers have the results of one."""
        self.check_same_decisions(many, alone)
        bound = BETWEEN_WORLDS[self.job["precision"]]
        self.check_close(state_of(alone), state_of(many), bound)
        self.check_close(_results(alone), _results(many), bound)
        self.check_close(_losses(alone), _losses(many), bound)

    def check_same_bits(self, outcome: Outcome, expected: Outcome) -> None:
        """Two runs have bit-identical state and results."""
        self.check_same_state(outcome, expected)
        for name, value in _results(expected).items():
            if not _same(value, _results(outcome).get(name)):
                raise Broken(f"{name} is {value} and {_results(outcome).get(name)}")

    def check_finished(self, many: Outcome) -> None:
        """Starting a finished run again changes nothing."""
        assert many.folder is not None
        before = contents(many.folder)
        again = self.run(self.case["workers"], many.folder, attempt=9)
        self.check_sound(again, "a start of a finished run")
        if again.code != exits.FINISHED or again.steps:
            raise Broken(f"exit code {again.code} after {again.steps} steps: {again.message}")
        if (after := contents(many.folder)) != before:
            raise Broken(
                f"changed files: {sorted({name for name, _ in before.items() ^ after.items()})}"
            )

    @staticmethod
    def check_same_state(outcome: Outcome, expected: Outcome) -> None:
        """Two runs have bit-identical state, including that of the optimizer."""
        state = state_of(outcome, optimizer=True)
        expected_state = state_of(expected, optimizer=True)
        if expected_state.keys() != state.keys():
            raise Broken(f"names differ: {sorted(expected_state.keys() ^ state.keys())}")
        for name, value in expected_state.items():
            if not _same(value, state[name]):
                raise Broken(
                    f"{name} differs by {_distance(value, state[name]):.1e}: {_show(value)} and "
                    f"{_show(state[name])}"
                )

    def check_interrupted(self, many: Outcome, alone: Outcome) -> None:
        """A run that is stopped or killed and resumed, possibly with changed keys, has the results
        of an uninterrupted run.
        """
        folder, workers, same_bits = self.new_folder(), self.case["workers"], True
        steps, history, shorter = max(1, len(many.decisions)), [], False
        for number, interruption in enumerate(self.case["interruptions"]):
            job = self.job_until(interruption)
            interrupt = _interruption(
                interruption, steps, many.calls * workers // self.case["workers"]
            )
            seed = self.case["seed"] + 1000 * (number + 1)
            outcome = self.start(job, folder, workers, seed, interrupt)
            history.append(
                f"{interruption['how']} on {workers} "
                f"({'killed' if outcome.killed else outcome.code})"
            )
            same_bits = same_bits and not self.may_change_bits(interruption)
            shorter = shorter or "epochs" in interruption
            if self.misses_gradients(outcome) or self.is_length_refused(outcome, shorter):
                return
            if outcome.broken is not None or not (
                outcome.killed or outcome.code in (exits.FINISHED, exits.STOPPED)
            ):
                raise Broken(
                    f"{outcome.broken or _first_line(outcome.message)} ({', '.join(history)})"
                )
            if outcome.code == exits.STOPPED and interrupt.stop_at is None:
                raise Broken(f"stopped without a request: {outcome.message}")
            if (
                not outcome.killed
                and outcome.code == exits.FINISHED
                and "epochs" not in interruption
            ):
                break
            if self.job["reduction"] == "exact" and interruption["workers"] == 3:
                continue  # exact mode cannot run on 3 workers: resume on as many as before
            same_bits = same_bits and interruption["workers"] == workers
            workers = interruption["workers"]
        else:
            outcome = self.run(workers, folder, attempt=9)
            history.append(f"then {workers} workers")
            if self.misses_gradients(outcome) or self.is_length_refused(outcome, shorter):
                return
        try:
            self.check_resumed(outcome, many if same_bits else alone, same_bits)
        except Broken as broken:
            raise Broken(f"{broken} ({', '.join(history)})") from None

    def may_change_bits(self, interruption: Mapping[str, Any]) -> bool:
        """Whether the changes of an interruption may change rounding errors.

        Running statistics are all-reduced, and so rounded, at evaluations and at checkpoints by
        steps or epochs, but not at checkpoints by time. (Without a schedule by steps or epochs
        there is a checkpoint per epoch, which a schedule by time replaces.)
        """
        changes = interruption.get("changes", {})
        schedule = {"every_steps", "every_epochs"}
        only_by_time = (
            not schedule & changes.get("checkpoint", {}).keys()
            and schedule & self.job["checkpoint"].keys()
        )
        return (
            "epochs" in interruption
            or "evaluate" in changes
            or ("checkpoint" in changes and not only_by_time)
        )

    def job_until(self, interruption: Mapping[str, Any]) -> dict[str, Any]:
        """The job as it runs until an interruption: shorter, or with changed keys that must not
        affect the results.
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
    def is_length_refused(outcome: Outcome, shorter: bool) -> bool:
        """Whether a start was rejected, as it may be, because the length of the run changed.

        The shorter run may end before its warmup, its growths or the steps already taken, or its
        last step may have been truncated.
        """
        if not shorter or outcome.code not in (exits.WRONG_JOB, exits.INVALID_CHECKPOINT):
            return False
        return outcome.code == exits.WRONG_JOB or "epochs is" in outcome.message

    def check_same_decisions(self, outcome: Outcome, expected: Outcome) -> None:
        """Two runs have equal decisions.

        Ignores the micro-batches if they are `auto`, and which step is the last if a part of the
        run was shorter.
        """
        ignored = {"micro_batch"} if self.job["batch"]["micro"] == "auto" else set()
        if any("epochs" in interruption for interruption in self.case["interruptions"]):
            ignored.add("is_last")
        decisions, expected_decisions = (
            [
                {key: value for key, value in json.loads(line).items() if key not in ignored}
                for line in lines
            ]
            for lines in (outcome.decisions, expected.decisions)
        )
        if decisions != expected_decisions:
            difference = _first_difference(decisions, expected_decisions)
            raise Broken(f"decisions differ: {difference}")

    def check_resumed(self, outcome: Outcome, expected: Outcome, same_bits: bool) -> None:
        """A resumed run finished with the results of the uninterrupted run `expected`."""
        self.check_sound(outcome, "the last start")
        if outcome.code != exits.FINISHED:
            raise Broken(f"exit code {outcome.code}: {outcome.message}")
        if outcome.results is None:
            raise Broken("there is no summary")
        self.check_same_decisions(outcome, expected)
        if same_bits:
            self.check_same_bits(outcome, expected)
            if self.logs_match():
                self.check_same_metrics(outcome, expected)
            return
        if self.job["reduction"] == "exact":
            self.check_same_state(outcome, expected)
        bound = BETWEEN_WORLDS[self.job["precision"]]
        self.check_close(state_of(expected), state_of(outcome), bound)
        self.check_close(_results(expected), _results(outcome), bound)
        if self.logs_match():
            self.check_close(_losses(expected), _losses(outcome), bound)

    @staticmethod
    def check_same_metrics(outcome: Outcome, expected: Outcome) -> None:
        """Two runs have bit-identical logs."""
        if len(outcome.metrics) != len(expected.metrics):
            raise Broken(f"{len(outcome.metrics)} lines of metrics, not {len(expected.metrics)}")
        for line, other in zip(outcome.metrics, expected.metrics, strict=True):
            if line.keys() != other.keys() or not all(
                _same(value, other[name]) for name, value in line.items()
            ):
                raise Broken(f"metrics differ: {line} and {other}")

    def logs_match(self) -> bool:
        """Whether the interruptions do not change when metrics are logged."""
        changed = [
            interruption.get("changes", {}).keys() | interruption.keys()
            for interruption in self.case["interruptions"]
        ]
        return not any(keys & {"log", "evaluate", "epochs"} for keys in changed)

    def check_close(
        self, expected: Mapping[str, Any], values: Mapping[str, Any], bound: float
    ) -> None:
        """Two states agree up to rounding errors, and their amplification by this job."""
        if expected.keys() != values.keys():
            raise Broken(f"names differ: {sorted(map(str, expected.keys() ^ values.keys()))}")
        for name, value in expected.items():
            mismatch = _mismatch(value, values[name])
            if mismatch:
                raise Broken(f"{name}: {mismatch}")
            distance = _distance(value, values[name])
            if distance <= bound:
                continue
            allowed = max(bound, CHAOS * self.amplified())
            if not distance <= allowed:
                raise Broken(
                    f"{name} differs by {distance:.1e} (allowed {allowed:.0e}): {_show(value)} and "
                    f"{_show(values[name])}"
                )
            self.chaotic = True

    def amplified(self) -> float:
        """The largest distance of any tensor on one worker after perturbing the first element of
        each weight by one bit; 0 for a job that is not reproducible, which excuses nothing.
        """
        if self._amplified is None:
            first, again = self.run(1), self.run(1, attempt=1)
            blocks.nudged = self.job["precision"]
            try:
                perturbed = self.run(1)
            finally:
                blocks.nudged = None
            if _largest_distance(first, again) > 0:
                self._amplified = 0.0
            elif perturbed.code == exits.FINISHED:
                self._amplified = _largest_distance(first, perturbed)
            else:
                self._amplified = math.inf
        return self._amplified


def state_of(outcome: Outcome, optimizer: bool = False) -> dict[str, Any]:
    """The saved state by name: of the model, of the loss and, if requested, of the optimizer."""
    checkpoint = outcome.checkpoint or {}
    state = _flat({"model": checkpoint.get("model", {}), "loss": checkpoint.get("loss") or {}})
    return state | (_flat({"optimizer": checkpoint.get("optimizer", {})}) if optimizer else {})


def _largest_distance(one: Outcome, other: Outcome) -> float:
    """The largest distance of any tensor or result of two runs."""
    pairs = ((state_of(one), state_of(other)), (_results(one), _results(other)))
    return max(
        (
            _distance(value, others.get(name))
            for values, others in pairs
            for name, value in values.items()
        ),
        default=0.0,
    )


def _results(outcome: Outcome) -> dict[str, Any]:
    return dict(outcome.results or {})


def _losses(outcome: Outcome) -> dict[str, Any]:
    """The logged losses by step."""
    return {
        f"{name} at {line['step']:g}": line[name]
        for line in outcome.metrics
        for name in ("loss", "test_loss")
        if name in line
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _interruption(interruption: Mapping[str, Any], steps: int, calls: int) -> Interruption:
    if interruption["how"] == "stop":
        return Interruption(
            stop_at=int(interruption["at"] * (steps - 1)), by_rank=interruption["by_rank"]
        )
    return Interruption(kill_at=int(interruption["at"] * calls))


def _mismatch(one: Any, other: Any) -> str:
    """How two values differ other than in floating-point numbers; empty if they do not."""
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
    """The relative distance of the finite elements of two tensors or numbers; infinite if others
    are finite in one than in the other.
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
    return float((one - other).norm() / max(_MIN_NORM, float(one.norm())))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same_kind = one.dtype == other.dtype and one.shape == other.shape
        return same_kind and torch.equal(torch.nan_to_num(one, 7.0), torch.nan_to_num(other, 7.0))
    return one == other or (one != one and other != other)


def _first_difference(values: list[Any], others: list[Any]) -> str:
    for value, other in zip(values, others, strict=False):
        if value != other:
            return f"{value} and {other}"
    return f"{len(values)} and {len(others)} of them"


def _show(value: Any) -> str:
    return f"{value.flatten()[:4].tolist()}" if isinstance(value, torch.Tensor) else repr(value)


def _first_line(text: str) -> str:
    return (text.splitlines() or [""])[0]
