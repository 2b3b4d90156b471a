"""Test packs of text: `NAME.jsonl`, one example a line.

    {"pack": {"kind": "mft", "owner": "maintainer"}}          (optional, first)
    {"text": "a fine film", "label": 1, "slices": ["short"]}
    {"text": "no plot", "text_pair": "at all", "label": 0}

For kinds `inv` and `dir`, `changed` is the altered text. The model's own tokenizer.json encodes it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

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
    encode = _encoder(path, model)
    arrays: dict[str, np.ndarray] = encode([(r["text"], r.get("text_pair")) for r in rows])
    if any("changed" in r for r in rows):
        altered = encode([(_need(path, r, "changed"), r.get("text_pair")) for r in rows])
        arrays = _padded(arrays, altered)
    if any("label" in r for r in rows):
        arrays["label"] = np.array([_need(path, r, "label") for r in rows], np.int32)
    for name in sorted({s for r in rows for s in r.get("slices", [])}):
        arrays[f"slice.{name}"] = np.array([name in r.get("slices", []) for r in rows])
    return pack(path.stem, arrays, kind=about.get("kind", "mft"), owner=about.get("owner", "maintainer"))


def _rows(path: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    rows: list[dict[str, Any]] = []
    about: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"`{path}`, line {number}, is not JSON: {error}") from None
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


def _encoder(path: Path, model: str | Path | None) -> Any:
    """Return a function from texts to `input_ids` and `attention_mask`, right-padded."""
    file = None if model is None else Path(model) / "tokenizer.json"
    if file is None or not file.is_file():
        raise UsageError(
            f"`{path}` is text, and the base has no tokenizer.json to encode it; "
            "give the model's folder, or a NAME.safetensors pack of token ids"
        )
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UsageError(f"`{path}` is text; to encode it, install `fishjax[hf]`") from None
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()

    def encode(texts: list[tuple[str, str | None]]) -> dict[str, np.ndarray]:
        coded = tokenizer.encode_batch([a if b is None else (a, b) for a, b in texts])
        ids = np.zeros((len(coded), max(len(c.ids) for c in coded)), np.int32)
        mask, segments = np.zeros_like(ids), np.zeros_like(ids)
        for row, c in enumerate(coded):
            ids[row, : len(c.ids)] = c.ids
            mask[row, : len(c.ids)] = 1
            segments[row, : len(c.ids)] = c.type_ids
        arrays = {"input_ids": ids, "attention_mask": mask}
        return arrays | ({"token_type_ids": segments} if segments.any() else {})

    return encode


def _padded(first: dict[str, np.ndarray], changed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Bring texts and altered texts to one length, so that one program takes both."""
    length = max(x.shape[1] for x in (*first.values(), *changed.values()))
    pad = lambda x: np.pad(x, ((0, 0), (0, length - x.shape[1])))
    return {k: pad(x) for k, x in first.items()} | {f"changed.{k}": pad(x) for k, x in changed.items()}
