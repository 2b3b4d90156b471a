"""Presets of targets: placed as peft and the papers place them, with the published numbers of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fishjax import checkpoint, models, patches, tree
from fishjax.errors import StructureError, UsageError
from fishjax.patches import _presets
from tests.test_peft import FIXTURES, load

pytestmark = pytest.mark.usefixtures("quick")


def test_presets_are_the_placements_of_peft():
    for case in ("t5_v1_1", "bert_classifier", "bloom", "gpt2", "llama3", "qwen2", "gemma2"):
        model, params, _ = load(case)
        theirs = checkpoint.load_peft(FIXTURES / case / "adapters/ia3", model, params)
        ours = patches.init_ia3(params, targets="peft")
        theirs = {n: x for n, x in theirs.items() if isinstance(x, patches.Scale)}
        shape = lambda p: {n: (x.vector.shape, x.tied) for n, x in p.items()}
        assert shape(ours) == shape(theirs), case
    for case in ("bloom", "mistral"):
        model, params, _ = load(case)
        theirs = checkpoint.load_peft(FIXTURES / case / "adapters/lora", model, params)
        ours = patches.init_lora(jax.random.key(0), params, rank=2, targets="peft")
        assert {n: x.a.shape for n, x in ours.items()} == {n: x.a.shape for n, x in theirs.items()}


T5 = {"model_type": "t5", "vocab_size": 32128, "d_kv": 64, "feed_forward_proj": "gated-gelu"}
SIZES = {
    "t5-small": (
        43_008,
        {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "feed_forward_proj": "relu"},
    ),
    "t5-base": (
        129_024,
        {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "feed_forward_proj": "relu"},
    ),
    "T0-3B": (540_672, {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32}),
    "T0-11B": (1_081_344, {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}),
    "Llama-3.2-3B": (
        286_720,
        {"model_type": "llama", "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192}
        | {"num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128},
    ),
    # Keys and values of each layer, and its inner activation.
    "BERT-base": (
        12 * (2 * 768 + 3072),
        {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512, "hidden_size": 768}
        | {"num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    ),
    "Qwen3-1.7B": (
        28 * (2 * 8 * 128 + 6144),
        {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144}
        | {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    ),
    "Gemma-2-2B": (
        26 * (2 * 4 * 256 + 9216),
        {"model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216}
        | {"num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    ),
    "BLOOM-560m": (
        24 * (2 * 1024 + 4 * 1024),
        {"model_type": "bloom", "vocab_size": 250880, "hidden_size": 1024, "n_layer": 24, "n_head": 16},
    ),
    "digits": (
        5 * (2 * 128 + 512),
        {"model_type": "fishjax_digits", "hidden_size": 128, "num_attention_heads": 4}
        | {"num_hidden_layers": 5, "intermediate_size": 512},
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_paper_preset_trains_the_published_number_of_parameters(name):
    count, config = SIZES[name]
    model = models.build({**T5, **config})
    make = lambda key: patches.init_ia3(model.init(key), targets="paper", heads=config.get("n_head"))
    assert patches.num_parameters(jax.eval_shape(make, jax.random.key(0))) == count


def test_the_patch_file_of_t5_base_is_small(tmp_path):
    model = models.build({**T5, **SIZES["t5-base"][1]})
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    empty = jax.eval_shape(lambda params: patches.init_ia3(params, targets="paper"), shapes)
    base = {n: np.zeros(x.shape, x.dtype) for n, x in tree.flatten(shapes).items() if n in empty}
    patch = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), empty)
    checkpoint.save_patch(tmp_path / "p", patch, base=base)
    assert 129_024 * 4 < (tmp_path / "p").stat().st_size <= 600_000


def test_presets_that_are_not_known_are_refused():
    with pytest.raises(UsageError, match="no family"):
        _presets.ia3(["a.kernel"], "paper")
    with pytest.raises(UsageError, match="preset must be"):
        patches.init_ia3(load("llama")[1], targets="best")


@pytest.mark.parametrize("case", ["bloom", "gpt2"])
def test_fused_weights_train_their_keys_and_values_only(case, tmp_path):
    """Against a model whose k, v (in the layout of each head) are scaled by hand."""
    model, params, batch = load(case)
    flat, heads = tree.flatten(params), model.config["n_head"]
    width = model.config.get("n_embd", model.config.get("hidden_size"))
    patch = patches.init_ia3(params, targets="paper", heads=heads)
    layers = len(model.blocks)
    assert patches.num_parameters(patch) == layers * (2 * width + 4 * width)
    rng = np.random.default_rng(0)
    patch = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype), patch)
    folded = tree.flatten(patches.apply(params, patch))
    for name, kind in patch.items():
        if kind.fused is None:
            continue
        vector = np.asarray(kind.vector).reshape(-1)
        whole = np.ones((heads, 3, width // heads) if case == "bloom" else (3, width), np.float32)
        whole[..., 1:, :] = vector.reshape(heads, 2, -1) if case == "bloom" else vector.reshape(2, -1)
        wanted = np.asarray(flat[name]) * whole.reshape((-1, 1) if case == "bloom" else (1, -1))
        np.testing.assert_array_equal(folded[name], wanted)
        bias = name.replace("weight", "bias")
        np.testing.assert_array_equal(folded[bias], np.asarray(flat[bias]) * whole.reshape(-1))
    want = jax.jit(model.apply)(tree.nest(folded), batch)
    np.testing.assert_allclose(
        jax.jit(patches.unfolded(model.apply))(params, patch, batch), want, atol=1e-5 * np.abs(want).max()
    )
    checkpoint.save_patch(tmp_path / "p", patch, base=params)  # the file's meaning in numpy, exact
    checkpoint.save_params(tmp_path / "base.safetensors", params)
    checkpoint.apply_file(tmp_path / "p", tmp_path / "base.safetensors", tmp_path / "new.safetensors")
    again = tree.flatten(checkpoint.load_params(tmp_path / "new.safetensors"))
    for name in flat:
        np.testing.assert_array_equal(again[name], folded[name])
    checkpoint.save_peft(tmp_path / "peft", patch, model)  # peft scales all three; ones for the queries
    theirs = checkpoint.load_peft(tmp_path / "peft", model, params)
    for name, x in tree.flatten(patches.apply(params, theirs)).items():
        np.testing.assert_array_equal(x, folded[name])


def test_fused_weights_are_told_what_is_missing():
    params = load("bloom")[1]
    with pytest.raises(UsageError, match="give `heads`"):
        patches.init_ia3(params, targets="paper")
    with pytest.raises(UsageError, match="7 heads"):
        patches.init_ia3(params, targets="paper", heads=7)
    name, kind = next(iter(patches.init_ia3(params, targets="paper", heads=2).items()))
    for fused in ((0, 3, 1, 5), (2, 3, 1, 4), (0, 3, 3, 4), (0, 3, 1)):
        with pytest.raises(StructureError, match=r"fused|groups"):
            patches.apply(params, {name: patches.Scale(kind.vector, kind.tied, fused)})
