"""What a FISH mask has to beat: masks by chance, size, gradient, movement and name."""

from collections.abc import Sequence

from fishjax import tree
from fishjax.masks._topk import Patterns, topk
from fishjax.types import Array, Mask, Params


def random(key: Array, params: Params, **rules) -> Mask:
    """Keep entries drawn uniformly; `rules` (`density` or `rank`, ...) as in `topk`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> int(random(jax.random.key(0), {"w": jnp.ones(100)}, density=0.1)["w"].sum())
    10
    """
    import jax
    import jax.numpy as jnp

    flat = tree.flatten(params)
    keys = dict(zip(flat, jax.random.split(key, max(1, len(flat)))))
    draw = jax.jit(jax.random.bits, static_argnames=("shape", "dtype"))  # one program a shape, not eight
    bits = {n: draw(keys[n], shape=x.shape, dtype=jnp.uint32) for n, x in flat.items()}
    return topk(tree.rebuild(params, bits), **rules)


def magnitude(params: Params, **rules) -> Mask:
    """Keep the entries of largest absolute value; `rules` as in `topk`.

    >>> import jax.numpy as jnp
    >>> magnitude({"w": jnp.array([-3.0, 1.0])}, density=0.5)["w"]
    Array([ True, False], dtype=bool)
    """
    import jax
    import jax.numpy as jnp

    return topk(jax.tree.map(jnp.abs, params), **rules)


def by_name(params: Params, patterns: str | Sequence[str]) -> Mask:
    """Keep whole leaves by regexes of their names (`"bias$"` is BitFit, arXiv 2106.10199).

    >>> import jax.numpy as jnp
    >>> by_name({"bias": jnp.ones(2), "kernel": jnp.ones(2)}, "bias")["bias"]
    Array([ True,  True], dtype=bool)
    """
    import jax.numpy as jnp

    chosen = tree.select(patterns, tree.names(params))
    return tree.map_named(lambda n, x: jnp.full(x.shape, n in chosen), params)


def bitfit(params: Params, *, always: Patterns = None) -> Mask:
    """Keep all biases, and whole leaves named by `always` (a new head): BitFit, arXiv 2106.10199.

    Raises:
      UsageError: nothing is called a bias (T5 has none).

    >>> import jax.numpy as jnp
    >>> bitfit({"bias": jnp.ones(2), "kernel": jnp.ones(2)})["kernel"]
    Array([False, False], dtype=bool)
    """
    more = [always] if isinstance(always, str) else list(always or ())
    return by_name(params, [r"(^|[._])(bias|beta)$", *more])


def saliency(params: Params, gradient: Params, **rules) -> Mask:
    """Keep the entries of largest |gradient x weight|: first-order saliency, as in SNIP (arXiv 1810.02340).

    Args:
      params: `[*p]`.
      gradient: of the mean loss, like `params`.
      rules: `density` or `rank`, ..., as in `topk`.

    >>> import jax.numpy as jnp
    >>> saliency({"w": jnp.array([1.0, 4.0])}, {"w": jnp.array([-3.0, 0.5])}, density=0.5)["w"]
    Array([ True, False], dtype=bool)
    """
    return topk(_entrywise(lambda w, g: w * g, params, gradient, ("params", "gradient")), **rules)


def movement(base: Params, tuned: Params, **rules) -> Mask:
    """Keep the entries that a dense training moved furthest, |tuned - base|; `rules` as in `topk`.

    The deviation mask of Sung et al. 2021, arXiv 2111.09839; it knows the future, so it is no baseline
    for choosing before training, but for how much a choice can gain.

    >>> import jax.numpy as jnp
    >>> movement({"w": jnp.zeros(2)}, {"w": jnp.array([-3.0, 0.5])}, density=0.5)["w"]
    Array([ True, False], dtype=bool)
    """
    return topk(_entrywise(lambda a, b: b - a, base, tuned, ("base", "tuned")), **rules)


def _entrywise(fn, a: Params, b: Params, what: tuple[str, str]) -> Params:
    """Return |fn(a, b)| in max(float32, dtype), so that no difference is rounded away."""
    import jax
    import jax.numpy as jnp

    tree.check_same(a, b, what, dtypes=False)
    wide = lambda x: jnp.asarray(x).astype(tree.wide_dtype(x.dtype))
    return jax.tree.map(lambda x, y: jnp.abs(fn(wide(x), wide(y))), a, b)
