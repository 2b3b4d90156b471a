"""Other worlds of the digits: fewer classes, images turned, mirrored, inverted or with noise."""

from collections.abc import Collection

import numpy as np

from fishjax.errors import UsageError
from fishjax.types import Batch


def only(data: Batch, classes: Collection[int]) -> Batch:
    """Keep the examples of some classes.

    Raises:
      UsageError: there is none.

    >>> only({"label": np.array([0, 1, 2, 1])}, [1])["label"].tolist()
    [1, 1]
    """
    kept = np.isin(data["label"], list(classes))
    if not kept.any():
        raise UsageError(f"no example has a label of {sorted(classes)}")
    return {k: v[kept] for k, v in data.items()}


def rotated(data: Batch, degrees: float) -> Batch:
    """Turn the images to the left about their centre, with linear interpolation; corners are cut off.

    >>> rotated({"image": np.arange(4.0).reshape(1, 2, 2)}, 90)["image"].round().tolist()
    [[[1.0, 3.0], [0.0, 2.0]]]
    """
    from scipy.ndimage import rotate

    # scipy turns the second axis of the plane onto the first, which is to the left as images are drawn.
    turned = rotate(data["image"], degrees, axes=(1, 2), reshape=False, order=1)
    return {**data, "image": turned.astype(data["image"].dtype)}


def mirrored(data: Batch) -> Batch:
    """Exchange left and right.

    >>> mirrored({"image": np.arange(4.0).reshape(1, 2, 2)})["image"].tolist()
    [[[1.0, 0.0], [3.0, 2.0]]]
    """
    return {**data, "image": data["image"][:, :, ::-1]}


def inverted(data: Batch) -> Batch:
    """Make black of white; images lie in [0, 1].

    >>> inverted({"image": np.array([[[0.0, 0.25]]])})["image"].tolist()
    [[[1.0, 0.75]]]
    """
    return {**data, "image": 1 - data["image"]}


def noisy(data: Batch, scale: float, *, seed: int = 0) -> Batch:
    """Add Gaussian noise of a standard deviation, and cut what leaves [0, 1]; the same for the same seed.

    >>> noisy({"image": np.full((1, 1, 2), 0.5)}, 0.1)["image"].round(3).tolist()
    [[[0.513, 0.487]]]
    """
    image = data["image"]
    noise = scale * np.random.default_rng(seed).standard_normal(image.shape)
    return {**data, "image": np.clip(image + noise, 0, 1).astype(image.dtype)}
