"""Windows of text: every token is a target once, and files in the form of the Penn Treebank's."""

import gzip
import math

import pytest
import torch

from hvdlarge import run_job
from hvdlarge.config import registry
from hvdlarge.data.in_memory import reads_batches
from hvdlarge.data.language_models import pydoc_text, text_files
from hvdlarge.exits import JobError

TRAIN = " aer banknote berlitz\n mr. <unk> is chairman\n the N stocks of <unk>\n"
VALID = " mr. n is the chairman\n consumers of stocks\n"


@pytest.fixture
def folder(tmp_path):
    for name, text in (("train", TRAIN), ("valid", VALID), ("test", "the N is of\n" * 4)):
        (tmp_path / f"ptb.{name}.txt").write_text(text)
    return tmp_path


def shown(tokens, vocabulary):
    return " ".join(vocabulary.tokens[token] for token in tokens.tolist() if token >= 0)


def test_each_target_is_the_token_after_its_input(folder):
    train, valid = text_files(str(folder), length=4)
    assert (len(train), len(valid)) == (3, 2)  # of 15 and 11 tokens, each line's <eos> among them
    assert shown(train.inputs.flatten(), train.vocabulary) == (
        "aer banknote berlitz <eos> mr. <unk> is chairman <eos> the N stocks"
    )
    assert shown(train.targets.flatten(), train.vocabulary) == (
        "banknote berlitz <eos> mr. <unk> is chairman <eos> the N stocks of"
    )
    assert shown(valid.targets.flatten(), valid.vocabulary) == (
        "<unk> is the chairman <eos> <unk> of stocks"  # `n` and `consumers` are unknown
    )
    assert train.vocabulary.tokens[:2] == ["<eos>", "<unk>"]
    assert train.inputs.dtype == train.targets.dtype == torch.int64
    assert reads_batches(train)
    inputs, targets = train.batch(torch.tensor([2, 0]))
    assert torch.equal(inputs[1], train[0][0])
    assert torch.equal(targets[0], train[2][1])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 14, 15, 40])
def test_with_padding_every_token_but_the_first_is_a_target_once(folder, length):
    train, _ = text_files(str(folder), length=length, last="pad", test=None)
    counted = train.targets[train.targets != -100]
    assert shown(counted, train.vocabulary) == " ".join(
        [word for line in TRAIN.splitlines() for word in [*line.split(), "<eos>"]][1:]
    )
    assert train.inputs.shape == train.targets.shape == (-(-14 // length), length)
    assert int(train.inputs.min()) >= 0


def test_names_of_files_and_compressed_ones(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"ab\nba\n"))
    (tmp_path / "b").write_text("aa\n")
    train, test = text_files(str(tmp_path), train="a.gz", test="b", level="characters", length=2)
    assert shown(train.inputs.flatten(), train.vocabulary) == "a b \n b"
    assert train.vocabulary.tokens == ["\n", "a", "b"]  # of equal counts
    assert (test.inputs.tolist(), test.targets.tolist()) == ([[1, 1]], [[1, 0]])


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"test": "ptb.none.txt"}, r"ptb\.none\.txt: there is no such file; expected the test"),
        ({"folder": "/nowhere"}, r"/nowhere/ptb\.train\.txt: there is no such file"),
        ({"length": 15}, r"ptb\.train\.txt: 15 tokens are too few for a window of 15"),
        ({"length": 13}, r"ptb\.valid\.txt: 10 tokens are too few for a window of 13"),
        ({"level": "bytes"}, r"level is 'bytes': it is words or characters"),
        (
            {"train": "ptb.test.txt"},
            r"ptb\.valid\.txt, line 1: 'mr\.' does not occur in .*ptb\.test\.txt, whose vocabulary "
            r"of 5 has no <unk>: set min_count: 2",
        ),
    ],
)
def test_what_is_wrong_is_an_error_of_the_job(folder, given, problem):
    arguments = {"folder": str(folder), "length": 4} | given
    with pytest.raises(JobError, match=rf"data\.name: text_files: .*{problem}"):
        registry.instantiate("data.name", "text_files", arguments, registry.DATA_SETS)


def test_a_plan_knows_the_windows_of_files_and_of_the_penn_treebank_without_them(folder, tmp_path):
    def planned(**given):
        return registry.training_samples("text_files", given)

    for given in (
        {"length": 4},
        {"length": 6, "last": "pad"},
        {"length": 7, "level": "characters"},
    ):
        train, _ = text_files(str(folder), test=None, **given)
        assert planned(folder=str(folder), **given) == len(train)
    nowhere = str(tmp_path / "nowhere")
    assert planned(folder=nowhere) == 26_559  # 929,589 words
    assert planned(folder=nowhere, level="characters") is None
    assert planned(folder=nowhere, train="other.txt") is None
    assert planned(folder=str(folder), length=99) is None
    assert planned(files=3) is None


@pytest.mark.parametrize("level", ["words", "characters"])
def test_the_documentation_in_python_is_a_text_in_two_parts(level):
    train, test = pydoc_text(level, max_size=1000)
    assert registry.training_samples("pydoc_text", {"level": level, "max_size": 1000}) == len(train)
    size = len(train.vocabulary)
    assert size == 1000 if level == "words" else 50 < size < 200
    assert max(int(each.targets.max()) for each in (train, test)) < size
    assert 0.05 < len(test) / len(train) < 0.5
    assert "<unk>" in train.vocabulary.tokens
    again, _ = pydoc_text(level, max_size=1000)
    assert torch.equal(train.inputs, again.inputs)


LANGUAGE_MODEL = """
import torch

class Recurrent(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.embedding, self.lstm = torch.nn.Embedding(size, 8), torch.nn.LSTM(8, 8, batch_first=True)
        self.head = torch.nn.Linear(8, size)

    def forward(self, tokens):
        return self.head(self.lstm(self.embedding(tokens))[0]).movedim(-1, 1)
"""
JOB = {
    "name": "language_model",
    "epochs": 3,
    "precision": "fp64",
    "model": {"name": "own_language_model:Recurrent", "args": {"size": 12}},
    "loss": {"name": "cross_entropy", "args": {"ignore_index": -100}},
    "batch": {"base": 2, "micro": 1},
    "lr": {"base": 0.5},
    "evaluate": {"micro_batch": 1, "metrics": ["perplexity", "accuracy", "top5"]},
}


def test_a_language_model_trains_on_text_files(folder, monkeypatch):
    (folder / "own_language_model.py").write_text(LANGUAGE_MODEL)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    arguments = {"folder": ".", "length": 4, "last": "pad", "max_size": 12}
    job = JOB | {"data": {"name": "text_files", "args": arguments}}
    summary = run_job(job)
    assert summary["steps"] == 6  # 4 windows in 3 epochs, 2 in each step
    assert summary["perplexity"] == pytest.approx(math.exp(summary["test_loss"]), rel=1e-9)
    assert summary["perplexity"] < 12  # of the untrained model, about
    together = run_job(job | {"name": "together", "batch": {"base": 2, "micro": 2}})
    # The last window has fewer targets: the mean is that of the step, whatever the micro-batch
    assert together["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-9)
