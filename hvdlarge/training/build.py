"""From the sections of a job to the objects of a run. Each is built on this rank alone, unless its
function states that every rank calls it together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from hvdlarge.comm.devices import check_gpus, choose_device
from hvdlarge.comm.interfaces import Collectives, ControlChannel, DistributedOptimizer
from hvdlarge.comm.rank_checks import check_equal_across_ranks, on_rank_0, raise_on_all_ranks
from hvdlarge.config import job as sections
from hvdlarge.config import registry
from hvdlarge.config.job import Job
from hvdlarge.config.part_errors import describe
from hvdlarge.config.planning import plan_run
from hvdlarge.controller import Controller, DecisionFeed
from hvdlarge.data import seeds
from hvdlarge.data.batches import to_device
from hvdlarge.data.in_memory import reads_batches
from hvdlarge.data.lanes import Lanes
from hvdlarge.data.loader import (
    LoadedMicroBatch,
    Loader,
    MicroBatchDataset,
    TensorLoader,
    WorkerLoader,
    make_dataloader,
)
from hvdlarge.data.rng import seed_all
from hvdlarge.data.samples import SampleForm
from hvdlarge.data.transforms import Transforms
from hvdlarge.evaluation.evaluation import Evaluation
from hvdlarge.evaluation.metric import Metric, Metrics, build_metric, rankings
from hvdlarge.evaluation.states import StateMetric
from hvdlarge.exits import JobError, is_out_of_memory
from hvdlarge.models.state import (
    Modules,
    extra_states,
    named_buffers,
    pack,
    set_extra_states,
    unpack,
)
from hvdlarge.models.state import (
    named_parameters as every_parameter,
)
from hvdlarge.optim.build import build_optimizer
from hvdlarge.optim.interface import MeanGradientOptimizer
from hvdlarge.optim.own import OptimizerRefused
from hvdlarge.optim.param_groups import named_parameters
from hvdlarge.optim.precision import LossScaler, Precision, scale_for_compression
from hvdlarge.optim.sections import OptimizerSection, OwnOptimizer
from hvdlarge.preflight.auto_micro_batch import with_largest_micro_batch
from hvdlarge.preflight.rehearsal import Rehearsed
from hvdlarge.reduction.batch_norm import RunningStatistics, tracking_layers
from hvdlarge.reduction.exact_batch_norm import ExactStatistics
from hvdlarge.reduction.exact_sum import ExactOptimizer
from hvdlarge.replica.carried import (
    CarriedLanes,
    CarriedState,
    LaneStates,
    NoCarriedState,
)
from hvdlarge.replica.ema import WeightAverage
from hvdlarge.replica.freezing import freeze
from hvdlarge.replica.objective import Objective, SampleMean, WeightedMean
from hvdlarge.replica.replica import Replica
from hvdlarge.replica.train_state import TrainState
from hvdlarge.resilience.nonfinite import (
    LossScalingPolicy,
    NonFinitePolicy,
    RollbackPolicy,
    SkipPolicy,
    StopPolicy,
)
from hvdlarge.resilience.out_of_memory import explain_out_of_memory
from hvdlarge.schedule.batch import MicroBatch
from hvdlarge.schedule.decision import Decision
from hvdlarge.schedule.plan import Plan
from hvdlarge.telemetry.background_sink import NamedSink, find_sinks
from hvdlarge.telemetry.hooks import check_hook
from hvdlarge.world import RankContext


@dataclass(frozen=True)
class Components:
    """What a job names, built on this rank alone; the same on every rank."""

    objective: Objective  # model and loss
    training_set: Any
    test_set: Any  # or None
    sizes: Mapping[str, int | None]  # of both, in samples
    plan: Plan
    optimizer: MeanGradientOptimizer
    form: SampleForm = field(default_factory=SampleForm)  # of the samples of both sets
    metrics: Metrics = field(default_factory=dict)  # none
    notes: Sequence[str] = ()  # what the user may not expect
    rehearsed: Rehearsed = field(default_factory=Rehearsed)  # what the rehearsal has found out
    hooks: Sequence[tuple[str, Any]] = ()  # with their names
    sinks: Sequence[NamedSink] = ()  # rank 0's
    transforms: Transforms = field(default_factory=Transforms)  # of images


def build_components(job: Job, context: RankContext) -> Components:
    """Build what the job names, and compare it across ranks. Every rank calls this together.

    Raises:
        JobError, InvalidEnvironmentError, RanksDisagreeError: on every rank.
        OutOfMemory: on every rank, where not even one sample fits.
    """
    control, tensors = context.control, context.tensors
    sinks = on_rank_0(control, lambda: find_sinks(job.log.sinks)) if job.log.sinks else []
    device = raise_on_all_ranks(control, lambda: choose_device(tensors))
    precision = raise_on_all_ranks(control, lambda: Precision(job.precision, device))
    notes = check_gpus(device, control, tensors)
    with context.watchdog.during("data"):
        training_set, test_set = raise_on_all_ranks(
            control, lambda: load_data(job.data, job.seed, context.objects.get("data"))
        )
    sizes = {
        "training samples": len(training_set),
        "test samples": None if test_set is None else len(test_set),
    }
    check_equal_across_ranks(control, sizes | {"device": device.type}, "data and devices")
    if test_set is None and job.checkpoint.best is not None:
        raise_on_all_ranks(control, lambda: _refuse_best(job))
    plan = raise_on_all_ranks(control, lambda: plan_run(job, len(training_set), control.size))
    objective, optimizer, model_notes = raise_on_all_ranks(
        control, lambda: build_learning(job, precision, context.objects)
    )
    form = raise_on_all_ranks(control, lambda: sample_form(job.data))
    transforms = build_transforms(job, precision)
    metrics = raise_on_all_ranks(control, lambda: build_metrics(job))
    hooks = raise_on_all_ranks(control, lambda: build_hooks(job)) if job.hooks else []
    if job.batch.micro == "auto" and device.type == "cuda":
        first = first_sample(job.data, form, training_set, transforms)
        plan = with_largest_micro_batch(
            plan, objective, first, control, averages=job.ema is not None
        )
    return Components(
        objective, training_set, test_set, sizes, plan, optimizer, form, metrics,
        [*notes, *model_notes], hooks=hooks, sinks=sinks or [], transforms=transforms,
    )  # fmt: skip


def load_data(data: sections.Data, seed: int, given: Any = None) -> tuple[Any, Any]:
    """The training set and the test set (or None) that a job names; what they draw at random
    depends on the seed only.

    Args:
        data: the job's section.
        seed: of the job.
        given: the pair itself, in place of what the job names.

    Raises:
        JobError: for a name that is not there, or something that is not a pair of map-style sets.
    """
    seed_all(seeds.key(seed, seeds.DATA))
    try:
        pair = (
            given
            if given is not None
            else registry.instantiate("data.name", data.name, data.args, registry.DATA_SETS)
        )
    except ModuleNotFoundError as error:
        raise JobError(f"data.name: {data.name}: {error}") from None
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
        raise JobError(
            f"data.name: {data.name} must return a pair (training set, test set or None), not "
            f"{_kind(pair)}"
        )
    for what, dataset in zip(("training set", "test set"), pair, strict=True):
        if dataset is not None or what == "training set":
            _check_map_style(f"data.name: the {what} of {data.name}", dataset)
    if data.samples is not None and len(pair[0]) != data.samples:
        raise JobError(
            f"data.samples is {data.samples:,}, but the training set of {data.name} has "
            f"{len(pair[0]):,} samples"
        )
    return pair[0], pair[1]


def _check_map_style(what: str, dataset: Any) -> None:
    """Raise JobError unless a set has a length of at least 1, and samples by number."""
    if isinstance(dataset, DataLoader):
        raise JobError(f"{what} is a DataLoader: return its data set, the engine makes the batches")
    iterable_only = not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"))
    if iterable_only or isinstance(dataset, IterableDataset):
        kind = "an IterableDataset" if isinstance(dataset, IterableDataset) else _kind(dataset)
        name = f" ({type(dataset).__name__})" if isinstance(dataset, IterableDataset) else ""
        raise JobError(
            f"{what} is {kind}{name}: the engine needs a map-style set, with __len__ and "
            "__getitem__\nThe order of the samples is a permutation of their numbers, so that it "
            "does not depend on the number of workers and a resume can enter it anywhere. Use a "
            "list of the samples if they fit in memory, else an index of files, or of positions in "
            "them, from which __getitem__ reads one sample"
        )
    try:
        size = len(dataset)
    except Exception as error:
        raise JobError(f"{what}: its length raises {describe(error)}") from None
    if size == 0:
        raise JobError(f"{what} is empty")


def _refuse_best(job: Job) -> None:
    raise JobError(
        f"checkpoint.best: {job.checkpoint.best!r} is never measured, since {job.data.name} gives "
        "no test set: leave checkpoint.best out, or give a test set"
    )


def build_learning(
    job: Job, precision: Precision, given: Mapping[str, Any] | None = None
) -> tuple[Objective, MeanGradientOptimizer, list[str]]:
    """Model and loss, optimizer, and notes for the user, built on this worker alone as the job
    names them. The weights depend on the seed only.

    Modes, types and names are settled here, before anything is derived from them.

    Args:
        job: the job.
        precision: of this worker.
        given: model and loss by these names, in place of what the job names.

    Raises:
        JobError: for names that are not there, arguments that do not fit, or a model that cannot be
            trained.
    """
    seed_all(seeds.key(job.seed, seeds.WEIGHTS))
    objects = given or {}
    model = objects.get("model")
    if model is None:
        model = registry.instantiate("model.name", job.model.name, job.model.args, registry.MODELS)
    if not isinstance(model, torch.nn.Module):
        raise JobError(
            f"model.name: {job.model.name} must give a torch.nn.Module, not {_kind(model)}"
        )
    loss = objects.get("loss")
    if loss is None:
        loss = registry.instantiate_loss("loss.name", job.loss.name, job.loss.arguments)
    mover = device_mover(precision, job.model.channels_last)
    try:
        carries = job.data.lanes is not None
        objective = Objective(model, loss, precision, mover, job.model.output, carries)
        modules = objective.modules
        freeze(modules, job.model.freeze)
        notes = [note for module in modules.values() if (note := _train_mode(module))]
        with explain_out_of_memory(
            "moving the model to the device", "use a smaller model, or a device with more memory"
        ):
            for module in modules.values():
                precision.convert(module)
        own_memory(modules)
        _check_parameters(modules)
        tracking_layers(modules)  # raises if the engine cannot keep these modules' statistics
        if extra := extra_states(modules):
            pack(extra)
        if job.model.compile:
            objective.compile()
    except ValueError as error:
        raise JobError(f"model.name: {job.model.name}: {error}") from None
    return objective, _optimizer(modules, job.optimizer), notes


def _optimizer(modules: Modules, section: OptimizerSection) -> MeanGradientOptimizer:
    """The optimizer of a section; errors in an own class are reported with its line."""
    try:
        if not isinstance(section, OwnOptimizer):
            return build_optimizer(modules, section)
        return build_optimizer(modules, section, registry.load("optimizer.name", section.name))
    except OptimizerRefused as error:
        raise JobError(f"optimizer.name: {section.name}: {error}") from None
    except ValueError as error:
        raise JobError(f"optimizer: {error}") from None
    except Exception as error:
        own = isinstance(section, OwnOptimizer) and not isinstance(error, JobError)
        if not own or is_out_of_memory(error):
            raise
        raise JobError(f"optimizer.name: {section.name}: {describe(error)}") from None


def _train_mode(module: torch.nn.Module) -> str | None:
    """Put a module into training mode, as its own `train` does it; what the user may not expect of
    that.
    """
    before = [name for name, part in module.named_modules() if not part.training and name]
    entire = not module.training
    module.train()
    now = {name for name, part in module.named_modules() if not part.training}
    trained = [name for name in before if name not in now]
    if entire or not trained:
        return None
    more = len(trained) - 1
    were = (
        f"{trained[0]!r} was in evaluation mode and is"
        if more == 0
        else f"{trained[0]!r} and {more} more module{'s' if more > 1 else ''} were in evaluation "
        "mode and are"
    )
    return f"{were} now in training mode; to keep a layer frozen, override the model's train()"


def own_memory(modules: Modules) -> None:
    """Give each value of a buffer a place of its own in memory: one that is expanded cannot be
    written to.
    """
    for _, buffer in named_buffers(modules):
        if any(
            stride == 0 and size > 1
            for stride, size in zip(buffer.stride(), buffer.shape, strict=True)
        ):
            buffer.data = buffer.clone(memory_format=torch.contiguous_format)


def _check_parameters(modules: Modules) -> None:
    for name, parameter in every_parameter(modules):
        if not parameter.is_contiguous():
            raise ValueError(
                f"the parameter {name!r} is not contiguous, which Horovod does not support"
            )
        if parameter.requires_grad and not parameter.is_floating_point():
            raise ValueError(
                f"the parameter {name!r} is trained and "
                f"{str(parameter.dtype).removeprefix('torch.')}, which Horovod does not "
                "sum: hold it as real numbers with a last dimension of 2, and use "
                "torch.view_as_complex in the forward pass"
            )


def build_replica(
    job: Job, components: Components, control: ControlChannel, tensors: Collectives
) -> Replica:
    """Broadcast rank 0's weights, and make the update all-reduce the gradients first. Every rank
    calls this together.

    Args:
        job: in exact mode the number of workers is a power of two.
        components: as built on this worker; the optimizer has no state yet.
        control: the control channel.
        tensors: the collectives.
    """
    objective, optimizer = components.objective, components.optimizer
    modules = objective.modules
    share_state(modules, control, tensors)
    named_weights = named_parameters(optimizer.param_groups)
    names = {weight: name for name, weight in named_weights}
    compression = job.gradients.compression
    update: DistributedOptimizer
    statistics: RunningStatistics
    if job.reduction == "exact":
        update = ExactOptimizer(optimizer, tensors.gather, control.rank, control.size)
        statistics = ExactStatistics(modules, control.rank, control.size, tensors.gather)
    else:
        update = tensors.distributed_optimizer(
            optimizer, named_weights, compression == "fp16", job.horovod.groups
        )
        statistics = RunningStatistics(modules, control.rank, control.size, tensors.gather)
    return Replica(
        objective=objective,
        averaging=WeightedMean(control) if components.rehearsed.weighted_loss else SampleMean(),
        update=update,
        statistics=statistics,
        loss_scaler=LossScaler(
            scale_for_compression(compression, control.size, components.rehearsed.weight_per_sample)
        ),
        clip_norm=job.gradients.clip_norm,
        zero_if_missing=job.gradients.missing == "zero",
        names=names,
        seed=job.seed,
        rank=control.rank,
        ema=None if job.ema is None else WeightAverage(names, job.ema.half_life_samples),
        carried=build_carried(job, components, control, tensors),
    )


def build_carried(
    job: Job, components: Components, control: ControlChannel, tensors: Collectives
) -> CarriedState:
    """What is carried from one sample of the training set to the next, as the rehearsal has found
    its form.
    """
    lanes = lanes_of(job.data.lanes, components.training_set)
    if lanes is None:
        return NoCarriedState()
    form = components.objective.state_form
    assert form is not None  # found in the rehearsal
    return CarriedLanes(LaneStates(lanes, form), control.rank, control.size, tensors.sum)


def lanes_of(number: int | None, dataset: Any) -> Lanes | None:
    """A data set in so many lanes, or in one for each sample if those are fewer; None for none."""
    return None if number is None else Lanes(len(dataset), min(number, len(dataset)))


def test_lanes(data: sections.Data, evaluate: sections.Evaluate, test_set: Any) -> Lanes | None:
    """The lanes of a test set; None if a job has none."""
    return None if data.lanes is None else lanes_of(evaluate.lanes or data.lanes, test_set)


def device_mover(precision: Precision, channels_last: bool) -> Callable[[Any], Any]:
    """A function that moves inputs or targets to the device and casts floats like the weights."""
    return functools.partial(
        to_device, device=precision.device, dtype=precision.weights, channels_last=channels_last
    )


def share_state(modules: Modules, control: ControlChannel, tensors: Collectives) -> None:
    """Give every worker rank 0's parameters, buffers and extra state. Every rank calls this
    together.
    """
    tensors.broadcast_(
        [
            *((name, value.detach()) for name, value in every_parameter(modules)),
            *named_buffers(modules),
        ]
    )
    extra = extra_states(modules)
    message = pack(extra) if extra and control.rank == 0 else b""
    message = control.allgather(message)[0]
    if message and control.rank != 0:
        set_extra_states(modules, unpack(message))


def build_loader(data: sections.Data, form: SampleForm, training_set: Any, seed: int) -> Loader:
    """The loader for a training set: direct for one that holds tensors, torch's DataLoader for
    every other.
    """
    lanes = lanes_of(data.lanes, training_set)
    fetch = MicroBatchDataset(training_set, seed, shuffled=True, form=form, lanes=lanes)
    if reads_batches(training_set):
        return TensorLoader(fetch, reads_ahead=torch.cuda.is_initialized())
    return WorkerLoader(fetch, data.num_workers, data.prefetch_factor)


def build_transforms(job: Job, precision: Precision) -> Transforms:
    """The transforms of a job's images."""
    mover = device_mover(precision, job.model.channels_last)
    return Transforms(job.data.transforms, job.seed, mover, precision.weights)


def sample_form(data: sections.Data) -> SampleForm:
    """How the samples of a job's data sets become inputs and targets.

    Raises:
        JobError: for a collate function that is not there.
    """
    if data.collate is None:
        return SampleForm(data.targets)
    return SampleForm(data.targets, registry.load("data.collate", data.collate))


def build_metrics(job: Job) -> Metrics:
    """The metrics that a job names, by the names of their results.

    Raises:
        JobError: for a name that is not there, something that is no metric, or a best result that
            has no direction.
    """
    metrics: dict[str, Metric | StateMetric] = {}
    for result, section in job.evaluate.named.items():
        key, name = "evaluate.metrics", section.name
        metric = registry.instantiate(key, name, section.args, registry.METRICS)
        metrics[result] = build_metric(
            result, name, metric, section.output, section.targets, section.higher_is_better
        )
    rankings(job.checkpoint.best, metrics)
    return metrics


def build_hooks(job: Job) -> list[tuple[str, Any]]:
    """The hooks that a job names, each with its name.

    Raises:
        JobError: for a name that is not there, arguments that do not fit, an error of the hook's
            own code, or something that is no hook.
    """
    hooks = []
    for entry in job.hooks:
        hook = registry.instantiate("hooks", entry.name, entry.args, {})
        check_hook(entry.name, hook)
        hooks.append((entry.name, hook))
    return hooks


def build_evaluation(
    data: sections.Data,
    evaluate: sections.Evaluate,
    metrics: Metrics,
    form: SampleForm,
    test_set: Any,
    rank: int,
    world_size: int,
    transforms: Transforms,
) -> Evaluation | None:
    """The evaluation of a test set; None without one."""
    if test_set is None:
        return None
    lanes = test_lanes(data, evaluate, test_set)
    num_workers = 0 if reads_batches(test_set) else data.num_workers
    return Evaluation(
        MicroBatchDataset(test_set, seed=0, shuffled=False, form=form, lanes=lanes),
        len(test_set),
        metrics,
        evaluate.micro_batch,
        rank,
        world_size,
        num_workers,
        data.prefetch_factor,
        transforms.evaluate,
        lanes,
    )


def test_samples(
    data: sections.Data,
    evaluate: sections.Evaluate,
    form: SampleForm,
    test_set: Any,
    transforms: Transforms,
) -> Callable[[], Iterable[LoadedMicroBatch]]:
    """A function that reads the first micro-batch of a test set twice, in a loader process if there
    are any.
    """
    lanes = test_lanes(data, evaluate, test_set)
    most = len(test_set) if lanes is None else lanes.number
    first = MicroBatch(0, 0, min(most, evaluate.micro_batch))
    loader = _in_order(data, form, test_set, [first, first])
    return lambda: map(transforms.evaluate, loader)


def first_sample(
    data: sections.Data,
    form: SampleForm,
    training_set: Any,
    transforms: Transforms,
) -> Callable[[], LoadedMicroBatch]:
    """A function that reads the first sample of a training set, as a micro-batch of one."""

    def read() -> LoadedMicroBatch:
        loaded = next(iter(_in_order(data, form, training_set, [MicroBatch(0, 0, 1)])))
        return transforms.train(loaded)

    return read


def _in_order(
    data: sections.Data, form: SampleForm, dataset: Any, micro_batches: Sequence[MicroBatch]
) -> Iterable[LoadedMicroBatch]:
    """Micro-batches of a data set in its own order.

    They are read in a loader process if there are any: a data set that opens files lazily must not
    open them in this process.
    """
    processes = 0 if reads_batches(dataset) else min(1, data.num_workers)
    fetch = MicroBatchDataset(dataset, 0, shuffled=False, form=form)
    return make_dataloader(fetch, micro_batches, processes, data.prefetch_factor)


def build_feed(
    data: sections.Data,
    plan: Plan,
    control: ControlChannel,
    controller: Controller | None,
    loader: Loader,
) -> DecisionFeed:
    """The decisions of a run, as many steps ahead as the loader can use; `controller` is rank
    0's.
    """
    ahead = data.prefetch_steps or max(1, data.num_workers * data.prefetch_factor)

    def enqueue(decision: Decision) -> None:
        micro_batches = plan.layout(decision).of_rank(control.rank, decision.samples_seen)
        loader.enqueue(micro_batches, decision.is_last)

    return DecisionFeed(control, controller, ahead, enqueue, plan.waits_after)


def build_policy(not_finite: Any, state: TrainState, replica: Replica) -> NonFinitePolicy:
    """The policy for steps whose gradients are not finite, from the job's `on_nonfinite`."""
    policy: StopPolicy | SkipPolicy | RollbackPolicy
    if isinstance(not_finite, sections.SkipWhenNotFinite):
        skipped = state.skipped - state.overflows - state.without_loss
        policy = SkipPolicy(not_finite.limit, skipped)
    elif isinstance(not_finite, sections.RollbackWhenNotFinite):
        policy = RollbackPolicy(not_finite.limit, not_finite.lr_factor, state.rolled_back)
    else:
        policy = StopPolicy()
    if replica.objective.precision.scales_losses:
        return LossScalingPolicy(policy, replica.loss_scaler, state)
    return policy


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
