"""From the job's sections to objects: what a section asks for is there."""

import pytest
import torch

from hvdlarge.comm.solo import SoloChannel, SoloCollectives
from hvdlarge.config.job_file import parse_job
from hvdlarge.exits import JobError, OutOfMemory
from hvdlarge.optim.precision import Precision
from hvdlarge.replica.train_state import TrainState
from hvdlarge.training import build

JOB = """
name: built
epochs: 1
data: {name: digits}
model: {name: convnet, args: {width: 2}}
batch: {base: 8, micro: 4}
lr: {base: 1}
"""


def built(*changes):
    job = parse_job(JOB, "job", changes)
    precision = Precision(job.precision, torch.device("cpu"))
    objective, optimizer, _ = build.build_learning(job, precision)
    components = build.Components(objective, None, None, {}, None, optimizer)
    return job, build.build_replica(job, components, SoloChannel(), SoloCollectives())


@pytest.mark.parametrize("wanted", [False, True])
def test_channels_last_lays_out_images_and_nothing_else(wanted):
    _, replica = built(f"model.channels_last={str(wanted).lower()}")
    moved = replica.objective.to_device(
        {"images": torch.rand(2, 3, 5, 5), "rows": (torch.rand(4, 6), torch.arange(3))}
    )
    assert moved["images"].is_contiguous(memory_format=torch.channels_last) == wanted
    assert moved["rows"][0].is_contiguous()
    assert moved["rows"][1].dtype == torch.int64


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # torch's own, at the import of its compiler
@pytest.mark.parametrize("wanted", [False, True])
def test_compile_prepares_the_model_and_keeps_its_names(wanted):
    _, replica = built(f"model.compile={str(wanted).lower()}")
    assert (replica.objective.model._compiled_call_impl is not None) == wanted
    assert all(not name.startswith("_orig_mod") for name in replica.objective.model.state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_with_lanes_leaves_the_model_as_it_is():
    changes = "data={name: pydoc_text, args: {max_size: 99}, lanes: 40}"
    model = "model={name: lstm_lm, args: {tokens: 99, hidden: 4}, compile: true}"
    job = parse_job(JOB, "job", [changes, model])
    objective, _, _ = build.build_learning(job, Precision(job.precision, torch.device("cpu")))
    assert objective.model._compiled_call_impl is None
    assert "advance" not in vars(objective.model)
    assert hasattr(objective._advance, "_torchdynamo_orig_callable")


def test_a_model_that_does_not_fit_on_the_device_is_out_of_memory(monkeypatch):
    def convert(self, module):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")

    monkeypatch.setattr(Precision, "convert", convert)
    with pytest.raises(OutOfMemory, match="in moving the model to the device: use a smaller model"):
        built()


def test_floats_take_the_type_of_the_weights():
    _, replica = built("precision=fp64")
    assert replica.objective.to_device(torch.rand(2, 1, 8, 8)).dtype == torch.float64


def test_steps_that_only_overflowed_do_not_count_against_the_limit_of_skipped_ones():
    job, replica = built("precision=fp16", "on_nonfinite={policy: skip, limit: 2}")
    policy = build.build_policy(
        job.on_nonfinite, TrainState(skipped=7, overflows=6, loss_scale=1.0), replica
    )
    assert policy._then.skipped == 1


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(2), 0)])


class SizedStream(Stream):
    def __len__(self):
        return 1


class Sized:
    """Iterable, with a length."""

    def __len__(self):
        return 1

    def __iter__(self):
        return iter([(torch.zeros(2), 0)])


class Unsure(torch.utils.data.Dataset):
    def __len__(self):
        raise FileNotFoundError("the list of files")

    def __getitem__(self, index):
        return torch.zeros(2), 0


PAIRS = [(torch.zeros(2), 0)]
ITERABLE = (
    "needs a map-style set.*a list of the samples if they fit in memory, else an index of files"
)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Stream, rf"is an IterableDataset \(Stream\): the engine {ITERABLE}"),
        (SizedStream, rf"is an IterableDataset \(SizedStream\): the engine {ITERABLE}"),
        (Sized, f"is a Sized: the engine {ITERABLE}"),
        (lambda: (pair for pair in PAIRS), f"is a generator: the engine {ITERABLE}"),
        (lambda: iter(PAIRS), f"is a list_iterator: the engine {ITERABLE}"),
        (lambda: torch.utils.data.DataLoader(PAIRS), "is a DataLoader: return its data set"),
        (Unsure, r"its length raises FileNotFoundError: the list of files \(.*test_build.py, line \d+, in __len__\)"),
        (list, "is empty"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["training set", "test set"])
def test_a_set_without_samples_by_number_is_refused_with_the_reason(
    monkeypatch, make, words, place
):
    pair = (make(), None) if place == "training set" else (PAIRS, make())
    monkeypatch.setattr(build.registry, "instantiate", lambda *arguments: pair)
    job = parse_job(JOB, "job")
    with pytest.raises(JobError, match=f"(?s)^data.name: the {place} of digits:? {words}"):
        build.load_data(job.data, job.seed)
