"""A FISH training step of a BERT-base, Adam, 0.5 % of each leaf: ways to take it, in time and memory.

    python -m experiments.benchmarks.fish_step --rounds 5        # 10 minutes, 3 GB; --layers 2 for a look

Each way runs in a process of its own, the ways taking turns. Memory is what XLA says of the compiled
programs: arguments, results that are not given away, and temporaries; the largest program counts. `update`
is timed alone too, on gradients that are there.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

WAYS = (
    "dense",
    "masked dense",
    "value gradients",
    "in place",
    "two programs",
    "dense update",
    "masked update",
    "sparse update",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=30522)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="timed in each process, after one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker, args)))
        return
    sizes = [f"--{k}={getattr(args, k)}" for k in ("layers", "vocab", "batch", "tokens", "steps")]
    command = [sys.executable, "-m", "experiments.benchmarks.fish_step", *sizes, "--worker"]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in args.ways}
    for _ in range(args.rounds):
        for way in args.ways:
            done = subprocess.run([*command, way], check=True, capture_output=True, text=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {w: statistics.median(r["seconds"] for r in rs) for w, rs in found.items()}
    print(
        "| way | step s | / dense | total MB | / masked dense | temporaries MB | optimiser MB | compile s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for way, rs in found.items():
        against = "dense update" if "update" in way else "dense"
        total = (
            rs[0]["total"] / found["masked dense"][0]["total"] if "masked dense" in found else float("nan")
        )
        ratio = seconds[way] / seconds.get(against, float("nan"))
        compile_s = statistics.median(r["compile"] for r in rs)
        print(
            f"| {way} | {seconds[way]:.3f} | {ratio:.2f} | {rs[0]['total'] / 2**20:.0f} | {total:.2f} "
            f"| {rs[0]['temp'] / 2**20:.0f} | {rs[0]['optimizer'] / 2**20:.1f} | {compile_s:.1f} |"
        )


def measure(way: str, args: argparse.Namespace) -> dict[str, float]:
    """Compile and time one way in this process."""
    import jax
    import jax.numpy as jnp
    import optax

    from fishjax import masks, models, patches, train, tree
    from fishjax.train._step import advance

    model = models.build(
        {"model_type": "bert", "vocab_size": args.vocab, "hidden_size": 768, "num_hidden_layers": args.layers,
         "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512,
         "type_vocab_size": 2, "num_labels": 3, "architectures": ["BertForSequenceClassification"]}
    )  # fmt: skip
    params = jax.jit(model.init)(jax.random.key(0))
    loss_fn, optimizer = models.example_loss(model), optax.adam(1e-4)
    ids = jax.random.randint(jax.random.key(1), (args.batch, args.tokens), 0, args.vocab)
    batch = {"input_ids": ids, "labels": jnp.arange(args.batch) % 3}
    mask = masks.random(jax.random.key(2), params, density=0.005, scope="leaf", minimum=1)
    mean = lambda p, b: jax.vmap(loss_fn, (None, 0))(p, b).mean()

    def dense_update(grads, params, opt_state):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def masked_update(grads, params, opt_state, mask):
        keep = lambda tree_: jax.tree.map(jnp.multiply, tree_, mask)
        updates, opt_state = optimizer.update(keep(grads), opt_state, params)
        return optax.apply_updates(params, keep(updates)), opt_state

    def dense(params, opt_state, batch):
        value, grads = jax.value_and_grad(mean)(params, batch)
        return *dense_update(grads, params, opt_state), value

    def masked(params, opt_state, mask, batch):
        value, grads = jax.value_and_grad(mean)(params, batch)
        return *masked_update(grads, params, opt_state, mask), value

    def gather(params, fixed, batch):
        value, grads = jax.value_and_grad(mean)(params, batch)
        flat = tree.flatten(grads)
        return {n: patches.Sparse(None, flat[n].reshape(-1)[k.indices]) for n, k in fixed.items()}, value

    def sparse_update(grads, state, params):
        state = advance(state, grads, optimizer)
        return state, patches.apply(params, train.patch_of(state))

    floats = lambda: jax.tree.map(lambda m: m.astype(jnp.float32), mask)
    start = lambda: train.init(patches.init_sparse(params, mask), optimizer)
    ones = lambda t: jax.tree.map(jnp.ones_like, t)
    # Of each way: programs as (function, donated), and how a step carries arguments on to the next one.
    if way in ("dense", "masked dense"):
        extra = (floats(),) if way == "masked dense" else ()
        programs = [(masked if extra else dense, (0, 1))]
        carried: tuple[Any, ...] = (params, optimizer.init(params))
        run = lambda ps, c: ps[0](*c, *extra, batch)[:2]
        shown = lambda c: [(*c, *extra, batch)]
        moments: Any = carried[1]
    elif way in ("dense update", "masked update"):
        extra = (floats(),) if way == "masked update" else ()
        grads = ones(params)
        programs = [(masked_update if extra else dense_update, (1, 2))]
        carried = (params, optimizer.init(params))
        run = lambda ps, c: ps[0](grads, *c, *extra)
        shown = lambda c: [(grads, *c, *extra)]
        moments = carried[1]
    elif way == "sparse update":
        carried = (start(), params)
        grads = ones(carried[0].trainable)
        programs = [(sparse_update, (1, 2))]
        run = lambda ps, c: ps[0](grads, *c)
        shown = lambda c: [(grads, *c)]
        moments = carried[0].opt_state
    elif way == "value gradients":
        carried, base = (start(),), params
        programs = [(train.make_step(loss_fn, optimizer), (0,))]
        run = lambda ps, c: (ps[0](*c, base, batch)[0],)
        shown = lambda c: [(*c, base, batch)]
        moments = carried[0].opt_state
    elif way == "in place":
        carried = (start(), params)
        programs = [(train.make_in_place_step(loss_fn, optimizer), (0, 1))]
        run = lambda ps, c: ps[0](*c, batch)[:2]
        shown = lambda c: [(*c, batch)]
        moments = carried[0].opt_state
    else:
        carried = (start(), params)
        programs = [(gather, ()), (sparse_update, (1, 2))]

        def run(ps, c):
            grads, _ = ps[0](c[1], c[0].fixed, batch)
            return ps[1](grads, *c)

        shown = lambda c: [(c[1], c[0].fixed, batch), (ones(c[0].trainable), *c)]
        moments = carried[0].opt_state
    begun = time.perf_counter()
    compiled: list[Callable[..., Any]] = [
        jax.jit(f, donate_argnums=d).lower(*a).compile()
        for (f, d), a in zip(programs, shown(carried), strict=True)
    ]
    compiling = time.perf_counter() - begun
    usage = [c.memory_analysis() for c in compiled]
    total = lambda m: (
        m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    )
    optimizer_bytes = sum(x.nbytes for x in jax.tree.leaves(moments))
    carried = jax.block_until_ready(run(compiled, carried))
    taken = []
    for _ in range(args.steps):
        begun = time.perf_counter()
        carried = jax.block_until_ready(run(compiled, carried))
        taken.append(time.perf_counter() - begun)
    return {
        "seconds": statistics.median(taken),
        "compile": compiling,
        "total": max(map(total, usage)),
        "temp": max(m.temp_size_in_bytes for m in usage),
        "optimizer": optimizer_bytes,
    }


if __name__ == "__main__":
    main()
