"""Exact statistics for paired outcomes: what the same examples say before and after a patch.

A *negative flip* was right before and is wrong after; a *positive flip* the other way round. Examples
that did not flip say nothing about the difference, which is why paired tests look at flips only.
"""

import math
from collections.abc import Callable, Sequence

from fishjax.errors import UsageError


def upper_bound(count: int, n: int, *, confidence: float = 0.95) -> float:
    """Return the one-sided Clopper-Pearson upper bound of a rate of which `count` of `n` were seen.

    Args:
      count: occurrences, 0 to n.
      n: examples, at least 1.
      confidence: in (0, 1).

    Raises:
      UsageError: `count` is not between 0 and `n`, or `n` is 0.

    With no occurrence it is `1 - (1 - confidence)**(1/n)`, about 3/n at 95 %.

    >>> round(upper_bound(0, 149), 4)
    0.0199

    References: Clopper and Pearson, Biometrika 26 (1934) 404.
    """
    _check_counts(count, n)
    from scipy.stats import beta

    return 1.0 if count == n else float(beta.ppf(confidence, count + 1, n - count))


def lower_bound(count: int, n: int, *, confidence: float = 0.95) -> float:
    """Return the one-sided Clopper-Pearson lower bound of a rate; arguments as for `upper_bound`.

    >>> lower_bound(0, 10), round(lower_bound(10, 10), 4)
    (0.0, 0.7411)
    """
    return 1.0 - upper_bound(n - count, n, confidence=confidence)


def mcnemar(worse: int, better: int, *, alternative: str = "two-sided") -> float:
    """Return the p-value of the exact McNemar test that flips go either way equally often.

    Args:
      worse: negative flips.
      better: positive flips.
      alternative: "two-sided", "less" (fewer negative than positive flips: a gain) or "greater" (a loss).

    Without any flip the p-value is 1.

    >>> mcnemar(0, 5, alternative="less")
    0.03125

    References: McNemar, Psychometrika 12 (1947) 153, in its exact binomial form.
    """
    if worse + better == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(worse, worse + better, 0.5, alternative=alternative).pvalue)


def non_inferiority(worse: int, better: int, n: int, *, margin: float) -> float:
    """Return the p-value of "accuracy fell by `margin` or more", by Tango's score test on paired outcomes.

    Args:
      worse: negative flips.
      better: positive flips.
      n: examples.
      margin: the fall that would matter, in (0, 1).

    A small value shows that the patch is not inferior. With `margin` 0 the statistic is McNemar's.

    >>> round(non_inferiority(4, 3, 597, margin=0.02), 5)
    0.00248

    References: Tango, Statistics in Medicine 17 (1998) 891, section 2.
    """
    _check_counts(worse + better, n)
    # The rate of positive flips under the null, worse - better = margin, maximises the likelihood of
    # the trinomial: the larger root of `2n x^2 + b x + c`.
    b = (2 * n - worse + better) * margin - worse - better
    c = -better * margin * (1 - margin)
    rate = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * rate + margin * (1 - margin))
    z = (better - worse + n * margin) / math.sqrt(variance) if variance > 0 else 0.0
    return 0.5 * math.erfc(z / math.sqrt(2))


def holm(pvalues: Sequence[float]) -> list[float]:
    """Return p-values adjusted for looking at several tests at once, in the order given.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]

    References: Holm, Scandinavian Journal of Statistics 6 (1979) 65.
    """
    adjusted = [1.0] * len(pvalues)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(pvalues)), key=lambda i: pvalues[i])):
        largest = max(largest, min(1.0, (len(pvalues) - rank) * pvalues[i]))
        adjusted[i] = largest
    return adjusted


def smallest(enough: Callable[[int], bool], *, most: int = 10**7) -> int | None:
    """Return the smallest n of 1 to `most` for which `enough(n)` holds, or None.

    `enough` must stay true once it is true (counts are rounded, so it may miss by a few examples).

    >>> smallest(lambda n: upper_bound(0, n) <= 0.02)
    149
    """
    low, high = 0, 1
    while not enough(high):
        low, high = high, 2 * high
        if high > 2 * most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _check_counts(count: int, n: int) -> None:
    if not 0 <= count <= n or n < 1:
        raise UsageError(f"`count` must be between 0 and `n`, and `n` at least 1; got {count} of {n}")
