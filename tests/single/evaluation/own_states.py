"""Metrics with the attributes of torchmetrics, which these tests do not need to have installed."""

import torch


def dim_zero_sum(value):
    raise AssertionError("the engine combines states itself")


def dim_zero_max(value):
    raise AssertionError("the engine combines states itself")


def dim_zero_min(value):
    raise AssertionError("the engine combines states itself")


def dim_zero_cat(value):
    raise AssertionError("the engine combines states itself")


class States(torch.nn.Module):
    """A metric whose states are `defaults`, combined by `reductions`."""

    higher_is_better = True
    defaults = {}
    reductions = {}

    def __init__(self):
        super().__init__()
        self._reductions, self._defaults = dict(self.reductions), dict(self.defaults)
        self._update_count, self._computed = 0, None
        self.device = torch.device("cpu")
        self.reset()

    def reset(self):
        for name, value in self._defaults.items():
            setattr(self, name, [] if isinstance(value, list) else value.clone())


class Counted(States):
    defaults = {"count": torch.tensor(0.0)}
    reductions = {"count": dim_zero_sum}

    def update(self, outputs, targets):
        self.count = self.count + outputs.sum()

    def compute(self):
        return self.count


class Extremes(States):
    defaults = {"high": torch.tensor(-1e9), "low": torch.tensor(1e9)}
    reductions = {"high": dim_zero_max, "low": dim_zero_min}

    def update(self, outputs, targets):
        self.high, self.low = (
            torch.maximum(self.high, outputs.max()),
            torch.minimum(self.low, outputs.min()),
        )

    def compute(self):
        return self.high - 10 * self.low


class Collected(States):
    """Depends on the order of the samples."""

    defaults = {"values": []}
    reductions = {"values": dim_zero_cat}

    def update(self, outputs, targets):
        self.values.append(outputs)

    def compute(self):
        values = torch.cat(self.values)
        return (values * torch.arange(1, len(values) + 1)).sum()


class Shaped(States):
    """As torchmetrics' R2Score, whose states get the shape and dtype of the first outputs."""

    defaults = {"total": torch.tensor(0), "high": torch.tensor(-float("inf"))}
    reductions = {"total": dim_zero_sum, "high": dim_zero_max}

    def update(self, outputs, targets):
        self.total = self.total + outputs.sum(dim=0)
        self.high = torch.maximum(self.high.to(outputs), outputs.amax(dim=0))

    def compute(self):
        return (self.total + 100 * self.high).sum()


class Separate(Collected):
    """Depends on where one update ends and the next begins, as detection metrics do."""

    reductions = {"values": None}

    def compute(self):
        return sum((place + 1) * value.sum() for place, value in enumerate(self.values))
