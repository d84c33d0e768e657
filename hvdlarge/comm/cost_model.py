"""A cost model of all-reduce on p workers, in seconds.

Formula:  one message of n bytes, with a seconds for each message on one worker, h for each hop from
          one worker to another, and c(n) for passing n bytes over a link:

              ring  a + 2(p − 1)·h + 2(p − 1)/p·c(n)
              tree  a + 2⌈log2 p⌉·h + 2·c(n)

          on m hosts of g workers each, with their own h and c within (w) and between (e) hosts:

              hierarchical  a + 2(g − 1)·h_w + 2(g − 1)/g·c_w(n)
                              + 2⌈log2 m⌉·h_e + 2(m − 1)/m·c_e(n)

          The messages of a step follow each other, and each step waits for Horovod once (`cycle`).
          c is measured, and linear between the measured sizes: bytes that fit into a cache are
          cheaper than others.
Source:   Patarasuk, Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations"
          (2009): ring; Sanders, Speck, Träff, "Two-tree algorithms for full bandwidth broadcast,
          reduction and scan" (2009): tree; Thakur, Rabenseifner, Gropp, "Optimization of collective
          communication operations in MPICH" (2005): the terms. Hierarchical: what Horovod does with
          HOROVOD_HIERARCHICAL_ALLREDUCE=1; reduce-scatter and all-gather within a host, and
          between hosts the bytes of all its workers over its one link.
Contract: pure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

ALGORITHMS = ("fastest", "ring", "tree", "hierarchical")


@dataclass(frozen=True)
class Link:
    """The cost of passing on a message.

    >>> Link(1e-6, ((1000, 1e-3), (2000, 3e-3))).carry(1500)
    0.002
    """

    hop_seconds: float  # h
    carried: tuple[tuple[int, float], ...]  # n and c(n), by n

    def carry(self, size: float) -> float:
        """c, in seconds; in proportion to `size` below the first and above the last size."""
        points = self.carried
        for (small, less), (large, more) in itertools.pairwise(((0, 0.0), *points)):
            if size <= large:
                return less + (size - small) / (large - small) * (more - less)
        largest, seconds = points[-1]
        return seconds * size / largest


@dataclass(frozen=True)
class AllreduceCost:
    """What `hvdlarge.bench allreduce` measures.

    >>> link = Link(hop_seconds=1e-3, carried=((1_000_000, 1e-3),))
    >>> cost = AllreduceCost(cycle_seconds=0.0, message_seconds=0.0, within=link, between=link)
    >>> cost.seconds(1_000_000, messages=1, workers=2, workers_per_host=2, algorithm="ring")
    0.003
    """

    cycle_seconds: float  # of each step, whatever it sends
    message_seconds: float  # a
    within: Link  # from one worker of a host to another
    between: Link  # from host to host

    def seconds(
        self,
        size: int,
        messages: int,
        workers: int,
        workers_per_host: int,
        algorithm: str = "fastest",
    ) -> float:
        """Seconds of the sums of one step.

        Args:
            size: bytes of all messages together.
            messages: number of messages, taken as equally long.
            workers: p; 1 has nothing to send.
            workers_per_host: g; hosts are filled one after another.
            algorithm: one of ALGORITHMS; `fastest` takes the faster of ring and tree for each
                message, as NCCL and MPI libraries try to.

        Raises:
            ValueError: for an unknown algorithm.
        """
        if algorithm not in ALGORITHMS:
            raise ValueError(f"unknown algorithm {algorithm!r}; there are {', '.join(ALGORITHMS)}")
        if workers == 1 or messages == 0:
            return 0.0
        each = size / messages
        if algorithm == "hierarchical":
            passed = self._hierarchical(each, workers, workers_per_host)
        else:
            # A ring over several hosts is as fast as its slowest link, and so is a tree
            link = self.within if workers <= workers_per_host else self.between
            ways = {"ring": ring_seconds(link, each, workers)}
            ways["tree"] = tree_seconds(link, each, workers)
            passed = ways.get(algorithm, min(ways.values()))
        return self.cycle_seconds + messages * (self.message_seconds + passed)

    def _hierarchical(self, size: float, workers: int, workers_per_host: int) -> float:
        local = min(workers, workers_per_host)
        hosts = -(-workers // workers_per_host)
        within, between = self.within, self.between
        return ring_seconds(within, size, local) + (
            2 * depth(hosts) * between.hop_seconds + 2 * (hosts - 1) / hosts * between.carry(size)
        )


def ring_seconds(link: Link, size: float, workers: int) -> float:
    """Seconds that a message of `size` bytes spends on the links of a ring."""
    return 2 * (workers - 1) * (link.hop_seconds + link.carry(size) / workers)


def tree_seconds(link: Link, size: float, workers: int) -> float:
    """Seconds that a message of `size` bytes spends on the links of two trees, pipelined."""
    if workers == 1:
        return 0.0
    return 2 * depth(workers) * link.hop_seconds + 2 * link.carry(size)


def depth(workers: int) -> int:
    """⌈log2 p⌉, the height of a binary tree of p workers."""
    return math.ceil(math.log2(workers))


@dataclass(frozen=True)
class AllreduceTimes:
    """Measured times, in seconds."""

    workers: int
    one: float  # a step with one message of 4 bytes
    many: float  # a step with `messages` messages of 4 bytes each
    messages: int
    control: float  # a message of 8 bytes without Horovod
    by_size: Mapping[int, float]  # a step with one message of so many bytes


def fit(times: AllreduceTimes) -> tuple[float, float, Link]:
    """The cost that explains measured times: cycle, message and link, none below 0.

    The hop is that of the message without Horovod; what one more message takes beyond it is the
    message's own cost, and what a step with a single one takes beyond both is the cycle. What a
    message takes beyond a short one is for its bytes; a longer message never takes less.

    Raises:
        ValueError: for fewer than two workers or messages, or no size.
    """
    if times.workers < 2 or times.messages < 2 or not times.by_size:
        raise ValueError("a fit needs two workers, two messages and a size at least")
    hops = 2 * depth(times.workers)
    another = max(0.0, (times.many - times.one) / (times.messages - 1))
    hop = min(times.control, another) / hops
    message = another - hops * hop
    cycle = max(0.0, times.one - another)
    passed = 2 * (times.workers - 1) / times.workers
    carried, most = [], 0.0
    for size, seconds in sorted(times.by_size.items()):
        most = max(most, (seconds - cycle - another) / passed)
        carried.append((size, most))
    return cycle, message, Link(hop, tuple(carried))
