"""The command `hvdlarge`: `hvdlarge train …` is `python -m hvdlarge.train …`, and so on."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from hvdlarge import __version__

# Description and module, imported on use: plan and doctor work without torch, Horovod and MPI
VERBS = {
    "train": ("train a job", "hvdlarge.train"),
    "launch": ("train a job on many workers, with restarts", "hvdlarge.launch"),
    "plan": ("show a run before it is started", "hvdlarge.plan"),
    "report": ("show runs on one page", "hvdlarge.report"),
    "study": ("train the runs of a study, and compare them", "hvdlarge.study.__main__"),
    "export": ("write the weights of a run to a file", "hvdlarge.export"),
    "pack": ("write data sets to .npy files", "hvdlarge.pack"),
    "doctor": ("check this machine", "hvdlarge.doctor.__main__"),
    "bench": ("measure the engine's speed on this machine", "hvdlarge.bench.__main__"),
}
USAGE = "\n".join(
    [
        f"usage: hvdlarge {{{','.join(VERBS)}}} …",
        "",
        *(f"  {verb:8}{what}" for verb, (what, _) in VERBS.items()),
        "",
        "`hvdlarge VERB --help` describes a verb.",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    verb, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    if verb == "--version":
        print(f"hvdlarge {__version__}")
        return 0
    if verb in ("-h", "--help"):
        print(USAGE)
        return 0
    if verb not in VERBS:
        problem = f"unknown verb {verb!r}" if verb else "a verb is missing"
        print(f"{USAGE}\nhvdlarge: error: {problem}", file=sys.stderr)
        return 2
    return importlib.import_module(VERBS[verb][1]).main(rest[:-1])


if __name__ == "__main__":
    sys.exit(main())
