"""The statistics of vetting against closed forms, enumeration and direct maximisation."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binom, norm

from fishjax import vet
from fishjax.errors import UsageError
from fishjax.vet._statistics import smallest
from fishjax.vet._tests import Flips, rule_accuracy, rule_flips, rule_gain


@pytest.mark.parametrize(("count", "n"), [(0, 1), (0, 149), (3, 20), (19, 20), (20, 20)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_clopper_pearson_bounds_leave_alpha_in_each_tail(count, n, confidence):
    upper = vet.upper_bound(count, n, confidence=confidence)
    lower = vet.lower_bound(count, n, confidence=confidence)
    if count < n:  # the rate at which so few, or fewer, come up with probability 1 - confidence
        assert binom.cdf(count, n, upper) == pytest.approx(1 - confidence, rel=1e-9)
    else:
        assert upper == 1
    if count:
        assert binom.sf(count - 1, n, lower) == pytest.approx(1 - confidence, rel=1e-9)
    else:
        assert lower == 0
        assert upper == pytest.approx(1 - (1 - confidence) ** (1 / n), rel=1e-12)


@pytest.mark.parametrize(("worse", "better"), [(0, 5), (4, 3), (1, 9), (7, 7), (12, 2)])
def test_mcnemar_counts_the_binomial_tail(worse, better):
    n = worse + better
    tail = lambda ks: sum(math.comb(n, k) for k in ks) / 2**n
    assert vet.mcnemar(worse, better, alternative="less") == pytest.approx(tail(range(worse + 1)))
    assert vet.mcnemar(worse, better, alternative="greater") == pytest.approx(tail(range(worse, n + 1)))
    both = min(1.0, 2 * tail(range(min(worse, better) + 1)))
    assert vet.mcnemar(worse, better) == pytest.approx(both)
    assert vet.mcnemar(0, 0) == 1


@pytest.mark.parametrize(
    ("worse", "better", "n", "margin"),
    [(4, 3, 597, 0.02), (10, 2, 50, 0.05), (0, 0, 100, 0.02), (30, 1, 90, 0.2)],
)
def test_non_inferiority_is_the_score_at_the_constrained_maximum(worse, better, n, margin):
    def minus_log_likelihood(rate):  # of positive flips; negative ones at rate + margin
        counts = ((worse, rate + margin), (better, rate), (n - worse - better, 1 - 2 * rate - margin))
        return -sum(k * math.log(p) for k, p in counts if k)

    rate = minimize_scalar(
        minus_log_likelihood,
        bounds=(1e-14, (1 - margin) / 2 - 1e-12),
        method="bounded",
        options={"xatol": 1e-13},
    ).x
    z = (better - worse + n * margin) / math.sqrt(n * (2 * rate + margin - margin**2))
    assert vet.non_inferiority(worse, better, n, margin=margin) == pytest.approx(norm.sf(z), rel=1e-5)


def test_non_inferiority_without_margin_is_the_mcnemar_statistic():
    assert vet.non_inferiority(9, 4, 100, margin=0.0) == pytest.approx(norm.sf((4 - 9) / math.sqrt(13)))


def test_holm_by_hand_and_its_family_wise_error():
    assert vet.holm([]) == []
    assert vet.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert vet.holm([0.9, 0.8]) == [1.0, 1.0]
    rng = np.random.default_rng(0)  # true nulls, as dependent as can be: one p-value five times
    wrong = [min(vet.holm([p] * 5)) <= 0.05 for p in rng.random(4000)]
    assert np.mean(wrong) == pytest.approx(0.01, abs=0.005)


def test_smallest_finds_the_first_and_gives_up():
    assert [smallest(lambda n, k=k: n >= k) for k in (1, 2, 149, 1000)] == [1, 2, 149, 1000]
    assert smallest(lambda n: False, most=1000) is None


def test_counts_that_make_no_sense_are_refused():
    for count, n in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(UsageError, match="between 0 and"):
            vet.upper_bound(count, n)


def test_flips_are_shown_within_the_budget_over_it_or_neither():
    rule = lambda n, worse: rule_flips(Flips(n, n, n - worse, worse, 0), 0.02, 0.95)
    assert rule(149, 0).status == "pass"
    assert rule(148, 0).status == "inconclusive" and rule(148, 0).needed == 149
    assert rule(5, 5).status == "fail"  # few, but it cannot be chance
    assert rule(5, 1).status == "inconclusive" and rule(5, 1).needed == 149
    assert rule(400, 9).status == "fail"  # 2.25 %, and 400 could have shown 2 %
    near = rule(400, 5)  # 1.25 %, bound 2.6 %
    assert near.status == "inconclusive"
    assert vet.upper_bound(math.ceil(0.0125 * near.needed), near.needed) <= 0.02
    assert 400 < near.needed < 4000


def test_accuracy_is_shown_kept_shown_lost_or_neither():
    rule = lambda n, worse, better: rule_accuracy(
        Flips(n, n, n - worse + better, worse, better),
        0.02,
        0.95,
        vet.mcnemar(worse, better, alternative="greater"),
    )
    assert rule(600, 4, 3).status == "pass"
    assert rule(600, 30, 3).status == "fail"
    assert rule(20, 0, 0).status == "inconclusive" and 100 < rule(20, 0, 0).needed < 149
    assert rule(20, 12, 0).status == "fail"  # few examples, but significantly worse
    assert rule(20, 1, 0).status == "inconclusive"


def test_a_claimed_gain_must_be_large_enough_and_no_chance():
    rule = lambda n, worse, better: rule_gain(
        Flips(n, 0, better - worse, worse, better), 0.1, 0.95, vet.mcnemar(worse, better, alternative="less")
    )
    assert rule(100, 1, 40).status == "pass"
    assert rule(100, 1, 8).status == "fail"
    assert rule(4, 0, 0).status == "inconclusive"  # four examples cannot show any gain
    chance = rule(20, 1, 4)
    assert chance.status == "inconclusive" and 20 < chance.needed < 100
