"""Every family against transformers: logits, greedy continuations, both dialects of config.json."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fishjax import checkpoint, models, tree
from fishjax.models._model import subtree

pytestmark = pytest.mark.usefixtures("quick")

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "models"
CASES = sorted(p.parent.name for p in FIXTURES.glob("*/model.safetensors"))
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels")


def load(case, **options):
    model, params = models.load(FIXTURES / case, **options)
    expected = load_file(FIXTURES / case / "expected.safetensors")
    return model, params, {n: expected[n] for n in INPUTS if n in expected}, expected


GENERATING = [c for c in CASES if "greedy" in load_file(FIXTURES / c / "expected.safetensors")]


def counted(model, batch, logits):
    """Only what stands on real tokens is defined."""
    mask = batch["labels"] >= 0 if "labels" in batch else batch["attention_mask"] > 0
    return logits[mask] if logits.ndim == 3 else logits


def test_all_families_have_a_fixture():
    families = {json.loads((FIXTURES / c / "config.json").read_text())["model_type"] for c in CASES}
    assert families == {f for f in models.FAMILIES if not f.startswith("fishjax")}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case):
    model, params, batch, expected = load(case)
    logits = jax.jit(model.apply)(params, batch)
    assert logits.shape == expected["logits"].shape and logits.dtype == jnp.float32
    got, wanted = counted(model, batch, np.asarray(logits)), counted(model, batch, expected["logits"])
    np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", GENERATING)
def test_greedy_continuations_are_those_of_transformers(case):
    model, params, batch, expected = load(case)
    wanted = expected["greedy"]
    got = model.generate(params, batch, max_new_tokens=wanted.shape[1])
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("case", CASES)
def test_the_older_dialect_of_config_gives_the_same_program(case, tmp_path):
    model, params, batch, _ = load(case)
    shutil.copy(FIXTURES / case / "model.safetensors", tmp_path)
    shutil.copy(FIXTURES / case / "config.v4.json", tmp_path / "config.json")
    older, same = models.load(tmp_path)
    assert tree.names(same) == tree.names(params)
    first, second = (jax.make_jaxpr(m.apply)(params, batch) for m in (model, older))
    assert str(first) == str(second)
    for a, b in zip(first.consts, second.consts, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", ["t5_v1_1", "bert_classifier", "bloom", "llama3", "gpt2"])
def test_blocks_one_by_one_are_the_whole(case):
    model, params, batch, expected = load(case)

    @jax.jit
    def run(outside, parts):
        carry = model.embed(outside, batch)
        for name, part in zip(model.blocks, parts, strict=True):
            carry = model.block(name, part, carry)
        return model.head(outside, carry)

    flat = tree.flatten(params)
    inside = lambda n: n.startswith(tuple(f"{b}." for b in model.blocks)) and "relative" not in n
    parts = [subtree(params, name) for name in model.blocks]
    got = run(tree.nest({n: x for n, x in flat.items() if not inside(n)}), parts)
    wanted = counted(model, batch, expected["logits"])
    np.testing.assert_allclose(counted(model, batch, np.asarray(got)), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_folder_to_tree_to_folder_keeps_the_content(case, tmp_path):
    model, params, _, _ = load(case)
    models.save(tmp_path / "out", model, params)
    first, second = (checkpoint.load_params(p) for p in (FIXTURES / case, tmp_path / "out"))
    assert checkpoint.digest(first) == checkpoint.digest(second)
    again, _ = models.load(tmp_path / "out")
    assert again.config == model.config


@pytest.mark.parametrize("case", ["gpt2", "bloom"])
def test_files_without_the_prefix_of_the_class_are_the_same_model(case, tmp_path):
    """As `gpt2` and `bloom-560m` are published: bare names, and masks stored as buffers."""
    _, _, batch, expected = load(case)
    tensors = load_file(FIXTURES / case / "model.safetensors")
    tensors = {n.removeprefix("transformer."): x for n, x in tensors.items()}
    if case == "gpt2":
        tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 40, 40), np.float32))
        tensors["h.0.attn.masked_bias"] = np.float32([-1e4])
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(FIXTURES / case / "config.json", tmp_path)
    model, params = models.load(tmp_path)
    got = counted(model, batch, np.asarray(jax.jit(model.apply)(params, batch)))
    np.testing.assert_allclose(got, counted(model, batch, expected["logits"]), atol=1e-4, rtol=0)
    assert model.blocks[0] == "h.0" and "h.0.attn.bias" not in tree.names(params)

    # peft knows the class's names only: an adapter is found, and written, under those.
    adapter = FIXTURES / case / "adapters" / "lora"
    patch = checkpoint.load_peft(adapter, model, params)
    assert all(name.startswith("h.") for name in patch)
    checkpoint.save_peft(tmp_path / "out", patch, model)
    theirs, ours = (load_file(p / "adapter_model.safetensors") for p in (adapter, tmp_path / "out"))
    assert theirs.keys() == ours.keys() and all((theirs[n] == ours[n]).all() for n in ours)
