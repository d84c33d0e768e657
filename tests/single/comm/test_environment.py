import os

from hvdlarge.comm.environment import set_environment, unset_environment
from hvdlarge.comm.launcher import Launch
from hvdlarge.config.job import Horovod


def test_variables_of_the_user_are_back_after_a_run(monkeypatch):
    monkeypatch.setenv("HOROVOD_STALL_CHECK_TIME_SECONDS", "120")
    monkeypatch.setenv("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "60")
    monkeypatch.delenv("HOROVOD_FUSION_THRESHOLD", raising=False)
    before = dict(os.environ)
    settings = set_environment(Launch("Open MPI", 0, 2, 0, 2), Horovod())
    assert os.environ["HOROVOD_STALL_CHECK_TIME_SECONDS"] == "60"
    assert "HOROVOD_FUSION_THRESHOLD" in os.environ
    unset_environment(settings)
    assert dict(os.environ) == before
