"""Docstrings of installed Python packages as examples of text: which package is one from?"""

import ast
import importlib.util
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fishjax.errors import UsageError


def examples(
    packages: Sequence[str], *, each: int, words: int = 40, seed: int = 0
) -> tuple[list[str], list[int]]:
    """Return first paragraphs of docstrings, with the place of their package in `packages` as label.

    Nothing is imported: the sources are parsed. Names of the packages are cut out of the text, and a text
    counts once. The examples are shuffled by the seed.

    Args:
      packages: names of installed packages.
      each: how many examples of every package.
      words: at most, of a text; a text has at least 4.

    Raises:
      UsageError: a package is not installed, or has fewer docstrings.
    """
    names = re.compile("|".join(map(re.escape, packages)), re.IGNORECASE)
    rng, rows, seen = np.random.default_rng(seed), [], set()
    for label, package in enumerate(packages):
        found = []
        for file in _sources(package):
            for text in _docstrings(file):
                text = " ".join(names.sub("", text.split("\n\n")[0]).split()[:words])
                if len(text.split()) >= 4 and text.lower() not in seen:
                    seen.add(text.lower())
                    found.append(text)
        if len(found) < each:
            raise UsageError(f"`{package}` has {len(found)} different docstrings; `each` is {each}")
        rows += [(found[i], label) for i in rng.permutation(len(found))[:each]]
    order = rng.permutation(len(rows))
    return [rows[i][0] for i in order], [rows[i][1] for i in order]


def _sources(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"the package `{package}` is not installed; it is one of the classes")
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.py"))
    return [f for f in files if not {"tests", "testing", "test", "_vendor"} & set(f.parts)]


def _docstrings(file: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in other people's sources
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            return []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [text for n in ast.walk(tree) if isinstance(n, kinds) and (text := ast.get_docstring(n))]
