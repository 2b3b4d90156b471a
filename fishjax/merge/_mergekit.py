"""mergekit's recipes: its YAML becomes jobs, with its meaning where that differs from the papers.

What it means (`compat`): TIES and Breadcrumbs rank tensor by tensor, DARE restores the L1 norm, SLERP
takes the chord from a cosine of 0.9995 on, Model Stock may step back. Arithmetic is in float32 at least.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fishjax.checkpoint._dtypes import Spec
from fishjax.errors import StructureError, UsageError
from fishjax.merge._blocks import Readable
from fishjax.merge._plan import Job, find_rule, full_options, open_tensors
from fishjax.merge._rule import flag, is_inexact, number
from fishjax.merge._slices import LAYER, Slice, Source, output_tensors
from fishjax.merge._unpack import is_patch, open_patch
from fishjax.tree import describe

_SUM = {"weight", "normalize", "rescale", "lambda", "int8_mask"}
METHODS = {  # mergekit's name -> its parameters
    "linear": {"weight", "normalize"},
    "slerp": {"t"},
    "nuslerp": {"weight", "nuslerp_flatten", "nuslerp_row_wise"},
    "task_arithmetic": _SUM,
    "ties": _SUM | {"density"},
    "dare_linear": _SUM | {"density"},
    "dare_ties": _SUM | {"density"},
    "breadcrumbs": _SUM | {"density", "gamma"},
    "breadcrumbs_ties": _SUM | {"density", "gamma"},
    "model_stock": {"filter_wise"},
    "passthrough": {"scale"},
}
_KEYS = {"merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype"}


class Plan(NamedTuple):
    """A recipe made ready."""

    jobs: list[Job]
    sources: list[Path]
    carried: Path  # whose configuration and tokenizer go along
    layers: int | None  # where it is another number than before


def mergekit_plan(
    stack: ExitStack,
    recipe: Mapping[str, Any],
    find: Callable[[Any], Path],
    dtype_of: Callable[[Any], np.dtype],
) -> Plan:
    """Return the jobs of a recipe in mergekit's form.

    Raises:
      UsageError: an unknown key, method or parameter; something that is not supported, by name.
    """
    method = recipe["merge_method"]
    if not isinstance(method, str) or method not in METHODS:
        raise UsageError(f"mergekit's `{method}` is not supported; there are {', '.join(METHODS)}")
    _check_keys(recipe)
    base = find(recipe["base_model"]) if recipe.get("base_model") is not None else None
    origin = open_tensors(stack, base) if base is not None else {}
    opened: dict[Path, Mapping[str, Readable]] = {base: origin} if base is not None else {}

    def open_model(name: Any) -> tuple[Path, Mapping[str, Readable]]:
        path = find(name)
        if path not in opened:
            if not is_patch(path):
                opened[path] = open_tensors(stack, path)
            elif base is None:
                raise UsageError(f"`{path}` is a patch; give the `base_model` that it is for")
            else:
                opened[path] = {**origin, **open_patch(path, origin)}
        return path, opened[path]

    slices = _slices(recipe, base, open_model, METHODS[method])
    whole = _settings(recipe, "the recipe", METHODS[method])
    dtypes = [dtype_of(recipe[k]) for k in ("out_dtype", "dtype") if recipe.get(k) is not None]
    jobs, layers = [], 0
    for name, t, piece, tensors in output_tensors(slices):
        get = lambda key, source=None, default=None, t=t, piece=piece, name=name: _resolve(
            key, name, t, [source.settings if source else None, piece.settings, whole], default
        )
        jobs.append(_job(method, name, piece, tensors, get, dtypes[0] if dtypes else None))
        if found := LAYER.match(name):
            layers = max(layers, int(found[2]) + 1)
    carried = base or slices[0].sources[0].path
    changed = layers if slices[0].layers is not None else None
    return Plan(jobs, list(opened), carried, changed)


def _check_keys(recipe: Mapping[str, Any]) -> None:
    keys = set(recipe)
    if recipe.get("tokenizer_source") == "base" or recipe.get("tokenizer") == {"source": "base"}:
        keys -= {"tokenizer_source", "tokenizer"}  # it is the base's that goes along
    for key in sorted(keys - _KEYS, key=str):
        raise UsageError(f"a recipe's key `{key}` is not supported; supported are {', '.join(sorted(_KEYS))}")
    if ("models" in recipe) == ("slices" in recipe):
        raise UsageError("a recipe must have `models` or `slices`, not both")


def _slices(recipe: Mapping[str, Any], base: Path | None, open_model: Any, known: set[str]) -> list[Slice]:
    slices = []
    given = _filled("slices", recipe["slices"]) if "slices" in recipe else [{"sources": recipe["models"]}]
    for entry in given:
        _check_entry(entry, {"sources", "parameters", "base_model"}, "a slice")
        own_base = open_model(entry["base_model"])[0] if entry.get("base_model") is not None else base
        sources, lengths = [], set()
        for part in _filled("sources" if "slices" in recipe else "models", entry.get("sources")):
            wanted = {"model", "parameters"} | ({"layer_range"} if "slices" in recipe else set())
            _check_entry(part, wanted, "a source")
            path, tensors = open_model(part.get("model"))
            settings = _settings(part, f"`{path}`", known)
            first = None
            if "slices" in recipe:
                first, stop = _range(part)
                lengths.add(stop - first)
            sources.append(Source(path, tensors, first, settings, path == own_base))
        if "slices" not in recipe and own_base is not None and not any(s.is_base for s in sources):
            sources.append(Source(own_base, open_model(recipe["base_model"])[1], None, {}, True))
        if len(lengths) > 1:
            raise UsageError(f"all sources of a slice must have as many layers; got {sorted(lengths)}")
        settings = _settings(entry, "a slice", known)
        slices.append(Slice(sources, next(iter(lengths), None), settings))
    return slices


def _filled(word: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise UsageError(f"a recipe's `{word}` must be a list that is not empty; got {value!r}")
    return value


def _range(part: Mapping[str, Any]) -> tuple[int, int]:
    span = part.get("layer_range")
    if not (
        isinstance(span, list)
        and len(span) == 2
        and all(type(i) is int for i in span)
        and 0 <= span[0] < span[1]
    ):
        raise UsageError(f"`layer_range` must be [first, last + 1]; got {span}")
    return span[0], span[1]


def _check_entry(entry: Any, known: set[str], what: str) -> None:
    if not isinstance(entry, Mapping):
        raise UsageError(f"{what} of a recipe must be a mapping; got {entry!r}")
    for key in entry:
        if key not in known:
            raise UsageError(f"{what} of a recipe has no key `{key}`; it has {', '.join(sorted(known))}")


def _settings(entry: Mapping[str, Any], what: str, known: set[str]) -> Mapping[str, Any]:
    settings = entry.get("parameters") or {}
    if not isinstance(settings, Mapping):
        raise UsageError(f"the `parameters` of {what} must be a mapping; got {settings!r}")
    for key in settings:
        if key not in known:
            raise UsageError(
                f"{what} sets `{key}`, which the method does not have; it has {', '.join(sorted(known))}"
            )
    return settings


def _resolve(key: str, name: str, t: float, scopes: Iterable[Mapping[str, Any] | None], default: Any) -> Any:
    """Return a parameter for a tensor at depth t: the first scope that says anything holds."""
    for scope in scopes:
        if scope is not None and key in scope:
            value = _evaluate(scope[key], name, t)
            if value is not None:
                return value
    if default is None:
        raise UsageError(f"the recipe sets no `{key}` for `{name}`")
    return default


def _evaluate(setting: Any, name: str, t: float) -> Any:
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if any(isinstance(s, Mapping) for s in setting):
        for s in setting:
            _check_entry(s, {"filter", "value"}, "a filter")
            if "value" not in s:
                raise UsageError(f"a filter of a recipe needs a `value`; got {s!r}")
            if s.get("filter") in (None, "*") or str(s["filter"]) in name:
                return _evaluate(s["value"], name, t)
        return None
    if not setting:
        return None
    if not all(isinstance(s, int | float) and not isinstance(s, bool) for s in setting):
        return setting[int(t * (len(setting) - 1))]
    place = t * (len(setting) - 1)
    low = int(place)
    high = min(len(setting) - 1, low + 1)
    first, second = (number("a value over depth", setting[i]) for i in (low, high))
    return (1 - (place - low)) * first + (place - low) * second


def _job(
    method: str, name: str, piece: Slice, tensors: list[Readable], get: Any, dtype: np.dtype | None
) -> Job:
    """Return the job of one tensor: mergekit's method and parameters in our words."""
    for source, tensor in zip(piece.sources, tensors, strict=True):
        if tensor.spec.shape != tensors[0].spec.shape:
            raise StructureError(
                f"`{name}` is {describe(tensors[0].spec)} in `{piece.sources[0].path}` and "
                f"{describe(tensor.spec)} in `{source.path}`; a recipe's models must have the same shapes"
            )
    own = np.result_type(*[t.spec.dtype for t in tensors])
    spec = Spec(dtype if dtype is not None and is_inexact(own) else own, tensors[0].spec.shape)
    if not is_inexact(own):
        return Job(name, tensors[0].spec, "copy", tensors)
    pairs = list(zip(piece.sources, tensors, strict=True))
    base = next((t for s, t in pairs if s.is_base), None)
    others = [(s, t) for s, t in pairs if not s.is_base]
    rest = [t for _, t in others]

    def amount(key: str, source: Source | None = None, default: float | None = None) -> float:
        return number(key, get(key, source, default))

    def switch(key: str, default: bool) -> bool:
        return flag(key, get(key, default=default))

    def make(rule: str, models: Sequence[Readable], origin: Readable | None = None, **options: Any) -> Job:
        _, found = find_rule(rule)
        if found.needs_base and origin is None:
            raise UsageError(f"mergekit's `{method}` needs a `base_model`")
        checked = found.check(len(models), **full_options(rule, found, options))
        return Job(name, spec, rule, models, origin, {}, checked)

    if method == "passthrough":
        if len(tensors) != 1:
            raise UsageError(f"mergekit's `passthrough` takes one model a slice; got {len(tensors)}")
        return make("average", tensors, weights=[amount("scale", piece.sources[0], 1.0)], normalize=False)
    if method == "linear":
        weights = [amount("weight", s) for s, _ in pairs]
        return make("average", tensors, weights=weights, normalize=switch("normalize", True))
    if method == "slerp":
        if base is None or len(rest) != 1:
            raise UsageError("mergekit's `slerp` needs a `base_model` and one other model")
        return make("slerp", [base, *rest], t=amount("t"), compat="mergekit")
    if method == "nuslerp":
        if not switch("nuslerp_flatten", True) or switch("nuslerp_row_wise", False):
            raise UsageError("`nuslerp_flatten: false` and `nuslerp_row_wise: true` are not supported")
        weights = [amount("weight", s) for s, _ in others]
        t = weights[-1] / sum(weights) if len(weights) == 2 and abs(sum(weights)) >= 1e-6 else 0.5
        return make("slerp", rest, t=t) if base is None else make("nuslerp", rest, base, t=t)
    if method == "model_stock":
        if switch("filter_wise", False):
            raise UsageError("`filter_wise: true` is not supported")
        return make("model_stock", rest, base, compat="mergekit")
    options: dict[str, Any] = {
        "weights": [amount("weight", s) for s, _ in others],
        "scale": amount("lambda", default=1.0),
    }
    normalize = switch("normalize", method == "ties")
    rescale = switch("rescale", method.startswith("dare"))
    if method == "task_arithmetic":
        return make(
            method, rest, base, normalize=normalize and abs(sum(options["weights"])) >= 1e-8, **options
        )
    options |= {"density": [min(1.0, amount("density", s, 1.0)) for s, _ in others], "normalize": normalize}
    if method.startswith("dare"):
        more = {"rescale": "l1" if rescale else None, "elect": method == "dare_ties"}
        return make("dare", rest, base, **options, **more)
    if rescale:
        raise UsageError(f"`rescale: true` is not supported for `{method}`")
    if method == "ties":
        return make(method, rest, base, scope="tensor", **options)
    gamma = [amount("gamma", s, 0.01) for s, _ in others]
    return make("breadcrumbs", rest, base, gamma=gamma, elect=method == "breadcrumbs_ties", **options)
