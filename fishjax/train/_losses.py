"""The three losses of T-Few and their sum (arXiv 2205.05638), of one example with its choices."""

import jax
import jax.numpy as jnp

from fishjax.models import Model
from fishjax.train._choices import TokenScores, check_fields, score_choices
from fishjax.types import Array, Batch, BatchLossFn, Example, LossFn, Params


def tfew_loss(model: Model, *, unlikelihood: bool = True, length_normalised: bool = True) -> LossFn:
    """Return the loss of ONE example with choices, nats: L_LM + L_UL + L_LN, unweighted.

    Args:
      model: sequence to sequence; its encoder runs once an example.
      unlikelihood, length_normalised: leave out a term; without both, L_LM alone.

    The example is that of `score_choices` with `answer`, the index of the right choice. An answer out of
    range, or a choice without tokens, gives NaN (`data.check_choices` says so before).

    Raises:
      UsageError: as `score_choices`; of the loss, an example without choices or `answer`.

    References: Liu et al. 2022, arXiv 2205.05638, section 3.2, eq. 1 and 2.

    >>> from fishjax import models
    >>> sizes = {"vocab_size": 7, "d_model": 4, "d_kv": 2, "d_ff": 4, "num_layers": 1, "num_heads": 2}
    >>> model = models.build({"model_type": "t5", **sizes})
    >>> params = jax.tree.map(jnp.zeros_like, jax.jit(model.init)(jax.random.key(0)))
    >>> example = {"input_ids": jnp.array([3, 1]), "choices": jnp.array([[2, 1], [4, -100]]), "answer": 1}
    >>> round(float(jnp.exp(jax.jit(tfew_loss(model))(params, example))), 3)  # 7 tokens: 7 * 7/6 * 2
    16.333
    """
    scores_of = score_choices(model)

    def loss(params: Params, example: Example) -> Array:
        scores = scores_of(params, example)
        check_fields(example, "answer")
        answer = jnp.asarray(example["answer"])
        terms = [lm_loss(scores, answer)]
        if unlikelihood:
            terms.append(unlikelihood_loss(scores, answer))
        if length_normalised:
            terms.append(length_normalised_loss(scores, answer))
        return sum(terms[1:], start=terms[0])

    return loss


def choice_lm_loss(model: Model) -> LossFn:
    """Return L_LM alone: what (IA)^3 is pre-trained with on a mixture of tasks (section 3.4)."""
    return tfew_loss(model, unlikelihood=False, length_normalised=False)


def lm_loss(scores: TokenScores, answer: Array) -> Array:
    """Return -1/T sum_t log p(y_t) of the right choice: the mean over its tokens, nats."""
    return -_of_answer(length_normalised(scores), scores, answer)


def unlikelihood_loss(scores: TokenScores, answer: Array) -> Array:
    """Return -sum_n sum_t log(1 - p(y_t^n)) / sum_n T^n over the wrong choices, nats; 0 if there is none.

    References: arXiv 2205.05638, eq. 1.
    """
    wrong = scores.keep & (jnp.arange(scores.keep.shape[0]) != answer)[:, None]
    count = jnp.maximum(wrong.sum(), 1).astype(scores.log_not_p.dtype)
    return -jnp.where(wrong, scores.log_not_p, 0).sum() / count


def length_normalised_loss(scores: TokenScores, answer: Array) -> Array:
    """Return -log of the right choice's share of e^beta, beta the mean log-likelihood of a choice, nats.

    References: arXiv 2205.05638, eq. 2.
    """
    beta = length_normalised(scores)
    return jax.nn.logsumexp(beta, where=scores.valid) - _of_answer(beta, scores, answer)


def length_normalised(scores: TokenScores) -> Array:
    """Return beta `[C]`: 1/T sum_t log p(y_t) of each choice; NaN without tokens, 0 for padding."""
    length = jnp.where(scores.valid, scores.keep.sum(-1), 1)
    return scores.log_p.sum(-1) / length.astype(scores.log_p.dtype)


def legacy_tfew_loss(model: Model) -> BatchLossFn:
    """Return `loss(params, batch)`, nats: the published code's three losses, of a whole batch.

    For `make_step(..., batched=True)`, to repeat what was published; L_LN is the paper's.

    Args:
      model: as of `tfew_loss`, whose examples stacked are the batch.

    References: the code of Liu et al. 2022, arXiv 2205.05638; where it leaves the paper, see
    `legacy_lm_loss` and `legacy_unlikelihood_loss`.

    >>> from fishjax import models
    >>> sizes = {"vocab_size": 7, "d_model": 4, "d_kv": 2, "d_ff": 4, "num_layers": 1, "num_heads": 2}
    >>> model = models.build({"model_type": "t5", **sizes})
    >>> params = jax.tree.map(jnp.zeros_like, jax.jit(model.init)(jax.random.key(0)))
    >>> batch = {"input_ids": jnp.array([[3]]), "choices": jnp.array([[[2], [4]]]), "answer": jnp.array([1])}
    >>> round(float(jnp.exp(jax.jit(legacy_tfew_loss(model))(params, batch))), 3)  # 14 / (6/7 + 0.01) / 1.01
    15.985
    """
    scores_of = score_choices(model)

    def loss(params: Params, batch: Batch) -> Array:
        scores = jax.vmap(scores_of, (None, 0))(params, batch)
        check_fields(batch, "answer")
        answers = jnp.asarray(batch["answer"])
        terms = [f(scores.log_p, scores.keep, answers) for f in (legacy_lm_loss, legacy_unlikelihood_loss)]
        return terms[0] + terms[1] + jax.vmap(length_normalised_loss)(scores, answers).mean()

    return loss


def legacy_lm_loss(log_p: Array, keep: Array, answers: Array) -> Array:
    """Return the published code's L_LM: a mean over a batch's tokens, so long answers weigh more.

    Args:
      log_p: `[B, C, T]`. keep: bool `[B, C, T]`. answers: int `[B]`.
    """
    right = keep & (jnp.arange(keep.shape[1]) == answers[:, None])[..., None]
    return -jnp.where(right, log_p, 0).sum() / right.sum().astype(log_p.dtype)


def legacy_unlikelihood_loss(log_p: Array, keep: Array, answers: Array) -> Array:
    """Return the published code's L_UL: log(1 - p + 0.01), and -log 1.01 for each token that does not count.

    Args:
      log_p: `[B, C, T]`. keep: bool `[B, C, T]`. answers: int `[B]`.
    """
    wrong = keep & (jnp.arange(keep.shape[1]) != answers[:, None])[..., None]
    p = jnp.where(wrong, jnp.exp(log_p), 0)
    return -jnp.log(1 - p + 1e-2).sum() / wrong.sum().astype(log_p.dtype)


def _of_answer(beta: Array, scores: TokenScores, answer: Array) -> Array:
    """Return `beta[answer]`, NaN where that is padding or out of range."""
    beta = jnp.where(scores.valid, beta, jnp.nan)
    return jnp.take(beta, jnp.where(answer < 0, beta.shape[0], answer), mode="fill", fill_value=jnp.nan)
