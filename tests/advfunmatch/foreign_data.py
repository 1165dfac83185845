"""The rows of data: each form in which a set is published, what it was read as when it was first tried, and is now."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import published_data as published
import torch
from advfunmatch import InputError, create_model, load_dataset, load_model, prepare_for_attack
from advfunmatch.cli import run
from published_data import FORMS, Made, make
from torch import Tensor

RIGHT = "right"
ARCHIVE_WANTED = "refused: a single array, but an archive is needed"
PICKLE = "refused with NumPy's advice about allow_pickle"
NO_TRAIN = "refused: no folder `train`"


@dataclass(frozen=True)
class DataRow:
    """A form.

    Attributes:
        holds: what it is.
        before: what came of it when it was first tried.
        make: writes it below a folder; returns the name to load it by, or says itself what came of it.
        splits: those that it has.
        classes, shape: of the images.
        needs: the library that this form alone needs.
    """

    holds: str
    before: str
    make: Callable[[Path, Made], str]
    splits: tuple[str, ...] = ("train", "test")
    classes: int = 10
    shape: tuple[int, ...] = (32, 32, 3)
    needs: str = "numpy"


def cifar10_1(root: Path, made: Made, version: str) -> str:
    images, labels = made["test"]
    np.save(root / f"cifar10.1_{version}_data.npy", images)
    np.save(root / f"cifar10.1_{version}_labels.npy", labels.astype(np.int32))
    return f"cifar10.1:{root}"


def corrupted(root: Path, made: Made, kind: str) -> str:
    np.save(root / "fog.npy", made["test"][0])
    np.save(root / "labels.npy", made["test"][1])
    return f"{kind}:{root}@fog"


def tiny_imagenet(root: Path, made: Made) -> str:
    """Its files are JPEG, so the classes and colours of the images are what can be compared."""
    folder = published.tiny_imagenet(root / "tiny-imagenet-200")
    train, test = (load_dataset(f"tiny_imagenet:{folder}", split=split) for split in ("train", "test"))
    assert train.images.shape == (6, 3, 64, 64)
    assert dict(zip((test.images[:, 0, 0, 0] / 40).round().int().tolist(), test.labels.tolist(), strict=True)) == {
        0: 1, 1: 0, 2: 1, 3: 0
    }  # fmt: skip
    return RIGHT


def imagenet(root: Path, made: Made) -> str:
    from PIL import Image

    for split, name in (("train", "train"), ("test", "val")):
        for index, (image, label) in enumerate(zip(*made[split], strict=True)):
            (root / name / f"n{label:02}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / name / f"n{label:02}" / f"{index}.png")
    for split in ("train", "test"):
        data = load_dataset(f"imagenet:{root}", split=split, resize=32, crop=32)
        order = np.argsort(made[split][1], kind="stable")
        assert published.same(data, (made[split][0][order], made[split][1][order]))
    assert load_dataset(f"imagenet:{root}", split="test").image_size == (224, 224)
    return RIGHT


def generated(root: Path, made: Made) -> str:
    np.savez(root / "1m.npz", image=made["train"][0], label=made["train"][1])
    return f"npz:{root / '1m.npz'}"


def pseudo_labelled(root: Path, made: Made) -> str:
    stored = {"data": made["train"][0], "extrapolated_targets": made["train"][1]}
    (root / "ti_500K.pickle").write_bytes(pickle.dumps(stored, protocol=2))
    return f"pickle:{root / 'ti_500K.pickle'}"


def idx(root: Path, made: Made, kind: str) -> str:
    published.mnist(root, made, pack=True)
    return f"{kind}:{root}"


def keras(root: Path, made: Made, column: bool) -> str:
    arrays = {}
    for split, (images, labels) in made.items():
        arrays |= {f"x_{split}": images, f"y_{split}": labels[:, None] if column else labels}
    np.savez(root / "keras.npz", **arrays)
    return f"npz:{root / 'keras.npz'}"


def ffcv(root: Path, made: Made) -> str:
    (root / "train.beton").write_bytes(b"\0" * 64)
    return f"folder:{root / 'train.beton'}"


def attacked(root: Path, made: Made) -> str:
    """`attack` of a network on an archive, with a ball so small that the examples are the images."""
    source = keras(root, made, column=False)
    torch.save(create_model("small_cnn-4", num_classes=10, in_channels=3).state_dict(), root / "w.pt")
    options = [
        "--model",
        "small_cnn-4",
        "--normalize",
        "none",
        "--attack",
        "fgsm",
        "--eps",
        "1e-9",
        "--device",
        "cpu",
    ]
    assert (
        run(
            [
                "attack",
                "--checkpoint",
                str(root / "w.pt"),
                "--data",
                source,
                "--out",
                str(root / "x.npz"),
                *options,
            ]
        )
        == 0
    )
    data = load_dataset(f"npz:{root / 'x.npz'}", split="test")
    images, labels = made["test"]
    assert np.allclose(data.images, published.planes(images) / 255, atol=1e-6)
    assert data.labels.tolist() == labels.tolist()
    return RIGHT


def written_down(root: Path, made: Made, how: str, prepared: bool = False) -> str:
    """A network in a form for others, which is read back by its own library."""
    network = create_model("wrn-10-1", num_classes=10, in_channels=3).eval()
    if prepared:
        network = prepare_for_attack(network)
    x = torch.from_numpy(published.planes(made["test"][0])).float() / 255
    want = network(x)
    return RIGHT if _close(WRITERS[how](network, x, root), want) else "wrong"


def _exported(network: torch.nn.Module, x: Tensor, root: Path) -> Tensor:
    torch.export.save(torch.export.export(network, (x,)), root / "n.pt2")
    return torch.export.load(root / "n.pt2").module()(x)


def _onnx(network: torch.nn.Module, x: Tensor, root: Path) -> Tensor:
    """As far as an exporter starts from: a program whose operators are all PyTorch's, which ONNX has."""
    program = torch.export.export(network, (x,)).run_decompositions()
    operators = [n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert {operator.namespace for operator in operators} == {"aten"}
    return program.module()(x)


def _safetensors(network: torch.nn.Module, x: Tensor, root: Path) -> Tensor:
    import safetensors.torch

    safetensors.torch.save_file(network.state_dict(), root / "n.safetensors")
    return load_model(root / "n.safetensors", model="wrn-10-1", normalize="none")(x)


def _scripted(network: torch.nn.Module, x: Tensor, root: Path) -> Tensor:
    torch.jit.trace(network, x).save(root / "n.jit")
    return torch.jit.load(root / "n.jit")(x)


WRITERS = {"export": _exported, "onnx": _onnx, "safetensors": _safetensors, "jit": _scripted}


def _close(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().max() <= 1e-5 * want.abs().max())


TEST, TRAIN = ("test",), ("train",)
DATA_ROWS = (
    DataRow("CIFAR-10, Python's pickles", RIGHT, FORMS["cifar10_root"]),
    DataRow("CIFAR-100, Python's pickles", RIGHT, FORMS["cifar100_root"], classes=100),
    DataRow("the inner folder alone", "refused: advises a download that does not exist", FORMS["cifar10_inner_folder"]),
    DataRow("the .tar.gz alone", "refused: advises a download that does not exist", FORMS["cifar10_archive"]),
    DataRow("CIFAR-10, binary records", "refused", FORMS["cifar10_records"]),
    DataRow("CIFAR-100, binary records", "refused", FORMS["cifar100_inner_records"], classes=100),
    DataRow("CIFAR-10.1 v4", ARCHIVE_WANTED, partial(cifar10_1, version="v4"), TEST),
    DataRow("CIFAR-10.1 v6", ARCHIVE_WANTED, partial(cifar10_1, version="v6"), TEST),
    DataRow("CIFAR-10-C", "refused", partial(corrupted, kind="cifar10c"), TEST),
    DataRow("CIFAR-100-C", "refused", partial(corrupted, kind="cifar100c"), TEST, 100),
    DataRow("Tiny-ImageNet-200 as shipped, grey files among it", "refused, or one class named images", tiny_imagenet),
    DataRow("ImageNet, train/ and val/, to be resized", "refused: no folder `test`; sizes differ", imagenet),
    DataRow("DM-Improves-AT, Rebuffi: npz of image and label", "refused as extra data", generated, TRAIN),
    DataRow("Carmon's pickle of 500,000 pseudo-labelled images", PICKLE, pseudo_labelled, TRAIN),
    DataRow("SVHN, .mat", PICKLE, FORMS["svhn"], needs="scipy"),
    DataRow("MNIST, idx", "refused", partial(idx, kind="mnist"), shape=(28, 28)),
    DataRow("Fashion-MNIST, idx", "refused", partial(idx, kind="fashion_mnist"), shape=(28, 28)),
    DataRow("MedMNIST, npz", "refused: no array `x_train`", FORMS["npz_of_medmnist"]),
    DataRow("Hugging Face, parquet", NO_TRAIN, FORMS["hugging_face_parquet"], needs="datasets"),
    DataRow("Hugging Face, arrow of save_to_disk", NO_TRAIN, FORMS["hugging_face_saved"], needs="datasets"),
    DataRow("parquet of other writers", NO_TRAIN, FORMS["parquet_of_other_writers"], needs="datasets"),
    DataRow("WebDataset, shards", NO_TRAIN, FORMS["webdataset"], needs="webdataset"),
    DataRow("ffcv, .beton", PICKLE, ffcv),
    DataRow("Keras, npz", RIGHT, partial(keras, column=False)),
    DataRow("Keras, npz, labels (N, 1)", RIGHT, partial(keras, column=True)),
    DataRow("what `attack` writes", RIGHT, attacked),
    DataRow("a network as torch.export", RIGHT, partial(written_down, how="export")),
    DataRow("a network as the program that ONNX exporters start from", RIGHT, partial(written_down, how="onnx")),
    DataRow("a network as safetensors", RIGHT, partial(written_down, how="safetensors"), needs="safetensors"),
    DataRow("a network as TorchScript", RIGHT, partial(written_down, how="jit")),
    DataRow("the prepared network as that program", "fails at scale_shift_relu",
        partial(written_down, how="onnx", prepared=True)),
)  # fmt: skip


def outcome(row: DataRow, folder: Path) -> str:
    """What comes of the form now: read exactly, or refused by a sentence."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    made = make(classes=row.classes, shape=row.shape)
    source = row.make(folder, made)
    if ":" not in source:
        return source
    for split in row.splits:
        try:
            data = load_dataset(source, split=split)
        except InputError as refusal:
            path = source.partition(":")[2]
            return f"refused: {str(refusal).replace(repr(path), 'it').partition(';')[0]}"
        if not published.same(data, made[split]):
            return "wrong"
    return RIGHT
