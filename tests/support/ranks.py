"""Fixtures of tests that run on every rank of `mpirun -np N python -m pytest FOLDER` together, over real MPI and real Horovod.

A conftest.py imports all of them, and the hooks.

A rank whose test fails ends the whole run at once, since the others would wait for it in the next collective call.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import pytest

from hvdlarge.comm.connect import open_control, open_tensors
from hvdlarge.comm.launcher import bound_cores, detect, starting_settings

LAUNCH = detect(os.environ)


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    if LAUNCH is not None and LAUNCH.rank != 0:  # one report is enough
        reporter = config.pluginmanager.getplugin("terminalreporter")
        config.pluginmanager.unregister(reporter)


@pytest.fixture(scope="session")
def control():
    if LAUNCH is None:
        pytest.fail("start these tests with mpirun, e.g. make test-parallel")
    os.environ.update(starting_settings(os.environ, LAUNCH.local_size, len(bound_cores())))
    return open_control(LAUNCH)


@pytest.fixture(scope="session")
def tensors(control):
    import torch

    torch.set_num_threads(1)
    wire = open_tensors(LAUNCH, control)
    yield wire
    wire.close()
    control.close()


@pytest.fixture
def folder(control):
    """A folder that all ranks share."""
    with tempfile.TemporaryDirectory() as own:
        yield Path(control.allgather(own.encode())[0].decode())
        control.barrier()


@pytest.fixture(autouse=True)
def together(control):
    """No rank begins a test before the others have ended theirs."""
    control.barrier()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and LAUNCH is not None and LAUNCH.size > 1:
        sys.__stderr__.write(f"\nrank {LAUNCH.rank}: {item.nodeid}\n{report.longreprtext}\n")
        sys.__stderr__.flush()
        time.sleep(1)  # ranks that fail alike may all say so
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)
    return report
