"""Folders of images, one per class."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from hvdlarge.config import registry
from hvdlarge.data import image_folder as module
from hvdlarge.data.files import DataFileError
from hvdlarge.data.image_folder import UndecodableImage, decode, image_folder
from hvdlarge.data.npy import npy
from hvdlarge.data.packing import Source, pack
from hvdlarge.data.samples import SampleForm
from hvdlarge.exits import JobError


def encoded(seed=0, size=(40, 30), kind="PNG", mode="RGB"):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(256, size=(size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size).convert(mode)
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


FILES = {
    "train/cat/b.png": encoded(1),
    "train/cat/a.JPG": encoded(2, (30, 50), "JPEG"),
    "train/ant/z.gif": encoded(3, kind="GIF", mode="P"),
    "train/ant/10.png": encoded(4, mode="L"),
    "train/ant/9.png": encoded(5, mode="RGBA"),
    "train/ant/.hidden.png": encoded(6),
    "train/ant/notes.txt": b"no image",
    "val/cat/x.jpeg": encoded(7, (64, 20), "JPEG", "CMYK"),
}


@pytest.fixture
def folder(tmp_path):
    top = tmp_path / "images"
    for name, content in FILES.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return top


def small(folder, **arguments):
    return image_folder(
        **{"folder": str(folder), "size": 14, "cache": str(folder.parent / "cache")} | arguments
    )


def test_classes_and_files_are_sorted_by_name(folder):
    train, test = small(folder)
    assert [name.rpartition("/")[2] for name in train._files] == [
        "10.png", "9.png", "z.gif", "a.JPG", "b.png",
    ]  # fmt: skip
    assert [target for _, target in (train[i] for i in range(5))] == [0, 0, 0, 1, 1]
    assert [test[0][1], len(test)] == [1, 1]
    for index in range(5):
        image, _ = train[index]
        assert image.shape == (3, 14, 14)
        assert image.dtype == torch.float32
        assert 0 <= image.min() < image.max() <= 1
    grey = train[0][0]
    assert torch.equal(grey[0], grey[1])


def test_the_shorter_side_is_resized_and_the_middle_cropped(tmp_path):
    stripes = np.zeros((20, 60, 3), np.uint8)
    stripes[:, 20:40] = 200  # the middle third
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    Image.fromarray(stripes.transpose(1, 0, 2)).save(tmp_path / "high.png")
    for name in ("wide.png", "high.png"):
        pixels = decode(tmp_path / name, 16, 20)
        assert pixels.shape == (3, 16, 16)
        assert (pixels == 200).all()
    assert np.array_equal(
        decode(tmp_path / "wide.png", 20, 20), decode(tmp_path / "wide.png", 20, 20)
    )
    assert (decode(tmp_path / "wide.png", 3, 7) == 200).all()


def test_a_test_set_is_optional(folder):
    assert small(folder, test=None)[1] is None


def damage(folder):
    (folder / "train/ant/9.png").write_bytes(FILES["train/ant/9.png"][:60])
    (folder / "train/cat/a.JPG").write_bytes(b"")


def test_stop_names_the_first_image_that_is_read(folder):
    damage(folder)
    train, _ = small(folder)
    assert len(train) == 5
    train[0]
    with pytest.raises(UndecodableImage, match=r"ant/9\.png cannot be decoded: "):
        train[1]
    with pytest.raises(UndecodableImage, match=r"cat/a\.JPG cannot be decoded: cannot identify"):
        train[3]


def test_an_error_of_the_system_is_not_one_of_the_image(folder):
    train, _ = small(folder)
    (folder / "train/ant/9.png").unlink()
    with pytest.raises(FileNotFoundError):
        train[1]


def test_refuse_names_and_counts_them_before_the_run(folder):
    small(folder, undecodable="refuse")
    damage(folder)
    problem = r"image_folder: 2 of the 5 images in .*train cannot be decoded: .*9\.png, .*a\.JPG"
    arguments = {"folder": str(folder), "undecodable": "refuse", "cache": str(folder / "cache")}
    with pytest.raises(JobError, match=problem):
        registry.instantiate("data.name", "image_folder", arguments, registry.DATA_SETS)


def test_skip_leaves_them_out_and_decodes_once(folder, monkeypatch):
    damage(folder)
    for call in range(2):
        with pytest.warns(UserWarning, match=r"2 of the 5 .* they are left out"):
            train, _ = small(folder, undecodable="skip")
        assert [train[index][1] for index in range(len(train))] == [0, 0, 1]
        if call == 0:
            monkeypatch.setattr(module, "ThreadPoolExecutor", None)  # would be called to decode
    (folder / "train/ant/9.png").write_bytes(FILES["train/ant/9.png"])
    with pytest.raises(TypeError):
        small(folder, undecodable="skip")


@pytest.mark.parametrize("content", [b"", b"[7]", b"[true]", b"{", b"3"])
def test_a_damaged_record_is_made_again(folder, content):
    damage(folder)
    with pytest.warns(UserWarning, match="left out"):
        small(folder, undecodable="skip", test=None)
    (record,) = (folder.parent / "cache").iterdir()
    record.write_bytes(content)
    with pytest.warns(UserWarning, match="2 of the 5"):
        assert len(small(folder, undecodable="skip", test=None)[0]) == 3
    assert record.read_bytes() == b"[1, 3]"


def test_nothing_left_is_an_error(folder):
    (folder / "val/cat/x.jpeg").write_bytes(b"no image")
    with pytest.raises(DataFileError, match="1 of the 1 images in .*val.*: nothing is left"):
        small(folder, undecodable="skip")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"train": "missing"}, "there is no folder .*missing: it must hold a folder of images per"),
        ({"test": "train/cat"}, "cat holds no folders: one per class is expected"),
        ({"size": 0}, "size must be at least 1"),
        ({"size": 20, "resize": 19}, "resize at least size"),
        ({"undecodable": "ignore"}, "undecodable is one of stop, refuse, skip, not 'ignore'"),
    ],
)
def test_wrong_arguments_are_refused(folder, arguments, problem):
    with pytest.raises(ValueError, match=problem):
        small(folder, **arguments)


def test_empty_folders_and_unknown_classes_are_refused(folder):
    (folder / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(DataFileError, match=r"empty holds no images: files named \*\.jpg, "):
        small(folder, test="empty")
    (folder / "val" / "dog").mkdir()
    with pytest.raises(DataFileError, match="val/dog is none of the 2 classes"):
        small(folder)


def test_images_are_packed_as_bytes_and_read_as_before(folder, tmp_path):
    train, _ = small(folder)
    pack({"train": Source(train, SampleForm(), 0)}, tmp_path / "out", {}, lambda *_: None)
    assert np.load(tmp_path / "out" / "train_inputs.npy").dtype == np.uint8
    packed, _ = npy(str(tmp_path / "out"))
    for index in range(5):
        assert torch.equal(packed[index][0], train[index][0])
        assert int(packed[index][1]) == train[index][1]
