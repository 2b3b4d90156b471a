"""Parameters from and to files: one safetensors file, a Hugging Face folder, an Orbax folder.

The tree is the file: names are split at ".", layouts are the file's own. Arrays are memory-mapped.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from fishjax.checkpoint._atomic import atomic_file, write_all
from fishjax.checkpoint._digest import flat_leaves, leaf_specs
from fishjax.checkpoint._dtypes import Spec, host, num_bytes
from fishjax.checkpoint._header import unique
from fishjax.checkpoint._links import check_inside
from fishjax.checkpoint._orbax import is_orbax, load_orbax, orbax_specs, save_orbax
from fishjax.checkpoint._safetensors import TensorFile, open_file, write_file
from fishjax.errors import FileFormatError, UsageError
from fishjax.tree import nest, select
from fishjax.types import Params

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
REFUSED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".npz", ".npy", ".gguf")
_MAX_INDEX = 64 << 20


class ParamFiles(Mapping[str, np.ndarray]):
    """A model's tensors in one or several files: a mapping from names to memory-mapped arrays.

    As in `TensorFile`, an array is mapped when it is asked for and unmapped with its last use.
    `specs` tells dtypes and shapes, `files` which file (by its name) holds which tensors.
    """

    def __init__(self, files: Mapping[str, TensorFile]):
        self.files = dict(files)
        self._home = {name: file for file in self.files.values() for name in file}

    @property
    def specs(self) -> dict[str, Spec]:
        return {n: s for file in self.files.values() for n, s in file.specs.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._home[name][name]

    def read_flat(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return entries `start` to `stop` of a tensor, in C order, as a fresh array `[stop - start]`."""
        return self._home[name].read_flat(name, start, stop)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def __enter__(self) -> "ParamFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_params(path: str | os.PathLike) -> ParamFiles:
    """Open a .safetensors file or a Hugging Face folder for reading tensor by tensor; needs no jax.

    Raises:
      FileFormatError: a file is malformed or of a format that can run code; an index and its
        shards disagree; a file of a folder is a link that leads out of it.
      FileNotFoundError: there is nothing at `path`, or a shard is missing.
      UsageError: it is an Orbax folder, which only `load_params` reads.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_params(folder + "/model", {"a": {"w": np.ones(2)}})
    ...     with open_params(folder + "/model") as tensors:
    ...         {name: tensors[name].sum() for name in tensors}
    {'a.w': np.float64(2.0)}
    """
    path = Path(path)
    if not path.is_dir():
        _refuse_suffix(path)
        return ParamFiles({path.name: open_file(path)})
    for name in (SINGLE, INDEX):
        check_inside(path / name, path)
    single, index = (path / SINGLE).exists(), (path / INDEX).exists()
    if single and index:
        raise FileFormatError(f"`{path}` holds both `{SINGLE}` and `{INDEX}`; remove the one that is stale")
    if single:
        return ParamFiles({SINGLE: open_file(path / SINGLE)})
    if index:
        return _open_shards(path)
    if is_orbax(path):
        raise UsageError(f"`{path}` is an Orbax folder; convert it first: fishjax convert {path} OUT --to hf")
    others = sorted(p.name for p in path.iterdir())
    for name in others:
        _refuse_suffix(path / name)
    raise FileNotFoundError(
        f"`{path}` holds no model: wanted `{SINGLE}` or `{INDEX}`; found {', '.join(others[:8]) or 'nothing'}"
    )


def load_params(path: str | os.PathLike, *, only: str | Sequence[str] | None = None) -> Params:
    """Load a model's parameters as a nested dict, its names split at ".".

    Args:
      path: a .safetensors file, a Hugging Face folder (`model.safetensors`, or shards and their
        index) or an Orbax folder. Arrays of the first two are read-only and memory-mapped, in the
        file's own dtypes and layouts.
      only: regexes of leaf names (`re.search`); just these leaves are read.

    Raises:
      FileFormatError: a file is malformed, of a format that can run code, or a link out of its folder.
      FileNotFoundError: there is nothing at `path`.
      UsageError: a regex of `only` matches no leaf; near names are told.
      StructureError: a name is both a leaf and a branch.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_params(folder + "/a.safetensors", {"a": {"w": np.ones(2), "b": np.zeros(3)}})
    ...     load_params(folder + "/a.safetensors", only="w$")
    {'a': {'w': array([1., 1.])}}
    """
    if is_orbax(path):
        return load_orbax(path, None if only is None else select(only, orbax_specs(path)))
    with open_params(path) as tensors:
        if only is not None:
            wanted = select(only, tensors)
            return nest({n: tensors[n] for n in tensors if n in wanted})
        return nest({n: x for file in tensors.files.values() for n, x in file.read_all().items()})


def save_params(
    path: str | os.PathLike,
    params: Params,
    *,
    layout: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    wait: bool = True,
) -> Callable[[], None] | None:
    """Save parameters, each file whole or not at all.

    Args:
      path: a file where it ends in .safetensors, else a folder, which is made if need be.
      params: any pytree of arrays; numpy, jax (sharded too), any layout in memory.
      layout: "file", "hf" or "orbax"; None decides between the first two by the path.
      shard_bytes: a folder's files hold about this many bytes each.
      wait: False, for "orbax" only, copies the parameters, writes in the background and returns a
        function that waits for the end and raises what went wrong; call it before the program ends.

    Raises:
      StructureError: a leaf's name or dtype cannot be written.
      UsageError: the folder holds a model in another layout; an Orbax folder exists.
      OSError: the file system refuses, for instance because it is full.
    """
    path = Path(path)
    layout = layout or ("file" if path.suffix == ".safetensors" else "hf")
    if layout == "orbax":
        return save_orbax(path, params, wait=wait)
    if not wait:
        raise UsageError(f'`wait=False` is for `layout="orbax"`; got {layout!r}')
    flat, specs = flat_leaves(params), leaf_specs(params)
    read = lambda name: host(name, flat[name])
    if layout == "file":
        write_file(path, specs, read)
    elif layout == "hf":
        path.mkdir(exist_ok=True)
        write_folder(path, specs, read, shard_bytes=shard_bytes)
    else:
        raise UsageError(f'`layout` must be "file", "hf" or "orbax"; got {layout!r}')
    return None


def write_folder(
    folder: Path,
    specs: Mapping[str, Spec],
    read: Callable[[str], np.ndarray | Iterable[np.ndarray]],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors into a folder as Hugging Face names them: one file, or shards and then their index.

    Raises:
      UsageError: the folder holds a model in the other layout, which would contradict this one.
    """
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name in sorted(specs, key=str.encode):
        size = num_bytes(*specs[name])
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    stale = {SINGLE, INDEX} if len(shards) > 1 else {INDEX}
    if stale := {n for n in stale if (folder / n).exists()}:
        raise UsageError(f"`{folder}` holds a model in another layout (`{min(stale)}`); give an empty folder")
    if len(shards) == 1:
        write_file(folder / SINGLE, specs, read, {"format": "pt"})
        return
    homes: dict[str, str] = {}
    for i, members in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, {n: specs[n] for n in members}, read, {"format": "pt"})
        homes |= dict.fromkeys(members, file)
    total = sum(num_bytes(*s) for s in specs.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": homes}, indent=2, sort_keys=True)
    with atomic_file(folder / INDEX) as fd:  # last: without it the folder is no model
        write_all(fd, text.encode() + b"\n")


def _open_shards(folder: Path) -> ParamFiles:
    homes = _read_index(folder / INDEX)
    files: dict[str, TensorFile] = {}
    try:
        for file in sorted(set(homes.values())):
            check_inside(folder / file, folder)
            try:
                files[file] = open_file(folder / file)
            except FileNotFoundError:
                raise FileNotFoundError(f"`{folder / file}` is missing; `{INDEX}` lists it") from None
            listed = {n for n, home in homes.items() if home == file}
            if odd := sorted(listed - set(files[file])):
                raise FileFormatError(
                    f"`{folder / INDEX}` places `{odd[0]}` in `{file}`, which does not hold it"
                )
            if odd := sorted(set(files[file]) - listed):
                raise FileFormatError(
                    f"`{folder / file}` holds `{odd[0]}`, which `{INDEX}` does not place there"
                )
        for other in sorted(folder.glob("model*.safetensors")):
            if other.name not in files:
                raise FileFormatError(
                    f"`{other}` is not listed in `{INDEX}`; remove it, or the index is stale"
                )
    except BaseException:
        for opened in files.values():
            opened.close()
        raise
    return ParamFiles(files)


def _read_index(path: Path) -> dict[str, str]:
    if path.stat().st_size > _MAX_INDEX:
        raise FileFormatError(f"`{path}` has {path.stat().st_size} bytes; at most {_MAX_INDEX} are allowed")
    try:
        homes = json.loads(path.read_bytes().decode(), object_pairs_hook=unique)["weight_map"]
        assert homes and all(type(file) is str for file in homes.values())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise FileFormatError(
            f"`{path}` is no index of shards: wanted an object `weight_map` from names to files ({error!r})"
        ) from None
    # `total_size` is not compared: it counts torch's storages, views and all, and nothing depends on it.
    for name, file in homes.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise FileFormatError(
                f"`{path}` places `{name}` in `{file}`; wanted a .safetensors file beside it"
            )
    return homes


def _refuse_suffix(path: Path) -> None:
    if path.suffix in REFUSED and path.exists():
        raise FileFormatError(
            f"`{path}` is not a safetensors file; what can run code or cannot be checked is not read. "
            "Convert it to safetensors where you trust it"
        )
