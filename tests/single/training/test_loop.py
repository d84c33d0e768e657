"""The training loop: what it tells the watchdog."""

import contextlib
from types import SimpleNamespace

import pytest

from hvdlarge.config.job import Timeouts
from hvdlarge.resilience.watchdog import Watchdog
from hvdlarge.telemetry.timers import PhaseTimers
from hvdlarge.training.loop import evaluate_weights, fetch_timed


@pytest.mark.parametrize("count", [0, 2])
def test_a_rank_that_is_done_waits_as_long_as_another_may_wait_for_its_data(count):
    """An idle rank (without micro-batches) too."""
    watchdog, seen = Watchdog(0, Timeouts(step_seconds=3, fetch_seconds=50).limits()), []
    report = watchdog.progress

    def progress(phase, **given):
        report(phase, **given)
        seen.append((phase, watchdog._limit()))

    watchdog.progress = progress
    loader = SimpleNamespace(
        fetch=lambda number: iter(range(number)), read_ahead=lambda: seen.append("read ahead")
    )
    parts = SimpleNamespace(loader=loader, watchdog=watchdog, transform=lambda loaded: loaded)
    one = [("fetch", 50), ("step", 3), ("fetch", 50), "read ahead"]
    most = 4  # micro-batches of the rank that has the most
    assert list(fetch_timed(parts, count, most, PhaseTimers())) == list(range(count))
    assert seen == [*one * count, ("allreduce", most * 53)]


def test_each_of_two_evaluations_has_the_limit_of_one():
    """That of the weights, and that of their average."""
    seen = []

    @contextlib.contextmanager
    def during(phase):
        seen.append(phase)
        yield
        seen.append("over")

    evaluation = SimpleNamespace(run=lambda *_: seen.append("run") or {"test_loss": 1.0})
    replica = SimpleNamespace(ema=SimpleNamespace(in_use=contextlib.nullcontext))
    results = evaluate_weights(evaluation, replica, None, SimpleNamespace(during=during))
    assert results == {"test_loss": 1.0, "ema_test_loss": 1.0}
    assert seen == ["evaluate", "run", "over"] * 2
