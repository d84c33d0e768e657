"""The job file: what a run is, as frozen sections whose fields are the keys of the YAML.

A job is strict: whatever is not understood is an error. `job_file.py` reads it and words the
errors, `validation.py` compares its values. Nothing is imported and nothing is
started before a job is accepted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    model_validator,
)

from hvdlarge.config import registry, yaml_source
from hvdlarge.config.own_parts import OwnPolicy, OwnSection
from hvdlarge.config.part_errors import first_line
from hvdlarge.data.transform_sections import Transform
from hvdlarge.optim.sections import Lars, NotNegative, OptimizerSection, OwnOptimizer, Positive
from hvdlarge.schedule.decay import ConstantDecay, Decay
from hvdlarge.schedule.growth import LARGEST_BATCH, Growth, NoGrowth
from hvdlarge.schedule.lr import LRSchedule
from hvdlarge.schedule.plan import Plan
from hvdlarge.schedule.progress import Clock
from hvdlarge.schedule.scaling import Scaling
from hvdlarge.schedule.section import Policy
from hvdlarge.schedule.warmup import NoWarmup, Warmup

Count = Annotated[int, Field(ge=1)]
Samples = Annotated[int, Field(ge=1, le=LARGEST_BATCH)]  # of a batch
Arguments = dict[str, Any]
Key = str | int  # of a dict, or a position in a tuple
AVERAGED = "ema_"  # before the names of results of the averaged weights

if TYPE_CHECKING:
    AnyGrowth = Growth
    AnyWarmup = Warmup
    AnyDecay = Decay
    AnyOptimizer = OptimizerSection
    AnyTransform = Transform
else:
    AnyGrowth = Annotated[registry.union(registry.GROWTHS), OwnPolicy(Growth)]
    AnyWarmup = Annotated[registry.union(registry.WARMUPS), OwnPolicy(Warmup)]
    AnyDecay = Annotated[registry.union(registry.DECAYS), OwnPolicy(Decay)]
    AnyOptimizer = Annotated[registry.union(registry.OPTIMIZERS), OwnSection(OwnOptimizer)]
    AnyTransform = Annotated[registry.union(registry.TRANSFORMS), Field(discriminator="name")]


class Section(BaseModel):
    """A section of a job file: strict, and frozen once it is read.

    The docstring below each field is its manual: the JSON Schema, `--explain` and the job-file page
    of the documentation all show it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class Data(Section):
    """The data, and how they reach the workers."""

    name: Annotated[str, Field(examples=list(registry.DATA_SETS))]
    """A built-in data set, or `package.module:attribute` of your own."""
    args: Arguments = {}
    """Keyword arguments of the attribute, which returns (training set, test set or None)."""
    targets: Key | tuple[Key, ...] | None = None
    """Key of the targets in samples that are dicts, or their position in tuples, or a list of
    these. Default: a pair is (input, target), and everything else goes to the model whole; `[]`
    does the same for pairs.
    """
    collate: str | None = None
    """Function that makes a batch of a list of samples, as `package.module:attribute`; default:
    torch's `default_collate`.
    """
    transforms: tuple[AnyTransform, ...] = ()
    """Transforms of whole batches of images on the device, in this order; what is random in them is
    left out in evaluations.
    """
    lanes: Count | None = None
    """Number of lanes into which the text is cut, and along which the model carries its state from
    one sample to the next. Samples are consecutive windows, read in their order and not shuffled.
    Must be at least the largest global batch.
    """
    samples: Count | None = None
    """Samples in the training set, for `hvdlarge.plan`; the run checks it against the data."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Data-loader processes per worker; 0 loads in the training process."""
    prefetch_factor: Count = 2
    """Micro-batches that each data-loader process prepares in advance."""
    prefetch_steps: Count | None = None
    """Steps that are decided, and whose data are requested, in advance; default: as many as keep
    the data-loader processes busy.
    """


class Model(Section):
    """Which model is trained, and how it is executed."""

    name: Annotated[str, Field(examples=list(registry.MODELS))]
    """A built-in model, or `package.module:attribute` of your own."""
    args: Arguments = {}
    """Keyword arguments of the model."""
    output: Key | None = None
    """Key, attribute or position of the model's output that loss and metrics get, such as `logits`;
    default: the whole output.
    """
    channels_last: bool = False
    """Store images in channels-last memory format, which is faster on most GPUs."""
    compile: bool = False
    """Compile the model with `torch.compile`."""
    freeze: tuple[str, ...] = ()
    """Name patterns (with * and ?) of parameters that are not trained; running statistics of frozen
    layers are still updated.
    """


class InitFrom(Section):
    """Weights from which a new run starts, instead of random ones."""

    path: Annotated[str, Field(min_length=1)]
    """A checkpoint of hvdlarge, a `state_dict` saved by `torch.save`, or a .safetensors file; only
    rank 0 reads it, and only when a run begins.
    """
    strict: bool = True
    """Whether the file must hold every tensor of the model, and no other; `false` starts without
    those that are missing, unexpected or of another shape, and lists them in a note.
    """
    prefix: str = ""
    """Removed from the names in the file that begin with it, e.g. `module.`."""
    map: dict[str, str] = {}
    """Renames tensors: patterns (with * and ?) of names in the file, without the prefix, and the
    names in the model; each wildcard of the new name stands for what that of the old one matched.
    """


def _as_section(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class Ema(Section):
    """An exponential moving average of the weights, which is evaluated and saved beside them."""

    half_life_samples: Positive
    """Samples after which the share of earlier weights in the average has halved."""


class Loss(Section):
    """The loss: a mean over the samples of a micro-batch, or a pair (sum, weight)."""

    name: Annotated[str, Field(examples=list(registry.LOSSES))] = "cross_entropy"
    """A built-in loss, or `package.module:attribute` of your own: a function of (outputs, targets),
    a class or a factory. `from_model` is the loss that the model computes itself.
    """
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Label smoothing of the cross entropy."""
    args: Arguments = {}
    """Further keyword arguments of the loss."""

    @property
    def is_torch_loss(self) -> bool:
        """Whether it has the arguments of the losses of torch.nn."""
        return self.name in ("cross_entropy", "mse") or self.name.startswith("torch.nn:")

    @property
    def arguments(self) -> Arguments:
        """All arguments of the loss."""
        smoothing = (
            {} if self.label_smoothing is None else {"label_smoothing": self.label_smoothing}
        )
        return {**self.args, **smoothing}


class Batch(Section):
    """The batch and how it grows."""

    base: Samples
    """Global batch, in samples, for which `lr.base` was tuned."""
    initial: Samples | None = None
    """Global batch of the first step, in samples; default: `base`."""
    micro: Samples | Literal["auto"]
    """Samples in one forward and backward pass on one worker. `auto` divides each step evenly
    among the workers, in as few passes as fit in memory.
    """
    growth: Annotated[AnyGrowth, Field(discriminator="policy")] = NoGrowth()
    """How the global batch grows during training."""

    @property
    def first(self) -> int:
        """The global batch of the first step, in samples."""
        return self.base if self.initial is None else self.initial

    @model_validator(mode="after")
    def _fits(self) -> Batch:
        try:
            self.growth.check_initial(self.first)
        except ValueError:
            raise
        except Exception as error:  # of an own policy
            raise ValueError(f"{self.growth.policy}: {first_line(error)}") from None
        return self


class LearningRate(Section):
    """The learning rate and its schedule."""

    base: Positive
    """Learning rate tuned for a global batch of `batch.base`."""
    scaling: Scaling = "none"
    """How the rate follows k = global batch / `batch.base`: not at all, linearly, or as √k."""
    warmup: Annotated[AnyWarmup, Field(discriminator="policy")] = NoWarmup()
    """How the rate rises at the start of training, and at a growth of the batch."""
    decay: Annotated[AnyDecay, Field(discriminator="policy")] = ConstantDecay()
    """How the rate falls afterwards."""

    def schedule(self) -> LRSchedule:
        """The pure schedule of these settings."""
        return LRSchedule(self.base, self.scaling, self.warmup, self.decay)


class EvaluationMetric(Section):
    """A result of the evaluation."""

    name: Annotated[str, Field(examples=list(registry.METRICS))]
    """A built-in metric, or `package.module:attribute` of your own or of torchmetrics."""
    args: Arguments = {}
    """Keyword arguments of the metric."""
    output: Key | None = None
    """Key, attribute or position of what it gets of the outputs; default: the whole."""
    targets: Key | None = None
    """Key, attribute or position of what it gets of the targets; default: the whole."""
    higher_is_better: bool | None = None
    """Which direction `checkpoint.best` takes for better; default: as the metric declares."""


class Evaluate(Section):
    """When the test set is evaluated, and what is measured; the end of a run always is."""

    every_epochs: Positive = 1.0
    """Epochs between evaluations."""
    micro_batch: Count = 256
    """Samples in one forward pass on one worker."""
    lanes: Count | None = None
    """With `data.lanes`, the number of lanes into which the test text is cut; default: that of
    `data.lanes`. In each lane the first sample begins with a state of zeros, so fewer lanes give a
    lower loss.
    """
    metrics: (
        tuple[Annotated[str, Field(examples=list(registry.METRICS))], ...]
        | dict[str, EvaluationMetric]
    ) = ("accuracy",)
    """Results beside the test loss: a list of built-in metrics or `package.module:attribute`, or a
    section for each, by the name of its result. One that does not apply, such as the accuracy of
    targets that are no classes, is left out.
    """

    @property
    def named(self) -> dict[str, EvaluationMetric]:
        """Each metric by the name of its result: of one in a list the name or the attribute."""
        if isinstance(self.metrics, dict):
            return self.metrics
        return {name.rpartition(":")[2]: EvaluationMetric(name=name) for name in self.metrics}


class Checkpoint(Section):
    """When checkpoints are written; a stop and the end of a run always write one."""

    every_epochs: Positive | None = None
    """Epochs between checkpoints; default: 1, unless `every_steps` or `every_minutes` is set."""
    every_steps: Count | None = None
    """Steps between checkpoints."""
    every_minutes: Positive | None = None
    """Minutes between checkpoints."""
    keep: Count = 3
    """How many of the newest checkpoints are kept."""
    best: str | None = None
    """Which result decides on `best.pt`: `test_loss` or a metric's name, with `ema` also `ema_` and
    one of these; default: the first of `evaluate.metrics` that applies, else `test_loss`.
    """

    @property
    def epochs(self) -> float | None:
        """The interval in epochs; None where only another one was asked for."""
        if self.every_epochs is None and self.every_steps is None and self.every_minutes is None:
            return 1.0
        return self.every_epochs


class Gradients(Section):
    """What is done to gradients on their way to the update."""

    clip_norm: Positive | None = None
    """Maximum L2 norm of all mean gradients together; larger ones are scaled down to it."""
    compression: Literal["none", "fp16"] = "none"
    """Type in which gradients travel between workers; fp16 halves the traffic."""
    missing: Literal["error", "zero"] = "error"
    """What happens when a parameter has a gradient on some workers only, as with layers that are
    skipped: an error that names it, or a gradient of zero where it is missing.
    """


class Horovod(Section):
    """How Horovod and MPI are set; variables already set in the environment take precedence."""

    fusion_mib: NotNegative = 0.0
    """Size of Horovod's fusion buffers in MiB (`HOROVOD_FUSION_THRESHOLD`). 0 turns fusion off,
    which keeps the order of summation the same from run to run.
    """
    cycle_ms: Positive | None = None
    """Milliseconds between Horovod's cycles (`HOROVOD_CYCLE_TIME`); default: Horovod's own."""
    groups: Count | None = None
    """Number of groups in which gradients are sent; default: each tensor on its own."""
    yield_when_idle: bool | None = None
    """Whether waiting ranks give up their core (`OMPI_MCA_mpi_yield_when_idle`); default: where a
    worker has fewer than two cores.
    """


class StopWhenNotFinite(Section):
    """A gradient that is not finite ends the run."""

    can_roll_back: ClassVar[bool] = False  # whether the run may return to a checkpoint

    policy: Literal["stop"] = "stop"
    """End the run with exit code 73."""


class SkipWhenNotFinite(Section):
    """A step whose gradients are not finite is skipped on every rank."""

    can_roll_back: ClassVar[bool] = False

    policy: Literal["skip"] = "skip"
    """Skip the step on every rank."""
    limit: Count = 10
    """Steps that may be skipped before the run ends with exit code 73."""


class RollbackWhenNotFinite(Section):
    """The run goes back to the last checkpoint of the job's cadence and on from there with a lower
    rate.

    Those that a stop or the clock (`checkpoint.every_minutes`) asked for are ignored, so that an
    interruption does not change where a rollback leads.
    """

    can_roll_back: ClassVar[bool] = True

    policy: Literal["rollback"] = "rollback"
    """Go back to the last scheduled checkpoint and continue with a lower learning rate."""
    limit: Count = 3
    """Rollbacks before the run ends with exit code 73."""
    lr_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Multiplies the learning rate at each rollback."""


class Timeouts(Section):
    """How long one phase may take before the run is considered hung, in seconds."""

    start_seconds: Positive = 300.0
    """Starting up: launching, comparing the workers, building the model."""
    step_seconds: Positive = 300.0
    """One training step."""
    data_seconds: Positive = 3600.0
    """Building the data sets."""
    checkpoint_seconds: Positive = 3600.0
    """Finding, verifying, loading and distributing a checkpoint."""
    fetch_seconds: Positive = 600.0
    """Waiting for one micro-batch of data. Other workers may wait in the all-reduce for n times
    `step_seconds` + `fetch_seconds`, n being the micro-batches of a worker in a step."""
    evaluate_seconds: Positive = 3600.0
    """One evaluation; that of the averaged weights (`ema`) has its own limit, as long."""
    save_seconds: Positive = 3600.0
    """Saving a checkpoint."""

    def limits(self) -> dict[str, float]:
        """Seconds by phase."""
        limits = {name.removesuffix("_seconds"): value for name, value in self.model_dump().items()}
        # Others wait there for a rank that waits for its data, as long for each micro-batch; a
        # rehearsal fetches samples, too
        both = self.fetch_seconds + self.step_seconds
        return limits | {"rehearse": both, "allreduce": both}


class HookPart(Section):
    """A hook and its arguments."""

    name: Annotated[str, Field(pattern=registry.OWN_PATTERN)]
    """`package.module:Class` of your own."""
    args: Arguments = {}
    """Keyword arguments of the class."""


def _named(entry: Any) -> Any:
    return {"name": entry} if isinstance(entry, str) else entry


AnyHook = Annotated[HookPart, BeforeValidator(_named, json_schema_input_type=str | HookPart)]


class SinkPart(Section):
    """A receiver of the records of a run, and its arguments."""

    name: Annotated[str, Field(examples=list(registry.SINKS))]
    """A built-in sink, or `package.module:Class` of your own."""
    args: Arguments = {}
    """Keyword arguments of the class."""


AnySink = Annotated[SinkPart, BeforeValidator(_named, json_schema_input_type=str | SinkPart)]


class Log(Section):
    """What is logged, how often, and where it goes."""

    every_steps: Count = 10
    """Steps between two lines of metrics.jsonl."""
    layers_every_steps: Count | None = None
    """Steps between lines with the norms of each parameter, its gradient and its update, and its
    trust ratio; default: none.
    """
    noise_every_steps: Count | None = None
    """Steps between measurements of the gradient noise scale, for which a step needs at least two
    micro-batches; default: none.
    """
    distances: bool = False
    """Whether the distance of the weights from those of the start is logged, at all steps up to the
    11th and then eight times while their number doubles.
    """
    sinks: tuple[AnySink, ...] = ()
    """Where the records go beside metrics.jsonl and decisions.jsonl: names of sinks, or
    `{name, args}`. `jsonl` stands for these two files, which are always written: listing it changes
    nothing.
    """


class Job(Section):
    """A whole job file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the job; its run folder is runs/<name>."""
    run_dir: str | None = None
    """The run folder; default: runs/<name>."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initial weights, the order of the data, augmentation and dropout."""
    epochs: Positive
    """Length of the run in epochs; may be fractional."""
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp64"] = "fp32"
    """Arithmetic of the forward and backward pass; bf16 and fp16 keep fp32 weights (autocast)."""
    reduction: Literal["fast", "exact"] = "fast"
    """How gradients are summed; `exact` gives bit-identical weights on 1, 2, 4, 8, … workers."""
    deterministic: bool = False
    """Use torch's deterministic algorithms only: needed on a GPU for bit-identical weights from run
    to run on the same number of workers. On a CPU they are so without it."""
    data: Data
    """The training and test data."""
    model: Model
    """The model."""
    init_from: (
        Annotated[InitFrom, BeforeValidator(_as_section, json_schema_input_type=InitFrom | str)]
        | None
    ) = None
    """A file with the weights from which a new run starts: a section, or just its path."""
    loss: Loss = Loss()
    """The loss."""
    batch: Batch
    """The global batch, its growth, and how it is cut into micro-batches."""
    lr: LearningRate
    """The learning rate: scaling, warmup and decay."""
    gradients: Gradients = Gradients()
    """Clipping, compression and missing gradients."""
    optimizer: Annotated[AnyOptimizer, Field(discriminator="name")] = Lars()
    """The optimizer; default: `{name: lars}`, the paper's formula with biases and normalisation
    parameters excluded, unlike the paper, and no weight decay.
    """
    ema: Ema | None = None
    """Averages the weights over the steps; default: no average."""
    evaluate: Evaluate = Evaluate()
    """When the test set is evaluated, and which metrics are taken."""
    log: Log = Log()
    """How often metrics are logged, and where they go."""
    hooks: tuple[AnyHook, ...] = ()
    """Code of your own that is called between steps: `package.module:Class`, or `{name, args}`."""
    checkpoint: Checkpoint = Checkpoint()
    """When checkpoints are written, and how many are kept."""
    on_nonfinite: Annotated[
        StopWhenNotFinite | SkipWhenNotFinite | RollbackWhenNotFinite, Field(discriminator="policy")
    ] = StopWhenNotFinite()
    """What happens when gradients or a logged training loss are not finite."""
    compare_every_steps: Count = 100
    """Steps between two comparisons of all weights and optimizer state across the ranks."""
    stop_after_minutes: Positive | None = None
    """Time limit in minutes: stop with a checkpoint and exit code 75."""
    timeouts: Timeouts = Timeouts()
    """How long each phase may take before the run is considered hung."""
    horovod: Horovod = Horovod()
    """Settings of Horovod and MPI."""

    _variables: dict[yaml_source.Path, str] = PrivateAttr(default_factory=dict)

    def keeping_variables(self, written: Mapping[yaml_source.Path, str]) -> Job:
        """The same job, whose texts at these places in `args` came from the environment and may be
        secrets.

        Files, messages and other ranks get to see how such a text was written, or its SHA-256; only
        the run itself sees it.
        """
        job = self.model_copy()
        job._variables = {path: text for path, text in written.items() if _is_argument(path)}
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
            lr_schedule=self.lr.schedule(),
            world_size=world_size,
        )

    def policies(self) -> list[tuple[tuple[str, ...], Policy]]:
        """The policies of the schedule, each with the path of its section."""
        return [
            (("batch", "growth"), self.batch.growth),
            (("lr", "warmup"), self.lr.warmup),
            (("lr", "decay"), self.lr.decay),
        ]

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
        """The settings that may not change at a resume."""
        resolved = self.resolved()
        signature = {key: value for key, value in resolved.items() if key not in _NOT_IN_SIGNATURE}
        signature["gradients"] = {
            key: value for key, value in resolved["gradients"].items() if key != "missing"
        }
        # Of these sections the other keys say how samples come and how the model is carried out.
        kept = {"data": ("name", "args", "targets", "collate"), "model": ("name", "args", "output")}
        signature |= {
            section: {key: resolved[section][key] for key in keys} for section, keys in kept.items()
        }
        if self.model.freeze:
            signature["model"]["freeze"] = resolved["model"]["freeze"]
        if self.data.transforms:
            signature["data"]["transforms"] = resolved["data"]["transforms"]
        if self.data.lanes is not None:
            signature["data"]["lanes"] = resolved["data"]["lanes"]
        if self.batch.growth.depends_on_measurement:
            signature["log"] = {"noise_every_steps": self.log.noise_every_steps}
        if self.init_from is not None:  # the file may be moved: a resumed run does not read it
            signature["init_from"] = {
                key: value for key, value in resolved["init_from"].items() if key != "path"
            }
        return signature

    def fingerprint(self) -> str:
        """SHA-256 of all keys and values."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()


def sha256_of(text: str) -> str:
    """A digest to show in place of a secret text.

    >>> sha256_of("secret")
    'sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b'
    """
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _is_argument(path: yaml_source.Path) -> bool:
    """Whether the value at a path is within the `args` of some part.

    >>> _is_argument(("hooks", 0, "args", "token")), _is_argument(("model", "name"))
    (True, False)
    """
    # A result may be named args, too
    return "args" in path[3 if path[:2] == ("evaluate", "metrics") else 1 :]


def _each(
    values: Any, change: Callable[[yaml_source.Path, Any], Any], path: yaml_source.Path = ()
) -> Any:
    """Plain values, each replaced by `change(its path, value)`."""
    if isinstance(values, dict):
        return {key: _each(value, change, (*path, key)) for key, value in values.items()}
    if isinstance(values, list):
        return [_each(value, change, (*path, number)) for number, value in enumerate(values)]
    return change(path, values)


# May change between the parts of a run: where things go, how often they are looked at, how failures
# are met.
_NOT_IN_SIGNATURE = frozenset(
    [
        "name",
        "run_dir",
        "log",
        "hooks",
        "evaluate",
        "checkpoint",
        "on_nonfinite",
        "compare_every_steps",
        "stop_after_minutes",
        "timeouts",
    ]
    + ["deterministic", "data", "model", "horovod"]
)
