"""Models, losses and data sets as users write them, composed of small blocks named in a job's
arguments.

A job names `trials.blocks:model`, with arguments that describe each block. All blocks are small and
smooth, so that rounding errors stay small. `REFUSED` lists the blocks that the engine may reject,
and what its message must then mention.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import ConcatDataset, Dataset, StackDataset, Subset, TensorDataset

from hvdlarge.data.in_memory import InMemory

Description = dict[str, Any]

# If set, the precision of a job whose initial weights `model` perturbs by one bit: a trial measures
# this way how far rounding errors alone grow.
nudged: str | None = None


def model(
    blocks: list[Description],
    features: int = 4,
    outputs: int = 3,
    returned: str = "train",
    gives: str = "tensor",
) -> nn.Module:
    """A chain of blocks on inputs of shape (n, features), followed by a linear layer.

    Args:
        blocks: each with its `kind`, a key of BLOCKS, and its arguments.
        features: of an input, even.
        outputs: of the linear layer.
        returned: mode of the returned model, train or eval (as models loaded from a file).
        gives: tensor, or dict for a dict of outputs (which the loss `named` expects).
    """
    chain = [
        BLOCKS[block["kind"]](
            features, **{key: value for key, value in block.items() if key != "kind"}
        )
        for block in blocks
    ]
    net = Chain(chain, nn.Linear(features, outputs), gives)
    if nudged is not None:
        for weight in net.parameters():
            nudge(weight, nudged)
    return net.eval() if returned == "eval" else net


def nudge(weight: torch.Tensor, precision: str) -> None:
    """Perturb the first element of a tensor by one unit in the last place of the precision."""
    if (
        weight.is_floating_point()
        and weight.is_contiguous()
        and not isinstance(weight, nn.UninitializedParameter)
    ):
        if precision == "fp64":
            weight.data = weight.data.double()
        first = weight.data.view(-1)[:1]
        first.copy_(torch.nextafter(first, first + 9))  # no effect on an empty tensor


class Chain(nn.Module):
    """A sequence of blocks and a linear layer."""

    def __init__(self, blocks: list[nn.Module], head: nn.Module, gives: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self.gives = gives

    def forward(self, *given: Any, **named: Any) -> Any:
        """Shape (n, features) to (n, outputs); the inputs may be images. A dict of inputs comes by
        keywords, a tuple by position, a list as one argument.
        """
        first = named["x"] if named else given[0]
        inputs = first[0] if isinstance(first, list) else first
        inputs = inputs.flatten(1)
        for block in self.blocks:
            inputs = block(inputs)
        logits = self.head(inputs)
        return {"logits": logits} if self.gives == "dict" else logits


# --- layers with weights


class Linear(nn.Module):
    """A linear layer and tanh."""

    def __init__(self, features: int, bias: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(features, features, bias=bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (…, features)."""
        return torch.tanh(self.layer(inputs))


class Conv(nn.Module):
    """A convolution over the features and tanh."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        return torch.tanh(self.layer(inputs[:, None]))[:, 0]


class Embedded(nn.Module):
    """An embedding row, chosen by the first feature, added to the inputs."""

    def __init__(self, features: int, sparse: bool = False) -> None:
        super().__init__()
        self.layer = nn.Embedding(5, features, sparse=sparse)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        rows = (2.5 + 2 * torch.tanh(inputs[:, 0].detach())).long().clamp(0, 4)
        return torch.tanh(inputs + self.layer(rows))


class Tied(nn.Module):
    """Two layers with tied weights."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(features, features), nn.Linear(features, features)
        self.other.weight = self.one.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        return torch.tanh(self.other(torch.tanh(self.one(inputs))))


class Frozen(nn.Module):
    """A layer whose weight is not trained; its bias is."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = nn.Linear(features, features)
        self.layer.weight.requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        return torch.tanh(self.layer(inputs))


class Unused(nn.Module):
    """A layer that is never used."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = nn.Linear(features, features)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The inputs."""
        return inputs


class Scale(nn.Module):
    """A zero-dimensional parameter, such as a logit scale."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        return torch.tanh(inputs * self.logit_scale.exp())


class Brittle(nn.Module):
    """A square root inside `where`, whose gradient is NaN if a value is below zero.

    Args:
        features: any.
        shift: added to the values, which keeps most of them above zero.
    """

    def __init__(self, features: int, shift: float = 2.0) -> None:
        super().__init__()
        self.layer = nn.Linear(features, features)
        self.shift = shift

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (…, features)."""
        return _root(self.layer(inputs) + self.shift) - math.sqrt(self.shift)


class Leashed(nn.Module):
    """A layer whose gradient is NaN once its weight is too far from its initial value.

    Args:
        features: any.
        limit: distance, relative to the norm of the initial weight.
    """

    start: torch.Tensor

    def __init__(self, features: int, limit: float = 0.01) -> None:
        super().__init__()
        self.layer = nn.Linear(features, features)
        self.register_buffer("start", self.layer.weight.detach().clone())
        self.limit = limit

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (…, features)."""
        moved = (self.layer.weight - self.start).square().sum() / self.start.square().sum()
        return torch.tanh(self.layer(inputs)) + 0.0 * _root(self.limit**2 - moved)


def _root(values: torch.Tensor) -> torch.Tensor:
    """The square root, or 0 for negative values, whose gradient is 0 · NaN."""
    return torch.where(values > 0, torch.sqrt(values), 0.0)


class Spectral(nn.Module):
    """Complex numbers: a parameter, trained or frozen, or a buffer (as in rotary embeddings)."""

    def __init__(self, features: int, form: str = "frozen") -> None:
        super().__init__()
        angles = torch.linspace(0.2, 1.4, features // 2)
        values = torch.polar(torch.ones_like(angles), angles)
        if form == "buffer":
            self.register_buffer("phases", values)
        else:
            self.phases = nn.Parameter(values, requires_grad=form == "trained")

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features); rotates pairs of features."""
        pairs = torch.view_as_complex(inputs.reshape(len(inputs), -1, 2).contiguous())
        return torch.view_as_real(pairs * self.phases).flatten(1)


class Widened(nn.Module):
    """A float64 buffer in a float32 model."""

    frequencies: torch.Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.arange(1, features + 1, dtype=torch.float64) / 7)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        return torch.tanh(inputs + torch.sin(self.frequencies).to(inputs.dtype))


class Halved(nn.Module):
    """A layer with bfloat16 weights, as loaded from a file."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = nn.Linear(features, features).to(torch.bfloat16)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        return torch.tanh(self.layer(inputs.to(self.layer.weight.dtype))).to(inputs.dtype)


class Normed(nn.Module):
    """Layer or group normalisation."""

    def __init__(self, features: int, form: str = "layer") -> None:
        super().__init__()
        self.norm = (
            nn.LayerNorm(features, eps=0.1)
            if form == "layer"
            else nn.GroupNorm(1, features, eps=0.1)
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        return self.norm(inputs)


class Conv2d(nn.Module):
    """A convolution over the features as an image."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 2, (2, 1), padding=(1, 0))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        images = inputs.reshape(len(inputs), 2, -1, 1)
        return torch.tanh(self.layer(images)[:, :, :-1]).flatten(1)


class Lstm(nn.Module):
    """A two-layer LSTM over pairs of features, with dropout between its layers."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = nn.LSTM(2, 2, num_layers=2, dropout=0.2, batch_first=True)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        return self.layer(inputs.reshape(len(inputs), -1, 2))[0].flatten(1)


class Attended(nn.Module):
    """Attention between pairs of features."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(2, 1, dropout=0.1, batch_first=True)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        pairs = inputs.reshape(len(inputs), -1, 2)
        return torch.tanh(
            inputs + self.layer(pairs, pairs, pairs, need_weights=False)[0].flatten(1)
        )


class Parametrized(nn.Module):
    """Weight or spectral normalisation by torch's parametrizations (settled: spectral,
    converged).
    """

    def __init__(self, features: int, form: str = "weight") -> None:
        super().__init__()
        kind = torch.nn.utils.parametrizations
        self.layer = (kind.weight_norm if form == "weight" else kind.spectral_norm)(
            nn.Linear(features, features)
        )
        if form == "settled":
            weight: Any = self.layer.parametrizations["weight"]  # type: ignore[index]
            with torch.no_grad():
                weight.original.copy_(torch.diag(torch.arange(float(features), 0.0, -1.0)))
            for vector in (weight[0]._u, weight[0]._v):
                vector.copy_(torch.eye(1, features)[0])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        return torch.tanh(self.layer(inputs))


class Empty(nn.Module):
    """A parameter without elements."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.empty(0, features))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        return inputs + self.nothing.sum()


class Buffered(nn.Module):
    """A constant buffer of any dtype, persistent or not, with random values."""

    flags: torch.Tensor

    def __init__(
        self, features: int, dtype: str = "bool", persistent: bool = True, scalar: bool = False
    ) -> None:
        super().__init__()
        flags = torch.randint(0, 2, () if scalar else (features,)).to(getattr(torch, dtype))
        self.register_buffer("flags", flags, persistent=persistent)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        flags = self.flags.real if self.flags.is_complex() else self.flags
        return inputs * (1 + 0.5 * flags.to(inputs.dtype))


class Integers(nn.Module):
    """A frozen integer parameter, and a buffer that is None."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.arange(features).flip(0), requires_grad=False)
        self.register_buffer("absent", None)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        return inputs[:, self.places]


class Expanded(nn.Module):
    """An expanded buffer, whose rows share memory."""

    offsets: torch.Tensor

    def __init__(self, features: int, rows: int = 1) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.linspace(-1, 1, features).expand(rows, -1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        return torch.tanh(inputs + self.offsets[0])


class Transposed(nn.Module):
    """A weight that is not contiguous."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, features).t() / 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        return torch.tanh(inputs @ self.weight)


class Lazy(nn.Module):
    """A lazy layer, without a shape before the first forward pass."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(features)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        return torch.tanh(self.layer(inputs))


class InstanceNormed(nn.Module):
    """Instance normalisation over pairs of features, with or without running statistics."""

    def __init__(self, features: int, tracks: bool = False) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(
            features // 2, eps=0.1, affine=True, track_running_stats=tracks
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        return self.norm(inputs.reshape(len(inputs), -1, 2)).flatten(1)


# --- batch normalisation


class _Tracking(nn.BatchNorm1d):
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    momentum: float


class SameBatchNorm(_Tracking):
    """A subclass whose own forward computes batch normalisation and an activation (as in timm)."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, channels, length)."""
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        training = self.training or self.running_mean is None
        normalised = nn.functional.batch_norm(
            inputs,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training,
            self.momentum,
            self.eps,
        )
        return torch.tanh(normalised)


class RenormalisingBatchNorm(_Tracking):
    """Reads its running statistics in training (batch renormalisation)."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, channels, length)."""
        if not self.training:
            return super().forward(inputs)
        before = self.running_mean.clone()
        return super().forward(inputs) + 0.1 * before[:, None]


class BatchNormed(nn.Module):
    """Batch normalisation over pairs of features, in many forms.

    Args:
        features: even.
        form: plain; no_affine; frozen (train() keeps it in evaluation mode); evaluated (put into
            evaluation mode once); subclass (see SameBatchNorm); renorm (see
            RenormalisingBatchNorm); untracked; cumulative (momentum=None); never (unused); twice
            (used twice); twice_apart (used before and after a layer); named_twice; checkpointed
            (recomputed in the backward pass); reentrant (likewise, by torch's reentrant variant);
            skipped_by_data; skipped_by_chance; flat (over single features, which needs more than
            one sample); shared (a second layer with the same running statistics).
        momentum: of the running statistics.
    """

    def __init__(self, features: int, form: str = "plain", momentum: float = 0.1) -> None:
        super().__init__()
        kind = {"renorm": RenormalisingBatchNorm, "subclass": SameBatchNorm}.get(
            form, nn.BatchNorm1d
        )
        self.form = form
        self.bn = kind(
            features if form == "flat" else features // 2,
            eps=0.1,
            momentum=None if form == "cumulative" else momentum,
            affine=form != "no_affine",
            track_running_stats=form != "untracked",
        )
        self.layer = nn.Linear(features, features)
        if form == "shared":
            self.other = nn.BatchNorm1d(features // 2, eps=0.1, momentum=momentum)
            for name, buffer in self.bn.named_buffers():
                setattr(self.other, name, buffer)
        if form == "evaluated":
            self.bn.eval()
        if form == "named_twice":
            self.body = nn.Sequential(nn.Identity(), self.bn)

    def train(self, mode: bool = True) -> BatchNormed:
        """Keep a frozen layer in evaluation mode."""
        super().train(mode)
        if self.form == "frozen":
            self.bn.eval()
        return self

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        if self.form == "never":
            return torch.tanh(self.layer(inputs))
        if self.form == "skipped_by_data" and inputs.detach().mean() > 0:
            return torch.tanh(self.layer(inputs))
        if self.form == "skipped_by_chance" and self.training and torch.rand(()) < 0.5:
            return torch.tanh(self.layer(inputs))
        if self.form in ("checkpointed", "reentrant") and self.training:
            if self.form == "reentrant" and not inputs.requires_grad:
                inputs = inputs.detach().requires_grad_()
            return checkpoint(
                self._inner, inputs, use_reentrant=self.form == "reentrant", preserve_rng_state=True
            )
        return self._inner(inputs)

    def _inner(self, inputs: torch.Tensor) -> torch.Tensor:
        bn = self.body if self.form == "named_twice" else self.bn
        outputs = self._normalised(bn, inputs)
        if self.form == "twice":
            outputs = self._normalised(bn, outputs * 0.5 + 0.1)
        outputs = torch.tanh(self.layer(outputs))
        if self.form == "shared":
            return self._normalised(self.other, outputs)
        return self._normalised(bn, outputs) if self.form == "twice_apart" else outputs

    def _normalised(self, bn: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        return (
            bn(inputs) if self.form == "flat" else bn(inputs.reshape(len(inputs), -1, 2)).flatten(1)
        )


# --- random draws


class Noise(nn.Module):
    """Adds noise to its inputs.

    Args:
        features: any.
        source: the generator: torch, numpy, random or all.
        always: also in evaluation mode.
        checkpointed: recomputed in the backward pass, which draws again (except from torch).
    """

    def __init__(
        self, features: int, source: str = "torch", always: bool = False, checkpointed: bool = False
    ) -> None:
        super().__init__()
        self.source, self.always, self.checkpointed = source, always, checkpointed
        self.layer = nn.Linear(features, features)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        if not (self.training or self.always):
            return torch.tanh(self.layer(inputs))
        return (
            checkpoint(self._noisy, inputs, use_reentrant=False)
            if self.checkpointed
            else self._noisy(inputs)
        )

    def _noisy(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(inputs + 0.3 * drawn(self.source, inputs)))


class Dropped(nn.Module):
    """Dropout."""

    def __init__(self, features: int, p: float = 0.3) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        return self.dropout(inputs)


class Skipped(nn.Module):
    """A layer that is skipped for some micro-batches.

    Args:
        features: any.
        by: data (depending on the inputs), torch or random (at random), or all (always).
    """

    def __init__(self, features: int, by: str = "data") -> None:
        super().__init__()
        self.by = by
        self.layer = nn.Linear(features, features)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        if self.training:
            if self.by == "data" and inputs.detach().mean() > 0:
                return inputs
            if self.by == "torch" and torch.rand(()) < 0.5:
                return inputs
            if self.by == "random" and random.random() < 0.5:
                return inputs
            if self.by == "all":
                return inputs
        return inputs + torch.tanh(self.layer(inputs))


class PrivateNoise(nn.Module):
    """Draws from its own generator, which cannot be seeded for each micro-batch.

    Args:
        features: any.
        seeded: whether the generator starts with the same seed in every process.
    """

    def __init__(self, features: int, seeded: bool = True) -> None:
        super().__init__()
        self.generator = np.random.default_rng(0 if seeded else None)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        if not self.training:
            return inputs
        return inputs + 0.3 * torch.as_tensor(
            self.generator.normal(size=tuple(inputs.shape)), dtype=inputs.dtype
        )


# --- side effects of the forward pass


class PowerIteration(nn.Module):
    """A buffer that each forward pass updates, as in spectral normalisation."""

    direction: torch.Tensor

    def __init__(self, features: int, persistent: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(features, features)
        self.register_buffer(
            "direction", torch.ones(features) / math.sqrt(features), persistent=persistent
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        weight = self.layer.weight
        if self.training:
            with torch.no_grad():
                product = weight @ self.direction
                self.direction = product / (product.norm() + 0.1)
        size = (weight @ self.direction.clone()).norm() + 0.5
        return torch.tanh(nn.functional.linear(inputs, weight / size, self.layer.bias))


class Counting(nn.Module):
    """A Python integer that counts forward passes and changes their outputs."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        self.passes += self.training
        return inputs * (1 + 0.1 / (1 + self.passes))


class Remembering(nn.Module):
    """A recurrent layer whose state carries over to the next forward pass."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.state: torch.Tensor | float = 0.0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        outputs = torch.tanh(inputs + self.state)
        if self.training:
            self.state = 0.5 * outputs.detach().mean(0)
        return outputs


class ActNormed(nn.Module):
    """Initialises its scale from the first inputs."""

    initialized: torch.Tensor

    def __init__(self, features: int, by_weight: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(features))
        self.by_weight = by_weight
        self.register_buffer("initialized", torch.tensor(False), persistent=not by_weight)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        if self.training and not self.initialized:
            with torch.no_grad():
                self.scale.copy_(0.5 / (inputs.abs().mean(0) + 0.1))
                self.initialized.fill_(True)
        return torch.tanh(inputs * self.scale)


class Renormed(nn.Module):
    """An embedding with max_norm; if `within`, no row exceeds it initially."""

    def __init__(self, features: int, within: bool = False) -> None:
        super().__init__()
        self.layer = nn.Embedding(5, features, max_norm=1.0)
        with torch.no_grad():
            self.layer.weight.mul_(0.01 if within else 9.0)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        rows = (2.5 + 2 * torch.tanh(inputs[:, 0].detach())).long().clamp(0, 4)
        return torch.tanh(inputs + self.layer(rows))


class Switching(nn.Module):
    """Switches one of its layers to evaluation mode in the forward pass."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        outputs = self.dropout(inputs)
        self.dropout.eval()
        return outputs


class Hooked(nn.Module):
    """Hooks on the gradient of a weight.

    Args:
        features: any.
        when: pass, on the gradient of each backward pass; or sum, on the accumulated gradient.
    """

    def __init__(self, features: int, when: str = "pass") -> None:
        super().__init__()
        self.layer = nn.Linear(features, features)
        if when == "pass":
            self.layer.weight.register_hook(torch.tanh)
        else:
            self.layer.weight.register_post_accumulate_grad_hook(self._flatten)

    @staticmethod
    def _flatten(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        weight.grad.mul_(20).tanh_()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        return torch.tanh(self.layer(inputs))


class Evaluated(nn.Module):
    """A buffer that counts evaluation passes and changes their outputs; persistent if `saved`."""

    count: torch.Tensor

    def __init__(self, features: int, saved: bool = True) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()), persistent=saved)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        if self.training:
            return inputs
        self.count += 1
        return inputs * (1 + 0.1 / self.count)


class Extra(nn.Module):
    """Extra state, by get_extra_state.

    Args:
        features: any.
        form: constant; tensor (constant); or counted (each forward pass changes it).
    """

    def __init__(self, features: int, form: str = "constant") -> None:
        super().__init__()
        self.form = form
        self.extra: dict[str, Any] = {"passes": 0, "factor": 0.5 + random.random()}
        if form == "tensor":
            self.extra["row"] = torch.rand(3)

    def get_extra_state(self) -> dict[str, Any]:
        """Called by state_dict."""
        return dict(self.extra)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Called by load_state_dict."""
        self.extra = dict(state)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        if self.form == "counted":
            self.extra["passes"] += self.training
        return inputs * self.extra["factor"]


class Reset(nn.Module):
    """A buffer that each pass overwrites before reading it.

    Args:
        features: any.
        saved: whether it is persistent, and written with constant values.
    """

    cache: torch.Tensor

    def __init__(self, features: int, saved: bool = False) -> None:
        super().__init__()
        self.saved = saved
        self.register_buffer("cache", torch.full((features,), 0.25), persistent=saved)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (n, features)."""
        with torch.no_grad():
            self.cache.copy_(torch.full_like(self.cache, 0.25) if self.saved else inputs.mean(0))
        return inputs - 0.1 * self.cache.clone()


BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "linear": Linear,
    "conv": Conv,
    "embedding": Embedded,
    "tied": Tied,
    "frozen": Frozen,
    "unused": Unused,
    "scale": Scale,
    "brittle": Brittle,
    "leashed": Leashed,
    "spectral": Spectral,
    "widened": Widened,
    "halved": Halved,
    "norm": Normed,
    "conv2d": Conv2d,
    "lstm": Lstm,
    "attention": Attended,
    "parametrized": Parametrized,
    "empty": Empty,
    "buffer": Buffered,
    "integers": Integers,
    "expanded": Expanded,
    "transposed": Transposed,
    "lazy": Lazy,
    "instance_norm": InstanceNormed,
    "batch_norm": BatchNormed,
    "noise": Noise,
    "dropout": Dropped,
    "skipped": Skipped,
    "private_noise": PrivateNoise,
    "power_iteration": PowerIteration,
    "counting": Counting,
    "remembering": Remembering,
    "act_norm": ActNormed,
    "renormed": Renormed,
    "switching": Switching,
    "hooked": Hooked,
    "evaluated": Evaluated,
    "extra": Extra,
    "reset": Reset,
}


def drawn(source: str, like: torch.Tensor) -> torch.Tensor:
    """Gaussian noise of the shape and dtype of `like`, from one of the global generators or all."""
    if source == "all":
        return (drawn("torch", like) + drawn("numpy", like) + drawn("random", like)) / 2
    if source == "torch":
        return torch.randn(like.shape, dtype=like.dtype)
    if source == "numpy":
        return torch.as_tensor(np.random.normal(size=tuple(like.shape)), dtype=like.dtype)
    numbers = [random.gauss(0, 1) for _ in range(like.numel())]
    return torch.tensor(numbers, dtype=like.dtype).reshape(like.shape)


# --- losses


def loss(kind: str = "cross_entropy", **arguments: Any) -> Callable[[Any, Any], Any]:
    """A loss of the given kind, a key of LOSSES."""
    return LOSSES[kind](**arguments)


class Temperature(nn.Module):
    """Cross entropy with a learnt temperature and a learnt bias per class.

    Args:
        outputs: number of classes.
        frozen: whether the temperature is frozen.
    """

    def __init__(self, outputs: int = 3, frozen: bool = False) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(0.2), requires_grad=not frozen)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Shapes (n, classes) and (n,)."""
        return nn.functional.cross_entropy(outputs * self.logit_scale.exp() + self.bias, targets)


class Centers(nn.Module):
    """Cross entropy plus the distance from learnt class centres (center loss)."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(outputs, outputs))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Shapes (n, classes) and (n,)."""
        return (
            nn.functional.cross_entropy(outputs, targets)
            + 0.1 * (outputs - self.centers[targets]).square().sum(1).mean()
        )


class Mixup(nn.Module):
    """Cross entropy against a mixture of two targets, with a weight drawn from numpy."""

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Shapes (n, classes) and (n,)."""
        if not torch.is_grad_enabled():
            return nn.functional.cross_entropy(outputs, targets)
        weight = float(np.random.beta(0.4, 0.4))
        other = targets[torch.from_numpy(np.random.permutation(len(targets)))]
        cross_entropy = nn.functional.cross_entropy
        return weight * cross_entropy(outputs, targets) + (1 - weight) * cross_entropy(
            outputs, other
        )


class Averaging(nn.Module):
    """A loss that keeps a running average of itself in a buffer."""

    average: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(()))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Shapes (n, classes) and (n,)."""
        mean = nn.functional.cross_entropy(outputs, targets)
        with torch.no_grad():
            self.average.mul_(0.9).add_(mean.detach(), alpha=0.1)
        return mean


class NormedLoss(nn.Module):
    """Cross entropy after batch normalisation and dropout: a loss with a mode and running
    statistics.
    """

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(outputs, eps=0.1)
        self.dropout = nn.Dropout(0.2)

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Shapes (n, classes) and (n,)."""
        twice = torch.stack([outputs, 0.5 * outputs], dim=2)  # a single sample has no variance
        return nn.functional.cross_entropy(self.dropout(self.bn(twice)[:, :, 0]), targets)


def _named(outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs["logits"], targets)


def _vector(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def _plain(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, targets)


def _weighted(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy with a weight for each sample: the sum, and that of the weights."""
    weights = 1.0 + targets.to(outputs.dtype)
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
    return (losses * weights).sum(), weights.sum()


def _smooth_l2(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (torch.tanh(outputs[:, 0]) - torch.tanh(targets.to(outputs.dtype))).square().mean()


LOSSES: dict[str, Callable[..., Callable[[Any, Any], Any]]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "function": lambda: _plain,
    "regression": lambda: _smooth_l2,
    "temperature": Temperature,
    "centers": Centers,
    "mixup": Mixup,
    "normed": NormedLoss,
    "named": lambda: _named,
    "weighted": lambda: _weighted,
    "averaging": Averaging,
    "vector": lambda: _vector,
}


# --- data sets


def data(
    kind: str,
    samples: int,
    test_samples: int = 0,
    features: int = 4,
    classes: int = 3,
    poisoned: int | None = None,
    private_test: bool = False,
    **arguments: Any,
) -> tuple[Dataset, Dataset | None]:
    """Training and test set.

    Args:
        kind: a key of SETS.
        samples: of the training set.
        test_samples: 0 for no test set.
        features: of an input.
        classes: of the targets.
        poisoned: index of a training sample that is NaN; None for none.
        private_test: whether the test set draws from its own generator.
        **arguments: of the kind.
    """
    build = SETS[kind]
    training = _samples(samples, features, classes)
    if poisoned is not None:
        training.inputs[poisoned] = math.nan
    training_set = build(training, **arguments)
    if not test_samples:
        return training_set, None
    test = _samples(test_samples, features, classes)
    return training_set, PrivatelyNoisy(test) if private_test else build(test, **arguments)


def _samples(count: int, features: int, classes: int) -> InMemory:
    inputs = torch.randn(count, features)
    return InMemory(inputs, (inputs.sum(1) * 1.3).long() % classes)


class Listed(Dataset):
    """A map-style data set.

    Args:
        base: the samples.
        source: the generator of its augmentation: torch, numpy, random, all or none.
        gives: form of the inputs: tensor, numpy (float64), dict, tuple or image.
    """

    def __init__(self, base: Any, source: str = "none", gives: str = "tensor") -> None:
        self.base, self.source, self.gives = base, source, gives

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        inputs, targets = self.base[index]
        inputs = inputs if self.source == "none" else inputs + 0.2 * drawn(self.source, inputs)
        if self.gives == "numpy":
            return inputs.double().numpy(), int(targets)
        if self.gives == "image":
            return inputs.reshape(2, -1, 1), targets
        return {
            "tensor": inputs,
            "dict": {"x": inputs, "number": index},
            "tuple": (inputs, [index]),
        }[self.gives], targets


class ListedMany(Listed):
    """Reads many samples at once, with one draw for all of them."""

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Called by torch's DataLoader."""
        shift = 0.0 if self.source == "none" else 0.2 * drawn(self.source, torch.zeros(1))
        return [(self.base[index][0] + shift, self.base[index][1]) for index in indices]


class OneBelowMany(ListedMany):
    """Inherits `__getitems__` and overrides `__getitem__`."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        inputs, targets = super().__getitem__(index)
        return 0.7 * inputs + 0.3, targets


class _Shifts:
    """A mixin that overrides `__getitem__`."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = super().__getitem__(index)  # type: ignore[misc]
        return inputs + 0.2 * drawn("all", inputs), targets


class MixedIn(_Shifts, InMemory):
    """An InMemory whose `__getitem__` comes from a mixin."""


class OwnItem(InMemory):
    """An InMemory that overrides `__getitem__`."""

    def __init__(self, base: InMemory, source: str = "none") -> None:
        super().__init__(base.inputs, base.targets)
        self.source = source

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = super().__getitem__(index)
        return 0.7 * inputs + 0.3 + (
            0.0 if self.source == "none" else 0.2 * drawn(self.source, inputs)
        ), targets


class OwnBatch(InMemory):
    """An InMemory that overrides `batch`."""

    def __init__(self, base: InMemory, source: str = "none") -> None:
        super().__init__(base.inputs, base.targets)
        self.source = source

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of many samples."""
        inputs, targets = super().batch(indices)
        return 0.7 * inputs + 0.3 + (
            0.0 if self.source == "none" else 0.2 * drawn(self.source, inputs)
        ), targets


class Transformed(Subset):
    """A Subset with its own transform, as often used for the parts of a split.

    Overrides `__getitem__` but not `__getitems__`, which the constructor rejects since torch 2.10.
    """

    def __init__(self, base: Any, source: str = "none") -> None:
        self.dataset, self.indices = base, _shuffled(len(base))
        self.source = source

    def transform(self, inputs: torch.Tensor) -> torch.Tensor:
        """Augment one input."""
        return (
            0.7 * inputs
            + 0.3
            + (0.0 if self.source == "none" else 0.2 * drawn(self.source, inputs))
        )

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self.dataset[self.indices[index]]
        return self.transform(inputs), targets


class TransformedMany(Transformed):
    """Likewise, with `__getitems__`."""

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Called by torch's DataLoader."""
        return [self[index] for index in indices]


class Delegating:
    """A wrapper, not a Dataset, that delegates missing attributes to the wrapped data set."""

    def __init__(self, base: Any, source: str = "none") -> None:
        self.base, self.source = base, source

    def __len__(self) -> int:
        return len(self.base)

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # not set yet during unpickling
            raise AttributeError(name)
        return getattr(self.base, name)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self.base[index]
        return 0.7 * inputs + 0.3 + (
            0.0 if self.source == "none" else 0.2 * drawn(self.source, inputs)
        ), targets


class PrivatelyNoisy(Listed):
    """Draws its augmentation from its own generator."""

    def __init__(self, base: Any, seeded: bool = True) -> None:
        super().__init__(base)
        self.generator = np.random.default_rng(0 if seeded else None)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self.base[index]
        return inputs + 0.2 * torch.as_tensor(
            self.generator.normal(size=len(inputs)), dtype=inputs.dtype
        ), targets


class _First(Dataset):
    """The inputs of a data set."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.base[index][0]


def _shuffled(size: int) -> list[int]:
    return torch.randperm(size).tolist()


def _subset(base: Any, source: str = "none") -> Subset:
    return Subset(Listed(base, source), _shuffled(len(base)))


SETS: dict[str, Callable[..., Any]] = {
    "in_memory": lambda base: base,
    "listed": Listed,
    "listed_many": ListedMany,
    "own_item": OwnItem,
    "own_batch": OwnBatch,
    "subset": _subset,
    "subset_in_memory": lambda base: Subset(base, _shuffled(len(base))),
    "subset_own_batch": lambda base, source="none": Subset(
        OwnBatch(base, source), _shuffled(len(base))
    ),
    "subset_many": lambda base, source="none": Subset(
        ListedMany(base, source), _shuffled(len(base))
    ),
    "nested": lambda base, source="none": Subset(_subset(base, source), _shuffled(len(base))),
    "transformed": Transformed,
    "transformed_many": TransformedMany,
    "nested_transformed": lambda base, source="none": Subset(
        TransformedMany(base, source), _shuffled(len(base))
    ),
    "transformed_subset": lambda base, source="none": TransformedMany(_subset(base), source),
    "delegating": lambda base, source="none": Delegating(_subset(base), source),
    "delegating_many": lambda base, source="none": Delegating(ListedMany(base), source),
    "one_below_many": OneBelowMany,
    "mixed_in": lambda base: MixedIn(base.inputs, base.targets),
    "tensors": lambda base: TensorDataset(base.inputs, base.targets),
    "concatenated": lambda base, source="none": ConcatDataset(
        [Listed(base, source), OwnItem(base, source)]
    ),
    "stacked": lambda base, source="none": StackDataset(_First(Listed(base, source)), base.targets),
    "private": PrivatelyNoisy,
}


# --- what the engine may reject

# (section, items of the description, pattern that the message must match)
REFUSED: list[tuple[str, Description, str]] = [
    ("blocks", {"kind": "batch_norm", "form": "renorm"}, "statistics"),
    ("blocks", {"kind": "batch_norm", "form": "cumulative"}, "momentum"),
    ("blocks", {"kind": "spectral", "form": "trained"}, "complex"),
    ("blocks", {"kind": "embedding", "sparse": True}, "sparse"),
    ("blocks", {"kind": "private_noise"}, "generator|result"),
    ("blocks", {"kind": "power_iteration"}, "direction|result"),
    ("blocks", {"kind": "counting"}, "result"),
    ("blocks", {"kind": "extra", "form": "counted"}, "extra"),
    ("loss", {"kind": "averaging"}, "average"),
    ("data", {"kind": "private"}, "data|generator|result"),
    ("blocks", {"kind": "parametrized", "form": "spectral"}, "parametrizations"),
    ("blocks", {"kind": "parametrized", "form": "settled"}, "parametrizations"),
    ("blocks", {"kind": "expanded", "rows": 2}, "offsets"),
    ("blocks", {"kind": "transposed"}, "contiguous"),
    ("blocks", {"kind": "lazy"}, "ninitialized"),
    ("blocks", {"kind": "instance_norm", "tracks": True}, "instance"),
    ("blocks", {"kind": "batch_norm", "form": "flat"}, "more than 1 value"),
    ("blocks", {"kind": "batch_norm", "form": "shared"}, "statistics|running"),
    ("blocks", {"kind": "remembering"}, "result"),
    ("blocks", {"kind": "act_norm"}, "scale|initialized|result"),
    ("blocks", {"kind": "renormed"}, "layer.weight|result"),
    ("blocks", {"kind": "switching"}, "mode|result"),
    ("loss", {"kind": "vector"}, "loss|scalar"),
    ("blocks", {"kind": "hooked", "when": "sum"}, "hook"),
    ("blocks", {"kind": "evaluated"}, "count|evaluat"),
    ("data", {"private_test": True}, "test set"),
]


def refusals(job: Description) -> list[str]:
    """Patterns for the message if this job is rejected, one for each part that may be rejected."""
    parts = {
        "blocks": job["model"]["args"]["blocks"],
        "loss": [job["loss"].get("args", {})],
        "data": [job["data"]["args"]],
    }
    return [
        pattern
        for section, items, pattern in REFUSED
        for part in parts[section]
        if items.items() <= part.items()
    ]
