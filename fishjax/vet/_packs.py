"""Test packs: held examples with what should come out, one file each.

`NAME.safetensors` holds the arrays of a batch by their batch names, leading axis B, and what to expect:

- kind `mft` (minimum functionality): `label` int `[B]`, the class; or `labels` int `[B]` or `[B, T]`
  (-100 does not count), which the model gets too. An example is right if all its labels are predicted.
- kind `inv` (invariance): for each input that was altered, `changed.INPUT` beside `INPUT`. An example
  is right if the prediction stays the same.
- kind `dir` (direction): as `inv`, and `label`: the class whose probability must not fall.

Optional bool arrays `slice.NAME` `[B]` mark parts of the examples that are reported on their own. The
metadata is `kind` (`mft` when absent) and `owner` (`maintainer` when absent).

References: Ribeiro et al. 2020, arXiv 2005.04118 (the three kinds of tests).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fishjax.errors import FileFormatError, UsageError

KINDS = ("mft", "inv", "dir")


class Pack(NamedTuple):
    """A held test: a batch of `B` examples and what should come out."""

    name: str
    batch: Mapping[str, np.ndarray]
    label: np.ndarray | None = None  # int [B] or [B, T]
    changed: Mapping[str, np.ndarray] = {}  # inputs as altered, for `inv` and `dir`
    slices: Mapping[str, np.ndarray] = {}  # bool [B]
    kind: str = "mft"
    owner: str = "maintainer"

    @property
    def size(self) -> int:
        """B, the number of examples."""
        return len(next(iter(self.batch.values())))


def pack(
    name: str, arrays: Mapping[str, np.ndarray], *, kind: str = "mft", owner: str = "maintainer"
) -> Pack:
    """Return a test pack from arrays by name, checked.

    Raises:
      FileFormatError: unequal numbers of examples, labels missing or of a wrong shape, unknown kind.

    >>> pack("held", {"x": np.ones((3, 2)), "label": np.array([0, 1, 1])}).size
    3
    """
    arrays = {key: np.asarray(x) for key, x in arrays.items()}
    slices = {k.removeprefix("slice."): x for k, x in arrays.items() if k.startswith("slice.")}
    changed = {k.removeprefix("changed."): x for k, x in arrays.items() if k.startswith("changed.")}
    batch = {k: x for k, x in arrays.items() if k != "label" and not k.startswith(("slice.", "changed."))}
    label = arrays.get("label", arrays.get("labels"))
    found = Pack(name, batch, label, changed, slices, kind, owner)
    if problem := _problem(found, arrays):
        raise FileFormatError(f"the test pack `{name}` {problem}")
    return found


def load_packs(folder: str | Path, *, model: str | Path | None = None) -> tuple[Pack, ...]:
    """Read every test pack of a folder, `*.safetensors` and `*.jsonl`, in the order of their names.

    Args:
      model: the model's folder, whose tokenizer.json encodes the text of `*.jsonl` packs.

    Raises:
      UsageError: no such folder, no pack in it, two of the same name, or text without a tokenizer.
      FileFormatError: a malformed pack.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"the tests `{folder}` are no folder; give a folder of NAME.safetensors packs")
    from fishjax.vet._text_packs import load_text_pack

    paths = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".jsonl"))
    if not paths:
        raise UsageError(f"the folder `{folder}` has no test pack (NAME.safetensors, NAME.jsonl) in it")
    by_name: dict[str, Path] = {}
    for path in paths:
        if (other := by_name.setdefault(path.stem, path)) != path:
            raise UsageError(f"`{other}` and `{path}` are tests of the same name; rename one")
    return tuple(
        load_pack(p) if p.suffix == ".safetensors" else load_text_pack(p, model=model) for p in paths
    )


def load_pack(path: str | Path) -> Pack:
    """Read one test pack; its name is the file's.

    Raises:
      FileFormatError: the file or what it holds is malformed.
    """
    from fishjax.checkpoint._safetensors import open_file

    path = Path(path)
    with open_file(path) as file:
        metadata = file.metadata
        arrays = {name: file[name] for name in file}
    return pack(
        path.stem, arrays, kind=metadata.get("kind", "mft"), owner=metadata.get("owner", "maintainer")
    )


def save_pack(path: str | Path, found: Pack) -> None:
    """Write a test pack as a safetensors file; see the top of this file for what is in it.

    >>> import tempfile
    >>> held = pack("held", {"x": np.ones((3, 2)), "label": np.array([0, 1, 1])})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pack(folder + "/held.safetensors", held)
    ...     load_packs(folder)[0].label.tolist()
    [0, 1, 1]
    """
    from fishjax.checkpoint._safetensors import Spec, write_file

    arrays = dict(found.batch)
    if found.label is not None and "labels" not in arrays:
        arrays["label"] = found.label
    arrays |= {f"changed.{k}": x for k, x in found.changed.items()}
    arrays |= {f"slice.{k}": x for k, x in found.slices.items()}
    specs = {k: Spec(x.dtype, x.shape) for k, x in arrays.items()}
    write_file(path, specs, arrays.__getitem__, {"kind": found.kind, "owner": found.owner})


def _problem(found: Pack, arrays: Mapping[str, np.ndarray]) -> str | None:
    """Say what is wrong with a pack, or None."""
    label = found.label
    if found.kind not in KINDS:
        return f"is of kind `{found.kind}`; wanted one of {', '.join(KINDS)}"
    if not found.batch:
        return "has no inputs"
    if "label" in arrays and "labels" in arrays:
        return "has both `label` and `labels`; give one"
    if label is None and found.kind != "inv":
        return "has no `label`"
    if label is not None and (label.dtype.kind not in "iu" or label.ndim not in (1, 2)):
        return f"has labels of {label.dtype}{list(label.shape)}; wanted integers, [B] or [B, T]"
    if found.kind == "dir" and label is not None and label.ndim != 1:
        return "is of kind `dir`, whose `label` must be [B]"
    if (found.kind == "mft") == bool(found.changed):
        return "needs `changed.INPUT` arrays exactly if it is of kind `inv` or `dir`"
    if lost := sorted(found.changed.keys() - found.batch.keys()):
        return f"has `changed.{lost[0]}` but no `{lost[0]}`"
    for key, x in arrays.items():
        if x.ndim == 0 or len(x) != found.size or not len(x):
            return f"needs as many examples in every array, at least 1; `{key}` is {list(x.shape)}"
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            return f"has a NaN or infinity in `{key}`"
    for key, x in found.slices.items():
        if x.dtype != bool or x.ndim != 1:
            return f"has the slice `{key}` of {x.dtype}{list(x.shape)}; wanted bool [B]"
    return None
