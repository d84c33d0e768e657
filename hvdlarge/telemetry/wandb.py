"""The sink `wandb`: a run of Weights & Biases with the job as its config.

Source:   the Python SDK of W&B, https://docs.wandb.ai/ref/python/
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from hvdlarge.telemetry.sinks import Sink, SinkRun, Status
from hvdlarge.telemetry.tags import tags

_FINISH_SECONDS = 8  # less than background_sink.CLOSE_SECONDS
_START_SECONDS = 30  # for a server that does not answer; the process waits for it at its end


class WandbSink(Sink):
    """Logs as the environment says (`WANDB_MODE`, `WANDB_API_KEY`, …); files are in <run
    folder>/wandb.

    A resumed run goes on in the same run of W&B, whose id is in <run folder>/wandb_run_id. The axis
    of the curves is `step`. W&B keeps every point: steps that are taken again, after a rollback or
    since the last checkpoint of a killed run, have two.

    Args:
        project: default: `WANDB_PROJECT`, or the SDK's.
        entity: team or user; default: `WANDB_ENTITY`, or the user's own.
        name: of the run; default: the job's.
        tags: of the run.
    """

    package = "wandb"

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        tags: list[str] | None = None,
    ) -> None:
        self._given = {"project": project, "entity": entity, "tags": tags}
        self._name = name

    def start(self, run: SinkRun) -> None:
        """Create the run, or go on with that of an earlier start."""
        import wandb

        kept = run.folder / "wandb_run_id"
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex[:12] + "\n")
        # What the engine prints stays as it is; and the SDK waits for its uploads once more when
        # the process exits
        settings = wandb.Settings(
            console="off", finish_timeout=_FINISH_SECONDS, init_timeout=_START_SECONDS
        )
        self._run = wandb.init(
            id=kept.read_text().strip(),
            resume="allow",
            name=self._name or run.name,
            dir=str(run.folder),
            config=dict(run.job),
            settings=settings,
            **self._given,
        )
        # W&B's own count of calls refuses steps that are taken again
        self._run.define_metric("*", step_metric="step")

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Log the figures of the record."""
        if figures := tags(record):
            clock = {key: record[key] for key in ("step", "epoch", "samples_seen") if key in record}
            self._run.log(clock | figures)

    def end(self, status: Status) -> None:
        """Finish the run; W&B shows one that failed as such, and one that was stopped as killed."""
        if status == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if status == "finished" else 1)
