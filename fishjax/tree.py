"""Names of leaves, ordered rules over those names, and one check that two trees fit.

A leaf's name is its path joined by ".": `{"encoder": {"weight": w}}` has the leaf `encoder.weight`.
Nested dicts with string keys need no jax here; any other pytree (`nnx.State`, tuples, ...) goes
through `jax.tree_util`. Leaves come in the order of `jax.tree.leaves`.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from fishjax.errors import StructureError, UsageError

T = TypeVar("T")
Rules = Sequence[tuple[str, T]]


def flatten(tree: Any) -> dict[str, Any]:
    """Return `{name: leaf}` of a pytree, in the order of `jax.tree.leaves`.

    Raises:
      StructureError: two leaves have the same name.

    >>> flatten({"b": {"x": 1}, "a": 2})
    {'a': 2, 'b.x': 1}
    """
    named = list(_walk(tree, ())) if _is_plain(tree) else _walk_with_jax(tree)
    flat = dict(named)
    if len(flat) != len(named):
        seen: set[str] = set()
        twice = sorted({n for n, _ in named if n in seen or seen.add(n)})  # type: ignore[func-returns-value]
        raise StructureError(f"leaf names must be unique; got {_some(twice)} more than once")
    return flat


def names(tree: Any) -> list[str]:
    """Return the names of a pytree's leaves, in the order of `jax.tree.leaves`.

    >>> names({"b": {"x": 1}, "a": 2})
    ['a', 'b.x']
    """
    return list(flatten(tree))


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dict whose leaves have the given dotted names; the inverse of `flatten`.

    Raises:
      StructureError: a name is both a leaf and a branch, or has an empty part.

    >>> nest({"a": 2, "b.x": 1})
    {'a': 2, 'b': {'x': 1}}
    """
    root: dict[str, Any] = {}
    for name, leaf in flat.items():
        *branch, last = name.split(".")
        if not all([*branch, last]):
            raise StructureError(f"a leaf's name must not have empty parts; got `{name}`")
        node = root
        for part in branch:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise StructureError(f"`{name}` lies below a leaf; a name is a leaf or a branch, not both")
        if last in node:
            raise StructureError(f"`{name}` is both a leaf and a branch")
        node[last] = leaf
    return root


def rebuild(like: Any, flat: Mapping[str, Any]) -> Any:
    """Return a tree of the structure of `like` with the leaves of `flat`, by name.

    >>> rebuild({"b": {"x": 0}, "a": 0}, {"a": 2, "b.x": 1})
    {'b': {'x': 1}, 'a': 2}
    """
    if _is_plain(like):
        return _rebuild_plain(like, flat, ())
    import jax

    return jax.tree.unflatten(jax.tree.structure(like), [flat[n] for n in names(like)])


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Return `fn(name, leaf, *leaves of rest)` for every leaf, in the structure of `tree`.

    Raises:
      StructureError: a tree of `rest` has other names.

    >>> map_named(lambda name, x: f"{name}={x}", {"a": {"b": 1}})
    {'a': {'b': 'a.b=1'}}
    """
    flat, others = flatten(tree), [flatten(r) for r in rest]
    for i, other in enumerate(others):
        check_names(flat, other, ("the first tree", f"tree {i + 2}"))
    return rebuild(tree, {n: fn(n, x, *(o[n] for o in others)) for n, x in flat.items()})


def match(rules: Rules[T], leaf_names: Iterable[str]) -> dict[str, T]:
    """Return `{name: value}` by ordered rules: `re.search` on the name, the first match wins.

    Args:
      rules: `(regex, value)` pairs.
      leaf_names: the names to match; a name that no rule matches is left out.

    Raises:
      UsageError: a rule that matches no name at all, with near names; or an invalid regex.

    >>> match([("bias$", 0), ("", 1)], ["a.bias", "a.kernel"])
    {'a.bias': 0, 'a.kernel': 1}
    """
    leaf_names = list(leaf_names)
    found: dict[str, T] = {}
    for pattern, value in rules:
        try:
            hits = [n for n in leaf_names if re.search(pattern, n)]
        except re.error as error:
            raise UsageError(f"rule `{pattern}` is not a regular expression: {error}") from None
        if not hits:
            raise UsageError(f"rule `{pattern}` matches no leaf; {_near(pattern, leaf_names)}")
        for name in hits:
            found.setdefault(name, value)
    return {n: found[n] for n in leaf_names if n in found}


def select(patterns: str | Sequence[str], leaf_names: Iterable[str]) -> set[str]:
    """Return the names that any of the regexes matches; each must match at least one.

    >>> sorted(select("kernel$", ["a.bias", "a.kernel", "b.kernel"]))
    ['a.kernel', 'b.kernel']
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    leaf_names = list(leaf_names)
    return {n for p in patterns for n in match([(p, True)], leaf_names)}


def partition(tree: Any, keep: Callable[[Any], bool]) -> tuple[Any, Any]:
    """Split a pytree into the leaves that `keep` admits and the rest, None standing for the others.

    >>> partition({"a": 1.5, "b": 2}, lambda x: isinstance(x, float))
    ({'a': 1.5, 'b': None}, {'a': None, 'b': 2})
    """
    import jax

    kept = jax.tree.map(lambda x: x if keep(x) else None, tree)
    rest = jax.tree.map(lambda x: None if keep(x) else x, tree)
    return kept, rest


def combine(first: Any, second: Any) -> Any:
    """Undo `partition`: every leaf that is None in `first` comes from `second`.

    >>> combine({'a': 1.5, 'b': None}, {'a': None, 'b': 2})
    {'a': 1.5, 'b': 2}
    """
    import jax

    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None)


def is_inexact(leaf: Any) -> bool:
    """Say whether a leaf is of a floating or complex dtype (bfloat16 and float8 included).

    >>> import numpy as np
    >>> is_inexact(np.ones(2)), is_inexact(np.arange(2))
    (True, False)
    """
    import jax.numpy as jnp

    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def wide_dtype(dtype: Any) -> Any:
    """Return max(float32, dtype), in which sums are accumulated and small changes kept.

    >>> import ml_dtypes
    >>> wide_dtype(ml_dtypes.bfloat16), wide_dtype("float64")
    (dtype('float32'), dtype('float64'))
    """
    import numpy as np

    return np.result_type(dtype, np.float32)


def check_names(a: Any, b: Any, what: tuple[str, str]) -> None:
    """Raise unless two trees (or mappings by name) have the same leaf names; both sides are shown."""
    left, right = set(flatten(a)), set(flatten(b))
    if left != right:
        raise StructureError(
            f"{what[0]} and {what[1]} must have the same leaves; "
            f"only in {what[0]}: {_some(sorted(left - right))}; "
            f"only in {what[1]}: {_some(sorted(right - left))}"
        )


def check_same(a: Any, b: Any, what: tuple[str, str], *, dtypes: bool = True) -> None:
    """Raise unless two trees have the same leaf names, shapes and (if asked) dtypes.

    Args:
      what: what to call the two trees in the message.

    Raises:
      StructureError: naming what differs on both sides.

    >>> import numpy as np
    >>> check_same({"w": np.ones(2)}, {"w": np.ones(3)}, ("base", "tuned"))
    Traceback (most recent call last):
        ...
    fishjax.errors.StructureError: base and tuned must fit; `w` is float64[2] in base and float64[3] in tuned
    """
    check_names(a, b, what)
    left, right = flatten(a), flatten(b)
    odd = [
        f"`{n}` is {describe(x)} in {what[0]} and {describe(right[n])} in {what[1]}"
        for n, x in left.items()
        if tuple(x.shape) != tuple(right[n].shape) or (dtypes and x.dtype != right[n].dtype)
    ]
    if odd:
        more = f" (and {len(odd) - 4} more)" if len(odd) > 4 else ""
        raise StructureError(f"{what[0]} and {what[1]} must fit; " + "; ".join(odd[:4]) + more)


def describe(leaf: Any) -> str:
    """Return a leaf's dtype and shape in one word.

    >>> import numpy as np
    >>> describe(np.ones((2, 3), np.float32))
    'float32[2,3]'
    """
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _is_plain(tree: Any) -> bool:
    """Whether the tree is nested plain dicts with string keys and array leaves: no jax needed."""
    if type(tree) is dict:
        return all(isinstance(k, str) and _is_plain(v) for k, v in tree.items())
    return hasattr(tree, "shape") or isinstance(tree, (int, float, str))


def _walk(tree: Any, path: tuple[str, ...]):
    if type(tree) is dict:
        for key in sorted(tree):
            yield from _walk(tree[key], (*path, key))
    else:
        yield ".".join(path), tree


def _rebuild_plain(like: Any, flat: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    if type(like) is dict:
        return {k: _rebuild_plain(v, flat, (*path, k)) for k, v in like.items()}
    return flat[".".join(path)]


def _walk_with_jax(tree: Any) -> list[tuple[str, Any]]:
    from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

    def name(path):
        # An `nnx.State` ends every path with `.value`, which is no part of the parameter's name.
        path = tuple(k for k in path if not (isinstance(k, GetAttrKey) and k.name in ("value", "raw_value")))
        return keystr(path, simple=True, separator=".")

    return [(name(path), leaf) for path, leaf in tree_flatten_with_path(tree)[0]]


def _near(pattern: str, leaf_names: list[str]) -> str:
    """Say which names come nearest to a pattern; on a long name its last part counts too."""
    if not leaf_names:
        return "the tree has no leaves"
    word = re.sub(r"[\\^$().*+?|\[\]{}]+", ".", pattern).strip(".")
    near = difflib.get_close_matches(word, leaf_names, n=4, cutoff=0.3)
    if not near:
        tails = {n.rsplit(".", 2)[-1]: n for n in leaf_names}
        near = [tails[t] for t in difflib.get_close_matches(word, list(tails), n=4, cutoff=0.3)]
    return f"near names: {_some(near or leaf_names)}"


def _some(items: Sequence[str], most: int = 4) -> str:
    """List a few names in backticks, or say that there are none."""
    if not items:
        return "none"
    text = ", ".join(f"`{i}`" for i in items[:most])
    return text + (f" and {len(items) - most} more" if len(items) > most else "")
