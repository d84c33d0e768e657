"""Synthetic images: as many as asked for, out of few."""

import pytest
import torch

from hvdlarge.config import registry
from hvdlarge.data.synthetic import synthetic_images
from hvdlarge.exits import JobError


def test_a_set_of_any_size_stays_small_in_memory():
    images, nothing = synthetic_images(1_000_000, size=8, classes=3)
    assert nothing is None
    assert len(images) == 1_000_000
    assert images.inputs.shape == (512, 3, 8, 8)
    inputs, targets = images.batch(torch.tensor([1, 513, 999_999]))
    assert torch.equal(inputs[0], inputs[1])
    assert torch.equal(inputs[2], images[999_999][0])
    assert set(targets.tolist()) <= {0, 1, 2}


def test_a_loop_over_the_set_ends_and_its_last_sample_is_the_last():
    images, _ = synthetic_images(600, size=2)
    assert len(list(images)) == 600
    assert torch.equal(images[-1][0], images[599][0])
    with pytest.raises(IndexError):
        images[600]


def test_a_wrong_size_is_the_jobs_error():
    with pytest.raises(JobError, match=r"data\.name: synthetic_images: .* at least 1 sample"):
        registry.instantiate("data.name", "synthetic_images", {"samples": 0}, registry.DATA_SETS)
