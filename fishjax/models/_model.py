"""What a model is here: pure functions over a parameter tree that is the checkpoint file."""

import contextlib
import functools
import importlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from fishjax.errors import FileFormatError, FishjaxError, StructureError, UsageError
from fishjax.types import Array, Batch, Example, LogitsFn, LossFn, Params, TokenMask

# A family is one file with `build(config, names) -> Model`: `config` is the content of config.json,
# `names` the tensor names in the checkpoint (None when there is no checkpoint yet).
FAMILIES: dict[str, str] = {
    "t5": "fishjax.models._t5",
    "bert": "fishjax.models._bert",
    "roberta": "fishjax.models._bert",
    "bloom": "fishjax.models._bloom",
    "llama": "fishjax.models._llama",
    "mistral": "fishjax.models._llama",
    "qwen2": "fishjax.models._llama",
    "qwen3": "fishjax.models._llama",
    "gemma2": "fishjax.models._llama",
    "gpt2": "fishjax.models._gpt2",
    "fishjax_digits": "fishjax.models._digits",
}


# What a config.json with strings for numbers, lists for objects and the like runs into.
WRONG_TYPES = (TypeError, ValueError, AttributeError, KeyError, IndexError, ArithmeticError)


class Model(NamedTuple):
    """A family's pure functions for one config; nothing here holds parameters.

    Parameters may be leaves that are no arrays (`leaves.quantise`), in all functions.

    Fields:
      family: the `model_type` of config.json.
      config: the content of config.json.
      init: `init(key) -> params`, random, named and laid out as in the checkpoint.
      apply: `apply(params, batch) -> logits`: `[B, T, V]`, `[B, C]`, or hidden states of a bare encoder.
      generate: `generate(params, batch, *, max_new_tokens, temperature=0., key=None, patch=None)
        -> int32 [B, max_new_tokens]`, under a patch that is not folded, or one for each prompt of
        `patches.select`; None where the model has no decoder.
      labels: one example -> int `[T]` or `[]`: what the logits of this example are compared to;
        None where `apply` does not return logits.
      token_mask: one example -> bool `[T]`: which of the `labels` count; None for classifiers.
      blocks: dotted names of the repeated parts, in the order in which they run.
      runs: the same names in the same order; blocks that follow each other and differ in nothing but their
        parameters are together (`scanned`).
      embed: `embed(params, batch) -> carry`, needs the parameters outside of the blocks only
        (and T5's tables of relative positions, which the file keeps in the first blocks).
      block: `block(name, params of this block, carry) -> carry`; where the carry of a decoder holds a
        dict `cache`, keys and values are read from it and remembered in it.
      head: `head(params, carry) -> logits`, needs the parameters outside of the blocks only.
      ignored: regex of tensor names that are no parameters (stored buffers); they are not loaded.
    """

    family: str
    config: dict[str, Any]
    init: Callable[[Array], Params]
    apply: Callable[[Params, Batch], Array]
    generate: Callable[..., Array] | None = None
    labels: Callable[[Example], Array] | None = None
    token_mask: TokenMask | None = None
    blocks: tuple[str, ...] = ()
    runs: tuple[tuple[str, ...], ...] = ()
    embed: Callable[..., Any] | None = None
    block: Callable[..., Any] | None = None
    head: Callable[..., Any] | None = None
    ignored: str | None = None


def build(config: dict[str, Any], names: Collection[str] | None = None) -> Model:
    """Return the model that a config.json describes; the same one for the same config.

    What was compiled for one folder's functions therefore serves another folder of the same config.

    Args:
      config: the content of config.json; `model_type` picks the family.
      names: tensor names in the checkpoint, where there is one: they tell heads, prefixes and ties.

    Raises:
      UsageError: an architecture that is not known here.

    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8}
    >>> model = build(config | {"n_layer": 1, "n_head": 2, "n_positions": 6})
    >>> model.blocks
    ('transformer.h.0',)
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join(f"`{f}`" for f in FAMILIES)
        raise UsageError(f"`model_type` must be one of {known}; got `{family}`")
    return _build(json.dumps(config, sort_keys=True), None if names is None else frozenset(names))


@functools.lru_cache(maxsize=8)
def _build(text: str, names: frozenset[str] | None) -> Model:
    config = json.loads(text)
    family = config["model_type"]
    builder = importlib.import_module(FAMILIES[family]).build
    try:
        return _on_leaves(builder(config, names))
    except FishjaxError:
        raise
    except WRONG_TYPES as error:
        raise FileFormatError(
            f"config.json of a `{family}` has an entry of a wrong kind: {error!r:.200}"
        ) from None


def _on_leaves(model: Model) -> Model:
    """Make a family's functions take parameters that are leaves."""
    import jax

    from fishjax import leaves

    jitted = jax.jit(leaves.interpret(model.apply))

    def apply(params: Params, batch: Batch) -> Array:
        with_leaves = any(map(leaves.is_leaf, jax.tree.leaves(params, is_leaf=leaves.is_leaf)))
        return (jitted if with_leaves else model.apply)(params, batch)

    parts: dict[str, Any] = {
        n: leaves.interpret(fn) for n in ("embed", "block", "head") if (fn := getattr(model, n))
    }
    return model._replace(apply=apply, **parts)


def load(
    folder: str | Path, *, dtype: Any = None, shardings: Any = None, quantise: Any = None
) -> tuple[Model, Params]:
    """Read a model folder (config.json beside safetensors) into a model and its parameters.

    Tensors are mapped, cast and placed one after another, so little more than the model is held.

    Args:
      folder: a local folder in Hugging Face's layout; nothing is looked up on a network.
      dtype: cast the parameters to this floating dtype; None keeps each tensor's own.
      shardings: where each leaf goes, `{name: jax.sharding.Sharding}`, one sharding for all, or a function
        `(model, shapes) -> {name: Sharding}`. Each process of several reads its own parts.
      quantise: "int8", "int4", "nf4" or rules, as for `leaves.quantise`; of what is quantised one tensor at
        a time is held in floats.

    Raises:
      UsageError: no such folder, no config.json, or an unknown architecture; a wrong `quantise`.
      FileFormatError: a malformed file.
      StructureError: missing, extra or wrongly shaped tensors, each named.

    >>> import tempfile, jax
    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8}
    >>> model = build(config | {"n_layer": 1, "n_head": 2, "n_positions": 6})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, model, model.init(jax.random.key(0)))
    ...     model, params = load(folder)
    >>> model.generate(params, {"input_ids": [[3, 1, 4]]}, max_new_tokens=2).shape
    (1, 2)
    """
    import jax

    from fishjax import checkpoint, leaves, tree
    from fishjax.checkpoint._links import check_links
    from fishjax.checkpoint._orbax import is_orbax, load_orbax, orbax_specs

    folder = Path(folder)
    if folder.is_dir():
        check_links(folder)
    config = read_config(folder / "config.json")
    if (folder / "generation_config.json").is_file():  # where chat models list all that ends an answer
        generation = read_config(folder / "generation_config.json")
        special = ("eos_token_id", "pad_token_id", "decoder_start_token_id")
        config |= {n: generation[n] for n in special if generation.get(n) is not None}
    with contextlib.ExitStack() as stack:
        if orbax := is_orbax(folder):
            specs = orbax_specs(folder)
        else:
            found: Any = stack.enter_context(checkpoint.open_params(folder))
            specs = found.specs
        model = build(config, specs.keys())
        kept = [n for n in specs if not (model.ignored and re.search(model.ignored, n))]
        check_params(model, {n: specs[n] for n in kept}, folder)
        if callable(shardings):
            shardings = shardings(model, jax.eval_shape(model.init, jax.random.key(0)))
        if orbax:
            found = tree.flatten(load_orbax(folder, kept, dtype=dtype, shardings=shardings))

        make = None if quantise is None else leaves.quantiser(quantise, {n: specs[n] for n in kept})
        here: Any = jax.config
        wide, device = here.jax_enable_x64, here.jax_default_device  # each thread has its own

        def place(name: str) -> Any:
            leaf = found.pop(name) if orbax else found[name]
            leaf = leaf if dtype is None else leaf.astype(jax.numpy.dtype(dtype))
            where = shardings.get(name) if isinstance(shardings, Mapping) else shardings
            with jax.enable_x64(wide), jax.default_device(device):
                if where is not None and not where.is_fully_addressable:
                    leaf = jax.make_array_from_callback(leaf.shape, where, leaf.__getitem__)
                else:
                    leaf = jax.device_put(leaf, where)
                if make is not None:
                    leaf = make(name, leaf)
                    if leaves.is_leaf(leaf) and isinstance(where, jax.sharding.NamedSharding):
                        leaf = jax.device_put(leaf, leaf.shardings(where))
                return jax.block_until_ready(leaf)  # before the next one is mapped

        # One copies while the other takes new memory; floats that are quantised come one by one.
        with ThreadPoolExecutor(2 if make is None else 1) as pool:
            return model, tree.nest(dict(zip(kept, pool.map(place, kept), strict=True)))


def save(folder: str | Path, model: Model, params: Params) -> None:
    """Write config.json and model.safetensors into a folder that `load` and transformers read.

    Raises:
      StructureError: parameters that do not fit the model; nothing is written.

    >>> import tempfile, jax, os
    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8}
    >>> model = build(config | {"n_layer": 1, "n_head": 2, "n_positions": 6})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, model, model.init(jax.random.key(0)))
    ...     sorted(os.listdir(folder))
    ['config.json', 'model.safetensors']
    """
    from fishjax import checkpoint, tree

    folder = Path(folder)
    check_params(model, tree.flatten(params), "params")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_params(folder / "model.safetensors", params)
    part = folder / "config.json.partial"
    part.write_text(json.dumps(model.config, indent=2, sort_keys=True) + "\n")
    part.replace(folder / "config.json")


def example_loss(model: Model) -> LossFn:
    """Return the loss of ONE example in nats: -log p(labels | inputs), summed over its tokens.

    A label of -100 does not count. Without `labels`, a causal language model predicts `input_ids`.

    Raises:
      UsageError: a model without a head that predicts labels.

    >>> import jax, jax.numpy as jnp
    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8}
    >>> model = build(config | {"n_layer": 1, "n_head": 2, "n_positions": 6})
    >>> params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
    >>> loss = example_loss(model)(params, {"input_ids": jnp.array([3, 1, 4])})
    >>> round(float(jnp.exp(loss / 2)))  # two next tokens, each one of 11
    11
    """
    import jax
    import jax.numpy as jnp

    from fishjax import tree

    logits_fn, labels_fn, mask_fn = example_logits(model), model.labels, model.token_mask
    assert labels_fn is not None

    def loss(params: Params, example: Example) -> Array:
        logits = logits_fn(params, example)
        log_p = jax.nn.log_softmax(logits.astype(tree.wide_dtype(logits.dtype)))
        labels = labels_fn(example)
        keep = jnp.full(labels.shape, True) if mask_fn is None else mask_fn(example)
        picked = jnp.take_along_axis(log_p, jnp.where(keep, labels, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(keep, picked, 0))

    return loss


def example_logits(model: Model) -> LogitsFn:
    """Return the logits of ONE example: `[C]`, or `[T, V]` of which `model.token_mask` counts some.

    Raises:
      UsageError: a model without a head that predicts labels.

    >>> import jax, jax.numpy as jnp
    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8}
    >>> model = build(config | {"n_layer": 1, "n_head": 2, "n_positions": 6})
    >>> params, example = model.init(jax.random.key(0)), {"input_ids": jnp.array([3, 1, 4])}
    >>> example_logits(model)(params, example).shape, model.token_mask(example)
    ((3, 11), Array([ True,  True, False], dtype=bool))
    """
    import jax

    if model.labels is None:
        raise UsageError(
            f"this `{model.family}` model has no head that predicts labels, so it has no loss and no logits; "
            "load a checkpoint with a language-model or classification head"
        )

    def logits(params: Params, example: Example) -> Array:
        return model.apply(params, jax.tree.map(lambda x: x[None], example))[0]

    return logits


def in_order(embed: Callable, block: Callable, head: Callable, blocks: Collection[str]) -> Callable:
    """Return `apply(params, batch)`: what embeds, one block after another, the head."""

    def apply(params: Params, batch: Batch) -> Array:
        carry = embed(params, batch)
        for name in blocks:
            carry = block(name, subtree(params, name), carry)
        return head(params, carry)

    return apply


def subtree(params: Params, name: str) -> Params:
    """Return the part of a nested dict below a dotted name."""
    for part in name.split("."):
        params = params[part]
    return params


def end_ids(config: dict[str, Any]) -> list[int]:
    """Return the tokens after which a sequence has ended; a config names none, one or several."""
    ends = config.get("eos_token_id")
    return [] if ends is None else list(ends) if isinstance(ends, list) else [ends]


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of a config.json."""
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(
            f"`{folder}` is not a folder; a model is loaded from a local folder with a config.json, "
            "nothing is downloaded"
        )
    if not path.is_file():
        raise UsageError(f"`{folder}` has no config.json, so its architecture is not known")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"`{path}` is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise FileFormatError(f"`{path}` must hold a JSON object; got {type(config).__name__}")
    return config


def check_params(model: Model, flat: dict[str, Any], where: Any) -> None:
    """Raise unless tensors have exactly the names and shapes of the model's parameters."""
    import jax

    from fishjax import tree

    branches = {n[: i + 1] for n in flat for i, c in enumerate(n) if c == "."}
    if absent := [b for b in model.blocks if f"{b}." not in branches]:
        raise StructureError(
            f"`{where}` does not fit `{model.family}` as config.json describes it; missing: "
            f"all of `{absent[0]}`" + (f" and {len(absent) - 1} more blocks" if len(absent) > 1 else "")
        )
    try:
        wanted = tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    except FishjaxError:
        raise
    except WRONG_TYPES as error:  # sizes that do not go together
        first = f"{type(error).__name__} {error}".splitlines()[0][:200]
        raise StructureError(
            f"`{where}`: config.json describes no `{model.family}` that can be built: {first}"
        ) from None
    missing, extra = sorted(wanted.keys() - flat.keys()), sorted(flat.keys() - wanted.keys())
    wrong = [
        f"`{n}` {list(flat[n].shape)} where {list(x.shape)} is wanted"
        for n, x in wanted.items()
        if n in flat and tuple(flat[n].shape) != tuple(x.shape)
    ]
    faults = {
        "missing": [f"`{n}`" for n in missing],
        "not of this model": [f"`{n}`" for n in extra],
        "wrong shape": wrong,
    }
    if any(faults.values()):
        text = "; ".join(
            f"{kind}: {', '.join(some[:4])}" + (f" and {len(some) - 4} more" if len(some) > 4 else "")
            for kind, some in faults.items()
            if some
        )
        raise StructureError(f"`{where}` does not fit `{model.family}` as config.json describes it; {text}")
