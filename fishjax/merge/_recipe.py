"""Recipes: a merge written down in YAML, in a form of our own or in that of mergekit.

Our own form has the words of `files`:

    method: fisher
    models: [a, b]
    fishers: [a.fisher, b.fisher]
    weights: [1, 2]
    keep: [["^lm_head", 0]]

With the methods `patches` and `information` the models are patches, and so is what comes out.
What has `merge_method` is mergekit's, and is run as mergekit would.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fishjax import strict_yaml
from fishjax.errors import UsageError
from fishjax.merge._cost import Cost, cost
from fishjax.merge._files import RESERVED, estimate, files, rules, run_jobs
from fishjax.merge._mergekit import mergekit_plan
from fishjax.merge._output import refuse_output
from fishjax.merge._patch_files import PATCH_METHODS, merge_patches
from fishjax.merge._plan import File
from fishjax.merge._stream import BLOCK, THREADS
from fishjax.types import Digest

DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}
_OWN = {"method", "models", "base", "keep", "dtype"}


def run_recipe(recipe: File, out: File, *, digests: bool = True) -> Digest:
    """Merge as a recipe says; see `files`.

    Args:
      recipe: a YAML file, in our form (`method`) or mergekit's (`merge_method`). Paths in it are sought
        from the working directory, then from the recipe's folder.
      out: a new folder, or a new .safetensors file; of patches, a new patch file.
      digests: compute content ids; a patch file has its own in any case.

    Returns:
      The content id of the merged model.

    Raises:
      UsageError: an unknown key, method or value; a model that is not found.
    """
    read, folder = load_recipe(recipe), Path(recipe).parent
    if "merge_method" not in read:
        method, models, options = _own(read, folder)
        if method in PATCH_METHODS:
            return merge_patches(method, models, out, **options)
        return files(method, models, out, digests=digests, **options)
    with ExitStack() as stack:
        plan = mergekit_plan(stack, read, lambda path: locate(path, folder), find_dtype)
        refuse_output(out, plan.sources)
        dtype = read.get("out_dtype") or read.get("dtype")
        config = {"layers": plan.layers, "dtype": dtype}
        more: dict[str, Any] = {"carried": plan.carried, "config": config, "digests": digests}
        return run_jobs(plan.jobs, out, read, sources=plan.sources, **more)


def estimate_recipe(recipe: File, out: File | None = None, *, digests: bool = True) -> Cost:
    """Return what `run_recipe` would read, write and hold; see `estimate`."""
    read, folder = load_recipe(recipe), Path(recipe).parent
    if "merge_method" not in read:
        method, models, options = _own(read, folder)
        if method in PATCH_METHODS:
            raise UsageError(f"`{method}` writes a patch file, of a size that only merging tells; merge it")
        return estimate(method, models, out=out, digests=digests, **options)
    with ExitStack() as stack:
        plan = mergekit_plan(stack, read, lambda path: locate(path, folder), find_dtype)
        if out is not None:
            refuse_output(out, plan.sources)
        more: dict[str, Any] = {"digests": digests, "block": BLOCK, "threads": THREADS}
        more |= {"sources": plan.sources, "beside": (), "carried": plan.carried}
        return cost(plan.jobs, rules(), out=out, **more)


def load_recipe(path: File) -> dict[str, Any]:
    """Read a recipe's YAML.

    Raises:
      UsageError: it is no YAML, has a key twice, is no mapping, or names no method.
    """
    read = strict_yaml.load(Path(path), f"the recipe `{path}`")
    if not isinstance(read, dict) or not ("method" in read or "merge_method" in read):
        raise UsageError(f"`{path}` is no recipe; wanted a mapping with `method` or `merge_method`")
    return read


def locate(path: Any, folder: Path) -> Path:
    """Return where a recipe's path leads: from the working directory, or from the recipe's folder.

    Raises:
      UsageError: to neither.
    """
    if not isinstance(path, str):
        raise UsageError(f"a recipe's model must be a path; got {path!r}")
    for found in (Path(path), folder / path):
        if found.exists():
            return found
    raise UsageError(f"the recipe's `{path}` is neither in the working directory nor in `{folder}`")


def find_dtype(name: Any) -> np.dtype:
    """Return a dtype by its name in recipes.

    >>> find_dtype("bfloat16")
    dtype(bfloat16)
    """
    if not isinstance(name, str) or name not in DTYPES:
        raise UsageError(f"`dtype` must be one of {', '.join(DTYPES)}; got {name!r}")
    return np.dtype(DTYPES[name])


def _list(word: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError(f"a recipe's `{word}` must be a list; got {value!r}")
    return value


def _keep(rule: Any) -> tuple[str, int | None]:
    good = isinstance(rule, list) and len(rule) == 2 and isinstance(rule[0], str)
    if not good or not (rule[1] is None or type(rule[1]) is int):
        raise UsageError(f"a rule of `keep` must be [regex, number of a model or null]; got {rule!r}")
    return rule[0], rule[1]


def _own(read: Mapping[str, Any], folder: Path) -> tuple[str, list[Path], dict[str, Any]]:
    options = {k: v for k, v in read.items() if k not in _OWN}
    for word in options:
        if not isinstance(word, str) or word in RESERVED:
            raise UsageError(f"`{word}` does not belong in a recipe")
    models = read.get("models")
    if not isinstance(models, list) or not models:
        raise UsageError("a recipe's `models` must be a list of paths")
    for word in ("fishers", "base_fisher", "revoke"):
        value = options.get(word)
        if not isinstance(value, str | list | None):
            raise UsageError(f"a recipe's `{word}` must be a path or a list of paths; got {value!r}")
        if value is not None:
            options[word] = (
                locate(value, folder) if isinstance(value, str) else [locate(v, folder) for v in value]
            )
    if "base" in read:
        options["base"] = locate(read["base"], folder)
    if "dtype" in read:
        options["dtype"] = find_dtype(read["dtype"])
    if "keep" in read:
        options["keep"] = [_keep(rule) for rule in _list("keep", read["keep"])]
    return str(read["method"]), [locate(m, folder) for m in models], options
