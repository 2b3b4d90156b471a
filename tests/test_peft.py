"""Adapters from and to peft: logits, bits, exact counts, and what is refused."""

import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fishjax import checkpoint, masks, models, patches, tree
from fishjax.errors import FileFormatError, StructureError, UsageError
from fishjax.patches import _presets

pytestmark = pytest.mark.usefixtures("quick")

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "models"
ADAPTERS = sorted(
    str(p.parent.relative_to(FIXTURES)) for p in FIXTURES.glob("*/adapters/*/adapter_config.json")
)
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def load(case):
    model, params = models.load(FIXTURES / case)
    batch = load_file(FIXTURES / case / "expected.safetensors")
    return model, params, {n: x for n, x in batch.items() if n not in ("logits", "greedy")}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_logits_are_those_of_peft(adapter):
    model, params, batch = load(adapter.partition("/")[0])
    patch = checkpoint.load_peft(FIXTURES / adapter, model, params)
    folded = jax.jit(model.apply)(patches.apply(params, patch), batch)
    unfolded = jax.jit(patches.unfolded(model.apply))(params, patch, batch)
    wanted = load_file(FIXTURES / adapter / "expected.safetensors")["logits"]
    for got in map(np.asarray, (folded, unfolded)):
        mask = np.ones(got.shape[:1], bool)
        if got.ndim == 3:
            mask = batch["labels"] >= 0 if "labels" in batch else batch["attention_mask"] > 0
        np.testing.assert_allclose(got[mask], wanted[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_round_trip_keeps_every_bit_and_what_it_means(adapter, tmp_path):
    model, params, _ = load(adapter.partition("/")[0])
    patch = checkpoint.load_peft(FIXTURES / adapter, model, params)
    checkpoint.save_peft(tmp_path / "out", patch, model, params=params)
    theirs, ours = (load_file(p / TENSORS) for p in (FIXTURES / adapter, tmp_path / "out"))
    theirs = {n: x for n, x in theirs.items() if "base_layer" not in n}
    assert set(ours) == set(theirs)
    for name, x in theirs.items():
        if "shira" in name:  # the patch holds base + difference, and in another order
            continue
        assert ours[name].dtype == x.dtype
        np.testing.assert_array_equal(ours[name], x, err_msg=name)
    again = checkpoint.load_peft(tmp_path / "out", model, params)
    assert set(again) == set(patch)
    for name in patch:
        assert jax.tree.structure(again[name]) == jax.tree.structure(patch[name])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again[name], patch[name])


def test_a_mask_of_r_m_plus_n_entries_is_a_shira_adapter(tmp_path):
    model, params, batch = load("llama3")
    names, flat = re.compile(r"self_attn\.[qv]_proj\.weight$"), tree.flatten(params)
    scores = {n: np.abs(np.asarray(x)) for n, x in flat.items() if names.search(n)}
    kept = masks.indices(scores, rank=2)
    assert all(kept[n].size == 2 * sum(x.shape) for n, x in scores.items())
    values = {n: np.asarray(flat[n]).reshape(-1)[at] + np.float32(0.25) for n, at in kept.items()}
    patch = {n: patches.Sparse(jnp.asarray(at, jnp.int32), jnp.asarray(values[n])) for n, at in kept.items()}
    checkpoint.save_peft(tmp_path / "out", patch, model, params=params)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["peft_type"], config["r"]) == ("SHIRA", 2)
    again = checkpoint.load_peft(tmp_path / "out", model, params)
    logits = jax.jit(lambda patch: model.apply(patches.apply(params, patch), batch))
    np.testing.assert_allclose(logits(again), logits(patch), atol=1e-6)
    assert np.abs(logits(patch) - model.apply(params, batch)).max() > 1e-3


def test_what_the_written_config_says(tmp_path):
    model, params, _ = load("t5_v1_1")
    patch = checkpoint.load_peft(FIXTURES / "t5_v1_1/adapters/lora", model, params)
    checkpoint.save_peft(tmp_path, patch, model)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["peft_type"], config["task_type"]) == ("LORA", "SEQ_2_SEQ_LM")
    ranks = {n: x.shape[0] for n, x in load_file(tmp_path / TENSORS).items() if "lora_A" in n}
    assert set(ranks.values()) == {2, 3} and len(config["rank_pattern"]) == len(ranks) // 2
    assert len(config["target_modules"]) == len(ranks)


def test_an_adapter_without_a_classifier_does_not_promise_one(tmp_path):
    model, params, _ = load("roberta_classifier")
    patch = checkpoint.load_peft(FIXTURES / "roberta_classifier/adapters/ia3", model, params)
    checkpoint.save_peft(tmp_path / "with", patch, model)
    scales = {n: e for n, e in patch.items() if isinstance(e, patches.Scale)}
    checkpoint.save_peft(tmp_path / "without", scales, model)
    read = lambda name: json.loads((tmp_path / name / CONFIG).read_text())
    assert (read("with")["task_type"], read("with")["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    assert read("without")["task_type"] is None  # peft looks for a classifier's tensors otherwise


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


def test_names_of_t_few_load_and_mean_the_scaled_inner_activation(tmp_path):
    model, params, batch = load("t5_v1_1")
    rng, tensors, flat = np.random.default_rng(0), {}, tree.flatten(params)
    scaled = dict(flat)
    for name, x in flat.items():
        if name.endswith((".k.weight", ".v.weight", ".wi_1.weight")):
            vector = rng.uniform(0.5, 1.5, (x.shape[0], 1)).astype(np.float32)
            tensors[name.removesuffix("weight") + "multi_lora_b"] = vector
            scaled[name] = x * vector  # t-few scales the outputs of all three
    save_file(tensors, tmp_path / "finish.safetensors")
    patch = checkpoint.load_peft(tmp_path / "finish.safetensors", model, params)
    assert sum(n.endswith(".wo.weight") for n in patch) == 5 and len(patch) == len(tensors)
    got = model.apply(patches.apply(params, patch), batch)
    np.testing.assert_allclose(got, model.apply(tree.nest(scaled), batch), atol=1e-4)


def copy(tmp_path, adapter="llama3/adapters/ia3", **changes):
    shutil.copytree(FIXTURES / adapter, tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text()) | changes
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    return tmp_path / "a"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "VERA"}, "`VERA` adapter"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    ],
)
def test_adapters_that_mean_something_else_are_refused(tmp_path, changes, message):
    folder = copy(tmp_path, "mistral/adapters/lora", **changes)
    with pytest.raises(UsageError, match=message):
        checkpoint.load_peft(folder, *load("mistral")[:2])


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(StructureError, match="does not have"):
        checkpoint.load_peft(FIXTURES / "bloom/adapters/ia3", *load("llama3")[:2])
    folder = copy(tmp_path)
    tensors = load_file(folder / TENSORS)
    name = min(tensors)
    save_file({**tensors, name: np.ones((5, 1), np.float32)}, folder / TENSORS)
    with pytest.raises(StructureError, match=r"\[5, 1\]"):
        checkpoint.load_peft(folder, *load("llama3")[:2])
    save_file({**tensors, name.replace("ia3_l", "other"): np.ones(1, np.float32)}, folder / TENSORS)
    with pytest.raises(StructureError, match="other"):
        checkpoint.load_peft(folder, *load("llama3")[:2])
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(FileFormatError, match="pickle"):
        checkpoint.load_peft(folder, *load("llama3")[:2])
    (folder / CONFIG).write_text("{")
    with pytest.raises(FileFormatError, match=r"JSON|pickle"):
        checkpoint.load_peft(folder, *load("llama3")[:2])


@pytest.mark.parametrize(
    "changes",
    [
        {"r": "2"},
        {"lora_alpha": None},
        {"rank_pattern": ["q"]},
        {"alpha_pattern": {"q_proj": "high"}},
        {"alpha_pattern": {"(a+)+x": 1}},
        {"alpha_pattern": {".*.*.*.*.*x": 1}},
        {"alpha_pattern": {"(": 1}},
    ],
)
def test_configs_that_lie_about_numbers_or_would_run_for_long_are_refused(tmp_path, changes):
    folder = copy(tmp_path, "mistral/adapters/lora", **changes)
    with pytest.raises(FileFormatError, match=CONFIG):
        checkpoint.load_peft(folder, *load("mistral")[:2])


def test_a_config_whose_rank_is_not_that_of_the_tensors_is_refused(tmp_path):
    folder = copy(tmp_path, "mistral/adapters/lora", r=7)
    with pytest.raises(StructureError, match="rank"):
        checkpoint.load_peft(folder, *load("mistral")[:2])


def test_patches_that_peft_cannot_hold_are_refused_and_nothing_is_written(tmp_path):
    model, params, _ = load("qwen2")
    flat = tree.flatten(params)
    key, name = jax.random.key(0), "model.layers.0.self_attn.k_proj.weight"
    out = tmp_path / "out"
    alone = {name: patches.Scale(jnp.ones((flat[name].shape[0], 1)))}
    with pytest.raises(UsageError, match="bias with its output"):
        checkpoint.save_peft(out, alone, model)
    mask = tree.map_named(lambda n, x: jnp.zeros(x.shape, bool).at[..., 0].set(n == name), params)
    sparse = patches.init_sparse(params, mask)
    with pytest.raises(UsageError, match="differences"):
        checkpoint.save_peft(out, sparse, model)
    with pytest.raises(UsageError, match=r"r \(m \+ n\)"):
        checkpoint.save_peft(out, sparse, model, params=params)
    lora = patches.init_lora(key, params, rank=2, targets="peft")
    with pytest.raises(UsageError, match="one kind"):
        checkpoint.save_peft(out, {**lora, **alone}, model)
    with pytest.raises(UsageError, match="input axis"):
        checkpoint.save_peft(out, patches.init_lora(key, params, rank=2, targets=["k_proj.weight"]), model)
    with pytest.raises(UsageError, match="whole modules"):
        checkpoint.save_peft(out, lora | patches.init_dense(params, name), model)
    tied, params, _ = load("llama3")
    with pytest.raises(UsageError, match="output layer too"):
        checkpoint.save_peft(out, patches.init_lora(key, params, rank=2, targets={"embed_tokens": 0}), tied)
    assert not out.exists()


def test_links_that_lead_out_of_an_adapter_are_refused(tmp_path):
    folder = copy(tmp_path)
    (folder / TENSORS).rename(tmp_path / "elsewhere")
    (folder / TENSORS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileFormatError, match=f"{TENSORS}.*symbolic link"):
        checkpoint.load_peft(folder, *load("llama3")[:2])
