"""Which leaves the papers and peft adapt, by the leaf names of each family that `models` reads.

A torch `Linear` is stored `[out, in]`, GPT-2's `Conv1D` `[in, out]`, a Flax kernel `[in, heads, size]`:
the axes below are those of the file. A bias scales with the output that it belongs to.
"""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from fishjax.errors import UsageError
from fishjax.patches._ia3 import KeysValues

Rules = Mapping[str, int | tuple[int, ...] | KeysValues]


class Preset(NamedTuple):
    """Rules for one family: a regex of leaf names -> the axis, or axes, that a rule is about."""

    mark: str  # a name that only this family has
    paper: Rules  # (IA)^3 as published: keys, values, the input of the feed-forward's second layer
    peft: Rules  # (IA)^3 as peft places it when it is not told
    lora: Rules  # queries and values; the axis is the input


_T5_IA3 = {r"Attention\.[kv]\.weight$": 0, r"DenseReluDense\.wo\.weight$": 1}
_DIGITS_IA3: Rules = {
    r"attention\.(key|value)\.kernel$": (1, 2),
    r"attention\.(key|value)\.bias$": (0, 1),
    r"mlp_out\.kernel$": 0,
}
_KEY_VALUE = r"self_attn\.[kv]_proj\.(weight|bias)$"
_QUERY_VALUE = r"self_attn\.[qv]_proj\.(weight|bias)$"
_DOWN = {r"mlp\.down_proj\.weight$": 1}
_LLAMA_LORA = {r"self_attn\.[qv]_proj\.weight$": 1}
_BERT_KEY_VALUE = {r"attention\.self\.(key|value)\.(weight|bias)$": 0}

# The first family whose mark is found; Llama's kin differ in little, so the plain ones come last.
PRESETS: dict[str, Preset] = {
    "t5": Preset(
        mark=r"\.layer\.0\.SelfAttention\.q\.weight$",
        paper=_T5_IA3,
        peft=_T5_IA3,
        lora={r"Attention\.[qv]\.weight$": 1},
    ),
    "bert": Preset(
        mark=r"\.attention\.self\.query\.weight$",
        paper={**_BERT_KEY_VALUE, r"(?<!attention)\.output\.dense\.weight$": 1},
        # peft goes by the end of a name, and so scales the attention's output layer too.
        peft={**_BERT_KEY_VALUE, r"\.output\.dense\.weight$": 1},
        lora={r"attention\.self\.(query|value)\.weight$": 1},
    ),
    "bloom": Preset(
        mark=r"\.self_attention\.query_key_value\.weight$",
        paper={
            r"self_attention\.query_key_value\.(weight|bias)$": KeysValues(0, by_head=True),
            r"mlp\.dense_4h_to_h\.weight$": 1,
        },
        peft={
            r"self_attention\.query_key_value\.(weight|bias)$": 0,
            r"mlp\.dense_4h_to_h\.weight$": 1,
        },
        lora={r"self_attention\.query_key_value\.weight$": 1},
    ),
    "gpt2": Preset(
        mark=r"\.attn\.c_attn\.weight$",
        paper={
            r"attn\.c_attn\.(weight|bias)$": KeysValues(-1, by_head=False),
            r"mlp\.c_proj\.weight$": 0,
        },
        peft={r"attn\.c_attn\.(weight|bias)$": -1, r"mlp\.c_proj\.weight$": 0},
        lora={r"attn\.c_attn\.weight$": 0},
    ),
    "qwen3": Preset(
        mark=r"\.self_attn\.q_norm\.weight$",
        paper={_KEY_VALUE: 0, **_DOWN},
        peft={_QUERY_VALUE: 0, **_DOWN},
        lora=_LLAMA_LORA,
    ),
    "gemma2": Preset(
        mark=r"\.pre_feedforward_layernorm\.weight$",
        paper={_KEY_VALUE: 0, **_DOWN},
        peft={_QUERY_VALUE: 0, **_DOWN},
        lora=_LLAMA_LORA,
    ),
    "qwen2": Preset(
        # Only Qwen2 has biases here and none on the output; Llama with biases has that one too.
        mark=r"\.self_attn\.q_proj\.bias$",
        paper={_KEY_VALUE: 0, **_DOWN},
        peft={_QUERY_VALUE: 0, **_DOWN},
        lora=_LLAMA_LORA,
    ),
    "llama": Preset(
        mark=r"\.self_attn\.q_proj\.weight$",
        paper={_KEY_VALUE: 0, **_DOWN},
        peft={_KEY_VALUE: 0, **_DOWN},
        lora=_LLAMA_LORA,
    ),
    "fishjax_digits": Preset(
        mark=r"^block_0\.attention\.key\.kernel$",
        paper=_DIGITS_IA3,
        peft=_DIGITS_IA3,
        lora={r"attention\.(query|value)\.kernel$": 0},
    ),
}


def ia3(names: Collection[str], preset: str) -> Rules:
    """Return the targets of `init_ia3` for a model with these leaf names.

    Args:
      names: all leaf names; they tell the family.
      preset: `"paper"` or `"peft"`.

    Raises:
      UsageError: an unknown preset or family.

    >>> ia3(["encoder.block.0.layer.0.SelfAttention.q.weight"], "paper")
    {'Attention\\\\.[kv]\\\\.weight$': 0, 'DenseReluDense\\\\.wo\\\\.weight$': 1}
    """
    family = family_of(names)
    if preset not in ("paper", "peft"):
        raise UsageError(f'the preset must be "paper" or "peft"; got "{preset}"')
    return PRESETS[family].paper if preset == "paper" else PRESETS[family].peft


def lora(names: Collection[str], preset: str) -> Rules:
    """Return the targets of `init_lora`, queries and values, for a model with these leaf names.

    Raises:
      UsageError: an unknown preset or family.

    >>> lora(["model.layers.0.self_attn.q_proj.weight"], "peft")
    {'self_attn\\\\.[qv]_proj\\\\.weight$': 1}
    """
    if preset not in ("paper", "peft"):
        raise UsageError(f'the preset must be "paper" or "peft"; got "{preset}"')
    return PRESETS[family_of(names)].lora


def family_of(names: Collection[str]) -> str:
    """Return the family whose leaf names these are.

    Raises:
      UsageError: no family has such names.
    """
    for family, preset in PRESETS.items():
        if family == "qwen2" and any(n.endswith(".self_attn.o_proj.bias") for n in names):
            continue
        if any(re.search(preset.mark, n) for n in names):
            return family
    known = ", ".join(f"`{f}`" for f in PRESETS)
    raise UsageError(
        f"these leaf names belong to no family with presets ({known}); give targets as {{regex: axis}}"
    )
