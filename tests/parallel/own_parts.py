"""Models, data sets and losses as people write them, for the tests of the laws. Named in jobs as own_parts:Name."""

import random
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, Subset

from hvdlarge.data.in_memory import InMemory
from hvdlarge.data.order import Stream
from hvdlarge.schedule.decay import Decay
from hvdlarge.schedule.growth import Growth
from hvdlarge.schedule.warmup import Warmup

FEATURES, CLASSES = 6, 3


# --- data


def tensors(samples=53, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, FEATURES, generator=generator), torch.randint(
        CLASSES, (samples,), generator=generator
    )


def plain(samples=53):
    return InMemory(*tensors(samples)), InMemory(*tensors(20, 1))


def images():
    """Images of bytes."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(256, (73, 3, 9, 8), generator=generator, dtype=torch.uint8)
    return InMemory(pixels[:53], torch.arange(53) % CLASSES), InMemory(
        pixels[53:], torch.arange(20) % CLASSES
    )


def ignored(kept=0):
    """Targets that cross entropy leaves out, as those of padding, but for the first of the run: the mean over none is nan."""
    train, test = plain()
    targets, first = torch.full_like(train.targets, -100), Stream(0, len(train)).samples(0, kept)
    targets[first] = train.targets[first]
    return InMemory(train.inputs, targets), test


def windows(samples=53):
    """Windows of a text of 7 tokens, each of 5, in the order of the text."""
    tokens = torch.randint(7, ((samples + 70) * 5 + 1,), generator=torch.Generator().manual_seed(3))
    inputs, targets = tokens[:-1].view(-1, 5), tokens[1:].view(-1, 5)
    return InMemory(inputs[:samples], targets[:samples]), InMemory(
        inputs[samples:], targets[samples:]
    )


class Pairs(Dataset):
    """A map-style set; `draw` adds to a sample what it draws."""

    def __init__(self, samples=53, draw=lambda: 0.0):
        self.inputs, self.targets = tensors(samples)
        self.draw = draw

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index] + self.draw(), self.targets[index]


def draw_from_all():
    return torch.randn(()) + np.random.normal() + random.gauss(0.0, 1.0)


def augmented():
    return Pairs(draw=draw_from_all), None


class Transformed(Subset):
    """The usual way to give the halves of random_split transforms of their own."""

    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        return inputs + 10 + 0.1 * draw_from_all(), target

    def __getitems__(self, indices):
        return [self[index] for index in indices]


class AugmentedTensors(InMemory):
    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        return inputs + 10 + 0.1 * draw_from_all(), target


class NoisyTensors(InMemory):
    def batch(self, indices):
        inputs, targets = super().batch(indices)
        return inputs + torch.randn_like(inputs) + np.random.normal() + random.random(), targets


class Delegating(Dataset):
    """Wraps a set, and hands on whatever it is asked for and lacks: the set's ways to many samples too."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        inputs, target = self.dataset[index]
        return inputs + 10 + torch.randn(()), target


def subset(kind="Transformed"):
    return Transformed(Pairs(), list(range(0, 53, 2))) if kind == "Transformed" else Delegating(
        Transformed(Pairs(), range(40))
    ), None


def tensor_set(kind):
    return globals()[kind](*tensors()), None


class OwnGenerator(Pairs):
    """Draws from a generator that nobody can seed."""

    def __init__(self):
        generator = np.random.default_rng()
        super().__init__(draw=generator.normal)


def own_generator():
    return OwnGenerator(), None


def own_generator_of_the_test_set():
    return Pairs(), OwnGenerator()


class Endless(torch.utils.data.IterableDataset):
    def __len__(self):
        return 53

    def __iter__(self):
        return iter([(torch.zeros(FEATURES), torch.tensor(0))] * 53)


def iterable():
    return Endless(), None


# --- models


class Seeing(nn.Module):
    """A convolution of images of any size."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, CLASSES)

    def forward(self, images):
        return self.last(torch.tanh(self.first(images)).mean((2, 3)))


class Net(nn.Module):
    """Two layers and, between them, what the subclasses put there."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 5), nn.Linear(5, CLASSES)
        self.build()

    def build(self):
        pass

    def between(self, hidden):
        return hidden

    def forward(self, inputs):
        return self.last(torch.tanh(self.between(self.first(inputs))))


class Normed(Net):
    def build(self):
        self.norm = nn.BatchNorm1d(5)

    def between(self, hidden):
        return self.norm(hidden)


def in_evaluation_mode():
    return Normed().eval()


class Frozen(Normed):
    """Frozen batch norm by the standard idiom."""

    def build(self):
        super().build()
        self.norm.running_mean.fill_(0.3)
        self.norm.running_var.fill_(2.0)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


class Versioned(nn.Module):
    """Loads its state only where its version is known, as some models of torchvision."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.net = Normed()

    def forward(self, inputs):
        return self.net(inputs)

    def _load_from_state_dict(self, state, prefix, metadata, *others):
        if metadata.get("version") != 2:
            raise ValueError(f"version {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *others)


class AlwaysInTraining(Normed):
    """Normalises by the batch in evaluations too, and so changes what is saved there."""

    def train(self, mode=True):
        super().train(mode)
        self.norm.train()
        return self


class TwoNames(Normed):
    def build(self):
        super().build()
        self.body = nn.Sequential(self.norm, nn.Tanh())

    def between(self, hidden):
        return self.body(hidden)


class Twice(Normed):
    def between(self, hidden):
        return self.norm(torch.sin(self.norm(hidden)))


class Never(Normed):
    def between(self, hidden):
        return hidden


class Recomputed(Normed):
    def between(self, hidden):
        return checkpoint(lambda hidden: torch.sin(self.norm(hidden)), hidden, use_reentrant=False)


class NormAct(nn.BatchNorm1d):
    """A layer that normalises as its base class does, by a forward of its own."""

    def forward(self, hidden):
        if self.training:
            self.num_batches_tracked.add_(1)
        mean, var = (None, None) if not self.training else (self.running_mean, self.running_var)
        if not self.training:
            mean, var = self.running_mean, self.running_var
        normed = nn.functional.batch_norm(
            hidden, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps
        )  # fmt: skip
        return torch.tanh(normed)


class OwnForward(Net):
    def build(self):
        self.norm = NormAct(5)

    def between(self, hidden):
        return self.norm(hidden)


class Renorm(nn.BatchNorm1d):
    """Batch renormalisation (Ioffe 2017): reads the running statistics while it trains, once they have settled."""

    def forward(self, hidden):
        if not self.training:
            return super().forward(hidden)
        limit = 1.0 if self.num_batches_tracked < 20 else 3.0
        mean, std = hidden.mean(0), hidden.std(0, unbiased=False) + self.eps
        r = (std.detach() / self.running_var.sqrt()).clamp(1 / limit, limit)
        normed = (hidden - mean) / std * r
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(std.square(), self.momentum)
        return normed * self.weight + self.bias


class Renormed(Net):
    def build(self):
        self.norm = Renorm(5)

    def between(self, hidden):
        return self.norm(hidden)


class Geometric(nn.BatchNorm1d):
    """Updates its running variance by a rule that is not linear."""

    def forward(self, hidden):
        if self.training:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_var.mul_(hidden.var(0) / self.running_var).clamp_(min=1e-3)
        return nn.functional.batch_norm(hidden, None, None, self.weight, self.bias, True)


class OtherRule(Net):
    def build(self):
        self.norm = Geometric(5)

    def between(self, hidden):
        return self.norm(hidden)


class ModeSwitch(Normed):
    """Freezes its batch norm in a forward pass."""

    def between(self, hidden):
        self.norm.eval()
        return self.norm(hidden)


class NumpyNoise(Net):
    def between(self, hidden):
        return (
            hidden
            + torch.from_numpy(np.random.normal(size=hidden.shape)).to(hidden) * random.random()
        )


class DrawsAlways(Net):
    """Draws in evaluation mode too."""

    def between(self, hidden):
        return hidden + torch.randn_like(hidden) + np.random.normal()


class OwnNoise(Net):
    def build(self):
        self.generator = np.random.default_rng()

    def between(self, hidden):
        return hidden + self.generator.normal()


class Skipping(Normed):
    """A layer that is skipped by chance, and one by what is in the micro-batch."""

    def build(self):
        super().build()
        self.chance, self.data = nn.Linear(5, 5), nn.Linear(5, 5)

    def between(self, hidden):
        if torch.rand(()) < 0.5:
            hidden = self.norm(self.chance(hidden))
        return self.data(hidden) if hidden.sum() > 0 else hidden


class Sometimes(Net):
    """A layer that is used in about half of all passes."""

    def build(self):
        self.layer = nn.Linear(5, 5)

    def between(self, hidden):
        return self.layer(hidden) if torch.rand(()) < 0.5 else hidden


class Spectral(Net):
    """Complex and 0-dimensional parts, a table kept in float64, and one in integers."""

    def build(self):
        self.register_buffer("rotation", torch.polar(torch.ones(5), torch.arange(5.0)))
        self.register_buffer("table", torch.full((5,), 1 / 3, dtype=torch.float64))
        self.register_buffer("order", torch.arange(5))
        self.filter = nn.Parameter(torch.full((5,), 1 + 1j), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def between(self, hidden):
        turned = (hidden * self.rotation * self.filter).real[:, self.order]
        return self.scale * turned.to(hidden.dtype) + self.table.to(hidden.dtype)


class TrainedComplex(Net):
    def build(self):
        self.filter = nn.Parameter(torch.full((5,), 1 + 1j))

    def between(self, hidden):
        return (hidden * self.filter).real


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(10, 5, sparse=True), nn.Linear(5, CLASSES)

    def forward(self, inputs):
        return self.last(self.table((inputs[:, 0].abs() * 3).long().clamp(max=9)))


class Tied(Net):
    def build(self):
        self.again, self.unused = nn.Linear(FEATURES, 5), nn.Linear(5, 5)
        self.again.weight = self.first.weight
        self.first.bias.requires_grad_(False)

    def forward(self, inputs):
        return super().forward(inputs + self.again(inputs).mean(1, keepdim=True))


class Remembering(Net):
    """Keeps something beside its tensors."""

    counts = False

    def build(self):
        self.seen = {"calls": 7, "mean": torch.ones(2)}

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state

    def between(self, hidden):
        if self.counts:
            self.seen = {**self.seen, "calls": self.seen["calls"] + 1}
        return hidden * self.seen["mean"][0].to(hidden)


class Counting(Remembering):
    counts = True


class PowerIteration(Net):
    def build(self):
        self.first = nn.utils.parametrizations.spectral_norm(self.first)


class SettledPowerIteration(PowerIteration):
    """Its first vectors are singular ones already, so that an iteration leaves them as they are to the last bit."""

    def build(self):
        with torch.no_grad():
            self.first.weight.copy_(torch.diag(torch.arange(6.0, 0.0, -1.0))[:5])
        super().build()
        norm = self.first.parametrizations.weight[0]
        for vector in (norm._u, norm._v):
            vector.copy_(torch.eye(1, len(vector))[0])


class ShortRows(nn.Module):
    """An embedding that shortens rows as it looks them up, none of which is too long yet."""

    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(10, 5, max_norm=100.0), nn.Linear(5, CLASSES)

    def forward(self, inputs):
        return self.last(self.table((inputs[:, 0].abs() * 3).long().clamp(max=9)))


class Rewritten(Net):
    """A saved buffer that each pass computes anew, always to the same."""

    def build(self):
        self.register_buffer("window", torch.linspace(0.5, 1, 5))

    def between(self, hidden):
        self.window.copy_(torch.linspace(0.5, 1, 5))
        return hidden * self.window.clone()


class ReadThenRewritten(Rewritten):
    """Likewise, but read before it is computed."""

    def between(self, hidden):
        found = hidden * self.window.clone()
        self.window.copy_(torch.linspace(0.5, 1, 5))
        return found


class PartlyRewritten(Rewritten):
    """Only a part of it is computed anew."""

    def between(self, hidden):
        self.window[:2] = torch.linspace(0.5, 1, 5)[:2]
        return hidden * self.window.clone()


class Replaced(Rewritten):
    """Another tensor is put in its place in each pass."""

    def between(self, hidden):
        self.window = self.window.clone()
        return hidden * self.window


class FirstSeen(Net):
    """A buffer that the first forward pass registers."""

    def between(self, hidden):
        if not hasattr(self, "window"):
            self.register_buffer("window", torch.full((5,), 0.5).to(hidden))
        return hidden * self.window


class Clamped(Net):
    """Weights that are kept within bounds in place, in which they are at first."""

    low, high = -50.0, None

    def between(self, hidden):
        with torch.no_grad():
            self.first.weight.clamp_(self.low, self.high)
        return hidden


class ClampedFromAbove(Clamped):
    low, high = None, 50.0


class Rolling(Net):
    """A pattern that goes round by one place in each pass."""

    def build(self):
        self.register_buffer("window", torch.linspace(0.5, 1, 5))

    def between(self, hidden):
        self.window.copy_(torch.roll(self.window, 1))
        return hidden * self.window.clone()


class Raising(Net):
    def between(self, hidden):
        raise ValueError("heads must divide the width")


class Expanded(Net):
    """A buffer whose values share their place in memory."""

    def build(self):
        self.register_buffer("window", torch.tensor([0.5]).expand(5))

    def between(self, hidden):
        return hidden * self.window


class RemembersEvaluations(Net):
    """Changes what is saved in evaluation mode."""

    def build(self):
        self.register_buffer("evaluations", torch.zeros(()))

    def between(self, hidden):
        if not self.training:
            self.evaluations += 1
        return hidden


class NoisyEvaluations(Net):
    """Draws from a generator of its own in evaluation mode."""

    def build(self):
        self.generator = np.random.default_rng()

    def between(self, hidden):
        return hidden if self.training else hidden + self.generator.normal()


class ClipsWhatIsAccumulated(Net):
    def build(self):
        self.last.weight.register_post_accumulate_grad_hook(self.clip)

    @staticmethod
    def clip(weight):
        weight.grad.clamp_(-1e-3, 1e-3)


class ClipsEachPass(Net):
    def build(self):
        self.last.weight.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))


class ChangesLater(Net):
    """A saved buffer that a forward pass changes once the weights have moved."""

    def build(self):
        self.register_buffer("scale", torch.ones(()))
        self.start = self.first.weight.detach().clone()

    def between(self, hidden):
        if not torch.equal(self.first.weight.detach(), self.start.to(hidden)):
            self.scale *= 1.01
        return hidden


class OnlyDeterministic(Net):
    def between(self, hidden):
        if not torch.are_deterministic_algorithms_enabled():
            raise ValueError("torch may take algorithms that give other bits from time to time")
        return hidden


# --- losses


class Temperature(nn.Module):
    """Cross entropy with a temperature that is learnt."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.shift = nn.Linear(CLASSES, CLASSES)

    def forward(self, outputs, targets):
        return nn.functional.cross_entropy(self.shift(outputs) * self.log_scale.exp(), targets)


class Unreduced(nn.Module):
    def forward(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, reduction="none")


class Mixed(nn.Module):
    """Weighs the loss by what numpy draws, as mixup does."""

    def forward(self, outputs, targets):
        share = np.random.beta(0.4, 0.4)
        return nn.functional.cross_entropy(outputs, targets) * share + outputs.square().mean() * (
            1 - share
        )


class Wrong:
    """A metric: how many answers are wrong."""

    num_totals = 1
    higher_is_better = False

    def totals(self, outputs, targets):
        return (outputs.argmax(dim=1) != targets).sum().reshape(1)

    def result(self, totals):
        return totals[0]


class ShapelessMetric(Wrong):
    def totals(self, outputs, targets):
        return super().totals(outputs, targets)[0]


class RememberingMetric(Wrong):
    """Adds up what it has seen itself."""

    def __init__(self):
        self.seen = 0

    def totals(self, outputs, targets):
        self.seen += len(targets)
        return torch.tensor([self.seen])


class RaisingMetric(Wrong):
    def totals(self, outputs, targets):
        return torch.tensor([1 / 0])


class Squares(Wrong):
    """A metric of floats, and one that has several totals: the root of the mean square of the scores."""

    num_totals = 2

    def totals(self, outputs, targets):
        return torch.stack([outputs.square().sum(), torch.tensor(float(outputs.numel()))])

    def result(self, totals):
        return (totals[0] / totals[1]) ** 0.5


class NotApplicable(Wrong):
    """A metric that does not apply."""

    def result(self, totals):
        return None


# --- optimizers


class Sharpened(torch.optim.Optimizer):
    """Momentum with a nod to the sign; a tensor and a number as its state, arguments without defaults."""

    def __init__(self, params, lr, strength, *, betas, weight_decay=0.0):
        defaults = {"lr": lr, "strength": strength, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["average"], state["count"] = torch.zeros_like(weight), 0
                state["count"] += 1
                beta = group["betas"][state["count"] % 2]
                state["average"].mul_(beta).add_(weight.grad, alpha=1 - beta)
                direction = torch.tanh(group["strength"] * state["average"]) / state["count"] ** 0.5
                weight.data.mul_(1 - group["lr"] * group["weight_decay"])
                weight.data.sub_(direction, alpha=group["lr"])


class RaisingInItsStep(torch.optim.SGD):
    def step(self, closure=None):
        raise KeyError("no such momentum")


class Langevin(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data.add_(torch.randn_like(weight), alpha=1e-3)


# --- policies


@dataclass(frozen=True)
class Halving(Decay):
    every: float

    def factor(self, epoch, warmup_end, epochs):
        return 0.5 ** (epoch / self.every)


@dataclass(frozen=True)
class Sudden(Warmup):
    epochs: float = 1.0
    on_growth: str = "ramp"

    def length(self, batch_factor):
        return self.epochs * batch_factor**0.5

    def ramp_length(self, epoch, before, after):
        return self.epochs / 2


@dataclass(frozen=True)
class Adding(Growth):
    samples: int = 3

    def next_batch(self, initial, current, epoch, measured):
        return initial + int(2 * epoch) * self.samples


# --- hooks


class Observer:
    """Remembers what it is told, for the test, and looks at the model's weights."""

    told = []

    def __init__(self, every=1):
        self.every = every

    def on_start(self, run):
        self.told.append(("start", run.step, run.rank, run.world_size, run.training_samples))

    def after_step(self, step):
        torch.randn(3), np.random.normal()  # which changes nothing
        size = sum(float(weight.square().sum()) for weight in step.model.parameters())
        if step.step % self.every == 0:
            self.told.append(("step", step.step, step.samples_seen, step.lr, step.loss, size))

    def after_evaluation(self, step):
        self.told.append(("evaluation", step.step, dict(step.results)))

    def after_checkpoint(self, step):
        self.told.append(("checkpoint", step.step))

    def on_end(self, run, finished):
        self.told.append(("end", finished, dict(run.results)))


class RaisingHook:
    def __init__(self, ranks=(0, 1, 2, 3), event="after_step"):
        self.ranks = ranks
        setattr(self, event, self.complain)

    def complain(self, moment, *more):
        if moment.rank in self.ranks:
            raise LookupError("the dashboard is away")


class ChangesWeights:
    def after_step(self, step):
        with torch.no_grad():
            next(step.model.parameters()).mul_(1.0)


class Sleeps:
    def after_step(self, step):
        if step.step == 2 and step.rank == step.world_size - 1:
            time.sleep(600)


# --- models that carry a state


class Carrying(nn.Module):
    """Its state is that of torch's LSTM: two tensors (layers, n, hidden)."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.lstm = nn.LSTM(6, 4, num_layers=2, batch_first=True)
        self.last = nn.Linear(4, 7)

    def advance(self, inputs, state=None):
        outputs, state = self.lstm(self.embedding(inputs), state)
        return self.last(outputs).movedim(-1, 1), state


class Gated(Carrying):
    """Its state is a dict, of samples first; what it draws belongs to the micro-batch."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(6, 4)
        del self.lstm

    def advance(self, inputs, state=None):
        before = None if state is None else state["hidden"].movedim(0, 1).contiguous()
        outputs, after = self.gru(self.embedding(inputs).movedim(1, 0), before)
        outputs = nn.functional.dropout(outputs.movedim(0, 1), 0.3, self.training)
        return self.last(outputs).movedim(-1, 1), {"hidden": after.movedim(1, 0)}


class Bursting(Carrying):
    """Its gradient is not finite for one of the windows, the first of its lane."""

    def __init__(self):
        super().__init__()
        self.register_buffer("trigger", windows()[0].inputs[20].clone())

    def advance(self, inputs, state=None):
        outputs, state = super().advance(inputs, state)
        bursts = (inputs == self.trigger).all(dim=1)
        return outputs / (~bursts)[:, None, None], state


class ForgetsSamples(Carrying):
    """Its state has no dimension for the samples."""

    def advance(self, inputs, state=None):
        outputs, _ = super().advance(inputs)
        return outputs, outputs.mean(dim=0)


class ReturnsOutputs(Carrying):
    def advance(self, inputs, state=None):
        return super().advance(inputs, state)[0]
