"""Measures how fast micro-batches are read from sets in memory and from memory-mapped files, beside
plain numpy: `python benchmarks/reading.py FOLDER`.

Random CIFAR-10 files, 184 MB, are written to the folder first. Both sides of a row read the same
random micro-batches in turns; MB are those of the files' values. Everything is in the page cache.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hvdlarge.data.cifar import cifar10
from hvdlarge.data.loader import MicroBatchDataset
from hvdlarge.data.npy import npy
from hvdlarge.schedule.batch import MicroBatch

_SIZE, _BATCHES, _ROUNDS = 256, 60, 9


def main(folder: Path) -> None:
    """Write the files, and print one row per form."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        records = rng.integers(10, size=(10_000, 3073), dtype=np.uint8)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    start = time.perf_counter()
    in_memory, _ = cifar10(str(folder))
    seconds = time.perf_counter() - start
    print(f"cifar10() reads its six files: {184.38 / seconds:,.0f} MB/s")
    pixels, labels = in_memory.inputs.numpy(), in_memory.targets.numpy()
    for kind, values in (("bytes", pixels), ("float32", pixels / np.float32(255))):
        (folder / kind).mkdir(exist_ok=True)
        np.save(folder / kind / "train_inputs.npy", values)
        np.save(folder / kind / "train_targets.npy", labels)
    mapped_bytes, mapped = (npy(str(folder / kind))[0] for kind in ("bytes", "float32"))
    plain_bytes, plain = (
        np.load(folder / kind / "train_inputs.npy", mmap_mode="r") for kind in ("bytes", "float32")
    )

    def scaled(indices: np.ndarray) -> object:
        return torch.from_numpy(plain_bytes[indices] / np.float32(255)), labels[indices]

    def unscaled(indices: np.ndarray) -> object:
        return torch.from_numpy(plain[indices]), labels[indices]

    row("cifar10, in memory", in_memory, scaled, pixels.nbytes / len(pixels))
    row("npy of bytes, mapped", mapped_bytes, scaled, pixels.nbytes / len(pixels))
    row("npy of float32, mapped", mapped, unscaled, plain.nbytes / len(plain))


def row(
    name: str, dataset: object, other: Callable[[np.ndarray], object], sample_bytes: float
) -> None:
    """Read in turns as the engine does and with numpy, and print both speeds."""
    engine = MicroBatchDataset(dataset, 0, shuffled=True)
    batches = [MicroBatch(0, i * _SIZE, (i + 1) * _SIZE) for i in range(_BATCHES)]
    indices = [engine.indices(batch) for batch in batches]
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS):
        for side, reads in enumerate(
            (lambda: [engine[batch] for batch in batches], lambda: [other(i) for i in indices])
        ):
            start = time.perf_counter()
            reads()
            seconds[side].append(time.perf_counter() - start)
    megabytes = _BATCHES * _SIZE * sample_bytes / 1e6
    ours, theirs = (megabytes / statistics.median(side) for side in seconds)
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    print(f"{name:24}{ours:8,.0f} MB/s   numpy {theirs:8,.0f} MB/s   {ratio:.0%}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
