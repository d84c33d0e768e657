"""Complete jobs, those that docs/other-libraries.md shows and those in jobs/, have the same weights on any number of workers."""

import math
import re
import sys

import pytest
import torch
from parts.make_pictures import write
from support.comparing import distance, read_lines
from support.launching import ROOT
from support.whole_runs import alone, train

from hvdlarge.comm.solo import SoloChannel, SoloCollectives
from hvdlarge.config.job_file import parse_job, read_job
from hvdlarge.exits import Stopped

pytestmark = pytest.mark.filterwarnings("default")  # other libraries' warnings are their own

BLOCK = re.compile(r"`(my_\w+\.(?:py|yaml))`:\n\n```(?:python|yaml)\n(.*?)```", re.DOTALL)
SHOWN = dict(BLOCK.findall((ROOT / "docs/other-libraries.md").read_text("utf-8")))
JOBS = sorted((ROOT / "jobs/ecosystem").glob("*.yaml"))


@pytest.fixture
def files(control, folder, monkeypatch):
    """What the documented jobs read, in the current folder of all ranks, and their parts."""
    if control.rank == 0:
        import foreign_parts

        foreign_parts.write_arrow(folder / "saved_set")
        write(folder / "pictures", train=15, test=5)
        (folder / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
        for name, text in SHOWN.items():
            (folder / name).write_text(text)
    control.barrier()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    yield
    for name in SHOWN:  # another test has another folder
        sys.modules.pop(name.removesuffix(".py"), None)


def test_the_page_shows_four_jobs_and_every_job_of_the_folder():
    names = [name for name in SHOWN if name.endswith(".yaml")]
    assert names == ["my_gpt2.yaml", "my_arrow.yaml", "my_timm.yaml", "my_images.yaml"]
    page = (ROOT / "docs/other-libraries.md").read_text("utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == [job.stem for job in JOBS]


@pytest.mark.parametrize("name", [name for name in SHOWN if name.endswith(".yaml")])
def test_a_job_of_the_page(control, tensors, folder, files, name):
    job = parse_job(SHOWN[name], name, ["precision=fp64"])
    expected = alone(job, control, folder)
    assert distance(train(job, control, tensors, folder / "together"), expected) < 1e-12


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.stem)
def test_the_first_steps_of_a_job_of_the_folder(control, tensors, folder, files, file):
    job = read_job(str(file), ["precision=fp64"])
    if control.rank == 0:
        with pytest.raises(Stopped):
            train(job, SoloChannel(), SoloCollectives(), folder / "alone", stop_after=4)
    control.barrier()
    with pytest.raises(Stopped):
        train(job, control, tensors, folder / "together", stop_after=4)
    control.barrier()
    together, expected = (
        torch.load(folder / name / "checkpoints/last.pt", weights_only=True)
        for name in ("together", "alone")
    )
    assert together["progress"]["step"] == expected["progress"]["step"] > 1
    assert distance(together, expected) < 1e-12


# base, ends of the stages in epochs, epochs
FIFTEEN_PICTURES, PART_OF_AN_EPOCH = (4, [1, 2], 3.5), (16, [0.02, 0.05], 0.1)


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.stem)
def test_a_job_of_the_folder_through_two_growths_and_an_evaluation(
    control, tensors, folder, files, file
):
    base, ends, epochs = FIFTEEN_PICTURES if file.stem == "image_folder" else PART_OF_AN_EPOCH
    growth = f"{{policy: adabatch, at_epochs: {ends}, max: {4 * base}}}"
    batch = f"batch={{base: {base}, micro: {base // 2}, growth: {growth}}}"
    job = read_job(str(file), [batch, f"epochs={epochs}", "lr.warmup={policy: none}"])
    results = train(job, control, tensors, folder / "run")["state"]["results"]
    steps = read_lines(folder / "run/decisions.jsonl")
    assert sorted({step["stage"] for step in steps}) == [0, 1, 2]
    assert {step["global_batch"] for step in steps} >= {base, 2 * base}
    assert math.isfinite(results["loss"])
    assert math.isfinite(results["test_loss"])
