"""The command of a study before its first run: what it plans, and what it refuses."""

import pytest
from support.study_files import written

from hvdlarge.study.__main__ import main


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune/search": {"lr.bose": {"low": 1, "high": 2}}}, "the job has no key 'lr.bose'"),
        ({"tune/search": {"lr.base": {"low": 5, "high": 20}}}, "low 5 to high 20 exclude"),
        ({"factors": {"batch.inital": [32]}}, "unknown key 'batch.inital'; did you mean 'initial'?"),
        ({"metric": "perplexity"}, "no run writes 'perplexity'"),
        ({"analysis": [{"kind": "ladder", "factor": "arms"}]}, "did you mean 'arm'?"),
        ({"analysis": [{"kind": "batch_limit", "batch": "arm", "tolerance": 0.01}]}, "analysis.0.batch"),
        ({"tune/sampler": "grid", "tune/trials": 1}, "a grid of this search has"),
        ({"seed": 3}, "unknown key 'seed'"),
        ({"tune/trials": 30_000}, "4 tuned cells × 30,000 trials + 4 cells × 3 seeds = 120,012 runs: more than 100,000"),
    ],
)  # fmt: skip
def test_a_wrong_study_is_refused_with_code_2_and_leaves_nothing(
    tmp_path, changes, message, capsys
):
    path = written(tmp_path, **changes)
    assert main([str(path), "--folder", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "study.yaml" in error
    assert not (tmp_path / "runs").exists()


def test_the_plan_lists_all_cells_and_starts_nothing(tmp_path, capsys):
    path = written(tmp_path, **{"tune/at": {"batch.base": 32}})
    assert main([str(path), "--plan", "--folder", str(tmp_path / "runs")]) == 0
    text = capsys.readouterr().out
    assert "20 runs = 8 trials + 12 repetitions" in text
    assert "lr.base 0.5 to 20 (log)" in text
    assert "settings of batch.base 32, arm sgd" in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("jobs", ["0", "-1", "two", "1001"])
def test_a_wrong_number_of_jobs_is_refused(tmp_path, jobs, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(written(tmp_path)), "--jobs", jobs])
    assert ended.value.code == 2
    assert "is not a number from 1 to 1000" in capsys.readouterr().err


def test_an_empty_launcher_is_refused(tmp_path, capsys):
    path = written(tmp_path, workers=2)
    assert main([str(path), "--mpirun", "", "--folder", str(tmp_path / "runs")]) == 2
    assert "--mpirun is empty" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
