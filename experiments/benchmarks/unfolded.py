"""Un-folded patches beside full fine-tuning and the bare model: FLOPs, steps, forward passes, mixed batches.

    python -m experiments.benchmarks.unfolded
    python -m experiments.benchmarks.unfolded --family llama --width 512 --layers 8 --length 128

FLOPs are those that the compiler counts in the compiled program. Times are medians of rounds in which the
programs take turns, so that whatever else the machine does falls on all of them. Weights, patches and data
are random. Remat recomputes each block in the backward pass.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fishjax import models, patches
from fishjax.models._model import subtree

RANK = 8
TARGETS = {"forward": 1.05, "step": 0.80, "mixed": 1.10, "flops": 0.70, "flops remat": 0.77}


def main() -> None:
    args = _arguments()
    model, params, batch = make(args)
    key = jax.random.key(0)
    ia3 = moved(patches.init_ia3(params, targets="paper"), 1)
    lora = moved(patches.init_lora(key, params, rank=RANK, targets="paper"), 2)
    made = {"(IA)^3": ia3, f"LoRA r={RANK}": lora}
    several = {n: patches.stack([moved(p, i) for i in range(args.batch)]) for n, p in made.items()}
    mixed_kinds = patches.stack([moved(ia3 if i % 2 else lora, i) for i in range(args.batch)])
    ids = np.arange(args.batch)

    rows: list[tuple[str, str, float, float | None]] = []  # what, of what, ratio, target
    for remat in (False, True):
        loss = partial(mean_loss, model, remat)
        full = flops(jax.value_and_grad(loss), params, batch)
        for name, patch in made.items():
            here = partial(lambda loss, patch: patches.unfolded(loss)(params, patch, batch), loss)
            what = "flops remat" if remat else "flops"
            rows.append(
                (f"gradient's {what}", name, flops(jax.value_and_grad(here), patch) / full, TARGETS[what])
            )

    forward = jax.jit(model.apply)
    unfolded = jax.jit(patches.unfolded(model.apply))
    calls: dict[str, Callable[[], Any]] = {"bare": lambda: forward(params, batch)}
    for name, patch in made.items():
        calls[name] = partial(unfolded, params, patch, batch)
        selected = patches.select(several[name], ids)
        calls[f"{args.batch} x {name}"] = partial(unfolded, params, selected, batch)
    calls[f"{args.batch} of both"] = partial(unfolded, params, patches.select(mixed_kinds, ids), batch)
    times = medians(calls, args.rounds)
    for name in made:
        rows.append(("forward / bare", name, times[name] / times["bare"], TARGETS["forward"]))
        mixed = times[f"{args.batch} x {name}"]
        rows.append((f"{args.batch} patches / one", name, mixed / times[name], TARGETS["mixed"]))
    both = times[f"{args.batch} of both"] / max(times[name] for name in made)
    rows.append((f"{args.batch} patches / one", "of both kinds", both, TARGETS["mixed"]))

    loss = partial(mean_loss, model, args.remat)
    steps = {"full": step(loss, params, batch)}
    for name, patch in made.items():
        steps[name] = step(lambda patch, batch: patches.unfolded(loss)(params, patch, batch), patch, batch)
    step_times = medians(steps, args.rounds)
    for name in made:
        rows.append(("training step / full", name, step_times[name] / step_times["full"], TARGETS["step"]))

    count = sum(x.size for x in jax.tree.leaves(params))
    shape = f"batch {args.batch} x {args.length}"
    print(f"{args.family}, {count:,} parameters, {shape}, {jax.devices()[0].device_kind}")
    print("\n| ratio | patch | measured | wanted at most |\n|---|---|---|---|")
    for what, name, ratio, target in rows:
        print(f"| {what} | {name} | {ratio:.3f} | {target} |")
    print(json.dumps({"forward_ms": _ms(times), "step_ms": _ms(step_times)}))


def make(args: argparse.Namespace) -> tuple[models.Model, Any, dict[str, jax.Array]]:
    """Return a random model of a family and a batch for it."""
    width, layers, heads = args.width, args.layers, args.width // 64
    config: dict[str, Any] = {"model_type": args.family, "vocab_size": args.vocabulary}
    if args.family == "t5":
        config |= {"d_model": width, "d_kv": 64, "d_ff": 4 * width, "num_layers": layers, "num_heads": heads}
        config |= {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "pad_token_id": 0}
    else:
        config |= {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        config |= {"num_attention_heads": heads, "num_key_value_heads": heads, "rms_norm_eps": 1e-6}
    model = models.build(config)
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    shape = (args.batch, args.length)
    batch = {
        n: jnp.asarray(rng.integers(1, args.vocabulary, shape), jnp.int32) for n in ("input_ids", "labels")
    }
    return model, params, batch


def mean_loss(model: models.Model, remat: bool, params: Any, batch: Any) -> jax.Array:
    """Return the mean negative log-likelihood of the labels, nats."""
    if remat:
        carry = model.embed(params, batch)
        for name in model.blocks:
            carry = jax.checkpoint(partial(model.block, name))(subtree(params, name), carry)
        logits = model.head(params, carry)
    else:
        logits = model.apply(params, batch)
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, batch["labels"][..., None], axis=-1).mean()


def moved(patch: Any, seed: int) -> Any:
    """Return the patch with its numbers moved."""
    leaves, structure = jax.tree.flatten(patch)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [x + 0.1 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def flops(fn: Callable[..., Any], *args: Any) -> float:
    """Return the floating-point operations of a compiled program."""
    analysis: Any = jax.jit(fn).lower(*args).compile().cost_analysis()
    return analysis["flops"]


def step(loss: Callable[..., jax.Array], start: Any, batch: Any) -> Callable[[], Any]:
    """Return a call that takes one step of Adam on what `loss` is a function of, each time from the last."""
    optimizer = optax.adam(1e-4)

    @partial(jax.jit, donate_argnums=(0, 1))
    def advance(values: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss)(values, batch), state)
        return optax.apply_updates(values, updates), state

    values = jax.tree.map(jnp.copy, start)
    held = [values, optimizer.init(values)]

    def run() -> Any:
        held[:] = advance(*held, batch)
        return held

    return run


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median time of each call, seconds; the calls take turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())  # compile
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(x) for name, x in taken.items()}


def _ms(times: dict[str, float]) -> dict[str, float]:
    return {name: round(1e3 * t, 2) for name, t in times.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=("t5", "llama"), default="t5")
    parser.add_argument("--width", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=64, help="tokens of an example")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--remat", action="store_true", help="of the timed steps too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
