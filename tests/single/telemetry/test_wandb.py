"""Runs of W&B in its offline mode; the records are read back from its file."""

import json
import struct
import time

import pytest

from hvdlarge.telemetry.sinks import SinkRun
from hvdlarge.telemetry.wandb import WandbSink

pytest.importorskip("wandb", reason="the extra wandb is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def started(folder, step=0):
    sink = WandbSink(project="tests")
    sink.start(SinkRun("digits", folder, {"lr": {"base": 4.0}}, 2, 1437, 360, step, 32 * step))
    return sink


def messages(content):
    """The messages in an offline file: LevelDB's log format after seven bytes, in blocks of 32 KiB."""
    message, place = b"", 7
    while place < len(content):
        left = 32768 - place % 32768
        if left < 7:  # too short for a header: padding
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)  # after a checksum
        message += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield message
            message = b""


def stored(path):
    """What an offline run holds: its records by kind. W&B's own process writes them, the exit last, and
    may still be at it when the SDK has finished.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + 60
    while True:
        records = {}
        for message in messages(path.read_bytes()):
            record = Record.FromString(message)
            records.setdefault(record.WhichOneof("record_type"), []).append(record)
        if "exit" in records or time.monotonic() > deadline:
            return records
        time.sleep(0.05)


def points(path):
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in each.history.item}
        for each in stored(path)["history"]
    ]  # fmt: skip


def test_config_figures_and_the_end_are_stored_and_a_resumed_run_has_the_same_id(tmp_path):
    sink = started(tmp_path)
    for step in range(2):
        sink.metrics({"step": step, "epoch": 0.1, "samples_seen": 32, "loss": 0.5, "time": 1.8e9})
    sink.metrics({"step": 1, "epoch": 0.1, "samples_seen": 32, "test_loss": 0.2, "time": 1.8e9})
    sink.end("stopped")
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    (first,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    records = stored(first)
    assert {each.run.run_id for each in records["run"]} == {run_id}
    assert records["run"][0].run.display_name == "digits"
    config = {item.key: json.loads(item.value_json) for item in records["run"][0].run.config.update}
    assert config["lr"] == {"base": 4.0}
    assert records["exit"][0].exit.exit_code == 1
    assert "preempting" in records
    seen = points(first)
    assert [(each["step"], each.get("train/loss"), each.get("eval/loss")) for each in seen] == [
        (0, 0.5, None),
        (1, 0.5, None),
        (1, None, 0.2),
    ]
    first.rename(tmp_path / "first.wandb")

    sink = started(tmp_path, step=2)
    sink.metrics({"step": 2, "epoch": 0.1, "samples_seen": 32, "loss": 0.4, "time": 1.8e9})
    sink.end("finished")
    (second,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    records = stored(second)
    assert {each.run.run_id for each in records["run"]} == {run_id}
    assert records["exit"][0].exit.exit_code == 0
    assert [each["step"] for each in points(second)] == [2]
