"""The fits of the weight distance: known curves are recovered, with honest errors."""

import numpy as np
import pytest

from hvdlarge.reporting.fits import MIN_POINTS, fit_log, fit_power

T = np.unique(np.geomspace(10, 1e5, 200).round())


@pytest.mark.parametrize("power", [-0.3, 0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("factor", [1e-4, 3.0, 1e6])
def test_a_power_law_is_recovered(power, factor):
    fit = fit_power(T, factor * T**power)
    assert fit.parameters["p"].value == pytest.approx(power, abs=1e-7)
    assert fit.parameters["a"].value == pytest.approx(factor, rel=1e-5)
    assert fit.r_squared == pytest.approx(1)
    np.testing.assert_allclose(fit.at(T), factor * T**power, rtol=1e-5)


def test_a_logarithm_is_recovered():
    fit = fit_log(T, 2.5 * np.log(T) - 4)
    assert [fit.parameters[name].value for name in "ab"] == pytest.approx([2.5, -4])
    assert fit.rms < 1e-12
    np.testing.assert_allclose(fit.at(T), 2.5 * np.log(T) - 4)


@pytest.mark.parametrize(
    ("fit", "curve", "truth"),
    [
        (fit_log, lambda: 2.5 * np.log(T) - 4, {"a": 2.5, "b": -4}),
        (fit_power, lambda: 0.7 * T**0.4, {"a": 0.7, "p": 0.4}),
    ],
)
def test_standard_errors_are_those_of_repeated_measurements(fit, curve, truth):
    draw = np.random.default_rng(0)
    fits = [fit(T, curve() + draw.normal(0, 0.3, len(T))) for _ in range(100)]
    for name, value in truth.items():
        found = np.array([each.parameters[name].value for each in fits])
        error = np.mean([each.parameters[name].error for each in fits])
        assert abs(found.mean() - value) < 4 * error / 10
        assert found.std() == pytest.approx(error, rel=0.3)


def test_each_form_fits_its_own_curve_better_than_the_other():
    power, log = 2 * T**0.5, 2 * np.log(T) + 1
    assert fit_power(T, power).rms < fit_log(T, power).rms
    assert fit_log(T, log).rms < fit_power(T, log).rms


@pytest.mark.parametrize(
    ("t", "distance"),
    [
        (T[: MIN_POINTS - 1], T[: MIN_POINTS - 1]),
        ([7.0] * 9, range(9)),
        (T, [np.nan] * len(T)),
        (T, [1e300 * each for each in T / T.max()]),
    ],
)
def test_points_that_determine_no_curve_have_no_fit(t, distance):
    distance = np.array(distance, dtype=float)
    assert fit_log(t, distance) is None
    assert fit_power(t, distance) is None


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="two equal lists"):
        fit_log([1, 2, 3], [1, 2])
