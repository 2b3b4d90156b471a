"""Sharding rules of each model family that `models` reads, by the leaf names of its checkpoints.

"tensor" divides heads and inner activations, as Megatron does (arXiv 1909.08053): what makes them is
divided by its outputs, what takes them by its inputs, so a block needs one sum over the axis after
attention and one after the feed-forward layer. "fsdp" divides the other dimension (ZeRO stage 3, arXiv
1910.02054). Layouts are the file's: a torch `Linear` is `[out, in]`, GPT-2's `Conv1D` `[in, out]`.
"""

import difflib
import re
import warnings

import jax
from jax.sharding import PartitionSpec

from fishjax import models, tree
from fishjax.errors import UsageError
from fishjax.mesh._shard import AnyMesh, SpecRules, shardings

AXES = ("data", "fsdp", "tensor", "stage")  # what families' rules, batches and pipelines are divided over

Family = list[tuple[str, tuple[str | None, ...]]]

_T, _F = "tensor", "fsdp"
_OUT = (_T, _F)  # [out, in]: divided by its outputs, [V, D]: by its rows
_IN = (_F, _T)  # [out, in]: divided by its inputs

_LLAMA: Family = [
    (r"\.(q|k|v|gate|up)_proj\.weight$", _OUT),
    (r"\.(q|k|v|gate|up)_proj\.bias$", (_T,)),
    (r"\.(o|down)_proj\.weight$", _IN),
    (r"embed_tokens\.weight$|^lm_head\.weight$", _OUT),
]
_BERT: Family = [
    (r"\.(query|key|value|intermediate\.dense)\.weight$", _OUT),
    (r"\.(query|key|value|intermediate\.dense)\.bias$", (_T,)),
    (r"\.output\.dense\.weight$", _IN),
    (r"word_embeddings\.weight$", _OUT),
    (r"_embeddings\.weight$", (None, _F)),
    (r"(dense|out_proj|classifier)\.weight$", (None, _F)),
]
FAMILIES: dict[str, Family] = {
    "t5": [
        (r"\.(q|k|v|wi|wi_0|wi_1)\.weight$", _OUT),
        (r"\.(o|wo)\.weight$", _IN),
        (r"^(shared|lm_head)\.weight$", _OUT),
        (r"relative_attention_bias\.weight$", (None, _T)),
    ],
    "bert": _BERT,
    "roberta": _BERT,
    "bloom": [
        (r"\.(query_key_value|dense_h_to_4h)\.weight$", _OUT),
        (r"\.(query_key_value|dense_h_to_4h)\.bias$", (_T,)),
        (r"\.(dense|dense_4h_to_h)\.weight$", _IN),
        (r"word_embeddings\.weight$|^lm_head\.weight$", _OUT),
    ],
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA,
    "gpt2": [
        (r"\.(c_attn|c_fc)\.weight$", (_F, _T)),
        (r"\.(c_attn|c_fc)\.bias$", (_T,)),
        (r"\.c_proj\.weight$", (_T, _F)),
        (r"wte\.weight$|^lm_head\.weight$", _OUT),
        (r"wpe\.weight$", (None, _F)),
    ],
    "fishjax_digits": [
        (r"\.(query|key|value)\.kernel$", (_F, _T)),
        (r"\.(query|key|value)\.bias$", (_T,)),
        (r"attention\.output\.kernel$", (_T, None, _F)),
        (r"mlp_in\.kernel$", (_F, _T)),
        (r"mlp_in\.bias$", (_T,)),
        (r"mlp_out\.kernel$", (_T, _F)),
    ],
}


def rules(model: models.Model, mesh: AnyMesh) -> SpecRules:
    """Return the sharding rules of a model's family for the axes of a mesh.

    Stacked leaves (`models.scanned`) have their blocks on "stage". Norms and what else is small is
    replicated; a warning names an axis that divides no leaf at all.

    Raises:
      UsageError: a family that has no rules; an axis of another name than "data", "fsdp", "tensor" and
        "stage", or "stage" where blocks are not stacked: it would divide nothing.

    >>> from jax.sharding import AbstractMesh
    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8}
    >>> model = models.build(config | {"n_layer": 1, "n_head": 2, "n_positions": 6})
    >>> tuple(rules(model, AbstractMesh((4,), ("tensor",)))[0][1])  # [in, out]
    (None, 'tensor')
    """
    if model.family not in FAMILIES:
        known = ", ".join(f"`{f}`" for f in FAMILIES)
        raise UsageError(f"`{model.family}` has no sharding rules; they are known for {known}. Pass your own")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    names = tree.names(shapes)
    _check_axes(mesh, names)
    here = lambda spec: PartitionSpec(*(a if a in mesh.shape else None for a in spec))
    found = FAMILIES[model.family]
    # Stacked leaves (`models.scanned`), `... .*. ...`, have the blocks as their first axis.
    both = [(rf"^(?=.*\*\.)(?=.*(?:{p}))", ("stage", *spec)) for p, spec in found] + found
    # A family's rules are for all its checkpoints: tied or not, with biases or without.
    used = [(p, here(spec)) for p, spec in both if any(re.search(p, n) for n in names)]
    chosen = [*used, ("", PartitionSpec())]
    where = [a for s in shardings(shapes, chosen, mesh).values() for a in s.spec]
    if idle := [a for a in AXES[1:] if mesh.shape.get(a, 1) > 1 and a not in where]:
        axes = ", ".join(f"`{a}` ({mesh.shape[a]})" for a in idle)
        warnings.warn(
            f"{axes} divides no leaf of this `{model.family}`: the devices along it all hold the same",
            stacklevel=2,
        )
    return chosen


def _check_axes(mesh: AnyMesh, names: list[str]) -> None:
    """Raise where the name of an axis tells that it divides nothing."""
    for axis in mesh.shape:
        if axis not in AXES:
            near = difflib.get_close_matches(axis, AXES, n=2) or AXES
            raise UsageError(
                f"`{axis}` is no axis that parameters or examples are divided over; near names: "
                + ", ".join(f"`{a}`" for a in near)
                + ". Rename it, or pass rules of your own"
            )
    if "stage" in mesh.shape and not any(".*." in n for n in names):
        raise UsageError(
            "`stage` divides stacked blocks (`models.scanned`), or those of `mesh.pipelined`, which takes no "
            'rules; these blocks are not stacked. Use "data", "fsdp" or "tensor"'
        )
