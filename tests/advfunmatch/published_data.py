"""The forms in which the field's data sets are published, made small.

Each maker writes one form of known images below a folder and returns the name to load it by.
"""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from advfunmatch.data import ImageDataset
from advfunmatch.data.formats.cifar import BATCHES, CIFAR10_CLASSES
from PIL import Image

Made = dict[str, tuple[np.ndarray, np.ndarray]]  # images (N, H, W, C) or (N, H, W), and labels, by split


def make(count: int = 10, shape: tuple[int, ...] = (32, 32, 3), classes: int = 10) -> Made:
    rng = np.random.default_rng(17)
    sizes = {"train": count, "test": count // 2}
    return {
        split: (rng.integers(0, 256, (n, *shape), dtype=np.uint8), np.arange(n) * 3 % classes)
        for split, n in sizes.items()
    }


def planes(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2) if images.ndim == 4 else images[:, None]


def same(data: ImageDataset, made: tuple[np.ndarray, np.ndarray]) -> bool:
    images, labels = made
    return np.array_equal(data.images[:], planes(images)) and data.labels.tolist() == labels.tolist()


def python2(text: bytes) -> bytes:
    """The pickle with the module names that the published files, written by Python 2, have."""
    return text.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar_pickles(folder: Path, made: Made) -> None:
    folder.mkdir(parents=True)
    per_file = len(made["train"][0]) // 5
    for split, files in (("train", BATCHES), ("test", ("test_batch",))):
        images, labels = made[split]
        for index, name in enumerate(files):
            part = slice(index * per_file, (index + 1) * per_file) if split == "train" else slice(None)
            batch = {"data": planes(images[part]).reshape(-1, 3072), "labels": labels[part].tolist()}
            (folder / name).write_bytes(python2(pickle.dumps(batch, protocol=2)))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10_CLASSES)}, protocol=2))


def cifar_records(folder: Path, made: Made) -> None:
    folder.mkdir(parents=True)
    per_file = len(made["train"][0]) // 5
    for split, files in (("train", BATCHES), ("test", ("test_batch",))):
        images, labels = made[split]
        rows = np.concatenate([labels[:, None].astype(np.uint8), planes(images).reshape(-1, 3072)], 1)
        for index, name in enumerate(files):
            part = rows[index * per_file : (index + 1) * per_file] if split == "train" else rows
            (folder / f"{name}.bin").write_bytes(part.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_CLASSES) + "\n\n")


def cifar100_records(folder: Path, made: Made) -> None:
    folder.mkdir(parents=True)
    for split, (images, labels) in made.items():
        both = np.stack([labels // 5, labels], 1).astype(np.uint8)
        (folder / f"{split}.bin").write_bytes(
            np.concatenate([both, planes(images).reshape(-1, 3072)], 1).tobytes()
        )
    (folder / "fine_label_names.txt").write_text("\n".join(f"fine{index}" for index in range(100)))
    (folder / "coarse_label_names.txt").write_text("\n".join(f"coarse{index}" for index in range(20)))


def cifar100_pickles(folder: Path, made: Made) -> None:
    folder.mkdir(parents=True)
    for split, (images, labels) in made.items():
        batch = {
            "data": planes(images).reshape(-1, 3072),
            "fine_labels": labels.tolist(),
            "coarse_labels": (labels // 5).tolist(),
        }
        (folder / split).write_bytes(python2(pickle.dumps(batch, protocol=2)))
    meta = {"fine_label_names": [f"fine{index}" for index in range(100)], "coarse_label_names": ["animal"]}
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol=2))


def packed(folder: Path, archive: Path) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)


def idx(path: Path, array: np.ndarray, *, pack: bool) -> None:
    content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if pack:
        path = path.with_name(path.name + ".gz")
    path.write_bytes(gzip.compress(content) if pack else content)


def mnist(folder: Path, made: Made, *, pack: bool, ending: str = "-idx{}-ubyte") -> None:
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = made[split]
        idx(folder / f"{prefix}-images{ending.format(3)}", images, pack=pack)
        idx(folder / f"{prefix}-labels{ending.format(1)}", labels.astype(np.uint8), pack=pack)


FORMS: dict[str, Callable[[Path, Made], str]] = {}


def form(write: Callable[[Path, Made], str]) -> Callable[[Path, Made], str]:
    FORMS[write.__name__] = write
    return write


@form
def cifar10_root(root: Path, made: Made) -> str:
    cifar_pickles(root / "cifar-10-batches-py", made)
    return f"cifar10:{root}"


@form
def cifar10_inner_folder(root: Path, made: Made) -> str:
    cifar_pickles(root / "renamed", made)
    return f"cifar10:{root / 'renamed'}"


@form
def cifar10_archive(root: Path, made: Made) -> str:
    cifar_pickles(root / "cifar-10-batches-py", made)
    packed(root / "cifar-10-batches-py", root / "down" / "cifar-10-python.tar.gz")
    return f"cifar10:{root / 'down' / 'cifar-10-python.tar.gz'}"


@form
def cifar10_folder_of_archive(root: Path, made: Made) -> str:
    return cifar10_archive(root, made).removesuffix("/cifar-10-python.tar.gz")


@form
def cifar10_records(root: Path, made: Made) -> str:
    cifar_records(root / "cifar-10-batches-bin", made)
    return f"cifar10:{root}"


@form
def cifar10_archive_of_records(root: Path, made: Made) -> str:
    cifar_records(root / "cifar-10-batches-bin", made)
    packed(root / "cifar-10-batches-bin", root / "down" / "cifar-10-binary.tar.gz")
    return f"cifar10:{root / 'down'}"


@form
def cifar100_root(root: Path, made: Made) -> str:
    cifar100_pickles(root / "cifar-100-python", made)
    return f"cifar100:{root}"


@form
def cifar100_inner_records(root: Path, made: Made) -> str:
    cifar100_records(root / "cifar-100-binary", made)
    return f"cifar100:{root / 'cifar-100-binary'}"


@form
def svhn(root: Path, made: Made) -> str:
    scipy_io = pytest.importorskip("scipy.io")
    for split, (images, labels) in made.items():
        stored = {
            "X": images.transpose(1, 2, 3, 0),
            "y": np.where(labels, labels, 10)[:, None].astype(np.uint8),
        }
        scipy_io.savemat(root / f"{split}_32x32.mat", stored)
    return f"svhn:{root}"


@form
def npz_of_medmnist(root: Path, made: Made) -> str:
    arrays = {f"{split}_images": images for split, (images, _) in made.items()}
    labels = {f"{split}_labels": labels[:, None].astype(np.uint8) for split, (_, labels) in made.items()}
    images, numbers = made["test"]
    np.savez_compressed(
        root / "bloodmnist.npz", **arrays, **labels, val_images=images, val_labels=numbers[:, None]
    )
    return f"npz:{root / 'bloodmnist.npz'}"


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


@form
def webdataset(root: Path, made: Made) -> str:
    pytest.importorskip("webdataset")
    for split, name in (("train", "train"), ("test", "val")):
        images, labels = made[split]
        for shard in range(2):
            with tarfile.open(root / f"{name}-{shard:06}.tar", "w") as tar:
                for index in range(shard * len(images) // 2, (shard + 1) * len(images) // 2):
                    fields = {"cls": str(labels[index]).encode(), "json": b"{}", "png": png(images[index])}
                    for ending, content in fields.items():
                        entry = tarfile.TarInfo(f"{index:06}.{ending}")
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))
    return f"webdataset:{root}"


def hugging_face(made: Made) -> dict[str, object]:
    datasets = pytest.importorskip("datasets")
    names = [f"class{index}" for index in range(10)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return {
        split: datasets.Dataset.from_dict(
            {"img": [Image.fromarray(image) for image in images], "label": labels.tolist()}, features=features
        )
        for split, (images, labels) in made.items()
    }


@form
def hugging_face_parquet(root: Path, made: Made) -> str:
    sets = hugging_face(made)
    (root / "data").mkdir()
    sets["test"].to_parquet(root / "data" / "validation-00000-of-00001.parquet")  # type: ignore[attr-defined]
    for part in range(2):
        piece = sets["train"].shard(2, part, contiguous=True)  # type: ignore[attr-defined]
        piece.to_parquet(root / "data" / f"train-0000{part}-of-00002.parquet")
    return f"hf:{root}"


@form
def parquet_of_other_writers(root: Path, made: Made) -> str:
    pytest.importorskip("datasets")
    import pyarrow as arrow
    import pyarrow.parquet

    for split, (images, labels) in made.items():
        cells = [{"bytes": png(image), "path": None} for image in images]
        pyarrow.parquet.write_table(arrow.table({"image": cells, "label": labels}), root / f"{split}.parquet")
    return f"hf:{root}"


@form
def hugging_face_saved(root: Path, made: Made) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict(hugging_face(made)).save_to_disk(root / "saved")
    return f"hf:{root / 'saved'}"


def tiny_imagenet(root: Path) -> Path:
    """Three images of each of two classes in train, two in val with their table; the first is grey, as some are."""
    rng = np.random.default_rng(0)
    for name in ("n02", "n01"):
        (root / "train" / name / "images").mkdir(parents=True)
        (root / "train" / name / f"{name}_boxes.txt").write_text("0\n")
        for index in range(3):
            image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
            (image.convert("L") if index == 0 else image).save(
                root / "train" / name / "images" / f"{name}_{index}.JPEG"
            )
    (root / "val" / "images").mkdir(parents=True)
    for index in range(4):
        Image.new("RGB", (64, 64), (40 * index, 0, 0)).save(
            root / "val" / "images" / f"val_{index}.JPEG", quality=100
        )
    table = "".join(f"val_{index}.JPEG\t{('n02', 'n01')[index % 2]}\t0\t0\t9\t9\n" for index in range(4))
    (root / "val" / "val_annotations.txt").write_text(table)
    (root / "test" / "images").mkdir(parents=True)
    return root
