"""Read examples for a language model from a file of JSON lines."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fishjax.data._choices import encode_choices, few_shot
from fishjax.data._lines import json_lines
from fishjax.data._templates import Question, Template, render_all
from fishjax.errors import FileFormatError, UsageError
from fishjax.models import Model, load_tokenizer, pad
from fishjax.models._model import outputs
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
        {"input_ids": [3, 1, 4], "labels": [1, 5, 9]}    tokens as they are; "labels" may be an int or absent;
                                                         -100 for a token that does not count
        {"text": "red or blue?", "choices": ["red", "blue"], "answer": 0}    as of `encode_choices`

    Args:
      folder: the model's folder, whose tokenizer.json encodes text.
      templates: a line holds the fields of a task instead, and is an example under each of them.
      shots, seed: only so many lines, as of `few_shot`; None takes all.

    Raises:
      FileFormatError: a line is malformed, or of another form than the first; its labels are not those of
        a model of this kind, or out of range.
      UsageError: there is text and no tokenizer, a target and no decoder; the model takes no tokens; there
        are fewer lines than `shots`; a template does not fit a line.
    """
    numbers, rows = _rows(Path(path), _problem if templates is None else _no_row)
    if shots is not None:
        kept = few_shot(range(len(rows)), shots, seed=seed)
        numbers, rows = [numbers[i] for i in kept], [rows[i] for i in kept]
    fields = set(rows[0])
    if templates is not None:
        return encode_choices(_rendered(path, templates, numbers, rows), load_tokenizer(folder, model), model)
    if "choices" in fields:
        questions = [Question(row["text"], tuple(row["choices"]), row["answer"]) for row in rows]
        return encode_choices(questions, load_tokenizer(folder, model), model)
    if "vocab_size" not in model.config:
        raise UsageError(f"`{path}` is for models of text; this `{model.family}` takes no tokens")
    for number, row in zip(numbers, rows):
        if problem := _odd_label(row, model):
            raise FileFormatError(f"`{path}`, line {number}: {problem}")
    if "target" in fields and model.task not in ("decoder", None):
        raise UsageError(
            f"`{path}` has a `target`, which is for sequence to sequence; this `{model.family}` is not: give "
            "`label`, or `input_ids` with `labels`"
        )
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


def _rendered(
    path: str | Path, templates: Sequence[Template], numbers: list[int], rows: list[dict[str, Any]]
) -> list[Question]:
    """Return each line under each template; an error names the line."""
    questions: list[Question] = []
    for number, row in zip(numbers, rows):
        try:
            questions += render_all(templates, [row])
        except UsageError as error:
            raise UsageError(f"`{path}`, line {number}: {error}") from None
    return questions


def _rows(path: Path, problem_of: Callable[[Any, Any], str | None]) -> tuple[list[int], list[dict[str, Any]]]:
    """Return the numbers and the contents of a file's lines."""
    numbers: list[int] = []
    rows: list[dict[str, Any]] = []
    for number, row in json_lines(path):
        if problem := problem_of(row, rows[0] if rows else row):
            raise FileFormatError(f"`{path}`, line {number}: {problem}")
        numbers.append(number)
        rows.append(row)
    if not rows:
        raise FileFormatError(f"`{path}` has no example")
    return numbers, rows


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
    if blank := [c for c, text in enumerate(row.get("choices", [])) if not text.strip()]:
        return f"choice {blank[0]} of `choices` is blank; give it a text, or leave it out"
    if {k: type(v) for k, v in row.items()} != {k: type(v) for k, v in first.items()}:
        return f"holds {sorted(names)} where the first line holds {sorted(first)}, or of another type"
    return None


def _odd_label(row: dict[str, Any], model: Model) -> str | None:
    """Say what is wrong with the labels of a line for a model, or None; out of range they would not count."""
    name = next((n for n in ("label", "labels") if n in row), None)
    if name is None or model.task is None:
        return None
    label, size = row[name], outputs(model)
    if model.task == "class":
        if type(label) is not int or not 0 <= label < size:
            return f"`{name}` must be a class in [0, {size}); got {label!r:.40}"
        return None
    if type(label) is int:
        return f"`{name}` must be a list, one label a token, for this `{model.family}`; got {label}"
    if model.task != "decoder" and len(label) != len(row["input_ids"]):
        return f"`{name}` must have one label for each of {len(row['input_ids'])} tokens; got {len(label)}"
    if odd := [x for x in label if not (0 <= x < size or x == -100)]:
        return f"`{name}` must lie in [0, {size}), or be -100 for what does not count; got {odd[0]}"
    return None


def _padded(rows: list[list[int]], fill: int) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows))), fill, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
