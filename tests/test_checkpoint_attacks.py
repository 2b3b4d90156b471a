"""Sealed files whose author is hostile: the digest is right, the content is not."""

import copy
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fishjax import checkpoint, patches
from fishjax.checkpoint import _rice
from fishjax.checkpoint._manifest import read_sealed, write_sealed
from fishjax.errors import FileFormatError

SIZE = 1000
ZERO = "sha256:" + "0" * 64
BASE = {"w": np.zeros(SIZE, np.float32), "v": np.zeros((4, 3), np.float32), "u": np.zeros(3, np.float32)}
PATCH = {
    "w": patches.Sparse(np.array([3, 500, 999], np.int32), np.float32([1, 2, 3])),
    "v": patches.Scale(np.full((1, 3), 2, np.float32), tied=(("u", (3,)),)),
}


@pytest.fixture
def forge(tmp_path):
    """Return a function that writes the patch anew after something changed its manifest and tensors."""
    checkpoint.save_patch(tmp_path / "good", PATCH, base=BASE)
    manifest, tensors, _ = read_sealed(tmp_path / "good")

    def write(change):
        told, held = copy.deepcopy(manifest), dict(tensors)
        told = change(told, held) or told
        said = {k: v for k, v in told.items() if k != "format"}
        write_sealed(tmp_path / "bad", told.get("format", "patch"), said, held)
        return tmp_path / "bad"

    return write


def raw_indices(values, dtype=np.uint64, note="I64", count=None):
    def change(told, held):
        held["w::indices"] = np.array(values, dtype)
        held["w::values"] = np.zeros(len(values), np.float32)
        told["changes"]["w"]["indices"] = {"encoding": "raw", "dtype": note, "count": count or len(values)}

    return change


@pytest.mark.parametrize(
    "change, match",
    {
        "equal to the size": (raw_indices([SIZE]), "reach from 1000 to 1000, the leaf has 1000"),
        "-1": (raw_indices([2**64 - 1]), "not 1 of dtype I64"),
        "-1, signed": (raw_indices([-1], np.int64), "stored as int64"),
        "2^32 + 5": (raw_indices([2**32 + 5]), "the leaf has 1000 entries"),
        "2^32 + 5 as int32": (raw_indices([2**32 + 5], note="I32"), "not 1 of dtype I32"),
        "2^63": (raw_indices([2**63]), "not 1 of dtype I64"),
        "unsorted": (raw_indices([5, 4]), "strictly increasing"),
        "twice": (raw_indices([5, 5]), "strictly increasing"),
        "floats": (raw_indices([5], np.float32), "stored as float32"),
        "as floats": (raw_indices([5], note="F32"), "to be F32"),
        "count": (raw_indices([5], count=2), "2 do not pair with 1 values"),
        "matrix": (raw_indices([[5]]), r"stored as uint64"),
    }.values(),
    ids=lambda x: "",
)
def test_bad_indices(forge, change, match):
    path = forge(change)
    for read in (checkpoint.read_patch, checkpoint.load_patch, checkpoint.inspect):
        with pytest.raises(FileFormatError, match=match):
            read(path)


def edit(*where, value=None, drop=False):
    """Return a change of the manifest's item at a path of keys."""

    def change(told, held):
        table = told
        for key in where[:-1]:
            table = table[key]
        if drop:
            del table[where[-1]]
        else:
            table[where[-1]] = value

    return change


def tensors(**held_by):
    def change(told, held):
        for name, array in held_by.items():
            name = name.replace("__", "::")
            if array is None:
                del held[name]
            else:
                held[name] = array

    return change


@pytest.mark.parametrize(
    "change, match",
    {
        "no object": (lambda t, h: None, None),
        "later version": (edit("version", value=2), "version 2"),
        "other format": (edit("format", value="fisher"), "is a fisher file; wanted a patch"),
        "no base": (edit("base", drop=True), "`base`"),
        "base no digest": (edit("base", value="sha256:12"), "a digest that is none"),
        "touched no table": (edit("touched", value=[]), "`touched`"),
        "touched too little": (edit("touched", "u", drop=True), "the tied leaf `u` is not there"),
        "touched too much": (edit("touched", "x", value={"dtype": "F32", "shape": [], "digest": ZERO}), "x"),
        "shape negative": (edit("touched", "w", "shape", value=[-1]), "`shape`"),
        "shape huge": (edit("touched", "w", "shape", value=[10**30]), "`shape`"),
        "shape other": (edit("touched", "w", "shape", value=[999]), "reach from 3 to 999"),
        "dtype unknown": (edit("touched", "w", "dtype", value="F31"), "'F31'"),
        "result missing": (edit("results", "w", drop=True), "`w`"),
        "result extra": (edit("results", "x", value=ZERO), "`x`"),
        "changes missing": (edit("changes", drop=True), "`changes`"),
        "entry no table": (edit("changes", "w", value=3), "must be of type"),
        "entry of no leaf": (edit("changes", "q", value={"kind": "dense", "static": {}}), "`q`"),
        "entry without indices": (edit("changes", "w", "indices", drop=True), "`indices`"),
        "kind a list": (edit("changes", "w", "kind", value=[]), "`kind`"),
        "kind of others": (edit("changes", "w", "kind", value="dense"), "not those of kind `dense`"),
        "static extra": (edit("changes", "v", "static", "x", value=1), "not those of kind `scale`"),
        "static overrides": (edit("changes", "v", "static", "vector", value=1), "not those of kind `scale`"),
        "tied nonsense": (edit("changes", "v", "static", "tied", value=5), "contradicts itself"),
        "tied nonsense 2": (edit("changes", "v", "static", "tied", value=[["u"]]), "contradicts itself"),
        "tied nonsense 3": (edit("changes", "v", "static", "tied", value=[["u", 3]]), "contradicts itself"),
        "tied nonsense 4": (edit("changes", "v", "static", "tied", value=[["u", ["3"]]]), "contradicts"),
        "tied to a patched leaf": (edit("changes", "v", "static", "tied", value=[["w", [1]]]), "w"),
        "tied, other size": (edit("changes", "v", "static", "tied", value=[["u", [1]]]), "cannot be shaped"),
        "tied twice": (edit("changes", "v", "static", "tied", value=[["u", [3]], ["u", [3]]]), "both"),
        "parameter": (edit("changes", "w", "indices", "parameter", value=70), "malformed"),
        "parameter negative": (edit("changes", "w", "indices", "parameter", value=-1), "malformed"),
        "parameter other": (edit("changes", "w", "indices", "parameter", value=3), "malformed|reach"),
        "count huge": (edit("changes", "w", "indices", "count", value=2**60), "malformed"),
        "count a bool": (edit("changes", "w", "indices", "count", value=True), "`count`"),
        "encoding unknown": (edit("changes", "w", "indices", "encoding", value="zip"), "'zip'"),
        "metadata": (edit("metadata", value=3), "`metadata`"),
        "no values": (tensors(w__values=None), "not those of kind `sparse`"),
        "values too many": (tensors(w__values=np.zeros(4, np.float32)), "do not pair"),
        "values a matrix": (tensors(w__values=np.zeros((3, 1), np.float32)), "do not pair"),
        "extra tensor": (tensors(x__values=np.zeros(4, np.float32)), "`x::values`"),
        "extra field": (tensors(w__more=np.zeros(4, np.float32)), "not those of kind `sparse`"),
        "vector": (tensors(v__vector=np.zeros((1, 4), np.float32)), "does not broadcast"),
        "vector rank": (tensors(v__vector=np.zeros(3, np.float32)), "does not broadcast"),
        "nan": (tensors(w__values=np.float32([1, np.nan, 2])), "`w::values` holds NaN"),
        "infinity": (tensors(v__vector=np.float32([[1, np.inf, 2]])), "`v::vector` holds NaN or infinity"),
    }.values(),
    ids=lambda x: "",
)  # fmt: skip
def test_a_manifest_that_lies(forge, tmp_path, change, match):
    path = forge(change)
    if match is None:  # the forger itself changes nothing
        assert path.read_bytes() == (tmp_path / "good").read_bytes()
        return
    with pytest.raises(FileFormatError, match=match):
        checkpoint.load_patch(path)


def test_a_kind_of_the_future(tmp_path):
    from fishjax.checkpoint._digest import leaf_specs
    from fishjax.checkpoint._kinds import Change
    from fishjax.checkpoint._patch import write_patch

    digests = {n: checkpoint.digest({n: x}) for n, x in BASE.items()}
    write_patch(tmp_path / "p", {"v": Change("fourier", {}, {})}, leaf_specs(BASE), digests, {})
    with pytest.raises(FileFormatError, match=r"`v` by kind `fourier`; known: dense, sparse"):
        checkpoint.load_patch(tmp_path / "p")
    checkpoint.save_params(tmp_path / "base", BASE)
    with pytest.raises(FileFormatError, match="fourier"):
        checkpoint.apply_file(tmp_path / "p", tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_vet_may_look_at_a_file_with_nan(forge):
    path = forge(tensors(w__values=np.float32([1, np.nan, 2])))
    patch, _ = checkpoint.load_patch(path, check_finite=False)
    assert np.isnan(patch["w"].values[1])
    with pytest.raises(FileFormatError, match="NaN"):
        checkpoint.apply_file(path, path, path.with_name("out"))


@given(st.data())
def test_any_bit_of_the_content_is_found_even_when_sealed_anew(tmp_path_factory, data):
    """A forged manifest either says the same or is refused with a clear error, never another one."""
    path = tmp_path_factory.getbasetemp() / "sealed"
    checkpoint.save_patch(path, PATCH, base=BASE)
    manifest, held, _ = read_sealed(path)
    name = data.draw(st.sampled_from(sorted(held)))
    array = np.array(held[name])
    array.reshape(-1).view(np.uint8)[data.draw(st.integers(0, array.nbytes - 1))] ^= data.draw(
        st.integers(1, 255)
    )
    said = {k: v for k, v in manifest.items() if k not in ("format", "version")}
    write_sealed(path, "patch", said, {**held, name: array})
    try:
        got = checkpoint.read_patch(path).changes["w"].arrays["indices"]
    except FileFormatError:
        return
    assert (np.diff(got.astype(np.int64)) > 0).all() and got.min() >= 0 and got.max() < SIZE


@given(st.sets(st.integers(0, 2**62 - 1) | st.integers(0, 300), max_size=40))
def test_rice_codes_come_back(positions):
    array = np.array(sorted(positions), np.int64)
    k, stream = _rice.encode(array)
    np.testing.assert_array_equal(_rice.decode(stream, k, len(array)), array)


@given(st.binary(max_size=40), st.integers(-3, 70), st.integers(-3, 400))
def test_rice_streams_that_are_none(data, k, count):
    """Whatever the bytes: refused, or positions whose code is a valid stream again."""
    try:
        got = _rice.decode(np.frombuffer(data, np.uint8), k, count)
    except ValueError:
        return
    assert len(got) == count and (np.diff(got) > 0).all() and (not count or got[0] >= 0)


def test_rice_is_near_the_entropy():
    size, density = 4_000_000, 0.005
    where = np.flatnonzero(np.random.default_rng(0).random(size) < density)
    p = where.size / size
    entropy = size * (-p * math.log2(p) - (1 - p) * math.log2(1 - p))
    _, stream = _rice.encode(where)
    bits = 8 * stream.nbytes
    print(f"{bits / entropy:.4f} of the entropy, {bits / where.size:.2f} bits an index")
    assert 8 * stream.nbytes < 1.01 * entropy


@pytest.mark.parametrize("positions", [[], [0], list(range(50)), [2**61]])
def test_rice_at_the_edges(positions):
    array = np.array(positions, np.int64)
    k, stream = _rice.encode(array)
    np.testing.assert_array_equal(_rice.decode(stream, k, len(array)), array)
    with pytest.raises(ValueError):
        _rice.decode(np.append(stream, np.uint8(0)), k, len(array))


@pytest.mark.parametrize(
    "stream, k, count",
    {
        "padding of the low bits": ([0x81, 0x80], 1, 1),
        "a high part beyond 2^62": ([0] * 8 + [0b00001000], 60, 1),
        "a sum beyond 2^63": ([255] * 31 + [0b11110000], 62, 4),
    }.values(),
    ids=lambda x: "",
)
def test_rice_streams_that_would_wrap(stream, k, count):
    with pytest.raises(ValueError, match=r"stream does not hold|beyond 2\^6"):
        _rice.decode(np.array(stream, np.uint8), k, count)
