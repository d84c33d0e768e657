"""Writes the weights of a run to a file: `python -m hvdlarge.export RUN [--ema]`.

The file holds the plain or the averaged weights of one checkpoint, which is verified first, for
programs that know nothing of hvdlarge. Needs no Horovod and no MPI.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdlarge import exits
from hvdlarge.config import yaml_source
from hvdlarge.telemetry.console import print_error, print_status

# torch is imported inside functions: it takes a second, and a wrong command line should appear at
# once


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hvdlarge.export",
        description=(
            "Write the weights of a run as safetensors, or as a .pt file. Needs no Horovod and no "
            "MPI."
        ),
        epilog=(
            "Exit codes: 0, 2 for a wrong command line, 74 if the file cannot be written, 77 for a "
            "damaged checkpoint."
        ),
    )
    parser.add_argument("run", metavar="RUN", help="the run folder, or its name in runs/")
    parser.add_argument("--ema", action="store_true", help="the averaged weights (ema in the job)")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="ends with .safetensors or .pt; default: weights.safetensors in the run folder, or "
        "weights_ema.safetensors",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--best", action="store_true", help="the checkpoint of the best evaluation")
    which.add_argument("--last", action="store_true", help="the newest checkpoint (the default)")
    which.add_argument("--step", type=int, metavar="N", help="the checkpoint after N steps")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    options = parser.parse_args(arguments)
    try:
        return _export(options)
    except exits.RunExit as end:
        print_error(str(end))
        return end.code


def _export(options: argparse.Namespace) -> int:
    folder = run_folder(options.run)
    default = "weights_ema.safetensors" if options.ema else "weights.safetensors"
    output = folder / default if options.output is None else Path(options.output)
    _check_output(output, options.force)
    from hvdlarge.checkpoint.weight_files import write_weights

    name, content, notes = read_content(folder, options.best, options.step)
    state = content.get("ema") if options.ema else content["model"]
    if not state:
        raise exits.JobError(
            f"--ema: {folder / 'checkpoints' / name} holds no averaged weights: the job has no "
            "section ema"
        )
    progress = content["progress"]
    metadata = {
        "format": "pt",  # that the tensors are torch's: other programs look for it
        "job": _job_name(folder),
        "weights": "averaged" if options.ema else "plain",
        "step": str(progress["step"]),
        "samples_seen": str(progress["samples_seen"]),
    }
    write_weights(output, state, metadata)
    for note in notes:
        print_status(f"note     {note}")
    print_status(
        f"{output}: {len(state)} {metadata['weights']} tensors of {name}, after "
        f"{progress['step']:,} steps and {progress['samples_seen']:,} samples"
    )
    return exits.FINISHED


def run_folder(name: str) -> Path:
    """The run folder that a command line names, by its path or as one of runs/.

    Raises:
        JobError: if it holds no run.
    """
    for folder in (Path(name), Path("runs") / name):
        if (folder / "job.resolved.yaml").is_file():
            return folder
    raise exits.JobError(f"{name}: no run folder (looked in {Path.cwd()} and its runs/)")


def _check_output(output: Path, force: bool) -> None:
    if output.suffix not in (".safetensors", ".pt"):
        raise exits.JobError(f"--output {output}: the name must end with .safetensors or .pt")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise exits.JobError(f"--output {output}: it is a folder, or its folder does not exist")
    if output.exists() and not force:
        raise exits.JobError(f"--output {output}: it exists already; --force replaces it")


def read_content(
    folder: Path, best: bool, step: int | None
) -> tuple[str, Mapping[str, Any], list[str]]:
    """Verify and load a checkpoint of a run.

    Args:
        folder: of the run.
        best: whether to take that of the best evaluation.
        step: to take the one after so many steps; None: the newest that can be read.

    Returns:
        Its name, its content, and notes for the user.

    Raises:
        JobError: if it does not exist.
        CheckpointError: if it is damaged.
    """
    from hvdlarge.checkpoint.folder import CheckpointFolder

    checkpoints = CheckpointFolder(folder / "checkpoints", keep=1)
    if best or step is not None:
        name = "best.pt" if best else f"step_{step:09d}.pt"
        if not (checkpoints.folder / name).is_file():
            names = [path.name for path in checkpoints.newest_first()]
            there = ", ".join(reversed(names)) or "no checkpoint"
            raise exits.JobError(f"{checkpoints.folder} has no {name}; it has {there}")
        return name, checkpoints.read(name), []
    newest = checkpoints.newest_good()
    if newest is None:
        raise exits.JobError(f"{checkpoints.folder} has no checkpoint yet")
    path, content, problems = newest
    return path.name, content, [f"skipped {problem}" for problem in problems]


def _job_name(folder: Path) -> str:
    """The name of the run's job; that of the folder if the job cannot be read."""
    try:
        text = (folder / "job.resolved.yaml").read_bytes()
        return str(yaml_source.read(text, fill_in=False).values["name"])
    except (OSError, KeyError, TypeError, yaml_source.SourceError):
        return folder.absolute().name


if __name__ == "__main__":
    sys.exit(main())
