"""The training loop: what it tells the watchdog."""

from types import SimpleNamespace

import pytest

from hvdlarge.config.job import Timeouts
from hvdlarge.loop import fetch_timed
from hvdlarge.telemetry.timers import PhaseTimers


@pytest.mark.parametrize("count", [0, 2])
def test_a_rank_that_is_done_waits_as_long_as_another_may_wait_for_its_data(count):
    """An idle rank (without micro-batches) too."""
    limits, phases = Timeouts(step_seconds=3, fetch_seconds=50).limits(), []
    parts = SimpleNamespace(
        loader=SimpleNamespace(fetch=lambda number: iter(range(number))),
        watchdog=SimpleNamespace(progress=phases.append),
    )
    assert list(fetch_timed(parts, count, PhaseTimers())) == list(range(count))
    assert phases == [*["fetch", "step"] * count, "allreduce"]
    assert [limits[phase] for phase in phases] == [*[50, 3] * count, 53]
