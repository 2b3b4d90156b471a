"""From a model folder to a patch file."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from fishjax import checkpoint, data, fisher, mesh, models, patches, train, tree
from fishjax.checkpoint._lossy import MODES
from fishjax.contribute._choose import Made
from fishjax.contribute._fit import adam, fit
from fishjax.contribute._read import read
from fishjax.contribute._resume import claim, start_id
from fishjax.errors import UsageError, WrongBaseError
from fishjax.types import Batch, Digest, Params, Patch


def run(
    *,
    model: str,
    data_from: str | Sequence[str],
    out: str,
    make: Callable[..., Made],
    steps: int,
    learning_rate: float,
    batch_size: int = 32,
    seed: int = 0,
    split: str = "train",
    examples: int = 1024,
    metadata: Mapping[str, Any] | None = None,
    templates: str | Sequence[str | None] | None = None,
    limit: int | None = None,
    shots: int | None = None,
    loss: Callable[[models.Model], Any] = models.example_loss,
    optimizer: Callable[[float, int], optax.GradientTransformation] = adam,
    on: Mesh | None = None,
    rules: Callable[[models.Model, Mesh], mesh.SpecRules] = mesh.rules,
    remat: bool = False,
    scan: bool = False,
    batched: bool = False,
    quantise: Any = None,
    refresh_every: int | None = None,
    precision: int | None = None,
    lossy: str | None = None,
) -> Digest:
    """Make a patch for a model folder and write it: what `fishjax train` calls.

    A training that was stopped goes on: its state is in `OUT.partial/` until the patch is written, with
    what it was asked to do, so that no other training goes on from it. Of several processes
    (`mesh.connect`) the first one writes.

    Args:
      model: a folder with config.json and weights.
      data_from: a TFDS name, or a FILE.jsonl as of `data.load_jsonl`; several with choices are a mixture.
      out: the patch file to write.
      make: what is trained, one of the functions above with its arguments bound.
      steps, learning_rate, batch_size, seed: of the training.
      split: of a TFDS data set.
      examples: how many examples `make` sees at most (FISH needs few: arXiv 2111.09839, section 5.2).
      metadata: author, licence, claims ... for the patch's manifest.
      templates: a file as of `data.load_templates` for each FILE.jsonl, whose lines are then a task's rows.
      limit: at most so many examples of each task of a mixture.
      shots: train on so few examples of each data set, drawn by the seed; None takes all.
      loss, optimizer, remat, batched: as of `fit`.
      scan: stack equal blocks while training, as of `fit`; the patch is of the model's own leaves.
      quantise: "int8", "int4", "nf4" or rules, as of `models.load`: what is not trained is held in so few
        bits, for `ia3` and `lora`. The patch is of the folder's own weights.
      on: a mesh (`mesh.make`) onto which the model is loaded and on which all else then happens.
      rules: `(model, mesh) -> rules` as of `mesh.shard`.
      refresh_every: steps after which `make` chooses a new mask, of the weights as they are by then; what
        was learnt stays, so the patch has the entries of all masks. None keeps the first.
      precision: take the diagonal Fisher of the trained weights from so many examples, times the number of
        all, into the file: what `merge --method information` adds up. For patches of entries.
      lossy: "bf16" or "int8", fewer bytes and an error that the file states, as of `checkpoint.save_patch`.

    Raises:
      UsageError: `out` exists; `OUT.partial/` is of another training; there is no mask to refresh; an
        argument makes no sense.
      WrongBaseError: `make` goes on from a patch of another base.
    """
    whole = {"steps": steps, "batch_size": batch_size, "examples": examples}
    whole |= {} if precision is None else {"precision": precision}
    for name, x in whole.items():
        if type(x) is not int or x < 1:
            raise UsageError(f"`{name}` must be a whole number, at least 1; got {x!r}")
    if type(learning_rate) not in (int, float) or not 0 < learning_rate < math.inf:
        raise UsageError(f"`learning_rate` must be a number above 0; got {learning_rate!r}")
    if lossy not in (None, *MODES):
        raise UsageError(f"`lossy` must be one of {', '.join(map(repr, MODES))}, or None; got {lossy!r}")
    if Path(out).exists():
        raise UsageError(f"`{out}` exists; remove it or choose another name")
    where = None if on is None else lambda m, shapes: mesh.shardings(shapes, rules(m, on), on)
    loaded, base = models.load(model, shardings=where, quantise=quantise)
    options: dict[str, Any] = {"split": split, "templates": templates, "limit": limit, "shots": shots}
    rows, data_id = read(data_from, model, loaded, **options, seed=seed)
    batches = _first(rows, examples, batch_size, on)
    made = make(jax.random.key(seed), base, loaded, batches)
    partial = Path(f"{out}.partial")
    again = lambda params: make(jax.random.key(seed), params, loaded, batches).mask
    if refresh_every is not None and made.mask is None:
        raise UsageError("`refresh_every` is for ways that choose a mask; `make` made a patch without one")
    if scan and refresh_every is not None:
        raise UsageError("`refresh_every` chooses masks of the model's own leaves; leave out `scan`")
    entries = all(isinstance(kind, (patches.Sparse, patches.Dense)) for kind in made.patch.values())
    if precision is not None and (scan or batched or not entries):
        raise UsageError(
            "`precision` is a Fisher of single entries, by single examples: for masks and whole leaves, "
            "without `scan` and `batched`"
        )
    start, params, shapes = made.patch, base, mesh.shapes_of(base)
    base_id = checkpoint.digest(files := _files(model, shapes))
    if made.base_id not in (None, base_id):
        raise WrongBaseError(
            f"the patch to go on from is for another base: `{model}` has the content id {base_id[:23]}, "
            f"wanted {made.base_id[:23]}"
        )
    recipe = {**made.recipe, "seed": seed, "data": data_id, "steps": steps, "learning_rate": learning_rate}
    recipe |= {} if quantise is None else {"quantise": quantise}
    recipe |= {} if refresh_every is None else {"refresh_every": refresh_every}
    about = {"base": base_id, "start": start_id(start), "batch_size": batch_size, "scan": scan}
    about |= {"loss": _named(loss), "optimizer": _named(optimizer), "batched": batched}
    state = claim(partial, {**recipe, **about})
    del base  # stacking gives its leaves away
    if scan:
        start = models.stack_patch(loaded, params, start)
        params = models.stack_blocks(loaded, params, donate=True)
    patch = fit(
        start,
        params,
        loaded,
        rows,
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
        folder=state,
        loss=loss,
        optimizer=optimizer,
        remat=remat,
        scan=scan,
        batched=batched,
        refresh=None if refresh_every is None else (again, refresh_every),
    )
    patch = models.unstack_patch(loaded, shapes, patch) if scan else patch
    known = None
    if precision is not None:
        few = _first(rows, precision, batch_size, on)
        squares = fisher.estimate(fisher.empirical(loss(loaded)), patches.apply(params, patch), few)
        flat = tree.flatten(squares)
        known = mesh.gather({n: data.examples(rows) * flat[n] for n in patch})
    said = {**(metadata or {}), "recipe": recipe}
    return _save(out, mesh.gather(patch), files, said, partial, lossy=lossy, precision=known)


def _first(rows: Batch, count: int, batch_size: int, on: Mesh | None) -> list[Batch]:
    """Return the first rows in batches, laid out on the mesh."""
    some = {name: x[:count] for name, x in rows.items()}
    return [mesh.shard_batch(b, on) for b in data.batches(some, min(batch_size, data.examples(some)))]


def _files(model: str, shapes: Params) -> dict[str, Any]:
    """Return the model's leaves as its files have them, mapped: what is on devices may be given away."""
    found = tree.flatten(checkpoint.load_params(model))
    return {n: found[n] for n in tree.flatten(shapes)}


def _named(function: Callable[..., Any]) -> str:
    inner = getattr(function, "func", function)  # of a partial
    return getattr(inner, "__name__", type(inner).__name__)


def _save(
    out: str, patch: Patch, base: Params, metadata: Mapping[str, Any], partial: Path, **options: Any
) -> Digest:
    """Write the patch once, whatever the number of processes, and let go of the training's state."""
    if jax.process_index() == 0:
        checkpoint.save_patch(out, patch, base=base, metadata=metadata, **options)
        train.remove_state(partial)
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices("patch written")
    return checkpoint.read_patch(out).digest
