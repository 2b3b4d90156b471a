"""Lines of JSON, with the number that an error names."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fishjax.errors import FileFormatError


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number, from 1, and the content of each line that is not blank.

    Raises:
      FileFormatError: a line is not JSON.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"`{path}`, line {number}, is not JSON: {error}") from None
        yield number, row
