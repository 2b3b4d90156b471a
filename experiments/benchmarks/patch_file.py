"""A patch of 0.5 % of a BERT-base-shaped model: bytes of its file, and times to write, read and apply it.

    python -m experiments.benchmarks.patch_file --rounds 5       # a minute, 3 GB

Masks: a uniform one, and one of scores that cluster as a Fisher does (products of row and column energies);
with `--fisher FILE` that of a Fisher file. The limit is log2 C(n, k) / 8 bytes. Applying is timed in memory
beside copying the model: numpy in place, and jax's scatter into donated parameters.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishjax import checkpoint, masks, patches, tree


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--density", type=float, default=0.005)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fisher", help="a Fisher file whose mask is measured too")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    base = {n: rng.standard_normal(s, np.float32) for n, s in shapes(args.layers).items()}
    scores: dict[str, Any] = {
        "uniform": {n: rng.random(x.shape, np.float32) for n, x in base.items()},
        "clustered": {n: energies(rng, x.shape) for n, x in base.items()},
    }
    if args.fisher:
        scores["Fisher file"] = checkpoint.load_fisher(args.fisher)[0]
    print("| mask | kept | indices B | / limit | gaps, Rice | file B | bf16 B | int8 B | write s | read s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, score in scores.items():
        flat = (
            base
            if name != "Fisher file"
            else {n: np.ones(x.shape, np.float32) for n, x in tree.flatten(score).items()}
        )
        kept = masks.indices(score, density=args.density)
        patch = {n: patches.Sparse(w.astype(np.int32), moved(rng, flat[n], w)) for n, w in kept.items()}
        row(name, flat, patch, args.rounds)
    kept = masks.indices(scores["uniform"], density=args.density)
    apply(
        {n: patches.Sparse(w.astype(np.int32), moved(rng, base[n], w)) for n, w in kept.items()},
        base,
        args.rounds,
    )


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of BERT-base, by name."""
    found: dict[str, tuple[int, ...]] = {"embed": (30522, 768), "place": (512, 768), "type": (2, 768)}
    for i in range(layers):
        for name in ("q", "k", "v", "o"):
            found |= {f"{i:02d}.{name}.w": (768, 768), f"{i:02d}.{name}.b": (768,)}
        found |= {f"{i:02d}.up.w": (3072, 768), f"{i:02d}.up.b": (3072,), f"{i:02d}.down.w": (768, 3072)}
        found |= {f"{i:02d}.{name}": (768,) for name in ("down.b", "n1.w", "n1.b", "n2.w", "n2.b")}
    return found | {"norm.w": (768,), "norm.b": (768,), "pool.w": (768, 768), "pool.b": (768,)}


def energies(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return squares of normal numbers times heavy-tailed energies of rows and columns."""
    found = rng.standard_normal(shape, np.float32) ** 2
    for axis in range(len(shape)):
        one = [1] * len(shape)
        one[axis] = shape[axis]
        found *= np.exp(2 * rng.standard_normal(one, np.float32))
    return found


def moved(rng: np.random.Generator, leaf: np.ndarray, where: np.ndarray) -> np.ndarray:
    return leaf.reshape(-1)[where] + rng.standard_normal(where.size, np.float32) / 100


def row(name: str, base: dict[str, np.ndarray], patch: dict[str, Any], rounds: int) -> None:
    n, k = sum(x.size for x in base.values()), sum(p.values.size for p in patch.values())
    limit = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2) / 8
    with tempfile.TemporaryDirectory() as top:
        path = Path(top, "patch")
        write = median(lambda: checkpoint.save_patch(path, patch, base=base), rounds)
        read = median(lambda: checkpoint.read_patch(path), rounds)
        size = path.stat().st_size
        report = checkpoint.inspect(path)
        coded = sum(t["bytes"] for t in report["tensors"] if t["name"].endswith("::indices"))
        gaps = sum(note(path, leaf) == "gaps" for leaf in patch)
        short = []
        for mode in ("bf16", "int8"):
            checkpoint.save_patch(path, patch, base=base, lossy=mode)
            short.append(path.stat().st_size)
    print(
        f"| {name} | {k:,} | {coded:,} | {coded / limit:.3f} | {gaps}, {len(patch) - gaps} | {size:,} "
        f"| {short[0]:,} | {short[1]:,} | {write:.2f} | {read:.3f} |"
    )


def note(path: Path, leaf: str) -> str:
    from fishjax.checkpoint._manifest import read_sealed

    return read_sealed(path).manifest["changes"][leaf]["indices"]["encoding"]


def apply(patch: dict[str, Any], base: dict[str, np.ndarray], rounds: int) -> None:
    """Print how long it takes to apply a patch in memory, beside a copy of the model."""
    spare = {n: np.empty_like(x) for n, x in base.items()}
    copy = median(lambda: [np.copyto(spare[n], x) for n, x in base.items()], rounds)

    def in_place():
        for name, kind in patch.items():
            spare[name].reshape(-1)[kind.indices] = kind.values

    numpy_s = median(in_place, rounds)
    held = [jax.tree.map(jnp.asarray, spare)]
    on_device = jax.tree.map(jnp.asarray, patch)
    donated = jax.jit(patches.apply, donate_argnums=0)
    held[0] = jax.block_until_ready(donated(held[0], on_device))

    def scatter():
        held[0] = jax.block_until_ready(donated(held[0], on_device))

    jax_s = median(scatter, rounds)
    print(f"\ncopy of the model {copy * 1e3:.1f} ms, and to apply the patch:")
    print(f"numpy in place {numpy_s * 1e3:.1f} ms ({numpy_s / copy:.2f} of the copy)")
    print(f"jax, donated {jax_s * 1e3:.1f} ms ({jax_s / copy:.2f})")


def median(run: Callable[[], object], rounds: int) -> float:
    run()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
