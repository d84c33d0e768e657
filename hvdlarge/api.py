"""The public way to train a job from Python: `hvdlarge.run_job`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hvdlarge.comm.launcher import detect, wrong_launch
from hvdlarge.comm.solo import SoloChannel, SoloCollectives
from hvdlarge.config import yaml_source
from hvdlarge.config.job import Job
from hvdlarge.config.job_file import job_path, parse_job, read_job
from hvdlarge.exits import InvalidEnvironmentError, JobError
from hvdlarge.resilience.preemption import StopRequest
from hvdlarge.resilience.watchdog import Watchdog
from hvdlarge.run import run
from hvdlarge.world import RankContext


def run_job(
    job: Mapping[str, Any] | str | os.PathLike[str], *overrides: str, fresh: bool = False
) -> dict[str, Any]:
    """Train a job in this process, on one worker, and return its summary.

    An interrupted run is resumed; a finished one is left alone, and its summary is returned.
    torch's global settings (threads, TF32, deterministic algorithms) are set as the job requires
    and are not restored.

    Args:
        job: the keys of a job file as a mapping, its path, or the name of a shipped job.
        *overrides: `key.sub=value`, as on the command line.
        fresh: set an earlier run in the folder aside and start a new one.

    Returns:
        The content of summary.json: `loss`, `steps`, `epochs`, `train_seconds` and so on; with a
        test set also `test_loss` and the metrics, such as `accuracy`.

    Raises:
        JobError: if the job is invalid.
        InvalidEnvironmentError: if a launcher started several processes: use `hvdlarge train`
            there, under MPI.
        RunExit: for every other end with an exit code (see exits.py).

    >>> run_job({"name": "oops"})
    Traceback (most recent call last):
    ...
    hvdlarge.exits.JobError: job.yaml: 5 problems in the job file
    ...
    """
    if wrong := wrong_launch(os.environ):
        raise InvalidEnvironmentError(wrong)
    launch = detect(os.environ)
    if launch is not None:
        raise InvalidEnvironmentError(
            f"run_job trains in one process, but {launch.launcher} started {launch.size}: use "
            "`hvdlarge train` there"
        )
    if not isinstance(job, Mapping):
        path = Path(job_path(os.fspath(job)))
        return _run(read_job(str(path), overrides), path, fresh)
    try:
        text = yaml_source.write(dict(job))
    except yaml.representer.RepresenterError as error:
        raise JobError(
            "job.yaml: a value is not a number, text, list, mapping, true, false or null: "
            f"{error.args[-1]!r}"
        ) from None
    with tempfile.TemporaryDirectory(prefix="hvdlarge-") as folder:
        path = Path(folder) / "job.yaml"
        path.write_text(text, encoding="utf-8")
        return _run(parse_job(text, "job.yaml", overrides), path, fresh)


def _run(job: Job, path: Path, fresh: bool) -> dict[str, Any]:
    # Never started: it must not end the caller's process
    watchdog = Watchdog(0, job.timeouts.limits())
    rank = RankContext(None, {}, SoloChannel(), SoloCollectives(), watchdog, StopRequest())
    run(job, path, fresh, rank)
    return json.loads((job.run_folder / "summary.json").read_text(encoding="utf-8"))
