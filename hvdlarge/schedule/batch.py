"""How a step's samples are cut into micro-batches and dealt to the workers: the one place of the
batch arithmetic.

Formula:  global_batch = Σ over workers of (micro-batches of that worker × their sizes),
          e.g. 8192 = 64 × 2 × 64;
          M = ⌈global_batch / micro_batch⌉ micro-batches; worker r of n takes those from ⌊r·M/n⌋ to
          ⌊(r+1)·M/n⌋ − 1
Source:   docs/design.md.
Contract: pure. Micro-batches belong to the step and not to the worker: their limits do not depend
          on the number of workers, unless `batch.micro: auto` derives their size from it. Each
          worker's micro-batches are consecutive, and two workers never differ by more than one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class MicroBatch(NamedTuple):
    """One forward/backward pass: samples `start` … `stop` − 1 of the stream (or of an evaluation
    set).
    """

    number: int  # place in its step, 0 … M − 1
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Samples in it."""
        return self.stop - self.start


@dataclass(frozen=True)
class BatchLayout:
    """The micro-batches of one step on `world_size` workers.

    Raises:
        ValueError: for sizes below 1.

    >>> layout = BatchLayout(global_batch=8192, micro_batch=64, world_size=64)
    >>> layout.equation()
    '8192 = 64 × 2 × 64'
    >>> BatchLayout(100, 16, 3).of_rank(2, start=1000)[-1]
    MicroBatch(number=6, start=1096, stop=1100)
    """

    global_batch: int  # samples
    micro_batch: int  # samples
    world_size: int  # workers

    def __post_init__(self) -> None:
        for name in ("global_batch", "micro_batch", "world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def num_micro_batches(self) -> int:
        """M, of all workers together."""
        return -(-self.global_batch // self.micro_batch)

    def numbers_of_rank(self, rank: int) -> range:
        """The numbers of the micro-batches of one worker; empty for an idle one."""
        count = self.num_micro_batches
        return range(rank * count // self.world_size, (rank + 1) * count // self.world_size)

    def of_rank(self, rank: int, start: int) -> list[MicroBatch]:
        """The micro-batches of one worker in a step whose first sample is number `start`."""
        return [self._micro_batch(number, start) for number in self.numbers_of_rank(rank)]

    def samples_of_ranks(self) -> list[int]:
        """How many samples each worker has in this step."""
        ends = [
            min(self.numbers_of_rank(rank).stop * self.micro_batch, self.global_batch)
            for rank in range(self.world_size)
        ]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of the busiest worker."""
        return -(-self.num_micro_batches // self.world_size)

    @property
    def idle_workers(self) -> int:
        """Workers without a micro-batch in this step."""
        return max(0, self.world_size - self.num_micro_batches)

    def equation(self) -> str:
        """The identity as arithmetic: micro-batch × accumulation steps × workers, or its terms
        where they are uneven.
        """
        if self.global_batch == self.micro_batch * self.accumulation_steps * self.world_size:
            return (
                f"{self.global_batch} = {self.micro_batch} × {self.accumulation_steps} × "
                f"{self.world_size}"
            )
        terms = "+".join(
            f"{count}×{workers}" if workers > 1 else f"{count}" for count, workers in self._deal()
        )
        full, rest = divmod(self.global_batch, self.micro_batch)
        cut = f"{self.micro_batch} × {full}" + (f" + {rest}" if rest else "")
        return (
            f"{self.global_batch} = {cut if full else rest}, dealt {terms} to {self.world_size} "
            "workers"
        )

    def _deal(self) -> Iterator[tuple[int, int]]:
        """(micro-batches, number of workers that have so many), the busiest first, idle workers
        left out.
        """
        count, more = divmod(self.num_micro_batches, self.world_size)
        for each, workers in ((count + 1, more), (count, self.world_size - more)):
            if each and workers:
                yield each, workers

    def _micro_batch(self, number: int, start: int) -> MicroBatch:
        first = number * self.micro_batch
        return MicroBatch(
            number, start + first, start + min(first + self.micro_batch, self.global_batch)
        )
