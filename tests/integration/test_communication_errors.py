"""How a run ends where Horovod fails and no rank is gone."""

FAILING_SUM = """
import horovod.torch.optimizer as horovod_optimizer
import torch
from horovod.common.exceptions import HorovodInternalError

synchronize, sums = horovod_optimizer.synchronize, 0


def failing(handle):
    global sums
    sums += 1
    if sums > 20:
        raise HorovodInternalError("ncclAllReduce failed: unhandled cuda error")
    return synchronize(handle)


horovod_optimizer.synchronize = failing


class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, 10))
"""


def test_an_error_of_horovod_keeps_its_text_and_is_no_lost_rank(train, folder):
    """hvdlarge.launch restarts a run that has lost a rank, but not one in which NCCL is misused."""
    (folder / "failing_sum.py").write_text(FAILING_SUM)
    ended = train(2, "jobs/digits.yaml", "model={name: 'failing_sum:Net'}", "epochs=2")
    assert ended.code == 70, ended.err
    assert len(ended.errors) == 1
    assert "ncclAllReduce failed: unhandled cuda error" in ended.errors[0]
    assert "another rank" not in ended.err
