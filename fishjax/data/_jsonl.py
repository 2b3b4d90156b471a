"""Read examples for a language model from a file of JSON lines."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fishjax.data._choices import encode_choices, few_shot
from fishjax.data._lines import json_lines
from fishjax.data._templates import Question, Template, render_all
from fishjax.errors import FileFormatError
from fishjax.models import Model, load_tokenizer, pad
from fishjax.types import Batch


def load_jsonl(
    path: str | Path,
    folder: str | Path,
    model: Model,
    *,
    templates: Sequence[Template] | None = None,
    shots: int | None = None,
    seed: int = 0,
) -> Batch:
    """Return the examples of a file as arrays with a leading axis of examples, padded to one length.

    A line is one of, all lines alike:

        {"text": "a fine film", "label": 1}              a class; "text_pair" may join "text"
        {"text": "translate: ja", "target": "yes"}       sequence to sequence
        {"text": "once upon a time"}                     a causal language model predicts the text itself
        {"input_ids": [3, 1, 4], "labels": [1, 5, 9]}    tokens as they are; "labels" may be an int or absent
        {"text": "red or blue?", "choices": ["red", "blue"], "answer": 0}    as of `encode_choices`

    Args:
      folder: the model's folder, whose tokenizer.json encodes text.
      templates: a line holds the fields of a task instead, and is an example under each of them.
      shots, seed: only so many lines, as of `few_shot`; None takes all.

    Raises:
      FileFormatError: a line is malformed, or of another form than the first.
      UsageError: there is text and no tokenizer; there are fewer lines than `shots`.
    """
    rows = _rows(Path(path), _problem if templates is None else _no_row)
    rows = rows if shots is None else few_shot(rows, shots, seed=seed)
    fields = set(rows[0])
    if templates is not None:
        return encode_choices(render_all(templates, rows), load_tokenizer(folder, model), model)
    if "choices" in fields:
        questions = [Question(row["text"], tuple(row["choices"]), row["answer"]) for row in rows]
        return encode_choices(questions, load_tokenizer(folder, model), model)
    if "input_ids" in fields:
        batch = pad([row["input_ids"] for row in rows], model)
        labels = [row["labels"] for row in rows] if "labels" in fields else None
    else:
        tokenizer = load_tokenizer(folder, model)
        texts = [(r["text"], r["text_pair"]) if "text_pair" in fields else r["text"] for r in rows]
        coded = tokenizer.encode_batch(texts)
        batch = pad([c.ids for c in coded], model)
        if "text_pair" in fields:
            batch["token_type_ids"] = _padded([c.type_ids for c in coded], 0)
        labels = [row["label"] for row in rows] if "label" in fields else None
        if "target" in fields:
            labels = [c.ids for c in tokenizer.encode_batch([row["target"] for row in rows])]
    if labels is None:
        return batch
    return batch | {
        "labels": np.array(labels, np.int32) if isinstance(labels[0], int) else _padded(labels, -100)
    }


def _rows(path: Path, problem_of: Callable[[Any, Any], str | None]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, row in json_lines(path):
        if problem := problem_of(row, rows[0] if rows else row):
            raise FileFormatError(f"`{path}`, line {number}: {problem}")
        rows.append(row)
    if not rows:
        raise FileFormatError(f"`{path}` has no example")
    return rows


FORMS = (
    {"text", "text_pair", "label"},
    {"text", "target"},
    {"input_ids", "labels"},
    {"text", "choices", "answer"},
)


def _no_row(row: Any, first: Any) -> str | None:
    del first
    return (
        None if isinstance(row, dict) and row else f"wanted an object with the task's fields; got {row!r:.40}"
    )


def _problem(row: Any, first: Any) -> str | None:
    """Say what is wrong with a line, or None."""
    names = set(row) if isinstance(row, dict) else set()
    if not names & {"text", "input_ids"} or not any(names <= form for form in FORMS):
        return (
            "wanted `text`, with `text_pair` and `label`, with `target`, or with `choices` and `answer`; "
            "or `input_ids`, with `labels`"
        )
    if ("choices" in names) != ("answer" in names):
        return "`choices` and `answer` go together"
    for name, value in row.items():
        tokens = isinstance(value, list) and len(value) > 0 and all(type(x) is int for x in value)
        texts = isinstance(value, list) and len(value) > 0 and all(isinstance(x, str) for x in value)
        ok = {"input_ids": tokens, "labels": tokens or type(value) is int, "label": type(value) is int}
        ok |= {"choices": texts, "answer": type(value) is int}
        if not ok.get(name, isinstance(value, str)):
            return f"`{name}` is {value!r:.40}"
    if {k: type(v) for k, v in row.items()} != {k: type(v) for k, v in first.items()}:
        return f"holds {sorted(names)} where the first line holds {sorted(first)}, or of another type"
    return None


def _padded(rows: list[list[int]], fill: int) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows))), fill, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
