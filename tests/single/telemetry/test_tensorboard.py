"""Event files, read by TensorBoard's own reader."""

from collections import Counter

import pytest

from hvdlarge.telemetry.sinks import SinkRun
from hvdlarge.telemetry.tensorboard import TensorBoard

pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")


def record(step, loss):
    return {
        "step": step,
        "epoch": 0.1,
        "samples_seen": 8 * step,
        "loss": loss,
        "time": 1.8e9 + step,
    }


def started(folder, step=0):
    sink = TensorBoard()
    sink.start(SinkRun("run", folder, {}, 2, 100, None, step, 8 * step))
    return sink


def curve(folder, tag):
    """The points of a curve as TensorBoard shows it: (step, value, time)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value, event.wall_time) for event in events.Scalars(tag)]


def test_scalars_are_in_the_file_at_once(tmp_path):
    sink = started(tmp_path)
    sink.metrics(record(4, 0.5))
    assert curve(tmp_path, "train/loss") == [(4, 0.5, 1.8e9 + 4)]  # as after a kill
    sink.metrics({"step": 4, "test_loss": 0.25, "time": 1.8e9})
    sink.close()
    assert curve(tmp_path, "eval/loss") == [(4, 0.25, 1.8e9)]


def test_steps_that_are_taken_again_are_shown_once(tmp_path):
    sink = started(tmp_path)
    for step in range(10):
        sink.metrics(record(step, 1.0))
    sink.roll_back(6, {})
    for step in range(6, 9):
        sink.metrics(record(step, 2.0))  # and then it is killed
    sink = started(tmp_path, step=8)
    for step in range(8, 12):
        sink.metrics(record(step, 3.0))
    sink.close()
    points = curve(tmp_path, "train/loss")
    assert [step for step, _, _ in points] == list(range(12))
    assert Counter(value for _, value, _ in points) == {1.0: 6, 2.0: 2, 3.0: 4}


def test_a_run_that_begins_again_before_its_first_checkpoint_shows_nothing_of_the_first_start(
    tmp_path,
):
    started(tmp_path).metrics(record(0, 1.0))
    started(tmp_path).metrics(record(0, 2.0))
    assert [(step, value) for step, value, _ in curve(tmp_path, "train/loss")] == [(0, 2.0)]
