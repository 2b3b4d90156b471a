"""The k-th largest of values that pass by in blocks, exactly, in few passes."""

import jax.numpy as jnp
import numpy as np
import pytest

from fishjax.merge._select import Ranking


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "make",
    [
        lambda rng: abs(rng.standard_normal(30_000)),
        lambda rng: abs(
            rng.standard_normal(30_000).astype(jnp.bfloat16).astype(float)
        ),  # few values, many ties
        lambda rng: np.where(rng.random(30_000) < 0.9, 0, 1.0),
        lambda rng: np.sort(rng.random(30_000)),  # a sample of each block's beginning misleads
        lambda rng: np.full(30_000, np.inf),
    ],
)
def test_ranking_is_exact(make, dtype):
    x = make(np.random.default_rng(0)).astype(dtype)
    blocks = np.split(x, 10)
    ks = [0, 1, 2, 57, 15_000, 29_999, 30_000]
    for sample in (x[:500], x[-500:], np.concatenate([b[:50] for b in blocks])):
        ranking = Ranking([ks, ks[:1]])
        ranking.guess([sample, sample], x.size)
        passes = 0
        while not ranking.done:
            for b in blocks:
                ranking.add(ranking.count([b, b]))
            ranking.narrow()
            passes += 1
        ordered = np.sort(x)[::-1]
        assert ranking.values() == [[np.inf if k == 0 else ordered[k - 1] for k in ks], [np.inf]]
        assert passes <= (6 if dtype == np.float64 else 4)


def test_a_guess_is_not_an_answer():
    x = np.concatenate([np.zeros(1000), np.ones(50)]).astype(np.float32)
    ranking = Ranking([[50]])
    ranking.guess([x[:1000]], x.size)  # nothing but zeros: the first span is one pattern, the wrong one
    while not ranking.done:
        ranking.add(ranking.count([x]))
        ranking.narrow()
    assert ranking.values() == [[1.0]]
