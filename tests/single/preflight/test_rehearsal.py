"""Errors of user code are reported with the line of the user, not with one of the engine."""

import pytest
import torch

from hvdlarge.data.loader import MicroBatchDataset
from hvdlarge.data.samples import SampleError
from hvdlarge.preflight.user_code import describe
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
