import pytest

from hvdlarge.config.yaml_source import SourceError, read, write


def test_numbers_and_words_follow_yaml_1_2():
    text = "a: 1e-3\nb: on\nc: 10\nd: 2020-01-01\ne: true\nf: ~\ng:\nh: .5\ni: -1.e3\nk: 0x10\nl: 1_000\nm: 1:30\nn: no\no: 0o17\n"
    assert read(text).values == {
        "a": 0.001, "b": "on", "c": 10, "d": "2020-01-01", "e": True, "f": None, "g": None, "h": 0.5, "i": -1000.0, "k": 16,
        "l": "1_000", "m": "1:30", "n": "no", "o": 15,
    }  # fmt: skip


def test_lines_are_remembered():
    source = read("a: 1\nb:\n  c:\n    - 5\n    - 6\n")
    assert source.line(("b", "c", 1)) == 5
    assert source.line(("b", "c", 9)) == 3
    assert source.line(("z",)) is None


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("a: 1\nb: 2\na: 3", "duplicate key 'a', on lines 1 and 3", 3),
        ("a: &x [1]\nb: *x", "alias *x", 2),
        (
            "a: !!python/object/apply:os.system ['touch hacked']",
            "the tag !!python/object/apply:os.system is not allowed",
            1,
        ),
        ("a: !!float abc", "tag !!float", 1),
        ("a: 1\nb: !!timestamp x", "tag !!timestamp", 2),
        ("a: !own {x: 1}", "tag !own", 1),
        ("a: [1, 2", "not valid YAML", 1),
        ("a: 1\n\tb: 2", "not valid YAML", 2),
        ("a: 1\n---\nb: 2", "expected a single document", 2),
        ("[" * 3000, "nested deeper than 40 levels", 1),
        ("? [a]\n: b", "a key must be a string", 1),
        ("a: " + "9" * 5000, "digits", 1),
        ("a: {0: x}", "the key '0' is not read as a string", 1),
        ("true: 1", "the key 'true' is not read as a string", 1),
        ("a: 010", "010 begins with a zero", 1),
        ("a: -07", "-07 begins with a zero", 1),
        ("a: 1\nb: ${NOT_SET}", "the variable NOT_SET is not set; ${NOT_SET:-default} gives", 2),
        ("a: ${}", "a variable is written", 1),
        ("a: {b: ${X:-3}}", "inside { }, put the variable in quotes", 1),
        (b"a: \xff", "not UTF-8", None),
        (b"a: 1\n" * 300_000, "at most 1,000,000", None),
        (b"a: \x00", "not valid YAML", None),
    ],
)
def test_what_is_no_plain_document_is_refused(text, message, line):
    with pytest.raises(SourceError) as raised:
        read(text)
    assert message in str(raised.value)
    assert raised.value.line == line


def test_a_bomb_of_aliases_ends_before_it_grows():
    bomb = "a: &a [1,1]\n" + "\n".join(
        f"{new}: &{new} [*{old},*{old}]" for old, new in zip("abcdefgh", "bcdefghi", strict=False)
    )
    with pytest.raises(SourceError, match="alias"):
        read(bomb)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${N}", 17), ("'${N}'", "17"), ("run-${N}", "run-17"), ("${F:-0.5}", 0.5), ("${EMPTY:-3}", 3), ("${EMPTY}", None),
        ("${F:-}", None), ("'${F:-}'", ""), ("$${N}", "${N}"), ("${N}${N}", 1717), ("$N", "$N"), ("${WORD}", "on"),
        ("${BOTH:-${N}", "${N"), ("[${N}, 2]", None),
    ],
)  # fmt: skip
def test_variables_of_the_environment(text, value):
    environ = {"N": "17", "EMPTY": "", "WORD": "on"}
    if text.startswith("["):
        with pytest.raises(SourceError, match="not valid YAML"):
            read(f"a: {text}", environ)
        return
    assert read(f"a: {text}", environ).values == {"a": value}


def test_what_is_written_is_read_back():
    words = [
        "1e3",
        "010",
        "on",
        "null",
        "",
        "a: b",
        "${HOME}",
        "$${X}",
        "~",
        "0x10",
        "true",
        "- x",
        "é",
        "1_000",
        "1:30",
        "x\ny",
    ]
    values = {
        "words": words,
        "numbers": [1, -0.5, 1e-300, 1e300],
        "none": None,
        "yes": True,
        "deep": {"empty": {}, "1": []},
    }
    assert read(write(values), {"HOME": "elsewhere"}).values == values
