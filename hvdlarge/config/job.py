"""The job file: what a run is, as frozen sections whose fields are the keys of the YAML.

A job is strict: whatever is not understood is an error. `job_file.py` reads it and words the
errors, `validation.py` holds its values against each other. Nothing is imported and nothing is
started before a job is accepted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from hvdlarge.config import yaml_source
from hvdlarge.config.registry import LOSSES
from hvdlarge.schedule.decay import (
    ConstantDecay,
    CosineDecay,
    ExponentialDecay,
    MultistepDecay,
    OneCycle,
    PolynomialDecay,
)
from hvdlarge.schedule.growth import LARGEST_BATCH, AdaBatchGrowth, NoGrowth
from hvdlarge.schedule.lr import LRSchedule
from hvdlarge.schedule.plan import Plan
from hvdlarge.schedule.progress import Clock
from hvdlarge.schedule.scaling import Scaling
from hvdlarge.schedule.warmup import LegwWarmup, LinearWarmup, NoWarmup

Count = Annotated[int, Field(ge=1)]
Samples = Annotated[int, Field(ge=1, le=LARGEST_BATCH)]  # of a batch
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
    # Of the training set: what `plan` counts with; the run holds it against the data
    samples: Count | None = None
    num_workers: Annotated[int, Field(ge=0)] = 0  # loader processes on each worker
    prefetch_factor: Count = 2  # micro-batches ahead for each loader process
    # Decisions ahead; default: what the loader processes can have in hand
    prefetch_steps: Count | None = None


class Model(Section):
    """Which model."""

    name: str  # a built-in, or package.module:attribute
    args: Arguments = {}
    # Images in memory with their channels last, which is faster on most GPUs
    channels_last: bool = False
    compile: bool = False  # by torch.compile


class Loss(Section):
    """Which loss; it must be a mean over the samples of a micro-batch."""

    name: str = "cross_entropy"  # a built-in, or package.module:attribute
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | None = None
    args: Arguments = {}

    @property
    def is_torchs(self) -> bool:
        """Whether it is one of torch.nn: all built-in ones are."""
        return LOSSES.get(self.name, self.name).startswith("torch.nn:")

    @property
    def arguments(self) -> Arguments:
        """All arguments of the loss."""
        smoothing = (
            {} if self.label_smoothing is None else {"label_smoothing": self.label_smoothing}
        )
        return {**self.args, **smoothing}


class Batch(Section):
    """The batch and how it grows."""

    base: Samples  # the batch for which lr.base was tuned
    initial: Samples | None = None  # default: base
    micro: Samples | Literal["auto"]  # samples in one forward/backward pass on one worker
    growth: Annotated[NoGrowth | AdaBatchGrowth, Field(discriminator="policy")] = NoGrowth()

    @property
    def first(self) -> int:
        """The global batch of the first step, in samples."""
        return self.base if self.initial is None else self.initial

    @model_validator(mode="after")
    def _fits(self) -> Batch:
        largest = self.growth.max if isinstance(self.growth, AdaBatchGrowth) else None
        if largest is not None and largest < self.first:
            raise ValueError(
                f"growth.max is {largest}, below the first global batch of {self.first}"
            )
        return self


class LearningRate(Section):
    """The learning rate and its schedule."""

    base: Positive  # tuned for batch.base
    scaling: Scaling = "none"
    warmup: Annotated[NoWarmup | LinearWarmup | LegwWarmup, Field(discriminator="policy")] = (
        NoWarmup()
    )
    decay: Annotated[
        ConstantDecay
        | MultistepDecay
        | ExponentialDecay
        | PolynomialDecay
        | CosineDecay
        | OneCycle,
        Field(discriminator="policy"),
    ] = ConstantDecay()

    def schedule(self) -> LRSchedule:
        """The pure schedule of these settings."""
        return LRSchedule(self.base, self.scaling, self.warmup, self.decay)


class Optimizer(Section):
    """What every optimizer has: which parameters are adapted and decayed."""

    weight_decay: NotNegative = 0.0
    # Neither adapted nor decayed; false: the LARS paper's reading
    exclude_bias_and_norm: bool = True
    exclude: tuple[str, ...] = ()  # further name patterns that are neither adapted nor decayed
    excluded_lr_factor: NotNegative = 1.0  # their own rate, as a factor

    @property
    def arguments(self) -> dict[str, Any]:
        """What the optimizer is built with."""
        return self.model_dump()


Part = Annotated[float, Field(ge=0, lt=1)]


class Lars(Optimizer):
    """LARS; a preset names a published form, whose options job_file.py puts where the job sets
    none; the paper's by default.
    """

    name: Literal["lars"] = "lars"
    preset: Literal["paper", "mlperf", "torch", "larc", "optax"] = "paper"
    momentum: Part = 0.9
    trust_coefficient: Positive = 0.001
    lr_in_momentum: bool = True
    joint_norm: bool = False
    clip: bool = False
    nesterov: bool = False
    eps: NotNegative = 0.0

    @model_validator(mode="after")
    def _fits(self) -> Lars:
        return _checked_nesterov(self)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the optimizer is built with; the preset has done its work."""
        return self.model_dump(exclude={"preset"})


class Sgd(Optimizer):
    """torch's SGD with momentum."""

    name: Literal["sgd"] = "sgd"
    momentum: Part = 0.9
    nesterov: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Sgd:
        return _checked_nesterov(self)


class Lamb(Optimizer):
    """LAMB: Adam's direction with a trust ratio."""

    name: Literal["lamb"] = "lamb"
    betas: tuple[Part, Part] = (0.9, 0.999)
    eps: Positive = 1e-6


class Moments(Optimizer):
    """What torch's Adam and AdamW have."""

    betas: tuple[Part, Part] = (0.9, 0.999)
    eps: Positive = 1e-8


class Adam(Moments):
    """torch's Adam, the decay added to the gradient."""

    name: Literal["adam"] = "adam"


class AdamW(Moments):
    """torch's AdamW, the decay apart from the gradient."""

    name: Literal["adamw"] = "adamw"


class Adagrad(Optimizer):
    """torch's Adagrad."""

    name: Literal["adagrad"] = "adagrad"
    eps: Positive = 1e-10


class RmsProp(Optimizer):
    """torch's RMSprop."""

    name: Literal["rmsprop"] = "rmsprop"
    alpha: Part = 0.99
    momentum: Part = 0.0
    eps: Positive = 1e-8


def _checked_nesterov(optimizer: Any) -> Any:
    if optimizer.nesterov and optimizer.momentum == 0:
        raise ValueError("nesterov needs a momentum above 0")
    return optimizer


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
    # Which result best.pt goes by; default: accuracy where there is one
    best: Literal["accuracy", "test_loss"] | None = None

    @property
    def epochs(self) -> float | None:
        """The interval in epochs; None where only another one was asked for."""
        if self.every_epochs is None and self.every_steps is None and self.every_minutes is None:
            return 1.0
        return self.every_epochs


class Gradients(Section):
    """What is done to gradients on their way to the update."""

    # The largest L2 norm of all mean gradients together; larger ones are scaled down to it
    clip_norm: Positive | None = None
    compression: Literal["none", "fp16"] = "none"  # how they travel between workers
    # A tensor that has a gradient on some workers only, as where layers are skipped
    missing: Literal["error", "zero"] = "error"


class Horovod(Section):
    """How Horovod and MPI are set; a variable that stands in the environment already comes
    first.
    """

    # HOROVOD_FUSION_THRESHOLD: buffers in which gradients are sent together
    fusion_mib: NotNegative = 0.0
    # HOROVOD_CYCLE_TIME: how often Horovod looks for work; default: its own
    cycle_ms: Positive | None = None
    groups: Count | None = None  # so many groups of gradients, each sent as one
    # OMPI_MCA_mpi_yield_when_idle; default: where a worker has less than two cores
    yield_when_idle: bool | None = None


class StopWhenNotFinite(Section):
    """A gradient that is not finite ends the run."""

    policy: Literal["stop"] = "stop"


class SkipWhenNotFinite(Section):
    """A step whose gradients are not finite is left out on every rank."""

    policy: Literal["skip"] = "skip"
    limit: Count = 10  # such steps in a run


class RollbackWhenNotFinite(Section):
    """The run goes back to the last checkpoint of the job's cadence and on from there with a lower
    rate.

    Those that a stop or the clock (`checkpoint.every_minutes`) asked for are passed over: an
    interruption changes nothing.
    """

    policy: Literal["rollback"] = "rollback"
    limit: Count = 3  # rollbacks in a run
    lr_factor: Annotated[float, Field(gt=0, le=1)] = 0.5  # what multiplies the rate after each


class Timeouts(Section):
    """How long one phase may last before the run is taken to hang."""

    start_seconds: Positive = 300.0
    step_seconds: Positive = 300.0
    data_seconds: Positive = 3600.0  # for building the data sets
    # For finding, verifying and loading a checkpoint, and sharing it
    checkpoint_seconds: Positive = 3600.0
    fetch_seconds: Positive = 600.0
    evaluate_seconds: Positive = 3600.0
    save_seconds: Positive = 3600.0

    def limits(self) -> dict[str, float]:
        """Seconds by phase."""
        limits = {name.removesuffix("_seconds"): value for name, value in self.model_dump().items()}
        # It fetches samples and takes a few passes
        return limits | {"rehearse": self.fetch_seconds + self.step_seconds}


class Log(Section):
    """What is written down how often."""

    every_steps: Count = 10


class Job(Section):
    """A whole job file."""

    # Its run folder is runs/<name>
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    run_dir: str | None = None  # another place for the run folder
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    epochs: Positive
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp64"] = "fp32"
    # Exact: bit-identical weights on 1, 2, 4, … workers
    reduction: Literal["fast", "exact"] = "fast"
    deterministic: bool = False  # bit-identical from run to run on the same number of workers
    data: Data
    model: Model
    loss: Loss = Loss()
    batch: Batch
    lr: LearningRate
    gradients: Gradients = Gradients()
    optimizer: Annotated[
        Lars | Lamb | Sgd | Adam | AdamW | Adagrad | RmsProp, Field(discriminator="name")
    ] = Lars()
    evaluate: Evaluate = Evaluate()
    log: Log = Log()
    checkpoint: Checkpoint = Checkpoint()
    on_nonfinite: Annotated[
        StopWhenNotFinite | SkipWhenNotFinite | RollbackWhenNotFinite, Field(discriminator="policy")
    ] = StopWhenNotFinite()
    # A digest of weights, buffers and optimizer state is compared across the ranks
    compare_every_steps: Count = 100
    stop_after_minutes: Positive | None = None  # a time limit: stop with a checkpoint, exit code 75
    timeouts: Timeouts = Timeouts()
    horovod: Horovod = Horovod()
    # See keeping_variables
    _variables: dict[yaml_source.Path, str] = PrivateAttr(default_factory=dict)

    def keeping_variables(self, written: Mapping[yaml_source.Path, str]) -> Job:
        """The same job, whose texts at these places in `args` came from the environment and may be
        secrets.

        Files, messages and other ranks get to see how such a text was written, or its SHA-256; only
        the run itself sees it.
        """
        job = self.model_copy()
        job._variables = {path: text for path, text in written.items() if path[1:2] == ("args",)}
        return job

    @property
    def run_folder(self) -> Path:
        """Where the run's files go."""
        return Path(self.run_dir) if self.run_dir is not None else Path("runs") / self.name

    def plan(self, dataset_size: int, world_size: int) -> Plan:
        """What the controller follows, for a training set of `dataset_size` samples on `world_size`
        workers.
        """
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
        """Every key with its value, defaults included, as plain values; of texts from the
        environment in `args` the SHA-256.
        """
        return _each(
            self.model_dump(mode="json"),
            lambda path, value: sha256_of(value) if path in self._variables else value,
        )

    def to_yaml(self) -> str:
        """The job with every default written out; reading it in the same environment gives the same
        job.
        """
        written = {path: yaml_source.AsWritten(text) for path, text in self._variables.items()}
        return yaml_source.write(
            _each(self.model_dump(mode="json"), lambda path, value: written.get(path, value))
        )

    def resume_signature(self) -> dict[str, Any]:
        """What decides the weights: two jobs that agree in it give the same run."""
        resolved = self.resolved()
        found = {key: value for key, value in resolved.items() if key not in _NOT_MATHEMATICS}
        found["gradients"] = {
            key: value for key, value in resolved["gradients"].items() if key != "missing"
        }
        # Of these sections the other keys say how samples come and how the model is carried out.
        return found | {
            section: {key: resolved[section][key] for key in ("name", "args")}
            for section in ("data", "model")
        }

    def fingerprint(self) -> str:
        """SHA-256 over every key and value."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()


def sha256_of(text: str) -> str:
    """What stands for a text that is not to be shown.

    >>> sha256_of("secret")
    'sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b'
    """
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _each(
    values: Any, change: Callable[[yaml_source.Path, Any], Any], path: yaml_source.Path = ()
) -> Any:
    """Plain values with `change` made to each, by its place."""
    if isinstance(values, dict):
        return {key: _each(value, change, (*path, key)) for key, value in values.items()}
    if isinstance(values, list):
        return [_each(value, change, (*path, number)) for number, value in enumerate(values)]
    return change(path, values)


# May change between the parts of a run: where things go, how often they are looked at, how failures
# are met.
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
    + ["deterministic", "data", "model", "horovod"]
)
