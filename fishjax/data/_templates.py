"""Templates as data: how a row of a task becomes a question with choices.

A file, YAML or JSON, holds one task:

    task: entailment
    templates:
      - input: "{premise} Is it true that {hypothesis}?"
        choices: ["Yes", "No"]                # in the order of the row's label
      - input: "{premise} Which of these follows? {options}"
        choices: "{options}"                  # the row's own list

A field is a plain name in braces; "{{" and "}}" are braces. No attribute, index, format or expression is
read, so a file from anyone is safe to use.
"""

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fishjax import strict_yaml
from fishjax.errors import UsageError

Row = Mapping[str, Any]  # the fields of an example, strings or numbers, and the index of its label


class Template(NamedTuple):
    """One way to ask."""

    input: str  # with fields in braces
    choices: str | tuple[str, ...]  # texts with fields in the order of labels, or the field of the row's own
    label: str = "label"  # the field that holds the index of the right choice


class Question(NamedTuple):
    """A row as text."""

    text: str
    choices: tuple[str, ...]
    answer: int  # the index of the right one


def load_templates(path: str | Path) -> list[Template]:
    """Read the templates of a task.

    Raises:
      UsageError: the file is malformed, says something unknown or asks for more than plain fields.
    """
    where = f"the templates `{path}`"
    values = strict_yaml.load(path, where)
    if not isinstance(values, Mapping) or not {"templates"} <= set(values) <= {"task", "templates"}:
        raise UsageError(f"{where} must be a mapping of `task` and `templates`; got {_short(values)}")
    if not isinstance(values.get("task", ""), str):
        raise UsageError(f"`task` of {where} must be text; got {_short(values['task'])}")
    entries = values["templates"]
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"`templates` of {where} must be a list of at least one; got {_short(entries)}")
    return [_template(entry, f"template {i} of {where}") for i, entry in enumerate(entries)]


def render(template: Template, row: Row) -> Question:
    """Return a row as a question.

    Args:
      template: checked here again, so one made by hand is as safe.
      row: its fields; the label is an int that counts the choices from 0.

    Raises:
      UsageError: a field is missing or of another kind, there are fewer than one choices, one is blank, or
        the label is none of them.

    >>> template = Template("{word}: {kind} or not?", ("yes", "no, {word} is not"))
    >>> render(template, {"word": "oak", "kind": "tree", "label": 0})
    Question(text='oak: tree or not?', choices=('yes', 'no, oak is not'), answer=0)
    """
    if isinstance(template.choices, str):
        (name,) = _fields(template.choices, "a template's `choices`")
        choices = _field(row, name)
        if not isinstance(choices, (list, tuple)) or not all(isinstance(c, str) for c in choices):
            raise UsageError(f"the row's `{name}` must be a list of texts; got {_short(choices)}")
    else:
        choices = [_fill(choice, row) for choice in template.choices]
    if blank := [c for c, choice in enumerate(choices) if not choice.strip()]:
        raise UsageError(f"choice {blank[0]} of the row is blank: {_short(list(choices))}; give it a text")
    answer = _field(row, template.label)
    if (
        isinstance(answer, bool)
        or not isinstance(answer, (int, np.integer))
        or not 0 <= answer < len(choices)
    ):
        raise UsageError(
            f"the row's `{template.label}` must be the index of one of {len(choices)} choices; got {answer!r}"
        )
    return Question(_fill(template.input, row), tuple(choices), int(answer))


def render_all(
    templates: Sequence[Template], rows: Iterable[Row], *, seed: int | None = None
) -> list[Question]:
    """Return rows as questions: each by one template drawn by the seed, or by every template (None).

    >>> two = [Template("a {x}", ("p", "q")), Template("b {x}", ("p", "q"))]
    >>> [q.text for q in render_all(two, [{"x": 1, "label": 0}, {"x": 2, "label": 1}])]
    ['a 1', 'b 1', 'a 2', 'b 2']
    """
    if not templates:
        raise UsageError("there must be at least one template")
    if seed is None:
        return [render(template, row) for row in rows for template in templates]
    rng = np.random.default_rng(seed)
    return [render(templates[int(rng.integers(len(templates)))], row) for row in rows]


def _template(entry: Any, where: str) -> Template:
    names = set(Template._fields)
    if not isinstance(entry, Mapping) or not {"input", "choices"} <= set(entry) <= names:
        raise UsageError(
            f"{where} must be a mapping of `input`, `choices` and perhaps `label`; got {_short(entry)}"
        )
    text, choices, label = entry["input"], entry["choices"], entry.get("label", "label")
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"`input` of {where} must be text; got {_short(text)}")
    if not isinstance(label, str):
        raise UsageError(f"`label` of {where} must be the name of a field; got {_short(label)}")
    _fields(text, f"`input` of {where}")
    if isinstance(choices, str):
        if not re.fullmatch(r"\{\w+\}", choices):
            raise UsageError(
                f"`choices` of {where} must be a list of texts or one field; got {_short(choices)}"
            )
        return Template(text, choices, label)
    texts = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
    if not choices or not texts:
        raise UsageError(
            f"`choices` of {where} must be texts (quote yes and no) or one field; got {_short(choices)}"
        )
    for choice in choices:
        _fields(choice, f"`choices` of {where}")
    return Template(text, tuple(choices), label)


def _parts(text: str, where: str) -> list[tuple[str, str | None]]:
    """Return (text before a field, the field's name or None), refusing all that is more than a name."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise UsageError(f"{where} has braces that do not pair: {error}; write {{{{ for a brace") from None
    for _, name, form, conversion in parts:
        if name is not None and (not name.isidentifier() or form or conversion):
            raise UsageError(f"{where} may hold plain fields such as {{word}} only; got `{{{name}...}}`")
    return [(before, name) for before, name, _, _ in parts]


def _fields(text: str, where: str) -> list[str]:
    return [name for _, name in _parts(text, where) if name is not None]


def _fill(text: str, row: Row) -> str:
    return "".join(
        before + ("" if name is None else _text(row, name)) for before, name in _parts(text, "a template")
    )


def _text(row: Row, name: str) -> str:
    value = _field(row, name)
    if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
        return ", ".join(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float, np.number)):
        raise UsageError(f"the row's `{name}` must be text, a number or a list of texts; got {_short(value)}")
    return str(value)


def _field(row: Row, name: str) -> Any:
    if name not in row:
        raise UsageError(f"a template asks for `{name}`; the row has {', '.join(f'`{n}`' for n in row)}")
    return row[name]


def _short(value: Any) -> str:
    return f"{value!r:.60}"
