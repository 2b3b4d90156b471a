"""Other worlds of the digits: more classes, turned images."""

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
