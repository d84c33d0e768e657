"""A small study as plain values, and what the engine makes of its file."""

import copy
import json

from hvdlarge.study.cells import job_source, plan_cells, setup_of
from hvdlarge.study.study_file import read_study

STUDY = {
    "name": "small",
    "job": "digits",
    "factors": {
        "batch.base": [32, 64],
        "arm": {
            "lars": {},
            "sgd": {
                "optimizer": {"name": "sgd", "momentum": 0.9},
                "lr.base": 0.1,
                "tune": {"lr.base": {"low": 0.01, "high": 1, "log": True}},
            },
        },
    },
    "tune": {"search": {"lr.base": {"low": 0.5, "high": 20, "log": True}}, "trials": 4, "round": 2},
    "seeds": 3,
}


def changed(changes):
    """The study with other values, by their paths as `tune.trials`; None removes a key."""
    study = copy.deepcopy(STUDY)
    for path, value in changes.items():
        *sections, key = path.split("/")
        where = study
        for section in sections:
            where = where.setdefault(section, {})
        if value is None:
            del where[key]
        else:
            where[key] = value
    return study


def written(folder, **changes):
    """The study file with changes, JSON being YAML."""
    path = folder / "study.yaml"
    path.write_text(json.dumps(changed(changes), indent=1))
    return path


def planned(folder, **changes):
    """The study, its cells and its setup."""
    path = written(folder, **changes)
    study = read_study(str(path))
    plans = plan_cells(study, job_source(study, path, folder / "runs"))
    return study, plans, setup_of(study, plans)
