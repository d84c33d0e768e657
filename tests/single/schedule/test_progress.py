import pytest

from hvdlarge.schedule.progress import (
    Clock,
    check_milestones,
    milestones_reached,
    reached,
)


def test_a_run_is_rounded_to_whole_samples():
    assert Clock(1437, 30).total_samples == 43110
    assert Clock(7, 0.5).total_samples == 4
    assert Clock(10**12, 90).total_samples == 90 * 10**12


@pytest.mark.parametrize(
    ("size", "epochs"), [(0, 1), (10, 0.01), (10, float("nan")), (10, float("inf")), (10, -1)]
)
def test_a_run_without_a_sample_is_refused(size, epochs):
    with pytest.raises(ValueError):
        Clock(size, epochs)


@pytest.mark.parametrize("size", [1, 3, 7, 10, 1437, 1_281_167, 10**9])
@pytest.mark.parametrize("every", [0.1, 0.3, 1 / 3, 0.7, 1.0, 6.0, 20.0])
def test_marks_are_reached_at_the_sample_that_completes_them(size, every):
    clock = Clock(size, 100)
    for number in range(1, 12):
        mark = number * every
        samples = clock.samples_until(mark)
        assert reached(clock.epoch(samples), mark)
        assert samples == 0 or not reached(clock.epoch(samples - 1), mark)
        assert abs(samples - mark * size) <= 1 + 1e-9 * mark * size
        assert milestones_reached(clock.epoch(samples), every, None) >= number


def test_marks_are_counted_alike_by_interval_and_by_list():
    listed = [number * 0.1 for number in range(1, 50)]
    for samples in range(490):
        epoch = samples / 100
        assert milestones_reached(epoch, 0.1, None) == milestones_reached(epoch, None, listed)


@pytest.mark.parametrize(
    ("every", "at"), [(None, None), (1, (1,)), (0, None), (-1, None), (float("nan"), None), (None, ()), (None, (2, 1)),
                      (None, (0, 1)), (None, (1, 1)), (None, (1, float("inf"))), (None, (float("nan"),))]
)  # fmt: skip
def test_marks_that_cannot_be_followed_are_refused(every, at):
    with pytest.raises(ValueError, match="every|at"):
        check_milestones(every, at, ("every", "at"))
