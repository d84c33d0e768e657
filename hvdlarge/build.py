"""From the sections of a job to the objects of a run. Each function takes the sections it reads,
and does one thing.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset

from hvdlarge.comm.interfaces import Collectives, ControlChannel, DistributedOptimizer
from hvdlarge.comm.rank_checks import raise_on_all_ranks
from hvdlarge.config import job as sections
from hvdlarge.config import registry
from hvdlarge.config.planning import stages_of
from hvdlarge.controller import Controller, DecisionFeed
from hvdlarge.data import seeds
from hvdlarge.data.in_memory import reads_batches
from hvdlarge.data.loader import (
    LoadedMicroBatch,
    Loader,
    MicroBatchDataset,
    TensorLoader,
    WorkerLoader,
    make_dataloader,
)
from hvdlarge.data.rng import seed_all
from hvdlarge.evaluation.evaluation import Evaluation
from hvdlarge.evaluation.metric import Metrics, check_metric
from hvdlarge.exits import InvalidEnvironmentError, JobError, OutOfMemory
from hvdlarge.models.state import (
    Modules,
    extra_states,
    named_buffers,
    pack,
    set_extra_states,
    trained_modules,
    unpack,
)
from hvdlarge.models.state import named_parameters as every_parameter
from hvdlarge.optim.build import build_optimizer, waits_for_norms
from hvdlarge.optim.lars import LARS
from hvdlarge.optim.param_groups import named_parameters
from hvdlarge.optim.precision import LossScaler, Precision, scale_for_compression
from hvdlarge.optim.sections import OptimizerSection
from hvdlarge.reduction.batch_norm import RunningStatistics, tracking_layers
from hvdlarge.reduction.exact_batch_norm import ExactStatistics
from hvdlarge.reduction.exact_sum import ExactOptimizer
from hvdlarge.replica import Replica
from hvdlarge.resilience import out_of_memory as memory
from hvdlarge.resilience.nonfinite import (
    DeferredCheck,
    LossScalingPolicy,
    NonFinitePolicy,
    RollbackPolicy,
    SkipPolicy,
    StopPolicy,
)
from hvdlarge.schedule.batch import MicroBatch
from hvdlarge.schedule.decision import Decision
from hvdlarge.schedule.plan import Plan
from hvdlarge.train_state import TrainState


def choose_device(tensors: Collectives) -> torch.device:
    """The GPU of this worker's number on its host, or the CPU of a host without GPUs.

    Raises:
        InvalidEnvironmentError: if Horovod cannot use the GPUs, or there are fewer of them than
            workers on this host.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if not tensors.carries_gpu_tensors:
        raise InvalidEnvironmentError(
            f"this host has {gpus} GPUs, but its Horovod was built without CUDA: build it again "
            "with CUDA_HOME set (and "
            "HOROVOD_GPU_OPERATIONS=NCCL), or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    # A launcher that gives each worker a GPU of its own shows it that one alone; whether it did,
    # `check_gpus` finds out.
    if 1 < gpus < tensors.local_size and tensors.needs_own_gpus:
        raise InvalidEnvironmentError(
            f"{tensors.local_size} workers on a host with {gpus} GPUs: start at most one worker "
            "for each GPU"
        )
    device = torch.device("cuda", tensors.local_rank % gpus)
    torch.cuda.set_device(device)
    return device


def check_gpus(device: torch.device, control: ControlChannel, tensors: Collectives) -> list[str]:
    """See whether each worker has a GPU of its own; what the user may not expect. Every rank calls
    this together.

    Raises:
        InvalidEnvironmentError: on every rank, if workers share a GPU and their sums go over
            NCCL, which cannot serve that.
    """
    own = (
        str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
        if device.type == "cuda"
        else ""
    )
    places = [
        message.decode()
        for message in control.allgather(f"{socket.gethostname()} {own}".encode() if own else b"")
    ]
    shared = shared_gpu(places)
    if shared is None:
        return []
    ranks = f"ranks {shared[0]} and {shared[1]} have the same GPU ({places[shared[0]]})"
    if tensors.needs_own_gpus:
        raise InvalidEnvironmentError(
            f"{ranks}, and NCCL needs one for each worker: start at most one worker for each GPU, "
            "and let the launcher show each "
            "worker its own one, or all of them to all (CUDA_VISIBLE_DEVICES, ROCR_VISIBLE_DEVICES)"
        )
    return [f"{ranks}; they take turns on it"]


def shared_gpu(places: Sequence[str]) -> tuple[int, int] | None:
    """The first two ranks with the same GPU; None if each has its own.

    Args:
        places: host and identity of each rank's GPU; empty for a rank without one.

    >>> shared_gpu(["a GPU-1", "a GPU-2", "b GPU-1", "a GPU-2"])
    (1, 3)
    >>> shared_gpu(["", ""]) is None
    True
    """
    for rank, place in enumerate(places):
        if place and place in places[:rank]:
            return places.index(place), rank
    return None


def load_data(data: sections.Data, seed: int) -> tuple[Any, Any]:
    """The training set and the test set (or None) that a job names; what they draw at random
    depends on the seed only.

    Raises:
        JobError: for a name that is not there, or something that is no pair of map-style sets.
    """
    seed_all(seeds.key(seed, seeds.DATA))
    try:
        found = registry.instantiate("data.name", data.name, data.args, registry.DATA_SETS)
    except ModuleNotFoundError as error:
        raise JobError(f"data.name: {data.name}: {error}") from None
    if not (isinstance(found, (tuple, list)) and len(found) == 2):
        raise JobError(
            f"data.name: {data.name} must return a pair (training set, test set or None), not "
            f"{_kind(found)}"
        )
    for what, dataset in zip(("training set", "test set"), found, strict=True):
        if dataset is None and what == "test set":
            continue
        if isinstance(dataset, IterableDataset):
            raise JobError(
                f"data.name: the {what} of {data.name} is an IterableDataset "
                f"({type(dataset).__name__}), which cannot be asked for a sample by its number; "
                "the engine needs a map-style set, with __len__ and __getitem__"
            )
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise JobError(
                f"data.name: the {what} of {data.name} has no length or no items; it is "
                f"{_kind(dataset)}"
            )
        if len(dataset) == 0:
            raise JobError(f"data.name: the {what} of {data.name} is empty")
    if data.samples is not None and len(found[0]) != data.samples:
        raise JobError(
            f"data.samples is {data.samples:,}, but the training set of {data.name} has "
            f"{len(found[0]):,} samples"
        )
    return found[0], found[1]


class Built(NamedTuple):
    """What a job's model, loss and optimizer are, on one worker."""

    model: torch.nn.Module
    loss: Callable[[Any, Any], torch.Tensor]
    optimizer: torch.optim.Optimizer
    notes: list[str]  # what the user may not expect


def build_learning(
    model: sections.Model,
    loss: sections.Loss,
    optimizer: OptimizerSection,
    arithmetic: Precision,
    seed: int,
) -> Built:
    """Model, loss and optimizer as a job names them, on this worker alone; the weights depend on
    the seed only.

    Modes, types and names are settled here, before anything is derived from them.

    Raises:
        JobError: for names that are not there, arguments that do not fit, or a model that cannot be
            trained.
    """
    seed_all(seeds.key(seed, seeds.WEIGHTS))
    net = registry.instantiate("model.name", model.name, model.args, registry.MODELS)
    if not isinstance(net, torch.nn.Module):
        raise JobError(f"model.name: {model.name} must give a torch.nn.Module, not {_kind(net)}")
    measure = registry.instantiate("loss.name", loss.name, loss.arguments, registry.LOSSES)
    try:
        modules = trained_modules(net, measure)
        notes = [note for whole in modules.values() if (note := _train_mode(whole))]
        for module in modules.values():
            arithmetic.convert(module)
        _own_memory(modules)
        _check_parameters(modules)
        tracking_layers(modules)  # says whether the engine can keep these modules' statistics
        if extra := extra_states(modules):
            pack(extra)
        if model.compile:
            net.compile()
        return Built(net, measure, build_optimizer(modules, optimizer), notes)
    except ValueError as error:
        raise JobError(f"model.name: {model.name}: {error}") from None


def _train_mode(module: torch.nn.Module) -> str | None:
    """Put a module into training mode, as its own `train` does it; what the user may not expect of
    that.
    """
    were = [name for name, part in module.named_modules() if not part.training and name]
    entire = not module.training
    module.train()
    now = {name for name, part in module.named_modules() if not part.training}
    trained = [name for name in were if name not in now]
    if entire or not trained:
        return None
    return (
        f"{trained[0]!r}{f' and {len(trained) - 1} more' if len(trained) > 1 else ''} came in "
        "evaluation mode and now train, as after any call of train(); a layer stays frozen where "
        "the model's own train() keeps it in evaluation mode"
    )


def _own_memory(modules: Modules) -> None:
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
                f"the parameter {name!r} is not contiguous, which Horovod does not carry"
            )
        if parameter.requires_grad and not parameter.is_floating_point():
            raise ValueError(
                f"the parameter {name!r} is trained and "
                f"{str(parameter.dtype).removeprefix('torch.')}, which Horovod does not "
                "sum: hold it as real numbers with a last dimension of 2, and use "
                "torch.view_as_complex in the forward pass"
            )


def largest_micro_batch(
    plan: Plan,
    model: torch.nn.Module,
    loss: Callable[[Any, Any], torch.Tensor],
    arithmetic: Precision,
    training_set: Any,
    data: sections.Data,
    channels_last: bool,
    control: ControlChannel,
) -> int:
    """How many samples fit at once on every worker's GPU, tried out with the set's first one. Every
    rank calls this together.

    Raises:
        OutOfMemory: on every rank, if not even one sample fits somewhere.
    """
    share = max(-(-stage.global_batch // plan.world_size) for stage in stages_of(plan))

    def found() -> int:
        # From a loader process where there are some: a set that opens its files late must not do so
        # in this one.
        processes = 0 if reads_batches(training_set) else min(1, data.num_workers)
        fetch = MicroBatchDataset(training_set, 0, shuffled=False)
        _, *first = next(
            iter(make_dataloader(fetch, [MicroBatch(0, 0, 1)], processes, data.prefetch_factor))
        )
        first = [
            _moved(batch, arithmetic.device, arithmetic.weights, channels_last) for batch in first
        ]

        def samples(size: int) -> tuple[Any, Any]:
            return _repeated(first[0], size), _repeated(first[1], size)

        return memory.largest_micro_batch(model, loss, arithmetic, samples, share)

    mine = raise_on_all_ranks(control, found)
    least = min(int(answer) for answer in control.allgather(b"%d" % mine))
    if least == 0:
        raise OutOfMemory(
            "out of memory: not even one sample fits on every GPU; use fewer bits (precision: "
            "bf16) or a smaller model"
        )
    return least


def build_replica(
    model: torch.nn.Module,
    loss: Callable[[Any, Any], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    arithmetic: Precision,
    gradients: sections.Gradients,
    groups: int | None,
    channels_last: bool,
    control: ControlChannel,
    tensors: Collectives,
    seed: int,
    exact: bool,
) -> Replica:
    """Give every worker rank 0's weights and put the sum over workers before the update. Every rank
    calls this together.

    Args:
        model: as built on this worker.
        loss: a mean over samples.
        optimizer: plain, without state.
        arithmetic: of this worker.
        gradients: how they travel, and what is done to them.
        groups: of gradients that travel together; None: each by itself.
        channels_last: whether images are laid out so.
        control: tells the rank.
        tensors: what sums.
        seed: of the run.
        exact: the sum of exact mode; the number of workers is a power of two then.
    """
    modules = trained_modules(model, loss)
    share_state(modules, control, tensors)
    named = named_parameters(optimizer.param_groups)
    update: DistributedOptimizer
    kind: type[RunningStatistics]
    if exact:
        update, kind = (
            ExactOptimizer(optimizer, tensors.gather, control.rank, control.size),
            ExactStatistics,
        )
    else:
        update = tensors.distributed_optimizer(
            optimizer, named, gradients.compression == "fp16", groups
        )
        kind = RunningStatistics
    statistics = kind(modules, control.rank, control.size, tensors.gather)
    _go_one_way(update.optimizer, control)
    return Replica(
        model=model,
        loss=loss,
        modules=modules,
        update=update,
        statistics=statistics,
        arithmetic=arithmetic,
        scale=LossScaler(scale_for_compression(gradients.compression, control.size)),
        clip_norm=gradients.clip_norm,
        zero_if_missing=gradients.missing == "zero",
        to_device=device_mover(arithmetic, channels_last),
        names={weight: name for name, weight in named},
        seed=seed,
        rank=control.rank,
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


def _go_one_way(optimizer: torch.optim.Optimizer, control: ControlChannel) -> None:
    """Move the weights tensor by tensor on every GPU, if one of them cannot do it together.
    Every rank calls this together.
    """
    if not isinstance(optimizer, LARS):
        return
    reasons = [
        message.decode()
        for message in control.allgather((optimizer.reason_against_gpu() or "").encode())
    ]
    ranks = [rank for rank, reason in enumerate(reasons) if reason]
    if ranks:
        everywhere = len(set(reasons)) == 1
        optimizer.against_gpu = (
            reasons[ranks[0]] if everywhere else f"on rank {ranks[0]}, {reasons[ranks[0]]}"
        )


def build_loader(data: sections.Data, training_set: Any, seed: int) -> Loader:
    """The loader for a training set: direct for one that holds tensors, torch's DataLoader for
    every other.
    """
    fetch = MicroBatchDataset(training_set, seed, shuffled=True)
    if reads_batches(training_set):
        return TensorLoader(fetch)
    return WorkerLoader(fetch, data.num_workers, data.prefetch_factor)


def build_metrics(evaluate: sections.Evaluate) -> Metrics:
    """The metrics that a job names, by the names of their results.

    Raises:
        JobError: for a name that is not there, or something that is no metric.
    """
    metrics = {}
    for result, name in evaluate.names.items():
        metrics[result] = registry.instantiate("evaluate.metrics", name, {}, registry.METRICS)
        check_metric(name, metrics[result])
    return metrics


def build_evaluation(
    data: sections.Data,
    evaluate: sections.Evaluate,
    metrics: Metrics,
    test_set: Any,
    rank: int,
    world_size: int,
) -> Evaluation | None:
    """The evaluation of a test set; None without one."""
    if test_set is None:
        return None
    num_workers = 0 if reads_batches(test_set) else data.num_workers
    return Evaluation(
        test_set,
        len(test_set),
        metrics,
        evaluate.micro_batch,
        rank,
        world_size,
        num_workers,
        data.prefetch_factor,
    )


def test_samples(
    data: sections.Data, evaluate: sections.Evaluate, test_set: Any
) -> Callable[[], Iterable[LoadedMicroBatch]]:
    """What reads the first micro-batch of a test set twice; from a loader process where there are
    some.
    """
    first = MicroBatch(0, 0, min(len(test_set), evaluate.micro_batch))
    processes = 0 if reads_batches(test_set) else min(1, data.num_workers)
    loader = make_dataloader(
        MicroBatchDataset(test_set, 0, shuffled=False),
        [first, first],
        processes,
        data.prefetch_factor,
    )
    return lambda: loader


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

    def announce(decision: Decision) -> None:
        mine = plan.layout(decision).of_rank(control.rank, decision.samples_seen)
        loader.enqueue(mine, decision.is_last)

    return DecisionFeed(control, controller, ahead, announce)


def build_policy(not_finite: Any, state: TrainState, learner: Replica) -> NonFinitePolicy:
    """What becomes of steps that are not finite, by the job's section `on_nonfinite`."""
    policy: StopPolicy | SkipPolicy | RollbackPolicy
    if isinstance(not_finite, sections.SkipWhenNotFinite):
        policy = SkipPolicy(not_finite.limit, state.skipped - state.overflows)
    elif isinstance(not_finite, sections.RollbackWhenNotFinite):
        policy = RollbackPolicy(not_finite.limit, not_finite.lr_factor, state.rolled_back)
    else:
        policy = StopPolicy()
    if learner.arithmetic.scales_losses:
        return LossScalingPolicy(policy, learner.scale, state)
    if isinstance(policy, SkipPolicy) or waits_for_norms(learner.update.optimizer):
        return policy
    return DeferredCheck(policy)


def device_mover(arithmetic: Precision, channels_last: bool) -> Callable[[Any], Any]:
    """What brings inputs or targets to the device, their floats in the type of the weights."""
    return lambda batch: _moved(batch, arithmetic.device, arithmetic.weights, channels_last)


def _moved(batch: Any, device: torch.device, dtype: torch.dtype, channels_last: bool) -> Any:
    """A batch on the device, its floats of the weights' type; tensors inside lists, tuples and
    dicts too.
    """
    if isinstance(batch, torch.Tensor):
        images = channels_last and batch.is_floating_point() and batch.ndim == 4
        return batch.to(
            device=device,
            dtype=dtype if batch.is_floating_point() else batch.dtype,
            non_blocking=True,  # from pinned memory; from any other it waits
            memory_format=torch.channels_last if images else torch.preserve_format,
        )
    if isinstance(batch, dict):
        return {key: _moved(value, device, dtype, channels_last) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        moved = [_moved(value, device, dtype, channels_last) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def _repeated(batch: Any, size: int) -> Any:
    """A batch of one sample, `size` times; tensors inside lists, tuples and dicts too."""
    if isinstance(batch, torch.Tensor):
        images = batch.ndim == 4 and batch.is_contiguous(memory_format=torch.channels_last)
        whole = batch.expand(size, *batch.shape[1:])
        return whole.contiguous(
            memory_format=torch.channels_last if images else torch.contiguous_format
        )
    if isinstance(batch, dict):
        return {key: _repeated(value, size) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        repeated = [_repeated(value, size) for value in batch]
        return type(batch)(*repeated) if hasattr(batch, "_fields") else type(batch)(repeated)
    return batch


def _kind(found: Any) -> str:
    return f"a {type(found).__name__}"
