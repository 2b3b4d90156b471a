"""Adapters from and to peft: logits, bits, and what is refused."""

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
