"""The command line of the benchmarks."""

import pytest

from hvdlarge.bench.__main__ import main


@pytest.mark.parametrize(
    ("count", "words"),
    [("abc", "argument --rounds: 'abc' is not a whole number"), ("0", "0 is less than 1")],
)
def test_a_count_that_is_none_is_told_in_the_users_words(capsys, count, words):
    with pytest.raises(SystemExit) as raised:
        main(["lars", "--rounds", count])
    assert raised.value.code == 2
    assert words in capsys.readouterr().err
