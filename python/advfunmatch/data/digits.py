"""scikit-learn's digits: 1797 grey 8×8 images of ten handwritten digits, shipped with the package."""

from __future__ import annotations

import torch

from .dataset import ImageDataset

SPLIT_SEED = 0  # fixes which images are in the test split, for every run and every user
TEST_FRACTION = 0.2


def load_digits(split: str) -> ImageDataset:
    """The digits; a fifth of each class, drawn once with a fixed seed, is the test split (360 images of 1797)."""
    import sklearn.datasets
    import sklearn.model_selection

    digits = sklearn.datasets.load_digits()
    train, test = sklearn.model_selection.train_test_split(
        range(len(digits.target)), test_size=TEST_FRACTION, stratify=digits.target, random_state=SPLIT_SEED
    )
    indices = train if split == "train" else test
    # Sixteen grey levels become 0 to 255, so that the set is stored and read like any other.
    images = torch.from_numpy(digits.images[indices] * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target[indices]).to(torch.int64)
    return ImageDataset("digits", split, images, labels, tuple(str(digit) for digit in range(10)))
