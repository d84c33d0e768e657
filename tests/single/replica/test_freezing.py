"""Parameters frozen by patterns of their names."""

import pytest
import torch
from torch import nn

from hvdlarge.exits import JobError
from hvdlarge.models.state import trained_modules
from hvdlarge.replica.freezing import freeze


def net():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


def frozen(*patterns, loss=None):
    modules = trained_modules(net(), loss)
    freeze(modules, patterns)
    return [
        prefix + name
        for prefix, module in modules.items()
        for name, weight in module.named_parameters()
        if not weight.requires_grad
    ]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ([], []),
        (["1.*"], ["1.weight", "1.bias"]),
        (["?.bias"], ["0.bias", "1.bias", "2.bias", "3.bias"]),
        (["3.weight", "1.bias"], ["1.bias", "3.weight"]),
        (["2.weight"], ["0.weight"]),  # a tied weight, by its other name
    ],
)
def test_patterns_choose_parameters(patterns, names):
    assert frozen(*patterns) == names


def test_parameters_of_a_loss_have_their_prefix():
    assert frozen("loss.*", loss=nn.Linear(2, 2)) == ["loss.weight", "loss.bias"]


def test_a_pattern_that_matches_nothing_names_the_nearest():
    message = r"'3.wieght' matches no parameter; did you mean '3.weight'\?"
    with pytest.raises(JobError, match=message) as raised:
        frozen("1.*", "3.wieght")
    assert raised.value.code == 2
    with pytest.raises(JobError, match=r"the first names are 0.weight, 0.bias"):
        frozen("zzzzzzzz*")


def test_something_must_be_left_to_train():
    with pytest.raises(JobError, match="every parameter is frozen"):
        frozen("*")


def test_modes_stay():
    model = net()
    freeze({"": model}, ["1.*"])
    model(torch.randn(4, 3))
    assert model[1].training
    assert model[1].num_batches_tracked == 1
