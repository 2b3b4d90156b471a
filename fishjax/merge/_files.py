"""`files`: any merge method between files, in bounded memory, without jax."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from fishjax.checkpoint._atomic import naming
from fishjax.checkpoint._digest import root
from fishjax.checkpoint._manifest import is_sealed, read_manifest, take
from fishjax.checkpoint._safetensors import open_file
from fishjax.merge._blocks import Readable, Tensor, hash_tensor
from fishjax.merge._card import model_card
from fishjax.merge._cost import Cost, cost
from fishjax.merge._output import Output, carry, refuse_output, write_texts
from fishjax.merge._plan import File, Job, key_of, open_tensors, plan
from fishjax.merge._rule import Rule
from fishjax.merge._stream import BLOCK, THREADS, Engine, Piece
from fishjax.merge._trees import Keep
from fishjax.merge._unpack import Patched, PatchSource, check_patches, is_patch
from fishjax.progress import track
from fishjax.types import Digest

RESERVED = ("inputs", "out", "digests", "block", "threads")  # arguments that are no method's options


def files(
    method: str | Callable[..., Any],
    inputs: Sequence[File],
    out: File,
    *,
    base: File | None = None,
    keep: Keep | None = None,
    dtype: Any = None,
    digests: bool = True,
    block: int = BLOCK,
    threads: int = THREADS,
    **options: Any,
) -> Digest:
    """Merge models on disk; memory is a few blocks a thread, whatever their size. Needs no jax.

    Patches are folded block by block as they are read, with the positions of a few leaves in memory.

    The result is the same bits whatever `block` and `threads` are. A merge that was killed is resumed
    by calling it again: `OUT.partial/` holds what was written and a journal of it.

    Args:
      method: a name of `METHODS`, or the function itself.
      inputs: .safetensors files or Hugging Face folders with the same tensors, or patch files for the
        base.
      out: a new .safetensors file, or a new folder, which gets the configuration and tokenizer of the
        base or the first input, a model card and the recipe.
      base: where a method needs one, or an input is a patch.
      keep: ordered `(regex of a leaf's name, i)`: leaves taken whole from input i, see `average`.
      dtype: of the output's floating-point tensors; by default their own.
      digests: compute content ids, of the result and for a folder's card of the inputs; each costs a
        pass of SHA-256. Without, the result is "".
      block: entries read at a time, rounded up to a multiple of 2^16; twice as many of less than four
        bytes each, fewer where more than four files are read side by side.
      threads: that read, compute and write.
      options: the method's own; Fishers and the like are files too.

    Returns:
      The content id of the merged model.

    Raises:
      StructureError: models or what lies beside them differ in names, shapes or dtypes.
      UsageError: wrong options; `out` exists or is an input.
      OSError: the file system refuses, for instance because it is full; nothing is left behind.

    >>> import tempfile, numpy as np
    >>> from fishjax import checkpoint
    >>> with tempfile.TemporaryDirectory() as top:
    ...     a, b, c = (f"{top}/{name}.safetensors" for name in "abc")
    ...     checkpoint.save_params(a, {"w": np.float32([1])})
    ...     checkpoint.save_params(b, {"w": np.float32([4])})
    ...     digest = files("average", [a, b], c, weights=[2, 1])
    ...     checkpoint.load_params(c)
    {'w': array([2.], dtype=float32)}
    """
    name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
    given = {"method": name, "models": [os.fspath(i) for i in inputs], **_recipe(options)}
    given |= {"base": os.fspath(base)} if base is not None else {}
    given |= {"keep": [list(k) for k in keep]} if keep else {}
    given |= {"dtype": str(np.dtype(dtype))} if dtype is not None else {}
    with ExitStack() as stack:
        jobs = plan(stack, method, inputs, base=base, keep=keep, dtype=dtype, **options)
        sources = [*inputs, *([base] if base is not None else [])]
        near = _fishers(options, inputs, base)
        refuse_output(out, [*sources, *(path for path, _ in near)])
        more: dict[str, Any] = {"digests": digests, "block": block, "threads": threads}
        if dtype is not None:
            more["config"] = {"dtype": given["dtype"]}
        return run_jobs(jobs, out, given, sources=sources, carried=sources[-1], beside=near, **more)


def estimate(
    method: str | Callable[..., Any],
    inputs: Sequence[File],
    *,
    base: File | None = None,
    keep: Keep | None = None,
    dtype: Any = None,
    out: File | None = None,
    digests: bool = True,
    block: int = BLOCK,
    threads: int = THREADS,
    **options: Any,
) -> Cost:
    """Return what `files` would read, write and hold with the same arguments; reads headers only.

    Without `out`, the output is taken for a folder.
    """
    with ExitStack() as stack:
        jobs = plan(stack, method, inputs, base=base, keep=keep, dtype=dtype, **options)
        sources = [*inputs, *([base] if base is not None else [])]
        more: dict[str, Any] = {"digests": digests, "block": block, "threads": threads}
        near = [path for path, _ in _fishers(options, inputs, base)]
        if out is not None:
            refuse_output(out, [*sources, *near])
        return cost(jobs, rules(), out=out, sources=sources, beside=near, carried=sources[-1], **more)


def run_jobs(
    jobs: Sequence[Job],
    out: File,
    recipe: Mapping[str, Any],
    *,
    sources: Sequence[File],
    carried: File,
    beside: Sequence[tuple[File, File | None]] = (),
    config: Mapping[str, Any] | None = None,
    digests: bool = True,
    block: int = BLOCK,
    threads: int = THREADS,
) -> Digest:
    """Carry out jobs, write card and recipe where `out` is a folder, and return the content id.

    Args:
      recipe: what was asked for, for the card.
      sources: the models that go in.
      beside: Fishers that are read too, each with the model that it should be of.
      carried: the one whose configuration and tokenizer go along.
      config: what changes in the configuration, see `carry`.
    """
    engine = Engine(jobs, rules(), block=block, threads=threads)
    output = None
    try:
        with naming(out):
            check_inputs([t for job in jobs for _, t in job.inputs()], engine.map)
            output = Output(
                out, {j.name: j.spec for j in jobs}, key_of(jobs, block=engine.block, out=str(out))
            )
            pieces = engine.pieces()
            if "measured" in output.state:
                engine.measured = output.state["measured"]
            else:
                engine.measure(lambda items, what, total: track(items, description=what, total=total))
                output.done(0, now=any(engine.measured), measured=engine.measured)
            first = output.state["pieces"]

            def step(piece: Piece) -> None:
                output.write(jobs[piece.job].name, piece.start, engine.merged(piece))

            steps = engine.map(step, pieces[first:])
            for i, _ in enumerate(track(steps, description="merging", total=len(pieces) - first), first + 1):
                output.done(i)
            digest = _digest(engine, output.tensors) if digests else ""
            if not output.is_file:
                read = [*sources, *(path for path, _ in beside)]
                kinds = {**dict.fromkeys(read, "fisher"), **dict.fromkeys(sources, "model")}
                ids = {path: _identity(engine, path, kind) if digests else "" for path, kind in kinds.items()}
                carry(Path(carried), output.folder, **(config or {}))
                _warn_of_others(beside, ids)
                named = [(os.fspath(path), ids[path]) for path in read]
                models, near = named[: len(sources)], named[len(sources) :]
                parents = [name for name, _ in models if not is_patch(name)]
                write_texts(output.folder, model_card(recipe, models, digest, parents=parents, beside=near))
            output.finish()
            return digest
    except Exception:
        engine.close()
        if output is not None:
            output.discard()
        raise
    finally:
        engine.close()
        if output is not None:
            output.close()


def check_inputs(inputs: Sequence[Readable], run: Callable[..., Iterator[Any]]) -> None:
    """Read whatever carries a checksum, and the bases that patches are for; `run` maps over threads.

    Raises:
      FileFormatError: a file is corrupt.
      WrongBaseError: a patch is for another base.
    """
    sealed = sorted({t.path for t in inputs if isinstance(t, Tensor) and t.sealed})
    for file in run(lambda path: open_file(path, sealed=True), sealed):
        file.close()  # its checksum was right
    check_patches([t for t in inputs if isinstance(t, Patched)], run)


def _digest(engine: Engine, tensors: Mapping[str, Any]) -> Digest:
    names = sorted(tensors)
    hashed = engine.map(lambda name: hash_tensor(name, tensors[name]), names)
    return root(dict(zip(names, track(hashed, description="hashing", total=len(names)), strict=True)))


def _identity(engine: Engine, path: File, kind: str) -> Digest:
    """Return the content id of a model, or the digest that a patch file carries of itself."""
    if is_patch(path):
        return PatchSource(path).digest
    with ExitStack() as stack:
        return _digest(engine, open_tensors(stack, path, kind))


def rules() -> Mapping[str, Rule]:
    from fishjax import merge

    return merge.METHODS


def _fishers(
    options: Mapping[str, Any], inputs: Sequence[File], base: File | None
) -> list[tuple[File, File | None]]:
    """Return the Fishers among a method's options, each with the model that it should be of."""
    given = options.get("fishers") or []
    own = list(given) if isinstance(given, (list, tuple)) else [given]
    origin = options.get("base_fisher")
    return [*zip(own, inputs, strict=False), *([(origin, base)] if origin is not None else [])]


def _warn_of_others(beside: Sequence[tuple[File, File | None]], ids: Mapping[File, Digest]) -> None:
    """Say on stderr which Fishers were made of another model, where they tell and digests are known."""
    for path, model in beside:
        if model is None or not ids[model] or is_patch(model) or Path(path).is_dir():
            continue
        with open_file(path) as file:
            if not is_sealed(file.metadata):
                continue
            origin = take(path, read_manifest(path, file.metadata), "metadata", dict).get("base")
        if origin not in (None, ids[model]):
            of = next((f"`{other}`" for other, id in ids.items() if id == origin), "another model")
            line = f"warning: the Fisher `{path}` says that it is of {of}; here it stands for `{model}`"
            print("".join(c for c in line if c.isprintable()), file=sys.stderr)


def _recipe(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options in a form that YAML can hold."""

    def plain(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [plain(v) for v in x]
        return os.fspath(x) if isinstance(x, os.PathLike) else getattr(x, "item", lambda: x)()

    return {k: plain(v) for k, v in options.items() if v is not None}
