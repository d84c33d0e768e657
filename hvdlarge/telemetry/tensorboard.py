"""The sink `tensorboard`: scalars as event files in <run folder>/tensorboard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdlarge.telemetry.sinks import Sink, SinkRun
from hvdlarge.telemetry.tags import tags

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard(Sink):
    """Writes the figures of each record by their tags (tags.py).

    Each start and each rollback begins an event file with the first step that is taken again, from
    which TensorBoard hides what earlier files hold of that step and of later ones.

    Args:
        folder: where the event files go; default: tensorboard in the run folder.
    """

    package = "tensorboard"

    def __init__(self, folder: str | None = None) -> None:
        self._given = folder

    def start(self, run: SinkRun) -> None:
        """Begin an event file at the first step of this start."""
        self._folder = run.folder / "tensorboard" if self._given is None else Path(self._given)
        self._writer = self._open(run.step)

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Write the scalars; they are in the file when this returns."""
        for tag, value in tags(record).items():
            self._writer.add_scalar(tag, value, record["step"], record["time"])
        self._writer.flush()

    def roll_back(self, step: int, offsets: Mapping[str, int]) -> None:
        """Begin another event file at `step`."""
        self._writer.close()
        self._writer = self._open(step)

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()

    def _open(self, step: int) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder), purge_step=step)
