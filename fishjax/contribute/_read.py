"""A contributor's examples: a data set, a file, or a mixture of files."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

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
    seed: int = 0,
) -> tuple[Batch, str]:
    """Return the examples of a TFDS data set, a FILE.jsonl or a mixture of them, and what identifies them.

    Args:
      names: one, or several with choices.
      folder: the model's, whose tokenizer encodes text.
      split: of a TFDS data set.
      templates: one file for each name, or none.
      limit, seed: at most so many examples of each task of a mixture, drawn by the seed.
    """
    names = [names] if isinstance(names, str) else list(names)
    files: list[str | None] = [templates] if isinstance(templates, str) else list(templates or ())
    files = files or [None] * len(names)
    if len(files) != len(names) or not names:
        raise UsageError(f"there must be one file of `templates` for each of {names}; got {files}")
    parts = [_read(name, folder, model, split, file) for name, file in zip(names, files)]
    if len(parts) == 1:
        return parts[0]
    if odd := [name for name, (rows, _) in zip(names, parts) if "choices" not in rows]:
        raise UsageError(f"a mixture is of examples with choices; `{odd[0]}` has none")
    mixed = data.mix([rows for rows, _ in parts], seed=seed, limit=limit)
    return mixed, " + ".join(identity for _, identity in parts)


def _read(
    name: str, folder: str, model: models.Model, split: str, templates: str | None
) -> tuple[Batch, str]:
    if name.endswith(".jsonl"):
        content = hashlib.sha256(Path(name).read_bytes())
        if templates is None:
            return data.load_jsonl(name, folder, model), f"sha256:{content.hexdigest()}"
        content.update(Path(templates).read_bytes())
        asked = data.load_templates(templates)
        return data.load_jsonl(name, folder, model, templates=asked), f"sha256:{content.hexdigest()}"
    if templates is not None:
        raise UsageError(f"`templates` are for a FILE.jsonl; got `{name}`")
    return data.load(name, split), f"{name}/{split}"
