"""The jobs of jobs/papers: their schedules against the papers' numbers, without the data sets; their models are built. The jobs of jobs/small: that the
large batches are what the rules of the papers make of the small one.
"""

import pytest
import torch
from support.launching import ROOT

from hvdlarge.config import registry
from hvdlarge.config.job_file import read_job
from hvdlarge.config.planning import plan_run, training_samples
from hvdlarge.exits import JobError
from hvdlarge.reporting.describe import rule_notes

JOBS = sorted(path.name for path in (ROOT / "jobs/papers").glob("*.yaml"))
# (global batch, first step, highest lr) of each stage, and the number of parameters. ImageNet: epochs of 1,281,167 images
PUBLISHED = {
    "cifar100_vgg19bn_adabatch.yaml": (
        [(128, 0.01), (256, 0.0075), (512, 0.005625), (1024, 0.00421875), (2048, 0.0031640625)],
        20_086_692,
    ),
    "cifar10_alexnet_adabatch.yaml": (
        [(256, 0.01), (512, 0.0075), (1024, 0.005625), (2048, 0.00421875), (4096, 0.0031640625)],
        2_472_266,
    ),
    "cifar10_resnet20_adabatch.yaml": (
        [(128, 0.01), (256, 0.0075), (512, 0.005625), (1024, 0.00421875), (2048, 0.0031640625)],
        269_722,
    ),
    "imagenet_alexnet_bn_lars_8k.yaml": ([(8192, 14.0)], 61_101_992),
    "imagenet_resnet50_819k.yaml": ([(819_200, 160.0)], 25_557_032),
    "imagenet_resnet50_adabatch.yaml": (
        [(8192, 3.2), (65_536, 2.56), (524_288, 2.048)],
        25_557_032,
    ),
    "imagenet_resnet50_lars_32k.yaml": ([(32_768, 32.0)], 25_557_032),
    "imagenet_resnet50_lars_paper_8k.yaml": ([(8192, 30.0)], 25_557_032),
    "mnist_lenet_fullbatch_lamb.yaml": ([(60_000, 0.11 * (1 - 6 / 35) ** 0.5)], 3_274_634),
    "mnist_row_lstm_legw.yaml": ([(8192, 0.8)], 82_186),
    # Rates of ours where the papers' are not published or not known first hand: ptb and wmt
    "ptb_large_legw.yaml": ([(640, 5 * 32**0.5)], 66_034_000),
    "ptb_small_legw.yaml": ([(640, 20 * 32**0.5)], 4_653_200),
    "wmt_gnmt_legw.yaml": ([(4096, 2**1.5 / 1000)], 193_766_977),
}


def test_every_job_is_compared():
    assert sorted(PUBLISHED) == JOBS


@pytest.mark.parametrize("name", JOBS)
def test_its_schedule_is_the_papers(name):
    job = read_job(str(ROOT / "jobs/papers" / name))
    plan = plan_run(job, training_samples(job), 64)
    stages, _ = PUBLISHED[name]
    assert [stage.global_batch for stage in plan.stages] == [batch for batch, _ in stages]
    highest = [stage.highest_lr for stage in plan.stages]
    assert highest == pytest.approx([lr for _, lr in stages], rel=0.01)


DOUBLED = [(64 * 2**n, 0.03 * 0.75**n) for n in range(5)]  # AdaBatch beside a decay of 0.375
SMALL = {
    "docs_lm_legw": [(256, 12 * 32**0.5)],
    "docs_seq2seq": [(32, 0.002), *((batch, None) for batch in (64, 128, 256))],
    "glyphs_2k_adam": [(2048, 0.002 * 32**0.5)],
    "glyphs_2k_lamb": [(2048, 0.006 * 32**0.5)],
    "glyphs_2k_lars": [(2048, 1.1 * 32**0.5)],
    "glyphs_2k_momentum": [(2048, 0.024 * 32**0.5)],
    "glyphs_adabatch": DOUBLED,
    "glyphs_baseline": [(64, 0.03)],
}


def test_the_schedules_of_the_small_jobs():
    assert sorted(SMALL) == sorted(path.stem for path in (ROOT / "jobs/small").glob("*.yaml"))
    for name, stages in SMALL.items():
        job = read_job(str(ROOT / f"jobs/small/{name}.yaml"))
        plan = plan_run(job, training_samples(job), 2)
        assert [stage.global_batch for stage in plan.stages] == [batch for batch, _ in stages]
        for stage, (_, lr) in zip(plan.stages, stages, strict=True):
            assert lr is None or stage.highest_lr == pytest.approx(lr, rel=0.01), name


@pytest.mark.parametrize("name", JOBS)
def test_its_model_can_be_built(name):
    job = read_job(str(ROOT / "jobs/papers" / name))
    with torch.device("meta"):
        model = registry.instantiate("model.name", job.model.name, job.model.args, registry.MODELS)
    assert sum(weight.numel() for weight in model.parameters()) == PUBLISHED[name][1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([], "640 lanes of 72 or 73 samples, in the order of the text"),
        (["batch.initial=20"], "at first each advances once in 32 steps"),
    ],
)
def test_lanes_are_noted_in_the_plan(changes, words):
    job = read_job(str(ROOT / "jobs/papers/ptb_small_legw.yaml"), changes)
    notes = rule_notes(job, plan_run(job, training_samples(job), 2))
    assert any("data.lanes" in note and words in note for note in notes)


def test_a_growth_beyond_the_lanes_is_refused():
    path = str(ROOT / "jobs/papers/ptb_small_legw.yaml")
    job = read_job(path, ["data.lanes=639"])
    with pytest.raises(
        JobError, match=r"batch.initial: the global batch reaches 640 samples, .* give 640 lanes"
    ):
        plan_run(job, training_samples(job), 2)
