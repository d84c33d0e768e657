"""Loads this rank's micro-batches as tensors, in the order of the step.

Two implementations of one interface: `TensorLoader` for data sets held as tensors, and
`WorkerLoader`, torch's `DataLoader` with worker processes, for every other map-style data set.
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
from torch.utils.data import DataLoader, Dataset, Subset

from hvdlarge.data import order, seeds
from hvdlarge.data.in_memory import reads_batches, reads_many
from hvdlarge.data.lanes import Lanes
from hvdlarge.data.rng import seed_all
from hvdlarge.data.samples import SampleForm
from hvdlarge.schedule.batch import MicroBatch

_JOIN_SECONDS = 5.0  # as torch waits for its own worker processes


class LoadedMicroBatch(NamedTuple):
    """A micro-batch with its tensors."""

    micro_batch: MicroBatch
    inputs: Any  # a tensor, shape (n, …), or what the inputs collate to
    targets: Any  # likewise; Targets.WHOLE_BATCH if the samples have no separate targets


class Loader(Protocol):
    """Loads announced micro-batches in order."""

    def enqueue(self, micro_batches: Sequence[MicroBatch], is_last: bool) -> None:
        """Announce this rank's micro-batches of the next step; `is_last` if no step follows it."""
        ...

    def fetch(self, count: int) -> Iterator[LoadedMicroBatch]:
        """The next `count` announced micro-batches, in order; each `next` blocks until one is
        loaded.
        """
        ...

    def read_ahead(self) -> None:
        """Called while the device computes: a loader without processes may read what comes next."""
        ...

    def close(self) -> None:
        """Stop threads and processes. `fetch` must not be called afterwards."""
        ...


class MicroBatchDataset(Dataset):
    """A data set whose indices are micro-batches; loader processes run it.

    Args:
        dataset: map-style.
        seed: of the run.
        shuffled: whether a micro-batch numbers samples of the run's shuffled stream (training) or
            of the data set in its own order (evaluation).
        form: how samples become inputs and targets.
        lanes: of a text, in place of both orders.
    """

    def __init__(
        self,
        dataset: Any,
        seed: int,
        shuffled: bool,
        form: SampleForm | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        self._form = form or SampleForm()
        self._size = len(dataset)
        self._subset_indices: list[Sequence[int]] = []
        # Subset.__getitems__ would seed once for the whole micro-batch, not for each sample. A
        # subclass of Subset may override how samples are read, so it is not unwrapped.
        while type(dataset) is Subset:
            self._subset_indices.append(dataset.indices)
            dataset = dataset.dataset
        self._dataset = dataset
        self._reads_batches, self._reads_many = reads_batches(dataset), reads_many(dataset)
        self._seed = seed
        self._in_stream = shuffled or lanes is not None
        self._stream = order.Stream(seed, self._size) if lanes is None else lanes

    def __getitem__(self, micro_batch: MicroBatch | None) -> LoadedMicroBatch | None:
        if micro_batch is None:  # nothing was announced when the DataLoader read ahead
            return None
        indices = self._through_subsets(self.indices(micro_batch))
        # Random draws are keyed by sample, so they depend neither on the rank nor on the process
        # that loads it. Batched access draws once per micro-batch, keyed by its first sample.
        if self._reads_batches or self._reads_many:
            seed_all(seeds.key(self._seed, seeds.SAMPLE, micro_batch.start))
        if self._reads_batches:
            batch = self._dataset.batch(torch.from_numpy(indices))
            return LoadedMicroBatch(micro_batch, *self._form.split(batch))
        if self._reads_many:
            samples = self._dataset.__getitems__(indices.tolist())
        else:
            samples = []
            for key, index in zip(self._keys(micro_batch), indices.tolist(), strict=True):
                seed_all(key)
                samples.append(self._dataset[index])
        return LoadedMicroBatch(micro_batch, *self._form(samples))

    def indices(self, micro_batch: MicroBatch) -> np.ndarray:
        """Data-set indices of the samples of a micro-batch, shape (n,), int64."""
        if self._in_stream:
            return self._stream.samples(micro_batch.start, micro_batch.stop)
        return np.arange(micro_batch.start, micro_batch.stop, dtype=np.int64)

    def _through_subsets(self, indices: np.ndarray) -> np.ndarray:
        for subset in self._subset_indices:
            indices = np.array([subset[index] for index in indices], dtype=np.int64)
        return indices

    def _keys(self, micro_batch: MicroBatch) -> list[int]:
        samples = np.arange(micro_batch.start, micro_batch.stop, dtype=np.int64)
        return (seeds.keys(self._seed, seeds.SAMPLE, samples) >> np.uint64(1)).tolist()


class TensorLoader:
    """Loads each micro-batch on demand, in the training process.

    Args:
        dataset: over a data set held as tensors.
        reads_ahead: whether the next micro-batch is read while a GPU computes; on a CPU that gains
            nothing.
    """

    def __init__(self, dataset: MicroBatchDataset, reads_ahead: bool = False) -> None:
        self._dataset = dataset
        self._announced: deque[MicroBatch] = deque()
        self._reads_ahead = reads_ahead
        self._ahead: LoadedMicroBatch | None = None

    def enqueue(self, micro_batches: Sequence[MicroBatch], is_last: bool) -> None:
        """Announce this rank's micro-batches of the next step."""
        self._announced.extend(micro_batches)

    def fetch(self, count: int) -> Iterator[LoadedMicroBatch]:
        """The next `count` announced micro-batches, in order."""
        for _ in range(count):
            loaded = self._load() if self._ahead is None else self._ahead
            self._ahead = None
            yield loaded

    def read_ahead(self) -> None:
        """See Loader."""
        if self._reads_ahead and self._ahead is None and self._announced:
            self._ahead = self._load()

    def close(self) -> None:
        """Nothing to stop."""

    def _load(self) -> LoadedMicroBatch:
        loaded = self._dataset[self._announced.popleft()]
        assert loaded is not None
        return loaded


class _QueuedMicroBatches:
    """The growing list of micro-batches that torch's DataLoader reads ahead of training.

    Iteration never blocks: a rank that waited here for a decision could deadlock, because rank 0
    decides only after an all-reduce in which it waits for that rank. If nothing is announced yet it
    yields None, which the loader skips.
    """

    def __init__(self) -> None:
        self.micro_batches: deque[MicroBatch] = deque()
        self.complete = False

    def __iter__(self) -> Iterator[MicroBatch | None]:
        while True:
            complete = self.complete  # read first: `enqueue` extends the list before it sets this
            if self.micro_batches:
                yield self.micro_batches.popleft()
            elif complete:
                return
            else:
                yield None


class WorkerLoader:
    """torch's DataLoader over announced micro-batches.

    Receiving a micro-batch from a loader process takes about 2 ms however small it is, since its
    tensors are passed by file descriptors. A thread therefore receives them ahead of training.
    Without loader processes, samples are loaded on demand.

    Args:
        dataset: what is loaded.
        num_workers: loader processes; 0 loads in this process.
        prefetch_factor: micro-batches in flight per loader process; the thread buffers as many
            again.
    """

    def __init__(self, dataset: MicroBatchDataset, num_workers: int, prefetch_factor: int) -> None:
        self._announced = _QueuedMicroBatches()
        self._loader: DataLoader | None = make_dataloader(
            dataset, self._announced, num_workers, prefetch_factor, torch.cuda.is_available()
        )
        self._loaded: Iterator[LoadedMicroBatch | None] | None = None
        self._thread: threading.Thread | None = None
        self._pending = threading.Semaphore(0)  # micro-batches announced but not received
        self._free_slots = threading.Semaphore(num_workers * prefetch_factor)  # of _ready
        self._ready: queue.SimpleQueue[LoadedMicroBatch | BaseException] = queue.SimpleQueue()
        self._has_processes = num_workers > 0
        self._processes: set[multiprocessing.process.BaseProcess] = set()
        self._feeders: list[threading.Thread] = []  # of torch's queues to the processes
        self._closed = False

    def enqueue(self, micro_batches: Sequence[MicroBatch], is_last: bool) -> None:
        """Announce this rank's micro-batches of the next step to the loader processes."""
        self._announced.micro_batches.extend(micro_batches)
        self._announced.complete = is_last
        if micro_batches:
            self._pending.release(len(micro_batches))

    def fetch(self, count: int) -> Iterator[LoadedMicroBatch]:
        """The next `count` announced micro-batches, in order; blocks until each is loaded.

        Raises:
            Exception: whatever the data set raised.
        """
        if self._loaded is None:
            self._start()
        for _ in range(count):
            if not self._has_processes:
                yield self._next()
                continue
            loaded = self._ready.get()
            if isinstance(loaded, BaseException):
                # The message contains the worker's traceback. The thread's traceback would keep
                # torch's iterator, and so its processes, alive.
                raise loaded.with_traceback(None)
            self._free_slots.release()
            yield loaded

    def read_ahead(self) -> None:
        """Nothing to do: the loader processes read ahead by themselves."""

    def close(self) -> None:
        """Stop the thread and the loader processes, within seconds even while a sample loads."""
        atexit.unregister(self.close)
        self._closed = True
        if self._thread is not None:
            self._pending.release()
            self._free_slots.release()
            self._thread.join(_JOIN_SECONDS)
            if self._thread.is_alive():  # blocked on a slow sample
                for process in self._processes:
                    process.kill()  # torch notices within seconds and raises in the thread
                self._thread.join()
        # torch stops its processes once the iterator has no reference left; the thread held one
        self._loaded = self._loader = None
        for thread in self._feeders:  # they hold semaphores until they have ended
            thread.join(_JOIN_SECONDS)

    def _start(self) -> None:
        assert self._loader is not None  # not closed
        before = set(multiprocessing.active_children())
        threads = set(threading.enumerate())
        self._loaded = iter(self._loader)
        if self._has_processes:
            # At interpreter exit, stop the thread before multiprocessing joins the processes that
            # it keeps alive.
            atexit.register(self.close)
            self._processes = set(multiprocessing.active_children()) - before
            started = set(threading.enumerate()) - threads
            self._feeders = [each for each in started if each.name == "QueueFeederThread"]
            self._thread = threading.Thread(target=self._receive, name="loader", daemon=True)
            self._thread.start()

    def _receive(self) -> None:
        try:
            while True:
                self._pending.acquire()
                self._free_slots.acquire()
                if self._closed:
                    return
                self._ready.put(self._next())
        except BaseException as error:  # `fetch` raises it in the training thread
            self._ready.put(error)

    def _next(self) -> LoadedMicroBatch:
        assert self._loaded is not None  # started
        while (loaded := next(self._loaded)) is None:
            pass
        return loaded


def make_dataloader(
    dataset: MicroBatchDataset,
    micro_batches: Any,
    num_workers: int,
    prefetch_factor: int,
    pin_memory: bool = False,
) -> DataLoader:
    """A torch DataLoader that yields one item of `dataset` for each of `micro_batches`.

    Args:
        dataset: what is loaded.
        micro_batches: iterable of micro-batches, the sampler.
        num_workers: loader processes; 0 loads in this process.
        prefetch_factor: micro-batches in flight per loader process.
        pin_memory: whether tensors come in pinned memory, so that copies to the GPU overlap with
            compute.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=micro_batches,
        collate_fn=_unchanged,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        multiprocessing_context=_context() if num_workers else None,
        worker_init_fn=_start_worker if num_workers else None,
    )


def _context() -> Any:
    # A process that has started MPI must not be forked: InfiniBand's pinned pages and MPI's locks
    # do not survive it. The fork server imports torch once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(number: int) -> None:
    # Launchers forward these to the whole process group; only the training process handles them.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)
    # torch detects a dead training process by a changed parent pid, which a forkserver hides.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
