"""What is tried next: a function of the results before, near the optimum of a known function, and kept by a journal."""

import math

import optuna
import pytest

from hvdlarge.exits import JobError
from hvdlarge.study.search import Journal, Tried, grid, suggest
from hvdlarge.study.study_file import Choices, Numbers, Tune, WholeNumbers

LR = {"lr.base": Numbers(low=0.001, high=10, log=True)}
MIXED = {**LR, "momentum": Numbers(low=0, high=0.99), "nesterov": Choices(choices=(True, False, None))}  # fmt: skip


def tune_of(**more):
    return Tune(**{"trials": 20, **more})


def tuned(tune, search, loss, cell="cell"):
    """All trials of a search, in rounds."""
    tried = []
    while len(tried) < tune.trials:
        round_before = list(tried)
        asked = []
        for _ in range(min(tune.round, tune.trials - len(tried))):
            pending = [Tried(each, None) for each in asked]
            asked.append(suggest(tune, search, cell, [*round_before, *pending]))
        tried += [Tried(each, loss(each)) for each in asked]
    return tried


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_suggestions_are_a_function_of_the_results_before(sampler):
    tune = tune_of(sampler=sampler)
    tried = [Tried({"lr.base": 10**-each, "momentum": 0.1 * each, "nesterov": True}, each) for each in (0.5, 1, 1.5)]  # fmt: skip
    first = suggest(tune, MIXED, "cell", tried)
    assert first == suggest(tune, MIXED, "cell", tried)
    assert first != suggest(tune, MIXED, "another cell", tried)
    assert first != suggest(tune_of(sampler=sampler, seed=1), MIXED, "cell", tried)
    assert 0.001 <= first["lr.base"] <= 10
    assert first["nesterov"] in (True, False, None)


@pytest.mark.parametrize("cell", ["one"])
def test_the_best_rate_of_a_known_function_is_found_within_10_percent(cell):
    best = 0.0734

    def loss(settings):
        return math.log(settings["lr.base"] / best) ** 2

    tried = tuned(tune_of(sampler="gp"), LR, loss, cell)
    rate = min(tried, key=lambda each: each.loss).settings["lr.base"]
    assert abs(rate / best - 1) < 0.1


def test_runs_that_failed_drive_the_search_away():
    """Half of the range diverges; the optimum lies at its edge."""

    def loss(settings):
        return -settings["lr.base"] if settings["lr.base"] < 0.3 else math.inf

    for sampler, nearest in (("tpe", 0.15), ("gp", 0.05)):  # a Gaussian process knows no cliffs
        tried = tuned(tune_of(sampler=sampler), LR, loss)
        best = min(tried, key=lambda each: each.loss).settings["lr.base"]
        assert nearest < best < 0.3, sampler


def test_trials_of_one_round_differ():
    for sampler in ("tpe", "gp", "random"):
        rates = [each.settings["lr.base"] for each in tuned(tune_of(sampler=sampler), LR, lambda each: each["lr.base"])]  # fmt: skip
        assert len(set(rates)) == len(rates), sampler


def test_all_results_equal_or_failed_are_no_error():
    for result in (0.0, math.inf):
        for sampler in ("tpe", "gp"):
            assert len(tuned(tune_of(sampler=sampler, trials=6), MIXED, lambda _, r=result: r)) == 6


def test_a_grid_has_the_ends_of_its_ranges_and_all_choices():
    points = grid({**LR, "nesterov": Choices(choices=(True, False))}, 10)
    rates = sorted({point["lr.base"] for point in points})
    assert rates == [0.001, 0.01, 0.1, 1.0, 10]
    assert [point["nesterov"] for point in points] == [True, False] * 5
    assert suggest(tune_of(sampler="grid", trials=5), LR, "", []) == {"lr.base": 0.001}


def test_a_number_of_trials_that_is_no_grid_is_refused():
    two = {**LR, "momentum": Numbers(low=0, high=1)}
    assert len(grid(two, 9)) == 9
    with pytest.raises(
        JobError, match=r"tune.trials is 10: a grid of this search has 4, 9, 16, 25 …"
    ):
        grid(two, 10)
    with pytest.raises(JobError, match="a grid of this search has 2$"):
        grid({"ema": Choices(choices=(True, False))}, 4)


def test_what_was_tried_is_not_tried_again_until_all_choices_are_used_up():
    search = {"momentum": Choices(choices=(0.0, 0.5, 0.9, 0.95, 0.99))}
    for sampler in ("tpe", "gp", "random"):
        for seed in range(3):
            tried = tuned(tune_of(sampler=sampler, trials=6, seed=seed), search, lambda each: each["momentum"])  # fmt: skip
            assert len({each.settings["momentum"] for each in tried[:5]}) == 5, sampler


def test_whole_numbers_are_suggested_once_each():
    search = {"batch.base": WholeNumbers(low=1, high=6)}
    for sampler in ("tpe", "gp", "random"):
        tried = tuned(tune_of(sampler=sampler, trials=6), search, lambda each: each["batch.base"])
        values = [each.settings["batch.base"] for each in tried]
        assert sorted(values) == [1, 2, 3, 4, 5, 6], sampler
        assert all(isinstance(value, int) for value in values)
    assert [each["batch.base"] for each in grid(search, 3)] == [1, 4, 6]
    with pytest.raises(JobError, match="fewer whole numbers than the grid has points"):
        grid(search, 7)


def test_a_process_goes_on_beside_one_that_was_killed_within_a_line(tmp_path):
    path = tmp_path / "journal"
    alive = Journal(path, tune_of(), lower_is_better=True)
    alive.add("cell", {"lr.base": 0.5}, LR)
    with path.open("ab") as file:
        file.write(b'{"op_code": 4, "worker')
    alive.add("cell", {"lr.base": 0.25}, LR)
    assert alive.settings("cell") == [{"lr.base": 0.5}, {"lr.base": 0.25}]
    assert Journal(path, tune_of(), lower_is_better=True).settings("cell") == alive.settings("cell")


def test_a_journal_keeps_trials_for_other_processes(tmp_path):
    path = tmp_path / "journal"
    tune = tune_of(trials=3)
    one = Journal(path, tune, lower_is_better=True)
    one.add("cell", {"lr.base": 0.5}, LR)
    one.add("cell", {"lr.base": 5}, LR)
    other = Journal(path, tune, lower_is_better=True)
    assert other.settings("cell") == [{"lr.base": 0.5}, {"lr.base": 5.0}]
    assert other.settings("another") == []
    other.finish("cell", 0, 0.25, pruned=False)
    one.finish("cell", 0, 0.25, pruned=False)  # told twice
    one.finish("cell", 1, None, pruned=False)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    trials = optuna.load_study(study_name="cell", storage=storage).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL"]
    assert trials[0].value == 0.25


def test_a_journal_cut_off_at_any_byte_goes_on(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path, tune_of(), lower_is_better=True)
    journal.add("cell", {"lr.base": 0.5}, LR)
    content = path.read_bytes()
    for length in range(0, len(content), 23):
        path.write_bytes(content[:length])
        again = Journal(path, tune_of(), lower_is_better=True)
        again.add("cell", {"lr.base": 0.25}, LR)
        settings = Journal(path, tune_of(), lower_is_better=True).settings("cell")
        assert settings[-1] == {"lr.base": 0.25}


@pytest.mark.parametrize("line", [b'{"op_code": 4, "wo', b"{}", b"3", b"null", b"\xff\xfe", b'{"op_code": 99}'])  # fmt: skip
def test_a_damaged_journal_is_set_aside_by_all_processes(tmp_path, line, capsys):
    path = tmp_path / "journal"
    alive = Journal(path, tune_of(), lower_is_better=True)
    alive.add("cell", {"lr.base": 0.5}, LR)
    content = path.read_bytes()
    path.write_bytes(content + line + b"\n" + content)
    one = Journal(path, tune_of(), lower_is_better=True)
    assert one.settings("cell") == []
    assert "journal was damaged" in capsys.readouterr().out
    one.add("cell", {"lr.base": 0.25}, LR)
    assert alive.settings("cell") == [{"lr.base": 0.25}]
    assert not alive.prune("cell", 3, [0.5])
    alive.add("cell", {"lr.base": 0.75}, LR)
    assert one.settings("cell") == [{"lr.base": 0.25}, {"lr.base": 0.75}]
    assert capsys.readouterr().out == ""
    assert (tmp_path / "journal.old").read_bytes().startswith(content + line)


def test_pruners_end_a_trial_that_is_worse_than_the_others(tmp_path):
    journal = Journal(tmp_path / "journal", tune_of(pruner="median"), lower_is_better=False)
    for number in range(5):
        journal.add("cell", {"lr.base": 0.1 + number}, LR)
        assert not journal.prune("cell", number, [0.5, 0.6, 0.7 + 0.01 * number])
        journal.finish("cell", number, 0.7, pruned=False)
    journal.add("cell", {"lr.base": 9}, LR)
    assert not journal.prune("cell", 5, [0.55])
    journal.add("cell", {"lr.base": 10}, LR)
    assert journal.prune("cell", 6, [0.1])
    journal.finish("cell", 6, None, pruned=True)
    journal.finish("cell", 5, None, pruned=True)
    none = Journal(tmp_path / "journal", tune_of(), lower_is_better=False)
    none.add("cell", {"lr.base": 9.5}, LR)
    assert not none.prune("cell", 7, [0.0, 0.0])
