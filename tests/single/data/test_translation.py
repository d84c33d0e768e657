"""Parallel text: aligned pairs, their padding, and a translation that is learned by a job."""

import gzip

import pytest
import torch
from torch.nn.functional import cross_entropy

from hvdlarge.config import registry
from hvdlarge.data.translation import END, PADDING, START, pad, parallel_text, pydoc_phrases
from hvdlarge.exits import JobError
from hvdlarge.models.losses import CrossEntropyLoss

ENGLISH = "a dog\nthe dog sees a cat\n\na cat\n"
GERMAN = "ein Hund\nder Hund sieht eine Katze\n\neine Katze\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.en").write_text(ENGLISH)
    (tmp_path / "train.de.gz").write_bytes(gzip.compress(GERMAN.encode()))
    (tmp_path / "test.en").write_text("a bird sees the dog\n")
    (tmp_path / "test.de").write_text("ein Vogel sieht den Hund\n")
    return tmp_path


TRAIN, TEST = ["train.en", "train.de.gz"], ["test.en", "test.de"]


def shown(ids, vocabulary):
    return " ".join(vocabulary.tokens[id] for id in ids.tolist() if id >= 0)


def test_pairs_are_those_of_the_lines_each_in_its_vocabulary(folder):
    train, test = parallel_text(str(folder), TRAIN, TEST)
    english, german = train.vocabularies
    assert english.tokens == ["<pad>", "<unk>", "<s>", "</s>", "a", "cat", "dog", "sees", "the"]
    lines = zip(ENGLISH.splitlines(), GERMAN.splitlines(), strict=True)
    pairs = [(shown(source, english), shown(target, german)) for source, target in map(train.__getitem__, range(4))]  # fmt: skip
    assert pairs == list(lines)
    assert shown(test[0][0], english) == "a <unk> sees the dog"
    assert shown(test[0][1], german) == "ein <unk> sieht <unk> Hund"
    assert test.vocabularies == train.vocabularies
    assert all(map(torch.equal, train[-1], train[3]))
    assert all(map(torch.equal, train.__getitems__([1, 0])[0], train[1]))
    with pytest.raises(IndexError):
        train[4]


def test_a_batch_is_as_long_as_its_longest_sentence_and_says_what_counts(folder):
    train, _ = parallel_text(str(folder), TRAIN)
    (source, target_in), targets = pad([train[0], train[1], train[2]])
    english, german = train.vocabularies
    assert source.shape == target_in.shape == targets.shape == (3, 6)
    assert shown(source[0], english) == "a dog </s> <pad> <pad> <pad>"
    assert shown(target_in[0], german) == "<s> ein Hund <pad> <pad> <pad>"
    assert shown(target_in[1], german) == "<s> der Hund sieht eine Katze"
    assert targets[0].tolist() == [*train[0][1].tolist(), END, -100, -100, -100]
    assert targets[2].tolist() == [END] + [-100] * 5
    assert (target_in[:, 0] == START).all()
    assert (source[0, 3:] == PADDING).all()
    assert {each.dtype for each in (source, target_in, targets)} == {torch.int64}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_padded_batches_is_that_of_single_sentences(folder, smoothing):
    train, _ = parallel_text(str(folder), TRAIN)
    classes = len(train.vocabularies[1])
    draws = torch.Generator().manual_seed(1)
    logits = [torch.randn(classes, len(train[n][1]) + 1, generator=draws) for n in range(4)]
    _, targets = pad([train[n] for n in range(4)])
    padded = torch.full((4, classes, targets.shape[1]), 7.0)
    for row, single in zip(padded, logits, strict=True):
        row[:, : single.shape[1]] = single
    total, weight = CrossEntropyLoss(ignore_index=-100, label_smoothing=smoothing)(padded, targets)
    singles = torch.cat([*map(torch.t, logits)])
    counted = torch.cat([torch.cat([train[n][1], torch.tensor([END])]) for n in range(4)])
    expected = cross_entropy(singles, counted, label_smoothing=smoothing)
    assert weight == len(counted) == 13
    assert torch.isclose(total / weight, expected, rtol=1e-6)


def test_long_pairs_are_left_out_of_training_only(folder):
    train, test = parallel_text(str(folder), TRAIN, TEST, max_length=2)
    assert (len(train), len(test)) == (3, 1)
    assert "sees" not in train.vocabularies[0].tokens


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"train": ["train.en", "test.de"]}, r"train\.en has 4 lines and .*test\.de 1: each line"),
        ({"train": ["train.en"]}, r"training files are a list of two names"),
        ({"train": "train.en"}, r"training files are a list of two names"),
        ({"test": ["test.en", "nothing"]}, r"nothing: there is no such file; expected the target"),
        ({"max_length": -1}, r"every pair of .*train\.en and .*train\.de\.gz has more tokens"),
        ({"max_size": 4}, r"max_size must be at least 5"),
        ({"level": "subwords"}, r"level is 'subwords'"),
    ],
)
def test_what_is_wrong_is_an_error_of_the_job(folder, given, problem):
    arguments = {"folder": str(folder), "train": TRAIN, "test": TEST} | given
    with pytest.raises(JobError, match=rf"data\.name: parallel_text: .*{problem}"):
        registry.instantiate("data.name", "parallel_text", arguments, registry.DATA_SETS)


def test_a_plan_knows_the_pairs(folder):
    arguments = {"folder": str(folder), "train": TRAIN, "max_length": 2}
    assert registry.training_samples("parallel_text", arguments) == 3
    assert registry.training_samples("parallel_text", arguments | {"folder": "/nowhere"}) is None
    assert registry.training_samples("pydoc_phrases", {"words": 4}) == len(
        pydoc_phrases(words=4)[0]
    )


def test_phrases_are_translated_by_a_rule_and_never_on_both_sides():
    train, test = pydoc_phrases()
    source, target = train.vocabularies
    phrases = []
    for each in (train, test):
        for index in range(len(each)):
            ids = each[index]
            phrase = "".join(source.tokens[id] for id in ids[0].tolist())
            translated = "".join(target.tokens[id] for id in ids[1].tolist())
            phrases.append(phrase)
            assert len(phrase.split()) == 3
            back = [chr((ord(letter) - 84) % 26 + 97) if letter != " " else " " for letter in translated]  # fmt: skip
            assert "".join(back).split() == phrase.split()[::-1]
    assert len(set(phrases)) == len(phrases) > 5000
    assert len(source) == len(target) == 31


def test_phrases_in_words_and_of_another_text():
    train, test = pydoc_phrases(level="words", max_size=50)
    assert len(train.vocabularies[0]) == 50
    assert all(len(part) == 3 for part in (*train[0], *test[0]))
    with pytest.raises(ValueError, match="the job expects other"):
        pydoc_phrases(sha256="other")
    with pytest.raises(ValueError, match="words must be at least 1"):
        pydoc_phrases(words=0)
