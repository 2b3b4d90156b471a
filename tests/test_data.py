"""The digits through TFDS against scikit-learn itself; batches and worlds."""

import numpy as np
import pytest

from fishjax import data
from fishjax.errors import UsageError

pytest.importorskip("tensorflow_datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


def test_splits_are_the_whole_of_the_digits_once(folder):
    from sklearn.datasets import load_digits

    splits = {s: data.load("bundled_digits", s, data_dir=folder) for s in ("train", "validation", "test")}
    assert [data.examples(d) for d in splits.values()] == [900, 360, 537]
    rows = lambda images, labels: sorted(
        map(tuple, np.column_stack([images.reshape(len(labels), -1), labels]))
    )
    together = data.concatenate(*splits.values())
    images, labels = load_digits(return_X_y=True)
    assert rows(together["image"] * 16, together["label"]) == rows(images.astype(np.float32), labels)
    assert together["image"].dtype == np.float32 and together["image"].max() == 1.0


def test_slices_and_errors(folder):
    assert data.examples(data.load("bundled_digits", "test[:10%]", data_dir=folder)) == 54
    with pytest.raises(UsageError, match="nonesuch"):
        data.load("nonesuch", "train", data_dir=folder)
    with pytest.raises(UsageError, match="trian"):
        data.load("bundled_digits", "trian", data_dir=folder)


def test_batches_are_seeded_and_pass_every_example_once_an_epoch():
    rows = {"x": np.arange(10)}
    first, again = (list(data.batches(rows, 3, seed=4, epochs=2)) for _ in range(2))
    np.testing.assert_array_equal([b["x"] for b in first], [b["x"] for b in again])
    assert len(first) == 6 and all(len(b["x"]) == 3 for b in first)
    for epoch in (first[:3], first[3:]):
        assert len(set(np.concatenate([b["x"] for b in epoch]))) == 9
    assert not np.array_equal(first[0]["x"], first[3]["x"])
    assert [len(b["x"]) for b in data.batches(rows, 4)] == [4, 4, 2]
    for size in (0, 11):
        with pytest.raises(UsageError, match="batch_size"):
            next(data.batches(rows, size))


def test_worlds():
    rows = {"image": np.arange(8.0).reshape(2, 2, 2), "label": np.array([3, 5])}
    assert data.only(rows, [5])["label"].tolist() == [5]
    with pytest.raises(UsageError):
        data.only(rows, [9])
    np.testing.assert_allclose(
        data.rotated(rows, 90)["image"], np.rot90(rows["image"], axes=(1, 2)), atol=1e-6
    )
    with pytest.raises(UsageError, match="same fields"):
        data.concatenate(rows, {"image": rows["image"]})
    with pytest.raises(UsageError, match="number of examples"):
        data.examples({"image": np.ones(2), "label": np.ones(3)})
