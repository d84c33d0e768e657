"""The `analysis` list: what it accepts, and its errors in the user's words."""

import pytest
from pydantic import TypeAdapter, ValidationError
from support.simulated_studies import setup_of
from support.study_files import written

from hvdlarge.config.job import Log
from hvdlarge.study.__main__ import main
from hvdlarge.study.analysis.sections import Analysis, check, unlogged

LIST = TypeAdapter(list[Analysis])
SETUP = setup_of({"batch.base": [32, 512], "arm": ["lars", "sgd", "adam"]})


def problems(*sections, setup=SETUP):
    return check(LIST.validate_python([*sections]), setup)


@pytest.mark.parametrize(
    "section",
    [
        {"kind": "compare"},
        {"kind": "compare", "baseline": {"arm": "sgd"}, "tolerance": 0.01, "confidence": 0.9},
        {"kind": "compare", "baseline": {"arm": "sgd", "batch.base": 32}},
        {"kind": "compare", "by": "arm"},
        {"kind": "compare", "by": ["arm"], "within": ["batch.base"], "baseline": {"arm": "lars"}},
        {"kind": "compare", "by": "batch.base", "baseline": {"batch.base": 512}},
        {"kind": "batch_limit", "batch": "batch.base", "tolerance": 0, "baseline": 32, "target": 1},
        {"kind": "ladder", "factor": "arm", "steps": ["sgd", "lars"]},
        {"kind": "lr_range", "within": 0.01},
        {"kind": "lr_range", "within": 0.01, "separately": ["batch.base"]},
        {"kind": "lr_range", "within": 0.01, "separately": []},
        {"kind": "diffusion", "from_epoch": 5, "until_epoch": 20, "min_points": 20},
        {"kind": "diffusion", "until_update": 60},
        {"kind": "noise_scale", "batch": "batch.base", "tolerance": 0.01},
    ],
)
def test_accepted(section):
    assert problems(section) == []


@pytest.mark.parametrize(
    "section",
    [
        {"kind": "compar"},
        {"kind": "compare", "tolerance": -1},
        {"kind": "compare", "tolerance": "0.1"},
        {"kind": "compare", "confidence": 1},
        {"kind": "compare", "confidence": 95},
        {"kind": "compare", "base": {"arm": "sgd"}},
        {"kind": "batch_limit", "batch": "batch.base"},
        {"kind": "batch_limit", "tolerance": 0.1},
        {"kind": "batch_limit", "batch": "batch.base", "tolerance": float("nan")},
        {"kind": "ladder"},
        {"kind": "lr_range"},
        {"kind": "diffusion", "min_points": 3},
        {},
    ],
)
def test_refused(section):
    with pytest.raises(ValidationError):
        LIST.validate_python([section])


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"kind": "compare", "by": "amr"}, "analysis.0.by (compare): 'amr' is no factor of the study; did you mean 'arm'?"),
        ({"kind": "compare", "within": ["zzz"]}, "its factors: batch.base, arm"),
        ({"kind": "compare", "baseline": {"arm": "sdg"}}, "'sdg' is no level of arm; did you mean 'sgd'?"),
        ({"kind": "compare", "baseline": {"arn": "sgd"}}, "did you mean 'arm'?"),
        ({"kind": "compare", "baseline": {"batch.base": 64}}, "64 is no level of batch.base; its levels: 32, 512"),
        ({"kind": "compare", "baseline": {}}, "an empty mapping is no arm"),
        ({"kind": "compare", "by": []}, "an empty list has no arms"),
        ({"kind": "compare", "by": ["arm", "arm"]}, "'arm' is named twice"),
        ({"kind": "compare", "by": "arm", "within": ["arm", "batch.base"]}, "'arm' distinguishes the arms"),
        ({"kind": "compare", "baseline": {"arm": "sgd"}, "within": ["arm"]}, "'arm' distinguishes the arms"),
        ({"kind": "compare", "by": "arm", "baseline": {"batch.base": 32}}, "'batch.base' is not in by: arm"),
        ({"kind": "compare", "by": ["arm", "batch.base"], "baseline": {"arm": "sgd"}}, "a level of 'batch.base' is missing"),
        ({"kind": "batch_limit", "batch": "batch", "tolerance": 0.1}, "analysis.0.batch (batch_limit): 'batch' is no factor of the study; did you mean 'batch.base'?"),
        ({"kind": "batch_limit", "batch": "arm", "tolerance": 0.1}, "levels of arm are no batches: lars, sgd, adam"),
        ({"kind": "noise_scale", "batch": "batch.base", "tolerance": 0.1, "baseline": 33}, "33 is no level of batch.base; its levels: 32, 512"),
        ({"kind": "noise_scale", "batch": "batch.base", "tolerance": 0.1, "baseline": 512}, "512 is the largest batch: none is above it"),
        ({"kind": "ladder", "factor": "arms"}, "did you mean 'arm'?"),
        ({"kind": "ladder", "factor": "arm", "steps": ["sgd", "adamw"]}, "did you mean 'adam'?"),
        ({"kind": "ladder", "factor": "arm", "steps": ["sgd", "lars", "sgd"]}, "'sgd' is named twice"),
        ({"kind": "ladder", "factor": "arm", "steps": ["sgd"]}, "a ladder has at least two steps"),
        ({"kind": "lr_range", "within": 0.1, "key": "lr.bas"}, "'lr.bas' is not tuned; did you mean 'lr.base'?"),
        ({"kind": "lr_range", "within": 0.1, "separately": ["batch"]}, "analysis.0.separately (lr_range): 'batch' is no factor of the study; did you mean 'batch.base'?"),
        ({"kind": "diffusion", "from_epoch": 5, "until_epoch": 5}, "5 is not after from_epoch, 5"),
    ],
)  # fmt: skip
def test_problems(section, words):
    found = problems({"kind": "compare"}, section)
    assert found
    assert words.replace("analysis.0", "analysis.1") in found[0]


def test_a_factor_that_is_left_to_neither_list():
    setup = setup_of({"a": ["x", "y"], "b": ["x", "y"], "c": ["x", "y"]})
    section = {"kind": "compare", "by": "a", "within": ["b"]}
    assert problems(section, setup=setup) == [
        "analysis.0.within (compare): 'c' is in neither by nor within; leave within out, or add it"
    ]


def test_studies_without_factors_or_tuning():
    setup = setup_of({}, tuned=False)
    assert "which has none" in problems({"kind": "ladder", "factor": "a"}, setup=setup)[0]
    assert "no key is searched" in problems({"kind": "lr_range", "within": 1}, setup=setup)[0]


NOISE_SCALE = {"kind": "noise_scale", "batch": "batch.base", "tolerance": 0.1}


@pytest.mark.parametrize(
    ("section", "logged", "setting"),
    [
        ({"kind": "diffusion"}, Log(distances=True), "log.distances: true"),
        (NOISE_SCALE, Log(noise_every_steps=5), "log.noise_every_steps, for example 20"),
    ],
)
def test_an_analysis_whose_data_no_cell_logs(section, logged, setting):
    sections = LIST.validate_python([{"kind": "compare"}, section])
    assert unlogged(sections, {"arm a": Log(), "arm b": Log()}) == [
        f"analysis.1 ({section['kind']}): no cell logs what it reads, neither the first, arm a, nor "
        f"another; set {setting}"
    ]
    assert unlogged(sections, {"arm a": Log(), "arm b": logged}) == []


def test_analyses_of_results_alone_need_nothing_logged():
    section = {"kind": "batch_limit", "batch": "batch.base", "tolerance": 0.1, "target": 0.9}
    assert unlogged(LIST.validate_python([{"kind": "compare"}, section]), {"the job": Log()}) == []


def test_a_study_whose_analysis_has_no_data_is_refused(tmp_path, capsys):
    silent = {"log.distances": False}  # the job digits logs them
    path = written(tmp_path, analysis=[{"kind": "diffusion"}], set=silent)
    arguments = [str(path), "--plan", "--folder", str(tmp_path / "runs")]
    assert main(arguments) == 2
    assert "first, batch.base 32, arm lars, nor another; set log.distances: true" in (
        capsys.readouterr().err
    )
    written(tmp_path, analysis=[{"kind": "diffusion"}])
    assert main(arguments) == 0


def test_each_field_has_its_manual():
    for name, section in LIST.json_schema()["$defs"].items():
        for field, about in section["properties"].items():
            assert about.get("description"), f"{name}.{field}"
