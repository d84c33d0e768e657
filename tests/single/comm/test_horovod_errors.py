"""What Horovod reports keeps its words, and only a rank that is gone is called so."""

import pytest
import torch
from horovod.common.exceptions import HorovodInternalError

from hvdlarge.comm.horovod_backend import HorovodOptimizer, error_of
from hvdlarge.comm.interfaces import CollectiveError, CollectiveMismatchError, RankLostError

GONE = "Horovod has been shut down. This was caused by an exception on one of the ranks or an attempt to allreduce"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (
            "ncclCommInitRank failed: invalid usage (run with NCCL_DEBUG=WARN for details)",
            CollectiveError,
        ),
        ("CUDA error: an illegal memory access was encountered", CollectiveError),
        (GONE, RankLostError),
        (
            "Mismatched allreduce tensor shapes: One or more ranks sent tensors of another shape",
            CollectiveMismatchError,
        ),
    ],
)
def test_an_error_keeps_its_text_and_gets_its_kind(text, kind):
    error = error_of(text)
    assert type(error) is kind
    assert str(error) == text


def test_an_error_in_a_hook_of_the_backward_pass_is_no_internal_one():
    weight = torch.nn.Parameter(torch.ones(2))

    def fail(*_):
        raise HorovodInternalError(GONE)

    weight.register_post_accumulate_grad_hook(fail)
    with pytest.raises(RankLostError, match="has been shut down"):
        HorovodOptimizer.backward(None, weight.sum())
