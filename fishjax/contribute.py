"""A contributor's work from a model folder to a patch file, and the ways to choose what is trained.

Each way is called as `make(key, base, model, batches)` with batches of the contributor's own data, and
starts a patch that changes nothing yet.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fishjax import checkpoint, data, fisher, leaves, masks, mesh, models, patches, train, tree
from fishjax.errors import UsageError, WrongBaseError
from fishjax.types import Array, Batch, Digest, LossFn, Mask, Params, Patch


class Made(NamedTuple):
    """A patch before training, and what is to be said of how it was chosen."""

    patch: Patch
    recipe: dict[str, Any]
    mask: Mask | None = None


def fish(
    key: Array,
    base: Params,
    model: models.Model,
    batches: Sequence[Batch],
    *,
    density: float,
    loss: Callable[[models.Model], LossFn] = models.example_loss,
    **rules,
) -> Made:
    """Choose the entries of largest empirical Fisher: the FISH mask; `rules` as in `masks.topk`.

    Args:
      loss: of a model, whose gradients are squared.
    """
    del key
    scores = fisher.estimate(fisher.empirical(loss(model)), base, batches)
    examples = sum(data.examples(batch) for batch in batches)
    recipe = {"method": "fish", "density": density, "estimator": "empirical", "examples": examples}
    return _masked(base, masks.topk(scores, density=density, **rules), recipe)


def random(
    key: Array, base: Params, model: models.Model, batches: Sequence[Batch], *, density: float, **rules
) -> Made:
    """Choose entries at random: the baseline that a FISH mask has to beat."""
    del model, batches
    mask = masks.random(key, base, density=density, **rules)
    return _masked(base, mask, {"method": "random", "density": density})


def magnitude(
    key: Array, base: Params, model: models.Model, batches: Sequence[Batch], *, density: float, **rules
) -> Made:
    """Choose the weights of largest absolute value."""
    del key, model, batches
    mask = masks.magnitude(base, density=density, **rules)
    return _masked(base, mask, {"method": "magnitude", "density": density})


def full(
    key: Array,
    base: Params,
    model: models.Model,
    batches: Sequence[Batch],
    *,
    targets: str | Sequence[str] = "",
) -> Made:
    """Train whole leaves: everything, or those of some names (`"bias$"` is BitFit)."""
    del key, model, batches
    return Made(patches.init_dense(base, targets), {"method": "dense"})


def ia3(
    key: Array,
    base: Params,
    model: models.Model,
    batches: Sequence[Batch],
    *,
    targets: str | Mapping[str, Any] = "paper",
) -> Made:
    """Rescale keys, values and the inner activations: (IA)^3."""
    del key, batches
    heads = model.config.get("n_head", model.config.get("num_attention_heads"))
    return Made(patches.init_ia3(base, targets=targets, heads=heads), {"method": "ia3"})


def lora(
    key: Array,
    base: Params,
    model: models.Model,
    batches: Sequence[Batch],
    *,
    rank: int | Mapping[str, int],
    targets: str | Sequence[str] | Mapping[str, Any],
    alpha: float | Mapping[str, float] = 1.0,
    rslora: bool = False,
) -> Made:
    """Add low-rank products: LoRA."""
    del model, batches
    patch = patches.init_lora(key, base, rank=rank, targets=targets, alpha=alpha, rslora=rslora)
    return Made(patch, {"method": "lora", "rank": rank, "alpha": alpha, "rslora": rslora})


def from_patch(
    key: Array, base: Params, model: models.Model, batches: Sequence[Batch], *, path: str | os.PathLike
) -> Made:
    """Go on from a patch file: few-shot training from (IA)^3 vectors that were pre-trained on a mixture.

    Raises:
      WrongBaseError: the file is for another base.

    References: Liu et al. 2022, arXiv 2205.05638, section 3.4.
    """
    del key, model, batches
    patch, metadata = checkpoint.load_patch(path)
    wanted, found = checkpoint.read_patch(path).base_id, checkpoint.digest(base)
    if wanted != found:
        raise WrongBaseError(
            f"`{path}` is for another base: the model has the content id {found[:23]}, wanted {wanted[:23]}"
        )
    begun = metadata.get("recipe", {})
    return Made(jax.tree.map(jnp.asarray, patch), {"method": begun.get("method"), "from": begun})


def adam(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Return Adam with a tenth of the steps as warm-up, then a cosine to zero."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 10), steps)
    return optax.adam(schedule)


def fit(
    patch: Patch,
    base: Params,
    model: models.Model,
    rows: Batch,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 64,
    seed: int = 0,
    folder: str | os.PathLike | None = None,
    description: str = "training",
    loss: Callable[[models.Model], LossFn] = models.example_loss,
    optimizer: Callable[[float, int], optax.GradientTransformation] = adam,
    remat: bool = False,
    scan: bool = False,
    refresh: tuple[Callable[[Params], Mask], int] | None = None,
) -> Patch:
    """Train a patch.

    Args:
      base: on one device, or on a mesh (`mesh.shard`) over which patch, moments and batches then follow.
      rows: `{field: [n, ...]}`, batches of which are drawn by the seed.
      steps, batch_size: at least 1.
      folder: where the training's state is kept; a training that was stopped goes on from there.
      loss: of a model; `train.tfew_loss` where examples have choices.
      optimizer: of the highest learning rate and the number of steps; `train.adafactor` is T-Few's.
      remat: compute each block again in the backward pass, which saves memory (`models.remat`).
      scan: `base` and `patch` are stacked (`models.stack_blocks`) and equal blocks run in a scan: compiled
        faster, and on a mesh no more than one block's weights are gathered at a time.
      refresh: what chooses another mask of the weights, and the steps after which it does
        (`train.fit_refreshed`); the patch then has all that was learnt.
    """
    rule, on = optimizer(learning_rate, steps), mesh.mesh_of(base)

    def batches():
        drawn = data.batches(rows, min(batch_size, data.examples(rows)), seed=seed, epochs=None)
        return (mesh.shard_batch(batch, on) for batch in drawn)

    place = lambda state: mesh.follow(state, base)
    start, step = (
        place(train.init(patch, rule)),
        make_step(model, rule, on, loss=loss, remat=remat, scan=scan),
    )
    options: dict[str, Any] = {"steps": steps, "folder": folder, "description": description}
    if refresh is None:
        return train.patch_of(train.fit(start, step, base, batches(), **options)[0])
    choose, every = refresh
    options |= {"refresh_every": every, "place": place}
    state, params, _ = train.fit_refreshed(start, step, base, batches, choose, rule, **options)
    return patches.diff(base, patches.apply(params, train.patch_of(state)))


def make_step(
    model: models.Model,
    optimizer: optax.GradientTransformation,
    on: mesh.AnyMesh | None = None,
    *,
    loss: Callable[[models.Model], LossFn] = models.example_loss,
    remat: bool = False,
    scan: bool = False,
) -> train.Step:
    """Return the step that `fit` takes: patched weights are not formed, examples are spread over a mesh.

    Args:
      on: the mesh of the parameters, if they lie on one.
      loss, remat, scan: as of `fit`.
    """
    held = model if on is None else mesh.constrain(model, on)
    held = models.scanned(held, remat=remat) if scan else models.remat(held) if remat else held
    loss_fn = loss(held)
    over = mesh.batch_axes(on)
    return train.make_step(leaves.interpret(loss_fn), optimizer, apply=patches.unfold, over=over)


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
    loss: Callable[[models.Model], LossFn] = models.example_loss,
    optimizer: Callable[[float, int], optax.GradientTransformation] = adam,
    on: Mesh | None = None,
    rules: Callable[[models.Model, Mesh], mesh.SpecRules] = mesh.rules,
    remat: bool = False,
    scan: bool = False,
    refresh_every: int | None = None,
) -> Digest:
    """Make a patch for a model folder and write it: what `fishjax train` calls.

    A training that was stopped goes on: its state is in `OUT.partial/` until the patch is written. Of
    several processes (`mesh.connect`) the first one writes.

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
      loss, optimizer, remat: as of `fit`.
      scan: stack equal blocks while training, as of `fit`; the patch is of the model's own leaves.
      on: a mesh (`mesh.make`) onto which the model is loaded and on which all else then happens.
      rules: `(model, mesh) -> rules` as of `mesh.shard`.
      refresh_every: steps after which `make` chooses a new mask, of the weights as they are by then; what
        was learnt stays, so the patch has the entries of all masks. None keeps the first.

    Raises:
      UsageError: `out` exists; there is no mask to refresh; an argument makes no sense.
    """
    if Path(out).exists():
        raise UsageError(f"`{out}` exists; remove it or choose another name")
    where = None if on is None else lambda m, shapes: mesh.shardings(shapes, rules(m, on), on)
    loaded, base = models.load(model, shardings=where)
    rows, data_id = read(data_from, model, loaded, split=split, templates=templates, limit=limit, seed=seed)
    some = {name: x[:examples] for name, x in rows.items()}
    batches = [mesh.shard_batch(b, on) for b in data.batches(some, min(batch_size, data.examples(some)))]
    made = make(jax.random.key(seed), base, loaded, batches)
    partial = Path(f"{out}.partial")
    again = lambda params: make(jax.random.key(seed), params, loaded, batches).mask
    if refresh_every is not None and made.mask is None:
        raise UsageError("`refresh_every` is for ways that choose a mask; `make` made a patch without one")
    if scan and refresh_every is not None:
        raise UsageError("`refresh_every` chooses masks of the model's own leaves; leave out `scan`")
    start, params, shapes = made.patch, base, mesh.shapes_of(base)
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
        folder=partial,
        loss=loss,
        optimizer=optimizer,
        remat=remat,
        scan=scan,
        refresh=None if refresh_every is None else (again, refresh_every),
    )
    recipe = {**made.recipe, "seed": seed, "data": data_id, "steps": steps, "learning_rate": learning_rate}
    recipe |= {} if refresh_every is None else {"refresh_every": refresh_every}
    patch = models.unstack_patch(loaded, shapes, patch) if scan else patch
    if scan or jax.process_count() > 1:  # the base is no longer here as it was; its files are
        whole = tree.flatten(checkpoint.load_params(model))
        params = {n: whole[n] for n in tree.flatten(shapes)}
    return _save(out, mesh.gather(patch), params, {**(metadata or {}), "recipe": recipe}, partial)


def _save(out: str, patch: Patch, base: Params, metadata: Mapping[str, Any], partial: Path) -> Digest:
    """Write the patch once, whatever the number of processes, and let go of the training's state."""
    if jax.process_index() == 0:
        checkpoint.save_patch(out, patch, base=base, metadata=metadata)
        train.remove_state(partial)
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices("patch written")
    return checkpoint.read_patch(out).digest


def read(
    names: str | Sequence[str],
    folder: str,
    model: models.Model,
    *,
    split: str = "train",
    templates: str | Sequence[str | None] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[Batch, str]:
    """Return the examples of a TFDS data set, a FILE.jsonl or a mixture of them, and what identifies them.

    Args:
      names: one, or several with choices.
      folder: the model's, whose tokenizer encodes text.
      split: of a TFDS data set.
      templates: one file for each name, or none.
      limit, seed: at most so many examples of each task of a mixture, drawn by the seed.
    """
    names = [names] if isinstance(names, str) else list(names)
    files: list[str | None] = [templates] if isinstance(templates, str) else list(templates or ())
    files = files or [None] * len(names)
    if len(files) != len(names) or not names:
        raise UsageError(f"there must be one file of `templates` for each of {names}; got {files}")
    parts = [_read(name, folder, model, split, file) for name, file in zip(names, files)]
    if len(parts) == 1:
        return parts[0]
    if odd := [name for name, (rows, _) in zip(names, parts) if "choices" not in rows]:
        raise UsageError(f"a mixture is of examples with choices; `{odd[0]}` has none")
    mixed = data.mix([rows for rows, _ in parts], seed=seed, limit=limit)
    return mixed, " + ".join(identity for _, identity in parts)


def _read(
    name: str, folder: str, model: models.Model, split: str, templates: str | None
) -> tuple[Batch, str]:
    if name.endswith(".jsonl"):
        content = hashlib.sha256(Path(name).read_bytes())
        if templates is None:
            return data.load_jsonl(name, folder, model), f"sha256:{content.hexdigest()}"
        content.update(Path(templates).read_bytes())
        asked = data.load_templates(templates)
        return data.load_jsonl(name, folder, model, templates=asked), f"sha256:{content.hexdigest()}"
    if templates is not None:
        raise UsageError(f"`templates` are for a FILE.jsonl; got `{name}`")
    return data.load(name, split), f"{name}/{split}"


def _masked(base: Params, mask: Mask, recipe: dict[str, Any]) -> Made:
    return Made(patches.init_sparse(base, mask), recipe, mask)
