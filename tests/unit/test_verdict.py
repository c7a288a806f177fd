"""The statistic keeps what it promises, and the verdict needs every condition."""

import math
from dataclasses import replace

import numpy as np
import pytest

from midfill.evaluation.statistics import (
    difference,
    effect,
    median_bounds,
    more_commits,
    power,
    smallest_gain,
    student_quantile,
)
from midfill.training.verdict import HoleResults, Limits, Measurements, as_dict, decide

GOOD = Measurements(
    effect=effect([str(i % 30) for i in range(180)], [1.0 + 0.1 * (i % 7) for i in range(180)], [10] * 180),
    nll_base=1.0,
    nll_adapter=0.9,
    general=1.0,
    hole_results=HoleResults(100, 100, 1.0),
)


def simulated(seed, gain, *, commits=24, per_commit=7, between=0.19, within=0.8):
    """Examples of a commit share what makes them easier or harder for an adapter."""
    numbers = np.random.default_rng(seed)
    names, gains, tokens = [], [], []
    for commit in range(commits):
        shared = numbers.normal(gain, between)
        for _ in range(per_commit):
            count = int(numbers.integers(2, 60))
            names.append(str(commit))
            tokens.append(count)
            gains.append(count * (shared + numbers.normal(0, within) / math.sqrt(count)))
    return effect(names, gains, tokens)


def test_students_quantiles_are_those_of_the_tables():
    table = {1: 12.7062, 2: 4.3027, 5: 2.5706, 19: 2.0930, 20: 2.0860, 39: 2.0227, 120: 1.9799}
    for degrees, expected in table.items():
        assert student_quantile(0.975, degrees) == pytest.approx(expected, abs=1e-4)
    assert student_quantile(0.975, 201) == pytest.approx(student_quantile(0.975, 200), abs=3e-4)
    assert student_quantile(0.99, 10) == pytest.approx(2.7638, abs=1e-4)


def test_of_two_hundred_useless_adapters_at_most_one_in_twenty_passes():
    passed = sum(simulated(seed, 0.0).low > 0 for seed in range(200))
    assert passed <= 10


def test_a_bootstrap_over_examples_would_let_more_pass():
    def naive(seed):
        numbers = np.random.default_rng(seed)
        found = simulated(seed, 0.0)
        assert found.commits == 24
        gains = []
        for _ in range(24):
            shared = numbers.normal(0, 0.19)
            gains += [shared + numbers.normal(0, 0.2) for _ in range(7)]
        return np.mean(gains) > 1.96 * np.std(gains) / math.sqrt(len(gains))

    assert sum(naive(seed) for seed in range(200)) > 10


def test_a_real_gain_is_found_as_often_as_the_table_says():
    found = sum(simulated(seed, 0.2, commits=40).low > 0 for seed in range(100)) / 100
    assert found >= 0.9
    assert power(0.1, 0.19, 20) == pytest.approx(0.60, abs=0.02)
    assert power(0.1, 0.19, 80) > 0.98
    assert power(smallest_gain(40), 0.19, 40) == pytest.approx(0.8, abs=0.01)


def test_the_gain_is_that_of_all_tokens():
    found = effect(["a", "a", "b"], [3.0, 1.0, 2.0], [10, 20, 30])
    assert found.gain == pytest.approx(0.1)
    assert (found.commits, found.examples, found.tokens) == (2, 3, 60)
    assert found.low < found.gain < found.high


def test_one_commit_tells_nothing():
    found = effect(["a"] * 200, [1.0] * 200, [1] * 200)
    assert found.low == -math.inf
    assert more_commits(found) is None


def test_more_commits_are_as_many_as_would_do():
    found = simulated(3, 0.1, commits=10)
    more = more_commits(found)
    assert power(found.gain, found.spread, found.commits + more) >= 0.8


def test_what_passes_every_condition_is_enabled():
    decision = decide(GOOD)
    assert decision.verdict == "enabled"
    assert as_dict(GOOD, decision)["verdict"] == "enabled"


@pytest.mark.parametrize(
    ("change", "verdict", "reason"),
    [
        ({"problems": ("It is broken.",)}, "rejected", "broken"),
        ({"scale": 0.0}, "rejected", "no strength"),
        ({"effect": None}, "inconclusive", "not measured on any test commit"),
        (
            {"effect": replace(simulated(1, 0.0), gain=0.009, low=0.004, high=0.02)},
            "rejected",
            "minimum useful gain",
        ),
        ({"general": 1.021}, "rejected", "other code"),
        ({"general": math.nan}, "rejected", "NaN or infinite"),
        ({"general": None}, "inconclusive", "other code"),
        ({"nll_adapter": math.nan}, "rejected", "NaN or infinite"),
        ({"hole_results": HoleResults(100, 99, 1.0)}, "rejected", "fewer characters: 99 instead of 100"),
        (
            {"hole_results": HoleResults(100, 100, 1.13, (1.11, 1.2))},
            "rejected",
            "13% longer with the adapter (11% to 20%; limit: 10%).",
        ),
        (
            {"hole_results": HoleResults(100, 100, 1.13, (0.95, 1.4))},
            "inconclusive",
            "13% longer with the adapter (-5% to 40%; limit: 10%), but that may be chance",
        ),
        (
            {"hole_results": HoleResults(100, 100, 1.13)},
            "inconclusive",
            "(limit: 10%), but that may be chance",
        ),
        ({"hole_results": None}, "inconclusive", "not measured"),
        ({"effect": effect(["a", "b"] * 90, [1.0, 1.1] * 90, [10] * 180)}, "inconclusive", "18 more commits"),
        (
            {"effect": effect([str(i % 25) for i in range(140)], [1.0] * 140, [10] * 140)},
            "inconclusive",
            "140 examples",
        ),
        ({"effect": replace(simulated(1, 0.0), gain=-0.01, low=-0.06, high=0.04)}, "rejected", "higher"),
        (
            {"effect": replace(simulated(1, 0.0), gain=0.02, low=-0.03, high=0.07)},
            "inconclusive",
            "more commits",
        ),
    ],
)
def test_one_condition_that_is_not_met_keeps_it_off(change, verdict, reason):
    decision = decide(replace(GOOD, **change))
    assert decision.verdict == verdict
    assert reason in " ".join(decision.reasons)


def test_the_bounds_of_a_median_are_those_of_the_sign_test():
    """The ranks are those of printed tables, for 95% on both sides together."""
    for count, rank in ((6, 1), (10, 2), (20, 6), (24, 7), (50, 18)):
        numbers = list(range(count, 0, -1))
        assert median_bounds(numbers) == (rank, count + 1 - rank)
    assert median_bounds(range(5)) == median_bounds([]) == (-math.inf, math.inf)


def test_a_busy_machine_rejects_no_adapter_that_is_quick_enough():
    """Each time is up to five times as long by chance. One adapter costs 5%, the other 60%."""
    numbers = np.random.default_rng(11)
    found = {1.05: [], 1.6: []}
    for _ in range(500):
        for cost, verdicts in found.items():
            ratios = cost * numbers.uniform(1, 5, 24) / numbers.uniform(1, 5, 24)
            results = HoleResults(100, 100, float(np.median(ratios)), median_bounds(list(ratios)))
            verdicts.append(decide(replace(GOOD, hole_results=results)).verdict)
    assert found[1.05].count("rejected") <= 500 * 0.025
    assert "inconclusive" in found[1.05]
    assert found[1.6].count("rejected") > found[1.6].count("enabled")


def test_commits_that_have_evaluated_others_ask_for_more():
    result = as_dict(replace(GOOD, num_comparisons=5), decide(GOOD))
    assert result["alpha"] == pytest.approx(0.005)


def test_limits_are_the_ones_that_are_written_down():
    assert Limits() == Limits(commits=20, examples=150, general=1.02, latency=1.10, gain=0.01)


def test_the_bounds_of_a_difference_of_shares_cover_it_where_sessions_differ():
    """Sessions differ by more than the chance of their offers."""
    numbers = np.random.default_rng(7)
    covered = naive = 0
    for _ in range(400):
        groups = []
        for count, mean in ((90, 0.33), (10, 0.25)):
            shares = numbers.beta(12 * mean, 12 * (1 - mean), count)
            offered = numbers.integers(5, 60, count)
            groups.append(
                [(int(numbers.binomial(n, p)), int(n)) for n, p in zip(offered, shares, strict=True)]
            )
        gain, low, high = difference(*groups)
        covered += low <= 0.08 <= high
        sums = [(sum(one for one, _ in pairs), sum(of for _, of in pairs)) for pairs in groups]
        error = math.sqrt(sum(one * (of - one) / of**3 for one, of in sums))
        naive += abs(gain - 0.08) <= 1.96 * error
    assert covered / 400 > 0.91
    # As if offers of a session had nothing in common.
    assert naive / 400 < 0.85


def test_too_few_sessions_are_not_compared():
    assert difference([(1, 2), (2, 4)], [(3, 9)]) is None
    assert difference([(1, 2), (2, 4)], [(3, 9), (0, 0)]) is None
    assert difference([(1, 2), (2, 4)], [(3, 9), (3, 9)]) is None
    assert difference([(1, 2), (2, 5)], [(3, 9), (1, 9)]) is not None
