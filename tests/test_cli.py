"""The command line: what it prints, its exit codes, and that one clear line is all an error gives."""

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from fishjax import checkpoint, cli, masks
from fishjax.patches import Dense, Scale, Sparse

BASE = {
    "a": {"w": np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32), "b": np.zeros(30)},
    "c": np.ones(4),
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with a base, a tuned model, a patch, a Fisher, and files that are wrong in some way."""
    monkeypatch.chdir(tmp_path)
    tuned = {"a": {"w": BASE["a"]["w"].copy(), "b": BASE["a"]["b"]}, "c": BASE["c"] * 2}
    tuned["a"]["w"][3, 4:9] += 1
    checkpoint.save_params("base", BASE)
    checkpoint.save_params("tuned.safetensors", tuned)
    checkpoint.save_params("elsewhere", {**BASE, "a": {**BASE["a"], "b": BASE["a"]["b"] + 1}})
    (tmp_path / "orbax").mkdir()
    (tmp_path / "orbax" / "_METADATA").write_text("{}")
    checkpoint.save_params("other", {**BASE, "c": BASE["c"] + 1})
    where, new = np.array([0, 7], np.int32), np.float32([1, 2])
    checkpoint.save_patch("patch", {"a.w": Sparse(where, new), "c": Scale(np.full(4, 2.0))}, base=BASE)
    checkpoint.save_fisher("fisher", {"a": {"w": BASE["a"]["w"] ** 2}}, metadata={"examples": 8})
    flipped = bytearray((tmp_path / "patch").read_bytes())
    flipped[-1] ^= 1
    (tmp_path / "flipped").write_bytes(flipped)
    (tmp_path / "cut").write_bytes(flipped[:-9])
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04K\x01.")
    (tmp_path / "empty").mkdir()
    return tmp_path


def run(capsys, *argv):
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_diff_apply_inspect(files, capsys):
    code, out, _ = run(capsys, "diff", "base", "tuned.safetensors", "--out", "p", "--author", "ada", "--json")
    found = json.loads(out)
    assert code == 0 and (found["leaves"], found["changed"], found["entries"]) == (2, 9, 634)
    code, out, _ = run(capsys, "inspect", "p", "--json")
    told = json.loads(out)
    assert code == 0 and told["kind"] == "patch" and told["metadata"] == {"author": "ada"}
    assert told["changes"] == {"a.w": "sparse", "c": "dense"} and told["digest"] == found["digest"]
    code, out, _ = run(capsys, "apply", "p", "--base", "base", "--out", "out", "--json")
    assert code == 0
    want = checkpoint.digest(checkpoint.load_params("tuned.safetensors"))
    assert json.loads(out)["digest"] == want == checkpoint.digest(checkpoint.load_params("out"))
    code, out, _ = run(capsys, "inspect", "out")
    assert code == 0 and want in out and "a.w" in out and "F32" in out


@pytest.mark.parametrize("path, kind", [("base", "model"), ("patch", "patch"), ("fisher", "fisher")])
def test_inspect_in_words_and_for_machines(files, capsys, path, kind):
    code, out, _ = run(capsys, "inspect", path)
    assert code == 0 and f"kind: {kind}" in out
    code, out, _ = run(capsys, "inspect", path, "--json")
    assert code == 0 and json.loads(out)["kind"] == kind


def test_mask_ranks_a_file_without_jax(files, capsys):
    root = str(pathlib.Path(cli.__file__).parents[2])
    options = ["--rank", "1", "--scope", "layer", "--minimum", "1"]
    script = (
        "import sys; from fishjax import cli; "
        f"code = cli.main(['mask', '--fisher', 'fisher', '--out', 'm', *{options}]); "
        "sys.exit(code or 'jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": root})
    mask, metadata = checkpoint.load_mask("m")
    assert metadata["recipe"]["rank"] == 1 and mask["a"]["w"].sum() == 50
    fisher, _ = checkpoint.load_fisher("fisher")
    np.testing.assert_array_equal(mask["a"]["w"], masks.topk(fisher, rank=1)["a"]["w"])
    assert run(capsys, "mask", "--fisher", "fisher", "--out", "n")[0] == 2


def test_mask(files, capsys):
    code, out, _ = run(capsys, "mask", "--fisher", "fisher", "--density", 0.01, "--out", "m", "--json")
    assert code == 0 and json.loads(out)["kept"] == 6
    mask, metadata = checkpoint.load_mask("m")
    score = BASE["a"]["w"] ** 2
    assert (score[mask["a"]["w"]].min() >= np.sort(score.ravel())[-6]) and metadata["recipe"][
        "density"
    ] == 0.01
    code, out, _ = run(capsys, "inspect", "m")
    assert code == 0 and "kind: mask" in out
    code, out, err = run(capsys, "mask", "--fisher", "fisher", "--density", 0, "--out", "n")
    assert code == 2 and "density" in err and not os.path.exists("n")


def test_fsck(files, capsys):
    code, out, _ = run(capsys, "fsck", "base")
    assert code == 0 and "1 files checked, 0 bad" in out
    assert run(capsys, "fsck", "flipped")[0] == 3
    code, out, _ = run(capsys, "fsck", files, "--json")
    told = {os.path.basename(f["path"]): f for f in json.loads(out)["files"]}
    assert code == 3 and {n for n, f in told.items() if f["problem"]} == {
        "flipped",
        "cut",
        "pickle.safetensors",
    }
    assert told["patch"]["kind"] == "patch"
    (files / "notes.txt").write_text("hi")
    assert "2 of other formats not checked" in run(capsys, "fsck", ".")[1]


ERRORS = [
    ([], 2, "COMMAND"),
    (["frobnicate"], 2, "frobnicate"),
    (["inspect"], 2, "PATH"),
    (["inspect", "base", "--frob"], 2, "--frob"),
    (["inspect", "base", "--js"], 2, "--js"),
    (["inspect", "nothing"], 2, "nothing"),
    (["inspect", "patch/x"], 2, "patch/x"),
    (["inspect", "empty"], 2, "holds no model"),
    (["inspect", "flipped"], 3, "corrupt"),
    (["inspect", "cut"], 3, "cut short"),
    (["inspect", "pickle.safetensors"], 3, "pickle"),
    (["apply", "nothing", "--base", "base", "--out", "out"], 2, "nothing"),
    (["apply", "patch", "--base", "nothing", "--out", "out"], 2, "nothing"),
    (["apply", "patch", "--base", "base", "--out", "no/out"], 2, "`no`: no such folder"),
    (["apply", "patch", "--base", "base", "--out", "base"], 2, "`base` exists"),
    (["apply", "flipped", "--base", "base", "--out", "out"], 3, "flipped"),
    (["apply", "cut", "--base", "base", "--out", "out"], 3, "cut"),
    (["apply", "fisher", "--base", "base", "--out", "out"], 3, "is a fisher file"),
    (["apply", "patch", "--base", "other", "--out", "out"], 4, "`c`"),
    (["apply", "patch", "--base", "elsewhere", "--out", "out"], 4, "content id"),
    (["apply", "patch", "--base", "orbax", "--out", "out"], 2, "convert"),
    (["diff", "base", "nothing", "--out", "p"], 2, "nothing"),
    (["diff", "base", "fisher", "--out", "p"], 4, "same leaves"),
    (["diff", "base", "pickle.safetensors", "--out", "p"], 3, "pickle"),
    (["diff", "base", "base", "--out", "no/p"], 2, "`no`: no such folder"),
    (["fsck", "nothing"], 2, "nothing"),
]


@pytest.mark.parametrize(
    "argv, code, words", ERRORS, ids=lambda x: " ".join(x) if isinstance(x, list) else None
)
def test_errors_are_one_line_and_change_nothing(files, capsys, argv, code, words):
    before = {p: p.read_bytes() for p in files.rglob("*") if p.is_file()}
    got, out, err = run(capsys, *argv)
    assert (got, out) == (code, ""), err
    assert err.startswith("fishjax: ") and err.count("\n") == 1 and words in err and "Traceback" not in err
    assert {p: p.read_bytes() for p in files.rglob("*") if p.is_file()} == before


def test_errors_that_no_file_causes(files, capsys, monkeypatch):
    def fail(error):
        def raising(*_, **__):
            raise error

        monkeypatch.setattr(checkpoint, "inspect", raising)
        return run(capsys, "inspect", "base")

    assert fail(KeyboardInterrupt())[0] == 130
    code, _, err = fail(OSError(28, "No space left on device", "x"))
    assert code == 74 and err == "fishjax: input or output failed: `x`: No space left on device\n"
    code, _, err = fail(ZeroDivisionError("a\nb\x1b[2J"))
    assert code == 70 and err.count("\n") == 1 and "ZeroDivisionError" in err and "\x1b" not in err
    monkeypatch.setenv("FISHJAX_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())


def test_every_command_has_help(capsys):
    for command in cli.COMMANDS:
        code, out, err = run(capsys, command, "--help")
        assert code == 0 and out.startswith(f"usage: fishjax {command}") and err == ""
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(f"\n    {command}" in out for command in cli.COMMANDS)
    assert run(capsys, "--version")[1].startswith("fishjax ")


ENV = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.dirname(cli.__file__)))}


def python(*argv, **options):
    return subprocess.run([sys.executable, *argv], env=ENV, capture_output=True, text=True, **options)


def test_file_commands_do_not_import_jax(files):
    script = '''
import sys
from fishjax.cli import main
for line in """diff base tuned.safetensors --out p
apply p --base base --out out
apply patch --base base --out out2
inspect p
inspect out
inspect fisher
fsck base
--help""".splitlines():
    assert main(line.split()) == 0, line
print(*sorted(set(sys.modules) & {"jax", "jaxlib", "flax", "optax", "orbax"}), file=sys.stderr)
print("end", file=sys.stderr)
'''
    done = python("-c", script, cwd=files)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "\nend\n", done.stderr


def test_help_is_fast_and_the_module_runs():
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        done = python("-m", "fishjax", "--help")
        seconds.append(time.monotonic() - start)
        assert done.returncode == 0 and "exit codes" in done.stdout
    assert min(seconds) < 0.3, seconds
    assert python("-m", "fishjax", "inspect", "nothing").returncode == 2


def test_a_reader_that_goes_away(files):
    checkpoint.save_params("wide.safetensors", {f"t{i}": np.zeros(1) for i in range(20_000)})
    process = subprocess.Popen(
        [sys.executable, "-m", "fishjax", "inspect", "wide.safetensors"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENV,
    )
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 74 and "Traceback" not in err and "BrokenPipe" not in err


def test_nan_in_a_patch_is_refused_by_apply(files, capsys):
    from fishjax.checkpoint._manifest import read_sealed, write_sealed

    checkpoint.save_patch("p", {"c": Dense(np.ones(4) * 3)}, base=BASE)
    manifest, tensors, _ = read_sealed("p")
    said = {k: v for k, v in manifest.items() if k not in ("format", "version")}
    write_sealed("nan", "patch", said, {**tensors, "c::values": np.full(4, np.nan)})
    code, _, err = run(capsys, "apply", "nan", "--base", "base", "--out", "out")
    assert code == 3 and "NaN" in err and not os.path.exists("out")
    assert run(capsys, "inspect", "nan")[0] == 0
    assert run(capsys, "fsck", "nan")[0] == 3  # the seal is right, the content is not
