"""CIFAR-10-C and CIFAR-100-C (Hendrycks and Dietterich 2019): test sets by kind and severity of corruption.

PATH holds a NAME.npy for each corruption, its images in five blocks of growing severity, and labels.npy.
``cifar10c:PATH`` is all of them, ``cifar10c:PATH@fog`` one corruption, and ``cifar10c:PATH@fog:3`` one severity of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import InputError, one_of
from ..arrays import as_class_numbers
from ..loading import Contents, Wanted
from .cifar import CIFAR10_CLASSES, load_array, require_cifar_images
from .folder import require_folder

SEVERITIES = (1, 2, 3, 4, 5)
LABELS = "labels"
# The benchmark's fifteen, over which its mean is taken.
_BENCHMARK = """
    brightness contrast defocus_blur elastic_transform fog frost gaussian_noise glass_blur impulse_noise
    jpeg_compression motion_blur pixelate shot_noise snow zoom_blur
"""
BENCHMARK = tuple(_BENCHMARK.split())
# Published beside the benchmark's fifteen, for tuning; its mean leaves them out, though they lie in the same folder.
BESIDE = ("gaussian_blur", "saturate", "spatter", "speckle_noise")
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
"""
CIFAR100_CLASSES = tuple(_CIFAR100.split())
CLASSES = {"cifar10c": CIFAR10_CLASSES, "cifar100c": CIFAR100_CLASSES}


@dataclass(frozen=True)
class Cell:
    """One severity of one corruption.

    Attributes:
        corruption, severity: which.
        name: what `load_dataset` reads it by, such as ``"cifar10c:PATH@fog:3"``.
    """

    corruption: str
    severity: int
    name: str

    @property
    def in_mean(self) -> bool:
        """Whether the benchmark's mean counts it."""
        return self.corruption not in BESIDE


def corruption_cells(name: str) -> list[Cell]:
    """The severities of the corruptions in a set such as ``"cifar10c:PATH"``, or those of them that the name selects.

    Raises:
        InputError: the folder, a corruption or a severity is not there, or a file holds something else.
    """
    kind, _, path = name.partition(":")
    if kind not in CLASSES:
        raise one_of("the form of a corrupted set", kind, CLASSES)
    selection = parse_selection(path)
    _arrays(selection)  # of all files, before anything is measured on the first
    return [
        Cell(corruption, severity, f"{kind}:{selection.folder}@{corruption}:{severity}")
        for corruption in selection.corruptions
        for severity in selection.severities
    ]


def is_corrupted_set(name: str) -> bool:
    """Whether a name is that of a set by corruption and severity."""
    return name.partition(":")[0] in CLASSES


@dataclass(frozen=True)
class Selection:
    """What a name such as ``PATH@fog:3`` selects.

    Attributes:
        folder: PATH.
        corruptions: the names of the files that are read.
        severities: which of their blocks.
    """

    folder: Path
    corruptions: tuple[str, ...]
    severities: tuple[int, ...]


def corruption_names(path: str) -> tuple[str, ...]:
    """The corruptions that lie in a folder, in alphabetical order; InputError if there is none."""
    require_folder(path)
    names = sorted(file.stem for file in Path(path).glob("*.npy") if file.stem != LABELS)
    if not names or not (Path(path) / f"{LABELS}.npy").is_file():
        raise InputError(f"data folder {path!r} needs labels.npy and a NAME.npy for each corruption")
    return tuple(names)


def parse_selection(path: str) -> Selection:
    """What is selected; InputError for a corruption or a severity that is not there."""
    folder, at, selected = path.rpartition("@") if not os.path.isdir(path) else (path, "", "")
    if not at:
        return Selection(Path(path), corruption_names(path), SEVERITIES)
    names = corruption_names(folder)
    corruption, colon, severity = selected.partition(":")
    if corruption not in names:
        raise one_of("corruption", corruption, names)
    if colon and severity not in map(str, SEVERITIES):
        raise one_of("severity", severity, map(str, SEVERITIES))
    return Selection(Path(folder), (corruption,), (int(severity),) if colon else SEVERITIES)


def read_corrupted(wanted: Wanted) -> Contents:
    """The selected corruptions and severities, in this order; the files stay on disk but for what is kept."""
    if wanted.split != "test":
        raise InputError(f"data {wanted.name!r} is a test set, and has no {wanted.split} split")
    selection = parse_selection(wanted.path)
    arrays, labels = _arrays(selection)
    block = len(labels) // len(SEVERITIES)
    blocks = [
        images[(severity - 1) * block : severity * block]
        for images in arrays
        for severity in selection.severities
    ]
    numbers = [labels[(severity - 1) * block : severity * block] for severity in selection.severities]

    def parts(kept: np.ndarray) -> Iterator[np.ndarray]:
        for index, images in enumerate(blocks):
            first, last = np.searchsorted(kept, (index * block, (index + 1) * block))
            yield images[kept[first:last] - index * block].transpose(0, 3, 1, 2)

    return Contents(
        parts,
        as_class_numbers(np.concatenate(numbers * len(selection.corruptions)), LABELS, wanted.path),
        CLASSES[wanted.name.partition(":")[0]],
    )


def _arrays(selection: Selection) -> tuple[list[np.ndarray], np.ndarray]:
    """The images of each selected corruption and the labels of all, on disk; InputError for what holds else."""
    labels = load_array(selection.folder / f"{LABELS}.npy")
    block, rest = divmod(len(labels), len(SEVERITIES)) if labels.ndim else (0, 0)
    if rest or not block:
        raise InputError(
            f"labels.npy of {str(selection.folder)!r} has shape {labels.shape}, but must hold five blocks of one "
            "size"
        )
    arrays = []
    for corruption in selection.corruptions:
        file = selection.folder / f"{corruption}.npy"
        arrays.append(load_array(file))
        require_cifar_images(arrays[-1], len(labels), str(file))
    return arrays, labels


def missing_of_benchmark(corruptions: Iterable[str]) -> list[str]:
    """Those of the benchmark's fifteen that are not among some.

    >>> missing_of_benchmark(name for name in BENCHMARK if name != "fog")
    ['fog']
    """
    return sorted({*BENCHMARK} - {*corruptions})
