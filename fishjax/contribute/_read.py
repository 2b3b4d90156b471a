"""A contributor's examples: a data set, a file, or a mixture of files."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fishjax import data, models
from fishjax.errors import UsageError
from fishjax.types import Batch


def read(
    names: str | Sequence[str],
    folder: str,
    model: models.Model,
    *,
    split: str = "train",
    templates: str | Sequence[str | None] | None = None,
    limit: int | None = None,
    shots: int | None = None,
    seed: int = 0,
) -> tuple[Batch, str]:
    """Return the examples of a TFDS data set, a FILE.jsonl or a mixture of them, and what identifies them.

    Args:
      names: one, or several with choices.
      folder: the model's, whose tokenizer encodes text.
      split: of a TFDS data set.
      templates: one file for each name, or none.
      limit: at most so many examples of each task of a mixture.
      shots: only so many examples of each name, before they are put into templates (`data.few_shot`).
      seed: of both draws.

    Raises:
      UsageError: names and templates do not pair, a part of a mixture has no choices, too few for `shots`.
    """
    names = [names] if isinstance(names, str) else list(names)
    files: list[str | None] = [templates] if isinstance(templates, str) else list(templates or ())
    files = files or [None] * len(names)
    if len(files) != len(names) or not names:
        raise UsageError(f"there must be one file of `templates` for each of {names}; got {files}")
    parts = [_read(name, folder, model, split, file, shots, seed) for name, file in zip(names, files)]
    if len(parts) == 1:
        return parts[0]
    if odd := [name for name, (rows, _) in zip(names, parts) if "choices" not in rows]:
        raise UsageError(f"a mixture is of examples with choices; `{odd[0]}` has none")
    mixed = data.mix([rows for rows, _ in parts], seed=seed, limit=limit)
    return mixed, " + ".join(identity for _, identity in parts)


def _read(
    name: str,
    folder: str,
    model: models.Model,
    split: str,
    templates: str | None,
    shots: int | None,
    seed: int,
) -> tuple[Batch, str]:
    drawn = "" if shots is None else f", {shots} shots of seed {seed}"
    if name.endswith(".jsonl"):
        content = hashlib.sha256(Path(name).read_bytes())
        asked = None
        if templates is not None:
            content.update(Path(templates).read_bytes())
            asked = data.load_templates(templates)
        rows = data.load_jsonl(name, folder, model, templates=asked, shots=shots, seed=seed)
        return rows, f"sha256:{content.hexdigest()}{drawn}"
    if templates is not None:
        raise UsageError(f"`templates` are for a FILE.jsonl; got `{name}`")
    rows = data.load(name, split)
    if shots is not None:
        some = data.few_shot(range(data.examples(rows)), shots, seed=seed)
        rows = {n: x[np.array(some)] for n, x in rows.items()}
    return rows, f"{name}/{split}{drawn}"
