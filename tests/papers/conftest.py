"""The jobs of the papers on every rank of `mpirun -np N python -m pytest tests/papers` together, on small files of the official formats."""

from support.ranks import *  # noqa: F403
