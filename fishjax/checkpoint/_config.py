"""The config.json beside a model's weights, as far as files need it. Needs no jax."""

import json
from pathlib import Path
from typing import Any

from fishjax.checkpoint._links import check_inside
from fishjax.errors import FileFormatError

CONFIG = "config.json"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a file of JSON holds.

    Raises:
      FileFormatError: it is not JSON, or no object.
      FileNotFoundError: there is no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"`{path}` is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise FileFormatError(f"`{path}` must hold a JSON object; got {type(content).__name__}")
    return content


def family(folder: Path) -> str | None:
    """Return the `model_type` that a folder's config.json names, known here or not; None without one.

    Raises:
      FileFormatError: config.json is malformed, or a link that leads out of the folder.
    """
    check_inside(folder / CONFIG, folder)
    if not (folder / CONFIG).is_file():
        return None
    name = read_json(folder / CONFIG).get("model_type")
    return name if isinstance(name, str) and name.isprintable() else None


def rewrite(path: Path, *, layers: int | None = None, dtype: str | None = None) -> None:
    """Change what a config.json says of the weights beside it, where it says it; nothing else.

    Args:
      layers: how many there are.
      dtype: theirs.

    Raises:
      FileFormatError: it is malformed.
    """
    if layers is None and dtype is None:
        return
    config = read_json(path)
    if layers is not None:
        config |= {k: layers for k in ("num_hidden_layers", "num_layers", "n_layer") if k in config}
    if dtype is not None:
        config |= {k: dtype for k in ("torch_dtype", "dtype") if k in config}
    path.write_text(json.dumps(config, indent=2) + "\n")
