"""Tests that run on every rank of `mpirun -np N python -m pytest tests/parallel` together, over real MPI and real Horovod."""

from support.ranks import *  # noqa: F403
