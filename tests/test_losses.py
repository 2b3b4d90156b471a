"""The losses of T-Few and rank classification against hand-made numbers and a numpy of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fishjax import models, patches, train, tree
from fishjax.errors import UsageError
from fishjax.train import _losses

pytestmark = pytest.mark.usefixtures("quick")

CONFIG = {"model_type": "t5", "vocab_size": 13, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1}
CONFIG |= {"num_heads": 2, "tie_word_embeddings": False}
INPUTS = [[3, 1, 4, 1], [5, 9, 2]]
CHOICES = [[[7, 1], [8, 2, 1], [6, 1]], [[4, 4, 1], [10, 1]]]
ANSWERS = [1, 0]


@pytest.fixture(autouse=True)
def standard_promotion():
    """Flax and optax mix dtypes of their own."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def model():
    return models.build(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    rng, shapes = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def wide(params):
    with jax.enable_x64(True):
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)


@pytest.fixture(scope="module")
def picked(model, wide):
    """log p of each token of each choice, one choice at a time, each at its own length."""
    apply = jax.jit(model.apply)

    def of(text, choice):
        # A decoder sees no later token, so a longer row of labels saves a program and moves nothing.
        labels = np.array([(choice + [0, 0])[:3]], np.int32)
        logits = np.asarray(apply(wide, {"input_ids": np.array([text], np.int32), "labels": labels}))[0]
        assert logits.dtype == np.float64
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return [log_p[t, y] for t, y in enumerate(choice)]

    with jax.enable_x64(True):
        return [[of(text, choice) for choice in row] for text, row in zip(INPUTS, CHOICES)]


@pytest.fixture(scope="module")
def scores(model, wide):
    with jax.enable_x64(True):
        return jax.jit(jax.vmap(train.score_choices(model), (None, 0)))(wide, batch_of())


def batch_of(inputs=INPUTS, choices=CHOICES, answers=ANSWERS):
    length, count = max(map(len, inputs)), max(map(len, choices))
    tokens = max(len(c) for row in choices for c in row)
    batch = {
        "input_ids": np.zeros((len(inputs), length), np.int32),
        "attention_mask": np.zeros((len(inputs), length), np.int32),
        "choices": np.full((len(inputs), count, tokens), -100, np.int32),
        "choice_mask": np.zeros((len(inputs), count), bool),
        "answer": np.array(answers, np.int32),
    }
    for i, (text, row) in enumerate(zip(inputs, choices, strict=True)):
        batch["input_ids"][i, : len(text)], batch["attention_mask"][i, : len(text)] = text, 1
        batch["choice_mask"][i, : len(row)] = True
        for c, ids in enumerate(row):
            batch["choices"][i, c, : len(ids)] = ids
    return batch


def by_numpy(picked, answer):
    """Section 3.2 of the paper, sum by sum, and the choice of largest mean."""
    lm = -np.mean(picked[answer])
    wrong = [p for n, row in enumerate(picked) if n != answer for p in row]
    ul = -sum(np.log(1 - np.exp(p)) for p in wrong) / len(wrong)
    beta = np.array([np.mean(row) for row in picked])
    ln = -np.log(np.exp(beta[answer]) / np.exp(beta).sum())
    return lm, ul, ln, int(beta.argmax())


def mapped(loss, params, batch):
    return jax.jit(jax.vmap(loss, (None, 0)))(params, batch)


def test_by_hand():
    p = np.array([[0.5, 0.25], [0.2, 1.0], [0.9, 0.9]])
    keep = np.array([[True, True], [True, False], [False, False]])
    with jax.enable_x64(True):
        scores = train.TokenScores(
            jnp.where(keep, np.log(p), 0),
            jnp.where(keep, np.log1p(-np.where(keep, p, 0)), 0),
            jnp.asarray(keep),
            jnp.array([True, True, False]),
        )
        # The right choice has tokens of 1/2 and 1/4: beta is log sqrt(1/8); the wrong one has 1/5.
        root = 8**-0.5
        close = lambda loss, value: np.testing.assert_allclose(loss(scores, jnp.int32(0)), value, rtol=1e-12)
        close(train.lm_loss, 1.5 * np.log(2))
        close(train.unlikelihood_loss, -np.log(0.8))
        close(train.length_normalised_loss, -np.log(root / (root + 0.2)))
        for answer in (2, 3, -1):  # padding, and out of range on both sides
            assert np.isnan(train.lm_loss(scores, jnp.int32(answer)))


def test_losses_are_those_of_the_paper_with_choices_of_any_number(model, wide, picked, scores, x64):
    expected = np.array([by_numpy(*row)[:3] for row in zip(picked, ANSWERS)])
    terms = (train.lm_loss, train.unlikelihood_loss, train.length_normalised_loss)
    each = np.stack([jax.vmap(term)(scores, jnp.array(ANSWERS)) for term in terms], axis=1)
    np.testing.assert_allclose(each, expected, rtol=1e-10)
    # Which terms are summed costs one program: the other sums are read off the parts.
    loss = mapped(train.tfew_loss(model), wide, batch_of())
    np.testing.assert_allclose(loss, expected.sum(1), rtol=1e-10)
    answers = jax.jit(train.rank_classify(model))(wide, batch_of())
    assert answers.tolist() == [by_numpy(*row)[3] for row in zip(picked, ANSWERS)]
    # An example with its answer only is trained by L_LM: nothing to be unlikely, nothing to rank.
    single = batch_of(choices=[row[a : a + 1] for row, a in zip(CHOICES, ANSWERS)], answers=[0, 0])
    loss = mapped(train.tfew_loss(model), wide, single)
    np.testing.assert_allclose(loss, expected[:, 0], rtol=1e-10)


@pytest.mark.parametrize(
    ("options", "terms"),
    [({"unlikelihood": False}, [0, 2]), ({"length_normalised": False}, [0, 1]), (None, [0])],
)
def test_terms_can_be_left_out(model, picked, scores, options, terms, monkeypatch, x64):
    monkeypatch.setattr(_losses, "score_choices", lambda model: lambda params, example: params)
    loss = train.choice_lm_loss(model) if options is None else train.tfew_loss(model, **options)
    total = jax.vmap(loss)(scores, {"answer": jnp.array(ANSWERS)})
    expected = np.array([by_numpy(*row)[:3] for row in zip(picked, ANSWERS)])
    np.testing.assert_allclose(total, expected[:, terms].sum(1), rtol=1e-10)


def test_legacy_losses_are_those_of_the_published_code(picked, scores, x64):
    answers = jnp.array(ANSWERS)
    right = [p for row, a in zip(picked, ANSWERS) for p in row[a]]
    wrong = [p for row, a in zip(picked, ANSWERS) for n, c in enumerate(row) if n != a for p in c]
    lm = train.legacy_lm_loss(scores.log_p, scores.keep, answers)
    np.testing.assert_allclose(lm, -np.mean(right), rtol=1e-10)
    absent = scores.keep.size - len(wrong)  # padding and right answers
    value = -(sum(np.log(1 - np.exp(p) + 1e-2) for p in wrong) + absent * np.log(1.01)) / len(wrong)
    ul = train.legacy_unlikelihood_loss(scores.log_p, scores.keep, answers)
    np.testing.assert_allclose(ul, value, rtol=1e-10)


def test_a_step_descends_the_published_codes_loss_of_a_batch(model, wide, picked, x64):
    """The answer's tokens count alike, whichever example they are of: the loss is no mean over examples."""
    loss_fn = train.legacy_tfew_loss(model)
    step = train.make_step(loss_fn, optax.sgd(1.0), batched=True)
    start = patches.init_dense(wide, "shared")
    state, loss = jax.jit(step)(train.init(start, optax.sgd(1.0)), wide, batch_of())
    right = [p for row, a in zip(picked, ANSWERS) for p in row[a]]
    wrong = [p for row, a in zip(picked, ANSWERS) for n, c in enumerate(row) if n != a for p in c]
    absent = batch_of()["choices"].size - len(wrong)
    unlikely = -(sum(np.log(1 - np.exp(p) + 1e-2) for p in wrong) + absent * np.log(1.01)) / len(wrong)
    ranked = np.mean([by_numpy(*row)[2] for row in zip(picked, ANSWERS)])
    np.testing.assert_allclose(loss, unlikely - np.mean(right) + ranked, rtol=1e-10)
    (name,) = start
    gradient = tree.flatten(jax.jit(jax.grad(loss_fn))(wide, batch_of()))[name]
    moved = start[name].values - train.patch_of(state)[name].values
    np.testing.assert_allclose(moved, gradient, rtol=1e-10)


def test_a_certain_wrong_answer_has_finite_loss_and_gradient(model, params):
    loud = jax.tree.map(lambda x: 300.0 * x, params)
    example = {n: x[0] for n, x in batch_of().items()}
    first = jax.jit(model.apply)(loud, {"input_ids": example["input_ids"][None], "labels": np.array([[0]])})
    example["choices"][0, 0] = int(first.argmax())

    def loss(params, example):
        scores = train.score_choices(model)(params, example)
        return train.unlikelihood_loss(scores, example["answer"]), scores

    (value, scores), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(loud, example)
    assert scores.log_p[0, 0] == 0 and np.isfinite(scores.log_not_p).all()  # p rounds to 1
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_the_encoder_runs_once(model, params):
    flops = lambda fn, example: jax.jit(fn).lower(params, example).cost_analysis()["flops"]
    example = lambda c: {"input_ids": jnp.ones(64, jnp.int32), "choices": jnp.ones((c, 2), jnp.int32)}
    one, four = (flops(train.score_choices(model), example(c)) for c in (1, 4))
    assert four < 1.3 * one  # of 64 tokens in and 2 out, the encoder is nearly all


def test_bad_choices(model, params):
    empty = batch_of()
    empty["choices"][1, 1] = -100
    with pytest.raises(UsageError, match="choice 1 of example 1 has no tokens"):
        train.rank_classify(model)(params, empty)
    assert jax.jit(train.rank_classify(model))(params, empty).tolist()[1] == -1
    loss = jax.jit(jax.vmap(train.tfew_loss(model), (None, 0)))
    assert np.isfinite(loss(params, empty)).tolist() == [True, False]
    for answer in (2, 7, -1):  # the second example has two choices
        with pytest.raises(UsageError, match="`answer` of example 1"):
            train.rank_classify(model)(params, batch_of(answers=[1, answer]))
        assert np.isnan(loss(params, batch_of(answers=[1, answer]))).tolist() == [False, True]
    bert = {"model_type": "bert", "vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1}
    bert |= {"num_attention_heads": 1, "intermediate_size": 4, "max_position_embeddings": 8}
    with pytest.raises(UsageError, match="no encoder with a decoder"):
        train.tfew_loss(models.build(bert, ["classifier.weight"]))


@pytest.mark.parametrize("missing", ["choices", "answer", "input_ids"])
def test_examples_without_choices_are_refused_by_name(model, params, missing):
    batch = {n: x for n, x in batch_of().items() if n != missing}
    example = {n: x[0] for n, x in batch.items()}
    for loss_of in (train.tfew_loss, train.choice_lm_loss):
        with pytest.raises(UsageError, match=f"`{missing}` is missing from the examples, which have `"):
            jax.eval_shape(loss_of(model), params, example)
    with pytest.raises(UsageError, match=f"`{missing}` is missing"):
        jax.eval_shape(train.legacy_tfew_loss(model), params, batch)
    if missing != "answer":  # ranking asks for none
        for classify in (train.rank_classify(model), jax.jit(train.rank_classify(model))):
            with pytest.raises(UsageError, match=f"`{missing}` is missing"):
                classify(params, batch)


def test_ranking_says_what_there_is_not_to_rank(model, params):
    batch = {n: x for n, x in batch_of().items() if n != "answer"}
    none = batch | {"choice_mask": np.array([[True, True, False], [False] * 3])}
    with pytest.raises(UsageError, match="example 1 has no choices"):
        train.rank_classify(model)(params, none)
    empty = batch | {"choices": np.zeros((2, 0, 3), np.int32)}
    empty.pop("choice_mask", None)
    with pytest.raises(UsageError, match="example 0 has no choices"):
        train.rank_classify(model)(params, empty)
    with pytest.raises(UsageError, match="choice 0 of example 0 has no tokens"):
        train.rank_classify(model)(params, batch | {"choices": np.zeros((2, 3, 0), np.int32)})


def test_adafactor_takes_the_steps_of_its_paper():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        start = {"m": rng.normal(size=(3, 1)), "v": 5 * rng.normal(size=4)}
        gradients = [{n: rng.normal(size=x.shape) * 3 for n, x in start.items()} for _ in range(12)]
        optimizer = train.adafactor(3e-3, 10, warmup=0.25)
        params = jax.tree.map(jnp.asarray, start)
        state = optimizer.init(params)
        # Not factored, as no side reaches 128: section 8 of arXiv 1804.04235, clipped to norm 1 before.
        mine, second = dict(start), {n: np.zeros_like(x) for n, x in start.items()}
        rms = lambda x: np.sqrt(np.mean(x**2))
        for t, gradient in enumerate(gradients):
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            rate = 3e-3 * (t / 2 if t < 2 else max(0, 1 - (t - 2) / 8))
            norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
            for n, g in gradient.items():
                g, decay = g / max(1, norm), 1 - (t + 1) ** -0.8
                second[n] = decay * second[n] + (1 - decay) * (g**2 + 1e-30)
                step = g / np.sqrt(second[n])
                mine[n] = mine[n] - rate * max(1e-3, rms(mine[n])) * step / max(1, rms(step))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), params, mine)
    for bad in ({"steps": 0}, {"steps": 5, "warmup": 1.0}, {"steps": 5, "clip": 0.0}):
        with pytest.raises(UsageError, match="warmup"):
            train.adafactor(3e-3, **bad)


def test_spread_is_median_and_quartiles():
    values = np.random.default_rng(0).normal(size=(5, 3))
    ordered = np.sort(values.ravel())
    median, iqr = train.spread(values)
    np.testing.assert_allclose(median, ordered[7], rtol=1e-10)
    np.testing.assert_allclose(iqr, ordered[10:12].mean() - ordered[3:5].mean(), rtol=1e-10)
    for bad in ([], [0.5, np.nan]):
        with pytest.raises(UsageError, match="must be numbers"):
            train.spread(bad)
