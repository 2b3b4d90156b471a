"""Read YAML that a person wrote: plain values only, and no key twice."""

from pathlib import Path
from typing import Any

from fishjax.errors import UsageError


def load(path: str | Path, what: str) -> Any:
    """Return the plain values in a YAML (or JSON) file.

    Args:
      what: the file in words, for errors: "the policy `p.yaml`".

    Raises:
      UsageError: no such file, no YAML, or a key that a mapping has twice, of which YAML keeps the last.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        twice = _repeated(yaml.compose(text, Loader=yaml.SafeLoader), set())
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{what} cannot be read: {_line(error)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{what} is not YAML: {_line(error)}") from None
    if twice is not None:
        raise UsageError(f"{what} has the key `{twice}` twice; YAML would keep the last")
    return values


def _repeated(node: Any, seen: set[int]) -> str | None:
    """Return a key that a YAML mapping has twice, at any depth, or None."""
    if id(node) in seen or not isinstance(getattr(node, "value", None), list):
        return None
    seen.add(id(node))
    pairs = [item if isinstance(item, tuple) else (None, item) for item in node.value]
    keys = [key.value for key, _ in pairs if key is not None and isinstance(key.value, str)]
    return next(
        (k for k in keys if keys.count(k) > 1),
        next((found for _, value in pairs if (found := _repeated(value, seen))), None),
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
