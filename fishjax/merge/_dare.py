"""DARE: of each model's changes a random part is dropped and the rest scaled up to make up for it."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from fishjax.merge._rule import (
    Block,
    Options,
    Rule,
    choice,
    deltas,
    magnitude,
    only,
    scaled,
    whole_number,
)
from fishjax.merge._task import check_sum, combined, moved
from fishjax.merge._ties import check_density
from fishjax.merge._trees import Keep, merge_trees
from fishjax.types import Array, Params


def dare(
    models: Sequence[Params],
    *,
    base: Params,
    density: float | Sequence[float],
    weights: Any = None,
    scale: float = 1.0,
    rescale: str | None = "paper",
    elect: bool = False,
    normalize: bool = False,
    seed: int = 0,
    keep: Keep | None = None,
) -> Params:
    """Return the base plus a random part of each model's changes, scaled up.

    Whether an entry is dropped is a hash of the seed, the leaf's name, the model's number and the
    entry's position: the same in every engine, however the work is cut.

    Args:
      models: trees with the same names, shapes and dtypes; integer leaves must be equal.
      base: the tree that all models started from.
      density: probability of being kept, (0, 1], one for all or one a model (1 - p in the paper).
      weights: one finite number a model, 1 each by default.
      scale: what the sum is multiplied with.
      rescale: "paper" divides the kept changes by the density; "l1" restores the sum of their
        magnitudes leaf by leaf, as mergekit does; None leaves them.
      elect: take only the changes whose sign is that of the sum, as `ties` does (weights >= 0 then).
      normalize: divide by the sum of the weights; with `elect`, of those who agree.
      seed: any integer.
      keep: ordered `(regex of a leaf's name, i)`: leaves taken whole from model i, see `average`.

    Raises:
      StructureError: models or base differ in names or shapes.
      UsageError: wrong density, weights, scale or rescale.

    >>> import numpy as np
    >>> merged = dare([{"w": np.ones(8, np.float32)}], base={"w": np.zeros(8, np.float32)}, density=0.5)
    >>> sorted(set(merged["w"].tolist()))
    [0.0, 2.0]

    References: Yu et al., "Language models are super Mario", arXiv 2311.03099, section 3.2.
    """
    options = {"density": density, "weights": weights, "scale": scale, "rescale": rescale}
    options |= {"elect": elect, "normalize": normalize, "seed": seed}
    return merge_trees(DARE, models, base=base, keep=keep, **options)


def random_bits(positions: Array, *key: Any) -> Array:
    """Return 32 uniform bits for every position, a function of position and key alone.

    Two rounds of a multiply-and-shift hash whose constants were searched for the least bias
    (Wellons, "hash-prospector": lowbias32).
    """
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    first, second = (np.uint32(int.from_bytes(digest[i : i + 4], "little")) for i in (0, 4))
    low, high = positions.astype(np.uint32), np.uint32(0)
    if positions.dtype.itemsize == 8:
        low, high = (positions & 0xFFFFFFFF).astype(np.uint32), (positions >> 32).astype(np.uint32)
    with np.errstate(over="ignore"):
        return _mix(_mix(low ^ first) + (high ^ second))


def _mix(x: Array) -> Array:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _check(
    n: int,
    *,
    density: Any,
    weights: Any,
    scale: float,
    rescale: str | None,
    elect: bool,
    normalize: bool,
    seed: int,
) -> Options:
    return {
        "density": check_density(density, n),
        **check_sum(n, weights, scale, elect=elect, normalize=normalize),
        "rescale": choice("rescale", rescale, ("paper", "l1", None)),
        "seed": whole_number("seed", seed),
    }


def _kept(block: Block, density: Sequence[float], seed: int) -> list[Array]:
    """Return each model's changes, zero where they are dropped."""
    return [
        d if p == 1 else only(d, random_bits(block.positions, seed, block.name, i) < np.uint32(p * 2**32))
        for i, (d, p) in enumerate(zip(deltas(block), density, strict=True))
    ]


def _magnitudes(
    block: Block, *, density: Sequence[float], rescale: str | None, seed: int, **_: Any
) -> list[Array]:
    if rescale != "l1":
        return []
    return [magnitude(d) for d in [*deltas(block), *_kept(block, density, seed)]]


def _leaf(
    block: Block,
    *,
    density: Sequence[float],
    weights: Sequence[Any],
    scale: Any,
    rescale: str | None,
    elect: bool,
    normalize: bool,
    seed: int,
) -> Array:
    kept = _kept(block, density, seed)
    if rescale == "paper":
        kept = [scaled(d, 1 / p) for p, d in zip(density, kept, strict=True)]
    elif rescale == "l1":
        n = len(kept)
        kept = [_restored(d, block.measured[i], block.measured[n + i]) for i, d in enumerate(kept)]
    return moved(block, scale, combined(kept, weights, elect=elect, normalize=normalize))


def _restored(kept: Array, before: Any, after: Any) -> Array:
    if isinstance(after, float):
        return scaled(kept, before / after if after else 1.0)
    xp = kept.__array_namespace__()
    return scaled(kept, xp.where(after > 0, before / xp.where(after > 0, after, 1), 1))


DARE = Rule(_leaf, _check, needs_base=True, sums=_magnitudes, random=True)
