"""Errors of user code are reported with the line of the user, not with one of the engine."""

import pytest
import torch

from hvdlarge.data.loader import MicroBatchDataset
from hvdlarge.data.samples import SampleError
from hvdlarge.exits import JobError
from hvdlarge.preflight.user_code import describe, user_code
from hvdlarge.schedule.batch import MicroBatch


class Unequal(torch.utils.data.Dataset):
    """Samples of different shapes, which cannot be collated."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.zeros(index + 1), 0


def test_an_error_without_a_line_of_user_code_is_not_attributed_to_the_loader():
    with pytest.raises(SampleError) as raised:
        MicroBatchDataset(Unequal(), seed=0, shuffled=False)[MicroBatch(0, 0, 2)]
    error = raised.value.with_traceback(raised.tb.tb_next)  # from hvdlarge/data/loader.py on
    first_line = describe(error).splitlines()[0]
    assert "stack expects each tensor to be equal size" in first_line
    assert "loader.py" not in first_line


def test_an_operation_without_a_deterministic_algorithm_names_the_keys_that_exclude_it():
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(JobError, match="where `reduction: exact` or `deterministic: true`"):  # noqa: SIM117
            with user_code("the first micro-batch"):
                torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))
    finally:
        torch.use_deterministic_algorithms(False)
