"""Glyphs: the same bytes everywhere, drawn once."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.launching import ROOT

from hvdlarge.config import registry
from hvdlarge.data import glyphs as module
from hvdlarge.data import outlines
from hvdlarge.data.glyphs import CLASSES, draw_samples, glyphs
from hvdlarge.data.outlines import digest, draw, font_files

FONTS = "55f4985c429d4407"  # of the files that matplotlib 3.11 ships


@pytest.fixture(scope="module")
def masters():
    return module._masters(font_files(), 28)


@pytest.fixture
def one_font(monkeypatch):
    """Fewer characters to draw, where only the files matter."""
    monkeypatch.setattr(outlines, "_FONTS", outlines._FONTS[:1])


def small(cache, **arguments):
    return glyphs(**{"samples": 100, "test_samples": 50, "cache": str(cache)} | arguments)


def test_there_are_the_classes_of_emnist_balanced():
    assert len(CLASSES) == len(set(CLASSES)) == 47
    assert registry.training_samples("glyphs", {}) == 60_000
    assert registry.training_samples("glyphs", {"samples": 470}) == 470


def test_both_parts_are_balanced_and_differ(tmp_path, one_font):
    train, test = small(tmp_path, samples=470)
    inputs, targets = train.batch(torch.arange(470))
    assert inputs.shape == (470, 1, 28, 28)
    assert inputs.dtype == torch.float32
    assert 0 <= inputs.min() < 0.1
    assert 0.9 < inputs.max() <= 1
    assert targets.bincount().tolist() == [10] * 47
    assert len(test) == 50
    images = {image.numpy().tobytes() for image in inputs}
    assert len(images | {image.numpy().tobytes() for image, _ in test}) == 520


def test_the_bytes_are_fixed_for_ever(masters):
    # Another result would silently change every published run: raise _RECIPE with it
    if not digest(font_files()).startswith(FONTS):
        pytest.skip("another release of matplotlib ships other fonts")
    pixels, labels = draw_samples(masters, 0, 0, 940, 28)
    assert hashlib.sha256(pixels).hexdigest()[:16] == "4a8de7dafe363be1"
    assert labels[:49].tolist() == [*range(47), 0, 1]


def test_a_sample_does_not_depend_on_how_many_are_drawn(masters, monkeypatch):
    pixels, labels = draw_samples(masters, 3, 1, 120, 20)
    fewer, _ = draw_samples(masters, 3, 1, 50, 20)
    assert np.array_equal(pixels[:50], fewer)
    monkeypatch.setattr(module, "_CHUNK_PIXELS", 7 * 400)
    again, same_labels = draw_samples(masters, 3, 1, 120, 20)
    assert np.array_equal(pixels, again)
    assert np.array_equal(labels, same_labels)


def test_seeds_and_parts_differ(masters):
    first = draw_samples(masters, 0, 0, 47, 28)[0]
    assert (first != draw_samples(masters, 1, 0, 47, 28)[0]).mean() > 0.9
    assert (first != draw_samples(masters, 0, 1, 47, 28)[0]).mean() > 0.9


@pytest.mark.parametrize("size", [8, 33, 96])
def test_any_size_shows_the_characters_in_the_middle(size):
    masters = module._masters(font_files()[:1], size)
    pixels = draw_samples(masters, 0, 0, 470, size)[0][:, 0].astype(float)
    middle = np.median(pixels, axis=(1, 2), keepdims=True)
    ink = np.abs(pixels - middle).mean(axis=0)
    quarter = size // 4
    assert ink[quarter:-quarter, quarter:-quarter].mean() > 1.5 * ink[:quarter].mean()


def test_a_character_is_filled_where_its_outline_winds_around(masters):
    images = draw(font_files()[0], "IOl", 56)
    assert images.shape == (3, 56, 56)
    assert images[0, 28, 28] == 255  # the stem of I
    assert images[1, 28, 28] == 0  # the hole of O
    assert (images[:, 0] == 0).all()
    rows = np.flatnonzero(images[0].max(axis=1))
    assert (rows[0], rows[-1]) == (8, 47)  # 5/7 of the side, in the middle
    assert (masters.reshape(21, 47, -1).max(axis=2) == 255).all()


def test_they_are_drawn_once(tmp_path, one_font, monkeypatch):
    first = small(tmp_path)[0].inputs.clone()
    monkeypatch.setattr(module, "_masters", None)  # would be called to draw
    assert torch.equal(small(tmp_path)[0].inputs, first)
    with pytest.raises(TypeError):
        small(tmp_path, seed=1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert module.cache_folder(None) == tmp_path / "xdg" / "hvdlarge"


@pytest.mark.parametrize("name", ["train_inputs.npy", "test_targets.npy", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["flip", "cut", "lose a line", "remove"])
def test_a_damaged_cache_is_drawn_anew_and_reported(tmp_path, one_font, name, damage):
    whole = small(tmp_path)[0].inputs.clone()
    (folder,) = tmp_path.iterdir()
    content = (folder / name).read_bytes()
    damaged = {
        "flip": bytes([content[0] ^ 1]) + content[1:],
        "cut": content[:200],
        "lose a line": content.partition(b"\n")[2],
    }
    if damage == "remove":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(damaged[damage])
    with pytest.warns(UserWarning, match=f"drawn anew: .*{name}"):
        again = small(tmp_path)[0].inputs
    assert torch.equal(again, whole)
    assert (folder / name).read_bytes() == content
    assert list(tmp_path.iterdir()) == [folder]
    small(tmp_path)  # without a warning


def test_without_a_place_they_stay_in_memory(tmp_path, one_font):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="stay in memory, since .*file/glyphs-.* cannot be writ"):
        train, test = small(tmp_path / "file")
    kept, kept_test = small(tmp_path / "folder")
    indices = torch.arange(50)
    assert torch.equal(train.batch(indices)[0], kept.batch(indices)[0])
    assert torch.equal(test.batch(indices)[1], kept_test.batch(indices)[1])


def test_processes_that_draw_at_the_same_time_do_not_disturb_each_other(tmp_path):
    code = (
        "import sys; from hvdlarge.data.glyphs import glyphs; "
        "print(glyphs(100, 50, cache=sys.argv[1])[0].inputs.double().sum().item())"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) for _ in range(2)
    ]
    sums = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(sums) == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"test_samples": 0}, {"size": 7}, {"size": 257}])
def test_sizes_out_of_range_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="at least 1 sample and 8 to 256 pixels"):
        small(tmp_path, **wrong)
