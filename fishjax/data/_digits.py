"""A TFDS builder for the digits that scikit-learn carries: 1797 images of 8 x 8, no download.

The data: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998 (CC BY 4.0).
"""

import numpy as np
import tensorflow_datasets as tfds

# Of every ten images five train, two validate, three test: whatever is chosen is chosen on validation.
SPLITS = {"train": range(5), "validation": range(5, 7), "test": range(7, 10)}


class BundledDigits(tfds.core.GeneratorBasedBuilder):
    """Digits 0 to 9, written by 13 people, as float32 in [0, 1]."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of 8 x 8 pixels, bundled with scikit-learn.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8), dtype=np.float32),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(kept) for split, kept in SPLITS.items()}

    def _generate_examples(self, kept):
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            if i % 10 in kept:
                yield i, {"image": (image / 16).reshape(8, 8).astype(np.float32), "label": int(label)}
