"""Checks this machine: `python -m hvdlarge.doctor`, or `mpirun -np N python -m hvdlarge.doctor`.

Says what this machine has and lacks for a run: ok, warning or error, each with the one command that
mends it. Works with anything missing. Under a launcher it looks at that very launch, and one worker
of each host reports.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Sequence

from hvdlarge import __version__, exits
from hvdlarge.comm.launcher import detect
from hvdlarge.doctor.checks import Finding, observe, run_checks
from hvdlarge.telemetry.console import print_status

_SIGNS = {"ok": "ok     ", "warning": "warning", "error": "ERROR  "}


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine this machine; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hvdlarge.doctor",
        description=(
            "What this machine has and lacks for a run, and the command that mends each fault."
        ),
        epilog="Exit codes: 0 if nothing stands in the way of a run, 3 if something does.",
    )
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    options = parser.parse_args(arguments)
    launch = detect(os.environ)
    if launch is not None and not launch.is_local_leader:
        observe(launch)
        return exits.FINISHED
    findings = list(run_checks(os.environ, launch))
    if options.json:
        report = {
            "host": socket.gethostname(),
            "hvdlarge": __version__,
            "findings": [found._asdict() for found in findings],
        }
        print_status(json.dumps(report, indent=2))
    else:
        print_status("\n".join(in_words(findings)))
    return (
        exits.WRONG_ENVIRONMENT
        if any(found.level == "error" for found in findings)
        else exits.FINISHED
    )


def in_words(findings: Sequence[Finding]) -> list[str]:
    """The findings as lines for a reader, and a last one that sums them up."""
    lines = [f"hvdlarge {__version__} on {socket.gethostname()}"]
    for found in findings:
        lines.append(f"{_SIGNS[found.level]}  {found.name}: {found.text}")
        if found.fix:
            lines.append(f"         fix: {found.fix}")
    errors, warnings = (
        sum(found.level == level for found in findings) for level in ("error", "warning")
    )
    state = "nothing stands in the way of a run" if not errors else f"{errors} in the way of a run"
    return [*lines, state + (f"; {warnings} to look at" if warnings else "")]


if __name__ == "__main__":
    sys.exit(main())
