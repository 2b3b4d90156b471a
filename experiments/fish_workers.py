"""Workers that share a FISH patch: merged after every step or every H, same or disjoint masks, int8.

Command:   python -m experiments.fish_workers --gin_file configs/fish_workers.gin
Time:      9 minutes on two busy cores (70 cells); a run that was stopped goes on.
Expected:  experiments/RESULTS.md: 1/200 of the bytes costs 5 points, merging every 50 steps in int8 no more.

Every worker takes the same number of steps on its own half of each batch. Learning rates are chosen on
validation data (first seed), accuracies reported on test data.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gin
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from experiments import fish_bench, fish_tables
from experiments.fish_bench import Cell
from experiments.fish_problems import Problem
from experiments.gin_cli import main
from fishjax import data, masks, models, patches, train
from fishjax.types import Mask


def run(
    *,
    out: str,
    problem: Problem,
    seeds: Sequence[int],
    workers: int,
    steps: int,
    batch_size: int,
    density: float,
    every: Sequence[int],
    mask_rates: Sequence[float],
    dense_rates: Sequence[float],
) -> dict[str, Any]:
    """Run all cells; write `results.json` and `report.md` to `out`.

    Args:
      workers: devices, each taking `steps` steps on `batch_size` examples.
      every: merge intervals H; 1 merges the gradients.
    """
    start, folder = time.monotonic(), Path(out)
    bench = fish_bench.make(problem, steps=steps, batch_size=batch_size)
    mesh = jax.make_mesh((workers,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    template = jax.eval_shape(problem.base, 0)
    _, unravel = ravel_pytree(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), template))
    flat = lambda tree: {"all": ravel_pytree(tree)[0]}  # one leaf, so that all masks have one program
    loss_fn = models.example_loss(problem.model)
    loss_of = lambda params, example: loss_fn(unravel(params["all"]), example)

    def patch_of(what: str, seed: int) -> tuple[Any, list[Mask] | None]:
        base = flat(problem.base(seed))
        if what == "dense":
            return patches.init_dense(base), None
        scores = flat(bench.scores(seed))
        if what == "disjoint masks":
            parts = masks.split(scores, workers, density=density)
            return patches.init_sparse(base, masks.union(*parts)), parts
        return patches.init_sparse(base, masks.topk(scores, density=density)), None

    def way(what: str, interval: int, wire: str) -> Any:
        def adam(rate: float) -> optax.GradientTransformation:
            scale = optax.inject_hyperparams(optax.scale)(step_size=rate)
            shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 10), steps)
            return optax.chain(
                optax.scale_by_adam(), optax.scale_by_schedule(lambda count: -shape(count)), scale
            )

        options: dict[str, Any] = {"steps": interval, "wire": wire}
        if interval == 1:
            step = jax.jit(train.make_parallel_step(loss_of, adam(1.0), mesh), donate_argnums=0)
        else:
            step = jax.jit(
                train.local_steps(loss_of, adam(1.0), optax.sgd(1.0), mesh, **options).step, donate_argnums=0
            )

        def cell(rate: float, seed: int) -> Cell:
            patch, parts = patch_of(what, seed)
            if interval == 1:
                state = train.init(patch, adam(rate))
            else:
                starts = train.local_steps(loss_of, adam(rate), optax.sgd(1.0), mesh, **options)
                state = starts.init(patch, parts)
            base = flat(problem.base(seed))
            rows, size = problem.rows["train"], workers * batch_size
            stream = data.batches(rows, size, seed=seed, epochs=None)
            for _ in range(steps // interval):
                group = [next(stream) for _ in range(interval)]
                state, loss = step(state, base, _by_worker(group, workers))
                # Steps that run ahead would take the threads that the other worker needs to meet them.
                jax.block_until_ready(loss)
            tuned = unravel(patches.apply(base, train.patch_of(state))["all"])
            one = patches.init_sparse(base, parts[0]) if parts else patch
            traffic = train.bytes_sent(one, wire=wire)
            sent = {"values": traffic.values * (steps // interval), "indices": traffic.indices}
            return fish_bench.measure(bench, tuned, patches.num_parameters(patch)) | {"sent": sent}

        return cell

    ways: dict[str, tuple[Any, Sequence[float]]] = {}
    for interval in every:
        for what, wire in (
            ("dense", "float"),
            ("same mask", "float"),
            ("disjoint masks", "float"),
            ("same mask", "int8"),
        ):
            if interval > 1 or (what != "disjoint masks" and wire == "float"):
                name = f"{what}{', int8' if wire == 'int8' else ''}, every {interval}"
                ways[name] = (way(what, interval, wire), dense_rates if what == "dense" else mask_rates)
    settings = {**bench.settings, "workers": workers, "density": density}
    found = {
        "settings": settings,
        "ways": fish_bench.study(folder, settings, ways, seeds),
        "seconds": round(time.monotonic() - start, 1),
    }
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "config.gin").write_text(gin.config_str())
    lines = fish_tables.workers(found, every, folder / "plots" / "workers")
    (folder / "report.md").write_text(lines)
    print(lines)
    return found


def _by_worker(group: Sequence[Any], workers: int) -> Any:
    """Lay batches `[workers * b, ...]` out as `[workers * H * b, ...]`, each worker's own part together."""

    def lay(*parts):
        stacked = jnp.stack([p.reshape(workers, -1, *p.shape[1:]) for p in map(jnp.asarray, parts)], 1)
        return stacked.reshape(-1, *stacked.shape[3:])

    return jax.tree.map(lay, *group)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)  # two workers on one machine
    main("fish_workers.run", (__doc__ or "").splitlines()[0])
