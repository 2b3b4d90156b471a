"""What the tests that merge files merge: small models with Fishers, and big ones."""

import jax
import numpy as np

from fishjax import checkpoint, tree

SHAPES = {"a.weight": (500, 700), "a.bias": (700,), "b.one": (1,), "b.scalar": (), "b.none": (0, 3)}


def params(seed, dtype=np.float32, scale=1.0):
    rng = np.random.default_rng(seed)
    flat = {n: (scale * rng.standard_normal(s)).astype(dtype) for n, s in SHAPES.items()}
    return tree.nest({n: np.asarray(x, dtype) for n, x in flat.items()} | {"ids": np.arange(5)})


def _add(a, b):
    return jax.tree.map(lambda x, y: x if x.dtype.kind == "i" else (x + y).astype(x.dtype), a, b)


def make(folder, dtype=np.float32):
    """Two models, their base, and Fishers: in memory, and as files in a folder."""
    base = params(0, dtype)
    models = [_add(base, params(i, dtype, 0.1)) for i in (1, 2)]
    fishers = [jax.tree.map(lambda x: abs(x).astype(np.float32), params(i)) for i in (3, 4, 5)]
    paths = {}
    for name, made in {
        "base": base,
        "m0": models[0],
        "m1": models[1],
        "f0": fishers[0],
        "f1": fishers[1],
        "f2": fishers[2],
    }.items():
        paths[name] = folder / f"{name}.safetensors"
        checkpoint.save_params(paths[name], made)
    return {"models": models, "base": base, "fishers": fishers[:2], "base_fisher": fishers[2]}, {
        "models": [paths["m0"], paths["m1"]],
        "base": paths["base"],
        "fishers": [paths["f0"], paths["f1"]],
        "base_fisher": paths["f2"],
    }


def write_big(path, seed, entries):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(1 << 20).astype(np.float32)
    checkpoint.save_params(
        path, {f"t{i}": np.roll(values, i).reshape(1024, 1024) for i in range(entries >> 20)}
    )
