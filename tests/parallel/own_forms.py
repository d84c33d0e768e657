"""Samples, models and losses in the forms in which people write them. Named in jobs as own_forms:Name."""

import torch
from own_parts import CLASSES, FEATURES, Net, tensors
from torch import nn
from torch.utils.data import Dataset

PADDED = -100  # a target that does not count


class Samples(Dataset):
    """A map-style set that gives what `form` makes of an input and its target."""

    def __init__(self, form, seed=0, samples=53):
        self.inputs, self.targets = tensors(samples, seed)
        self.form = form

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.form(self.inputs[index], self.targets[index])


def of_two_keys(inputs, target):
    return {"features": inputs, "label": target}


def of_three_keys(inputs, target):
    return {"features": inputs, "scale": inputs.abs().sum(), "label": target}


def nested(inputs, target):
    return {"parts": {"left": inputs[:2], "right": inputs[2:]}, "label": target, "domain": target}


def tuple_of_inputs(inputs, target):
    return (inputs, inputs.square()), target


def triple(inputs, target):
    return inputs, target, inputs.square()


def alone(inputs, target):
    return inputs


class FewTargets(Samples):
    """Most samples have no target that counts."""

    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        return inputs, target if index % 3 == 0 else PADDED * torch.ones_like(target)


def few_targets():
    return FewTargets(lambda *pair: pair), Samples(lambda *pair: pair, 1, 20)


def sets(form):
    """Training and test set of a form named in the job."""
    form = globals()[form]
    return Samples(form), Samples(form, seed=1, samples=20)


class Features(Net):
    """Takes its inputs by name."""

    def forward(self, features, scale=None):
        outputs = super().forward(features)
        return outputs if scale is None else outputs * scale.unsqueeze(1)


class Parts(Net):
    """Takes a dict of its inputs by name."""

    def forward(self, parts, domain=None):
        return super().forward(torch.cat([parts["left"], parts["right"]], dim=1))


class Two(Net):
    """Takes two inputs by position."""

    def forward(self, inputs, squares):
        return super().forward(inputs + squares)


class Autoencoder(Net):
    """Gives as many numbers as it gets."""

    def build(self):
        self.last = nn.Linear(5, FEATURES)


class Outputs:
    """What a model returns that computes its own loss, with attributes."""

    def __init__(self, loss, logits, tokens):
        self.loss, self.logits, self.tokens = loss, logits, tokens


class OwnLoss(Net):
    """Computes its own loss when it gets labels, as a mean over those that count."""

    def forward(self, features, label=None):
        logits = super().forward(features)
        loss = None if label is None else nn.functional.cross_entropy(logits, label)
        return Outputs(loss, logits, None if label is None else (label != PADDED).sum())


# --- ragged sequences, of which each token has a target


class Sequences(Dataset):
    """Sequences of 1 to 9 tokens."""

    def __init__(self, samples=53, seed=0):
        draw = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 10, (samples,), generator=draw).tolist()
        self.sequences = [torch.randn(n, FEATURES, generator=draw) for n in lengths]
        self.labels = [torch.randint(CLASSES, (n,), generator=draw) for n in lengths]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"features": self.sequences[index], "label": self.labels[index]}


def sequences():
    return Sequences(), Sequences(20, 1)


def pad(samples):
    """A batch of sequences, padded to the longest; the targets of the padding do not count."""
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    pad_sequence = nn.utils.rnn.pad_sequence
    return {
        "features": pad_sequence(columns["features"], batch_first=True),
        "label": pad_sequence(columns["label"], batch_first=True, padding_value=PADDED),
    }


class Tagger(Net):
    """Scores for each token, shape (n, classes, length)."""

    def forward(self, features):
        return super().forward(features).transpose(1, 2)


class OwnLossTagger(Net):
    """Computes the mean over the tokens itself, and says how many there are."""

    def forward(self, features, label):
        logits = super().forward(features).transpose(1, 2)
        loss = nn.functional.cross_entropy(logits, label, ignore_index=PADDED)
        return {"loss": loss, "logits": logits, "tokens": (label != PADDED).sum()}


# --- losses


def function(outputs, targets, power=1.0):
    return nn.functional.cross_entropy(outputs, targets) * power


class Module(nn.Module):
    def __init__(self, power=1.0):
        super().__init__()
        self.power = power

    def forward(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets) * self.power


def factory(power=1.0):
    return lambda outputs, targets: nn.functional.cross_entropy(outputs, targets) * power


instance = Module()


def token_sum(outputs, targets):
    """The sum over the tokens that count, and their number."""
    # Flat, since torch has no deterministic algorithm for more dimensions on a GPU
    outputs, targets = outputs.movedim(1, -1).flatten(0, -2), targets.flatten()
    total = nn.functional.cross_entropy(outputs, targets, ignore_index=PADDED, reduction="sum")
    return total, (targets != PADDED).sum()


def heavy_sum(outputs, targets):
    """The same with weights whose sums are far beyond the largest number of 16 bits."""
    total, weight = token_sum(outputs, targets)
    return total * 1e7, weight * 1e7


def plain_sum(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, reduction="sum")


def mean_with_weight(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets), len(targets)


def sum_with_constant_weight(outputs, targets):
    return plain_sum(outputs, targets), 1.0


def python_float(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets).item()


def nothing(outputs, targets):
    return None


def triple_of_losses(outputs, targets):
    loss = nn.functional.cross_entropy(outputs, targets)
    return loss, loss, loss


def negative_weight(outputs, targets):
    return plain_sum(outputs, targets), -float(len(targets))


def not_finite(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets) / 0


def number_factory():
    return 3


# --- data that no job can read


def generator():
    return (pair for pair in [(torch.zeros(FEATURES), 0)]), None


def lonely():
    return "digits"


def strings():
    return Samples(as_string), None


def as_string(inputs, target):
    return "a text", target


def ragged():
    return [(torch.zeros(1 + index), 0) for index in range(20)], None
