"""From decided micro-batches to tensors in memory, in the order of the step.

Two forms with the same calls: `TensorLoader` for sets that hold tensors, and `WorkerLoader`,
torch's `DataLoader` with its worker processes, for every other map-style set. A rank fetches its
own micro-batches only.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from hvdlarge.data import order, seeds
from hvdlarge.data.in_memory import reads_batches, reads_many
from hvdlarge.data.rng import seed_all
from hvdlarge.schedule.batch import MicroBatch

_PATIENCE_SECONDS = 5.0  # torch's own, for its processes


class LoadedMicroBatch(NamedTuple):
    """A micro-batch with its tensors."""

    micro_batch: MicroBatch
    inputs: Any  # a tensor (n, …), or whatever the set's inputs collate to
    targets: Any  # a tensor (n, …), likewise


class Loader(Protocol):
    """What the loop asks of a loader."""

    def enqueue(self, micro_batches: Sequence[MicroBatch], is_last: bool) -> None:
        """Take note of this worker's micro-batches of a coming step; `is_last` when no step follows
        it.
        """
        ...

    def fetch(self, count: int) -> Iterator[LoadedMicroBatch]:
        """The next `count` announced micro-batches, in order; each is waited for when it is asked
        for.
        """
        ...

    def close(self) -> None:
        """Let go of threads and processes; nothing is fetched afterwards."""
        ...


class MicroBatchDataset(Dataset):
    """A data set whose indices are micro-batches: what a loader process runs.

    Args:
        dataset: map-style, of pairs (input, target).
        seed: of the run.
        shuffled: whether a micro-batch counts samples of the run's stream (training) or of the set
            itself (evaluation).
    """

    def __init__(self, dataset: Any, seed: int, shuffled: bool) -> None:
        self._size = len(dataset)
        self._chosen: list[Sequence[int]] = []
        # Its own way to many samples would draw for the micro-batch. A class below it may read
        # samples in another way.
        while type(dataset) is Subset:
            self._chosen.append(dataset.indices)
            dataset = dataset.dataset
        self._dataset = dataset
        self._reads_batches, self._reads_many = reads_batches(dataset), reads_many(dataset)
        self._seed = seed
        self._shuffled = shuffled
        self._stream = order.Stream(seed, self._size)

    def __getitem__(self, micro_batch: MicroBatch | None) -> LoadedMicroBatch | None:
        # A hole: nothing was known to be fetched when this place in the queue came up
        if micro_batch is None:
            return None
        indices = self._through_subsets(self.indices(micro_batch))
        # Whatever a set draws for a sample belongs to the sample: not to the rank, nor to the
        # process that loads it. A set that gives many samples at once draws for the micro-batch,
        # under the key of its first sample.
        if self._reads_batches or self._reads_many:
            seed_all(seeds.key(self._seed, seeds.SAMPLE, micro_batch.start))
        if self._reads_batches:
            return LoadedMicroBatch(micro_batch, *self._dataset.batch(torch.from_numpy(indices)))
        if self._reads_many:
            pairs = self._dataset.__getitems__(indices.tolist())
        else:
            pairs = []
            for key, index in zip(self._keys(micro_batch), indices.tolist(), strict=True):
                seed_all(key)
                pairs.append(self._dataset[index])
        inputs, targets = default_collate(pairs)
        return LoadedMicroBatch(micro_batch, inputs, targets)

    def indices(self, micro_batch: MicroBatch) -> np.ndarray:
        """Data-set indices of a micro-batch's samples, shape (n,)."""
        if self._shuffled:
            return self._stream.samples(micro_batch.start, micro_batch.stop)
        return np.arange(micro_batch.start, micro_batch.stop, dtype=np.int64)

    def _through_subsets(self, indices: np.ndarray) -> np.ndarray:
        for chosen in self._chosen:
            indices = np.array([chosen[index] for index in indices], dtype=np.int64)
        return indices

    def _keys(self, micro_batch: MicroBatch) -> list[int]:
        samples = np.arange(micro_batch.start, micro_batch.stop, dtype=np.int64)
        return (seeds.keys(self._seed, seeds.SAMPLE, samples) >> np.uint64(1)).tolist()


class TensorLoader:
    """Indexes a set of tensors when a micro-batch is asked for."""

    def __init__(self, fetch: MicroBatchDataset) -> None:
        self._fetch = fetch
        self._announced: deque[MicroBatch] = deque()

    def enqueue(self, micro_batches: Sequence[MicroBatch], is_last: bool) -> None:
        """Remember these micro-batches."""
        self._announced.extend(micro_batches)

    def fetch(self, count: int) -> Iterator[LoadedMicroBatch]:
        """The next `count` announced micro-batches, in order."""
        for _ in range(count):
            loaded = self._fetch[self._announced.popleft()]
            assert loaded is not None
            yield loaded

    def close(self) -> None:
        """Nothing to let go of."""


class _Announced:
    """The live list of micro-batches that torch's DataLoader reads ahead of the training.

    It must never wait: a worker that waited here for a decision could hold up the very allreduce
    that rank 0 is waiting in before it decides. Where nothing is known yet it gives a hole, which
    costs nothing and is passed over.
    """

    def __init__(self) -> None:
        self.micro_batches: deque[MicroBatch] = deque()
        self.complete = False

    def __iter__(self) -> Iterator[MicroBatch | None]:
        while True:
            # Before the list, which another thread fills before it says so
            complete = self.complete
            if self.micro_batches:
                yield self.micro_batches.popleft()
            elif complete:
                return
            else:
                yield None


class WorkerLoader:
    """torch's DataLoader over announced micro-batches.

    A loader process hands its tensors over by file descriptors, which takes some 2 ms for a
    micro-batch however small it is. So where there are loader processes a thread takes them over,
    ahead of the training; without any, samples are loaded when they are asked for.

    Args:
        fetch: the set.
        num_workers: loader processes; 0 loads in this process.
        prefetch_factor: micro-batches in hand for each loader process; the thread holds as many
            again.
    """

    def __init__(self, fetch: MicroBatchDataset, num_workers: int, prefetch_factor: int) -> None:
        self._announced = _Announced()
        self._loader: DataLoader | None = make_dataloader(
            fetch, self._announced, num_workers, prefetch_factor
        )
        self._loaded: Iterator[LoadedMicroBatch | None] | None = None
        self._thread: threading.Thread | None = None
        self._wanted = threading.Semaphore(0)  # announced and not yet taken over
        # Free places for what is taken over and not yet asked for
        self._room = threading.Semaphore(num_workers * prefetch_factor)
        self._ready: queue.SimpleQueue[LoadedMicroBatch | BaseException] = queue.SimpleQueue()
        self._has_processes = num_workers > 0
        self._processes: set[multiprocessing.process.BaseProcess] = set()
        self._closed = False

    def enqueue(self, micro_batches: Sequence[MicroBatch], is_last: bool) -> None:
        """Put these micro-batches into the queue of the loader processes."""
        self._announced.micro_batches.extend(micro_batches)
        self._announced.complete = is_last
        if micro_batches:
            self._wanted.release(len(micro_batches))

    def fetch(self, count: int) -> Iterator[LoadedMicroBatch]:
        """The next `count` announced micro-batches, in order; waits for the loader processes.

        Raises:
            Exception: whatever the set raised in its process.
        """
        if self._loaded is None:
            self._begin()
        for _ in range(count):
            if not self._has_processes:
                yield self._next()
                continue
            taken = self._ready.get()
            if isinstance(taken, BaseException):
                # The message has the process's traceback. The thread's own would keep torch's
                # iterator, and its processes, alive.
                raise taken.with_traceback(None)
            self._room.release()
            yield taken

    def close(self) -> None:
        """End the thread and the loader processes. A micro-batch that is being loaded is waited
        for, but not for long.
        """
        atexit.unregister(self.close)
        self._closed = True
        if self._thread is not None:
            self._wanted.release()
            self._room.release()
            self._thread.join(_PATIENCE_SECONDS)
            if self._thread.is_alive():  # it waits for a sample that takes long
                for process in self._processes:
                    process.kill()  # torch sees that within its patience, and tells the thread
                self._thread.join()
        # torch ends its processes when nobody holds them, which the thread did
        self._loaded = self._loader = None

    def _begin(self) -> None:
        assert self._loader is not None  # nothing is fetched from a closed loader
        before = set(multiprocessing.active_children())
        self._loaded = iter(self._loader)
        if self._has_processes:
            # Before multiprocessing waits, at the interpreter's end, for processes that this thread
            # would keep alive.
            atexit.register(self.close)
            self._processes = set(multiprocessing.active_children()) - before
            self._thread = threading.Thread(target=self._take_over, name="loader", daemon=True)
            self._thread.start()

    def _take_over(self) -> None:
        try:
            while True:
                self._wanted.acquire()
                self._room.acquire()
                if self._closed:
                    return
                self._ready.put(self._next())
        except BaseException as error:  # whatever it is: the training raises it
            self._ready.put(error)

    def _next(self) -> LoadedMicroBatch:
        assert self._loaded is not None  # begun
        while (loaded := next(self._loaded)) is None:
            pass
        return loaded


def make_dataloader(
    fetch: MicroBatchDataset, micro_batches: Any, num_workers: int, prefetch_factor: int
) -> DataLoader:
    """A torch DataLoader whose items are micro-batches as they are; `micro_batches` gives the
    indices.
    """
    return DataLoader(
        fetch,
        batch_size=None,
        sampler=micro_batches,
        collate_fn=_unchanged,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),  # copies to a GPU then go on beside its work
        multiprocessing_context=_context() if num_workers else None,
        worker_init_fn=_start_worker if num_workers else None,
    )


def _context() -> Any:
    # A process that has started MPI must not be forked: InfiniBand's pinned pages and MPI's locks
    # do not survive it. The server that forks in its place imports torch once for all.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(number: int) -> None:
    # A launcher forwards these to whole process groups; they are for the training process, which
    # stops in order.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)
    # torch looks for a new parent to see that the training process is gone; under forkserver the
    # parent stays the same.
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
