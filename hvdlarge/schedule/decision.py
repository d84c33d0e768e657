"""The decision for one step, made on rank 0 and followed by every worker.

Formula:  one fixed record, little endian; float64 fields travel as their bits, so every rank has
          the very same lr.
Source:   docs/design.md.
Contract: pure; `from_bytes(decision.to_bytes()) == decision`, bit for bit.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """What the controller orders for one step."""

    step: int  # this step's number; the first is 0
    samples_seen: int  # samples, before this step
    epoch: float  # epochs, before this step
    stage: int  # index; within a stage the batch is constant
    stage_batch: int  # samples per update in this stage
    global_batch: int  # samples averaged in this step: stage_batch, or what is left of the run
    micro_batch: int  # samples in one forward/backward pass
    lr: float  # of this step
    is_last: bool  # whether the run ends with this step

    def to_bytes(self) -> bytes:
        """The record that travels."""
        return _RECORD.pack(*self.to_plain().values())

    def to_plain(self) -> dict[str, int | float | bool]:
        """Its fields by name."""
        # All of them are numbers: dataclasses.asdict would take ten times as long to find out
        return dict(vars(self))

    @classmethod
    def from_bytes(cls, record: bytes) -> Decision:
        """The decision in a record.

        Raises:
            ValueError: if the bytes are not such a record.
        """
        try:
            return cls(*_RECORD.unpack(record))
        except struct.error as error:
            raise ValueError(f"not a decision record of {_RECORD.size} bytes: {error}") from None


_RECORD = struct.Struct("<qqdqqqqd?")
DECISION_BYTES = _RECORD.size
