"""The losses that torch does not have in this form."""

import pytest
import torch

from hvdlarge.models.losses import FromModel


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_sum_of_a_models_own_loss_is_held_in_32_bits_at_least(dtype):
    loss = torch.tensor(8.0, dtype=dtype, requires_grad=True)
    total, weight = FromModel(weight="tokens")({"loss": loss, "tokens": torch.tensor(10_001)}, {})
    assert (total.item(), weight.item()) == (80_008, 10_001)  # too large or long for 16 bits
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
