"""Adapters of the peft library as patches: LoRA, (IA)^3, SHiRA; and t-few's (IA)^3 files.

A tensor's place in peft is `base_model.model.<module>.<part>`. A torch `Linear` is `[out, in]`, GPT-2's
`Conv1D` `[in, out]`; nothing but axes moves, so a file that is read and written again is the same.
"""

import collections
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fishjax import tree
from fishjax.checkpoint._links import check_links
from fishjax.checkpoint._safetensors import open_file
from fishjax.errors import FileFormatError, StructureError, UsageError
from fishjax.types import Params, Patch

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PARTS = re.compile(
    r"^(?:base_model\.model\.)?(.+?)\."
    r"(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|ia3_l|shira_weight|shira_indices|multi_lora_b)$"
)
_COPY = re.compile(r"^(?:base_model\.model\.)?(.+?)\.base_layer\.weight$")
_PLAIN = re.compile(r"^(?:base_model\.model\.)?(.+)$")


def load_peft(folder: str | Path, model: Any, params: Params) -> Patch:
    """Read an adapter that peft saved, as a patch of `params`.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`; or a .safetensors file with
        t-few's names (`...k.multi_lora_b`), whose vectors on `wi_1` become those of the input of `wo`.
      model: the model that the adapter is for, of `models.load`.
      params: its parameters.

    Raises:
      FileFormatError: a malformed file, or a pickle.
      UsageError: a kind of adapter, or an option, that has no patch here.
      StructureError: tensors that do not fit the model; each is named.

    >>> import tempfile, jax
    >>> from fishjax.checkpoint import save_peft
    >>> from fishjax import models, patches
    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8}
    >>> model = models.build(config | {"n_layer": 1, "n_head": 2, "n_positions": 6})
    >>> params = model.init(jax.random.key(0))
    >>> patch = patches.init_lora(jax.random.key(1), params, rank=2, targets="peft")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_peft(folder, patch, model)
    ...     list(load_peft(folder, model, params))
    ['transformer.h.0.attn.c_attn.weight']
    """
    import jax
    import jax.numpy as jnp

    config, tensors = _read(Path(folder))
    leaves = tree.flatten(params)
    modules: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    patch: dict[str, Any] = {}
    for key, array in tensors.items():
        if copy := _COPY.match(key):  # peft saves an adapted embedding's own rows beside the factors
            base = leaves[_leaf(f"{copy[1]}.weight", leaves, key)]
            if base.shape != array.shape or (np.asarray(base) != array).any():
                raise StructureError(f"the adapter brings `{key}`, which is not the model's; it was resized")
        elif found := _PARTS.match(key):
            modules[found[1]][found[2]] = array
        else:
            from fishjax.patches import Dense

            plain = _PLAIN.match(key)
            patch[_leaf(plain[1] if plain else key, leaves, key)] = Dense(array)
    for module, parts in modules.items():
        module = re.sub(r"\.wi_1$", ".wo", module) if "multi_lora_b" in parts else module
        name = _leaf(f"{module}.weight", leaves, module)
        if name in patch:
            raise StructureError(f"the adapter changes `{name}` twice")
        patch[name] = _entry(name, module, parts, config, model, leaves)
    for name, entry in patch.items():
        if problem := entry.problem(name, leaves):
            raise StructureError(f"the adapter's tensors for `{name}` do not fit the model: {problem}")
    return jax.tree.map(lambda x: x if x.dtype == np.int64 else jnp.asarray(x), patch)


def _entry(name: str, module: str, parts: dict, config: Mapping, model: Any, leaves: Mapping) -> Any:
    """Return the kind that a module's tensors make."""
    from fishjax.patches import LowRank, Scale, Sparse

    weight, have = leaves[name], set(parts)
    conv = is_conv(model, name)
    if any(x.ndim != (1 if n == "shira_weight" else 2) for n, x in parts.items()) or weight.ndim != 2:
        raise StructureError(f"the adapter's tensors for `{module}` must be matrices")
    if have in ({"lora_A.weight", "lora_B.weight"}, {"lora_embedding_A", "lora_embedding_B"}):
        rank = _pattern(config.get("rank_pattern"), module, config.get("r"))
        alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        down, up = (parts[n] for n in sorted(parts))
        if not down.shape[0] == up.shape[1] == rank:
            raise StructureError(
                f"the adapter's rank for `{module}` is {rank} by its config and "
                f"{down.shape[0]} and {up.shape[1]} by its tensors"
            )
        scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        embedding = "lora_embedding_A" in parts
        if embedding:
            refuse_tied(name, model, leaves)
        if conv or embedding:  # [in, out]
            return LowRank(down.T[:, None, :].copy(), up[None].copy(), scale=scale)
        return LowRank(down.T[None].copy(), up[:, None, :].copy(), scale=scale)
    if have in ({"ia3_l"}, {"multi_lora_b"}):
        (vector,) = parts.values()
        if have == {"multi_lora_b"} and name.endswith(".wo.weight"):
            vector = vector.reshape(1, -1)
        out_axis = 1 if conv else 0
        if vector.shape == (weight.shape[out_axis], 1):  # the output, and with it the bias
            bias = f"{name.removesuffix('.weight')}.bias"
            tied = ((bias, tuple(leaves[bias].shape)),) if bias in leaves else ()
            return Scale(vector.T.copy() if conv else vector.copy(), tied=tied)
        if vector.shape == (1, weight.shape[1 - out_axis]):
            return Scale(vector.T.copy() if conv else vector.copy())
        raise StructureError(
            f"the adapter's vector for `{module}` is {list(vector.shape)}, which fits neither side of "
            f"a weight {list(weight.shape)}"
        )
    if have == {"shira_weight", "shira_indices"}:
        delta, (rows, columns) = parts["shira_weight"], parts["shira_indices"].astype(np.int64)
        if (rows.size and not (0 <= rows.min() <= rows.max() < weight.shape[0])) or (
            columns.size and not (0 <= columns.min() <= columns.max() < weight.shape[1])
        ):
            raise StructureError(
                f"the adapter's indices for `{module}` leave its weight {list(weight.shape)}"
            )
        flat = rows * weight.shape[1] + columns
        order = np.argsort(flat)
        base = np.asarray(weight).reshape(-1)[flat[order]].astype(tree.wide_dtype(weight.dtype))
        dtype = np.int64 if weight.size > np.iinfo(np.int32).max else np.int32
        return Sparse(flat[order].astype(dtype), base + delta[order].astype(base.dtype))
    raise StructureError(
        f"the adapter's tensors for `{module}` are {sorted(have)}, which make no kind of patch"
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if path.is_file():
        file, config = path, {"peft_type": "IA3"}
    else:
        file = path / TENSORS
        if not (path / CONFIG).is_file():
            raise UsageError(f"`{path}` holds no adapter: it has no `{CONFIG}`")
        check_links(path)
        if not file.exists() and (path / "adapter_model.bin").exists():
            raise FileFormatError(
                f"`{path / 'adapter_model.bin'}` is a pickle, which can run code and is not read; "
                "save the adapter as safetensors where you trust it"
            )
        try:
            config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        except ValueError as error:
            raise FileFormatError(f"`{path / CONFIG}` is not JSON: {error}") from None
        if not isinstance(config, dict):
            raise FileFormatError(f"`{path / CONFIG}` must hold a JSON object")
    if config.get("peft_type") not in ("LORA", "IA3", "SHIRA"):
        raise UsageError(
            f"`{path}` is a `{config.get('peft_type')}` adapter; LORA, IA3 and SHIRA are read here"
        )
    if config["peft_type"] == "LORA":
        _check_numbers(path, config)
    init = str(config.get("init_lora_weights", True)).lower()
    odd = [
        n for n in ("use_dora", "lora_bias", "layer_replication", "alora_invocation_tokens") if config.get(n)
    ]
    odd += [f"init_lora_weights={init}"] * init.startswith(("pissa", "olora", "corda", "loftq"))
    if odd:
        raise UsageError(
            f"`{path}` uses {', '.join(f'`{n}`' for n in odd)}, which changes more than a product of factors "
            "added to the base; convert it to plain LoRA with peft"
        )
    with open_file(file) as tensors:
        return config, {n: np.array(tensors[n]) for n in tensors}


def _check_numbers(path: Path, config: Mapping[str, Any]) -> None:
    """Raise unless ranks and alphas are numbers, by regexes that cannot run for long."""
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise FileFormatError(f"`{path / CONFIG}`: `{field}` must be an object; got {patterns!r:.60}")
        for pattern in patterns:
            # A repeated group, or many repetitions, can take exponential time; no adapter needs them.
            slow = re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4
            try:
                re.compile(pattern)
            except re.error:
                slow = True
            if slow or len(pattern) > 500:
                raise FileFormatError(
                    f"`{path / CONFIG}`: `{field}` has the pattern {pattern!r:.80}, not taken"
                )
    numbers = [config.get("r"), config.get("lora_alpha", 8)]
    numbers += [x for f in ("rank_pattern", "alpha_pattern") for x in (config.get(f) or {}).values()]
    if not all(type(x) in (int, float) and math.isfinite(x) for x in numbers):
        raise FileFormatError(f"`{path / CONFIG}`: ranks and alphas must be numbers; got {numbers!r:.80}")


def _leaf(name: str, leaves: Mapping, what: str) -> str:
    """Return the leaf that peft calls `name`; a file's names may lack the class's prefix."""
    for candidate in (name, name.partition(".")[2]):
        if candidate in leaves:
            return candidate
    raise StructureError(f"the adapter changes `{what}`, which the model does not have")


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first regex that matches the end of a module's name, as peft does."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def is_conv(model: Any, name: str) -> bool:
    """Say whether a weight is stored `[in, out]`."""
    return model.family == "gpt2" and re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name) is not None


def is_embedding(name: str) -> bool:
    """Say whether a weight is a table of rows."""
    return re.search(r"(^|\.)(shared|embed_tokens|wte|wpe|\w*_embeddings)\.weight$", name) is not None


def refuse_tied(name: str, model: Any, leaves: Mapping) -> None:
    """Raise if an embedding is the output layer too: peft adapts one use of it, a patch both."""
    if model.generate is not None and "lm_head.weight" not in leaves and not name.endswith("wpe.weight"):
        raise UsageError(
            f"`{name}` is the output layer too; peft adapts only its use as an embedding, a patch both"
        )
