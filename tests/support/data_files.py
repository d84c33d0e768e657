"""Small data files in the official formats, with random content."""

import gzip
import struct

import numpy as np


def write_mnist(folder, samples=20, test_samples=10, packed=False, seed=0):
    """MNIST's four IDX files; returns pixels and labels of both parts."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, parts = np.random.default_rng(seed), []
    for part, count in (("train", samples), ("t10k", test_samples)):
        pixels = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = rng.integers(10, size=count, dtype=np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte", pixels, packed)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels, packed)
        parts.append((pixels, labels))
    return parts


def write_idx(path, values, packed=False):
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    content = header + values.tobytes()
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def write_cifar(folder, classes=10, samples=20, test_samples=10, pickled=False, seed=0):
    """CIFAR's files, in the folder of the official archive; returns pixels and labels of both parts."""
    kind = ("python" if pickled else "binary") if classes == 100 else ("py" if pickled else "bin")
    place = folder / (f"cifar-100-{kind}" if classes == 100 else f"cifar-10-batches-{kind}")
    place.mkdir(parents=True, exist_ok=True)
    train = ["train"] if classes == 100 else [f"data_batch_{n}" for n in range(1, 6)]
    test = "test" if classes == 100 else "test_batch"
    rng, parts = np.random.default_rng(seed), []
    for names, count in ((train, samples // len(train)), ([test], test_samples)):
        pixels = rng.integers(256, size=(len(names), count, 3072), dtype=np.uint8)
        labels = rng.integers(classes, size=(len(names), count))
        for name, image, label in zip(names, pixels, labels, strict=True):
            if pickled:
                (place / name).write_bytes(pickled_batch(image, label.tolist(), classes))
            else:
                (place / f"{name}.bin").write_bytes(binary_batch(image, label, classes))
        parts.append((pixels.reshape(-1, 3, 32, 32), labels.reshape(-1)))
    return parts


def binary_batch(pixels, labels, classes=10):
    columns = [labels[:, None], pixels]
    if classes == 100:
        columns.insert(0, labels[:, None] // 5)  # the coarse label
    return np.concatenate(columns, axis=1).astype(np.uint8).tobytes()


def pickled_batch(pixels, labels, classes=10):
    """A batch as Python 2 pickled it, by protocol 2: texts are byte strings, the array is numpy's."""
    count = len(labels)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        + b"K\x00\x85"
        + _text(b"b")
        + b"\x87R("
        + b"K\x01"
        + _int(count)
        + _int(pixels.shape[1])
        + b"\x86"
        + b"cnumpy\ndtype\n"
        + _text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + _text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + b"T"
        + struct.pack("<i", pixels.size)
        + pixels.tobytes()
        + b"tb"
    )
    names = b"](" + b"".join(_text(b"image_s_%06d.png" % n) for n in range(count)) + b"e"
    items = [(b"batch_label", _text(b"training batch")), (b"data", array), (b"filenames", names)]
    if classes == 100:
        items.append((b"coarse_labels", _list([label // 5 for label in labels])))
    items.append((b"fine_labels" if classes == 100 else b"labels", _list(labels)))
    body = b"".join(_text(key) + value for key, value in items)
    return b"\x80\x02}(" + body + b"u."


def _text(value):
    return b"U" + bytes([len(value)]) + value


def _int(value):
    return b"J" + struct.pack("<i", value)


def _list(values):
    return b"](" + b"".join(map(_int, values)) + b"e"
