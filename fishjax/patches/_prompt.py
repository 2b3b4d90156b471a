"""Prompt tuning: trained embeddings before every input (arXiv 2104.08691), as rows of the embedding.

Parameters keep their shapes here, so the soft prompt takes the rows of ids that no text has (T5's extra
ids, BERT's unused ones, a vocabulary's padding), and inputs begin with those ids. It is then a sparse
patch like any other: to be saved, vetted, merged. Where the output layer is the same table, the logits of
these ids change too.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from fishjax import tree
from fishjax.errors import UsageError
from fishjax.patches._sparse import Sparse
from fishjax.types import Batch, Params

_TABLE = r"(^|\.)(shared|embed_tokens|wte|word_embeddings)\.weight$"


def init_prompt(
    params: Params, *, ids: Sequence[int], like: Sequence[int] | None = None, table: str = _TABLE
) -> dict[str, Sparse]:
    """Start a patch that trains the embeddings of a few ids, to be put before inputs by `prompted`.

    Args:
      params: the base.
      ids: int `[k]`, distinct; ids that occur in no text.
      like: int `[k]`, tokens whose embeddings to start from; by default the ids' own, which changes nothing.
      table: regex of the embedding's name, rows first.

    Raises:
      UsageError: the regex matches no leaf or several, or an id is out of range or given twice.

    References: Lester et al. 2021, arXiv 2104.08691, section 2.

    >>> params = {"wte": {"weight": jnp.arange(8.0).reshape(4, 2)}}
    >>> patch = init_prompt(params, ids=[3, 2], like=[0, 1])
    >>> patch["wte.weight"].indices.tolist(), patch["wte.weight"].values.tolist()
    ([4, 5, 6, 7], [2.0, 3.0, 0.0, 1.0])
    """
    flat = tree.flatten(params)
    names = sorted(tree.select(table, flat))
    if len(names) != 1:
        raise UsageError(f"`table` must match one embedding; got {names}")
    rows = flat[names[0]]
    here, there = np.asarray(ids, np.int64), np.asarray(ids if like is None else like, np.int64)
    if here.ndim != 1 or not here.size or here.shape != there.shape or np.unique(here).size != here.size:
        raise UsageError(f"`ids` must be distinct, and `like` as many; got {ids} and {like}")
    for odd in (*here, *there):
        if not 0 <= odd < rows.shape[0]:
            raise UsageError(f"ids must lie in [0, {rows.shape[0] - 1}], the rows of `{names[0]}`; got {odd}")
    if rows.size > np.iinfo(np.int32).max:
        raise UsageError(f"`{names[0]}` has {rows.size} entries; sparse patches hold at most 2^31 - 1")
    order = np.argsort(here)
    places = here[order, None] * rows.shape[1] + np.arange(rows.shape[1])
    values = np.asarray(rows)[there[order]].reshape(-1)
    return {names[0]: Sparse(jnp.asarray(places.reshape(-1), jnp.int32), jnp.asarray(values))}


def prompted(batch: Batch, ids: Sequence[int], *, causal: bool) -> Batch:
    """Return a batch whose inputs begin with the prompt's ids.

    Args:
      batch: `input_ids` `[..., T]`, perhaps `attention_mask` and `labels`.
      ids: int `[k]`, those of `init_prompt`.
      causal: whether labels go with the inputs, as in a causal language model: then the prompt's own are
        -100, and without `labels` the inputs are.

    Returns:
      The batch with `[..., k + T]` where there was `[..., T]`.

    >>> batch = prompted({"input_ids": jnp.array([[5, 6]])}, [9], causal=True)
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[9, 5, 6]], [[-100, 5, 6]])
    """

    def before(x, start):
        x = jnp.asarray(x)
        first = jnp.broadcast_to(jnp.asarray(start, x.dtype), (*x.shape[:-1], len(ids)))
        return jnp.concatenate([first, x], axis=-1)

    inputs = jnp.asarray(batch["input_ids"])
    new = {
        **batch,
        "input_ids": before(inputs, jnp.asarray(ids, inputs.dtype).reshape((1,) * (inputs.ndim - 1) + (-1,))),
    }
    mask = batch.get("attention_mask")
    if mask is not None:
        new["attention_mask"] = before(mask, 1)
    if causal:
        labels = inputs if mask is None else jnp.where(jnp.asarray(mask) != 0, inputs, -100)
        new["labels"] = before(batch.get("labels", labels), -100)
    return new
