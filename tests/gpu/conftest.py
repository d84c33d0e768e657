"""Runs on a GPU, by the bench of the faults. Skipped, with the reason, where torch sees no GPU."""

from pathlib import Path

import pytest
import torch
from faults.conftest import bench, bench_in, undisturbed
from support.launching import core_of_its_own

__all__ = ["bench", "bench_in", "core_of_its_own", "undisturbed"]  # fixtures

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="torch sees no GPU here")
        for item in items:
            if item.path.parent == HERE:
                item.add_marker(skip)


@pytest.fixture
def sharing():
    """Two workers may share the GPU: with NCCL they may not."""
    import horovod.torch as hvd

    if hvd.nccl_built():
        pytest.skip(
            "this Horovod is built with NCCL, which needs a GPU for each worker; with "
            "HOROVOD_GPU_OPERATIONS=none docker/install-horovod.sh builds one whose workers share"
        )


@pytest.fixture
def own_parts(bench):
    """The bench, with tests/gpu/gpu_parts.py beside its job."""
    (bench.folder / "gpu_parts.py").write_text((HERE / "gpu_parts.py").read_text())
    return bench
