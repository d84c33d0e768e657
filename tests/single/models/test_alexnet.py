"""AlexNet, by the numbers that are published of it."""

import pytest
import torch
from support.counting_parameters import build, count

from hvdlarge.models.alexnet import AlexNet, AlexNetBN


def test_alexnet_has_the_published_size():
    model = build("alexnet")
    assert count(model) == 61_100_840
    assert len(list(model.parameters())) == 16  # five convolutions, three linear layers
    for side in (224, 227):
        images = torch.empty(2, 3, side, side, device="meta")
        assert model.features(images).shape == (2, 256, 6, 6)
        assert model(images).shape == (2, 1000)


def test_alexnet_bn_has_a_scale_and_a_shift_for_each_channel_in_place_of_a_bias():
    channels = 64 + 192 + 384 + 256 + 256
    assert count(build("alexnet_bn")) == 61_100_840 + channels
    layers = [type(module) for module in build("alexnet_bn").features]
    convolutions = [number for number, kind in enumerate(layers) if kind is torch.nn.Conv2d]
    assert len(convolutions) == 5
    for number in convolutions:
        assert layers[number + 1 : number + 3] == [torch.nn.BatchNorm2d, torch.nn.ReLU]


def test_alexnet_of_cifar_has_the_published_size():
    model = build("alexnet", form="cifar", classes=10)
    assert count(model) == 2_472_266  # published: 2.47 M
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
    bn = build("alexnet_bn", form="cifar", classes=100)
    assert bn(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 100)


@pytest.mark.parametrize("model", [AlexNet, AlexNetBN])
@pytest.mark.parametrize(
    ("form", "shape", "message"),
    [
        ("imagenet", (1, 3, 32, 32), "AlexNet, form imagenet, .*3×224×224 or 3×227×227.*3×32×32"),
        ("cifar", (1, 3, 224, 224), "AlexNet, form cifar, .*3×32×32 .*not 3×224×224"),
        ("cifar", (1, 1, 32, 32), "not 1×32×32"),
        ("cifar", (32, 32), "not 32"),
    ],
)
def test_other_images_are_refused(model, form, shape, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        model(form=form)(torch.empty(shape))


def test_another_form_is_refused():
    with pytest.raises(ValueError, match="form must be imagenet or cifar, got 'mnist'"):
        AlexNet(form="mnist")


@pytest.mark.parametrize(("form", "probabilities"), [("imagenet", [0.25, 0.25]), ("cifar", [])])
def test_dropout_is_before_the_hidden_linear_layers(form, probabilities):
    model = build("alexnet", form=form, dropout=0.25)
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == probabilities
