"""The grid of a study: its cells, their jobs, what is searched, and what is refused before the first run."""

import json

import pytest
from support.study_files import planned

from hvdlarge.exits import JobError
from hvdlarge.study.cells import overrides, signature
from hvdlarge.study.results import Level, Range, RunResult
from hvdlarge.study.search import grid
from hvdlarge.study.study_file import Numbers, WholeNumbers


def refused(folder, **changes):
    with pytest.raises(JobError) as error:
        planned(folder, **changes)
    return str(error.value)


def test_the_cells_are_the_grid_in_the_order_of_the_file(tmp_path):
    _, plans, setup = planned(tmp_path)
    assert [plan.cell for plan in plans] == [("32", "lars"), ("32", "sgd"), ("64", "lars"), ("64", "sgd")]  # fmt: skip
    assert setup.factors == {
        "batch.base": (Level("32", 32.0), Level("64", 64.0)),
        "arm": (Level("lars", None), Level("sgd", None)),
    }
    assert [plan.job.batch.base for plan in plans] == [32, 32, 64, 64]
    assert [plan.job.optimizer.name for plan in plans] == ["lars", "sgd"] * 2


def test_a_level_has_its_own_search(tmp_path):
    _, plans, setup = planned(tmp_path)
    assert plans[0].search == {"lr.base": Numbers(low=0.5, high=20, log=True)}
    assert plans[1].search == {"lr.base": Numbers(low=0.01, high=1, log=True)}
    assert plans[1].base == {"lr.base": 0.1}
    assert setup.ranges[("64", "sgd")] == {"lr.base": Range(0.01, 1, True)}


def test_without_factors_the_job_is_the_only_cell(tmp_path):
    _, plans, setup = planned(tmp_path, factors=None)
    assert [(plan.cell, plan.slug) for plan in plans] == [((), "all")]
    assert setup.cells == ((),)


def test_names_for_files_are_short_plain_and_different(tmp_path):
    levels = {"a b": {}, "a/b": {}, "../x": {}, ".hidden": {}, "é" * 90: {}, "a_b": {}, "a": {}, "a-b": {}}  # fmt: skip
    _, plans, _ = planned(tmp_path, factors={"arm": levels})
    slugs = [plan.slug for plan in plans]
    assert len(set(slugs)) == len(levels)
    for slug in slugs:
        assert len(slug) < 61
        assert slug.isascii()
        assert not set(slug) & set("/ ")
        assert not slug.startswith(".")


def test_labels_that_would_have_one_name_have_two(tmp_path):
    factors = {"one": {"a_b": {}, "a": {}}, "two": {"c": {}, "b_c": {}}}
    _, plans, _ = planned(tmp_path, factors=factors)
    assert len({plan.slug for plan in plans}) == 4


def test_excluded_cells_are_left_out(tmp_path):
    _, plans, _ = planned(tmp_path, exclude=[{"arm": "sgd", "batch.base": 64}])
    assert [plan.cell for plan in plans] == [("32", "lars"), ("32", "sgd"), ("64", "lars")]
    assert "exclude leaves no cell" in refused(tmp_path, exclude=[{}])


def test_cells_may_take_the_settings_tuned_at_another(tmp_path):
    _, plans, setup = planned(tmp_path, **{"tune/at": {"batch.base": 32}})
    assert [plan.tuned_at for plan in plans] == [("32", "lars"), ("32", "sgd")] * 2
    assert [bool(plan.search) for plan in plans] == [True, True, False, False]
    assert list(setup.ranges) == [("32", "lars"), ("32", "sgd")]


def test_of_several_tuned_levels_a_cell_takes_its_own_or_the_first(tmp_path):
    at = [{"batch.base": 32, "arm": "lars"}, {"arm": "sgd"}]
    arms = {"lars": {}, "again": {}, "sgd": {}}
    factors = {"batch.base": [32, 64], "arm": arms}
    _, plans, _ = planned(tmp_path, factors=factors, **{"tune/at": at})
    tuned = {plan.cell: plan.tuned_at for plan in plans}
    assert tuned[("64", "lars")] == tuned[("64", "again")] == ("32", "lars")
    assert tuned[("64", "sgd")] == ("64", "sgd")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factors": {"batch.bse": [32]}}, "unknown key 'batch.bse'; did you mean 'base'?"),
        ({"factors": {"epochs": []}}, "epochs has no level"),
        ({"factors": {"epochs": [1, 1]}}, "a level is there twice"),
        ({"factors": {"arm": {"one": {"model.nam": 3}}}}, "unknown key 'model.nam'"),
        ({"factors": {"seed": [1, 2]}}, "seed cannot be set"),
        ({"set": {"run_dir": "x"}}, "run_dir cannot be set"),
        ({"set": {"stop_after_minutes": 3}}, "stop_after_minutes cannot be set: budget.minutes"),
        ({"set": {"batch.base": 0}, "factors": None}, "batch.base"),
        ({"metric": "acuracy"}, "no run writes 'acuracy' to its summary; did you mean 'accuracy'?"),
        ({"metric": "ema_accuracy"}, "no run writes 'ema_accuracy'"),
        ({"exclude": [{"arms": "lars"}]}, "arms is not a factor"),
        ({"exclude": [{"arm": "lamb"}]}, "lamb is not a level of arm"),
        ({"tune/at": {"batch.base": 128}}, "128 is not a level of batch.base"),
        ({"tune/search": {"lr.base": {"low": 5, "high": 20}}}, "lr.base is 4.0 in the job, which low 5 to high 20 exclude"),
        ({"tune/search": {"lr.bse": {"low": 1, "high": 20}}}, "tune: the job has no key 'lr.bse'"),
        ({"tune/search": {"batch.base": {"low": 8, "high": 40.0}}, "factors": None, "set": {"batch.growth": {"policy": "none"}, "batch.micro": 32}}, "tune: batch.base cannot be 8"),
        ({"tune/search": {}, "factors": None}, "nothing is searched here"),
        ({"factors": {"arm": {"one": {"tune": {"lr.base": {"low": 3, "high": 2}}}}}}, "tune: lr.base: low 3 must be less"),
        ({"factors": {"arm": {"one": {"tune": 3}}}}, "tune of a level is a mapping"),
        ({"factors": {"batch.base": list(range(8, 408)), "epochs": list(range(1, 401))}}, "factors: 400 × 400 = 160,000 combinations: more than 100,000"),
        ({"factors": {"lr.base": [1, 2]}}, "lr.base 1: tune: lr.base is a factor: its values are given, not searched"),
        ({"factors": {"lr.base": [1, 2], "arm": {"one": {"tune": {"lr.base": {"low": 1, "high": 2}}}}}, "tune/search": None}, "tune: lr.base is a factor"),
        ({"factors": {"batch.base": [32, 64], "arm": {"one": {"batch.base": 64}}}}, "batch.base 32, arm one: factors: batch.base is 64 in this cell, not 32: another factor sets it too"),
        ({"factors": {"optimizer.momentum": [0.5, 0.9], "arm": {"one": {"optimizer": {"name": "adam"}}}}}, "factors: optimizer.momentum is null in this cell, not 0.5"),
        ({"factors": {"optimizer": [{"name": "sgd", "momentum": 0.5}], "optimizer.momentum": [0.9]}}, 'in this cell, not {"name": "sgd", "momentum": 0.5}: another factor sets it too'),
        ({"job": "digit"}, "digit"),
        ({"job": {"name": "x"}}, "is missing"),
    ],
)  # fmt: skip
def test_a_study_that_cannot_run_is_refused_before_its_first_run(tmp_path, changes, message):
    assert message in refused(tmp_path, **changes)


def test_a_level_may_not_be_tuned_in_a_study_without_a_search(tmp_path):
    text = refused(tmp_path, tune=None)
    assert "the study has not" in text
    assert "arm sgd" in text


def test_choices_are_tried_before_the_first_run(tmp_path):
    search = {"optimizer.name": {"choices": ["lars", "larz"]}}
    text = refused(tmp_path, factors=None, **{"tune/search": search})
    assert 'tune: optimizer.name cannot be "larz"' in text


def test_the_job_may_be_in_the_study_file_and_extend_another(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "name: base\nepochs: 3\ndata: {name: digits}\nmodel: {name: mlp}\nbatch: {base: 32, micro: 8}\nlr: {base: 1}\n"
    )
    study, plans, _ = planned(tmp_path, job={"extends": "base.yaml", "epochs": 5}, factors=None)
    assert plans[0].job.epochs == 5
    assert plans[0].job.model.name == "mlp"
    assert study.name == "small"


def test_a_path_is_relative_to_the_study_file(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    (tmp_path / "digits").mkdir()  # hides no shipped job
    (tmp_path / "mine.yaml").write_text(
        "name: m\nepochs: 3\ndata: {name: digits}\nmodel: {name: mlp}\nbatch: {base: 32, micro: 8}\nlr: {base: 1}\n"
    )
    _, plans, _ = planned(tmp_path, job="mine.yaml", factors=None)
    assert plans[0].job.model.name == "mlp"


def test_the_direction_is_that_of_the_metric_unless_given(tmp_path):
    assert not planned(tmp_path)[2].lower_is_better
    assert planned(tmp_path, metric="test_loss")[2].lower_is_better
    assert planned(tmp_path, direction="minimize")[2].lower_is_better


def test_the_signature_of_a_cell_changes_with_what_decides_its_results(tmp_path):
    plan = planned(tmp_path)[1][0]
    same = planned(tmp_path, seeds=5)[1][0]
    other = planned(tmp_path, set={"epochs": 7})[1][0]
    assert signature(plan) == signature(same) != signature(other)
    assert json.loads(json.dumps(signature(plan))) == signature(plan)


def test_overrides_are_read_as_they_were():
    assert overrides({"lr.base": 1e-05, "init_from": None}) == ["lr.base=1e-05", "init_from=null"]


def test_keys_with_whole_numbers_are_searched_over_those(tmp_path):
    search = {"batch.base": {"low": 15.5, "high": 64.5}, "lr.base": {"low": 1, "high": 8}}
    _, (plan,), setup = planned(tmp_path, factors=None, **{"tune/search": search})
    whole = plan.search["batch.base"]
    assert isinstance(whole, WholeNumbers)
    assert (whole.first, whole.last) == (16, 64)
    assert not isinstance(plan.search["lr.base"], WholeNumbers)
    assert setup.ranges[()]["batch.base"] == Range(16, 64, False)
    search = {"batch.base": {"low": 31.5, "high": 32.5}}
    assert "fewer than two" in refused(tmp_path, factors=None, **{"tune/search": search})


def test_searched_whole_numbers_end_where_the_range_says(tmp_path):
    search = {"batch.base": {"low": 31.5, "high": 39.5}}
    _, (plan,), setup = planned(tmp_path, factors=None, **{"tune/search": search})
    assert setup.ranges[()]["batch.base"] == Range(32, 39, False)
    assert grid(plan.search, 2) == [{"batch.base": 32}, {"batch.base": 39}]


def test_a_grid_that_is_far_too_large_is_refused_at_once(tmp_path):
    factors = {f"arm{number}": {str(level): {} for level in range(1000)} for number in range(5)}
    assert "1,000,000,000,000,000 combinations" in refused(tmp_path, factors=factors)


def test_factors_may_set_parts_of_the_same_section(tmp_path):
    factors = {
        "optimizer": [{"name": "sgd"}, {"name": "sgd", "nesterov": True}],
        "optimizer.momentum": [0.5, 0.9],
        "arm": {"one": {"optimizer.weight_decay": 0.01}},
    }
    plans = planned(tmp_path, factors=factors)[1]
    assert [plan.job.optimizer.momentum for plan in plans] == [0.5, 0.9, 0.5, 0.9]


def test_a_grid_need_not_hold_the_settings_of_the_job(tmp_path):
    search = {"lr.base": {"low": 20, "high": 30}}
    changes = {"tune/search": search, "tune/sampler": "grid", "factors": None}
    _, (plan,), _ = planned(tmp_path, **changes)
    assert plan.base == {"lr.base": 4.0}


def test_trials_may_be_compared_by_another_result_than_the_metric(tmp_path):
    setup = planned(tmp_path, **{"tune/metric": "test_loss"})[2]
    assert (setup.tuned_by, setup.score_lower_is_better) == ("test_loss", True)
    assert not setup.lower_is_better
    one, other = (
        RunResult(("32", "lars"), "trial", number, 0, {}, "finished", value=1.0, score=score)
        for number, score in enumerate((0.3, 0.2))
    )
    diverged = RunResult(("32", "lars"), "trial", 2, 0, {}, "diverged", value=None)
    assert min([one, other, diverged], key=setup.loss) is other
    assert min([one, other], key=planned(tmp_path)[2].loss) is one
    assert planned(tmp_path, **{"tune/metric": "accuracy"})[2].tuned_by == ""
    assert "tune.metric: no run writes 'tset_loss'" in refused(
        tmp_path, **{"tune/metric": "tset_loss"}
    )
