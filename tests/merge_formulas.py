"""What merge methods add up, entry by entry, in float64: the oracle of tests and the measure of errors.

Each function returns `{leaf: terms}` for two models and their base, all `{leaf: float64 array}`: the sum
of the terms is the merged leaf, and the sum of their magnitudes what float32 may err in proportion to.
"""

import numpy as np

from fishjax.merge._dare import random_bits


def average(models, base, fishers, *, weights):
    return {n: [w * m[n] / sum(weights) for w, m in zip(weights, models, strict=True)] for n in base}


def task_arithmetic(models, base, fishers, *, weights):
    d = changes(models, base)
    return {n: [base[n], *(w * x[n] for w, x in zip(weights, d, strict=True))] for n in base}


def wise_ft(models, base, fishers, *, alpha):
    return {n: [(1 - alpha) * base[n], alpha * models[0][n]] for n in base}


def fisher(models, base, fishers, *, normalize, favor):
    assert normalize and favor == 1
    norms = [np.sqrt(sum((f[n] ** 2).sum() for n in base)) for f in fishers[:2]]
    masses = lambda n: [fishers[0][n] / norms[0], np.maximum(fishers[1][n], 1e-6) / norms[1]]
    return {n: [m * x[n] / sum(masses(n)) for m, x in zip(masses(n), models, strict=True)] for n in base}


def gradient_matching(models, base, fishers, *, weights):
    terms = {}
    for n, origin in base.items():
        first, second, prior = (f[n] for f in fishers)
        whole = np.maximum(prior, 1e-6) + weights[0] * first + weights[1] * second
        parts = zip(weights, (first, second), changes(models, base), strict=True)
        terms[n] = [origin, *(w * (np.maximum(prior, 1e-6) + f) / whole * d[n] for w, f, d in parts)]
    return terms


def ties(models, base, fishers, *, density):
    d = changes(models, base)
    cuts = []
    for x in d:
        sizes = np.sort(np.concatenate([abs(v).ravel() for v in x.values()]))[::-1]
        cuts.append(sizes[int(density * sizes.size) - 1])
    terms = {}
    for n in base:
        kept = [np.where(abs(x[n]) >= cut, x[n], 0) for x, cut in zip(d, cuts, strict=True)]
        sign = np.where(sum(kept) >= 0, 1, -1)
        agree = [np.sign(k) == sign for k in kept]
        terms[n] = [base[n], *(k * a / np.maximum(sum(agree), 1) for k, a in zip(kept, agree, strict=True))]
    return terms


def breadcrumbs(models, base, fishers, *, density, gamma):
    def kept(x):
        sizes = np.sort(abs(x).ravel())[::-1]
        count = min(x.size, max(1, int(density * x.size)))
        top = min(int(gamma * x.size), x.size - count)
        return np.where((abs(x) <= sizes[top]) & (abs(x) >= sizes[top + count - 1]), x, 0)

    return {n: [base[n], *(kept(x[n]) for x in changes(models, base))] for n in base}


def dare(models, base, fishers, *, density, rescale):
    assert rescale == "l1"

    def kept(n, i, x):
        positions = np.arange(x.size, dtype=np.uint64).reshape(x.shape)
        some = np.where(random_bits(positions, 0, n, i) < np.uint32(density * 2**32), x, 0)
        return some * (abs(x).sum() / abs(some).sum() if some.any() else 1)

    return {n: [base[n], *(kept(n, i, x[n]) for i, x in enumerate(changes(models, base)))] for n in base}


def slerp(models, base, fishers, *, t):
    return {n: arc([m[n] for m in models], t) for n in base}


def nuslerp(models, base, fishers, *, t):
    return {n: [base[n], *arc([x[n] for x in changes(models, base)], t)] for n in base}


def model_stock(models, base, fishers):
    terms = {}
    for n in base:
        a, b = (x[n] for x in changes(models, base))
        cosine = max(0, (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
        terms[n] = [base[n], *(2 * cosine / (1 + cosine) * x / 2 for x in (a, b))]
    return terms


def changes(models, base):
    return [{n: m[n] - base[n] for n in base} for m in models]


def arc(ends, t):
    a, b = ends
    angle = np.arccos(np.clip((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()), -1, 1))
    if np.sin(angle) < 1e-6:  # the chord, where the arc is none
        return [(1 - t) * a, t * b]
    return [np.sin((1 - t) * angle) / np.sin(angle) * a, np.sin(t * angle) / np.sin(angle) * b]
