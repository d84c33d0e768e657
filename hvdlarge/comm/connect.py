"""Opens the channels between ranks: over MPI and Horovod, or solo forms without a launcher."""

from __future__ import annotations

from hvdlarge.comm.interfaces import Collectives, ControlChannel, WorldMismatchError
from hvdlarge.comm.launcher import Launch
from hvdlarge.comm.rank_checks import raise_on_all_ranks
from hvdlarge.exits import InvalidEnvironmentError


def open_control(launch: Launch | None) -> ControlChannel:
    """Open the control channel. Every rank calls this together; it needs no torch.

    Raises:
        WorldMismatchError: if a launcher started this process and MPI is missing or sees another
            number of workers.
    """
    if launch is None:
        from hvdlarge.comm.solo import SoloChannel

        return SoloChannel()
    try:
        from hvdlarge.comm.mpi_backend import MpiChannel
    # RuntimeError: mpi4py is installed, but finds no MPI library
    except (ImportError, RuntimeError) as error:
        raise WorldMismatchError(
            f"started by {launch.launcher} with {launch.size} workers, but mpi4py does not load "
            f"here ({error}); docker/install-horovod.sh installs it together with Horovod"
        ) from error
    return MpiChannel(launch)


def open_tensors(launch: Launch | None, control: ControlChannel) -> Collectives:
    """Open the collectives. Every rank calls this together, after `open_control`.

    Raises:
        InvalidEnvironmentError: on every rank, if a launcher started this process and Horovod is
            missing, or built without MPI, on any rank.
        WorldMismatchError: if Horovod sees another number of workers.
    """
    if launch is None:
        from hvdlarge.comm.solo import SoloCollectives

        return SoloCollectives()
    raise_on_all_ranks(control, lambda: _check_horovod(launch))
    from hvdlarge.comm.horovod_backend import HorovodCollectives

    return HorovodCollectives(control)


def _check_horovod(launch: Launch) -> None:
    """Raise InvalidEnvironmentError unless Horovod loads here and was built with MPI."""
    try:
        from hvdlarge.comm import horovod_backend
    except ImportError as error:
        raise InvalidEnvironmentError(
            f"started by {launch.launcher} with {launch.size} workers, but horovod.torch does not "
            f"load here ({error}); docker/install-horovod.sh builds and installs it"
        ) from error
    horovod_backend.check_build()
