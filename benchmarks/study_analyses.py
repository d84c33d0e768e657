"""The rates of the analyses of studies, over many simulated studies: false positives and power of
`compare`, coverage of the limits of `batch_limit`, of the fits of `diffusion` and of intervals of
means.

    python benchmarks/study_analyses.py [--studies 2000]

Seeded: the same number of studies gives the same figures. With 2,000 studies a rate of 5 % has a
standard error of 0.5 %. Minutes on one core; tests/single/study/analysis checks the same on fewer.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.simulated_studies import NOISES, noisy, points, repetitions, setup_of

from hvdlarge.study.analysis.batch_limit import find_limits
from hvdlarge.study.analysis.cells import by_cell
from hvdlarge.study.analysis.compare import compare
from hvdlarge.study.analysis.diffusion import diffusion
from hvdlarge.study.analysis.intervals import interval, p_value
from hvdlarge.study.analysis.sections import BatchLimit, Compare, Diffusion


def main():
    """Simulate, and print the rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=2000, help="of each row; default 2000")
    studies = parser.parse_args().studies
    started = time.perf_counter()
    false_positives_by_seeds(studies)
    false_positives_by_arms(studies // 2)
    power(studies // 4)
    non_inferiority(studies // 2)
    coverage_of_means(studies)
    coverage_of_limits(studies // 8)
    coverage_of_fits(studies // 16)
    print(f"{time.perf_counter() - started:.0f} s")


def row(name, *rates):
    """Print a row of percentages."""
    print(f"  {name:34}" + "".join(f"{100 * rate:9.1f} %" for rate in rates), flush=True)


def heading(title, *columns):
    """Print a title, with the columns' names."""
    print(f"\n{title}\n  {'':34}" + "".join(f"{column:>11}" for column in columns), flush=True)


def false_positives_by_seeds(studies):
    """A pair of equal arms, for each kind of noise; nominal 5 %."""
    sizes = (3, 4, 5, 6, 8, 12, 16)
    heading("p <= 0.05 of two equal arms", *(f"{size} seeds" for size in sizes))
    for kind, draw in NOISES.items():
        rng = np.random.default_rng(0)
        rates = []
        for size in sizes:
            pairs = (draw(rng, (2, size)) for _ in range(studies))
            rates.append(np.mean([p_value([*(one - two)]) <= 0.05 for one, two in pairs]))
        row(kind, *rates)


def false_positives_by_arms(studies):
    """Studies of equal arms in which any is called better or worse; nominal 5 %."""
    sizes = (2, 3, 5)
    heading("compare: any difference of equal arms", *(f"{size} arms" for size in sizes))
    for kind in NOISES:
        for name, section in (("baseline", Compare(baseline={"arm": "0"})), ("best", Compare())):
            rates = []
            for size in sizes:
                setup = setup_of({"arm": [str(each) for each in range(size)]})
                found = [
                    is_different(section, setup, [0.9] * size, seed, kind)
                    for seed in range(studies // 2)
                ]
                rates.append(np.mean(found))
            row(f"{kind}, against the {name}", *rates)


def power(studies):
    """Two arms of 8 seeds whose difference is a multiple of the noise of a run."""
    effects = (0.5, 1.0, 1.5, 2.0, 3.0)
    heading("compare: a difference is found", *(f"{each} sd" for each in effects))
    section = Compare(baseline={"arm": "a"})
    setup = setup_of({"arm": ["a", "b"]})
    for kind in NOISES:
        rates = []
        for effect in effects:
            means = [0.9, 0.9 + 0.01 * effect]
            found = [is_different(section, setup, means, s, kind) for s in range(studies)]
            rates.append(np.mean(found))
        row(kind, *rates)


def is_different(section, setup, means, seed, kind):
    """Whether any arm is called better or worse."""
    runs = noisy(setup, means, noise=0.01, seed=seed, kind=kind, shared=0.02)
    facts = compare(section, setup, by_cell(setup, runs)).facts["comparisons"]
    return any(each["better"] or each["worse"] for each in facts)


def non_inferiority(studies):
    """An arm that is worse by exactly the tolerance and called within; nominal 2.5 %."""
    heading("compare: within tolerance at its edge", "8 seeds")
    section = Compare(baseline={"arm": "a"}, tolerance=0.01)
    setup = setup_of({"arm": ["a", "b"]})
    for kind in NOISES:
        found = []
        for seed in range(studies):
            runs = noisy(setup, [0.9, 0.89], noise=0.01, seed=seed, kind=kind)
            facts = compare(section, setup, by_cell(setup, runs)).facts["comparisons"]
            found.append(bool(facts[0]["within"]))
        row(kind, np.mean(found))


def coverage_of_means(studies):
    """Intervals that hold the mean; nominal 95 %."""
    sizes = (3, 5, 8, 16)
    heading("intervals of means that hold it", *(f"{size} seeds" for size in sizes))
    for kind, draw in NOISES.items():
        rng = np.random.default_rng(0)
        rates = []
        for size in sizes:
            found = (interval([*draw(rng, size)], 0.95) for _ in range(studies))
            rates.append(np.mean([each.low <= 0 <= each.high for each in found]))
        row(kind, *rates)


def coverage_of_limits(studies):
    """A fall that is linear in ln(batch), so that the interpolation has no error of its own."""
    batches = [32, 64, 128, 256, 512, 1024, 2048]
    setup = setup_of({"batch.base": batches})
    section = BatchLimit(batch="batch.base", tolerance=0.01)
    heading("batch_limit, 8 seeds", "in interval", "too large", "median")
    for limit in (100, 256, 362, 512, 1200):
        slope = 0.01 / np.log2(limit / 32)
        means = [0.5 - slope * np.log2(batch / 32) for batch in batches]
        inside, beyond, ratios = [], [], []
        for seed in range(studies):
            cells = by_cell(setup, noisy(setup, means, noise=0.001, seed=seed, shared=0.01))
            found = find_limits(section, setup, cells)[0]
            inside.append(found.low <= limit * 1.02 and (found.high or 1e9) >= limit / 1.02)
            beyond.append(found.shown > limit)
            if found.estimate is not None:
                ratios.append(found.estimate / limit)
        row(f"limit {limit}", np.mean(inside), np.mean(beyond), np.median(ratios))


def coverage_of_fits(studies):
    """Parameters that differ by seed, and distances with noise of 1 %."""
    setup = setup_of({"arm": ["a"]})
    times = np.unique(np.geomspace(10, 3000, 40).astype(int))
    curves = {
        "power 0.25": (0.25, "power", lambda more: times ** (0.25 + 0.01 * more)),
        "power 0.5": (0.5, "power", lambda more: times ** (0.5 + 0.01 * more)),
        "power 0.8": (0.8, "power", lambda more: times ** (0.8 + 0.01 * more)),
        "slope 0.5": (0.5, "slope", lambda more: 0.5 * (1 + 0.03 * more) * np.log(times) + 0.2),
        "slope 4": (4.0, "slope", lambda more: 4 * (1 + 0.03 * more) * np.log(times) + 0.2),
    }
    heading("diffusion, 8 seeds", "in interval", "told right")
    for name, (truth, parameter, curve) in curves.items():
        inside, right = [], []
        for seed in range(studies):
            rng = np.random.default_rng(seed)
            distance = [
                points(times, curve(rng.normal()) * (1 + 0.01 * rng.normal(size=len(times))))
                for _ in range(8)
            ]
            cells = by_cell(setup, repetitions(("a",), [0.9] * 8, distance=distance))
            fact = diffusion(Diffusion(), setup, cells).facts["cells"][0]
            inside.append(fact[parameter]["low"] <= truth <= fact[parameter]["high"])
            right.append(fact["better"] == {"power": "power", "slope": "log"}[parameter])
        row(name, np.mean(inside), np.mean(right))


if __name__ == "__main__":
    main()
