"""Each job of jobs, jobs/papers and jobs/small runs, with its own model, transforms, optimizer and schedules: those of the papers on a dozen samples
in the files of their formats, the others on a part of their own sets.

Sizes and lengths are made small: batches of 4, which grow to 8 and 16, in three epochs and a half. What the schedules are at their own lengths is in
tests/single/config/test_paper_jobs.py.
"""

import math

import numpy as np
import pytest
from support.comparing import read_lines
from support.data_files import write_cifar, write_mnist
from support.launching import ROOT
from support.whole_runs import train

from hvdlarge.config.job_file import read_job

SAMPLES = 12
SMALL = [
    *("epochs=3.5", "data.samples=null", "evaluate.micro_batch=4", "log.every_steps=1"),
    "batch={base: 4, micro: 2, growth: {policy: adabatch, at_epochs: [1, 2], max: 16}}",
]
PATHS = [
    path for part in (".", "papers", "small") for path in (ROOT / "jobs" / part).glob("*.yaml")
]


def mnist(folder):
    write_mnist(folder, SAMPLES, 5)


def cifar10(folder):
    write_cifar(folder, 10, SAMPLES + 3, 5)


def cifar100(folder):
    write_cifar(folder, 100, SAMPLES, 5, pickled=True)


def images(folder):
    """Pictures of several shapes, in three classes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in (("train", SAMPLES), ("val", 5)):
        for number in range(count):
            place = folder / part / f"n{number % 3:08d}"
            place.mkdir(parents=True, exist_ok=True)
            size = (int(rng.integers(200, 300)), int(rng.integers(200, 300)), 3)
            pixels = rng.integers(256, size=size, dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.JPEG", quality=60)


def ptb(folder):
    """Lines of words, as many as give a window or two to each of 20 lanes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, lines in (("train", 150), ("valid", 60)):
        words = [
            " ".join(["<unk>", *(f"w{n}" for n in rng.integers(50, size=6))]) for _ in range(lines)
        ]
        (folder / f"ptb.{name}.txt").write_text("".join(f" {line} \n" for line in words))


def wmt(folder):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, lines in (("train.tok.clean.bpe.32000", SAMPLES), ("newstest2014.tok.bpe.32000", 5)):
        for language in ("en", "de"):
            text = [
                " ".join(f"{language}{n}" for n in rng.integers(30, size=rng.integers(1, 9)))
                for _ in range(lines)
            ]
            (folder / f"{name}.{language}").write_text("\n".join(text) + "\n")


def nothing(folder):
    """The set needs no files."""


SMALLER = [f"data.args.samples={SAMPLES}", "data.args.test_samples=5"]
CIFAR10 = [f"data.args.samples={SAMPLES + 3}", "data.args.test_samples=5"]
IMAGES = ["data.num_workers=2"]
PTB = ["data.lanes=20", "lr.warmup.epochs=0.5"]
EXTRAS = {
    "imagenet": "PIL.Image",
    "wmt": "sacrebleu",
    "docs_seq2seq": "sacrebleu",
    "glyphs": "matplotlib",
}
FEW_GLYPHS = [*SMALLER, "lr.warmup={policy: linear, epochs: 1}"]
PART_OF_AN_EPOCH = ["epochs=0.6", "batch.growth.at_epochs=[0.2, 0.4]", "lr.warmup.epochs=0.1"]
JOBS = {
    "cifar100_vgg19bn_adabatch": (cifar100, [*SMALLER, "lr.decay.every_epochs=1"]),
    "cifar10_alexnet_adabatch": (cifar10, [*CIFAR10, "lr.decay.every_epochs=1"]),
    "cifar10_resnet20_adabatch": (cifar10, [*CIFAR10, "lr.decay.every_epochs=1"]),
    "imagenet_alexnet_bn_lars_8k": (images, [*IMAGES, "lr.warmup.epochs=1"]),
    "imagenet_resnet50_819k": (images, [*IMAGES, "lr.warmup.epochs=1"]),
    "imagenet_resnet50_adabatch": (
        images,
        [*IMAGES, "lr.warmup.epochs=1", "lr.decay.milestones=[1, 2]"],
    ),
    "imagenet_resnet50_lars_32k": (images, IMAGES),
    "imagenet_resnet50_lars_paper_8k": (images, [*IMAGES, "lr.warmup.epochs=1"]),
    "mnist_lenet_fullbatch_lamb": (mnist, [*SMALLER, "lr.warmup.epochs=1"]),
    "mnist_row_lstm_legw": (mnist, SMALLER),
    "ptb_large_legw": (ptb, PTB),
    "ptb_small_legw": (ptb, [*PTB, "lr.decay.milestones=[1, 2]"]),
    "wmt_gnmt_legw": (wmt, ["data.num_workers=0"]),
    "docs_lm_legw": (nothing, ["data.args.length=400", "data.lanes=16", *PART_OF_AN_EPOCH]),
    "docs_seq2seq": (nothing, ["data.args.words=80", *PART_OF_AN_EPOCH]),
    "digits": (nothing, PART_OF_AN_EPOCH),
    "digits_lstm": (nothing, PART_OF_AN_EPOCH),
    "glyphs_2k_adam": (nothing, FEW_GLYPHS),
    "glyphs_2k_lamb": (nothing, FEW_GLYPHS),
    "glyphs_2k_lars": (nothing, FEW_GLYPHS),
    "glyphs_2k_momentum": (nothing, FEW_GLYPHS),
    "glyphs_adabatch": (nothing, FEW_GLYPHS),
    "glyphs_baseline": (nothing, FEW_GLYPHS),
}


def test_every_job_is_run():
    assert sorted(JOBS) == sorted(path.stem for path in PATHS)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
@pytest.mark.parametrize("name", JOBS)
def test_it_runs_through_two_growths_and_an_evaluation(control, tensors, folder, name):
    if extra := EXTRAS.get(name.split("_")[0]) or EXTRAS.get(name):
        pytest.importorskip(extra)  # on every rank
    write, changes = JOBS[name]
    data = folder / "data"
    if control.rank == 0:
        write(data)
    control.barrier()
    (path,) = (path for path in PATHS if path.stem == name)
    at = {"glyphs": [f"data.args.cache={data}"], "docs": [], "digits": []}
    place = at.get(name.split("_")[0], [f"data.args.folder={data}"])
    job = read_job(str(path), [*SMALL, *place, *changes])
    found = train(job, control, tensors, folder / "run")
    steps = read_lines(folder / "run/decisions.jsonl")
    assert sorted({step["stage"] for step in steps}) == [0, 1, 2]
    assert steps[0]["global_batch"] == 4
    assert max(step["global_batch"] for step in steps) > 8
    results = found["state"]["results"]
    assert {"loss", "test_loss"} <= results.keys()
    assert all(math.isfinite(value) for value in results.values())
    metric = {"ptb": "perplexity", "wmt": "bleu", "docs": "perplexity"}.get(
        name.split("_")[0], "accuracy"
    )
    assert metric in results
