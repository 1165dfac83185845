"""What data are is decided by all that is there, never by one file, one axis or one split; doubt is refused or said."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from advfunmatch import InputError, load_dataset
from PIL import Image

SEED = 15


@pytest.fixture
def colour_folder(tmp_path: Path) -> Path:
    """Two classes, three random 4×5 colour images each in train and in test."""
    rng = np.random.default_rng(SEED)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            where = tmp_path / "images" / split / name
            where.mkdir(parents=True)
            for index in range(3):
                Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).save(where / f"{index}.png")
    return tmp_path / "images"


def grey(value: int = 7, size: tuple[int, int] = (5, 4)) -> Image.Image:
    return Image.new("L", size, value)


@pytest.mark.parametrize("place", ["train/cat/0.png", "train/dog/2.png"])
def test_one_grey_file_leaves_a_set_its_colour(colour_folder: Path, place: str) -> None:
    grey().save(colour_folder / place)
    data = load_dataset(f"folder:{colour_folder}", split="train")
    assert data.images.shape == (6, 3, 4, 5)
    assert (data.images == 7).all((1, 2, 3)).sum() == 1
    assert data.images[1, 0].ne(data.images[1, 1]).any()


def test_a_grey_split_of_a_colour_set_is_colour(colour_folder: Path) -> None:
    for file in colour_folder.glob("train/*/*.png"):
        grey().save(file)
    assert load_dataset(f"folder:{colour_folder}", split="train").in_channels == 3


def test_greys_in_any_guise_make_a_grey_set(colour_folder: Path) -> None:
    palette = Image.new("P", (5, 4), 9)
    palette.putpalette([value for value in range(256) for _ in range(3)])
    for file in colour_folder.glob("*/*/*.png"):
        palette.save(file)
    grey(9).convert("1").save(colour_folder / "train/cat/0.png")
    grey(9).convert("LA").save(colour_folder / "train/cat/1.png")
    grey(9).save((colour_folder / "train/cat/2.png").with_suffix(".gif"))  # which Pillow opens as a palette
    data = load_dataset(f"folder:{colour_folder}", split="train")
    assert data.in_channels == 1
    assert data.images[1:].unique().tolist() == [9]


def test_colour_in_other_modes_is_converted(colour_folder: Path) -> None:
    red = Image.new("RGB", (5, 4), (255, 0, 0))
    red.convert("P").save(colour_folder / "train/cat/0.png")
    red.convert("RGBA").save(colour_folder / "train/cat/1.png")
    red.convert("CMYK").save(colour_folder / "train/cat/2.tif")
    (colour_folder / "train/cat/2.png").unlink()
    images = load_dataset(f"folder:{colour_folder}", split="train").images[:3]
    assert torch.equal(
        images, torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand_as(images)
    )


def test_transparency_is_left_out_and_said(colour_folder: Path) -> None:
    Image.new("RGBA", (5, 4), (1, 2, 3, 0)).save(colour_folder / "train/cat/0.png")
    with pytest.warns(UserWarning, match=r"1 images have transparent pixels, such as .*cat/0\.png"):
        images = load_dataset(f"folder:{colour_folder}", split="train").images
    assert images[0, :, 0, 0].tolist() == [1, 2, 3]


def test_photos_are_turned_upright(colour_folder: Path) -> None:
    upright = Image.fromarray(np.random.default_rng(SEED).integers(0, 256, (4, 5, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90° clockwise, so stored turned the other way
    upright.transpose(Image.Transpose.ROTATE_90).save(colour_folder / "train/cat/0.png", exif=exif)
    images = load_dataset(f"folder:{colour_folder}", split="train").images
    np.testing.assert_array_equal(images[0].permute(1, 2, 0), np.array(upright))


def test_sixteen_bits_in_a_pgm_keep_their_brightness(colour_folder: Path) -> None:
    for file in colour_folder.glob("*/*/*.png"):
        file.unlink()
        deep = (np.arange(20) * 257 * 12).astype(">u2").tobytes()
        file.with_suffix(".pgm").write_bytes(b"P5 5 4 65535\n" + deep)
    images = load_dataset(f"folder:{colour_folder}", split="train").images
    assert torch.equal(images[0, 0], torch.arange(20, dtype=torch.uint8).view(4, 5) * 12)


def test_hidden_and_empty_folders_are_named_and_no_classes(colour_folder: Path) -> None:
    (colour_folder / "train/.ipynb_checkpoints").mkdir()
    (colour_folder / "train/ant").mkdir()
    (colour_folder / "train/__MACOSX/cat").mkdir(parents=True)
    grey().save(colour_folder / "train/__MACOSX/cat/0.png")
    (colour_folder / "train/cat/._0.png").write_bytes(b"what another system notes beside a file")
    with pytest.warns(UserWarning, match="no classes") as caught:
        data = load_dataset(f"folder:{colour_folder}", split="train")
    assert data.class_names == ("cat", "dog")
    assert len(data) == 6
    said = " ".join(str(warning.message) for warning in caught)
    assert "are no classes: .ipynb_checkpoints, __MACOSX" in said
    assert "without images are no classes: ant" in said


def test_images_that_are_left_out_are_said(colour_folder: Path) -> None:
    grey().save(colour_folder / "train/cat/7.jfif", "JPEG")
    grey().save(colour_folder / "train/loose.png")
    (colour_folder / "train/dog/0.heic").write_bytes(b"")
    (colour_folder / "train/dog/boxes.txt").write_text("which tells nothing of images")
    with pytest.warns(UserWarning, match=r"2 files of .* are left out, such as '.*0.heic'"):
        assert len(load_dataset(f"folder:{colour_folder}", split="train")) == 7


def test_a_class_without_training_images_keeps_its_number(colour_folder: Path) -> None:
    for file in (colour_folder / "train/cat").iterdir():
        file.unlink()
    with pytest.warns(UserWarning, match="1 classes have no image in the train split .*: cat"):
        train = load_dataset(f"folder:{colour_folder}", split="train")
    assert train.class_names == load_dataset(f"folder:{colour_folder}", split="test").class_names
    assert train.labels.tolist() == [1, 1, 1]


def test_links(colour_folder: Path) -> None:
    os.symlink(colour_folder / "train/cat", colour_folder / "train/cat/again")  # a ring
    os.symlink(colour_folder / "train/dog/0.png", colour_folder / "train/dog/3.png")
    assert len(load_dataset(f"folder:{colour_folder}", split="train")) == 7
    os.symlink(colour_folder / "train/dog", colour_folder / "train/hound")
    with pytest.raises(InputError, match=r"class folders 'dog' and 'hound' of .* are one and the same"):
        load_dataset(f"folder:{colour_folder}", split="train")
    os.rename(colour_folder / "test", colour_folder / "old")
    os.symlink(colour_folder / "train", colour_folder / "test")
    with pytest.raises(InputError, match=r"train and test of .* are one and the same"):
        load_dataset(f"folder:{colour_folder}", split="test")


def test_val_stands_for_test(colour_folder: Path) -> None:
    os.rename(colour_folder / "test", colour_folder / "val")
    (colour_folder / "test/images").mkdir(parents=True)  # unlabelled, as Tiny-ImageNet's
    grey().save(colour_folder / "test/images/0.png")
    assert len(load_dataset(f"folder:{colour_folder}", split="test")) == 6


def test_a_folder_in_a_cache_is_read_anew_when_a_file_changes(colour_folder: Path, tmp_path: Path) -> None:
    def load() -> torch.Tensor:
        return load_dataset(f"folder:{colour_folder}", split="train", cache=str(tmp_path / "cache")).images[:]

    before = load()
    assert torch.equal(before, load_dataset(f"folder:{colour_folder}", split="train").images)
    Image.new("RGB", (5, 4), (1, 2, 3)).save(colour_folder / "train/dog/2.png")
    assert load()[5, :, 0, 0].tolist() == [1, 2, 3]
    assert torch.equal(load()[:5], before[:5])


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((6, 32, 32, 4), (4, 32, 32)),
        ((6, 4, 32, 32), (4, 32, 32)),
        ((6, 32, 30, 9), (9, 32, 30)),
        ((6, 2, 8, 9), (2, 8, 9)),
        ((6, 8, 9, 2), (2, 8, 9)),
        ((6, 3, 2, 2), (3, 2, 2)),
        ((8, 9, 3, 6), (3, 8, 9)),  # as MATLAB stores images
        ((3, 8, 9, 6), (3, 8, 9)),
        ((8, 9, 6), (1, 8, 9)),
    ],
)
def test_axes_are_found_from_all_sizes(
    tmp_path: Path, shape: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    images = np.random.default_rng(SEED).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=np.arange(6) % 2)
    data = load_dataset(f"npz:{tmp_path / 'a.npz'}", split="train")
    assert tuple(data.images.shape) == (6, *wanted)
    axes = [shape.index(6), *(shape.index(size) for size in wanted if size in shape)]
    if len({*shape}) == len(shape) and len(shape) == 4:
        np.testing.assert_array_equal(data.images, images.transpose(axes))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((6, 3, 32, 3), r"can be read as \(N, C, H, W\) or as \(N, H, W, C\)"),
        ((6, 3, 3, 3), "can be read as"),
        ((6, 1, 8, 3), "can be read as"),
        ((6, 4, 4, 4), r"which of 4, 4, 4 counts the channels it does not show.* axes = 'NCHW' or 'NHWC'"),
        ((6, 4, 3, 5), r"which of 4, 3, 5 counts the channels"),
        ((4, 3, 5, 6), r"which of 4, 3, 5 counts the channels"),
        ((6, 784), "images must be"),
        ((32, 32, 3), "images must be"),
        ((5, 32, 32, 3), "as many labels"),
    ],
)
def test_axes_in_doubt_are_refused(tmp_path: Path, shape: tuple[int, ...], message: str) -> None:
    np.savez(tmp_path / "a.npz", x_train=np.zeros(shape, np.uint8), y_train=np.arange(6) % 2)
    with pytest.raises(InputError, match=message):
        load_dataset(f"npz:{tmp_path / 'a.npz'}", split="train")


@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (6, 3, 32, 3), (6, 1, 1, 1), (6, 2, 1, 1), (6, 4, 4, 4)])
def test_an_archive_can_say_which_axis_is_which(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(SEED).integers(0, 256, shape, dtype=np.uint8)
    stored = {"x_train": images, "y_train": np.arange(6) % 2}
    for axes, order in (("NCHW", (0, 1, 2, 3)), ("NHWC", (0, 3, 1, 2))):
        np.savez(tmp_path / "a.npz", **stored, axes=np.array(axes))
        data = load_dataset(f"npz:{tmp_path / 'a.npz'}", split="train")
        np.testing.assert_array_equal(data.images, images.transpose(order))
    for axes, message in (
        ("NCWH", "axes in .* is 'NCWH', but must be one of"),
        ("NHW", "but axes says 'NHW'"),
    ):
        np.savez(tmp_path / "a.npz", **stored, axes=np.array(axes))
        with pytest.raises(InputError, match=message):
            load_dataset(f"npz:{tmp_path / 'a.npz'}", split="train")


def test_both_splits_of_an_archive_decide(tmp_path: Path) -> None:
    """A split that could be read in two ways is read as the other; the classes are those of both."""
    arrays = {
        "x_train": np.zeros((8, 3, 32, 32), np.uint8),
        "y_train": np.arange(8) % 2,
        "x_test": np.zeros((5, 3, 9, 3), np.uint8),
        "y_test": np.array([0, 1, 2, 0, 1]),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    for split in ("train", "test"):
        data = load_dataset(f"npz:{tmp_path / 'a.npz'}", split=split)
        assert (data.in_channels, data.num_classes) == (3, 3)
    np.savez(tmp_path / "a.npz", **{**arrays, "x_test": np.zeros((5, 32, 32, 3), np.uint8)})
    with pytest.raises(InputError, match=r"not laid out alike: x_train \(8, 3, 32, 32\), x_test"):
        load_dataset(f"npz:{tmp_path / 'a.npz'}", split="train")


def test_labels_of_other_shapes(tmp_path: Path) -> None:
    path, images = tmp_path / "a.npz", np.zeros((4, 8, 8), np.uint8)
    for shape in ((4, 1), (1, 4)):
        np.savez(path, x_train=images, y_train=np.array([0, 1, 1, 0], np.uint8).reshape(shape))
        assert load_dataset(f"npz:{path}", split="train").labels.tolist() == [0, 1, 1, 0]
    np.savez(path, x_train=images, y_train=np.eye(4, dtype=int))
    with pytest.raises(InputError, match=r"one class number an image; of one-hot rows store argmax\(1\)"):
        load_dataset(f"npz:{path}", split="train")


def test_values_and_labels_that_look_shifted_are_said(tmp_path: Path) -> None:
    path, labels = tmp_path / "a.npz", np.array([1, 2, 1, 2])
    np.savez(path, x_train=np.eye(8, dtype=np.uint8)[None].repeat(4, 0), y_train=labels)
    with pytest.warns(UserWarning, match="subtract 1") as caught:
        assert load_dataset(f"npz:{path}", split="train").num_classes == 3
    said = " ".join(str(warning.message) for warning in caught)
    assert "uint8 with no value above 1" in said
    assert "of which 0 has no image; subtract 1" in said


def test_values_divided_by_255_twice_are_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=np.eye(8)[None].repeat(4, 0) / 255, y_train=np.array([0, 1, 0, 1]))
    with pytest.warns(UserWarning, match="divided by 255 twice"):
        load_dataset(f"npz:{tmp_path / 'a.npz'}", split="train")


def test_archives_of_objects_are_refused_without_reading_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=np.array([{}, {}], object), y_train=np.array([0, 1]))
    with pytest.raises(InputError, match="holds Python objects, but must hold plain arrays only"):
        load_dataset(f"npz:{tmp_path / 'a.npz'}", split="train")
