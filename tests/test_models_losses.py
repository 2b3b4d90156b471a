"""Losses and heads of models: minus log p of the labels, differentiable, and refused where there is none."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fishjax import models, tree
from fishjax.errors import StructureError, UsageError
from tests.model_folders import FIXTURES, edit_tensors, load

pytestmark = pytest.mark.usefixtures("quick")


def log_p(logits, labels):
    """The sum of log p over labels that are not -100, in float64."""
    logits = np.asarray(logits, np.float64)
    norm = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    picked = np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)[..., 0] - norm
    return np.where(labels >= 0, picked, 0).reshape(len(labels), -1).sum(1)


@pytest.mark.parametrize("case", ["t5_v1_0", "llama", "gpt2", "bert_classifier"])
def test_loss_of_one_example_is_minus_log_p_of_its_labels(case):
    model, params, expected = load(case)
    batch = {n: x for n, x in expected.items() if n not in ("logits", "greedy")}
    ids, mask, logits = batch["input_ids"], batch["attention_mask"], expected["logits"]
    if case == "t5_v1_0":
        wanted = log_p(logits, batch["labels"])
    elif case == "bert_classifier":
        batch["labels"] = np.array([2, 0], np.int32)
        wanted = log_p(logits, batch["labels"])
    else:
        wanted = log_p(logits[:, :-1], np.where(mask[:, 1:], ids[:, 1:], -100))
    losses = jax.jit(jax.vmap(models.example_loss(model), (None, 0)))(params, batch)
    np.testing.assert_allclose(losses, -wanted, rtol=1e-5)


def test_labels_of_a_causal_model_that_say_what_counts():
    model, params, expected = load("llama")
    ids = expected["input_ids"][:1]
    labels = np.where(np.arange(ids.shape[1]) < 5, -100, ids)
    loss = models.example_loss(model)(params, {"input_ids": ids[0], "labels": labels[0]})
    np.testing.assert_allclose(loss, -log_p(expected["logits"][:1, :-1], labels[:, 1:])[0], rtol=1e-5)
    mask = model.token_mask({"input_ids": jnp.asarray(ids[0]), "labels": jnp.asarray(labels[0])})
    assert mask.tolist() == [False] * 4 + [True] * 4 + [False]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_head_that_labels_tokens(family, tmp_path):
    """Against transformers' hidden states through a linear layer; an old file has a pooler too."""
    shutil.copytree(FIXTURES / family, tmp_path / "m")
    rng = np.random.default_rng(0)
    weight, bias = (rng.normal(size=s).astype(np.float32) for s in ((3, 24), 3))

    def change(tensors):
        named = {f"{family}.{n}": tensors.pop(n) for n in list(tensors)}
        tensors |= {n: x for n, x in named.items() if family == "bert" or "pooler" not in n}
        tensors |= {"classifier.weight": weight, "classifier.bias": bias}

    edit_tensors(tmp_path / "m", change)
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text()) | {"id2label": {"0": "O", "1": "B", "2": "I"}}
    config["architectures"] = ["BertForTokenClassification"] if family == "bert" else None
    path.write_text(json.dumps(config))
    model, params = models.load(tmp_path / "m")
    expected = load_file(FIXTURES / family / "expected.safetensors")
    batch = {n: expected[n] for n in ("input_ids", "attention_mask", "token_type_ids") if n in expected}
    wanted = expected["logits"] @ weight.T + bias
    batch["labels"] = np.where(batch["attention_mask"] > 0, batch["input_ids"] % 4, 3).astype(np.int32)
    batch["labels"][batch["labels"] == 3] = -100
    loss = models.example_loss(model)
    logits, losses = jax.jit(lambda p, b: (model.apply(p, b), jax.vmap(loss, (None, 0))(p, b)))(params, batch)
    keep = batch["attention_mask"] > 0
    np.testing.assert_allclose(np.asarray(logits)[keep], wanted[keep], atol=1e-4)
    np.testing.assert_allclose(losses, -log_p(wanted, batch["labels"]), rtol=1e-5)
    if family == "roberta":
        fresh = models.build(config | {"architectures": ["RobertaForTokenClassification"]})
        tree.check_same(jax.eval_shape(fresh.init, jax.random.key(0)), params, ("fresh", "file"))


def test_a_sequence_is_not_classified_without_its_pooler(tmp_path):
    shutil.copytree(FIXTURES / "bert_classifier", tmp_path / "m")
    edit_tensors(tmp_path / "m", lambda t: [t.pop(n) for n in list(t) if "pooler" in n])
    with pytest.raises(StructureError, match=r"missing: `bert\.pooler\.dense"):
        models.load(tmp_path / "m")


@pytest.mark.parametrize("change", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}])
def test_heads_that_do_not_choose_a_class_have_no_loss(change):
    config = json.loads((FIXTURES / "bert_classifier" / "config.json").read_text())
    model = models.build({n: x for n, x in config.items() if "label" not in n} | change)
    with pytest.raises(UsageError, match="does not choose"):
        models.example_loss(model)


def test_a_bare_encoder_has_no_loss():
    model, _, _ = load("roberta")
    with pytest.raises(UsageError, match="no head"):
        models.example_loss(model)


@pytest.mark.parametrize("case", ["bert_masked", "roberta_masked"])
def test_old_names_and_left_over_heads_of_pre_training_load(case, tmp_path):
    shutil.copytree(FIXTURES / case, tmp_path / "m")
    width = 24

    def age(tensors):
        for name in list(tensors):
            if "LayerNorm." in name and case == "bert_masked":
                old = {"weight": "gamma", "bias": "beta"}[name.rpartition(".")[2]]
                tensors[f"{name.rpartition('.')[0]}.{old}"] = tensors.pop(name)
        word = tensors["bert.embeddings.word_embeddings.weight" if case == "bert_masked" else WORD]
        if case == "bert_masked":
            tensors["cls.seq_relationship.weight"] = np.ones((2, width), np.float32)
            tensors["cls.seq_relationship.bias"] = np.ones(2, np.float32)
            tensors["bert.pooler.dense.weight"] = np.ones((width, width), np.float32)
            tensors["bert.pooler.dense.bias"] = np.ones(width, np.float32)
            tensors["cls.predictions.decoder.weight"] = word
        else:
            tensors["lm_head.decoder.weight"] = word
            tensors["roberta.embeddings.position_ids"] = np.arange(14)[None]

    edit_tensors(tmp_path / "m", age)
    model, params = models.load(tmp_path / "m")
    expected = load_file(FIXTURES / case / "expected.safetensors")
    batch = {n: expected[n] for n in ("input_ids", "attention_mask", "token_type_ids") if n in expected}
    logits, keep = jax.jit(model.apply)(params, batch), expected["attention_mask"] > 0
    np.testing.assert_allclose(logits[keep], expected["logits"][keep], atol=1e-4)
    batch["labels"] = np.where(np.arange(9)[None] == 2, batch["input_ids"], -100)
    losses = jax.jit(jax.vmap(models.example_loss(model), (None, 0)))(params, batch)
    np.testing.assert_allclose(losses, -log_p(expected["logits"], batch["labels"]), rtol=1e-5)


WORD = "roberta.embeddings.word_embeddings.weight"


# A bias of keys shifts all scores of a query alike, and a bare encoder's pooler is not used.
NO_GRADIENT = r"self\.key\.bias$|k_proj\.bias$"


@pytest.mark.parametrize(
    "case", ["t5_v1_0", "t5_v1_1", "bert_classifier", "roberta_masked", "llama3", "gemma2", "gpt2"]
)
def test_the_loss_is_differentiable_in_every_parameter(case):
    model, params, expected = load(case)
    example = {n: x[0] for n, x in expected.items() if n not in ("logits", "greedy")}
    if case == "bert_classifier":
        example["labels"] = np.int32(1)
    elif case == "roberta_masked":
        example["labels"] = example["input_ids"]
    gradients = tree.flatten(jax.jit(jax.grad(models.example_loss(model)))(params, example))
    for name, g in gradients.items():
        assert np.isfinite(g).all(), name
        assert re.search(NO_GRADIENT, name) or np.abs(g).max() > 1e-6, name
