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


def test_resnet50_has_the_published_size():
    model = ResNet50()
    weights = list(model.parameters())
    assert (len(weights), sum(weight.numel() for weight in weights)) == (161, 25_557_032)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1000)


@pytest.mark.parametrize("zero_last", [True, False])
def test_zero_last_begins_with_blocks_that_change_nothing(zero_last):
    block = ResNet50(zero_last=zero_last).blocks[1].eval()  # without a convolution in its shortcut
    images = torch.rand(1, 256, 4, 4)
    assert torch.equal(block(images), images) == zero_last
