"""Writes the data sets of a job to `.npy` files: `python -m hvdlarge.pack job.yaml FOLDER`.

They are read memory-mapped by `data: {name: npy, args: {folder: FOLDER}}`. The same command
continues a run that was interrupted. Needs no Horovod and no MPI.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvdlarge import exits
from hvdlarge.config.job import Job
from hvdlarge.config.job_file import job_path, read_job
from hvdlarge.config.part_errors import describe
from hvdlarge.telemetry.console import print_error, print_status

# torch is imported inside functions: it takes a second, and a wrong command line should appear at
# once

_REPORT_SECONDS = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hvdlarge.pack",
        description=(
            "Write the training set and the test set of a job as .npy files, or continue to. Needs "
            "no Horovod and no MPI."
        ),
        epilog=(
            "Exit codes: 0, 2 for a wrong command line, wrong data or damaged files, 74 if a file "
            "cannot be written."
        ),
    )
    parser.add_argument("job", nargs="?", help="the job file; only data and seed count")
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="where to write")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="as for hvdlarge.train"
    )
    parser.add_argument(
        "--verify", metavar="FOLDER", help="only compare a folder with its SHA256SUMS"
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        if (options.verify is None) == (options.folder is None):
            raise exits.JobError("command line: name a job file and a folder, or --verify FOLDER")
        if options.verify is not None:
            return _verify(Path(options.verify))
        job = read_job(job_path(options.job), options.overrides)
        return _pack(job, Path(options.folder))
    except exits.RunExit as end:
        print_error(str(end))
        return end.code


def _verify(folder: Path) -> int:
    from hvdlarge.data.files import DataFileError, check_sums

    try:
        names = check_sums(folder)
    except DataFileError as error:
        raise exits.JobError(str(error)) from None
    print_status(f"{folder}: {len(names)} files are as they were written")
    return exits.FINISHED


def _pack(job: Job, folder: Path) -> int:
    from hvdlarge.data.files import SUMS
    from hvdlarge.data.npy import PARTS
    from hvdlarge.data.packing import ORIGIN, Source, UnreadableSample, pack
    from hvdlarge.training.build import load_data, sample_form

    written = job.resolved()["data"]  # of texts from the environment only the SHA-256
    data = {key: written[key] for key in ("name", "args", "targets", "collate")}
    origin = {"data": data, "seed": job.seed}
    if (folder / SUMS).exists():
        if _origin(folder / ORIGIN) != origin:
            raise exits.JobError(f"{folder} holds another data set: name another folder")
        return _verify(folder)
    sets = load_data(job.data, job.seed)
    form = sample_form(job.data)
    parts = {
        part: Source(dataset, form, job.seed, job.data.num_workers, job.data.prefetch_factor)
        for part, dataset in zip(PARTS, sets, strict=True)
        if dataset is not None
    }
    try:
        names = pack(parts, folder, origin, _Progress())
    except FileExistsError as error:
        raise exits.JobError(f"{error}: name another folder") from None
    except UnreadableSample as error:
        told = describe(error.__cause__ or error)
        raise exits.JobError(
            f"data.name: {job.data.name}: a sample cannot be read: {told}"
        ) from None
    except exits.PartError as error:
        raise exits.JobError(f"data.name: {job.data.name}: {error}") from None
    except OSError as error:
        raise exits.CheckpointWriteError.of(
            str(folder), folder, error, "the same command continues"
        ) from None
    print_status(f"{folder}: {', '.join(names)} and {SUMS}")
    print_status(f"data: {{name: npy, args: {json.dumps({'folder': str(folder)})}}}")
    return exits.FINISHED


def _origin(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


class _Progress:
    """Prints how far a part is, at most every few seconds, and at its beginning and end."""

    def __init__(self) -> None:
        self._started: dict[str, tuple[float, int]] = {}  # by part: when, and at which sample
        self._last = 0.0

    def __call__(self, part: str, done: int, samples: int) -> None:
        now = time.monotonic()
        start, first = self._started.setdefault(part, (now, done))
        if done - first > 0 and done < samples and now - self._last < _REPORT_SECONDS:
            return
        self._last = now
        line = f"{part:5}  {done:,} of {samples:,} samples, {done / samples:.0%}"
        if done > first:
            speed = (done - first) / max(now - start, 1e-9)
            line += f", {speed:,.0f} per second, {(samples - done) / speed:,.0f} s to go"
        print_status(line)


if __name__ == "__main__":
    sys.exit(main())
