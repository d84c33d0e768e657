"""VGG-19 with batch normalisation, by the numbers that are published of it."""

import pytest
import torch
from support.counting_parameters import build, count

from hvdlarge.models.vgg import VGG19BN


def test_vgg19_bn_has_the_published_size():
    model = build("vgg19_bn")
    assert count(model) == 143_678_248
    images = torch.empty(2, 3, 224, 224, device="meta")
    assert model.features(images).shape == (2, 512, 7, 7)
    assert model(images).shape == (2, 1000)


def test_vgg19_bn_has_19_layers_each_convolution_with_batch_norm():
    layers = [type(module) for module in build("vgg19_bn").features]
    convolutions = [number for number, kind in enumerate(layers) if kind is torch.nn.Conv2d]
    linear = [m for m in build("vgg19_bn").modules() if isinstance(m, torch.nn.Linear)]
    assert (len(convolutions), len(linear)) == (16, 3)
    assert all(layers[number + 1] is torch.nn.BatchNorm2d for number in convolutions)
    assert layers.count(torch.nn.MaxPool2d) == 5


def test_vgg19_bn_of_cifar_has_the_published_size():
    model = build("vgg19_bn", form="cifar", classes=10)
    assert count(model) == 20_040_522  # published: 20.04 M
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)


def test_initial_weights_have_the_variance_of_the_source():
    model = VGG19BN(form="cifar")
    convolution = model.features[-4]
    assert convolution.weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert not convolution.bias.any()
    assert not model.classifier.bias.any()


@pytest.mark.parametrize(("form", "side"), [("imagenet", 32), ("imagenet", 256), ("cifar", 48)])
def test_images_of_another_size_are_refused(form, side):
    with torch.device("meta"):
        model, images = VGG19BN(form=form), torch.empty(1, 3, side, side)
    with pytest.raises(ValueError, match=f"VGG-19, form {form}, .*not 3×{side}×{side}"):
        model(images)


def test_another_form_is_refused():
    with pytest.raises(ValueError, match="form must be imagenet or cifar, got 'big'"):
        VGG19BN(form="big")
