"""A second source of training images: its labels counted as the training set counts them."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..errors import InputError
from .classes import match_classes
from .dataset import UNLABELLED, ImageDataset


def as_extra_images(extra: ImageDataset, train: ImageDataset) -> ImageDataset:
    """The extra images with the training set's classes.

    Classes go by name, and some of them may be missing. Where the extra set only numbers its classes, as generated sets
    do, the numbers are the training set's. Images without label (−1) stay so.

    Raises:
        InputError: it has a class that the training set does not have.
    """
    ours, theirs = train.class_names, extra.class_names
    places = {name: place for place, name in enumerate(ours)}
    if not {*theirs} <= {*places}:
        if theirs == tuple(str(number) for number in range(len(theirs))) and len(theirs) <= len(ours):
            return replace(extra, class_names=ours)
        match_classes(theirs, ours, of_have=f"extra_data {extra.name!r}", of_wanted=f"data {train.name!r}")
    order = torch.tensor([places[name] for name in theirs], device=extra.labels.device)
    labels = torch.where(extra.labels == UNLABELLED, UNLABELLED, order[extra.labels.clamp(min=0)])
    return replace(extra, labels=labels, class_names=ours)


def require_labels(extra: ImageDataset, what: str) -> None:
    """InputError, which says what needs them, if some images have no label."""
    if unlabelled := int((extra.labels == UNLABELLED).sum()):
        raise InputError(
            f"{what} needs a label for every image, but {unlabelled} of extra_data {extra.name!r} have none (-1)"
        )
