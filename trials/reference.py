"""A plain training loop on one worker, as the reference for the engine.

It uses only the engine's definitions of a job: the sections of the job file, the controller's
decisions, the order of the data and the random seeds. Loading, the step and the optimizers are
implemented again, in the simplest way, with updates in float64.
"""

from __future__ import annotations

import importlib
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset, default_collate

from hvdlarge.config.job import Job
from hvdlarge.controller import Controller
from hvdlarge.data import seeds
from hvdlarge.data.in_memory import InMemory
from hvdlarge.data.order import permute
from hvdlarge.schedule.decision import Decision

BUILT_IN = {"cross_entropy": "torch.nn:CrossEntropyLoss", "mse": "torch.nn:MSELoss"}


@dataclass
class Trained:
    """The result of a run.

    Attributes:
        model: state_dict of the model.
        loss: state_dict of the loss; empty for a function.
        results: loss of the last step; test_loss and accuracy if there is a test set.
        steps: number of steps.
    """

    model: dict[str, Any]
    loss: dict[str, Any]
    results: dict[str, float]
    steps: int


def train(job: Job) -> Trained:
    """Train a job to its end.

    Raises:
        FloatingPointError: if a gradient is not finite, unless on_nonfinite is skip.
    """
    seed_all(seeds.key(job.seed, seeds.DATA))
    training, test = load_object(job.data.name)(**job.data.args)
    seed_all(seeds.key(job.seed, seeds.WEIGHTS))
    model = load_object(job.model.name)(**job.model.args)
    loss = load_object(job.loss.name)(**job.loss.arguments)
    modules = [module for module in (model, loss) if isinstance(module, nn.Module)]
    for module in modules:
        module._apply(lambda tensor: tensor.to(type_of(tensor.dtype, job.precision)))
    weights = dict(model.named_parameters())
    if isinstance(loss, nn.Module):
        weights |= {f"loss.{name}": weight for name, weight in loss.named_parameters()}
    weights = {name: weight for name, weight in weights.items() if weight.requires_grad}
    optimizer = TEXTBOOK[job.optimizer.name](
        job, weights, excluded(job, {"": model, "loss": loss}, weights)
    )
    controller, results, steps = Controller(job.plan(len(training), 1)), {}, 0
    while (decision := controller.decide()) is not None:
        before = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
        mean = step(job, decision, training, model, loss, weights)
        grads = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        if all(grad.isfinite().all() for grad in grads.values()):
            optimizer(clipped(grads, job.gradients.clip_norm), decision.lr)
        elif job.on_nonfinite.policy == "skip":
            for buffer, value in before:
                buffer.data.copy_(value)
        else:
            raise FloatingPointError(f"step {decision.step}")
        steps, results["loss"] = decision.step + 1, mean
    if test is not None:
        results |= evaluate(job, test, model, loss)
    return Trained(
        model.state_dict(), loss.state_dict() if isinstance(loss, nn.Module) else {}, results, steps
    )


def step(
    job: Job,
    decision: Decision,
    training: Any,
    model: nn.Module,
    loss: Any,
    weights: Mapping[str, nn.Parameter],
) -> float:
    """Accumulate the gradients of a step over its micro-batches; returns the mean loss."""
    _set_mode(model, loss, training=True)
    for weight in weights.values():
        weight.grad = None
    total, total_weight = 0.0, 0.0  # the weight of losses that return (sum, weight)
    end = decision.samples_seen + decision.global_batch
    for start in range(decision.samples_seen, end, decision.micro_batch):
        samples = np.arange(start, min(start + decision.micro_batch, end))
        indices = permute(
            job.seed, samples // len(training), samples % len(training), len(training)
        ).tolist()
        inputs, targets = fetch(
            training,
            indices,
            [seeds.key(job.seed, seeds.SAMPLE, sample) for sample in samples.tolist()],
        )
        seed_all(seeds.key(job.seed, seeds.MICRO_BATCH, start))
        inputs, targets = typed(job, inputs), typed(job, targets)
        value = loss(called(model, inputs), targets)
        if isinstance(value, tuple):
            value, weight = value
            total_weight += float(weight)
            scaled_loss = value / decision.global_batch
        else:
            scaled_loss = value * (len(samples) / decision.global_batch)
        scaled_loss.backward()
        total += scaled_loss.item()
    if total_weight:
        factor = decision.global_batch / total_weight
        for weight in weights.values():
            if weight.grad is not None:
                weight.grad.mul_(factor)
        total *= factor
    return total


def called(model: nn.Module, inputs: Any) -> Any:
    """The model's outputs: a dict of inputs by keywords, a tuple by position."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _set_mode(model: nn.Module, loss: Any, training: bool) -> None:
    for module in (model, loss):
        if isinstance(module, nn.Module):
            module.train(training)


def evaluate(job: Job, test: Any, model: nn.Module, loss: Any) -> dict[str, float]:
    """Mean loss over the test set, and the accuracy if the targets are classes."""
    _set_mode(model, loss, training=False)
    total = total_weight = correct = 0.0
    micro_batch, size = job.evaluate.micro_batch, len(test)
    classes = False
    with torch.no_grad():
        for start in range(0, size, micro_batch):
            samples = range(start, min(start + micro_batch, size))
            inputs, targets = fetch(
                test, list(samples), [seeds.key(0, seeds.SAMPLE, sample) for sample in samples]
            )
            seed_all(seeds.key(job.seed, seeds.EVALUATION, start))
            outputs, targets = called(model, typed(job, inputs)), typed(job, targets)
            value = loss(outputs, targets)
            if isinstance(value, tuple):
                total, total_weight = total + float(value[0]), total_weight + float(value[1])
            else:
                total += float(value) * len(samples)
                total_weight += len(samples)
            classes = (
                isinstance(outputs, torch.Tensor)
                and not targets.is_floating_point()
                and outputs.ndim == targets.ndim + 1
            )
            correct += float((outputs.argmax(1) == targets).sum()) if classes else 0.0
    return {"test_loss": total / total_weight} | ({"accuracy": correct / size} if classes else {})


def fetch(dataset: Any, indices: list[int], keys: list[int]) -> Any:
    """The collated samples of a micro-batch, each read after seeding with its key.

    If the class of the data set defines a batched method, and no subclass of it overrides
    `__getitem__`, all samples are read at once after seeding with the first key. torch's Subset is
    unwrapped; its subclasses are not.
    """
    while type(dataset) is Subset:
        dataset, indices = dataset.dataset, [dataset.indices[index] for index in indices]
    for cls in type(dataset).__mro__:
        if "__getitems__" in vars(cls) or ("batch" in vars(cls) and isinstance(dataset, InMemory)):
            seed_all(keys[0])
            if "batch" in vars(cls):
                return dataset.batch(torch.tensor(indices))
            return default_collate(dataset.__getitems__(indices))
        if "__getitem__" in vars(cls):
            break
    pairs = []
    for index, key in zip(indices, keys, strict=True):
        seed_all(key)
        pairs.append(dataset[index])
    return default_collate(pairs)


def seed_all(key: int) -> None:
    """Seed the global generators of torch, numpy and Python."""
    torch.manual_seed(key)
    np.random.seed(key % 2**32)
    random.seed(key)


def load_object(name: str) -> Callable[..., Any]:
    """The callable that a job names."""
    module, _, attribute = BUILT_IN.get(name, name).partition(":")
    return getattr(importlib.import_module(module), attribute)


def type_of(dtype: torch.dtype, precision: str) -> torch.dtype:
    """The dtype in a run of a tensor built with `dtype`: 16-bit types become float32, and with fp64
    all floating-point and complex types double precision.
    """
    if precision == "fp64":
        wide = torch.float64 if dtype.is_floating_point else torch.complex128
        return wide if dtype.is_floating_point or dtype.is_complex else dtype
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def typed(job: Job, batch: Any) -> Any:
    """A batch with its floating-point tensors cast to the dtype of the weights."""
    if isinstance(batch, dict):
        return {name: typed(job, value) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [typed(job, value) for value in batch]
    return (
        batch.to(torch.float64 if job.precision == "fp64" else torch.float32)
        if batch.is_floating_point()
        else batch
    )


# --- the update, in float64


NORMALISATION = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def excluded(job: Job, modules: Mapping[str, Any], weights: Mapping[str, nn.Parameter]) -> set[str]:
    """Names of the weights without trust ratio and decay: matches of `exclude`, biases and weights
    of normalisation layers.
    """
    names = {
        name
        for name in weights
        if any(fnmatchcase(name, pattern) for pattern in job.optimizer.exclude)
    }
    for prefix, root in modules.items() if job.optimizer.exclude_bias_and_norm else ():
        for module_name, module in root.named_modules() if isinstance(root, nn.Module) else ():
            for own, _ in module.named_parameters(recurse=False):
                if (
                    isinstance(module, NORMALISATION)
                    or own.startswith("bias")
                    or own.endswith("_bias")
                ):
                    names.add(".".join(filter(None, [prefix, module_name, own])))
    return names & weights.keys()


def clipped(grads: Mapping[str, torch.Tensor], limit: float | None) -> dict[str, torch.Tensor]:
    """The gradients in float64, clipped to a total norm of `limit`; without those that are zero."""
    wide = {name: grad.double() for name, grad in grads.items() if grad.count_nonzero()}
    total = math.sqrt(sum(float(grad.square().sum()) for grad in wide.values()))
    if limit is None or total <= limit:
        return wide
    return {name: grad * (limit / total) for name, grad in wide.items()}


class _Textbook:
    def __init__(self, job: Job, weights: Mapping[str, nn.Parameter], excluded: set[str]) -> None:
        self.options = job.optimizer
        self.weights, self.excluded = weights, excluded
        self.wide = {name: weight.detach().double().clone() for name, weight in weights.items()}
        self.state: dict[str, Any] = {}

    def __call__(self, grads: Mapping[str, torch.Tensor], lr: float) -> None:
        for name, grad in grads.items():
            adapted = name not in self.excluded
            factor = 1.0 if adapted else self.options.excluded_lr_factor
            self.update(
                name,
                self.wide[name],
                grad,
                lr * factor,
                self.options.weight_decay if adapted else 0.0,
                adapted,
            )
            self.weights[name].data.copy_(self.wide[name])
            # float32 weights are rounded after each step
            self.wide[name].copy_(self.weights[name].detach())

    def update(
        self, name: str, w: torch.Tensor, g: torch.Tensor, lr: float, decay: float, adapted: bool
    ) -> None:
        raise NotImplementedError


class Lars(_Textbook):
    """You, Gitman, Ginsburg (2017), Algorithm 1, with the options of the job."""

    def update(
        self, name: str, w: torch.Tensor, g: torch.Tensor, lr: float, decay: float, adapted: bool
    ) -> None:
        """Update one tensor in place."""
        options: Any = self.options
        direction = g + decay * w
        ratio = 1.0
        if adapted and w.norm() > 0:
            norm = direction.norm() if options.joint_norm else g.norm() + decay * w.norm()
            ratio = (
                float(options.trust_coefficient * w.norm() / (norm + options.eps))
                if norm + options.eps > 0
                else 1.0
            )
            if options.clip:
                ratio = min(ratio / lr, 1.0) if lr > 0 else 1.0
        inside, outside = (lr, 1.0) if options.lr_in_momentum else (1.0, lr)
        v = self.state.get(name, torch.zeros_like(w))
        v = self.state[name] = options.momentum * v + inside * ratio * direction
        w -= outside * (
            options.momentum * v + inside * ratio * direction if options.nesterov else v
        )


class Lamb(_Textbook):
    """You et al. (2020), Algorithm 2, with bias correction."""

    def update(
        self, name: str, w: torch.Tensor, g: torch.Tensor, lr: float, decay: float, adapted: bool
    ) -> None:
        """Update one tensor in place."""
        options: Any = self.options
        first, second = options.betas
        t, m, v = self.state.get(name, (0, torch.zeros_like(w), torch.zeros_like(w)))
        t, m, v = t + 1, first * m + (1 - first) * g, second * v + (1 - second) * g * g
        self.state[name] = (t, m, v)
        r = (m / (1 - first**t)) / ((v / (1 - second**t)).sqrt() + options.eps) + decay * w
        ratio = w.norm() / r.norm() if adapted and w.norm() > 0 and r.norm() > 0 else 1.0
        w -= lr * ratio * r


class Torchs(_Textbook):
    """torch's own optimizers, one per tensor, so that tensors without a gradient are skipped."""

    KINDS = {
        "sgd": (torch.optim.SGD, ("momentum", "nesterov")),
        "adam": (torch.optim.Adam, ("betas", "eps")),
        "adamw": (torch.optim.AdamW, ("betas", "eps")),
        "adagrad": (torch.optim.Adagrad, ("eps",)),
        "rmsprop": (torch.optim.RMSprop, ("alpha", "momentum", "eps")),
    }

    def update(
        self, name: str, w: torch.Tensor, g: torch.Tensor, lr: float, decay: float, adapted: bool
    ) -> None:
        """Update one tensor in place."""
        if name not in self.state:
            kind, keys = self.KINDS[self.options.name]
            options = {key: getattr(self.options, key) for key in keys}
            self.state[name] = kind([w], lr=1.0, weight_decay=decay, **options)
        w.grad = g
        self.state[name].param_groups[0]["lr"] = lr
        self.state[name].step()


TEXTBOOK: dict[str, Any] = {"lars": Lars, "lamb": Lamb} | dict.fromkeys(Torchs.KINDS, Torchs)
