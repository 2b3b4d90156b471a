"""Shuffled batches of arrays in memory, the same for the same seed."""

from collections.abc import Iterator

import numpy as np

from fishjax.errors import UsageError
from fishjax.types import Batch


def batches(
    data: Batch, batch_size: int, *, seed: int | None = None, epochs: int | None = 1
) -> Iterator[Batch]:
    """Yield batches of a dict of arrays.

    Args:
      data: `{field: [n, ...]}`.
      batch_size: B, in [1, n].
      seed: shuffle each epoch anew by this seed; None keeps the order, and the last, smaller batch.
      epochs: how often the data are passed; None is endless. A shuffled epoch drops the last batch if
        it would be smaller.

    >>> [b["x"].tolist() for b in batches({"x": np.arange(5)}, 2)]
    [[0, 1], [2, 3], [4]]
    """
    size = examples(data)
    if not 1 <= batch_size <= size:
        raise UsageError(f"`batch_size` must lie in [1, {size}], the number of examples; got {batch_size}")
    epoch = 0
    while epochs is None or epoch < epochs:
        order = np.arange(size) if seed is None else np.random.default_rng([seed, epoch]).permutation(size)
        end = size if seed is None else size - size % batch_size
        for start in range(0, end, batch_size):
            yield {k: v[order[start : start + batch_size]] for k, v in data.items()}
        epoch += 1


def examples(data: Batch) -> int:
    """Return the number of examples of a dict of arrays.

    Raises:
      UsageError: there are none, or the fields disagree.

    >>> examples({"x": np.ones((3, 2)), "label": np.ones(3)})
    3
    """
    sizes = {k: len(v) for k, v in data.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise UsageError(
            f"all fields of the data must have the same, positive number of examples; got {sizes}"
        )
    return next(iter(sizes.values()))


def concatenate(*parts: Batch) -> Batch:
    """Join data sets of the same fields.

    >>> concatenate({"x": np.zeros(2)}, {"x": np.ones(1)})["x"].tolist()
    [0.0, 0.0, 1.0]
    """
    if len({frozenset(p) for p in parts}) != 1:
        raise UsageError(f"all data sets must have the same fields; got {[sorted(p) for p in parts]}")
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
