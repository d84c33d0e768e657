"""Opens the connections to the other workers: over MPI and Horovod, or the solo forms where no launcher started this process."""

from __future__ import annotations

from hvdlarge.comm.interfaces import ControlWire, TensorWire, WrongWorld
from hvdlarge.comm.launcher import Launch


def open_control(launch: Launch | None) -> ControlWire:
    """Open the wire for decisions. Every rank calls this together; it needs no torch.

    Raises:
        WrongWorld: if a launcher started this process and MPI is missing or sees another number of workers.
    """
    if launch is None:
        from hvdlarge.comm.solo import SoloControl

        return SoloControl()
    try:
        from hvdlarge.comm.mpi_backend import MpiControl
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, but finds no MPI library
        raise WrongWorld(
            f"started by {launch.launcher} with {launch.size} workers, but mpi4py does not load here ({error}); "
            "docker/install-horovod.sh installs it together with Horovod"
        ) from error
    return MpiControl(launch)


def open_tensors(launch: Launch | None, control: ControlWire) -> TensorWire:
    """Open the wire for tensors. Every rank calls this together, after `open_control`.

    Raises:
        WrongWorld: if a launcher started this process and Horovod is missing or sees another number of workers.
    """
    if launch is None:
        from hvdlarge.comm.solo import SoloTensors

        return SoloTensors()
    try:
        from hvdlarge.comm.horovod_backend import HorovodTensors
    except ImportError as error:
        raise WrongWorld(
            f"started by {launch.launcher} with {launch.size} workers, but horovod.torch does not load here ({error}); "
            "docker/install-horovod.sh builds and installs it"
        ) from error
    return HorovodTensors(control)
