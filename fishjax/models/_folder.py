"""A model folder: config.json beside safetensors or Orbax; checked, mapped, placed."""

import contextlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fishjax.errors import FishjaxError, StructureError, UsageError
from fishjax.models._model import WRONG_TYPES, Model, build
from fishjax.types import Params


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
        try:
            model = build(config, specs.keys())
        except FishjaxError as error:
            raise type(error)(f"`{folder / 'config.json'}`: {error}") from None
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


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of a config.json."""
    from fishjax.checkpoint._config import read_json

    folder = path.parent
    if not folder.is_dir():
        raise UsageError(
            f"`{folder}` is not a folder; a model is loaded from a local folder with a config.json, "
            "nothing is downloaded"
        )
    if not path.is_file():
        raise UsageError(f"`{folder}` has no config.json, so its architecture is not known")
    return read_json(path)


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
    except FishjaxError as error:
        raise type(error)(f"`{where}`: {error}") from None
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
