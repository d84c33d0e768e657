"""The door `hvdlarge report`: files, summary, JSON, watching, and what it refuses."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.launching import ROOT
from support.report_runs import write_report_run

from hvdlarge.report import main
from hvdlarge.reporting import figures
from hvdlarge.reporting.run_reader import RunRecords


class Page(HTMLParser):
    """What a browser would load, run or show of a page."""

    def __init__(self, path):
        super().__init__()
        self.sources, self.tags, self.text = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "data")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_report_run(folder / "a/run", resumed_at=(150,)),
        write_report_run(folder / "b/run", seed=1, slower=2.0, kinds=(), timed=False),
    ]


def test_a_report_of_one_run_is_one_file_with_every_picture_in_it(runs, capsys):
    assert main([str(runs[0]), "--target", "accuracy=0.9"]) == 0
    assert f"{runs[0]}/report.html: 5 figures; run is finished" in capsys.readouterr().out
    page = Page(runs[0] / "report.html")
    assert len(page.sources) == 5
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in (runs[0] / "report.html").read_text()
    for words in ("Loss, results and schedule", "Trust ratios by layer", "Gradient noise scale",
                  "Distance of the weights", "Time by phase", "time to accuracy ≥ 0.9", "a · t^p"):  # fmt: skip
        assert words in page.text
    pictures = sorted(path.name for path in (runs[0] / "report").iterdir())
    assert pictures == [
        "distance-1.png",
        "noise.png",
        "phases-1.png",
        "progress.png",
        "ratios-1.png",
    ]
    for name in pictures:
        with Image.open(runs[0] / "report" / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5


def test_several_runs_are_compared_in_the_current_folder(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report").mkdir()
    for name in ("noise-old.png", "distance-7.png"):
        (tmp_path / "report" / name).touch()
    assert main([*map(str, runs), str(runs[0]), "--target", "accuracy=0.9"]) == 0
    said = capsys.readouterr().out
    assert "is named twice: it is shown once" in said
    page = Page(tmp_path / "report.html")
    for words in ("a/run", "b/run", "Settings that differ", "lr.base",
                  "b/run: There is no gradient noise scale: set log.noise_every_steps"):  # fmt: skip
        assert words in page.text
    left = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"ratios-1.png", "ratios-2.png", "noise.png", "distance-1.png", "noise-old.png"} < left
    assert not {"distance-7.png", "distance-2.png"} & left


def test_every_axis_has_a_title_and_no_text_lies_on_another(runs, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "png_of", lambda figure: drawn.append(figure) or b"")
    records = [RunRecords(run, run.parent.name, ()) for run in runs]
    for run in records:
        run.update()
    figures.draw_all(records[:1])
    figures.draw_all(records)
    assert len(drawn) == 5 + 7
    for figure in drawn:
        figure.canvas.draw()
        axes = figure.get_axes()
        for each in axes:
            if each.get_label() != "<colorbar>":
                column = [each, *each.get_shared_x_axes().get_siblings(each)]
                row = [each, *each.get_shared_y_axes().get_siblings(each)]
                assert any(a.get_xlabel() for a in column)
                assert any("(" in a.get_xlabel() for a in column)
                assert any(a.get_ylabel() for a in row)
        boxes = [box for each in axes for box in texts(each)]
        whole = figure.bbox
        for number, (text, box) in enumerate(boxes):
            assert box.x0 >= whole.x0 - 1, text
            assert box.x1 <= whole.x1 + 1, text
            for other, another in boxes[:number]:
                assert not overlap(box, another), (text, other)


def texts(axes):
    """The texts of axes with their places in the picture; labels of ticks out of view are not drawn."""
    found = [axes.xaxis.label, axes.yaxis.label]
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for minor in (False, True):
            ticks = zip(
                axis.get_ticklocs(minor=minor), axis.get_ticklabels(minor=minor), strict=False
            )
            found += [label for place, label in ticks if low <= place <= high]
    legend = axes.get_legend()
    found += [] if legend is None else legend.get_texts()
    seen = [text for text in found if text.get_visible() and text.get_text()]
    return [(text.get_text(), text.get_window_extent()) for text in seen]


def overlap(one, other, slack=2):
    """Whether two places have more than a rim of `slack` pixels in common."""
    return (min(one.x1, other.x1) - max(one.x0, other.x0) > slack
            and min(one.y1, other.y1) - max(one.y0, other.y0) > slack)  # fmt: skip


def test_lines_of_several_runs_differ_without_colour(runs):
    styles = {figures.style_of(number)[1:] for number in range(8)}
    assert len(styles) == 8


def test_text_of_a_run_is_shown_and_not_obeyed(tmp_path, capsys):
    job = {"name": "<img src=x>", "epochs": 20, "loss": "</td><script>alert(1)</script>"}
    strange = write_report_run(tmp_path / "<b>$x_{$ \x1b[31m\n日本\udcff", job=job)
    other = write_report_run(tmp_path / "_other", kinds=())
    lines = (strange / "metrics.jsonl").read_text().replace('"conv1.weight"', '"$\\\\frac{<i>$"')
    (strange / "metrics.jsonl").write_text(lines.replace('"accuracy"', '"a<u>$"'))
    out = tmp_path / "out.html"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main([str(strange), str(other), "--out", str(out)]) == 0
    page = Page(out)
    assert not {"b", "i", "u", "script"} & set(page.tags)
    assert page.tags.count("img") == len(list((tmp_path / "out").iterdir()))
    assert "</td><script>" in page.text
    assert main([str(strange), str(other), "--text"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_values_of_any_size_are_drawn(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for step, value in enumerate(
            [0, -1, 1e-320, 1e308, -1e308, 1e100, -1e99, 1e15, 0, 5, 5, 5, 5, 7, 9]
        ):
            here = {"step": step, "epoch": step / 3, "samples_seen": value}
            layers = {
                "a": {"trust_ratio": value, "update_ratio": value},
                "b": {"trust_ratio": None},
                "c": 3,
            }
            for more in ({"loss": value, "lr": value, "global_batch": value, "trust_ratio_min": value,
                          "trust_ratio_max": value, "forward_seconds": abs(value)},
                         {"accuracy": value}, {"layers": layers}, {"noise_scale": value, "global_batch": value},
                         {"weight_distance": value, "distances": {"a": value}}):  # fmt: skip
                file.write(json.dumps(here | more) + "\n")
    assert main([str(folder)]) == 0
    assert main([str(folder), "--json"]) == 0


def test_a_run_of_one_line_is_drawn(tmp_path):
    folder = write_report_run(tmp_path / "run", steps=5, finished=False)
    assert main([str(folder)]) == 0
    assert (folder / "report/progress.png").stat().st_size > 1000


def test_a_run_without_a_line_has_a_report_that_says_so(tmp_path):
    (tmp_path / "job.resolved.yaml").write_text("name: early\nepochs: 3\n")
    assert main([str(tmp_path)]) == 0
    text = Page(tmp_path / "report.html").text
    assert "metrics.jsonl is missing: the run has logged no step yet." in text
    assert "0 of 3" in text


def test_the_figures_as_json(runs, capsys):
    assert main([*map(str, runs), str(runs[0]), "--json", "--target", "accuracy=0.9"]) == 0
    one, other = json.loads(capsys.readouterr().out)
    assert one["targets"][0]["updates"] == other["targets"][0]["updates"]
    assert other["noise_scale"] is None


BLOCKED = """
import sys
for name in {names}: sys.modules[name] = None
from hvdlarge.report import main
sys.exit(main({arguments}))
"""


def run_without(names, *arguments):
    code = BLOCKED.format(names=names, arguments=arguments)
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)


def test_the_door_needs_no_torch_horovod_or_mpi(runs, tmp_path):
    done = run_without(
        ("torch", "horovod", "mpi4py"), str(runs[1]), "--out", str(tmp_path / "a.html")
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "a.html").exists()


def test_without_matplotlib_the_summary_is_printed_with_a_note(runs):
    done = run_without(("torch", "matplotlib"), str(runs[1]), "--target", "accuracy=0.9")
    assert (done.returncode, done.stderr) == (0, "")
    assert "needs matplotlib (pip install 'hvdlarge[plot]')" in done.stdout
    for words in ("time to accuracy ≥ 0.9", "stages of run", "forward", "log.distances"):
        assert words in done.stdout
    assert not (runs[1] / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: not a run folder"),
        (["RUN", "--out", "report.txt"], "--out report.txt: the name must end with .html"),
        (["RUN", "--out", "none/report.html"], "its folder does not exist"),
        (["RUN", "--target", "accuracy"], "--target accuracy: a result"),
        (["FOREIGN"], "not the log of a run"),
    ],
)
def test_what_cannot_be_reported_is_refused(runs, tmp_path, arguments, message, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(bytes(range(256)))
    places = {"RUN": str(runs[0]), "FOREIGN": str(tmp_path)}
    assert main([places.get(word, word) for word in arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-3", "nan", "inf", "x"])
def test_a_pause_that_is_none_is_refused(runs, seconds):
    with pytest.raises(SystemExit) as left:
        main([str(runs[0]), "--watch", seconds])
    assert left.value.code == 2


def test_a_full_disk_leaves_the_report_that_was_there(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "draw_all", lambda runs: [])
    out = tmp_path / "report.html"
    assert main([str(runs[1]), "--out", str(out)]) == 0
    before, write = out.read_bytes(), Path.write_bytes

    def fill(path, content):
        write(path, content[:10])
        if path.name.startswith(".report.html"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fill)
    assert main([str(runs[1]), "--out", str(out)]) == 2
    assert f"{out}: cannot be written: No space left on device" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_watch_writes_again_until_the_run_has_ended(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "draw_all", lambda runs: [])
    folder = write_report_run(tmp_path / "run", finished=False, kinds=())
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:30]))
    refreshed = threading.Event()

    def go_on():
        while not (folder / "report.html").exists():
            time.sleep(0.02)
        if 'http-equiv="refresh"' in (folder / "report.html").read_text():
            refreshed.set()
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("".join(lines[30:]))
        (folder / "summary.json").write_text(json.dumps({"steps": 400}))

    thread = threading.Thread(target=go_on)
    thread.start()
    assert main([str(folder), "--watch", "0.1"]) == 0
    thread.join()
    said = capsys.readouterr().out.splitlines()
    assert "is running" in said[0]
    assert said[-1].endswith("run is finished at epoch 20")
    assert refreshed.is_set()
    assert 'http-equiv="refresh"' not in (folder / "report.html").read_text()


def test_a_watch_ends_with_a_run_that_has_stopped_without_a_summary(tmp_path):
    folder = write_report_run(tmp_path / "run", finished=False, kinds=())
    for path in folder.iterdir():
        os.utime(path, (time.time() - 700,) * 2)
    assert main([str(folder), "--text", "--watch", "60"]) == 0


def test_ctrl_c_ends_a_watch_with_130(tmp_path):
    folder = write_report_run(tmp_path / "run", finished=False, kinds=())
    command = [sys.executable, "-m", "hvdlarge", "report", str(folder), "--text", "--watch", "60"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environ,
        # A shell starts programs in the background without this signal, and the tests may be one
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as watch:
        first = watch.stdout.readline()
        time.sleep(0.3)
        watch.send_signal(signal.SIGINT)
        _, error = watch.communicate(timeout=30)
    assert first.split() == [b"run", b"run"]
    assert (watch.returncode, error) == (130, b"")


def test_a_picture_is_the_same_for_the_same_run(runs):
    run = RunRecords(runs[1], "run", ())
    run.update()
    first, second = (figures._phases(run) for _ in range(2))
    assert first == second
    with Image.open(io.BytesIO(first)) as picture:
        assert picture.format == "PNG"
