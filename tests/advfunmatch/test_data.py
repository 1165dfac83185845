"""Data by name: what is read, in which layout, and what is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from advfunmatch import InputError, load_dataset
from PIL import Image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, three 4×5 colour images each in train and one each in test, every pixel (10·class, 1, 2)."""
    for split, count in (("train", 3), ("test", 1)):
        for label, name in enumerate(("cat", "dog")):
            where = tmp_path / "images" / split / name
            where.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (5, 4), (10 * label, 1, 2)).save(where / f"{index}.png")
    return tmp_path / "images"


def test_digits_splits_are_whole_disjoint_and_fixed() -> None:
    train, test = load_dataset("digits", split="train"), load_dataset("digits", split="test")
    assert (len(train), len(test), train.num_classes) == (1437, 360, 10)
    assert repr(train) == "ImageDataset(digits train: 1437 images of 1×8×8, 10 classes)"
    assert train.images.dtype == torch.uint8
    assert train.images.max() == 255
    assert torch.equal(test.images, load_dataset("digits", split="test").images)
    assert test.labels.bincount().min() >= 34
    known = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in known for image in test.images)


def test_folder(folder: Path) -> None:
    train = load_dataset(f"folder:{folder}", split="train")
    assert train.images.shape == (6, 3, 4, 5)
    assert train.class_names == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.images[:, :, 0, 0].tolist() == [[0, 1, 2]] * 3 + [[10, 1, 2]] * 3
    assert len(load_dataset(f"folder:{folder}", split="test")) == 2


def test_limit_draws_at_random_but_always_the_same(folder: Path) -> None:
    few = load_dataset("digits", split="train", limit=100)
    assert len(few) == 100
    assert len(few.labels.unique()) == 10
    assert torch.equal(few.images, load_dataset("digits", split="train", limit=100).images)
    assert len(load_dataset(f"folder:{folder}", split="train", limit=4)) == 4


@pytest.mark.parametrize(
    ("images", "shape"),
    [
        (np.full((6, 8, 9), 7, np.uint8), (1, 8, 9)),
        (np.full((6, 8, 9, 3), 7, np.uint8), (3, 8, 9)),
        (np.full((6, 3, 8, 9), 7, np.uint8), (3, 8, 9)),
        (np.full((6, 8, 9, 1), 0.5, np.float64), (1, 8, 9)),
    ],
)
def test_npz_layouts(tmp_path: Path, images: np.ndarray, shape: tuple[int, ...]) -> None:
    path = tmp_path / "data.npz"
    labels = np.array([0, 1, 2, 0, 1, 2])
    np.savez(path, x_train=images, y_train=labels, x_test=images[:2], y_test=labels[:2])
    train, test = load_dataset(f"npz:{path}", split="train"), load_dataset(f"npz:{path}", split="test")
    assert tuple(train.images.shape[1:]) == shape
    assert test.num_classes == train.num_classes == 3
    assert 0 < float(train[0][0].max()) <= 1


def test_npz_that_names_its_classes(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    images, names = np.zeros((2, 8, 9), np.uint8), ("cat", "dog", "ēmu")
    np.savez(path, x_test=images, y_test=np.array([1, 1]), class_names=np.array(names))
    assert load_dataset(f"npz:{path}", split="test").class_names == names


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"class_names": np.array(["a"])}, "has label 1, but only 1 class_names"),
        ({"class_names": np.array(["a", "a"])}, "must be a list of different strings"),
        ({"class_names": np.array([0, 1])}, "must be a list of different strings"),
        ({"class_names": np.array("ab")}, "must be a list of different strings"),
        ({"y_train": np.array([])}, "y_train in .* must hold integer class numbers"),
        ({"y_train": np.array(["a", "b"])}, "y_train in .* must hold integer class numbers"),
        ({"y_train": np.array([2 * 10**6])}, "y_train in .* must hold integer class numbers"),
        ({"x_test": np.zeros((2, 0, 4))}, "images must be"),
    ],
)
def test_npz_test_split_refusals(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    whole = {"x_test": np.zeros((2, 4, 4)), "y_test": np.array([0, 1])}
    np.savez(tmp_path / "data.npz", **{**whole, **arrays})
    with pytest.raises(InputError, match=message):
        load_dataset(f"npz:{tmp_path / 'data.npz'}", split="test")


def test_npz_that_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    images = 9 * np.random.default_rng(0).integers(0, 2, (20, 8, 8), dtype=np.uint8)
    np.savez_compressed(path, x_test=images, y_test=np.arange(20) % 2)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with contextlib.suppress(InputError):
            load_dataset(f"npz:{path}", split="test")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": np.zeros((2, 4, 4))}, "has no array 'y_train'"),
        ({"x_train": np.zeros((2, 4, 4)), "y_train": np.zeros(3, int)}, "as many labels"),
        ({"x_train": np.full((2, 4, 4), 2.0), "y_train": np.array([0, 1])}, r"outside \[0, 1\]"),
        ({"x_train": np.full((2, 4, 4), np.nan), "y_train": np.array([0, 1])}, r"outside \[0, 1\]"),
        ({"x_train": np.zeros((2, 4, 4)), "y_train": np.array([0.0, 1.0])}, "integer class numbers"),
        ({"x_train": np.zeros((2, 4, 4)), "y_train": np.array([-1, 1])}, "integer class numbers"),
        ({"x_train": np.zeros((2, 4, 4)), "y_train": np.array([0, 0])}, "only one class"),
        ({"x_train": np.zeros((0, 4, 4)), "y_train": np.zeros(0, int)}, "as many labels"),
        ({"x_train": np.zeros((2, 4, 4), int), "y_train": np.array([0, 1])}, "uint8 or floating point"),
    ],
)
def test_npz_refusals(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(InputError, match=message):
        load_dataset(f"npz:{tmp_path / 'data.npz'}", split="train")


def test_npz_that_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(InputError, match=r"cannot be read as an \.npz archive"):
        load_dataset(f"npz:{tmp_path / 'data.npz'}", split="train")
    with pytest.raises(InputError, match=r"cannot be read as an \.npz archive"):
        load_dataset(f"npz:{tmp_path / 'absent.npz'}", split="train")


def test_unreadable_image_is_named(folder: Path) -> None:
    broken = folder / "train" / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(InputError, match=r"dog/1\.png' cannot be read"):
        load_dataset(f"folder:{folder}", split="train")


def test_sixteen_bits_a_pixel_keep_their_brightness(folder: Path) -> None:
    deep = (np.arange(20, dtype=np.uint16) * 257 * 12).reshape(4, 5)
    for split in ("train", "test"):
        for file in (folder / split).glob("*/*.png"):
            Image.fromarray(deep).save(file)
    images = load_dataset(f"folder:{folder}", split="test").images
    assert torch.equal(images[0, 0], torch.arange(20, dtype=torch.uint8).view(4, 5) * 12)
    Image.fromarray(deep.astype(np.float32)).save(folder / "test" / "dog" / "9.tiff")
    with pytest.raises(InputError, match=r"dog/9\.tiff' cannot be read: it has 32 bits a pixel"):
        load_dataset(f"folder:{folder}", split="test")


def test_image_of_another_size_is_named(folder: Path) -> None:
    Image.new("RGB", (6, 4)).save(folder / "train" / "dog" / "9.png")
    with pytest.raises(InputError, match=r"dog/9\.png' is 6×4 pixels.*one size"):
        load_dataset(f"folder:{folder}", split="train")


def test_folders_that_hold_no_data(tmp_path: Path, folder: Path) -> None:
    for absent in (str(tmp_path / "absent"), "a" * 5000):
        with pytest.raises(InputError, match="does not exist"):
            load_dataset(f"folder:{absent}", split="train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no folder 'train'"):
        load_dataset(f"folder:{tmp_path / 'empty'}", split="train")
    (tmp_path / "empty" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no images"):
        load_dataset(f"folder:{tmp_path / 'empty'}", split="train")
    (folder / "test" / "emu").mkdir()
    with pytest.raises(InputError, match="class 'emu'"):
        load_dataset(f"folder:{folder}", split="test")


@pytest.mark.parametrize("name", ["digit", "folder", "zip:a", ""])
def test_unknown_data_lists_what_there_is(name: str) -> None:
    with pytest.raises(InputError, match=r"must be one of: digits, folder:PATH, npz:PATH"):
        load_dataset(name, split="train")


def test_unknown_split() -> None:
    with pytest.raises(InputError, match="split is 'val', but must be one of: train, test"):
        load_dataset("digits", split="val")


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (0, "limit is 0, but must be at least 1"),
        (2.5, "limit is 2.5, but must be of type int"),
        ("9", "limit is '9', but must be of type int"),
        (True, "limit is True, but must be of type int"),
    ],
)
def test_limit_that_cannot_be(limit: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_dataset("digits", split="test", limit=limit)
