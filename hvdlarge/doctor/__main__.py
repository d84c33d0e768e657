"""Checks this machine: `python -m hvdlarge.doctor`, or `mpirun -np N python -m hvdlarge.doctor`.

Reports what this machine has and lacks for a run: ok, warning or error, each with the command that
fixes it. Works with anything missing. Under a launcher it checks that launch, and one worker of
each host reports.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Sequence

from hvdlarge import __version__, exits
from hvdlarge.comm.launcher import detect, wrong_launch
from hvdlarge.doctor.checks import Finding, join_launch_check, run_checks
from hvdlarge.telemetry.console import print_status

_SIGNS = {"ok": "ok     ", "warning": "warning", "error": "ERROR  "}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check this machine; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hvdlarge.doctor",
        description="Check what this machine has and lacks for a run, and how to fix it.",
        epilog="Exit codes: 0 without errors, 3 with errors.",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    options = parser.parse_args(arguments)
    launch = detect(os.environ)
    if launch is not None and not launch.is_local_leader:
        join_launch_check()
        return exits.FINISHED
    findings = list(run_checks(os.environ, launch))
    if wrong := wrong_launch(os.environ):
        findings.append(Finding("launch", "error", wrong, "hvdlarge launch -np N job.yaml"))
    if options.json:
        report = {
            "host": socket.gethostname(),
            "hvdlarge": __version__,
            "findings": [finding._asdict() for finding in findings],
        }
        print_status(json.dumps(report, indent=2))
    else:
        print_status("\n".join(in_words(findings)))
    has_errors = any(finding.level == "error" for finding in findings)
    return exits.WRONG_ENVIRONMENT if has_errors else exits.FINISHED


def in_words(findings: Sequence[Finding]) -> list[str]:
    """The findings as lines of text, with a summary as the last."""
    lines = [f"hvdlarge {__version__} on {socket.gethostname()}"]
    for finding in findings:
        lines.append(f"{_SIGNS[finding.level]}  {finding.name}: {finding.text}")
        if finding.fix:
            lines.append(f"         fix: {finding.fix}")
    errors, warnings = (
        sum(finding.level == level for finding in findings) for level in ("error", "warning")
    )
    return [*lines, f"errors: {errors}, warnings: {warnings}"]


if __name__ == "__main__":
    sys.exit(main())
