import pytest
import torch

from hvdlarge.optim.lars import LARS
from hvdlarge.resilience.digest import combined, named_state, tensor_digests


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_any_flipped_bit_changes_the_digest(dtype, size):
    tensor = (torch.arange(size) % 2).to(dtype)
    before = tensor_digests({"x": tensor})
    for byte in {0, tensor.nbytes // 2, tensor.nbytes - 1}:
        changed = tensor.clone()
        changed.view(torch.uint8)[byte] ^= 1
        assert tensor_digests({"x": changed}) != before
    assert tensor_digests({"x": tensor.clone()}) == before


@pytest.mark.parametrize("size", [2, 7, 1024, 1025, 5000])
def test_the_order_of_values_counts(size):
    tensor = torch.arange(1.0, size + 1)
    swapped = tensor.clone()
    swapped[[0, size - 1]] = tensor[[size - 1, 0]]
    digests = {
        tuple(tensor_digests({"x": other}).values())
        for other in (tensor, tensor.roll(1), tensor.flip(0), swapped)
    }
    assert len(digests) == (4 if size > 2 else 2)


def test_a_tensor_without_elements_has_one():
    assert tensor_digests({"x": torch.empty(0, 3)}) == {"x": 0}


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.bfloat16])
@pytest.mark.parametrize("start", [1, 2, 3])
def test_a_slice_has_the_digest_of_its_values(dtype, start):
    """Whatever its place in memory."""
    tensor = (torch.arange(50) % 3).to(dtype)[start:]
    assert tensor_digests({"x": tensor}) == tensor_digests({"x": tensor.clone()})


def test_names_and_state_belong_to_it():
    model = torch.nn.Linear(2, 2)
    optimizer = LARS(model.parameters())
    names = {weight: name for name, weight in model.named_parameters()}
    alone = combined(tensor_digests(named_state({"": model}, optimizer, names)))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = named_state({"": model}, optimizer, names)
    assert list(state) == ["bias", "bias, momentum_buffer", "weight", "weight, momentum_buffer"]
    assert 0 <= combined(tensor_digests(state)) < 2**64
    assert combined(tensor_digests(state)) != alone
    assert combined({"a": 1, "b": 2}) != combined({"a": 2, "b": 1})
