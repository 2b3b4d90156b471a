"""Content ids: what they depend on, and that they never change."""

import hashlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fishjax import checkpoint
from fishjax.checkpoint._digest import leaf_digest
from fishjax.errors import StructureError

TREE = {"b": {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}, "a": np.arange(3, dtype=np.int8)}


def test_by_hand():
    """The definition, written out once more; a changed id would orphan every patch there is."""

    def leaf(name, dtype, shape, data):
        fields = [name, dtype, b"".join(n.to_bytes(8, "little") for n in shape)]
        head = b"".join(len(f).to_bytes(8, "little") + f for f in fields)
        return hashlib.sha256(b"\0" + head + data).digest()

    a = leaf(b"a", b"I8", (3,), bytes([0, 1, 2]))
    b = leaf(b"b.x", b"F32", (2, 3), np.arange(6, dtype="<f4").tobytes())
    c = leaf(b"c", b"F64", (), np.float64(1).tobytes())
    both = hashlib.sha256(b"\1" + a + b).digest()
    assert checkpoint.digest(TREE) == f"sha256:{both.hex()}"
    three = hashlib.sha256(b"\1" + both + c).hexdigest()
    assert checkpoint.digest({**TREE, "c": 1.0}) == f"sha256:{three}"
    assert checkpoint.digest({}) == f"sha256:{hashlib.sha256().hexdigest()}"


def test_known_answer():
    assert (
        checkpoint.digest(TREE) == "sha256:40603025fd7ef90b3e4d4a9787e470d0399caec37ee113b79108f30cec0254b2"
    )


@pytest.mark.parametrize(
    "other",
    [
        np.arange(6, dtype=np.float32).reshape(3, 2),
        np.arange(6, dtype=np.int32).reshape(2, 3),
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
        np.arange(6, dtype=np.float32).reshape(2, 3) * -1 * -1 - 0.0 * -1,
        np.nextafter(np.arange(6, dtype=np.float32).reshape(2, 3), np.float32(9)),
    ],
    ids=["shape", "dtype", "transposed", "same", "one ulp"],
)
def test_it_depends_on_bits_dtype_and_shape(other, request):
    same = checkpoint.digest({**TREE, "b": {"x": other}}) == checkpoint.digest(TREE)
    assert same == ("same" in request.node.name)


def test_minus_zero_and_names_count():
    assert leaf_digest("a", np.float32(0.0)) != leaf_digest("a", np.float32(-0.0))
    assert leaf_digest("a", np.float32(0.0)) != leaf_digest("b", np.float32(0.0))
    assert leaf_digest("aF", np.zeros(1, np.int8)) != leaf_digest("a", np.zeros(1, np.int8))


def test_it_does_not_depend_on_layout_device_or_sharding():
    want = checkpoint.digest(TREE)
    x = TREE["b"]["x"]
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("d")))
    for other in (np.asfortranarray(x), x.astype(">f4"), jnp.asarray(x), sharded, np.repeat(x, 2, 0)[::2]):
        assert checkpoint.digest({"a": TREE["a"], "b": {"x": other}}) == want


def test_it_does_not_depend_on_the_file(tmp_path):
    want = checkpoint.digest(TREE)
    checkpoint.save_params(tmp_path / "a.safetensors", TREE)
    checkpoint.save_params(tmp_path / "hf", TREE, shard_bytes=4)
    for path in ("a.safetensors", "hf"):
        assert checkpoint.digest(checkpoint.load_params(tmp_path / path)) == want
        with checkpoint.open_params(tmp_path / path) as tensors:
            assert checkpoint.digest(tensors) == want


def test_chunks_do_not_matter():
    big = np.random.default_rng(0).integers(0, 256, (1 << 24) + 5, np.uint8)
    head = b"".join(len(f).to_bytes(8, "little") + f for f in (b"x", b"U8", big.size.to_bytes(8, "little")))
    assert leaf_digest("x", big) == f"sha256:{hashlib.sha256(bytes(1) + head + big.tobytes()).hexdigest()}"
    assert leaf_digest("x", np.repeat(big, 2)[::2]) == leaf_digest("x", big)


def test_what_has_no_bits_is_refused():
    for odd in (jax.random.key(0), "text", object(), np.zeros(2, ml_dtypes.int4)):
        with pytest.raises(StructureError, match="`x`"):
            checkpoint.digest({"x": odd, "y": np.zeros(1)})
