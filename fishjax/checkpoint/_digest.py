"""Content ids: what a model is, whatever file, order or sharding it comes in.

A leaf's digest is the SHA-256 of its name, dtype, shape and little-endian bytes, each with its length
in front, so that no two leaves share an encoding. A tree's digest is the root of the Merkle tree over
its leaves sorted by name, with the hashing of RFC 6962 (leaves and nodes cannot be mistaken).
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fishjax.checkpoint._dtypes import Spec, byte_chunks, dtype_name, host, spec
from fishjax.tree import flatten
from fishjax.types import Digest, Params


def digest(params: Params) -> Digest:
    """Return the content id of a pytree of arrays.

    It depends on names, dtypes, shapes and bits only. Leaves are hashed one at a time.

    Args:
      params: any pytree; numpy arrays, jax arrays (sharded too) or a mapping of mapped tensors.

    Returns:
      "sha256:" and 64 hexadecimal digits.

    >>> digest({"a": np.zeros(2), "b": np.ones(2)}) == digest({"b": np.ones(2), "a": np.zeros(2)})
    True
    """
    flat = flat_leaves(params)
    return root({name: leaf_digest(name, flat[name]) for name in flat})


def leaf_digest(name: str, leaf: object) -> Digest:
    """Return the digest of one named leaf.

    >>> leaf_digest("a", np.zeros(2)) == leaf_digest("b", np.zeros(2))
    False
    """
    hasher = Hasher(name, (array := host(name, leaf)).dtype, array.shape)
    hasher.update(array)
    return hasher.digest()


class Hasher:
    """The digest of a leaf whose entries come in pieces, in C order."""

    def __init__(self, name: str, dtype: np.dtype, shape: Sequence[int]):
        fields = [
            name.encode(),
            dtype_name(name, dtype).encode(),
            b"".join(n.to_bytes(8, "little") for n in shape),
        ]
        self._hash = hashlib.sha256(b"\x00" + b"".join(len(f).to_bytes(8, "little") + f for f in fields))

    def update(self, piece: np.ndarray) -> None:
        for data in byte_chunks(piece):
            self._hash.update(data)

    def digest(self) -> Digest:
        return f"sha256:{self._hash.hexdigest()}"


def root(digests: Mapping[str, Digest]) -> Digest:
    """Return the Merkle root of leaf digests by name: the content id of the tree they make.

    >>> one = leaf_digest("a", np.zeros(2))
    >>> root({"a": one}) == one == digest({"a": np.zeros(2)})
    True
    """
    hashes = [bytes.fromhex(digests[n].removeprefix("sha256:")) for n in sorted(digests, key=_utf8)]
    return f"sha256:{_merkle(hashes).hex()}"


def _utf8(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")  # any tree has a digest, whatever its keys


def _merkle(hashes: Sequence[bytes]) -> bytes:
    if len(hashes) < 2:
        return hashes[0] if hashes else hashlib.sha256().digest()
    half = 1 << ((len(hashes) - 1).bit_length() - 1)  # the largest power of two below the length
    return hashlib.sha256(b"\x01" + _merkle(hashes[:half]) + _merkle(hashes[half:])).digest()


def flat_leaves(params: Params) -> Mapping[str, Any]:
    """Return `{name: leaf}`; a mapping of tensors in files is flat already and stays lazy."""
    return params if hasattr(params, "specs") else flatten(params)


def leaf_specs(params: Params) -> dict[str, Spec]:
    """Return `{name: (dtype, shape)}` without touching the values.

    >>> leaf_specs({"a": {"w": np.ones(2)}})
    {'a.w': Spec(dtype=dtype('float64'), shape=(2,))}
    """
    if hasattr(params, "specs"):
        return dict(params.specs)
    return {n: spec(n, x) for n, x in flatten(params).items()}
