"""Study files: what they hold, and what is refused, with its line."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.study_files import written

from hvdlarge.exits import JobError
from hvdlarge.study.study_file import Choices, Numbers, read_study

GOOD = """\
name: good
job: digits
factors: {batch.base: [32, 64]}
tune: {search: {lr.base: {low: 0.5, high: 20, log: true}}, trials: 4}
seeds: 8
metric: accuracy
"""


def refused(folder, text):
    path = folder / "study.yaml"
    path.write_text(text)
    with pytest.raises(JobError) as error:
        read_study(str(path))
    return str(error.value)


def test_a_study_file_is_read(tmp_path):
    study = read_study(str(written(tmp_path)))
    assert study.name == "small"
    assert study.tune.search["lr.base"] == Numbers(low=0.5, high=20, log=True)
    assert study.seed_list == (1, 2, 3)


def test_the_name_of_a_study_is_by_default_that_of_its_file(tmp_path):
    (tmp_path / "my limit.yaml").write_text("job: digits\n")
    assert read_study(str(tmp_path / "my limit.yaml")).name == "my-limit"


def test_seeds_begin_after_that_of_the_tuning(tmp_path):
    assert read_study(str(written(tmp_path, **{"tune/seed": 7}))).seed_list == (8, 9, 10)


def test_a_seed_of_the_tuning_is_no_seed_of_a_repetition(tmp_path):
    text = GOOD.replace("seeds: 8", "seeds: [3, 0]")
    assert "0 is the seed of the tuning" in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: 8", "seed: 8", "study.yaml:5: unknown key 'seed'; did you mean 'seeds'?"),
        ("seeds: 8", "seeds: [1, 1]", "a seed is there twice"),
        ("seeds: 8", "seeds: many", "study.yaml:5: seeds"),
        ("job: digits\n", "", "the key 'job' is missing"),
        ("trials: 4", "trials: 0", "tune.trials is 0: input should be greater than or equal to 1"),
        ("trials: 4", "sampler: tpe", "the key 'tune.trials' is missing"),
        ("trials: 4", "trials: 4, sampler: bayes", "tune.sampler is \"bayes\""),
        ("trials: 4", "trials: 4, pruning: none", "unknown key 'tune.pruning'; did you mean 'pruner'?"),
        ("low: 0.5", "low: 50", "low 50 must be less than high 20"),
        ("low: 0.5", "low: 0", "low is 0: with log it must be positive"),
        ("{low: 0.5, high: 20, log: true}", "{choices: [1]}", "at least 2 items"),
        ("metric: accuracy", "direction: up", "direction is \"up\""),
        ("metric: accuracy", "analysis: [{kind: compares}]", "compares"),
        ("metric: accuracy", "analysis: [{kind: batch_limit, batc: 3}]", "unknown key 'analysis.0.batc'"),
        ("name: good", "name: ../../etc", "name is \"../../etc\""),
        ("metric: accuracy", "budget: {minutes: 0}", "budget.minutes is 0"),
        ("metric: accuracy", "workers: 0", "workers is 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(tmp_path, old, new, message):
    assert old in GOOD
    assert message in refused(tmp_path, GOOD.replace(old, new))


def test_all_mistakes_are_reported_at_once(tmp_path):
    text = refused(tmp_path, GOOD.replace("trials: 4", "trials: 0") + "seed: 3\n")
    assert "2 problems" in text
    assert "tune.trials" in text
    assert "'seed'" in text


@pytest.mark.parametrize("text", ["", "[]", "42", "a: [", "a: 1\na: 2", "\x00"])
def test_what_is_no_mapping_is_refused(tmp_path, text):
    assert "study.yaml" in refused(tmp_path, text)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(JobError, match="no such study file"):
        read_study(str(tmp_path / "none.yaml"))
    with pytest.raises(JobError, match="cannot be read"):
        read_study(str(tmp_path))


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
            ["name", "job", "set", "factors", "tune", "search", "trials", "low", "high", "log", "choices", "seeds",
             "budget", "analysis", "kind", "at", "lr.base", "metric"]), inner, max_size=4),
        max_leaves=12,
    )
)  # fmt: skip
def test_no_content_of_a_file_is_an_internal_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(json.dumps(content))
    with contextlib.suppress(JobError):
        read_study(str(path))


def test_a_space_holds_its_values_only():
    numbers, choices = Numbers(low=1, high=2), Choices(choices=(True, 1.5, None))
    assert numbers.holds(1)
    assert numbers.holds(2.0)
    assert not any(map(numbers.holds, (0.9, 2.1, True, "1", None)))
    assert choices.holds(True)
    assert choices.holds(None)
    assert not any(map(choices.holds, (1, "1.5", False)))
