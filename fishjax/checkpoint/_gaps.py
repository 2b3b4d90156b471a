"""Gaps between increasing positions as bytes, packed by bzip2: for masks that cluster.

A Fisher mask keeps whole rows and columns, so gaps repeat; Rice's code cannot use that, a general packer
can. bzip2 is in the standard library, packs such gaps as well as the strongest setting of zstd or LZMA
(measured in DESIGN.md), and its encoder has been the same for years: equal masks make equal files.
A gap is seven bits a byte, the lowest first, the top bit set where more follow.
"""

import bz2

import numpy as np

_MAX_BYTES = 9  # 63 bits
_MAX_RATIO, _SLACK = 512, 1 << 20  # what a stream may unpack to: no bomb


def encode(positions: np.ndarray) -> np.ndarray | None:
    """Return the stream, uint8, of strictly increasing positions >= 0 `[N]`; None where it would be a bomb.

    >>> stream = encode(np.arange(0, 4000, 40))
    >>> stream.nbytes, decode(stream, 100)[-1]
    (43, np.int64(3960))
    """
    gaps = (np.diff(positions.astype(np.int64), prepend=-1) - 1).astype(np.uint64)
    lengths = np.ones(gaps.size, np.int64)
    for i in range(1, _MAX_BYTES):
        lengths += gaps >= np.uint64(1 << (7 * i))
    ends = np.cumsum(lengths)
    plain = np.empty(int(ends[-1]) if ends.size else 0, np.uint8)
    for i in range(int(lengths.max(initial=0))):
        here = lengths > i
        more = (lengths[here] > i + 1).astype(np.uint8) << 7
        part = (gaps[here] >> np.uint64(7 * i)) & np.uint64(127)
        plain[(ends - lengths)[here] + i] = part.astype(np.uint8) | more
    stream = np.frombuffer(bz2.compress(plain.tobytes()), np.uint8)
    return stream if plain.nbytes <= _MAX_RATIO * stream.nbytes + _SLACK else None


def decode(stream: np.ndarray, count: int) -> np.ndarray:
    """Return the `count` positions, int64, of a stream; hostile input raises, never allocates much.

    Raises:
      ValueError: the stream is not what `encode` writes for that many positions.
    """
    most = min(_MAX_RATIO * stream.nbytes + _SLACK, _MAX_BYTES * max(0, count))
    unpacker = bz2.BZ2Decompressor()
    try:
        plain = np.frombuffer(unpacker.decompress(stream.tobytes(), most + 1), np.uint8)
    except (OSError, EOFError) as error:
        raise ValueError(f"the stream cannot be unpacked: {error}") from None
    whole = unpacker.eof and not unpacker.unused_data and plain.size <= most
    if not whole or np.count_nonzero(plain < 128) != count or (count and plain[-1] >= 128):
        raise ValueError(f"the stream does not hold {count} positions")
    ends = np.flatnonzero(plain < 128) + 1
    lengths = np.diff(ends, prepend=0)
    if lengths.max(initial=0) > _MAX_BYTES or (plain[ends[lengths > 1] - 1] == 0).any():
        raise ValueError("a gap is not written in the shortest way")
    gaps = np.zeros(count, np.int64)
    for i in range(int(lengths.max(initial=0))):
        here = lengths > i
        gaps[here] |= (plain[(ends - lengths)[here] + i] & 127).astype(np.int64) << (7 * i)
    positions = np.cumsum(gaps + 1) - 1
    if count and (positions[0] < 0 or (positions[1:] <= positions[:-1]).any()):  # the sum went beyond int64
        raise ValueError("a position lies beyond 2^63")
    return positions
