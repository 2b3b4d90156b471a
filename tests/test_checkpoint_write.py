"""Writes that fail or are killed half way lose nothing and leave nothing; large ones begin at once."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fishjax import checkpoint, merge
from fishjax.checkpoint import _atomic
from fishjax.errors import FileFormatError, UsageError

OLD = {"w": np.arange(4, dtype=np.float32)}
NEW = {"w": np.arange(6, dtype=np.float32), "v": np.ones(3)}


class Faulty:
    """Make the n-th of all calls of some functions of `os` fail."""

    def __init__(self, monkeypatch, n, code):
        self.left, self.code = n, code
        for name in ("write", "fsync", "replace"):
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, function):
        def call(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                raise OSError(self.code, os.strerror(self.code))
            return function(*args, **kwargs)

        return call


def fail_at_each_step(monkeypatch, write, check, code=errno.ENOSPC):
    """Run `write` with the first, second ... system call failing, until none does; count the failures."""
    for n in range(1, 200):
        with monkeypatch.context() as patch:
            Faulty(patch, n, code)
            try:
                write()
            except OSError as error:
                assert error.errno == code
            else:
                return n - 1
        check()
    raise AssertionError("it never succeeded")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, code):
    path = tmp_path / "a.safetensors"
    checkpoint.save_params(path, OLD)
    old_or_new = (checkpoint.digest(OLD), checkpoint.digest(NEW))

    def check():
        assert os.listdir(tmp_path) == ["a.safetensors"]
        assert checkpoint.digest(checkpoint.load_params(path)) in old_or_new

    failures = fail_at_each_step(monkeypatch, lambda: checkpoint.save_params(path, NEW), check, code)
    assert failures == 6  # header, two tensors, fsync, rename, fsync of the folder
    assert checkpoint.digest(checkpoint.load_params(path)) == checkpoint.digest(NEW)


def test_before_the_rename_the_old_file_is_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    checkpoint.save_params(path, OLD)
    for n in range(1, 6):
        with monkeypatch.context() as patch:
            Faulty(patch, n, errno.ENOSPC)
            with pytest.raises(OSError):
                checkpoint.save_params(path, NEW)
        assert checkpoint.digest(checkpoint.load_params(path)) == checkpoint.digest(OLD)


def test_a_failed_apply_leaves_nothing(tmp_path, monkeypatch):
    checkpoint.save_params(tmp_path / "base", OLD)
    (tmp_path / "base" / "config.json").write_text("{}")
    checkpoint.save_params(tmp_path / "tuned", {"w": OLD["w"] + 1})
    checkpoint.diff_files(tmp_path / "base", tmp_path / "tuned", tmp_path / "p")
    before = sorted(os.listdir(tmp_path))
    out = tmp_path / "out"

    def check():
        left = sorted(os.listdir(tmp_path))
        if "out" in left:  # only the last step, the fsync after the rename, failed
            assert checkpoint.digest(checkpoint.load_params(out)) == checkpoint.digest({"w": OLD["w"] + 1})
            assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]
            os.unlink(out / "config.json")
            os.unlink(out / "model.safetensors")
            os.rmdir(out)
        else:
            assert left == before

    write = lambda: checkpoint.apply_file(tmp_path / "p", tmp_path / "base", out)
    # the configuration's fsync; header, tensor, fsync, rename, fsync; fsync of the folder, rename, fsync
    assert fail_at_each_step(monkeypatch, write, check) == 9


@pytest.mark.parametrize("write", ["patch", "fisher", "mask"])
def test_a_failed_write_of_each_kind_leaves_nothing(tmp_path, monkeypatch, write):
    from fishjax.patches import Dense

    writers = {
        "patch": lambda: checkpoint.save_patch(tmp_path / "f", {"w": Dense(OLD["w"] + 1)}, base=OLD),
        "fisher": lambda: checkpoint.save_fisher(tmp_path / "f", OLD, metadata={}),
        "mask": lambda: checkpoint.save_mask(tmp_path / "f", {"w": OLD["w"] > 1}),
    }

    def check():
        assert os.listdir(tmp_path) in ([], ["f"])
        if (tmp_path / "f").exists():
            assert checkpoint.inspect(tmp_path / "f")["kind"] == write
            os.unlink(tmp_path / "f")

    assert fail_at_each_step(monkeypatch, writers[write], check) >= 5


def test_a_failing_source_leaves_nothing(tmp_path):
    from fishjax.checkpoint._dtypes import Spec
    from fishjax.checkpoint._safetensors import write_file

    def read(name):
        if name == "b":
            raise KeyboardInterrupt
        return np.ones(2)

    specs = {n: Spec(np.dtype(float), (2,)) for n in "ab"}
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "a", specs, read)
    assert os.listdir(tmp_path) == []


def test_killed_in_mid_write(tmp_path):
    """SIGKILL at every system call of a save: the file is the old one or the new one, never a mixture."""
    path = tmp_path / "a.safetensors"
    script = textwrap.dedent("""
        import os, signal, sys
        import numpy as np
        from fishjax import checkpoint
        path = sys.argv[1]
        new = {"w": np.arange(6, dtype=np.float32), "v": np.ones(3)}
        for n in range(1, 7):  # header, two tensors, fsync, rename, fsync of the folder
            if os.fork() == 0:
                left = n
                def wrap(function):
                    def call(*args, **kwargs):
                        global left
                        left -= 1
                        if left == 0:
                            os.kill(os.getpid(), signal.SIGKILL)
                        return function(*args, **kwargs)
                    return call
                for name in ("write", "fsync", "replace"):
                    setattr(os, name, wrap(getattr(os, name)))
                checkpoint.save_params(path, new)
                os._exit(0)
            status = os.wait()[1]
            print(os.WTERMSIG(status), checkpoint.digest(checkpoint.load_params(path)))
    """)
    checkpoint.save_params(path, OLD)
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True, cwd=os.getcwd()
    )
    got = [line.split() for line in done.stdout.splitlines()]
    assert [signal for signal, _ in got] == [str(int(signal.SIGKILL))] * 6
    assert [d for _, d in got] == [checkpoint.digest(OLD)] * 5 + [checkpoint.digest(NEW)]
    assert os.listdir(tmp_path) == [path.name]  # what one left, the next one removed
    checkpoint.save_params(path, NEW)


def test_saving_over_the_file_being_read(tmp_path):
    path = tmp_path / "a.safetensors"
    big = {str(i): np.random.default_rng(i).normal(size=(300, 300)) for i in range(4)}
    checkpoint.save_params(path, big)
    mapped = checkpoint.load_params(path)
    mapped["0"] = mapped["0"] + 1
    checkpoint.save_params(path, mapped)
    got = checkpoint.load_params(path)
    for name, want in big.items():
        np.testing.assert_array_equal(got[name], want + (name == "0"))
        np.testing.assert_array_equal(mapped[name], want + (name == "0"))  # the old mapping is whole


def test_mode_bits_and_links(tmp_path):
    path, link = tmp_path / "a.safetensors", tmp_path / "link.safetensors"
    checkpoint.save_params(path, OLD)
    os.chmod(path, 0o640)
    link.symlink_to(path)
    checkpoint.save_params(path, NEW)
    assert path.stat().st_mode & 0o777 == 0o640
    checkpoint.save_params(link, OLD)  # replaces the link; what it led to is another's
    assert not link.is_symlink()
    assert checkpoint.digest(checkpoint.load_params(path)) == checkpoint.digest(NEW)


def test_pipes_and_folders_are_not_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    os.mkdir(tmp_path / "folder.safetensors")
    for name in ("pipe", "folder"):
        with pytest.raises(UsageError, match="no regular file"):
            checkpoint.save_params(tmp_path / f"{name}.safetensors", OLD)


def test_a_file_cut_while_it_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save_params(path, OLD)
    with checkpoint.open_params(path) as tensors:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(FileFormatError, match="became shorter"):
            tensors.read_flat("w", 0, 4)


@pytest.mark.parametrize("kind", [_atomic.atomic_file, _atomic.atomic_folder])
def test_two_writers_leave_each_other_alone(tmp_path, kind):
    """The later one must not take the earlier one's temporary for a dead writer's."""
    left = tmp_path / ".out.0123456789abcdef.tmp"
    left.write_text("of a killed process")
    (tmp_path / ".out2.0123456789abcdef.tmp").write_text("of another file")
    (tmp_path / ".out.tmp").write_text("somebody's own")
    with kind(tmp_path / "out"):
        assert not left.exists()
        with kind(tmp_path / "out"):
            assert len(list(tmp_path.glob(".out.*.tmp"))) == 2
        assert len(list(tmp_path.glob(".out.*.tmp"))) == 1
    assert sorted(os.listdir(tmp_path)) == [".out.tmp", ".out2.0123456789abcdef.tmp", "out"]


@pytest.mark.parametrize("write", ["save", "merge"])
def test_the_disk_is_told_to_begin_with_what_is_large(tmp_path, monkeypatch, write):
    params = {"large": np.ones(1 << 18, np.float32), "small": np.ones(100, np.float32)}
    checkpoint.save_params(tmp_path / "in.safetensors", params)
    told: list[tuple[int, int]] = []
    advise = lambda fd, start, count, advice: told.append((start, start + count))
    monkeypatch.setattr(os, "posix_fadvise", advise, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    out = tmp_path / "out.safetensors"
    if write == "save":
        checkpoint.save_params(out, params)
    else:
        merge.files("average", [tmp_path / "in.safetensors"] * 2, out, digests=False)
    begin = out.stat().st_size - (1 << 20) - 400  # the smaller tensor comes last
    assert told[0][0] == begin and told[-1][1] == begin + (1 << 20)
    assert sum(stop - start for start, stop in told) == 1 << 20


def test_a_pipe_takes_much_too():
    out, into = os.pipe()
    with ThreadPoolExecutor(1) as pool, open(out, "rb") as reader:
        whole = pool.submit(reader.read)
        with open(into, "wb", buffering=0) as writer:
            _atomic.write_all(writer.fileno(), b"x" * (1 << 19))
        assert whole.result() == b"x" * (1 << 19)
