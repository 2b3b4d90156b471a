"""Weights in eight and four bits beside float32: time, stored bytes, and bytes held with temporaries.

    python -m experiments.benchmarks.quantised --width 2048 --layers 6 --rounds 30

Layers of one `[2 width, width]` weight and one back, random and not trained, at 1 row and at `--rows`. The
formats take turns within each round; medians and minima. Memory is XLA's own account of the program:
arguments and temporaries.
"""

import argparse
import statistics
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()

    import jax
    import jax.numpy as jnp
    import numpy as np

    from fishjax import leaves

    rng, d = np.random.default_rng(0), args.width
    made = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32) * d**-0.5)
    weights = {f"{i}": {"up": made(2 * d, d), "down": made(d, 2 * d)} for i in range(args.layers)}

    def apply(params, x):
        for layer in params.values():
            x = x + jnp.tanh(x @ layer["up"].T) @ layer["down"].T
        return x

    trees = {"float32": weights} | {to: leaves.quantise(weights, [("", to)]) for to in leaves.FORMATS}
    full = sum(x.nbytes for x in jax.tree.leaves(weights))
    print("| rows | format | ms median (min) | of float32 | stored | held with temporaries |")
    print("|---|---|---|---|---|---|")
    for rows in (1, args.rows):
        x = made(rows, d)
        programs = {
            to: jax.jit(leaves.interpret(apply)).lower(params, x).compile() for to, params in trees.items()
        }
        times: dict[str, list[float]] = {to: [] for to in trees}
        for _ in range(args.rounds + 1):
            for to, program in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(trees[to], x))
                times[to].append(time.perf_counter() - start)
        middle = {to: statistics.median(seconds[1:]) for to, seconds in times.items()}
        for to, program in programs.items():
            memory = program.memory_analysis()
            stored = sum(x.nbytes for x in jax.tree.leaves(trees[to])) / full
            held = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / full
            print(
                f"| {rows} | {to} | {middle[to] * 1e3:.2f} ({min(times[to]) * 1e3:.2f}) "
                f"| {middle[to] / middle['float32']:.2f} | {stored:.3f} | {held:.3f} |"
            )


if __name__ == "__main__":
    main()
