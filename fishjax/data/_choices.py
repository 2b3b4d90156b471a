"""Questions with choices as arrays, few-shot samples of them, mixtures of tasks."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fishjax.data._batches import examples
from fishjax.data._templates import Question
from fishjax.errors import UsageError
from fishjax.models import Model, pad
from fishjax.types import Batch

CHOICE_FIELDS = {"input_ids": 0, "attention_mask": 0, "choices": -100, "choice_mask": False, "answer": 0}


def encode_choices(
    questions: Sequence[Question], tokenizer: Any, model: Model, *, max_length: int | None = None
) -> Batch:
    """Return questions as the arrays that `train.tfew_loss` and `train.rank_classify` take.

    Args:
      tokenizer: of `models.load_tokenizer`.
      max_length: inputs are cut to so many tokens, the last of which stays (the end of the sequence).

    Returns:
      `input_ids`, `attention_mask` int32 `[n, S]`; `choices` int32 `[n, C, T]`, after a choice's tokens
      -100; `choice_mask` bool `[n, C]`, False where an example has fewer choices; `answer` int32 `[n]`.

    Raises:
      UsageError: a choice without tokens, or no questions.
    """
    if not questions:
        raise UsageError("there must be at least one question")
    texts = [e.ids for e in tokenizer.encode_batch([q.text for q in questions])]
    if max_length is not None:
        texts = [ids if len(ids) <= max_length else ids[: max_length - 1] + ids[-1:] for ids in texts]
    flat = iter(tokenizer.encode_batch([choice for q in questions for choice in q.choices]))
    coded = [[next(flat).ids for _ in q.choices] for q in questions]
    most = max(len(row) for row in coded), max(len(ids) for row in coded for ids in row)
    choices = np.full((len(coded), *most), -100, np.int32)
    for i, row in enumerate(coded):
        for c, ids in enumerate(row):
            choices[i, c, : len(ids)] = ids
    batch = pad(texts, model) | {
        "choices": choices,
        "choice_mask": np.arange(most[0]) < np.array([[len(row)] for row in coded]),
        "answer": np.array([q.answer for q in questions], np.int32),
    }
    check_choices(batch)
    return batch


def check_choices(batch: Batch) -> None:
    """Raise unless every example has choices, every choice tokens, and every answer is one of the choices.

    Args:
      batch: `choices` int `[n, C, T]`; `choice_mask` and `answer` are optional.

    Raises:
      UsageError: naming the example.

    >>> check_choices({"choices": np.array([[[5, 1], [-100, -100]]])})
    Traceback (most recent call last):
        ...
    fishjax.errors.UsageError: choice 1 of example 0 has no tokens; it needs one, or a False in `choice_mask`
    """
    choices = np.asarray(batch["choices"])
    if choices.ndim != 3:
        raise UsageError(f"`choices` must be [examples, choices, tokens]; got {list(choices.shape)}")
    valid = np.asarray(batch.get("choice_mask", np.ones(choices.shape[:2], bool))).astype(bool)
    for i, c in np.argwhere(valid & ~(choices != -100).any(-1)).tolist():
        raise UsageError(
            f"choice {c} of example {i} has no tokens; it needs one, or a False in `choice_mask`"
        )
    for i in np.flatnonzero(~valid.any(-1)).tolist():
        raise UsageError(f"example {i} has no choices; it needs at least one")
    if "answer" not in batch:
        return
    answer = np.asarray(batch["answer"])
    inside = (answer >= 0) & (answer < choices.shape[1])
    inside[inside] = valid[inside, answer[inside]]
    for i in np.flatnonzero(~inside).tolist():
        raise UsageError(f"`answer` of example {i} must be the index of one of its choices; got {answer[i]}")


def few_shot(rows: Sequence[Any], shots: int, *, seed: int) -> list[Any]:
    """Return some of the rows, drawn without replacement; more shots of one seed hold the fewer.

    Args:
      shots: in [1, number of rows].

    Raises:
      UsageError: there are not so many rows.

    >>> few_shot("abcdefgh", 5, seed=0)[:3] == few_shot("abcdefgh", 3, seed=0)
    True
    """
    if not 1 <= shots <= len(rows):
        raise UsageError(f"`shots` must lie in [1, {len(rows)}], the number of rows; got {shots}")
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:shots]]


def mix(tasks: Sequence[Batch], *, seed: int, limit: int | None = None) -> Batch:
    """Join tasks of any number of choices into one data set, padded to the widest.

    Args:
      tasks: as of `encode_choices`.
      seed: draws the examples of tasks that are cut.
      limit: at most so many examples of each task, so that large tasks do not drown the small ones.

    Raises:
      UsageError: no task, or tasks of other fields.

    References: Sanh et al. 2022, arXiv 2110.08207, section 5: examples in proportion, capped.

    >>> small = {"choices": np.array([[[5]]]), "answer": np.array([0])}
    >>> wide = {"choices": np.array([[[5, 6], [7, -100]]]), "answer": np.array([1])}
    >>> mix([small, wide], seed=0)["choices"].tolist()
    [[[5, -100], [-100, -100]], [[5, 6], [7, -100]]]
    """
    if not tasks:
        raise UsageError("`tasks` must hold at least one task; got none")
    rng = np.random.default_rng(seed)
    parts = []
    for task in tasks:
        count = examples(task)
        kept = np.arange(count)
        if limit is not None and count > limit:
            kept = np.sort(rng.permutation(count)[:limit])
        masks = {"choice_mask": np.ones(task["choices"].shape[:2], bool)}
        parts.append({n: np.asarray(x)[kept] for n, x in (masks | dict(task)).items()})
    if odd := [
        sorted(p) for p in parts if p.keys() != parts[0].keys() or not p.keys() <= CHOICE_FIELDS.keys()
    ]:
        raise UsageError(f"`tasks` must have the same of {list(CHOICE_FIELDS)}; got {odd[0]}")
    return {n: _joined([p[n] for p in parts], CHOICE_FIELDS[n]) for n in parts[0]}


def _joined(parts: Sequence[np.ndarray], fill: Any) -> np.ndarray:
    shape = np.max([p.shape[1:] for p in parts], axis=0, initial=0)
    widen = lambda p: [(0, 0), *((0, int(m) - n) for m, n in zip(shape, p.shape[1:]))]
    return np.concatenate([np.pad(p, widen(p), constant_values=fill) for p in parts])
