"""`fishjax fisher` on the digits and on tokens, against the library."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fishjax import checkpoint, data, fisher, models
from fishjax.cli import main
from fishjax.errors import FileFormatError

pytestmark = pytest.mark.usefixtures("quick")

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "models"


@pytest.fixture
def digits(tmp_path):
    model = models.build({"model_type": "fishjax_digits", "num_hidden_layers": 1, "hidden_size": 16})
    models.save(tmp_path / "model", model, model.init(jax.random.key(0)))
    return tmp_path


@pytest.fixture
def gpt2(tmp_path):
    config = {
        "model_type": "gpt2",
        "vocab_size": 31,
        "n_positions": 16,
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
    }
    model = models.build(config | {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"})
    models.save(tmp_path / "model", model, model.init(jax.random.key(0)))
    rows = [{"input_ids": [3, 1, 4, 1, 5]}, {"input_ids": [2, 7, 1]}, {"input_ids": [9, 9]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def run(folder, *argv):
    return main(["fisher", "--model", str(folder / "model"), "--out", str(folder / "f"), *argv])


def test_the_digits(digits, capsys):
    pytest.importorskip("tensorflow_datasets")
    argv = ["--data", "bundled_digits", "--examples", "40", "--batch-size", "16", "--seed", "3", "--json"]
    some = ["--num-samples", "2", "--chunk-size", "8"]
    assert run(digits, *argv, "--estimator", "sampled", *some) == 0
    said = json.loads(capsys.readouterr().out)
    got, recipe = checkpoint.load_fisher(digits / "f")
    model, params = models.load(digits / "model")
    wanted = {"estimator": "sampled", "examples": 40, "seed": 3, "data": "bundled_digits/train"}
    wanted["num_samples"] = 2
    assert recipe == said["recipe"] == wanted | {"base": checkpoint.digest(params)}
    rows = data.load("bundled_digits", "train")
    rows = {k: x[np.random.default_rng(3).permutation(900)[:40]] for k, x in rows.items()}
    estimator = fisher.sampled(models.example_logits(model), num_samples=2, method="reference")
    want = fisher.estimate(estimator, params, [rows], key=jax.random.key(3))
    largest = max(np.abs(y).max() for y in jax.tree.leaves(want))  # the keys' bias has only rounding
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5 * np.abs(y).max() + 1e-8 * largest)


@pytest.mark.slow
def test_tokens_of_a_language_model_in_bfloat16(gpt2, capsys):
    assert run(gpt2, "--data", str(gpt2 / "rows.jsonl"), "--dtype", "bfloat16") == 0
    assert "from 3 examples" in capsys.readouterr().out
    got, recipe = checkpoint.load_fisher(gpt2 / "f")
    assert recipe["data"].startswith("sha256:") and {x.dtype for x in jax.tree.leaves(got)} == {
        jnp.dtype("bfloat16")
    }
    model, params = models.load(gpt2 / "model")
    loss = models.example_loss(model)
    total = jax.tree.map(jnp.zeros_like, params)
    for row in ([3, 1, 4, 1, 5], [2, 7, 1], [9, 9]):  # without padding
        g = jax.grad(loss)(params, {"input_ids": jnp.array(row)})
        total = jax.tree.map(lambda t, g: t + g**2 / 3, total, g)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(total), strict=True):
        np.testing.assert_allclose(x.astype(np.float32), y, rtol=2**-7, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "is not JSON"),
        ("[]", "wanted `text`"),
        ('{"text": "a", "input_ids": [1]}', "wanted `text`"),
        ('{"input_ids": []}', "`input_ids` is"),
        ('{"input_ids": [1], "labels": "no"}', "`labels` is 'no'"),
        ('{"input_ids": [1], "labels": [1]}\n{"input_ids": [1], "labels": 1}', "another type"),
        ("", "no example"),
        ('\n{"input_ids": [1, 2], "labels": [1, 31]}', "line 2: `labels` must lie in [0, 31)"),
        ('{"input_ids": [1, 2], "labels": [1, -1]}', "got -1"),
        ('{"input_ids": [1, 2], "labels": [1]}', "one label for each of 2 tokens"),
        ('{"input_ids": [1, 2], "labels": 1}', "must be a list"),
    ],
)
def test_malformed_lines_are_named(gpt2, capsys, line, said):
    (gpt2 / "rows.jsonl").write_text(line)
    assert run(gpt2, "--data", str(gpt2 / "rows.jsonl")) == FileFormatError.exit_code
    captured = capsys.readouterr()
    assert said in captured.err and "rows.jsonl" in captured.err and captured.out == ""
    assert not (gpt2 / "f").exists()


@pytest.mark.parametrize(
    "case, row, code, said",
    [
        ("bert_classifier", {"input_ids": [5], "labels": 3}, 3, "line 1: `labels` must be a class in [0, 3)"),
        ("bert_classifier", {"input_ids": [5], "labels": -100}, 3, "got -100"),
        ("bert_classifier", {"input_ids": [5]}, 2, "give `label`, `target` or `labels`"),
        ("t5_v1_0", {"input_ids": [5]}, 2, "give `label`, `target` or `labels`"),
        ("t5_v1_0", {"input_ids": [5], "labels": [67]}, 3, "line 1: `labels` must lie in [0, 67)"),
        ("bert_masked", {"input_ids": [5]}, 2, "give `label`, `target` or `labels`"),
        ("llama", {"text": "a", "target": "b"}, 2, "for sequence to sequence"),
    ],
)
def test_labels_that_a_model_cannot_learn_from(tmp_path, capsys, case, row, code, said):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    argv = ["--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "f")]
    assert main(["fisher", "--model", str(FIXTURES / case), *argv]) == code
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == "" and not (tmp_path / "f").exists()


def test_tokens_are_not_for_images(digits, capsys):
    (digits / "rows.jsonl").write_text('{"input_ids": [1]}')
    assert run(digits, "--data", str(digits / "rows.jsonl")) == 2
    assert "takes no tokens" in capsys.readouterr().err


def test_bad_arguments_write_nothing(gpt2, capsys):
    rows = str(gpt2 / "rows.jsonl")
    assert run(gpt2, "--data", rows, "--examples", "4") == 2
    assert run(gpt2, "--data", str(gpt2 / "none.jsonl")) == 2
    assert run(gpt2, "--data", rows, "--batch-size", "0") == 2
    for wrong in (["--num-samples", "2"], ["--estimator", "sampled", "--max-rows", "9"]):
        assert run(gpt2, "--data", rows, *wrong) == 2
    for wrong in ("--chunk-size", "--memory", "--max-rows"):
        assert run(gpt2, "--data", rows, "--estimator", "exact", wrong, "0") == 2
    assert run(gpt2, "--data", rows, "--estimator", "exact", "--max-rows", "149") == 2
    assert "`max_rows=149`" in capsys.readouterr().err
    exact = ["--estimator", "exact", "--max-rows", "150", "--memory", "100000"]
    assert run(gpt2, "--data", rows, *exact) == 0  # 5 tokens of 31 classes
    (gpt2 / "f").unlink()
    (gpt2 / "rows.jsonl").write_text(json.dumps({"input_ids": [1] * 12}))
    assert run(gpt2, "--data", rows, "--estimator", "exact") == 2
    assert "fisher.sampled" in capsys.readouterr().err
    assert not (gpt2 / "f").exists()
