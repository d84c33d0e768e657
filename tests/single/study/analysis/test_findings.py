"""All analyses of a study together: findings, figures, page and words, of any state of a study."""

import dataclasses
import html.parser
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from support.simulated_studies import points, repetitions, setup_of, trials

from hvdlarge.reporting import figures
from hvdlarge.study.analysis import drawing
from hvdlarge.study.analysis.dispatch import analyse
from hvdlarge.study.analysis.sections import (
    BatchLimit,
    Compare,
    Diffusion,
    Ladder,
    LrRange,
    NoiseScale,
    check,
)
from hvdlarge.study.page import in_words, study_page

BATCHES = [32, 128, 512, 2048]
SECTIONS = [
    Compare(within=["batch.base"]),
    Compare(baseline={"arm": "momentum"}, tolerance=0.01),
    BatchLimit(batch="batch.base", tolerance=0.01, target=0.9),
    Ladder(factor="arm"),
    LrRange(within=0.01),
    Diffusion(),
    NoiseScale(batch="batch.base", tolerance=0.01, target=0.9),
]
ARMS = ["momentum", "LARS <with> $a$ name & a few more words than fit on a line"]


def study(seed=0):
    """A study that has the data of all analyses, with a failure and an edge."""
    setup = setup_of({"batch.base": BATCHES, "arm": ARMS}, trials=8)
    rng = np.random.default_rng(seed)
    times = np.unique(np.geomspace(3, 2000, 30).astype(int))
    at = np.linspace(10, 5000, 40).astype(int)
    runs = []
    for batch, arm in setup.cells:
        critical = 300.0 if arm == "momentum" else 1500.0
        values = [*(0.95 - 0.008 * float(batch) / critical + 0.002 * rng.normal(size=8))]
        if (batch, arm) == ("2048", "momentum"):
            values[2] = None
        steps = [400 * (1 + critical / float(batch)) * (1 + 0.05 * rng.normal()) for _ in range(8)]
        runs += repetitions(
            (batch, arm),
            values,
            lr=9.9 if (batch, arm) == ("2048", ARMS[1]) else 0.5,
            curve=[points(at, 1 - 0.1 ** (at / each)) for each in steps],
            distance=[
                points(times, times**0.4 * (1 + 0.02 * rng.normal(size=len(times))))
                for _ in range(8)
            ],
            noise=[
                points([50, 100], critical / 2 * np.exp(0.1 * rng.normal(size=2))) for _ in range(8)
            ],
        )
        width = 0.3 if arm == "momentum" else 0.8
        rates = np.geomspace(0.011, 9, 8)
        runs += trials(
            (batch, arm),
            [(r, 0.95 - 0.02 * (np.log10(r) / width) ** 2 if r < 5 else None) for r in rates],
        )
    return setup, runs


SETUP, RUNS = study()
FINDINGS = analyse(SECTIONS, SETUP, RUNS)


FIGURES = []


@pytest.fixture(scope="module")
def pictures():
    """Those of all findings; their figures are kept in FIGURES."""

    def png_of(figure):
        FIGURES.append(figure)
        return figures.png_of(figure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "png_of", png_of)
        return drawing.draw(FINDINGS)


class Reader(html.parser.HTMLParser):
    """Checks that elements are closed in order, and collects tags and text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(text):
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return reader


def test_each_section_has_its_finding_with_everything():
    assert check(SECTIONS, SETUP) == []
    assert [finding.kind for finding in FINDINGS] == [section.kind for section in SECTIONS]
    for finding in FINDINGS:
        assert finding.title
        assert finding.verdict.endswith(".")
        assert "\n" not in finding.verdict
        assert len(finding.table) > 1
        assert finding.plot is not None
        assert finding.notes
        json.dumps(finding.facts, allow_nan=False)


def test_each_figure_is_a_picture(pictures):
    assert [each.finding for each in pictures] == [*range(len(SECTIONS))]
    assert len({each.file_name for each in pictures}) == len(pictures)
    for each in pictures:
        assert each.png.startswith(b"\x89PNG")
        assert len(each.png) > 5_000
    assert drawing.draw(FINDINGS[:1])[0].png == pictures[0].png


def texts(axes):
    """The texts of axes with their places in the picture."""
    legend = axes.get_legend()
    found = [axes.xaxis.label, axes.yaxis.label, *([] if legend is None else legend.get_texts())]
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False)
        found += [label for place, label in ticks if low <= place <= high]
    return [(each.get_text(), each.get_window_extent()) for each in found if each.get_text()]


def test_no_text_of_a_figure_lies_on_another_or_outside(pictures):
    assert len(FIGURES) == len(pictures)
    for figure in FIGURES:
        boxes = [box for axes in figure.get_axes() for box in texts(axes)]
        assert all("(" in axes.get_xlabel() for axes in figure.get_axes())
        for number, (text, box) in enumerate(boxes):
            assert figure.bbox.x0 - 1 <= box.x0, text
            assert box.x1 <= figure.bbox.x1 + 1, text
            for other, another in boxes[:number]:
                wide = min(box.x1, another.x1) - max(box.x0, another.x0)
                high = min(box.y1, another.y1) - max(box.y0, another.y0)
                assert wide <= 2 or high <= 2, (text, other)


def test_series_differ_in_greyscale():
    for finding in FINDINGS:
        for panel in finding.plot.panels:
            shown = [each.style for each in panel.series if each.style is not None]
            styles = {figures.style_of(number)[1:] for number in shown if number >= 0}
            assert len(styles) == len({number for number in shown if number >= 0})


def test_the_page_is_one_file_with_every_verdict(pictures):
    text = study_page(SETUP, RUNS, FINDINGS, pictures[:2])
    reader = read(text)
    assert reader.tags.count("img") == 2
    assert "script" not in reader.tags
    assert "http" not in text.replace("http-equiv", "")
    for finding in FINDINGS:
        assert finding.verdict in reader.text
    assert "64 of 64 repetitions have ended" in reader.text
    assert ", 9 diverged." in reader.text  # a repetition, and a trial of each cell
    assert ARMS[1] in reader.text


def test_titles_are_distinct():
    assert len({finding.title for finding in FINDINGS}) == len(FINDINGS)
    twice = analyse([Compare(tolerance=0.01), Compare(tolerance=0.02)], SETUP, RUNS)
    assert [finding.title[-4:] for finding in twice] == ["mean", " (2)"]


def test_the_page_says_nothing_of_a_tuning_that_was_not():
    untuned = setup_of({"arm": ["a"]}, tuned=False)
    runs = repetitions(("a",), [0.5, None])
    assert "best settings of the tuning" not in study_page(untuned, runs, [], [])
    assert "best settings of the tuning" in study_page(SETUP, RUNS, [], [])
    assert any("mean of the 1 that finished" in line for line in in_words(untuned, runs, []))
    failed = in_words(untuned, repetitions(("a",), [None]), [])
    assert any("none finished" in line for line in failed)


def test_intervals_beyond_what_a_metric_can_be_are_no_error():
    """Three seeds near an accuracy of 1 have an interval beyond it."""
    setup = setup_of({"batch.base": [32, 64], "arm": ["a", "b"]}, seeds=3)
    runs = [r for c in setup.cells for r in repetitions(c, [0.99, 1.0, 0.96])]
    findings = analyse([Compare(), BatchLimit(batch="batch.base", tolerance=0.01)], setup, runs)
    cells = findings[0].facts["cells"].values()
    assert all(cell["mean"]["high"] > 1 for cell in cells)
    assert len(drawing.draw(findings)) == 2
    read(study_page(setup, runs, findings, []))


def test_the_report_in_words():
    lines = in_words(SETUP, RUNS, FINDINGS)
    assert all("\n" not in line for line in lines)
    for finding in FINDINGS:
        assert f"  {finding.verdict}" in lines


def test_results_in_any_order_give_the_same_report():
    shuffled = random.Random(0).sample(RUNS, len(RUNS))
    assert analyse(SECTIONS, SETUP, shuffled) == FINDINGS
    assert study_page(SETUP, shuffled, FINDINGS, []) == study_page(SETUP, RUNS, FINDINGS, [])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("seed", range(2))
def test_unfinished_studies_have_a_report(share, seed):
    chosen = random.Random(seed).sample(RUNS, round(share * len(RUNS)))
    findings = analyse(SECTIONS, SETUP, chosen)
    for finding in findings:
        assert finding.verdict.endswith(".")
        json.dumps(finding.facts, allow_nan=False)
    read(study_page(SETUP, chosen, findings, []))
    in_words(SETUP, chosen, findings)
    if (seed, share) == (0, 0.01):
        assert all(each.png for each in drawing.draw(findings))


@pytest.mark.parametrize("state", ["diverged", "failed", "pruned"])
def test_studies_in_which_everything_failed(state):
    runs = [
        dataclasses.replace(r, state=state, value=None, curve=(), distance=(), noise=())
        for r in RUNS
    ]
    findings = analyse(SECTIONS, SETUP, runs)
    assert all(finding.verdict.endswith(".") for finding in findings)
    assert f"128 {state}" in read(study_page(SETUP, runs, findings, [])).text


def test_results_that_are_all_equal():
    runs = [dataclasses.replace(run, state="finished", value=0.5) for run in RUNS]
    findings = analyse(SECTIONS, SETUP, runs)
    assert len(drawing.draw(findings[:1])) == 1


def test_a_study_of_one_cell():
    setup = setup_of({}, trials=3)
    sections = [Compare(), LrRange(within=0.1), Diffusion()]
    runs = [*trials((), [(0.1, 0.5), (0.5, 0.9), (1.0, 0.6)]), *repetitions((), [0.9, 0.91, 0.92])]
    findings = analyse(sections, setup, runs)
    assert len(drawing.draw(findings)) == 2
    assert "1 cell, 3 of 3 trials, 3 of 8 repetitions have ended" in study_page(
        setup, runs, findings, []
    )
    assert "simulated" in "\n".join(in_words(setup, runs, findings))


def test_the_analyses_and_the_page_need_no_torch_and_no_matplotlib():
    code = (
        "import sys\n"
        "for name in ('torch', 'matplotlib', 'scipy', 'horovod', 'mpi4py'): sys.modules[name] = None\n"
        "import hvdlarge.study.analysis.dispatch, hvdlarge.study.page\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
