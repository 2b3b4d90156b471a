"""The output of a merge of files: laid out beforehand, written in any order, resumed after a kill.

The model grows in `OUT.partial/`, beside a journal that says for which merge it is and how far it came;
the last step is a rename to `OUT`. A lock there keeps other merges out, and says that the folder is ours:
what does not have it is nobody's to remove.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fishjax.checkpoint._atomic import atomic_file, refuse_existing, sync, write_all, write_at
from fishjax.checkpoint._config import CONFIG, rewrite
from fishjax.checkpoint._dtypes import Spec, dtype_name, num_bytes
from fishjax.checkpoint._links import inside
from fishjax.checkpoint._params import INDEX, SHARD_BYTES, SINGLE
from fishjax.checkpoint._safetensors import bad_name
from fishjax.errors import StructureError, UsageError
from fishjax.merge._blocks import Tensor

JOURNAL = "journal.json"
LOCK = "fishjax.lock"
SECONDS = 2.0  # between two entries of the journal; each waits for the disk


class Output:
    """A model that is being written: where each tensor goes, and how many pieces are done."""

    def __init__(
        self, out: str | os.PathLike, specs: Mapping[str, Spec], key: str, *, shard_bytes: int = SHARD_BYTES
    ):
        self.out, self.partial = Path(out), partial_of(out)
        self.folder = self.partial / "model"
        self.is_file = self.out.suffix == ".safetensors"
        refuse_output(out, [])
        self._files = _shards(specs, self.is_file, shard_bytes)
        self._key, self._synced = key, time.monotonic()
        self._fds: list[int] = []
        self.tensors: dict[str, Tensor] = {}
        self._lock = _lock(self.partial)
        try:
            refuse_existing(self.out)  # what held the lock may have been another merge of this name
            self.state = self._resume()
            for file, members in self._files.items():
                self._open(file, {n: specs[n] for n in members})
        except Exception:
            self.discard()
            raise

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Write entries of a tensor, from entry `start` on."""
        tensor = self.tensors[name]
        offset = tensor.start + start * tensor.spec.dtype.itemsize
        write_at(tensor.fd, memoryview(values.view(np.uint8)), offset)

    def done(self, pieces: int, *, now: bool = False, **state: Any) -> None:
        """Note that so many pieces are written; every few seconds, once the disk has them, for good."""
        if not now and time.monotonic() - self._synced < SECONDS:
            return
        for fd in self._fds:
            os.fsync(fd)
        self.state = {**self.state, **state, "key": self._key, "pieces": pieces}
        with atomic_file(self.partial / JOURNAL) as fd:
            write_all(fd, json.dumps(self.state).encode())
        self._synced = time.monotonic()

    def finish(self) -> None:
        """Give the whole model its name."""
        for fd in self._fds:
            os.fsync(fd)
        if len(self._files) > 1:
            homes = {n: file for file, members in self._files.items() for n in members}
            total = sum(num_bytes(*t.spec) for t in self.tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": homes}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for path in self.folder.rglob("*"):
            sync(path)
        sync(self.folder)
        # The journal goes last: whoever is killed before that only has to finish again.
        os.replace(self.folder / SINGLE if self.is_file else self.folder, self.out)
        sync(self.out.parent)
        self.discard()

    def close(self) -> None:
        """Let go of the files, and of the lock: what was done stays, to be resumed."""
        for fd in [*self._fds, *([self._lock] if self._lock >= 0 else [])]:
            os.close(fd)
        self._fds, self._lock = [], -1

    def discard(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError):
            self._clear()
            (self.partial / LOCK).unlink()
            self.partial.rmdir()
        self.close()

    def _clear(self) -> None:
        """Remove what an earlier try left; the lock stays, so that who is killed here goes on."""
        for path in self.partial.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def _resume(self) -> dict[str, Any]:
        """Return the journal of an earlier try at the same merge; all else that is there is removed."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            state = json.loads((self.partial / JOURNAL).read_bytes())
            # Of an output that was finished and taken away the journal may have stayed.
            if state["key"] == self._key and all((self.folder / file).exists() for file in self._files):
                for path in self.folder.iterdir():
                    if path.name not in self._files:
                        path.unlink()
                return state
        self._clear()
        room, needed = shutil.disk_usage(self.partial).free, 0
        for members in self._files.values():
            needed += sum(members.values())
        if needed > room:
            reason = f"the output needs {needed} bytes and the disk has {room} left"
            raise OSError(errno.ENOSPC, reason, str(self.out))
        os.mkdir(self.folder)
        return {"pieces": 0}

    def _open(self, file: str, specs: Mapping[str, Spec]) -> None:
        header, offsets = layout(specs)
        fd = os.open(self.folder / file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._fds.append(fd)
        os.pwrite(fd, header, 0)
        os.ftruncate(fd, len(header) + sum(num_bytes(*s) for s in specs.values()))
        for name, spec in specs.items():
            self.tensors[name] = Tensor(str(self.folder / file), fd, len(header) + offsets[name], spec)


def _shards(specs: Mapping[str, Spec], is_file: bool, shard_bytes: int) -> dict[str, dict[str, int]]:
    """Return which tensors go to which file, and their sizes."""
    shards: list[dict[str, int]] = [{}]
    for name in sorted(specs, key=str.encode):
        size = num_bytes(*specs[name])
        if shards[-1] and not is_file and sum(shards[-1].values()) + size > shard_bytes:
            shards.append({})
        shards[-1][name] = size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": s for i, s in enumerate(shards)}


def layout(specs: Mapping[str, Spec]) -> tuple[bytes, dict[str, int]]:
    """Return a safetensors header with its length in front, and where each tensor begins behind it."""
    offsets: dict[str, int] = {}
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(specs, key=lambda n: (-specs[n].dtype.itemsize, n.encode())):
        if reason := bad_name(name):
            raise StructureError(f"leaf name {name[:200]!r} {reason}; rename it")
        offsets[name], end = end, end + num_bytes(*specs[name])
        head[name] = {
            "dtype": dtype_name(name, specs[name].dtype),
            "shape": list(specs[name].shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def carry(source: Path, folder: Path, *, layers: int | None = None, dtype: str | None = None) -> None:
    """Copy a model folder's small files (configuration, tokenizer) beside the weights.

    Args:
      layers: how many layers the configuration is to name, where it is another number.
      dtype: what it is to name as dtype.
    """
    for path in carried_files(source):
        shutil.copyfile(path, folder / path.name)
    if (folder / CONFIG).exists():
        rewrite(folder / CONFIG, layers=layers, dtype=dtype)


def carried_files(source: Path) -> list[Path]:
    """Return a model folder's small files, but for its index and links out of it; of a file none."""
    return [
        path
        for path in (sorted(source.iterdir()) if source.is_dir() else [])
        if path.suffix in (".json", ".txt", ".model", ".jinja")
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
        and path.is_file()
        and inside(path, source)
    ]


def partial_of(out: str | os.PathLike) -> Path:
    """Return the folder in which an output grows.

    Raises:
      UsageError: the output is a name like `.` or nothing, which no new file or folder can have.
    """
    path = Path(out)
    if path.name in ("", ".."):
        raise UsageError(f"`{out}` names no new file or folder; give another output")
    return path.with_name(path.name + ".partial")


def refuse_output(out: str | os.PathLike, inputs: Iterable[str | os.PathLike]) -> None:
    """Raise if an output cannot be written: before a merge, and in a dry run.

    Raises:
      UsageError: it exists; it is one of the inputs, lies in one or holds one, or the folder in which it
        grows does; that folder is there and is not what an unfinished merge left.
      FileNotFoundError: there is no folder to write into.
    """
    partial = partial_of(out)
    for new in (Path(out).resolve(), partial.resolve()):
        for path in inputs:
            old = Path(path).resolve()
            if new == old or new in old.parents or old in new.parents:
                what = "" if new == Path(out).resolve() else f", written by way of `{partial}`,"
                raise UsageError(
                    f"`{out}`{what} is an input, or lies in one, or holds one; give another output"
                )
    refuse_existing(out)
    if not partial.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder to write into", str(partial.parent))
    if os.path.lexists(partial) and not _is_ours(partial):
        raise UsageError(
            f"`{out}` is written by way of `{partial}`, which is not what an unfinished merge left; "
            "move it, or give another output"
        )


def _is_ours(partial: Path) -> bool:
    """Say whether something is the folder of an unfinished merge; one that is empty may be."""
    if partial.is_symlink() or not partial.is_dir():
        return False
    return (partial / LOCK).is_file() or not any(partial.iterdir())


def _lock(partial: Path) -> int:
    """Make a merge's folder, or take one that was left, for nobody else to write to; return the lock.

    Raises:
      UsageError: another process writes there.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(partial)
    try:
        fd = os.open(partial / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError:
        with contextlib.suppress(OSError):
            os.rmdir(partial)  # if it is empty
        raise
    try:
        with contextlib.suppress(OSError):  # a file system may know no locks
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"another merge is writing to `{partial}`; wait for its end, or give another output"
                ) from None
        # Whoever held it may have finished just now, and have taken it away.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(partial / LOCK)):
                return fd
        raise UsageError(f"another merge has just written by way of `{partial}`; try again")
    except BaseException:
        os.close(fd)
        raise


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
