"""What all experiments on FISH masks share: one compiled training for every mask, and cells kept on disk."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.fish_problems import Problem
from fishjax import data, fisher, masks, models, patches, train, tree
from fishjax.progress import track
from fishjax.types import Fisher, Mask, Params, Patch

Cell = dict[str, Any]


class Bench(NamedTuple):
    """What can be done with a problem."""

    problem: Problem
    tune: Callable[..., Params]  # (start, mask, learning rate, seed, *, refresh=None)
    tune_patch: Callable[[Params, Patch, float, int], Params]
    accuracy: Callable[[Params, str], float]  # of a split
    fisher: Callable[..., Fisher]  # (params, seed, *, estimator="empirical", examples=256)
    scores: Callable[..., Fisher]  # (seed, ...): of the base
    settings: Mapping[str, Any]


def make(problem: Problem, *, steps: int, batch_size: int) -> Bench:
    """Return the functions of a problem; dense parameters under a gate need no program for each mask."""
    model, loss = problem.model, models.example_loss(problem.model)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 10), steps)
    logits_fn = models.example_logits(model)
    estimators = {
        "empirical": fisher.empirical(loss),
        "exact": fisher.exact(logits_fn),
        "sampled": fisher.sampled(logits_fn),
    }
    rows = jax.tree.map(jnp.asarray, problem.rows["train"])
    count = data.examples(rows)
    forward = jax.jit(model.apply)
    order = functools.partial(_order, count, batch_size, steps)

    def adam(rate: float, *more: optax.GradientTransformation) -> optax.GradientTransformation:
        # The rate is state, not a constant: all rates share one program.
        scale = optax.inject_hyperparams(optax.scale)(step_size=rate)
        shape = optax.scale_by_schedule(lambda count: -schedule(count))
        return optax.chain(optax.scale_by_adam(), shape, scale, *more)

    def training(step: train.Step) -> Callable[..., train.TrainState]:
        @functools.partial(jax.jit, donate_argnums=0)
        def run(state, base, rows, order):
            one = lambda state, where: step(state, base, jax.tree.map(lambda x: x[where], rows))
            return jax.lax.scan(one, state, order)[0]

        return lambda state, base, order: run(state, base, rows, order)

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, bool), jax.eval_shape(problem.base, 0))
    gated = training(train.make_step(loss, adam(1.0, masks.gate(nothing)), apply=lambda base, patch: patch))
    patched = training(train.make_step(loss, adam(1.0)))

    def tune(start: Params, mask: Mask, rate: float, seed: int, *, refresh=None) -> Params:
        """Train under a mask; refresh: `(choose(params) -> mask, every so many steps)`."""
        choose, every = refresh or (None, steps)
        state = train.init(start, adam(rate, masks.gate(mask)))
        for first in range(0, steps, every):
            if first:
                state = _regated(state, choose(state.trainable))
            state = gated(state, None, order(seed)[first : first + every])
        return state.trainable

    def tune_patch(start: Params, patch: Patch, rate: float, seed: int) -> Params:
        state = patched(train.init(patch, adam(rate)), start, order(seed))
        return patches.apply(start, train.patch_of(state))

    def accuracy(params: Params, split: str) -> float:
        right = [
            (np.asarray(forward(params, batch)).argmax(-1) == np.asarray(model.labels(batch)))
            for batch in data.batches(problem.rows[split], min(1000, data.examples(problem.rows[split])))
        ]
        return float(np.concatenate(right).mean())

    def estimate(params: Params, seed: int, *, estimator: str = "empirical", examples: int = 256) -> Fisher:
        some = next(data.batches(problem.rows["train"], min(examples, count), seed=seed))
        key = jax.random.key(seed) if estimator == "sampled" else None
        # Batches of one size, and so one program, however many examples there are.
        batches = list(data.batches(some, min(32, data.examples(some))))
        return fisher.estimate(estimators[estimator], params, batches, key=key)

    @functools.lru_cache(maxsize=16)
    def scores(seed: int, **rest: Any) -> Fisher:
        return estimate(problem.base(seed), seed, **rest)

    settings = {"problem": problem.name, **problem.about, "examples": count}
    settings |= {"steps": steps, "batch_size": batch_size}
    return Bench(problem, tune, tune_patch, accuracy, estimate, scores, settings)


def fish(bench: Bench, seed: int, density: float, *, estimator="empirical", examples=256, **rules) -> Mask:
    """Choose by the Fisher of the base; what is new is kept whole."""
    scores = bench.scores(seed, estimator=estimator, examples=examples)
    return masks.topk(scores, density=density, always=bench.problem.always or None, **rules)


def random(bench: Bench, seed: int, density: float) -> Mask:
    """Choose at random."""
    always = bench.problem.always or None
    return masks.random(jax.random.key(seed), bench.problem.base(seed), density=density, always=always)


def magnitude(bench: Bench, seed: int, density: float) -> Mask:
    """Choose the largest weights."""
    return masks.magnitude(bench.problem.base(seed), density=density, always=bench.problem.always or None)


def measure(bench: Bench, params: Params, numbers: int) -> Cell:
    """Return what is known of a training: accuracies, and how many numbers were trained."""
    return {**{s: bench.accuracy(params, s) for s in ("validation", "test")}, "numbers": numbers}


def masked(bench: Bench, choose: Callable[[Bench, int], Mask], rate: float, seed: int) -> Cell:
    """Train under a mask."""
    mask = choose(bench, seed)
    return measure(bench, bench.tune(bench.problem.base(seed), mask, rate, seed), masks.count(mask))


def lora(bench: Bench, rate: float, seed: int, *, rank: int) -> Cell:
    """Train queries and values by low-rank products, and what is new."""
    base = bench.problem.base(seed)
    patch = patches.init_lora(jax.random.key(seed), base, rank=rank, targets="paper", alpha=rank)
    if bench.problem.always:
        patch = {**patch, **patches.init_dense(base, bench.problem.always)}
    return measure(bench, bench.tune_patch(base, patch, rate, seed), patches.num_parameters(patch))


def study(
    folder: Path,
    settings: Mapping[str, Any],
    ways: Mapping[str, tuple[Callable[[float, int], Cell], Sequence[float]]],
    seeds: Sequence[int],
) -> dict[str, dict[str, Any]]:
    """Choose each way's learning rate on validation data of the first seed, then run the other seeds.

    A cell that was finished under the same settings is read from `folder/cells`, so a run that was
    stopped goes on. Returns `{way: {"rate": r, "rates": [...], "cells": [one for each seed]}}`.
    """
    total = sum(len(rates) + len(seeds) - 1 for _, rates in ways.values())
    ticks = track(range(total), description=f"cells of {settings['problem']}")

    def cell(name: str, run: Callable[[float, int], Cell], rate: float, seed: int) -> Cell:
        next(ticks)
        return _kept(folder, {**settings, "way": name, "rate": rate, "seed": seed}, run)

    results = {}
    for name, (run, rates) in ways.items():
        first = {rate: cell(name, run, rate, seeds[0]) for rate in rates}
        # The lower of two that are equal: it is the safer one.
        best = max(rates, key=lambda rate: (first[rate]["validation"], -rate))
        rest = [cell(name, run, best, seed) for seed in seeds[1:]]
        results[name] = {"rate": best, "rates": list(rates), "cells": [first[best], *rest]}
    next(ticks, None)
    return results


def _kept(folder: Path, about: Mapping[str, Any], run: Callable[[float, int], Cell]) -> Cell:
    plain = "".join(c if c.isalnum() or c in ".-" else "_" for c in about["way"])
    path = folder / "cells" / f"{plain}_{about['rate']:g}_{about['seed']}.json"
    about = json.loads(json.dumps(about))
    if path.exists() and (kept := json.loads(path.read_text()))["about"] == about:
        return kept["cell"]
    cell = run(about["rate"], about["seed"])
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".partial")
    part.write_text(json.dumps({"about": about, "cell": cell}))
    part.replace(path)
    return cell


def share_of(mask: Mask) -> dict[str, float]:
    """Return where a mask sits: the share of its entries in each kind of leaf (a name without numbers)."""
    kinds: dict[str, int] = {}
    for name, leaf in tree.flatten(mask).items():
        kind = ".".join(p for p in name.split(".") if not p[-1].isdigit())
        kinds[kind] = kinds.get(kind, 0) + int(np.count_nonzero(leaf))
    total = max(1, sum(kinds.values()))
    return {k: n / total for k, n in sorted(kinds.items(), key=lambda pair: -pair[1])}


def _order(count: int, batch_size: int, steps: int, seed: int) -> np.ndarray:
    """Return which examples each step sees, `[steps, B]`: epochs in new orders."""
    rng = np.random.default_rng([seed, 1])
    epochs = -(-steps * batch_size // count)
    order = np.concatenate([rng.permutation(count) for _ in range(epochs)])
    return order[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)


def _regated(state: train.TrainState, mask: Mask) -> train.TrainState:
    """Go on under another mask, as `train.refresh` does: only what both keep goes on with its moments."""
    adam, *rest, gate = state.opt_state
    clean = lambda tree: jax.tree.map(lambda m, a, b: jnp.where(a & b, m, 0), tree, gate.mask, mask)
    adam = adam._replace(mu=clean(adam.mu), nu=clean(adam.nu))
    return state._replace(opt_state=(adam, *rest, gate._replace(mask=jax.tree.map(jnp.array, mask))))
