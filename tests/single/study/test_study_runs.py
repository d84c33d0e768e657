"""A run's process and its result: environment, reasons, and what is read from its folder."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.report_runs import write_report_run

from hvdlarge.study.cells import JobSource
from hvdlarge.study.child import Child, child_environment
from hvdlarge.study.collect import MissingMetricError, end_of, remove_large_files, result_of_run

HOW = {"cell": ("64",), "kind": "trial", "number": 0, "seed": 3, "settings": {}}


def finished(folder, **summary):
    values = {"accuracy": 0.97, "steps": 400, "epochs": 20.0, "train_seconds": 9.5, **summary}
    (folder / "summary.json").write_text(json.dumps(values))


def test_the_result_of_a_run_is_what_it_logged(tmp_path):
    run = tmp_path / "run"
    write_report_run(run)
    finished(run)
    result = result_of_run(run, HOW, "accuracy", "", ("finished", ""))
    assert (result.state, result.value, result.steps, result.seconds) == (
        "finished",
        0.97,
        400,
        9.5,
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "accuracy" in line]
    assert [(p.step, p.value) for p in result.curve] == [(line["step"] + 1, line["accuracy"]) for line in evaluations]  # fmt: skip
    distances = [line for line in lines if "weight_distance" in line]
    assert result.distance[-1].value == distances[-1]["weight_distance"]
    assert result.distance[-1].lr == [line["lr"] for line in lines if "lr" in line][-1]
    assert result.noise[-1].value == [line["noise_scale"] for line in lines if line.get("noise_scale")][-1]  # fmt: skip
    assert result.batch == 32


def test_long_series_are_thinned_and_keep_their_end(tmp_path):
    run = tmp_path / "run"
    write_report_run(run, steps=6000)
    finished(run)
    result = result_of_run(run, HOW, "accuracy", "", ("finished", ""))
    assert 100 < len(result.distance) <= 400
    assert result.distance[-1].step == 6000


def test_a_metric_that_is_not_finite_is_a_divergence(tmp_path):
    run = tmp_path / "run"
    write_report_run(run)
    finished(run, accuracy="nan")
    result = result_of_run(run, HOW, "accuracy", "", ("finished", ""))
    assert (result.state, result.value, result.reason) == ("diverged", None, "accuracy is nan")


def test_a_run_without_the_metric_is_an_error_that_names_its_results(tmp_path):
    run = tmp_path / "run"
    write_report_run(run)
    finished(run)
    with pytest.raises(MissingMetricError, match=r"no 'perplexity'; it has accuracy, steps"):
        result_of_run(run, HOW, "perplexity", "", ("finished", ""))


def test_a_run_that_ended_before_its_first_line_has_no_numbers(tmp_path):
    result = result_of_run(tmp_path / "run", HOW, "accuracy", "", ("failed", "no model"))
    assert (result.state, result.reason, result.steps) == ("failed", "no model", None)


@pytest.mark.parametrize(
    ("code", "reason", "end"),
    [
        (73, "loss is nan", ("diverged", "loss is nan")),
        (73, "", ("diverged", "loss or weights are not finite")),
        (70, "", ("failed", "exit code 70")),
        (-9, "whatever", ("failed", "ended by SIGKILL")),
    ],
)
def test_ends_in_words(code, reason, end):
    assert end_of(code, reason) == end


def test_only_what_a_resume_needs_is_removed(tmp_path):
    for name in ("checkpoints/last.pt", "progress/rank_0.json", "initial_weights.pt", "metrics.jsonl", "summary.json"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    remove_large_files(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["metrics.jsonl", "summary.json"]


def test_a_run_sees_nothing_of_the_launcher_of_the_study(tmp_path):
    environ = {
        "OMPI_COMM_WORLD_RANK": "3", "OMPI_MCA_btl": "tcp", "PMIX_RANK": "3", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_JOB_ID": "7", "HOROVOD_RANK": "3", "HOROVOD_CYCLE_TIME": "2", "HOME": "/home/ada", "PYTHONPATH": "/mine",
    }  # fmt: skip
    found = child_environment(environ, 2, tmp_path)
    assert found == {
        "OMPI_MCA_btl": "tcp", "SLURM_JOB_ID": "7", "HOROVOD_CYCLE_TIME": "2", "HOME": "/home/ada",
        "PYTHONPATH": f"/mine{os.pathsep}{tmp_path}", "HVDLARGE_THREADS": "2", "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        ("a\nhvdlarge: error: disk full\n", "disk full"),
        ("hvdlarge: error: 2 problems\n  x: one\n  y: two\nlast\n", "2 problems x: one y: two"),
        ("hvdlarge: error: first\nhvdlarge: error: second\n", "second"),
        ("Traceback\nKeyError: 3\n\n", "KeyError: 3"),
        ("", ""),
    ],
)
def test_the_reason_of_an_end_is_its_last_error(tmp_path, printed, reason):
    output = tmp_path / "run.txt"
    output.write_text(printed)
    child = Child.__new__(Child)
    child._output = output
    assert child.reason() == reason


def goes_on(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_a_run_ends_with_a_study_that_is_killed(tmp_path):
    """By the kernel, on Linux: nothing of the study is left to end it."""
    code = (
        "import time; from pathlib import Path\n"
        "from hvdlarge.study.child import _end_with_parent\n"
        "import signal, subprocess\n"
        "child = subprocess.Popen(['sleep', '600'], preexec_fn=lambda: _end_with_parent(signal.SIGKILL))\n"
        "print(child.pid, flush=True); time.sleep(600)\n"
    )
    study = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(study.stdout.readline())
    study.kill()
    study.wait()
    study.stdout.close()
    for _ in range(200):
        if not goes_on(pid):
            return
        time.sleep(0.05)
    pytest.fail("the run goes on")


def test_a_source_of_keys_is_read_beside_the_study_file(tmp_path):
    (tmp_path / "parts.py").write_text(
        "import torch\n\ndef net():\n    return torch.nn.Linear(64, 10)\n"
    )
    text = "name: x\nepochs: 1\ndata: {name: digits}\nmodel: {name: 'parts:net'}\nbatch: {base: 8, micro: 8}\nlr: {base: 1}\n"
    source = JobSource(tmp_path / "elsewhere/job.yaml", text, tmp_path / "study.yaml")
    assert source.read({"lr.base": 0.5}).lr.base == 0.5


def test_trials_may_be_compared_by_another_result(tmp_path):
    run = tmp_path / "run"
    write_report_run(run)
    finished(run, test_loss=0.25)
    result = result_of_run(run, HOW, "accuracy", "test_loss", ("finished", ""))
    assert (result.value, result.score) == (0.97, 0.25)
    with pytest.raises(MissingMetricError, match="no 'perplexity'"):
        result_of_run(run, HOW, "accuracy", "perplexity", ("finished", ""))
