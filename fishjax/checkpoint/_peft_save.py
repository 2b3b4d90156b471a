"""Patches as adapters that the peft library loads: the inverse of `load_peft`."""

import collections
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fishjax import tree
from fishjax.checkpoint._atomic import atomic_file, write_all
from fishjax.checkpoint._dtypes import Spec, host
from fishjax.checkpoint._peft import CONFIG, TENSORS, is_conv, is_embedding, refuse_tied
from fishjax.checkpoint._safetensors import write_file
from fishjax.errors import UsageError
from fishjax.types import Params, Patch

# The bare names of a family's files lack what its class in transformers puts in front.
_CLASS_PREFIX = {"gpt2": "transformer.", "bloom": "transformer."}
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
}


def save_peft(folder: str | Path, patch: Patch, model: Any, *, params: Params | None = None) -> None:
    """Write a patch as an adapter that peft loads.

    Args:
      folder: made if need be.
      patch: low-rank entries (LoRA), scales ((IA)^3) or sparse ones (SHiRA: r (m + n) entries in every
        weight [m, n], with one r for all), and whole replaced modules beside any of them.
      model: the model that the patch is for.
      params: the base; needed for sparse entries only, whose differences peft stores.

    Raises:
      UsageError: a patch that peft has no adapter for, with the reason; nothing is written.

    >>> import tempfile, jax
    >>> from fishjax import models, patches
    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8}
    >>> model = models.build(config | {"n_layer": 1, "n_head": 2, "n_positions": 6})
    >>> params = model.init(jax.random.key(0))
    >>> patch = patches.init_lora(jax.random.key(1), params, rank=2, targets="peft")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_peft(folder, patch, model)
    ...     sorted(p.name for p in Path(folder).iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    import jax

    shapes = tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    tensors: dict[str, np.ndarray] = {}
    config, whole = _save_entries(patch, model, shapes, tensors, params)
    if whole:
        config["modules_to_save"] = _save_modules(whole, model, shapes, tensors)
    architecture = next(iter(model.config.get("architectures") or []), "")
    task = next((t for end, t in _TASKS.items() if architecture.endswith(end)), None)
    if task == "SEQ_CLS" and "classifier" not in config.get("modules_to_save", ()):
        task = None  # for this task peft expects a classifier in every adapter
    config |= {"base_model_name_or_path": None, "inference_mode": True, "task_type": task}

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{n}": np.ascontiguousarray(x) for n, x in tensors.items()}
    specs = {n: Spec(x.dtype, x.shape) for n, x in tensors.items()}
    write_file(folder / TENSORS, specs, tensors.__getitem__, {"format": "pt"})
    with atomic_file(folder / CONFIG) as fd:  # last: without it the folder is no adapter
        write_all(fd, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")


def _save_entries(
    patch: Patch, model: Any, shapes: Mapping, tensors: dict, params: Params | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fill `tensors`; return the config, and the entries that replace whole leaves."""
    from fishjax.patches import Dense, LowRank, Scale, Sparse

    whole = {n: e for n, e in patch.items() if isinstance(e, Dense)}
    rest = {n: e for n, e in patch.items() if n not in whole}
    kinds = {type(e) for e in rest.values()}
    if len(kinds) != 1 or not kinds <= {LowRank, Scale, Sparse}:
        names = ", ".join(sorted(k.__name__ for k in kinds)) or "no"
        raise UsageError(
            f"a peft adapter holds low-rank, scale or sparse entries, one kind of them; got {names}"
        )
    for name in rest:
        if name not in shapes or not name.endswith(".weight") or len(shapes[name].shape) != 2:
            raise UsageError(f"peft adapts matrices that are the `weight` of a module; `{name}` is none")
    write = {LowRank: _save_lora, Scale: _save_ia3, Sparse: _save_shira}[kinds.pop()]
    config = write(rest, model, shapes, tensors, params)
    config["fan_in_fan_out"] = any(is_conv(model, n) for n in rest)
    return config, whole


def _save_lora(patch: Patch, model: Any, shapes: Mapping, tensors: dict, params: Any) -> dict[str, Any]:
    ranks, alphas = {}, {}
    for name, entry in patch.items():
        module, rank = _module(name, model), entry.a.shape[-1]
        if is_embedding(name):
            refuse_tied(name, model, shapes)
        transposed = is_conv(model, name) or is_embedding(name)
        rows, columns = shapes[name].shape
        in_axis = 0 if transposed else 1
        wanted = (rows, 1, rank) if in_axis == 0 else (1, columns, rank)
        if tuple(entry.a.shape) != wanted:
            raise UsageError(
                f"peft's A factor is on the input axis; `{name}` has A {list(entry.a.shape)} for a weight "
                f"{[rows, columns]}, whose input axis is {in_axis}: make the patch with the preset targets"
            )
        part = (
            ("lora_embedding_A", "lora_embedding_B")
            if is_embedding(name)
            else ("lora_A.weight", "lora_B.weight")
        )
        tensors[f"{module}.{part[0]}"] = host(name, entry.a).reshape(-1, rank).T
        tensors[f"{module}.{part[1]}"] = host(name, entry.b).reshape(-1, rank)
        ranks[module], alphas[module] = rank, entry.scale * rank
    r, alpha = (collections.Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))
    number = lambda x: int(x) if x == int(x) else x
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": number(alpha),
        "target_modules": sorted(ranks),
        "rank_pattern": {re.escape(m): x for m, x in ranks.items() if x != r},
        "alpha_pattern": {re.escape(m): number(x) for m, x in alphas.items() if x != alpha},
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _save_ia3(patch: Patch, model: Any, shapes: Mapping, tensors: dict, params: Any) -> dict[str, Any]:
    outputs: list[str] = []
    inputs: list[str] = []
    for name, entry in patch.items():
        module, conv = _module(name, model), is_conv(model, name)
        vector = host(name, entry.factor)  # ones for queries that are not scaled
        vector = vector.T if conv else vector
        bias, tied = f"{name.removesuffix('.weight')}.bias", {n for n, _ in entry.tied}
        is_output = vector.shape == (shapes[name].shape[1 if conv else 0], 1)
        if not is_output and vector.shape[0] != 1:
            raise UsageError(f"(IA)^3 scales one side of a weight; `{name}` has {list(vector.shape)}")
        if tied != ({bias} & set(shapes) if is_output else set()):
            raise UsageError(
                f"peft scales a bias with its output and only then; the patch of `{name}` does not"
            )
        (outputs if is_output else inputs).append(module)
        tensors[f"{module}.ia3_l"] = vector
    return {
        "peft_type": "IA3",
        "target_modules": sorted(outputs + inputs),
        "feedforward_modules": sorted(inputs),
        "init_ia3_weights": True,
    }


def _save_shira(patch: Patch, model: Any, shapes: Mapping, tensors: dict, params: Any) -> dict[str, Any]:
    if params is None:
        raise UsageError("peft's SHiRA stores differences from the base; give `params`")
    leaves, ranks = tree.flatten(params), {}
    for name, entry in patch.items():
        rows, columns = shapes[name].shape
        ranks[name], odd = divmod(entry.indices.size, rows + columns)
        if odd or not ranks[name] or is_conv(model, name) or is_embedding(name):
            raise UsageError(
                f"peft's SHiRA changes r (m + n) entries of a linear layer's weight [m, n]; `{name}` "
                f"{[rows, columns]} has {entry.indices.size}: mask each leaf by itself"
            )
        where = host(name, entry.indices).astype(np.int64)
        wide = tree.wide_dtype(leaves[name].dtype)
        base = np.asarray(leaves[name]).reshape(-1)[where].astype(wide)
        module = _module(name, model)
        tensors[f"{module}.shira_weight"] = host(name, entry.values).astype(wide) - base
        tensors[f"{module}.shira_indices"] = np.stack([where // columns, where % columns]).astype(np.int32)
    if len(set(ranks.values())) > 1:
        raise UsageError(f"peft's SHiRA has one r for all weights; got {sorted(set(ranks.values()))}")
    return {
        "peft_type": "SHIRA",
        "r": next(iter(ranks.values())),
        "mask_type": "random",
        "target_modules": sorted(_module(n, model) for n in ranks),
    }


def _save_modules(whole: Mapping, model: Any, shapes: Mapping, tensors: dict) -> list[str]:
    """Add modules that are replaced whole to `tensors`; return their names, each the largest there is."""
    modules = set()
    for name in whole:
        tensors[class_name(name, model)] = host(name, whole[name].values)
        parts = name.split(".")
        for end in range(1, len(parts)):
            below = [n for n in shapes if n.startswith(".".join(parts[:end]) + ".")]
            if all(n in whole for n in below):
                modules.add(class_name(".".join(parts[:end]), model))
                break
        else:
            left = min(n for n in below if n not in whole)
            raise UsageError(f"peft saves whole modules; the patch replaces `{name}` and not `{left}`")
    return sorted(modules)


def class_name(name: str, model: Any) -> str:
    """Return what a leaf or module of this name is called in the family's class in transformers."""
    prefix = _CLASS_PREFIX.get(model.family, "")
    return name if name.startswith((prefix, "lm_head")) else prefix + name


def _module(name: str, model: Any) -> str:
    return class_name(name.rpartition(".")[0], model)
