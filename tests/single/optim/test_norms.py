"""Norms that are divided by: exact, and the same however many tensors or threads there are."""

import math

import pytest
import torch

from hvdlarge.optim.norms import norm, norms, norms_of_list, uses_foreach

SHAPES = [
    (),
    (1,),
    (3, 5),
    (4095,),
    (4096,),
    (64, 64),
    (4097,),
    (3, 4096),
    (7, 5001),
    (2, 3, 33, 1000),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_are_those_of_float64(dtype):
    torch.manual_seed(0)
    tensors = [
        torch.randn(shape, dtype=dtype) * 10.0**power for shape in SHAPES for power in (-12, 0, 12)
    ]
    truth = [
        math.sqrt(math.fsum(value * value for value in tensor.double().reshape(-1).tolist()))
        for tensor in tensors
    ]
    bound = 2e-7 if dtype == torch.float32 else 1e-14
    assert norms(tensors) == pytest.approx(truth, rel=bound)
    assert [norm(tensor).item() for tensor in tensors] == pytest.approx(truth, rel=bound)
    # On a CPU a list is summed in one go; 2e-7 holds for the chunks of a GPU
    bound = 2e-6 if dtype == torch.float32 else 1e-14
    assert norms_of_list(tensors) == pytest.approx(truth, rel=bound)


def test_one_by_one_and_all_together_are_equal_to_rounding_of_float64():
    torch.manual_seed(1)
    tensors = [torch.randn(shape) for shape in SHAPES]
    assert norms(tensors) == pytest.approx([norm(tensor).item() for tensor in tensors], rel=1e-15)
    assert norms([]) == []


def test_threads_change_no_bit():
    torch.manual_seed(2)
    tensors = [torch.randn(300, 4099), torch.randn(70), torch.randn(2_000_000)]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((norms(tensors), [norm(tensor).item() for tensor in tensors]))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("size", [10, 4096, 9000])
def test_what_is_not_finite_stays_so(size):
    for place in (0, size - 1):
        for value in (math.inf, -math.inf, math.nan):
            tensor = torch.ones(size)
            tensor[place] = value
            expected = math.nan if math.isnan(value) else math.inf
            found = [norm(tensor).item()]
            found += [many([tensor, torch.ones(3)])[0] for many in (norms, norms_of_list)]
            assert all(
                math.isnan(one) if math.isnan(expected) else one == expected for one in found
            )


def test_a_layout_that_is_not_contiguous_changes_nothing():
    tensor = torch.randn(100, 90)
    assert norms([tensor.T]) == pytest.approx(norms([tensor]), rel=1e-7)
    assert norms([torch.zeros(5000)]) == [0.0]


def test_lists_are_for_devices_with_launches():
    assert not uses_foreach(torch.device("cpu"))
    assert uses_foreach(torch.device("cuda", 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_are_not_rounded_to_16_bits(dtype):
    """The first, 2¹⁴ · √27, lies beyond the range of fp16."""
    tensors = [torch.full((27,), 2.0**14, dtype=dtype), torch.tensor([3.0, 4.0])]
    truth = pytest.approx([2**14 * math.sqrt(27), 5], rel=1e-6)
    assert norms_of_list(tensors) == truth
    assert norms(tensors) == truth
    assert [norm(tensor).item() for tensor in tensors] == truth
    many = torch.full((3, 4097), 2.0**14, dtype=dtype)
    expected = pytest.approx(2**14 * math.sqrt(3 * 4097), rel=1e-6)
    assert norms([many]) == [expected]
    assert norm(many).item() == expected


def test_norms_of_a_list_of_unlike_types():
    tensors = [torch.tensor([3.0, 4.0]), torch.tensor([1e-200], dtype=torch.float64)]
    assert norms_of_list(tensors) == [5.0, 1e-200]
    assert norms_of_list([torch.zeros(0)]) == [0.0]
