"""The strict reader against hostile files, and against the safetensors package on mutated ones."""

import json
import os
import re

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from fishjax.checkpoint._dtypes import DTYPES, Spec
from fishjax.checkpoint._safetensors import open_file, write_file
from fishjax.errors import FileFormatError, StructureError

# What the package takes and we do not, by our message; nothing else may differ.
EXTRA_REFUSALS = [
    r"does not begin with `{`",  # it takes white space before
    r"is there twice",
    r"has an empty or `\.\.` part",
    r"holds a control character",
    r"is not in Unicode's NFC form",
    r"must have exactly the fields",
    r"`__metadata__` that is not an object of strings",  # it takes null
    r"has dtype 'F[46]",  # less than a byte an entry
    r"beyond 2\^63 bytes",  # numpy cannot hold it, though another axis is 0
    r"at most 64 axes",
]


def raw(header, data=b"", *, pad=True):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype="F32", shape=(2,), start=0, stop=8, **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop], **more}


def numbers(shape, offsets):
    return raw(
        b'{"a":{"dtype":"F32","shape":[%b],"data_offsets":[%b]}}' % (shape.encode(), offsets.encode()),
        bytes(8),
    )


def save(path, tensors, **options):
    write_file(path, {n: Spec(x.dtype, x.shape) for n, x in tensors.items()}, tensors.__getitem__, **options)


def refused(tmp_path, data, match=None):
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(FileFormatError, match=match) as error:
        open_file(tmp_path / "bad")
    assert "bad" in str(error.value)


@pytest.mark.parametrize(
    "name", ["", ".", "a..b", "../x", "a/../b", "a//b", "/a", "a\0", "a\n", "e\u0301", "\ud800"]
)
def test_hostile_names_are_refused(tmp_path, name):
    with pytest.raises(StructureError, match="leaf name"):
        save(tmp_path / "a", {name: np.zeros(2, np.float32)})
    assert list(tmp_path.iterdir()) == []
    refused(tmp_path, raw({name: tensor()}, bytes(8)), "tensor '")


@pytest.mark.parametrize(
    "data, match",
    {
        "empty": (b"", "0 bytes have"),
        "too short": (b"\2\0\0\0\0\0\0", "7 bytes have"),
        "length beyond the file": (raw(b"{}")[:-1], "header of 2"),
        "length 2^63": (b"\0\0\0\0\0\0\0\x80{}", "header of 9223372036854775808"),
        "no object": (raw(b"[]"), "no safetensors file"),
        "not utf-8": (raw(b'{"\xff":1}'), "malformed header"),
        "broken json": (raw(b'{"a":}'), "malformed header"),
        "two documents": (raw(b"{}{}"), "malformed header"),
        "utf-16": (raw('{"a":1}'.encode("utf-16")), "no safetensors file"),
        "deep": (raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deep"),
        "tensor twice": (raw(b'{"a":1,"a":1}'), "'a' is there twice"),
        "metadata key twice": (raw(b'{"__metadata__":{"k":"good","k":"evil"}}'), "'k' is there twice"),
        "field twice": (raw(b'{"a":{"dtype":"F32","dtype":"F64"}}'), "'dtype' is there twice"),
        "metadata no strings": (raw({"__metadata__": {"k": 1}}), "__metadata__"),
        "metadata list": (raw({"__metadata__": []}), "__metadata__"),
        "half a surrogate": (raw(b'{"__metadata__":{"k":"\\ud800"}}'), "surrogate"),
        "unknown field": (raw({"a": tensor(extra=1)}, bytes(8)), "exactly the fields"),
        "missing field": (raw({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "exactly the fields"),
        "no tensor": (raw({"a": 3}), "exactly the fields"),
        "unknown dtype": (raw({"a": tensor("F33")}, bytes(8)), "'F33'"),
        "dtype a list": (raw({"a": tensor(["F32"])}, bytes(8)), "dtype"),
        "4-bit floats": (raw({"a": tensor("F4", [16])}, bytes(8)), "'F4'"),
        "float offsets": (numbers("2", "0.0,8"), "not an integer"),
        "exponent": (numbers("2", "0,8e0"), "not an integer"),
        "NaN": (numbers("NaN", "0,8"), "NaN"),
        "negative": (raw({"a": tensor(start=-8, stop=0)}, bytes(8)), "natural number"),
        "minus zero": (numbers("2", "-0,8"), "natural number"),
        "bool": (raw({"a": tensor(shape=[True, 2])}, bytes(8)), "lists of integers"),
        "huge number": (numbers("9" * 9999, "0,8"), "natural"),
        "shape overflows": (raw({"a": tensor(shape=[2**62, 2**62])}, bytes(8)), r"2\^63"),
        "shape wraps to fit": (raw({"a": tensor(shape=[2**63, 2, 2])}, b""), r"2\^63"),
        "zero times huge": (raw({"a": tensor(shape=[0, 2**62], stop=0)}), r"2\^63"),
        "too many axes": (raw({"a": tensor(shape=[1] * 65, stop=4)}, bytes(4)), "64 axes"),
        "backwards": (raw({"a": tensor(start=8, stop=0)}, bytes(8)), "ordered"),
        "three offsets": (numbers("2", "0,8,8"), "ordered"),
        "size and span differ": (raw({"a": tensor(shape=[3])}, bytes(8)), "12 bytes, and spans 8"),
        "hole": (raw({"a": tensor(), "b": tensor(start=12, stop=20)}, bytes(20)), "`b` leaves a hole"),
        "hole at the start": (raw({"a": tensor(start=4, stop=12)}, bytes(12)), "`a` leaves a hole"),
        "overlap": (raw({"a": tensor(), "b": tensor(start=4, stop=12)}, bytes(12)), "`b` overlaps"),
        "same place": (raw({"a": tensor(), "b": tensor()}, bytes(8)), "`b` overlaps"),
        "cut": (raw({"a": tensor()}, bytes(7)), "cut short"),
        "tail": (raw({"a": tensor()}, bytes(9)), "tail"),
    }.values(),
    ids=lambda x: "",
)  # fmt: skip
def test_malformed_files_are_refused(tmp_path, data, match):
    refused(tmp_path, data, match)


@pytest.mark.parametrize(
    "magic, what",
    [
        (b"PK\x03\x04", "zip"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "pickle"),
        (b"\x80\x04\x95", "pickle"),
        (b"\x93NUMPY\x01\x00", "numpy"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"\x85\xa6params", "msgpack"),
        (b"\xde\x00\x10", "msgpack"),
        (b"GGUF", "GGUF"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\0" * 257 + b"ustar", "tar"),
    ],
)
def test_other_formats_are_named_whatever_the_suffix(tmp_path, magic, what):
    path = tmp_path / "model.safetensors"
    path.write_bytes(magic + bytes(64))
    with pytest.raises(FileFormatError, match=f"{what}.*Convert it"):
        open_file(path)


def test_a_renamed_pickle_never_runs(tmp_path):
    import pickle

    class Canary:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for protocol in range(6):
        refused(tmp_path, pickle.dumps(Canary(), protocol))
    assert not (tmp_path / "ran").exists()


def test_a_header_beyond_the_limit_is_refused_unread(tmp_path):
    with open(tmp_path / "bad", "wb") as file:
        file.write((100_000_001).to_bytes(8, "little") + b"{")
        file.truncate(200_000_000)  # sparse: it takes no space
    with pytest.raises(FileFormatError, match="at most 100000000"):
        open_file(tmp_path / "bad")


def test_only_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(FileFormatError, match="regular file"):
            open_file(path)
    save(tmp_path / "a", {"x": np.ones(2)}, seal=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert list(open_file(tmp_path / "link")) == ["x"]  # as in a Hugging Face cache
    with pytest.raises(FileFormatError, match="symbolic link"):
        open_file(tmp_path / "link", sealed=True)
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "nothing")


SMALL = st.sampled_from(
    [0, 1, 2, 3, 4, 8, 12, 16, 2**31, 2**62, 2**63, 2**64 - 1, 2**64, -1, 1.0, True, None, "8"]
)


FIELD = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F4", "F6_E2M3", "f32", "F33", 1, None]),
        "shape": st.lists(SMALL, max_size=3) | SMALL,
        "data_offsets": st.lists(SMALL, max_size=3) | SMALL,
        "extra": SMALL,
    },
)


NAME = st.sampled_from(["a", "b", "a.b", "..", "", "a\0", "é", "e\u0301", "__metadata__", "\ud800"])


@st.composite
def mutated(draw):
    """A valid file, with some of its fields, names, bytes and lengths changed."""
    shapes = draw(st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=3))
    pairs, offset = [], 0
    for i, shape in enumerate(shapes):
        stop = offset + 4 * int(np.prod(shape))
        entry = tensor("F32", shape, offset, stop)
        if draw(st.integers(0, 3)) == 0:
            entry |= draw(FIELD)
        if draw(st.integers(0, 9)) == 0:
            entry.pop(draw(st.sampled_from(["dtype", "shape", "data_offsets"])), None)
        pairs.append((draw(NAME) if draw(st.integers(0, 5)) == 0 else f"t{i}", json.dumps(entry)))
        offset = stop
    if draw(st.booleans()):
        pairs.insert(
            0,
            (
                "__metadata__",
                draw(st.sampled_from(['{"a":"b"}', "{}", "null", '{"a":1}', '{"a":"b","a":"c"}'])),
            ),
        )
    pairs = draw(st.permutations(pairs)) if draw(st.booleans()) else pairs
    text = ("{" + ",".join(f"{json.dumps(n)}:{v}" for n, v in pairs) + "}").encode()
    text += draw(st.sampled_from([b"", b" ", b"   ", b"\n", b"\0", b"{}"]))
    text = draw(st.sampled_from([b"", b"", b"", b" "])) + text
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        text = bytearray(text)
        text[draw(st.integers(0, len(text) - 1))] = draw(st.integers(0, 255))
    length = len(text) + draw(st.sampled_from([0, 0, 0, 0, 1, -1, 8, 2**40]))
    return (
        max(length, 0).to_bytes(8, "little")
        + bytes(text)
        + bytes(offset + draw(st.sampled_from([0, 0, 0, 1, -1])) if offset else 0)
    )


@given(mutated())
def test_never_takes_what_the_package_refuses(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated"
    path.write_bytes(data)
    try:
        theirs = {
            n: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for n, t in safetensors.deserialize(data)
        }
    except safetensors.SafetensorError:
        theirs = None
    try:
        with open_file(path) as file:
            ours = {
                n: (k, s.shape, file[n].tobytes())
                for n, s in file.specs.items()
                for k in DTYPES
                if DTYPES[k] == s.dtype
            }
    except FileFormatError as error:
        if theirs is not None:
            assert any(re.search(reason, str(error)) for reason in EXTRA_REFUSALS), error
    else:
        assert ours == theirs
