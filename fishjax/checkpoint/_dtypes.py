"""Dtypes of the safetensors format, and the bytes of any array: little-endian, C order, in chunks."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fishjax.errors import StructureError

# Every dtype of the format that fills whole bytes. Its 4-bit and 6-bit floats have no numpy array
# that shares their packing, so they are refused rather than unpacked.
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I16": np.int16,
        "U16": np.uint16,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "I32": np.int32,
        "U32": np.uint32,
        "F32": np.float32,
        "C64": np.complex64,
        "F64": np.float64,
        "I64": np.int64,
        "U64": np.uint64,
    }.items()
}
NAMES: dict[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 1 << 24  # bytes hashed or written at a time


class Spec(NamedTuple):
    """What a tensor is, without its values."""

    dtype: np.dtype
    shape: tuple[int, ...]


def dtype_name(name: str, dtype: np.dtype) -> str:
    """Return the format's name of a numpy dtype; `name` is the leaf it is for.

    Raises:
      StructureError: the format has no such dtype, so that the bits could not be kept.

    >>> dtype_name("w", np.dtype(">f4"))
    'F32'
    """
    known = NAMES.get(np.dtype(dtype).newbyteorder("="))
    if known is None:
        raise StructureError(
            f"leaf `{name}` has dtype {dtype}, which a safetensors file cannot hold bit by bit; "
            f"wanted one of {', '.join(str(d) for d in NAMES)}"
        )
    return known


def host(name: str, leaf: object) -> np.ndarray:
    """Return a leaf (numpy, jax or number) as a numpy array of a dtype that a file can hold.

    >>> host("w", 1.5)
    array(1.5)
    """
    try:
        array = np.asarray(leaf)
    except (TypeError, ValueError) as error:
        raise StructureError(f"leaf `{name}` is no array of numbers: {error}") from None
    dtype_name(name, array.dtype)
    return array


def spec(name: str, leaf: Any) -> Spec:
    """Return the dtype and shape of a named leaf; of an array without looking at its values.

    >>> spec("w", np.ones((2, 3), np.float32))
    Spec(dtype=dtype('float32'), shape=(2, 3))
    """
    try:
        return Spec(np.dtype(leaf.dtype), tuple(leaf.shape))
    except (AttributeError, TypeError):  # a number; or a dtype that is jax's own
        array = host(name, leaf)
        return Spec(array.dtype, array.shape)


def num_bytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """Return the size in bytes of an array, in integers that cannot overflow.

    >>> num_bytes(np.dtype("f4"), (2, 3))
    24
    """
    return math.prod(shape) * dtype.itemsize


def byte_chunks(array: np.ndarray, size: int = CHUNK) -> Iterator[memoryview]:
    """Yield the bytes of an array, little-endian and in C order, at most about `size` at a time.

    Any layout will do (transposed, strided, reversed, big-endian, 0-d): what is copied is one chunk.

    >>> b"".join(byte_chunks(np.array([[1, 2], [3, 4]], ">u2").T))
    b'\\x01\\x00\\x03\\x00\\x02\\x00\\x04\\x00'
    """
    little = array.dtype.newbyteorder("<")
    plain = array.flags.c_contiguous and array.dtype == little
    step = max(1, size // array.dtype.itemsize)
    flat = array.reshape(-1) if plain else array.flat  # `.flat` copies only the slice that is taken
    for start in range(0, array.size, step):
        part = flat[start : start + step]
        yield memoryview(np.ascontiguousarray(part.astype(little, copy=False)).view(np.uint8))
