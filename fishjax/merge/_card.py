"""The model card of a merge: what it was made of, in words for people and fields for hubs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fishjax.types import Digest

RECIPE = "fishjax_merge.yaml"


def model_card(
    recipe: Mapping[str, Any],
    sources: Sequence[tuple[str, Digest]],
    digest: Digest,
    *,
    parents: Sequence[str],
    beside: Sequence[tuple[str, Digest]] = (),
) -> dict[str, str]:
    """Return `{file name: text}`: a README with metadata as hubs read it, and the recipe with digests.

    Args:
      recipe: what was asked for.
      sources: path and content id of every model that went in, path and digest of every patch.
      digest: the content id of the result.
      parents: the paths of those that are models.
      beside: the same of what else was read, such as Fishers; recorded as inputs, no models.
    """
    head = {
        "base_model": [_name(path) for path in parents],
        "base_model_relation": "merge",
        "tags": ["merge", "fishjax"],
    }
    lines = [f"| `{_name(path)}` | `{id or 'not computed'}` |" for path, id in sources]
    method = recipe.get("method") or recipe.get("merge_method")
    card = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {Path(sources[0][0]).name} and others, merged",
        f"Made by fishjax, method `{method}`. Content id: `{digest or 'not computed'}`.",
        "| model | content id |\n|---|---|\n" + "\n".join(lines),
        f"The recipe, as it was run:\n\n```yaml\n{yaml.safe_dump(dict(recipe), sort_keys=False)}```",
    ]
    record = {"recipe": dict(recipe), "inputs": dict([*sources, *beside]), "result": digest}
    return {"README.md": "\n\n".join(card) + "\n", RECIPE: yaml.safe_dump(record, sort_keys=False)}


def _name(path: str) -> str:
    """Return what a hub would call a model: the last two parts of a relative path, else its name."""
    given = Path(path)
    return given.name if given.is_absolute() or len(given.parts) > 2 else path
