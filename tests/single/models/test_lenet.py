"""The forms of LeNet, by the numbers that are published of them."""

import pytest
import torch
from support.counting_parameters import build, count

from hvdlarge.models.lenet import LeNet


@pytest.mark.parametrize(
    ("form", "parameters"), [("tensorflow", 3_274_634), ("caffe", 431_080), ("lenet5", 61_706)]
)
def test_each_form_has_its_size(form, parameters):
    assert count(build("lenet", form=form)) == parameters
    assert LeNet(form=form)(torch.randn(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(
    ("arguments", "probability"),
    [({}, 0.4), ({"dropout": 0.1}, 0.1), ({"dropout": 0}, 0), ({"form": "caffe"}, 0)],
)
def test_dropout_is_that_of_the_form_unless_given(arguments, probability):
    model = LeNet(**arguments)
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == [probability]


def test_initial_weights_are_uniform_in_the_bounds_of_glorot():
    hidden = LeNet().classifier[1].weight
    bound = (6 / (3136 + 1024)) ** 0.5
    assert 0.99 * bound < hidden.abs().max().item() <= bound
    assert not LeNet().features[0].bias.any()


def test_other_images_and_forms_are_refused():
    with pytest.raises(ValueError, match="LeNet takes images of the shape 1×28×28.*not 1×32×32"):
        LeNet()(torch.randn(2, 1, 32, 32))
    with pytest.raises(ValueError, match="form must be tensorflow, caffe, lenet5, got 'lenet'"):
        LeNet(form="lenet")
