"""Clipping by the global norm, against torch's own."""

import pytest
import torch

from hvdlarge.optim.clipping import clip


@pytest.mark.parametrize("limit", [0.01, 1.0, 7.5, 1e6, None])
def test_clipping_is_torchs(limit):
    torch.manual_seed(0)
    ours = [
        torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        for shape in ((3, 4), (5,), (2, 2, 2))
    ]
    theirs = [torch.nn.Parameter(torch.zeros_like(weight)) for weight in ours]
    for one, other in zip(ours, theirs, strict=True):
        one.grad = torch.randn_like(one)
        other.grad = one.grad.clone()
    norms = clip({weight: weight.grad.norm().item() for weight in ours}, limit)
    if limit is not None:
        torch.nn.utils.clip_grad_norm_(theirs, limit)
    for one, other in zip(ours, theirs, strict=True):
        # torch adds 1e-6 to the norm that it divides by
        torch.testing.assert_close(one.grad, other.grad, rtol=2e-6, atol=0)
        assert norms[one] == pytest.approx(one.grad.norm().item(), rel=1e-12)


def test_no_gradient_at_all_is_nothing_to_clip():
    assert clip({}, 1.0) == {}
