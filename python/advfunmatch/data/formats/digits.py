"""scikit-learn's digits: 1797 grey 8×8 images of ten handwritten digits, shipped with the package."""

from __future__ import annotations

import numpy as np

from ..loading import Contents, Wanted, in_parts

SPLIT_SEED = 0  # fixes which images are in the test split, for every run and every user
TEST_FRACTION = 0.2


def read_digits(wanted: Wanted) -> Contents:
    """The digits; a fifth of each class, drawn once with a fixed seed, is the test split (360 images of 1797)."""
    import sklearn.datasets
    import sklearn.model_selection

    digits = sklearn.datasets.load_digits()
    train, test = sklearn.model_selection.train_test_split(
        range(len(digits.target)), test_size=TEST_FRACTION, stratify=digits.target, random_state=SPLIT_SEED
    )
    indices = train if wanted.split == "train" else test
    # Sixteen grey levels become 0 to 255, so that the set is stored and read like any other.
    images = (digits.images[indices] * (255 / 16)).round().astype(np.uint8)[:, None]
    names = tuple(str(digit) for digit in range(10))
    return Contents(in_parts(images), digits.target[indices].astype(np.int64), names)
