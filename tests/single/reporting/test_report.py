"""Reports of runs that finished, go on, were killed or were resumed; of files that are damaged, foreign or huge."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
import tracemalloc

import pytest

from hvdlarge.exits import JobError
from hvdlarge.report import main
from hvdlarge.reporting.fits import line_fit, logarithmic, power
from hvdlarge.reporting.report_text import Target, time_to
from hvdlarge.reporting.run_reader import Thinned, column, metrics_of, read_run

LAYERS = ("features.0.weight", "features.0.bias", "classifier.weight")


def lines_of(steps=40, with_time=True):
    """The lines of metrics.jsonl of a run with all measurements, a step for each line."""
    for step in range(steps):
        place = {"step": step, "epoch": (step + 1) / 10, "samples_seen": 32 * (step + 1)}
        if with_time:
            place["time"] = 1_800_000_000.0 + 0.5 * step
        times = {"forward_seconds": 0.1, "backward_seconds": 0.2, "allreduce_seconds": 0.1}
        loss = {
            "loss": 2 * math.exp(-step / 20),
            "lr": 0.1,
            "global_batch": 32 if step < 20 else 64,
        }
        yield place | loss | times | {"trust_ratio_min": 0.001, "trust_ratio_max": 0.1}
        ratios = [0.001 * (step + 1), None, 0.02]
        yield place | {
            "layers": {
                name: {"weight_norm": 1.0, "gradient_norm": 0.1, "trust_ratio": ratio, "update_ratio": 0.01}
                for name, ratio in zip(LAYERS, ratios, strict=True)
            }
        }  # fmt: skip
        noise = {"noise_scale": None if step == 3 else 40.0 + step, "gradient_square": 0.1}
        yield place | noise | {"gradient_variance": 4.0, "global_batch": loss["global_batch"]}
        yield place | {"weight_distance": 3 * math.log(step + 2), "distances": {}}
        if step % 10 == 9:
            yield place | {"test_loss": 1.0, "accuracy": 0.5 + step / 100}


def write_run(folder, lines=None, finished=True):
    folder.mkdir(parents=True)
    (folder / "job.resolved.yaml").write_text("name: made\n")
    with (folder / "metrics.jsonl").open("w") as file:
        for line in lines_of() if lines is None else lines:
            file.write(json.dumps(line) + "\n")
    with (folder / "decisions.jsonl").open("w") as file:
        for step in range(40):
            stage = int(step >= 20)
            decided = {"step": step, "epoch": step / 10, "stage": stage, "lr": 0.1 + 0.001 * step}
            file.write(
                json.dumps(decided | {"stage_batch": 32 << stage, "global_batch": 32}) + "\n"
            )
    (folder / "starts.jsonl").write_text(
        '{"step": 0, "world_size": 2}\n{"step": 9, "world_size": 4}\n'
    )
    if finished:
        (folder / "summary.json").write_text('{"steps": 40, "world_size": 4}')
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "made")


def test_a_page_needs_nothing_else_and_has_every_figure(run, capsys):
    assert main([str(run)]) == 0
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 7
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert len(list((run / "report").glob("*.png"))) == 7
    said = capsys.readouterr().out
    assert "2, then 4" in said
    assert "finished" in said
    assert str(run / "report.html") in said


def test_every_figure_has_labelled_axes(run, monkeypatch):
    from matplotlib.figure import Figure

    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: seen.append(figure))
    assert main([str(run), "--out", str(run / "other.html")]) == 0
    assert len(seen) == 7
    for figure in seen:
        bottom = [axes for axes in figure.axes if axes.get_subplotspec() is not None]
        assert any(axes.get_xlabel() for axes in bottom)
        assert any(axes.get_ylabel() or axes.get_yticklabels() for axes in bottom)


def test_several_runs_are_shown_side_by_side_with_the_time_to_a_target(run, tmp_path, capsys):
    slow = write_run(tmp_path / "slow", [line for line in lines_of() if "accuracy" not in line])
    out = tmp_path / "both.html"
    assert main([str(run), str(slow), "--out", str(out), "--target", "accuracy=0.65"]) == 0
    said = capsys.readouterr().out
    assert "time to accuracy 0.65" in said
    assert "not reached" in said
    assert "epoch 2.00" in said
    assert "layers-slow.png" in os.listdir(tmp_path / "both")
    assert time_to(read_run(run), Target("accuracy", 0.6))[0] == 2.0


def test_two_runs_of_one_name_are_called_by_their_folders(run, tmp_path, capsys):
    other = write_run(tmp_path / "made")
    assert main([str(run), str(other), "--text"]) == 0
    assert str(other) in capsys.readouterr().out


def test_a_run_that_was_killed_in_the_middle_of_a_line_is_shown_so_far(tmp_path, capsys):
    folder = write_run(tmp_path / "run", finished=False)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[: len(text) // 2])
    (folder / "decisions.jsonl").unlink()
    (folder / "starts.jsonl").write_text("")
    assert main([str(folder)]) == 0
    said = capsys.readouterr().out
    assert "not finished" in said
    assert "decisions.jsonl is missing" in said
    assert "no JSON objects" not in said


def test_what_was_not_measured_is_left_out_with_the_key_that_measures_it(tmp_path):
    lines = [line for line in lines_of() if "lr" in line]
    for line in lines:
        del line["trust_ratio_min"]
    folder = write_run(tmp_path / "run", lines)
    assert main([str(folder)]) == 0
    page = (folder / "report.html").read_text()
    for key in ("log.layers_every_steps", "log.noise_every_steps", "log.distances"):
        assert key in page
    assert page.count("data:image") == 3


def test_words_of_a_run_are_escaped(tmp_path):
    folder = write_run(tmp_path / "<script>alert(1)<")
    assert main([str(folder)]) == 0
    assert "<script>" not in (folder / "report.html").read_text()


def test_a_run_without_times_of_lines_has_the_sum_of_its_phases(tmp_path):
    folder = write_run(tmp_path / "run", lines_of(with_time=False))
    assert column(read_run(folder).steps, "seconds")[-1] == pytest.approx((40 * 0.4,))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no line of a step"),
        (b"\x00\xff\xfe" * 400 + b"\n", "no JSON objects"),
        (b'{"a": 1}\n[1]\n{"step": "x", "epoch": 1, "samples_seen": 1}\n', "have no step"),
        (b"[" * 100_000 + b"\n", "no JSON objects"),
    ],
)
def test_foreign_files_give_a_report_that_says_what_is_missing(tmp_path, capsys, content, words):
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_bytes(content)
    assert main([str(folder)]) == 0
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["nowhere"], ["."], ["RUN", "RUN"], ["RUN", "--out", "/dev/null/x.html"]]
)
def test_what_is_no_run_or_cannot_be_written_is_refused(
    tmp_path, monkeypatch, capsys, run, arguments
):
    monkeypatch.chdir(tmp_path)
    assert main([str(run) if each == "RUN" else each for each in arguments]) == 2
    assert capsys.readouterr().err.startswith("hvdlarge: error: ")


@pytest.mark.parametrize("arguments", [["--target", "x"], ["--watch", "0"], ["--watch", "nan"]])
def test_a_wrong_command_line_is_refused(run, arguments):
    with pytest.raises(SystemExit) as raised:
        main([str(run), *arguments])
    assert raised.value.code == 2


def test_huge_files_are_read_in_bounded_memory(tmp_path):
    folder = write_run(tmp_path / "run", [])
    line = {"loss": 1.0, "lr": 0.1, "global_batch": 32, "padding": "x" * 400}
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(40_000):
            place = {"step": step, "epoch": step / 1000, "samples_seen": step}
            file.write(json.dumps(place | line) + "\n")
        file.write("x" * 40_000_000)  # one endless line
    assert (folder / "metrics.jsonl").stat().st_size > 60_000_000
    tracemalloc.start()
    found = read_run(folder)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 45_000_000
    assert column(found.steps, "step")[0] == (0.0,)
    assert column(found.steps, "step")[-1] == (39_999.0,)
    assert 1000 <= len(found.steps) <= 2001


def test_thinned_items_are_evenly_spaced_and_end_with_the_last():
    for count in (1, 7, 8, 9, 100, 12_345):
        kept = Thinned(most=8)
        for number in range(count):
            kept.append(number)
        items = list(kept)
        assert items[0] == 0
        assert items[-1] == count - 1
        assert len(items) <= 9
        gaps = {after - before for before, after in itertools.pairwise(items[:-1])}
        assert len(gaps) <= 1


def test_watching_ends_with_the_run(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "run", finished=False)
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            (folder / "summary.json").write_text("{}")

    monkeypatch.setattr("hvdlarge.report.time.sleep", sleep)
    assert main([str(folder), "--text", "--watch", "3"]) == 0
    assert waits == [3.0, 3.0]
    assert capsys.readouterr().out.count("stages") == 3


def test_neither_torch_nor_mpi_is_imported(run):
    code = (
        "import sys; from hvdlarge.report import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'horovod', 'mpi4py', 'numpy'} & set(sys.modules), sys.modules.keys(); "
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run), "--text"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_known_exponents_are_found_again():
    steps = [float(step) for step in range(11, 2000, 7)]
    found = power(steps, [0.3 * step**0.37 for step in steps])
    assert found.slope == pytest.approx(0.37)
    assert math.exp(found.intercept) == pytest.approx(0.3)
    found = logarithmic(steps, [2.5 * math.log(step) - 1 for step in steps])
    assert found[:2] == pytest.approx((2.5, -1))
    noisy = [0.3 * step**0.37 * (1 + 0.1 * math.sin(step * 12.9898)) for step in steps]
    found = power(steps, noisy)
    assert abs(found.slope - 0.37) < 4 * found.slope_error < 0.1
    with pytest.raises(ValueError, match="three points"):
        line_fit([1, 2], [1, 2])


def test_the_metrics_of_a_run_are_those_of_its_evaluations(run):
    assert metrics_of(read_run(run)) == ["accuracy"]
    with pytest.raises(JobError, match="no run folder"):
        read_run(run / "nothing")
