"""The same run by a plain loop on one worker: slow, short, and without the engine's loader, step,
sums and optimizers.

What it takes from the engine is what a job means: the sections of the job, the controller's
decisions, the order of the data and the keys of the random draws. All else is written down anew:
the user's own objects are called as torch's documentation has it, and the update is the textbook's,
in float64.
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
class Learnt:
    """What a run came to.

    Attributes:
        model: the model's state_dict.
        loss: the loss's; empty for a function.
        results: loss of the last step; test_loss and accuracy where there is a test set.
        steps: taken.
    """

    model: dict[str, Any]
    loss: dict[str, Any]
    results: dict[str, float]
    steps: int


def train(job: Job) -> Learnt:
    """Train a job to its end.

    Raises:
        FloatingPointError: where a gradient is not finite, unless the job says that such steps are
            skipped.
    """
    seed_all(seeds.key(job.seed, seeds.DATA))
    training, test = named(job.data.name)(**job.data.args)
    seed_all(seeds.key(job.seed, seeds.WEIGHTS))
    model, loss = (
        named(job.model.name)(**job.model.args),
        named(job.loss.name)(**job.loss.arguments),
    )
    parts = [part for part in (model, loss) if isinstance(part, nn.Module)]
    for part in parts:
        part._apply(lambda tensor: tensor.to(type_of(tensor.dtype, job.precision)))
    weights = dict(model.named_parameters())
    if isinstance(loss, nn.Module):
        weights |= {f"loss.{name}": weight for name, weight in loss.named_parameters()}
    weights = {name: weight for name, weight in weights.items() if weight.requires_grad}
    optimizer = TEXTBOOK[job.optimizer.name](
        job, weights, excluded(job, {"": model, "loss": loss}, weights)
    )
    controller, results, steps = Controller(job.plan(len(training), 1)), {}, 0
    while (decision := controller.decide()) is not None:
        before = [(buffer, buffer.clone()) for part in parts for buffer in part.buffers()]
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
    return Learnt(
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
    """Add up the gradients of a step, one micro-batch after the other; returns the mean loss."""
    _set_mode(model, loss, training=True)
    for weight in weights.values():
        weight.grad = None
    total, end = 0.0, decision.samples_seen + decision.global_batch
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
        share = loss(model(inputs), targets) * (len(samples) / decision.global_batch)
        share.backward()
        total += share.item()
    return total


def _set_mode(model: nn.Module, loss: Any, training: bool) -> None:
    for part in (model, loss):
        if isinstance(part, nn.Module):
            part.train(training)


def evaluate(job: Job, test: Any, model: nn.Module, loss: Any) -> dict[str, float]:
    """Mean loss over the test set, and the share of right answers where the targets are classes."""
    _set_mode(model, loss, training=False)
    total = right = 0.0
    each, size = job.evaluate.micro_batch, len(test)
    classes = False
    with torch.no_grad():
        for start in range(0, size, each):
            samples = range(start, min(start + each, size))
            inputs, targets = fetch(
                test, list(samples), [seeds.key(0, seeds.SAMPLE, sample) for sample in samples]
            )
            seed_all(seeds.key(job.seed, getattr(seeds, "EVALUATION", 6), start))
            outputs, targets = model(typed(job, inputs)), typed(job, targets)
            total += float(loss(outputs, targets)) * len(samples)
            classes = (
                isinstance(outputs, torch.Tensor)
                and not targets.is_floating_point()
                and outputs.ndim == targets.ndim + 1
            )
            right += float((outputs.argmax(1) == targets).sum()) if classes else 0.0
    return {"test_loss": total / size} | ({"accuracy": right / size} if classes else {})


def fetch(dataset: Any, indices: list[int], keys: list[int]) -> Any:
    """The samples of a micro-batch as the set's own class gives them, together: each drawn under
    its key.

    A set whose class defines a way to many samples (and no class below that one defines another way
    to one) draws for all of them under the first key. torch's own Subset is looked through.
    """
    while type(dataset) is Subset:
        dataset, indices = dataset.dataset, [dataset.indices[index] for index in indices]
    for kind in type(dataset).__mro__:
        if "__getitems__" in vars(kind) or (
            "batch" in vars(kind) and isinstance(dataset, InMemory)
        ):
            seed_all(keys[0])
            if "batch" in vars(kind):
                return dataset.batch(torch.tensor(indices))
            return default_collate(dataset.__getitems__(indices))
        if "__getitem__" in vars(kind):
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


def named(name: str) -> Callable[..., Any]:
    """The object that a job names."""
    module, _, attribute = BUILT_IN.get(name, name).partition(":")
    return getattr(importlib.import_module(module), attribute)


def type_of(dtype: torch.dtype, precision: str) -> torch.dtype:
    """The type in which a job keeps a tensor that was built with `dtype`: half types are widened;
    fp64 widens all floats.
    """
    if precision == "fp64":
        wide = torch.float64 if dtype.is_floating_point else torch.complex128
        return wide if dtype.is_floating_point or dtype.is_complex else dtype
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def typed(job: Job, batch: Any) -> Any:
    """A batch in the type of the weights."""
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


def excluded(job: Job, parts: Mapping[str, Any], weights: Mapping[str, nn.Parameter]) -> set[str]:
    """Names of the weights that are neither adapted nor decayed: biases and those of normalisation
    layers.
    """
    apart = {
        name
        for name in weights
        if any(fnmatchcase(name, pattern) for pattern in job.optimizer.exclude)
    }
    for prefix, part in parts.items() if job.optimizer.exclude_bias_and_norm else ():
        for module_name, module in part.named_modules() if isinstance(part, nn.Module) else ():
            for own, _ in module.named_parameters(recurse=False):
                if (
                    isinstance(module, NORMALISATION)
                    or own.startswith("bias")
                    or own.endswith("_bias")
                ):
                    apart.add(".".join(filter(None, [prefix, module_name, own])))
    return apart & weights.keys()


def clipped(grads: Mapping[str, torch.Tensor], limit: float | None) -> dict[str, torch.Tensor]:
    """The gradients in float64, without those that are zero throughout, no longer together than
    `limit`.
    """
    wide = {name: grad.double() for name, grad in grads.items() if grad.count_nonzero()}
    total = math.sqrt(sum(float(grad.square().sum()) for grad in wide.values()))
    if limit is None or total <= limit:
        return wide
    return {name: grad * (limit / total) for name, grad in wide.items()}


class _Textbook:
    def __init__(self, job: Job, weights: Mapping[str, nn.Parameter], apart: set[str]) -> None:
        self.options = job.optimizer
        self.weights, self.apart = weights, apart
        self.wide = {name: weight.detach().double().clone() for name, weight in weights.items()}
        self.state: dict[str, Any] = {}

    def __call__(self, grads: Mapping[str, torch.Tensor], lr: float) -> None:
        for name, grad in grads.items():
            adapted = name not in self.apart
            factor = 1.0 if adapted else self.options.excluded_lr_factor
            self.move(
                name,
                self.wide[name],
                grad,
                lr * factor,
                self.options.weight_decay if adapted else 0.0,
                adapted,
            )
            self.weights[name].data.copy_(self.wide[name])
            # A weight of 32 bits is rounded in each step
            self.wide[name].copy_(self.weights[name].detach())

    def move(
        self, name: str, w: torch.Tensor, g: torch.Tensor, lr: float, decay: float, adapted: bool
    ) -> None:
        raise NotImplementedError


class Lars(_Textbook):
    """You, Gitman, Ginsburg (2017), Algorithm 1, and the forms of it that the job's options
    name.
    """

    def move(
        self, name: str, w: torch.Tensor, g: torch.Tensor, lr: float, decay: float, adapted: bool
    ) -> None:
        """Move one tensor in place."""
        options: Any = self.options
        direction = g + decay * w
        ratio = 1.0
        if adapted and w.norm() > 0:
            size = direction.norm() if options.joint_norm else g.norm() + decay * w.norm()
            ratio = (
                float(options.trust_coefficient * w.norm() / (size + options.eps))
                if size + options.eps > 0
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

    def move(
        self, name: str, w: torch.Tensor, g: torch.Tensor, lr: float, decay: float, adapted: bool
    ) -> None:
        """Move one tensor in place."""
        options: Any = self.options
        first, second = options.betas
        t, m, v = self.state.get(name, (0, torch.zeros_like(w), torch.zeros_like(w)))
        t, m, v = t + 1, first * m + (1 - first) * g, second * v + (1 - second) * g * g
        self.state[name] = (t, m, v)
        r = (m / (1 - first**t)) / ((v / (1 - second**t)).sqrt() + options.eps) + decay * w
        ratio = w.norm() / r.norm() if adapted and w.norm() > 0 and r.norm() > 0 else 1.0
        w -= lr * ratio * r


class Torchs(_Textbook):
    """torch's own class, one for each tensor, so that a tensor without a gradient is left out of a
    step.
    """

    KINDS = {
        "sgd": (torch.optim.SGD, ("momentum", "nesterov")),
        "adam": (torch.optim.Adam, ("betas", "eps")),
        "adamw": (torch.optim.AdamW, ("betas", "eps")),
        "adagrad": (torch.optim.Adagrad, ("eps",)),
        "rmsprop": (torch.optim.RMSprop, ("alpha", "momentum", "eps")),
    }

    def move(
        self, name: str, w: torch.Tensor, g: torch.Tensor, lr: float, decay: float, adapted: bool
    ) -> None:
        """Move one tensor in place."""
        if name not in self.state:
            kind, keys = self.KINDS[self.options.name]
            options = {key: getattr(self.options, key) for key in keys}
            self.state[name] = kind([w], lr=1.0, weight_decay=decay, **options)
        w.grad = g
        self.state[name].param_groups[0]["lr"] = lr
        self.state[name].step()


TEXTBOOK: dict[str, Any] = {"lars": Lars, "lamb": Lamb} | dict.fromkeys(Torchs.KINDS, Torchs)
