"""The job file: what a run is, as frozen sections whose fields are the keys of the YAML.

A job is strict: whatever is not understood is an error that names the key as written, its line, the value and the nearest
known key; all problems are reported at once. Nothing is imported and nothing is started before a job is accepted.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hvdlarge import yaml_source
from hvdlarge.controller import Plan
from hvdlarge.exits import JobError
from hvdlarge.schedule.decay import ConstantDecay, MultistepDecay, PolynomialDecay
from hvdlarge.schedule.growth import AdaBatchGrowth, NoGrowth
from hvdlarge.schedule.progress import Clock
from hvdlarge.schedule.rate import RateSchedule
from hvdlarge.schedule.scaling import Scaling
from hvdlarge.schedule.warmup import LegwWarmup, LinearWarmup, NoWarmup

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Arguments = dict[str, Any]


class Section(BaseModel):
    """A part of a job file: strict, and frozen once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(Section):
    """Which data, and how they reach the workers."""

    name: str  # a built-in, or package.module:attribute
    args: Arguments = {}  # for the attribute, which returns (training set, test set or None)
    num_workers: Annotated[int, Field(ge=0)] = 0  # loader processes on each worker
    prefetch_factor: Count = 2  # micro-batches ahead for each loader process
    prefetch_steps: Count | None = None  # decisions ahead; default: what the loader processes can have in hand


class Model(Section):
    """Which model."""

    name: str  # a built-in, or package.module:attribute
    args: Arguments = {}


class Loss(Section):
    """Which loss; it must be a mean over the samples of a micro-batch."""

    name: str = "cross_entropy"  # a built-in, or package.module:attribute
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | None = None
    args: Arguments = {}

    @property
    def arguments(self) -> Arguments:
        """All arguments of the loss."""
        smoothing = {} if self.label_smoothing is None else {"label_smoothing": self.label_smoothing}
        return {**self.args, **smoothing}


class Batch(Section):
    """The batch and how it grows."""

    base: Count  # samples; the batch for which lr.base was tuned
    initial: Count | None = None  # samples; default: base
    micro: Count | Literal["auto"]  # samples in one forward/backward pass on one worker
    growth: Annotated[NoGrowth | AdaBatchGrowth, Field(discriminator="policy")] = NoGrowth()

    @property
    def first(self) -> int:
        """The global batch of the first step, in samples."""
        return self.base if self.initial is None else self.initial

    @model_validator(mode="after")
    def _fits(self) -> Batch:
        largest = self.growth.max if isinstance(self.growth, AdaBatchGrowth) else None
        if largest is not None and largest < self.first:
            raise ValueError(f"growth.max is {largest}, below the first global batch of {self.first}")
        return self


class LearningRate(Section):
    """The learning rate and its schedule."""

    base: Positive  # tuned for batch.base
    scaling: Scaling = "none"
    warmup: Annotated[NoWarmup | LinearWarmup | LegwWarmup, Field(discriminator="policy")] = NoWarmup()
    decay: Annotated[ConstantDecay | MultistepDecay | PolynomialDecay, Field(discriminator="policy")] = ConstantDecay()

    def schedule(self) -> RateSchedule:
        """The pure schedule of these settings."""
        return RateSchedule(self.base, self.scaling, self.warmup, self.decay)


class Optimizer(Section):
    """What every optimizer has: momentum, and which parameters are adapted and decayed."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NotNegative = 0.0
    adapt_everything: bool = False  # the LARS paper's reading: biases and normalisation parameters too
    not_adapted: tuple[str, ...] = ()  # further name patterns that are neither adapted nor decayed
    not_adapted_lr_factor: NotNegative = 1.0  # their own rate, as a factor


class Lars(Optimizer):
    """LARS, the paper's form."""

    name: Literal["lars"] = "lars"
    trust_coefficient: Positive = 0.001


class Sgd(Optimizer):
    """torch's SGD with momentum."""

    name: Literal["sgd"] = "sgd"


class Evaluate(Section):
    """When the test set is evaluated; the end of a run always is."""

    every_epochs: Positive = 1.0
    micro_batch: Count = 256  # samples in one forward pass on one worker


class Checkpoint(Section):
    """When the state of a run is written down; stops and the end of a run always write it."""

    every_epochs: Positive | None = None  # default: 1, unless one of the other two is given
    every_steps: Count | None = None
    every_minutes: Positive | None = None
    keep: Count = 3  # of the newest
    best: Literal["accuracy", "test_loss"] | None = None  # which result best.pt goes by; default: accuracy where there is one

    @property
    def epochs(self) -> float | None:
        """The interval in epochs; None where only another one was asked for."""
        if self.every_epochs is None and self.every_steps is None and self.every_minutes is None:
            return 1.0
        return self.every_epochs


class StopWhenNotFinite(Section):
    """A gradient that is not finite ends the run."""

    policy: Literal["stop"] = "stop"


class SkipWhenNotFinite(Section):
    """A step whose gradients are not finite is left out on every rank."""

    policy: Literal["skip"] = "skip"
    limit: Count = 10  # such steps in a run


class RollbackWhenNotFinite(Section):
    """The run goes back to its last checkpoint and on from there with a lower rate."""

    policy: Literal["rollback"] = "rollback"
    limit: Count = 3  # rollbacks in a run
    lr_factor: Annotated[float, Field(gt=0, le=1)] = 0.5  # what multiplies the rate after each


class Timeouts(Section):
    """How long one phase may last before the run is taken to hang."""

    start_seconds: Positive = 300.0
    step_seconds: Positive = 300.0
    fetch_seconds: Positive = 600.0
    evaluate_seconds: Positive = 3600.0
    save_seconds: Positive = 3600.0


class Log(Section):
    """What is written down how often."""

    every_steps: Count = 10


class Job(Section):
    """A whole job file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # its run folder is runs/<name>
    run_dir: str | None = None  # another place for the run folder
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    epochs: Positive
    precision: Literal["fp32", "fp64"] = "fp32"
    reduction: Literal["fast", "exact"] = "fast"  # exact: bit-identical weights on 1, 2, 4, … workers
    deterministic: bool = False  # bit-identical from run to run on the same number of workers
    data: Data
    model: Model
    loss: Loss = Loss()
    batch: Batch
    lr: LearningRate
    optimizer: Annotated[Lars | Sgd, Field(discriminator="name")] = Lars()
    evaluate: Evaluate = Evaluate()
    log: Log = Log()
    checkpoint: Checkpoint = Checkpoint()
    on_nonfinite: Annotated[StopWhenNotFinite | SkipWhenNotFinite | RollbackWhenNotFinite, Field(discriminator="policy")] = (
        StopWhenNotFinite()
    )
    compare_every_steps: Count = 100  # a digest of weights, buffers and optimizer state is compared across the ranks
    stop_after_minutes: Positive | None = None  # a time limit: stop with a checkpoint, exit code 75
    timeouts: Timeouts = Timeouts()

    @property
    def run_folder(self) -> Path:
        """Where the run's files go."""
        return Path(self.run_dir) if self.run_dir is not None else Path("runs") / self.name

    def plan(self, dataset_size: int, world_size: int) -> Plan:
        """What the controller follows, for a training set of `dataset_size` samples on `world_size` workers."""
        return Plan(
            clock=Clock(dataset_size, self.epochs),
            base_batch=self.batch.base,
            initial_batch=self.batch.first,
            micro_batch=None if self.batch.micro == "auto" else self.batch.micro,
            growth=self.batch.growth,
            rate=self.lr.schedule(),
            world_size=world_size,
        )

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults included, as plain values."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The job with every default written out; reading it gives the same job."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)

    def mathematics(self) -> dict[str, Any]:
        """What decides the weights: two jobs that agree in it give the same run."""
        return {key: value for key, value in self.resolved().items() if key not in _NOT_MATHEMATICS} | {
            "data": {"name": self.data.name, "args": self.data.args}
        }

    def fingerprint(self) -> str:
        """SHA-256 over every key and value."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()


# May change between the parts of a run: where things go, how often they are looked at, how failures are met.
_NOT_MATHEMATICS = frozenset(
    [
        "name",
        "run_dir",
        "log",
        "evaluate",
        "checkpoint",
        "on_nonfinite",
        "compare_every_steps",
        "stop_after_minutes",
        "timeouts",
    ]
    + ["deterministic", "data"]
)


def read_job(path: str, overrides: Sequence[str] = ()) -> Job:
    """The job of a YAML file, with `key.sub=value` overrides from the command line.

    Raises:
        JobError: with one message that holds every problem, each with its line.
    """
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        raise JobError(f"{path}: no such job file (looked in {Path.cwd()})") from None
    except OSError as error:
        raise JobError(f"{path}: the job file cannot be read: {error.strerror}") from None
    return parse_job(text, path, overrides)


def parse_job(text: bytes | str, path: str, overrides: Sequence[str] = ()) -> Job:
    """The job in a YAML text; `path` is only for messages. Raises JobError as `read_job` does."""
    try:
        source = yaml_source.read(text)
    except yaml_source.SourceError as error:
        raise JobError(f"{_place(path, error.line)}: {error}") from None
    if source.values is None:
        raise JobError(f"{path}: the job file is empty; the smallest job has name, epochs, data, model, batch and lr")
    if not isinstance(source.values, dict):
        raise JobError(f"{path}: a job file is a list of `key: value` pairs, not a {type(source.values).__name__}")
    for override in overrides:
        _override(source, override)
    try:
        # JSON is the strict mode in which a list may become a tuple and a mapping a section, but "3" never a number.
        return Job.model_validate_json(json.dumps(source.values), strict=True)
    except ValidationError as error:
        problems = [_describe(problem, source, path) for problem in error.errors(include_url=False)]
        heading = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise JobError("\n".join([f"{path}: {heading} in the job file", *problems])) from None


_COMMAND_LINE = 0  # the "line" of a key that was set on the command line


def _place(path: str, line: int | None) -> str:
    return path if line is None else "command line" if line == _COMMAND_LINE else f"{path}:{line}"


def _override(source: yaml_source.Source, override: str) -> None:
    key, equals, value = override.partition("=")
    parts = tuple(key.split("."))
    if not equals or not all(parts):
        raise JobError(f"command line: {override!r} is not of the form key.sub=value")
    try:
        new = yaml_source.read(value).values
    except yaml_source.SourceError as error:
        raise JobError(f"command line: {override!r}: {error}") from None
    section = source.values
    for number, part in enumerate(parts[:-1]):
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise JobError(f"command line: {override!r}: {'.'.join(parts[: number + 1])} is not a section")
    section[parts[-1]] = new
    source.lines[parts] = _COMMAND_LINE


def _describe(problem: Any, source: yaml_source.Source, path: str) -> str:
    keys = _as_written(problem["loc"], source.values)
    name, place = ".".join(map(str, keys)), _place(path, source.line(keys))
    kind, value = problem["type"], problem["input"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"  {place}: unknown key {name!r}{_nearest(str(keys[-1]), _known_keys(problem['loc']))}"
    if kind == "missing":
        return f"  {place}: the key {name!r} is missing"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        known, tag = _known_policies(problem["loc"]), problem["ctx"]["discriminator"].strip("'")
        if kind == "union_tag_not_found":
            return f"  {place}: the key {f'{name}.{tag}'!r} is missing; it is one of {', '.join(known)}"
        return f"  {place}: {name}.{tag} is {problem['ctx']['tag']!r}{_nearest(problem['ctx']['tag'], known)}"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(value, (dict, list)) and kind == "value_error":
        return f"  {place}: {name}: {message}"
    return f"  {place}: {name} is {_show(value)}: {message[0].lower()}{message[1:]}"


def _show(value: Any) -> str:
    text = "nan" if isinstance(value, float) and math.isnan(value) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known here: {', '.join(sorted(known))}" if known else ""


def _as_written(location: Sequence[str | int], values: Any) -> yaml_source.Path:
    """Where a problem stands in the YAML: pydantic's location without its names of union members."""
    path: list[str | int] = []
    for number, part in enumerate(location):
        is_last = number == len(location) - 1
        if isinstance(values, list) and isinstance(part, int):
            path.append(part)
            values = values[part] if part < len(values) else None
        elif isinstance(values, dict) and part in values:
            path.append(part)
            values = values[part]
        elif isinstance(values, dict) and is_last and part not in (values.get("policy"), values.get("name")):
            path.append(part)  # a key that is missing
    return tuple(path)


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """The keys that the section of a problem may have, from the schema of the job file."""
    return list(_schema_of(location[:-1]).get("properties", {}))


def _known_policies(location: Sequence[str | int]) -> list[str]:
    """The policies that a section may follow, from the schema of the job file."""
    return list(_schema_of(location).get("discriminator", {}).get("mapping", {}))


def _schema_of(location: Sequence[str | int]) -> dict[str, Any]:
    """The part of the job file's JSON Schema that describes the section at pydantic's `location`."""
    schema = Job.model_json_schema()
    node: dict[str, Any] = schema
    for part in location:
        properties, mapping = node.get("properties", {}), node.get("discriminator", {}).get("mapping", {})
        node = properties.get(part) or ({"$ref": mapping[part]} if part in mapping else {})
        while "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    return node
