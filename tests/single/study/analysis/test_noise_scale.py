"""The analysis `noise_scale`: ratios of known limits and known noise scales."""

import dataclasses
import json

import numpy as np
import pytest
from support.simulated_studies import points, repetitions, setup_of

from hvdlarge.study.analysis.cells import by_cell
from hvdlarge.study.analysis.noise_scale import mean_noise, noise_scale
from hvdlarge.study.analysis.sections import NoiseScale

BATCHES = [32, 64, 128, 256, 512, 1024]
SECTION = NoiseScale(batch="batch.base", tolerance=0.01)


def found(setup, runs, section=SECTION):
    finding = noise_scale(section, setup, by_cell(setup, runs))
    json.dumps(finding.facts, allow_nan=False)
    assert len({len(row) for row in finding.table}) <= 1
    return finding


def simulated(limit, noise, target=False, seed=0):
    setup = setup_of({"batch.base": BATCHES})
    rng = np.random.default_rng(seed)
    slope = 0.01 / np.log2(limit / 32)
    runs = []
    for batch in BATCHES:
        more = {}
        if target:
            at = np.linspace(1, 20000, 80).astype(int)
            steps = 300 * (1 + limit / batch)
            more["curve"] = [points(at, at / (steps * (1 + 0.02 * rng.normal()))) for _ in range(8)]
        logged = [
            points([100, 200, 300], noise * np.exp(0.1 * rng.normal(size=3))) for _ in range(8)
        ]
        values = 0.5 - slope * np.log2(batch / 32) + 0.0005 * rng.normal(size=8)
        runs += repetitions((str(batch),), values, noise=logged, **more)
    return setup, runs


def test_the_ratio_of_a_known_limit_and_a_known_noise_scale():
    finding = found(*simulated(limit=400, noise=200))
    fact = finding.facts["arms"][0]
    assert fact["at"] == 32
    assert fact["measured"]["mean"] == pytest.approx(200, rel=0.1)
    ratio = fact["limit_ratio"]
    assert ratio["low"] < 2 < ratio["high"]
    assert ratio["mean"] == pytest.approx(2, rel=0.15)
    assert "times the noise scale" in finding.verdict


def test_the_critical_batch_of_a_target():
    section = NoiseScale(batch="batch.base", tolerance=0.01, target=1.0)
    finding = found(*simulated(limit=400, noise=200, target=True), section)
    fact = finding.facts["arms"][0]
    assert fact["critical_batch"]["mean"] == pytest.approx(400, rel=0.1)
    assert fact["critical_ratio"]["low"] < 2 < fact["critical_ratio"]["high"]
    assert "critical batch of the steps to the target" in finding.verdict


def test_a_critical_batch_beyond_the_measured_ones_has_no_ratio():
    setup, runs = simulated(limit=400, noise=200)
    at = np.arange(1, 1000)
    runs = [
        dataclasses.replace(r, curve=points(at, at * int(r.cell[0]) / 20000, lr=0.1)) for r in runs
    ]
    finding = found(setup, runs, NoiseScale(batch="batch.base", tolerance=0.01, target=1.0))
    assert finding.verdict.endswith(", critical batch of the steps to the target far above 1024.")
    assert [row[-2:] for row in finding.table[1:2]] == [("far above 1024", "—")]
    assert finding.facts["arms"][0]["critical_ratio"]["mean"] is None


def test_measurements_count_by_their_updates():
    assert mean_noise(points([100, 400], [10.0, 1000.0])) == pytest.approx(10 ** (1 / 4 + 9 / 4))
    assert mean_noise(points([100, 200], [-5.0, 80.0])) == pytest.approx(80)
    assert mean_noise(points([100], [0.0])) is None
    assert mean_noise(()) is None


def test_limits_that_are_not_found():
    setup = setup_of({"batch.base": BATCHES})
    noise = [points([10], [300.0])] * 8
    values = 0.5 + 0.0001 * np.arange(8)
    runs = [run for b in BATCHES for run in repetitions((str(b),), values, noise=noise)]
    finding = found(setup, runs)
    assert "batch limit above 1024" in finding.verdict
    assert finding.facts["arms"][0]["limit_ratio"]["mean"] is None
    edge = [run for b in BATCHES for run in repetitions((str(b),), values, lr=10.0, noise=noise)]
    assert (
        "batch limit void: batch.base 32 has lr.base 10, the upper end"
        in found(setup, edge).verdict
    )


def test_the_smallest_batch_with_a_noise_scale_is_compared():
    setup, runs = simulated(limit=400, noise=200)
    silent = [run for run in runs if run.cell != ("32",)]
    values = [run.value for run in runs if run.cell == ("32",)]
    finding = found(setup, silent + repetitions(("32",), values))
    assert finding.facts["arms"][0]["at"] == 64
    assert "Without a noise scale (log.noise_every_steps): batch.base 32." in finding.notes


def test_unfinished_studies():
    setup = setup_of({"batch.base": BATCHES})
    assert "Noise scale (95 %): none was measured." in found(setup, []).verdict
    runs = repetitions(("32",), [0.5], noise=[points([10], [300.0])])
    assert "300 (no interval) samples at batch 32" in found(setup, runs).verdict
    assert found(setup, [r for c in setup.cells for r in repetitions(c, [None] * 3)]).plot is None


def test_ratios_of_limits_without_an_interval_have_none():
    setup, runs = simulated(limit=400, noise=200)
    finding = found(setup, [run for run in runs if run.number < 2])
    ratio = finding.facts["arms"][0]["limit_ratio"]
    assert (ratio["low"], ratio["high"]) == (None, None)
    assert finding.verdict.count("(no interval)") == 3
