"""Selection takes memory for what is kept, not for what is passed over."""

import tracemalloc

import numpy as np
import pytest

from fishjax import masks
from fishjax.masks import _largest


@pytest.mark.parametrize("layout", ["unaligned", "strided"])
def test_a_leaf_is_never_copied_whole(tmp_path, monkeypatch, layout):
    monkeypatch.setattr(_largest, "_CHUNK", 1 << 16)
    monkeypatch.setattr(_largest, "_ROOM", 1 << 12)
    n = 1 << 21
    x = np.random.default_rng(7).random(2 * n, np.float32)[::2]
    if layout == "unaligned":  # as in files whose header has an odd length
        (tmp_path / "scores").write_bytes(b"\0" + x.tobytes())
        x = np.memmap(tmp_path / "scores", np.uint8, "r")[1:].view(np.float32)
    tracemalloc.start()
    kept = masks.indices({"w": x}, density=1e-4)["w"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(kept, np.sort(np.argsort(-x, kind="stable")[: round(1e-4 * n)]))
    assert peak < x.nbytes / 2


@pytest.mark.parametrize("size", [1000, 200_000, 5_000_000])
def test_what_is_kept_holds_no_memory_of_what_is_not(size):
    kept = masks.indices({"w": np.random.default_rng(8).random(size, np.float32)}, density=1e-2)["w"]
    while kept.base is not None:
        kept = kept.base
    assert kept.size <= 8 * round(1e-2 * size)
