"""Hugging Face data sets on disk, through their library: parquet files, arrow files, and what `save_to_disk` writes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import InputError
from ..arrays import as_class_numbers, numbered_classes
from ..loading import SPLIT_NAMES, Contents, Wanted, files_of_split

if TYPE_CHECKING:
    from ..image_files import Encoded

LABELS = ("label", "labels", "fine_label", "target")  # CIFAR-100 has coarse ones too

# A part of a split, opened when it is read; `columns` limits what is read of it.
Shard = Callable[[list[str] | None], Any]


def read_huggingface(wanted: Wanted) -> Contents:
    """One split of a data set with a column of images and one of labels. Nothing of it is run, nothing downloaded."""
    import datasets

    path = Path(wanted.path)
    if not path.exists():
        raise InputError(f"data folder {wanted.path!r} does not exist")
    by_split = {split: _shards(path, split) for split in SPLIT_NAMES}
    shards = by_split[wanted.split]
    if not shards:
        raise InputError(
            f"{wanted.path!r} has no {wanted.split} split: no parquet or arrow file, nor folder, is named "
            + " or ".join(SPLIT_NAMES[wanted.split])
        )
    with _reading(wanted.path):
        features = shards[0](None).features
        image = _column(wanted.path, features, "images", _holds_images)
        label = _column(
            wanted.path,
            {name: features[name] for name in LABELS if name in features},
            "labels",
            lambda _: True,
        )
        stored = {
            split: np.array([number for shard in listed for number in shard([label])[label]])
            for split, listed in by_split.items()
            if listed
        }
    labels = {
        split: as_class_numbers(numbers, label, wanted.path, unlabelled=wanted.unlabelled)
        for split, numbers in stored.items()
    }
    names = getattr(features[label], "names", None)
    classes = (
        tuple(names)
        if names
        else numbered_classes(
            np.concatenate(list(labels.values())), wanted.path, unlabelled=wanted.unlabelled
        )
    )

    def encoded(listed: Iterable[Shard], kept: np.ndarray | None) -> Iterator[Encoded]:
        offset = 0
        for index, shard in enumerate(listed):
            column = shard([image]).cast_column(image, datasets.Image(decode=False))
            rows = (
                range(len(column))
                if kept is None
                else kept[(kept >= offset) & (kept < offset + len(column))] - offset
            )
            for row in rows:
                cell = column[int(row)][image]
                content = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
                yield f"row {row} of part {index} of {wanted.path}", content
            offset += len(column)

    def parts(kept: np.ndarray) -> Iterator[np.ndarray]:
        from ..image_files import any_colour, decoded_parts

        with _reading(wanted.path):
            colour = any_colour(file for listed in by_split.values() for file in encoded(listed, None))
            yield from decoded_parts(encoded(shards, kept), colour, wanted)

    return Contents(parts, labels[wanted.split], classes, sized=True)


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """InputError for whatever the library, and those below it, say of files that they cannot read."""
    import pyarrow

    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise InputError(f"{path!r} cannot be read as a Hugging Face data set: {error}") from error


def _shards(path: Path, split: str) -> list[Shard]:
    """The parts of a split: of what `save_to_disk` wrote, or else every parquet or arrow file that bears its name."""
    import datasets
    import pyarrow.parquet

    saved = [path / name for name in SPLIT_NAMES[split] if (path / name / "state.json").is_file()]
    if saved or (path / "state.json").is_file():
        if not saved and split != "train":  # one data set without splits
            return []
        with _reading(str(path)):
            whole = datasets.load_from_disk(str(saved[0] if saved else path))
        return [lambda columns: whole if columns is None else whole.select_columns(columns)]

    def parquet(file: Path) -> Shard:
        return lambda columns: datasets.Dataset(pyarrow.parquet.read_table(file, columns=columns))

    def arrow(file: Path) -> Shard:
        return lambda columns: datasets.Dataset.from_file(str(file))

    if path.is_file():
        named = [path] if split == "train" else []
    else:
        files = sorted(file for ending in ("parquet", "arrow") for file in path.rglob(f"*.{ending}"))
        named = files_of_split(files, path, split)
    return [parquet(file) if file.suffix == ".parquet" else arrow(file) for file in named]


def _holds_images(feature: Any) -> bool:
    """Whether a column is of encoded images: declared so, or bytes alone or beside a path, as others write it."""
    import datasets

    if isinstance(feature, datasets.Image):
        return True
    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def _column(path: str, features: dict[str, Any], what: str, fits: Callable[[Any], bool]) -> str:
    found = [name for name, feature in features.items() if fits(feature)]
    if not found:
        raise InputError(f"{path!r} has no column of {what}")
    return found[0]
