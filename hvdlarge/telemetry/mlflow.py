"""The sink `mlflow`: a run of MLflow with the job's keys as parameters, and metrics by step.

Source:   MLflow's tracking API, https://mlflow.org/docs/latest/ml/tracking/
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from hvdlarge.telemetry.sinks import Sink, SinkRun, Status
from hvdlarge.telemetry.tags import tags

_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}  # MLflow's names
# MLflow's limits for one call, and for one value
_METRICS_AT_ONCE, _PARAMS_AT_ONCE, _PARAM_LENGTH = 1000, 100, 6000
_NOT_IN_NAMES = re.compile(r"[^\w\-. /]")


class MlflowSink(Sink):
    """Logs to the server of `MLFLOW_TRACKING_URI`, or to files in <run folder>/mlflow.

    A resumed run goes on in the same run of MLflow, whose id is in <run folder>/mlflow_run.json.
    MLflow keeps every point: steps that are taken again, after a rollback or since the last
    checkpoint of a killed run, have two.

    Args:
        experiment: its name; default: `MLFLOW_EXPERIMENT_NAME`, or the name of the job.
        tracking_uri: default: `MLFLOW_TRACKING_URI`, or files in the run folder.
    """

    package = "mlflow"

    def __init__(self, experiment: str | None = None, tracking_uri: str | None = None) -> None:
        self._experiment, self._tracking_uri = experiment, tracking_uri

    def start(self, run: SinkRun) -> None:
        """Create the run, or go on with that of an earlier start."""
        uri = self._tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (run.folder.absolute() / "mlflow").as_uri()
        if uri.startswith("file:"):
            # MLflow 3 asks for this since it develops its stores of files no further
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        kept = run.folder / "mlflow_run.json"
        known = _read_run(kept) if kept.exists() else {}
        if known.get("tracking_uri") == uri:
            self._id = known["run_id"]
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(self._experiment_id(run), run_name=run.name).info.run_id
        kept.write_text(json.dumps({"run_id": self._id, "tracking_uri": uri}) + "\n")
        self._log_params(run)

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Log the figures of the record."""
        from mlflow.entities import Metric

        milliseconds = round(1000 * record["time"])
        figures = iter(
            Metric(_NOT_IN_NAMES.sub("_", tag), value, milliseconds, record["step"])
            for tag, value in tags(record).items()
        )
        while batch := list(islice(figures, _METRICS_AT_ONCE)):
            self._client.log_batch(self._id, metrics=batch)

    def end(self, status: Status) -> None:
        """Set the status of the run."""
        self._client.set_terminated(self._id, _STATUS[status])

    def _experiment_id(self, run: SinkRun) -> str:
        name = self._experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.name
        known = self._client.get_experiment_by_name(name)
        return self._client.create_experiment(name) if known is None else known.experiment_id

    def _log_params(self, run: SinkRun) -> None:
        from mlflow.entities import Param

        params = iter(
            Param(_NOT_IN_NAMES.sub("_", key), str(value)[:_PARAM_LENGTH])
            for key, value in _flattened(run.job)
        )
        while batch := list(islice(params, _PARAMS_AT_ONCE)):
            self._client.log_batch(self._id, params=batch)


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a job as on the command line, e.g. lr.base, with their values."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_run(path: Path) -> dict[str, str]:
    try:
        known = json.loads(path.read_text())
        return {key: known[key] for key in ("tracking_uri", "run_id")}
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} names no run of MLflow; move it away") from None
