"""Pickles of arrays, read without running what they may hold; and the 500,000 pseudo-labelled images of Carmon et al.

Note [Pickles]
~~~~~~~~~~~~~~
A pickle is a program: reading it calls whatever functions it names. `load_arrays` admits the few that NumPy's own
arrays name, each of which only builds an array, and refuses every other by name before it is called.
"""

from __future__ import annotations

import codecs
import pickle
from typing import IO, Any

import numpy as np

from ...errors import InputError
from ..arrays import as_class_numbers, as_pixels, find_axes, numbered_classes
from ..loading import Contents, Wanted, in_parts

IMAGE_KEYS = ("data", "images", "image")
LABEL_KEYS = ("extrapolated_targets", "labels", "targets", "label")


def read_pickle(wanted: Wanted) -> Contents:
    """A pickled dict of images and labels, as of Carmon et al. (2019): ``data`` and ``extrapolated_targets``."""
    path = wanted.path
    if wanted.split != "train":
        raise InputError(
            f"{path!r} holds training images alone, and has no {wanted.split} split; it goes with extra_data"
        )
    try:
        with open(path, "rb") as file:
            stored = load_arrays(file)
    except OSError as error:
        raise InputError(f"{path!r} cannot be read: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        raise InputError(f"{path!r} cannot be read as a pickle of arrays: {error}") from error
    keys = (
        [next((key for key in usual if key in stored), None) for usual in (IMAGE_KEYS, LABEL_KEYS)]
        if isinstance(stored, dict)
        else [None]
    )
    if None in keys:
        holds = ", ".join(map(str, stored)) if isinstance(stored, dict) else type(stored).__name__
        raise InputError(
            f"{path!r} holds {holds or 'nothing'}, but must hold a dict with images ({', '.join(IMAGE_KEYS)}) and "
            f"labels ({', '.join(LABEL_KEYS)})"
        )
    image_key, label_key = map(str, keys)
    labels = as_class_numbers(np.asarray(stored[label_key]), label_key, path, unlabelled=wanted.unlabelled)
    images = np.asarray(stored[image_key])
    axes = find_axes([(image_key, images.shape, len(labels))], path)
    images = as_pixels(images.transpose(axes), image_key, path)
    return Contents(
        in_parts(images if images.ndim == 4 else images[:, None]),
        labels,
        numbered_classes(labels, path, unlabelled=wanted.unlabelled),
    )


def load_arrays(file: IO[bytes]) -> Any:
    """What a pickle of plain values and NumPy arrays holds. See Note [Pickles].

    Raises:
        pickle.UnpicklingError: it names anything else, or is damaged.
    """
    try:
        return _ArrayUnpickler(file, encoding="latin1").load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle runs into anything
        raise pickle.UnpicklingError(f"it is damaged ({type(error).__name__}: {error})") from error


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) in _ADMITTED:
            return _ADMITTED[module.replace("numpy._core", "numpy.core"), name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array, and would be run")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes text as {encoding!r}, which no array does")
    return codecs.encode(text, "latin1")


def _frombuffer(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)  # type: ignore[call-overload]


def _reconstruct(kind: type, shape: tuple[int, ...], typecode: bytes) -> np.ndarray:
    """An empty array, which its state fills; never of a class that the pickle chose."""
    return np.ndarray.__new__(np.ndarray, (0,), "b")


def _scalar(dtype: np.dtype, content: bytes) -> Any:
    return np.frombuffer(content, dtype)[0]


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("_codecs", "encode"): _encode,
}
