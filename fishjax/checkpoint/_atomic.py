"""Writes that happen wholly or not at all: temporary beside, fsync, rename, fsync of the folder.

Who writes a temporary holds its lock, so one that nobody holds was left by a killed process, and the next
write to the same name removes it.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from fishjax.errors import UsageError

_TEMPORARY = re.compile(r"\.(.*)\.[0-9a-f]{16}\.tmp", re.DOTALL)
_LARGE = 1 << 18  # bytes from which the disk is told to begin with a write
_STEP = 1 << 20  # bytes written at a time: for more Linux takes memory in pieces that it finds slowly
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Name the output where the disk is full: a write names no file, and a copy its source.

    >>> with naming("out"):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
      ...
    OSError: [Errno 28] No space left on device: 'out'
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[int]:
    """Give a file descriptor to write to; on leaving, the whole file appears under `path`.

    On any error the temporary is removed and whatever `path` held stays as it was. An existing
    file's mode bits are kept; an existing symbolic link is replaced, not written through.

    Raises:
      UsageError: `path` is a folder, device, pipe or socket.
      OSError: the file system refuses, for instance because it is full.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_file(folder + "/a") as fd:
    ...         write_all(fd, b"whole")
    ...     Path(folder, "a").read_bytes()
    b'whole'
    """
    path = Path(path)
    mode = None
    with contextlib.suppress(FileNotFoundError):
        found = os.lstat(path)
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)):
            raise UsageError(f"`{path}` exists and is no regular file; give the name of a file to write")
        mode = stat.S_IMODE(found.st_mode) if stat.S_ISREG(found.st_mode) else None
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
    temp, fd = _beside(path, lambda temp: os.open(temp, flags, 0o666))
    try:
        with naming(path):
            yield fd
        if mode is not None:
            os.fchmod(fd, mode)
        os.fsync(fd)
        os.replace(temp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temp)
        raise
    finally:
        os.close(fd)
    sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Give an empty temporary folder to fill; on leaving it is renamed to `path`.

    Raises:
      UsageError: `path` exists and is not an empty folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as top:
    ...     with atomic_folder(top + "/out") as folder:
    ...         _ = (folder / "a").write_text("b")
    ...     sorted(os.listdir(top))
    ['out']
    """
    path = Path(path)
    refuse_existing(path)

    def make(temp: Path) -> int:
        os.mkdir(temp)
        return os.open(temp, os.O_RDONLY | os.O_CLOEXEC)

    temp, fd = _beside(path, make)
    try:
        with naming(path):
            yield temp
        for folder, _, _ in os.walk(temp, topdown=False):
            sync(folder)
        os.replace(temp, path)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    finally:
        os.close(fd)
    sync(path.parent)


def refuse_existing(path: str | os.PathLike) -> None:
    """Raise unless nothing is at `path`, or an empty folder.

    Raises:
      UsageError: something would be overwritten; or it is no name, like `.`.
    """
    path = Path(path)
    if path.name in ("", ".."):
        raise UsageError(f"`{path}` names no new file or folder; give another name")
    if path.is_dir() and not path.is_symlink():
        if any(path.iterdir()):
            raise UsageError(f"`{path}` exists and is not empty; give a new name or an empty folder")
    elif os.path.lexists(path):
        raise UsageError(f"`{path}` exists already; give a new name or remove it first")


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data` at a file's position, however little the system takes at a time."""
    view = memoryview(data)
    size = view.nbytes
    while view:
        view = view[os.write(fd, view[:_STEP]) :]
    if size >= _LARGE:
        with contextlib.suppress(OSError):  # where there are no positions
            stop = os.lseek(fd, 0, os.SEEK_CUR)
            begin_writing(fd, stop - size, stop)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all bytes of `data` at a place in a file."""
    start = offset
    while data:
        count = os.pwrite(fd, data[:_STEP], offset)
        data, offset = data[count:], offset + count
    begin_writing(fd, start, offset)


def begin_writing(fd: int, start: int, stop: int) -> None:
    """Let the disk begin with bytes of a file now, if they are many, so that its end waits for little."""
    if stop - start >= _LARGE and hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # it is an advice; pages that are not written yet stay in memory
            os.posix_fadvise(fd, start, stop - start, os.POSIX_FADV_DONTNEED)


def sync(path: str | os.PathLike) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _beside(path: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """Make something of a new, hidden name in the same folder, from which a rename suffices, and lock it.

    What a killed process left there of an earlier write to `path` is removed.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder to write into", str(path.parent))
    temp = path.with_name(f".{path.name[:64]}.{secrets.token_hex(8)}.tmp")
    if _TEMPORARY.fullmatch(path.parent.name):  # new, and locked by whoever fills it
        return temp, make(temp)
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # no locks here: then nothing is ever taken for left behind
            fcntl.flock(folder, fcntl.LOCK_EX)  # nobody is between making a temporary and locking it
        for name in os.listdir(folder):
            if (found := _TEMPORARY.fullmatch(name)) and found[1] == path.name[:64]:
                _remove_left(path.with_name(name))
        fd = make(temp)
        _lock(fd)
        return temp, fd
    finally:
        os.close(folder)


def _remove_left(temp: Path) -> None:
    """Remove a temporary that nobody is writing."""
    with contextlib.suppress(OSError):
        fd = os.open(temp, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
        try:
            if _lock(fd):
                shutil.rmtree(temp) if stat.S_ISDIR(os.fstat(fd).st_mode) else os.unlink(temp)
        finally:
            os.close(fd)


def _lock(fd: int) -> bool:
    """Take a lock that lasts as long as its file is open; say whether it was free."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
