"""Test packs of text: `NAME.jsonl`, one example a line.

    {"pack": {"kind": "mft", "owner": "maintainer"}}          (optional, first)
    {"text": "a fine film", "label": 1, "slices": ["short"]}
    {"text": "no plot", "text_pair": "at all", "label": 0}

For kinds `inv` and `dir`, `changed` is the altered text. The model's own tokenizer.json encodes it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fishjax.data._lines import json_lines
from fishjax.errors import FileFormatError, UsageError
from fishjax.vet._packs import Pack, pack

FIELDS = {"text", "text_pair", "label", "changed", "slices"}


def load_text_pack(path: str | Path, *, model: str | Path | None) -> Pack:
    """Read one test pack of text and encode it; its name is the file's.

    Raises:
      UsageError: there is no tokenizer to encode it.
      FileFormatError: a line is malformed.
    """
    path = Path(path)
    rows, about = _rows(path)
    texts = [(r["text"], r.get("text_pair")) for r in rows]
    if any("changed" in r for r in rows):
        texts += [(_need(path, r, "changed"), r.get("text_pair")) for r in rows]
    coded = _encode(path, texts, model)  # at once, so that both have one length and one program
    n = len(rows)
    arrays = {k: x[:n] for k, x in coded.items()}
    arrays |= {f"changed.{k}": x[n:] for k, x in coded.items() if len(texts) > n}
    if any("label" in r for r in rows):
        arrays["label"] = np.array([_need(path, r, "label") for r in rows], np.int32)
    for name in sorted({s for r in rows for s in r.get("slices", [])}):
        arrays[f"slice.{name}"] = np.array([name in r.get("slices", []) for r in rows])
    return pack(path.stem, arrays, kind=about.get("kind", "mft"), owner=about.get("owner", "maintainer"))


def _rows(path: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    rows: list[dict[str, Any]] = []
    about: dict[str, str] = {}
    for number, row in json_lines(path):
        if number == 1 and isinstance(row, dict) and set(row) == {"pack"} and isinstance(row["pack"], dict):
            about = row["pack"]
            continue
        if not isinstance(row, dict) or set(row) - FIELDS or not isinstance(row.get("text"), str):
            raise FileFormatError(
                f"`{path}`, line {number}, must be an object with `text` and some of "
                f"{', '.join(f'`{f}`' for f in sorted(FIELDS - {'text'}))}"
            )
        wrong = [
            key
            for key, ok in (
                ("text_pair", isinstance(row.get("text_pair", ""), str)),
                ("changed", isinstance(row.get("changed", ""), str)),
                ("label", type(row.get("label", 0)) is int),
                ("slices", isinstance(row.get("slices", []), list)),
            )
            if not ok
        ]
        if wrong:
            raise FileFormatError(f"`{path}`, line {number}: `{wrong[0]}` is {row[wrong[0]]!r}")
        rows.append(row)
    if not rows:
        raise FileFormatError(f"`{path}` has no example")
    return rows, about


def _need(path: Path, row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        raise FileFormatError(f"`{path}`: `{key}` must be in every line or in none")
    return row[key]


def _encode(
    path: Path, texts: list[tuple[str, str | None]], folder: str | Path | None
) -> dict[str, np.ndarray]:
    """Return texts as a right-padded batch, as the model of a folder reads them."""
    if folder is None or not (Path(folder) / "tokenizer.json").is_file():
        raise UsageError(
            f"`{path}` is text, and the base has no tokenizer.json to encode it; "
            "give the model's folder, or a NAME.safetensors pack of token ids"
        )
    from fishjax.models import build, load_tokenizer, pad
    from fishjax.models._folder import read_config

    model = build(read_config(Path(folder) / "config.json"))
    coded = load_tokenizer(folder, model).encode_batch([a if b is None else (a, b) for a, b in texts])
    batch = pad([c.ids for c in coded], model)
    segments = np.zeros_like(batch["input_ids"])
    for row, c in enumerate(coded):
        segments[row, : len(c.ids)] = c.type_ids
    return batch | ({"token_type_ids": segments} if segments.any() else {})
