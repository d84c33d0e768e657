"""The jobs of jobs/papers and jobs/small on every rank of `mpirun -np N python -m pytest tests/jobs` together, on little data."""

from support.ranks import *  # noqa: F403
