"""Text files: their lines, tokens and vocabulary, and what is wrong with a file by its name."""

import gzip
from collections import Counter

import pytest

from hvdlarge.data.text import (
    Text,
    Vocabulary,
    count_tokens,
    encode,
    num_windows,
    read_lines,
    splitter,
)

WORDS, CHARACTERS = (splitter(level, line_ends=True) for level in ("words", "characters"))


def test_a_line_ends_with_a_token_of_its_own():
    assert WORDS(" aer  banknote <unk> ") == ["aer", "banknote", "<unk>", "<eos>"]
    assert WORDS("") == ["<eos>"]
    assert CHARACTERS("a b") == ["a", " ", "b", "\n"]
    assert splitter("words", line_ends=False)("a  b ") == ["a", "b"]
    assert splitter("characters", line_ends=False)("a b") == ["a", " ", "b"]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"one two\nthree\n", ["one two", "three"]),
        (b"one\n\nthree", ["one", "", "three"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"\xef\xbb\xbfone\n", ["one"]),
        ("na\u00efve\u2028one\x0bline\n".encode(), ["na\u00efve\u2028one\x0bline"]),
    ],
)
def test_lines_are_those_between_line_feeds(tmp_path, content, lines):
    (tmp_path / "text").write_bytes(content)
    (tmp_path / "text.gz").write_bytes(gzip.compress(content, mtime=0))
    assert read_lines(tmp_path / "text", "a text").lines == lines
    assert read_lines(tmp_path / "text.gz", "a text").lines == lines


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("empty", b"", r"empty: holds no text \(0 bytes\); expected the training text"),
        ("blank", b"\n \n", r"blank: holds no text \(3 bytes\)"),
        ("latin", b"one\ntw\xf6 three\n", r"latin: byte 6 \(0xf6, in line 2\) is not UTF-8"),
        ("cut", "ö".encode()[:1], r"cut: byte 0 \(0xc3, in line 1\) is not UTF-8 \(unexpected end"),
        ("plain.gz", b"text", r"plain\.gz: damaged gzip file \(Not a gzipped file"),
        ("cut.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], r"cut\.gz: damaged gzip file"),
        (
            "bits.gz",
            gzip.compress(b"text", mtime=0)[:10] + b"\xff" * 9,
            r"bits\.gz: damaged gzip file",
        ),
        ("missing", None, r"missing: there is no such file; expected the training text there"),
    ],
)
def test_a_file_that_is_no_text_is_refused_by_name(tmp_path, name, content, problem):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        read_lines(tmp_path / name, "the training text")


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\); expected a text"):
        read_lines(tmp_path, "a text")


def test_tokens_are_numbered_by_count_then_alphabetically():
    counts = count_tokens(Text("", ["b a c", "a d b a"]), WORDS)
    assert Vocabulary.of(counts).tokens == ["a", "<eos>", "b", "c", "d"]


@pytest.mark.parametrize(
    ("text", "given", "tokens"),
    [
        ("aaabbcd", {"min_count": 2}, ["a", "<unk>", "b"]),
        ("aaabbcd", {"max_size": 3}, ["a", "<unk>", "b"]),
        ("aaabbcd", {"max_size": 4}, ["a", "b", "<unk>", "c"]),
        ("aaabbcd", {"max_size": 99}, ["a", "b", "c", "d", "<unk>"]),
        ("aaabbcd", {"with_unknown": True, "min_count": 3}, ["<unk>", "a"]),
        ("aabbb", {"reserved": ["<pad>", "<unk>", "b"]}, ["<pad>", "<unk>", "b", "a"]),
        ("aabbb", {"reserved": ["<pad>", "<unk>"], "max_size": 3}, ["<pad>", "<unk>", "b"]),
    ],
)
def test_rare_tokens_are_unknown_ones(text, given, tokens):
    assert Vocabulary.of(Counter(text), **given).tokens == tokens


def test_a_texts_own_unknown_word_stands_for_unknown_ones():
    counts = Counter({"<unk>": 2, "a": 3, "b": 1})
    vocabulary = Vocabulary.of(counts)
    assert vocabulary.tokens == ["a", "<unk>", "b"]
    assert vocabulary.ids(["b", "z", "a"]) == [2, 1, 0]
    # Its count is that of all it stands for
    assert Vocabulary.of(counts | {"c": 1}, min_count=2).tokens == ["<unk>", "a"]


@pytest.mark.parametrize("given", [{"min_count": 0}, {"max_size": 1}, {"max_size": 0}])
def test_a_vocabulary_without_room_is_refused(given):
    with pytest.raises(ValueError, match=r"(min_count|max_size) must be at least"):
        Vocabulary.of(Counter("ab"), **given)


def test_a_token_without_a_number_is_refused_by_file_and_line():
    vocabulary = Vocabulary.of(Counter(["a", "<eos>"]))
    text = Text("valid.txt", ["a a", "a", "a zebra a"])
    with pytest.raises(
        ValueError, match=r"valid\.txt, line 3: 'zebra' does not occur in train.txt"
    ):
        encode(text, WORDS, vocabulary, "train.txt")


def test_ids_of_a_text_are_those_of_its_tokens_in_order():
    text = Text("", ["b a", "", "c"])
    vocabulary = Vocabulary.of(count_tokens(text, CHARACTERS))
    ids, ends = encode(text, CHARACTERS, vocabulary, "")
    assert ids.dtype == "int64"
    assert ends.tolist() == [4, 5, 7]
    assert "".join(vocabulary.tokens[id] for id in ids) == "b a\n\nc\n"


@pytest.mark.parametrize(
    ("tokens", "length", "last", "number"),
    [
        (13, 4, "drop", 3),
        (12, 4, "drop", 2),
        (12, 4, "pad", 3),
        (13, 4, "pad", 3),
        (2, 9, "pad", 1),
    ],
)
def test_windows_of_a_text(tokens, length, last, number):
    assert num_windows(tokens, length, last, "") == number


@pytest.mark.parametrize(
    ("tokens", "length", "last", "problem"),
    [
        (4, 4, "drop", "short.txt: 4 tokens are too few for a window of 4 and the token after it"),
        (1, 4, "pad", "1 tokens are too few"),
        (9, 0, "drop", "length must be at least 1"),
        (9, 4, "keep", "last is 'keep': it is drop or pad"),
    ],
)
def test_windows_that_are_none_are_refused(tokens, length, last, problem):
    with pytest.raises(ValueError, match=problem):
        num_windows(tokens, length, last, "short.txt")
