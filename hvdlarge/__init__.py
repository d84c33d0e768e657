"""hvdlarge: a Horovod-based MPI engine for synchronous large-batch training with PyTorch."""

__version__ = "0.1.0"
