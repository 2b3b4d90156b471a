"""A merge of files is a list of jobs, one an output tensor; planning reads nothing but headers."""

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from fishjax import tree
from fishjax.checkpoint import open_params
from fishjax.checkpoint._dtypes import Spec
from fishjax.checkpoint._manifest import is_sealed, read_manifest
from fishjax.errors import FileFormatError, StructureError, UsageError
from fishjax.merge._blocks import Readable, Tensor
from fishjax.merge._rule import Options, Rule, is_inexact, wants_sums
from fishjax.merge._statistics import GRAIN
from fishjax.merge._trees import Keep, check_models, kept_leaves
from fishjax.merge._unpack import is_patch, open_patch

File = str | os.PathLike


class Job(NamedTuple):
    """One output tensor, and what it is made of."""

    name: str
    spec: Spec
    rule: str  # a method's name; "copy": the first model's bytes, which all models must have
    models: Sequence[Readable]
    base: Readable | None = None
    beside: Mapping[str, Sequence[Readable]] = MappingProxyType({})
    options: Mapping[str, Any] = MappingProxyType({})

    def inputs(self) -> Iterator[tuple[Any, Readable]]:
        """Yield every tensor that is read, with a name for its buffer."""
        yield from enumerate(self.models)
        if self.base is not None:
            yield "base", self.base
        for word, tensors in self.beside.items():
            yield from (((word, i), t) for i, t in enumerate(tensors))

    def entries(self, block: int) -> int:
        """Return how many entries are read at a time: `block`, twice as many of few bytes each, and of more
        than four inputs so many fewer that all of them take no more memory."""
        few = block if self.models[0].spec.dtype.itemsize >= 4 else 2 * block
        shares = -(-sum(1 for _ in self.inputs()) // 4)
        return max(1, few // shares // GRAIN) * GRAIN

    def wants_sums(self, rule: Rule) -> bool:
        """Say whether anything must be added up over the tensor beforehand."""
        return wants_sums(rule, len(self.models), {w: len(ts) for w, ts in self.beside.items()}, self.options)


def open_tensors(stack: ExitStack, path: File, kind: str = "model") -> dict[str, Tensor]:
    """Open a model's files, or with `kind` "fisher" a Fisher, and return where every tensor is.

    Raises:
      FileFormatError: it is a mask, a patch, or a Fisher where a model is wanted.
    """
    tensors: dict[str, Tensor] = {}
    for file in stack.enter_context(open_params(path)).files.values():
        if sealed := is_sealed(file.metadata):
            got = str(read_manifest(file.path, file.metadata).get("format"))[:40]
            if got != kind:
                raise FileFormatError(f"`{file.path}` is a {got} file; wanted a {kind}")
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        for name, entry in file._entries.items():
            tensors[name] = Tensor(str(file.path), fd, entry.start, Spec(entry.dtype, entry.shape), sealed)
    return tensors


def open_inputs(
    stack: ExitStack, paths: Sequence[File], base: File | None
) -> tuple[list[Mapping[str, Readable]], bool]:
    """Open models; of a patch only what it changes is its own, the rest is the base's.

    Returns:
      The models, and whether there are patches among them.

    Raises:
      UsageError: a patch without a base.
    """
    patched = [path for path in paths if is_patch(path)]
    if patched and base is None:
        raise UsageError(f"`{patched[0]}` is a patch; give the `base` that it is for")
    origin = open_tensors(stack, base) if patched and base is not None else {}
    models: list[Mapping[str, Readable]] = [
        {**origin, **open_patch(path, origin)} if path in patched else open_tensors(stack, path)
        for path in paths
    ]
    return models, bool(patched)


def find_rule(method: str | Callable[..., Any]) -> tuple[str, Rule]:
    """Return a method's name and rule from its name or its function.

    Raises:
      UsageError: there is no such method; all are listed.
    """
    from fishjax import merge

    name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
    if name in ("regmean", "grams"):
        raise UsageError(
            "`regmean` merges in memory only, for it needs the model's activations; in Python, "
            "`merge.regmean` takes the models and their Gram matrices, which `merge.grams` collects"
        )
    if name not in merge.METHODS:
        raise UsageError(f"`{name}` is no merge method; there are {', '.join(merge.METHODS)}")
    return name, merge.METHODS[name]


def full_options(name: str, rule: Rule, given: Mapping[str, Any]) -> Options:
    """Return a method's options, defaults filled in.

    Raises:
      UsageError: one that the method does not know, or one that is missing.
    """
    from fishjax import merge

    taken = {"models", "base", "keep", *rule.beside}
    known = {n: p for n, p in inspect.signature(getattr(merge, name)).parameters.items() if n not in taken}
    for option in given:
        if option not in known:
            raise UsageError(f"`{name}` has no option `{option}`; it has {', '.join(known) or 'none'}")
    options = {n: given.get(n, p.default) for n, p in known.items()}
    for option, value in options.items():
        if value is inspect.Parameter.empty:
            raise UsageError(f"`{name}` needs the option `{option}`")
    return options


def plan(
    stack: ExitStack,
    method: str | Callable[..., Any],
    inputs: Sequence[File],
    *,
    base: File | None = None,
    keep: Keep | None = None,
    dtype: Any = None,
    **given: Any,
) -> list[Job]:
    """Return the jobs of one method over whole models, after every check that headers allow."""
    name, rule = find_rule(method)
    near = {word: given.pop(word, None) for word in rule.beside}
    options = rule.check(len(inputs), **full_options(name, rule, given))
    models, patched = open_inputs(stack, inputs, base)
    kept = kept_leaves(models, keep)
    merged = [{n: t for n, t in model.items() if n not in kept} for model in models]
    check_models([_specs(m) for m in merged], inputs)
    inexact = [n for n, t in merged[0].items() if is_inexact(t.spec.dtype)]
    wanted = {n: merged[0][n] for n in inexact}
    if rule.needs_base and base is None:
        raise UsageError(f"`base` must be given: `{name}` merges what the models changed")
    if base is not None and not rule.needs_base and not patched:
        raise UsageError(f"`base` is given, and `{name}` has no use for one")
    origin = _beside(stack, base, wanted, "base", "model") if base is not None and rule.needs_base else {}
    beside = {word: _near(stack, word, paths, len(inputs), wanted) for word, paths in near.items()}
    jobs = [Job(n, models[i][n].spec, "copy", [models[i][n]]) for n, i in kept.items() if n in models[i]]
    for n, first in merged[0].items():
        if n not in wanted:
            jobs.append(Job(n, first.spec, "copy", [m[n] for m in merged]))
            continue
        spec = Spec(np.dtype(dtype), first.spec.shape) if dtype is not None else first.spec
        trees = {word: [t[n] for t in tensors] for word, tensors in beside.items()}
        jobs.append(Job(n, spec, name, [m[n] for m in merged], origin.get(n), trees, options))
    return jobs


def key_of(jobs: Sequence[Job], block: int, **more: Any) -> str:
    """Return a digest of what the output depends on, and its blocks; inputs count by inode, size and time."""
    text = [
        [
            j.name,
            str(j.spec),
            j.rule,
            j.entries(block),
            repr(dict(j.options)),
            [[str(slot), t.identity()] for slot, t in j.inputs()],
        ]
        for j in jobs
    ]
    return hashlib.sha256(json.dumps([text, more], sort_keys=True).encode()).hexdigest()


def measured_together(jobs: Sequence[Job], rules: Mapping[str, Rule]) -> list[list[int]]:
    """Return which jobs ask for sums or ranks, by number, each with those that it is measured over."""
    groups: dict[tuple[str, int], list[int]] = {}
    for j, job in enumerate(jobs):
        rule = rules.get(job.rule)
        if rule is not None and (rule.ranks is not None or job.wants_sums(rule)):
            whole = job.options.get("scope", rule.scope) == "global"
            groups.setdefault((job.rule, -1 if whole else j), []).append(j)
    return list(groups.values())


def _specs(model: Mapping[str, Readable]) -> dict[str, Spec]:
    return {n: t.spec for n, t in model.items()}


def _beside(
    stack: ExitStack, path: File, wanted: Mapping[str, Readable], what: str, kind: str = "fisher"
) -> dict[str, Tensor]:
    tensors = open_tensors(stack, path, kind)
    found = {n: tensors[n] for n in wanted if n in tensors}
    try:
        tree.check_same(_specs(wanted), _specs(found), ("the models", what), dtypes=False)
    except StructureError as error:
        raise StructureError(f"{error} (`{path}`)") from None
    return found


def _near(
    stack: ExitStack, word: str, paths: Any, n: int, wanted: Mapping[str, Readable]
) -> list[dict[str, Tensor]]:
    if paths is None:
        raise UsageError(f"`{word}` must be given: files that lie beside the models")
    if isinstance(paths, (str, os.PathLike)):
        if word != "fishers":
            return [_beside(stack, paths, wanted, f"`{word}`")]
        paths = [paths]
    if len(paths) != n:
        raise UsageError(f"`{word}` must be one for each of the {n} models; got {len(paths)}")
    return [_beside(stack, p, wanted, f"`{word}` of model {i}") for i, p in enumerate(paths)]
