"""Every form in which the field's data sets are published, made small: it is read exactly, or refused by name."""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from advfunmatch import InputError, load_dataset
from advfunmatch.data import ImageDataset
from advfunmatch.data.formats.cifar import CIFAR10_CLASSES
from PIL import Image
from published_data import FORMS, cifar_pickles, idx, make, mnist, packed, planes, same, tiny_imagenet


@pytest.mark.parametrize("name", FORMS)
def test_is_read_exactly(tmp_path: Path, name: str) -> None:
    classes = 100 if name.startswith("cifar100") else 10
    made = make(classes=classes)
    source = FORMS[name](tmp_path, made)
    for split in ("train", "test"):
        data = load_dataset(source, split=split)
        assert same(data, made[split]), split
        assert data.num_classes == (
            classes if "npz" not in name and "web" not in name and "other" not in name else 10
        )
    few = load_dataset(source, split="train", limit=4)
    kept = [
        made["train"][0].tobytes().find(image.tobytes()) for image in few.images.permute(0, 2, 3, 1).numpy()
    ]
    assert kept == sorted(kept)
    assert min(kept) >= 0


@pytest.mark.parametrize(
    ("kind", "place", "pack"),
    [("mnist", "", True), ("mnist", "MNIST/raw", False), ("fashion_mnist", "FashionMNIST/raw", True)],
)
def test_idx_files(tmp_path: Path, kind: str, place: str, pack: bool) -> None:
    made = make(shape=(28, 28))
    mnist(tmp_path / place, made, pack=pack)
    data = load_dataset(f"{kind}:{tmp_path}", split="test")
    assert same(data, made["test"])
    assert same(load_dataset(f"{kind}:{tmp_path}", split="train"), made["train"])
    assert data.class_names[9] == ("9" if kind == "mnist" else "Ankle boot")
    mnist(tmp_path / "other", made, pack=False, ending=".idx{}-ubyte")
    assert same(load_dataset(f"{kind}:{tmp_path / 'other'}", split="test"), made["test"])
    for file in [*(tmp_path / "other").iterdir()]:  # unpacked into folders of their own
        file.rename(tmp_path / "file")
        file.mkdir()
        (tmp_path / "file").rename(file / file.name)
    assert same(load_dataset(f"{kind}:{tmp_path / 'other'}", split="test"), made["test"])


def test_cifar10_1(tmp_path: Path) -> None:
    images, labels = make()["test"]
    for version in ("v4", "v6"):
        np.save(tmp_path / f"cifar10.1_{version}_data.npy", images if version == "v6" else images[:2])
        stored = labels.astype(np.int32)
        np.save(tmp_path / f"cifar10.1_{version}_labels.npy", stored if version == "v6" else stored[:2])
    data = load_dataset(f"cifar10.1:{tmp_path / 'cifar10.1_v6_data.npy'}", split="test")
    assert same(data, (images, labels))
    assert data.class_names == CIFAR10_CLASSES
    with pytest.raises(InputError, match=r"holds both v4 and v6 of CIFAR-10\.1; name the file"):
        load_dataset(f"cifar10.1:{tmp_path}", split="test")
    with pytest.raises(InputError, match="is a test set, and has no train split"):
        load_dataset(f"cifar10.1:{tmp_path}", split="train")
    (tmp_path / "cifar10.1_v4_data.npy").unlink()
    assert len(load_dataset(f"cifar10.1:{tmp_path}", split="test")) == 5


def test_corrupted_sets_by_corruption_and_severity(tmp_path: Path) -> None:
    images, labels = make(30)["train"]
    for index, name in enumerate(("fog", "snow")):
        np.save(tmp_path / f"{name}.npy", images + index)
    np.save(tmp_path / "labels.npy", labels)
    source = f"cifar10c:{tmp_path}"
    whole = load_dataset(source, split="test")
    assert same(whole, (np.concatenate([images, images + 1]), np.concatenate([labels, labels])))
    assert same(load_dataset(f"{source}@snow", split="test"), (images + 1, labels))
    assert same(load_dataset(f"{source}@snow:2", split="test"), (images[6:12] + 1, labels[6:12]))
    with pytest.raises(InputError, match="corruption is 'frost', but must be one of: fog, snow"):
        load_dataset(f"{source}@frost", split="test")
    np.save(tmp_path / "labels.npy", labels + 5)
    with pytest.raises(InputError, match=r"has label 1\d, but only 10 classes"):
        load_dataset(source, split="test")
    (tmp_path / "labels.npy").rename(tmp_path / "label.npy")
    with pytest.raises(InputError, match=r"needs labels\.npy and a NAME\.npy for each corruption"):
        load_dataset(source, split="test")
    (tmp_path / "label.npy").rename(tmp_path / "labels.npy")
    with pytest.raises(InputError, match="severity is '0', but must be one of: 1, 2, 3, 4, 5"):
        load_dataset(f"{source}@fog:0", split="test")


def test_tiny_imagenet_as_it_is_shipped(tmp_path: Path) -> None:
    root = tiny_imagenet(tmp_path / "tiny-imagenet-200")
    train = load_dataset(f"tiny_imagenet:{tmp_path}", split="train")
    test = load_dataset(f"tiny_imagenet:{root}", split="test")
    assert train.class_names == test.class_names == ("n01", "n02")
    assert train.images.shape == (6, 3, 64, 64)
    which = (test.images[:, 0, 0, 0] / 40).round().int()
    assert dict(zip(which.tolist(), test.labels.tolist(), strict=True)) == {0: 1, 1: 0, 2: 1, 3: 0}
    with pytest.raises(InputError, match=r"Tiny-ImageNet as it is shipped.*tiny_imagenet:.* reads it"):
        load_dataset(f"folder:{root}", split="test")


def test_imagenet_and_sizes(tmp_path: Path) -> None:
    from torchvision.transforms.v2 import functional

    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("n01", "n02"):
            (tmp_path / split / name).mkdir(parents=True)
            for index, size in enumerate(((300, 400), (270, 260))):
                pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.png")
    data = load_dataset(f"imagenet:{tmp_path}", split="test")
    assert data.images.shape == (4, 3, 224, 224)
    first = Image.open(tmp_path / "val" / "n01" / "0.png")
    wanted = functional.pil_to_tensor(functional.center_crop(functional.resize(first, [256]), [224]))
    assert torch.equal(data.images[0], wanted)
    assert load_dataset(f"folder:{tmp_path}", split="train", resize=32, crop=24).image_size == (24, 24)
    with pytest.raises(InputError, match="all images must have one size, as resize and crop make them"):
        load_dataset(f"folder:{tmp_path}", split="test")
    with pytest.raises(
        InputError, match="crop is 280, but images have 260×270 pixels; resize makes them larger"
    ):
        load_dataset(f"folder:{tmp_path}", split="test", crop=280)
    digits = load_dataset("digits", split="test", resize=16, crop=12)
    assert digits.images.shape == (360, 1, 12, 12)


def test_sets_of_generated_images_are_training_images(tmp_path: Path) -> None:
    images, labels = make(20)["train"]
    labels = np.sort(labels)
    np.savez(tmp_path / "1m.npz", image=images, label=labels)
    assert same(load_dataset(f"npz:{tmp_path / '1m.npz'}", split="train"), (images, labels))
    with pytest.raises(
        InputError, match=r"holds image and label, training images alone.* goes with extra_data"
    ):
        load_dataset(f"npz:{tmp_path / '1m.npz'}", split="test")
    stored = {"data": images, "extrapolated_targets": labels}
    for protocol in (2, 4, 5):
        (tmp_path / "ti_500K.pickle").write_bytes(pickle.dumps(stored, protocol=protocol))
        assert same(load_dataset(f"pickle:{tmp_path / 'ti_500K.pickle'}", split="train"), (images, labels))


class RunsCode:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("was-run"),))


@pytest.mark.parametrize("kind", ["pickle", "cifar10"])
def test_pickles_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    cifar_pickles(tmp_path / "cifar-10-batches-py", make())
    content = pickle.dumps({"data": RunsCode(), "labels": [0]})
    for name in ("set.pickle", "cifar-10-batches-py/test_batch", "cifar-10-batches-py/data_batch_1"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(
        InputError, match=r"it names pathlib\S*\.Path\.touch|it names builtins\.getattr|it names .*Path"
    ):
        load_dataset(f"{kind}:{tmp_path / 'set.pickle' if kind == 'pickle' else tmp_path}", split="train")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "cifar10:{}",
            "does not hold cifar-10-batches-py, .* or cifar-10-binary.tar.gz, nor is it one of them",
        ),
        ("cifar10:{}/lacks", "cifar-10-batches-py .*lacks data_batch_2, .*batches.meta"),
        ("cifar10:{}/cut.tar.gz", "cannot be unpacked"),
        ("mnist:{}", "holds no train-images-idx"),
        ("mnist:{}/cut", "is no idx file of bytes in 3 dimensions, or is truncated"),
        ("svhn:{}", "train_32x32.mat' does not exist"),
        ("pickle:{}/absent", "cannot be read: No such file"),
        ("pickle:{}/cut.pickle", "cannot be read as a pickle of arrays"),
        ("pickle:{}/list.pickle", "holds list, but must hold a dict with images"),
        ("npz:{}/list.pickle", "holds Python objects.*pickle: reads"),
        ("npz:{}/array.npy", r"is a single array.*cifar10\.1: and cifar10c: read those"),
        ("folder:{}/train.beton", "is a file of ffcv, whose form is not read"),
        ("tiny_imagenet:{}", "has no folder 'train'"),
        ("imagenet:{}/cut.tar.gz", "is not a folder; if it is an archive, unpack it first"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, name: str, message: str) -> None:
    cifar_pickles(tmp_path / "whole", make())
    (tmp_path / "lacks").mkdir()
    (tmp_path / "whole" / "data_batch_1").rename(tmp_path / "lacks" / "data_batch_1")
    packed(tmp_path / "whole", tmp_path / "cut.tar.gz")
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "cut.tar.gz").read_bytes()[:2000])
    idx(tmp_path / "cut" / "train-images-idx3-ubyte", np.zeros((9, 4, 4), np.uint8), pack=False)
    (tmp_path / "cut" / "train-images-idx3-ubyte").write_bytes(
        (tmp_path / "cut" / "train-images-idx3-ubyte").read_bytes()[:-1]
    )
    (tmp_path / "list.pickle").write_bytes(pickle.dumps([1, 2]))
    (tmp_path / "cut.pickle").write_bytes(pickle.dumps({"data": np.zeros(999)})[:200])
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(InputError, match=message):
        load_dataset(name.format(tmp_path), split="train")


@pytest.mark.parametrize(("kind", "library"), [("hf", "datasets"), ("webdataset", "webdataset")])
def test_a_library_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, library: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, library, None)
    (tmp_path / "train-0.tar").write_bytes(b"")
    (tmp_path / "train-0.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=f"{kind}:.* needs the package {library!r}: pip install {library}"):
        load_dataset(f"{kind}:{tmp_path}", split="train")


def test_a_set_in_a_cache_is_the_same_set(tmp_path: Path) -> None:
    """In a file that is mapped, in whatever order it is read, and read anew when its source has changed."""
    made = make(40)
    path, cache = tmp_path / "a.npz", tmp_path / "cache"

    def load(**options: object) -> ImageDataset:
        return load_dataset(f"npz:{path}", split="train", cache=str(cache), **options)  # type: ignore[arg-type]

    np.savez_compressed(path, x_train=made["train"][0], y_train=made["train"][1])
    assert same(load(), made["train"])
    assert same(load(), made["train"])
    assert len([*cache.glob("*.npy")]) == 1
    assert not [*cache.glob("*.partial")]
    order = torch.randperm(40)
    part = load().subset(order[:7]).subset(torch.tensor([3, 1]))
    assert torch.equal(part.images[:], torch.from_numpy(planes(made["train"][0]))[order[[3, 1]]])
    few = load(limit=9)
    assert torch.equal(few.images[:], load_dataset(f"npz:{path}", split="train", limit=9).images)
    for file in cache.glob("*.npy"):
        os.truncate(file, file.stat().st_size // 2)
    assert same(load(), made["train"])  # what a full or broken disk left is written anew
    np.savez(path, x_train=made["train"][0] + 1, y_train=made["train"][1])
    assert same(load(), (made["train"][0] + 1, made["train"][1]))


def test_what_does_not_fit_into_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = FORMS["cifar10_root"](tmp_path, make())
    pages = {"SC_PHYS_PAGES": 7, "SC_PAGE_SIZE": 4096}  # 28 kB, and ten images are 30
    monkeypatch.setattr("advfunmatch.data.loading.os.sysconf", pages.get)
    with pytest.raises(InputError, match=r"\(train\) needs .* of memory; data_cache names a folder"):
        load_dataset(name, split="train")
    assert len(load_dataset(name, split="test")) == 5
    assert len(load_dataset(name, split="train", cache=str(tmp_path / "cache"))) == 10


@pytest.mark.parametrize("name", FORMS)
def test_damaged_files_become_one_sentence(tmp_path: Path, name: str) -> None:
    """Each file cut, emptied and flipped in turn: it is read or refused, and nothing else is raised."""
    source = FORMS[name](tmp_path, make(classes=100 if name.startswith("cifar100") else 10))
    rng = np.random.default_rng(17)
    for file in [file for file in tmp_path.rglob("*") if file.is_file()][:6]:
        whole = file.read_bytes()
        flipped = np.frombuffer(whole, np.uint8).copy()
        flipped[rng.integers(len(whole), size=9)] ^= rng.integers(1, 256, 9, dtype=np.uint8)
        for content in (whole[: len(whole) // 2], b"", flipped.tobytes()):
            file.write_bytes(content)
            with contextlib.suppress(InputError):
                load_dataset(source, split="train")
        file.write_bytes(whole)
    assert len(load_dataset(source, split="train")) == 10
