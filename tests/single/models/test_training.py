"""The models of the papers in the engine: they learn, and neither micro-batches nor workers change what they learn."""

import shutil

import pytest
import torch
from support.comparing import same, weight_distance

from hvdlarge.data.in_memory import InMemory
from hvdlarge.exits import FINISHED, WRONG_JOB
from trials.engine import train

SAMPLES, CLASSES, WORDS = 16, 4, 11


def images(shape):
    """One picture for each class, with noise."""
    pictures, targets = torch.randn(CLASSES, *shape), torch.arange(SAMPLES) % CLASSES
    return InMemory(pictures[targets] + 0.1 * torch.randn(SAMPLES, *shape), targets), None


def text():
    """Each word follows from the one before."""
    words = [torch.randint(WORDS, (SAMPLES,))]
    for _ in range(9):
        words.append((3 * words[-1] + 1) % WORDS)
    words = torch.stack(words, dim=1)
    return InMemory(words[:, :-1], words[:, 1:]), None


def translations():
    """Sentences of 1 to 5 words, padded with 0; the translation has the same words backwards."""
    samples = []
    for _ in range(SAMPLES):
        words = torch.randint(2, WORDS, (int(torch.randint(1, 6, ())),))
        padding = torch.zeros(5 - len(words), dtype=torch.long)
        target_in = torch.cat([torch.ones(1, dtype=torch.long), words.flip(0)[:-1]])
        sample = {"source": words, "target_in": target_in, "target_out": words.flip(0)}
        samples.append({key: torch.cat([value, padding]) for key, value in sample.items()})
    return samples, None


def pictures(*shape):
    return {"data": {"name": "test_training:images", "args": {"shape": list(shape)}}}


TEXT = {"data": {"name": "test_training:text"}}
PAIRS = {
    "data": {"name": "test_training:translations", "targets": "target_out"},
    "loss": {"name": "cross_entropy", "args": {"ignore_index": 0}},
}
CIFAR = {"form": "cifar", "classes": CLASSES}
LENET = {"classes": CLASSES}
RESNET_50 = {"classes": CLASSES, "version": "v1"}
SMALL_GNMT = {"tokens": WORDS, "hidden": 8, "encoder_layers": 3, "decoder_layers": 3}
SMALL_GNMT |= {"init_range": 0.5, "dropout": 0}

# name, arguments, data, lr (of Adam, with batch norm of SGD), epochs in which it learns
WITHOUT_BATCH_NORM = {
    "alexnet": ("alexnet", CIFAR, pictures(3, 32, 32), 1e-3, 5),
    "lenet tensorflow": ("lenet", LENET | {"dropout": 0}, pictures(1, 28, 28), 1e-3, 2),
    "lenet caffe": ("lenet", LENET | {"form": "caffe"}, pictures(1, 28, 28), 1e-3, 2),
    "lenet5": ("lenet", LENET | {"form": "lenet5"}, pictures(1, 28, 28), 1e-3, 4),
    "row_lstm": ("row_lstm", {"classes": CLASSES}, pictures(1, 8, 8), 1e-2, 8),
    "lstm_lm": ("lstm_lm", {"tokens": WORDS, "hidden": 12}, TEXT, 3e-2, 10),
    "gnmt current": ("gnmt", SMALL_GNMT, PAIRS, 3e-2, 20),
    "gnmt previous": ("gnmt", SMALL_GNMT | {"attention": "previous"}, PAIRS, 3e-2, 20),
    "gnmt two vocabularies": ("gnmt", SMALL_GNMT | {"target_tokens": WORDS}, PAIRS, 3e-2, 20),
}
WITH_BATCH_NORM = {
    "alexnet_bn": ("alexnet_bn", CIFAR, pictures(3, 32, 32), 0.005, 3),
    "vgg19_bn": ("vgg19_bn", CIFAR, pictures(3, 32, 32), 0.005, 2),
    "resnet20": ("resnet20", {"classes": CLASSES}, pictures(3, 32, 32), 0.02, 4),
    "resnet50 v1": ("resnet50", RESNET_50, pictures(3, 32, 32), 0.005, 2),
}
WITH_DROPOUT = {
    "lenet": ("lenet", LENET, pictures(1, 28, 28)),
    "lstm_lm": ("lstm_lm", {"tokens": WORDS, "hidden": 12, "dropout": 0.5}, TEXT),
    "gnmt current": ("gnmt", SMALL_GNMT | {"dropout": 0.3}, PAIRS),
    "gnmt previous": ("gnmt", SMALL_GNMT | {"dropout": 0.3, "attention": "previous"}, PAIRS),
    "alexnet_bn": WITH_BATCH_NORM["alexnet_bn"],
}
SGD = {"optimizer": {"name": "sgd", "momentum": 0}, "lr": {"base": 0.05}, "epochs": 2}


def run(case, folder, workers=1, micro=4, **changes):
    name, arguments, sections, *_ = case
    job = {
        "name": "small",
        "precision": "fp64",
        "model": {"name": name, "args": arguments},
        "batch": {"base": 8, "micro": micro},
        "log": {"every_steps": 1},
        **sections,
        **(changes or SGD),
    }
    place = folder / f"{workers}-{micro}"
    outcome = train(job, place, workers)
    shutil.rmtree(place, ignore_errors=True)  # its checkpoints are large
    return outcome


def weights(outcome):
    assert outcome.code == FINISHED, outcome.message
    return outcome.checkpoint["model"]


@pytest.mark.parametrize("case", WITHOUT_BATCH_NORM.values(), ids=WITHOUT_BATCH_NORM)
def test_a_model_without_batch_norm_learns_the_same_in_any_micro_batches(case, tmp_path):
    whole, divided = run(case, tmp_path, micro=8), run(case, tmp_path, micro=3)
    assert weight_distance(weights(whole), weights(divided)) < 1e-12


LEARNING = WITHOUT_BATCH_NORM | WITH_BATCH_NORM


@pytest.mark.parametrize("case", LEARNING.values(), ids=LEARNING)
def test_the_loss_falls(case, tmp_path):
    *_, lr, epochs = case
    # In float32 and without moments: the networks with batch norm are the largest
    optimizer = SGD["optimizer"] if case in WITH_BATCH_NORM.values() else {"name": "adam"}
    changes = {"optimizer": optimizer, "lr": {"base": lr}, "epochs": epochs, "precision": "fp32"}
    outcome = run(case, tmp_path, micro=8, **changes)
    assert all(value.isfinite().all() for value in weights(outcome).values())
    losses = [line["loss"] for line in outcome.metrics]
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2]), losses


@pytest.mark.parametrize("case", WITH_DROPOUT.values(), ids=WITH_DROPOUT)
def test_dropout_and_batch_statistics_follow_the_micro_batch_on_any_worker(case, tmp_path):
    alone, together = (run(case, tmp_path, workers, micro=2) for workers in (1, 2))
    assert weight_distance(weights(alone), weights(together)) < 1e-12


@pytest.mark.parametrize("name", ["lstm_lm", "gnmt current", "gnmt previous"])
def test_exact_mode_gives_the_same_bits(name, tmp_path):
    alone, together = (
        run(WITH_DROPOUT[name], tmp_path, workers, micro=2, **SGD, reduction="exact")
        for workers in (1, 2)
    )
    weights(alone)
    weights(together)
    assert same(alone.checkpoint, together.checkpoint)


def test_images_of_another_size_are_an_error_that_says_what_the_model_takes(tmp_path):
    outcome = run(("vgg19_bn", CIFAR, pictures(3, 28, 28)), tmp_path)
    assert outcome.code == WRONG_JOB
    assert "VGG-19, form cifar, takes images of the shape 3×32×32" in outcome.message
    assert "not 3×28×28" in outcome.message
