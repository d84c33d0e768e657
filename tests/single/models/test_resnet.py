"""The residual networks, by the numbers that are published of them."""

import pytest
import torch

from hvdlarge.models.resnet import ResNet20, ResNet50


def test_resnet20_is_the_papers():
    model = ResNet20()
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) + 1 == 20
    assert sum(weight.numel() for weight in model.parameters()) == 269_722
    shapes = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert shapes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3


def test_resnet20s_shortcut_adds_every_other_pixel_and_zeros():
    block = ResNet20().blocks[3].eval()
    for weight in block.parameters():
        torch.nn.init.zeros_(weight)
    images = torch.rand(1, 16, 4, 4)
    out = block(images)
    assert torch.equal(out[:, 8:24], images[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


@pytest.mark.parametrize("version", ["v1", "v1.5"])
def test_resnet50_has_the_published_size(version):
    model = ResNet50(version=version)
    weights = list(model.parameters())
    assert (len(weights), sum(weight.numel() for weight in weights)) == (161, 25_557_032)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1000)


@pytest.mark.parametrize("zero_last", [True, False])
@pytest.mark.parametrize(("model", "channels"), [(ResNet20, 16), (ResNet50, 256)])
def test_zero_last_begins_with_blocks_that_change_nothing(model, channels, zero_last):
    block = model(zero_last=zero_last).blocks[1].eval()  # without a convolution in its shortcut
    images = torch.rand(1, channels, 4, 4)
    assert torch.equal(block(images), images) == zero_last


@pytest.mark.parametrize(("version", "strides"), [("v1", [2, 1, 1]), ("v1.5", [1, 2, 1])])
def test_the_version_says_which_convolution_has_the_stride(version, strides):
    with torch.device("meta"):
        model = ResNet50(version=version)
    convolutions = [
        [module.stride[0] for module in block.body if isinstance(module, torch.nn.Conv2d)]
        for block in model.blocks
    ]
    first_of_stage = {3: strides, 7: strides, 13: strides}
    assert convolutions == [first_of_stage.get(number, [1, 1, 1]) for number in range(16)]


def test_another_version_is_refused():
    with pytest.raises(ValueError, match="version must be v1 or v1.5, got 1.5"):
        ResNet50(version=1.5)
