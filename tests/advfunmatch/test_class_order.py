"""What is stored beside weights is compared with the data: classes by name, in whatever order, channels and sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from advfunmatch import InputError, TrainConfig, load_dataset, train
from advfunmatch.cli import run

MakeConfig = Callable[..., TrainConfig]
ORDER = np.array([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])  # digit d is class ORDER[d]


@pytest.fixture(scope="module")
def permuted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digits with their classes in another order."""
    return write_digits(
        tmp_path_factory.mktemp("permuted") / "x.npz", ORDER, [str(d) for d in ORDER.argsort()]
    )


def write_digits(path: Path, order: np.ndarray, names: list[str], repeat: int = 1) -> str:
    """An archive of 200 and 100 digits, digit d labelled order[d], each pixel repeated; its name as data."""
    arrays = {"class_names": np.array(names)}
    for split, count in (("train", 200), ("test", 100)):
        part = load_dataset("digits", split=split, limit=count)
        images = part.images.numpy()[:, 0].repeat(repeat, 1).repeat(repeat, 2)
        arrays |= {f"x_{split}": images, f"y_{split}": order[part.labels.numpy()]}
    np.savez(path, **arrays)
    return f"npz:{path}"


def measured(out: Path, *arguments: str) -> dict[str, object]:
    assert run(["evaluate", "--eps", "0.1", "--out", str(out), *arguments]) == 0
    stored: dict[str, object] = json.loads(out.read_text())
    return stored


def test_evaluate_and_attack_match_classes_by_name(
    teacher: str, permuted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--checkpoint", teacher, "--attacks", "clean,pgd10", "--teacher", teacher]
    straight = measured(tmp_path / "a.json", *common, "--data", "digits", "--limit", "100")
    capsys.readouterr()
    other = measured(tmp_path / "b.json", *common, "--data", permuted)
    assert f"checkpoint {teacher!r} counts its classes in another order" in capsys.readouterr().err
    for name in ("clean", "pgd10", "agreement", "kl_clean", "per_class"):
        assert other[name] == (pytest.approx(straight[name]) if name == "kl_clean" else straight[name])
    archive = tmp_path / "x.npz"
    assert (
        run(["attack", "--checkpoint", teacher, "--data", permuted, "--eps", "0.1", "--out", str(archive)])
        == 0
    )
    attacked = measured(tmp_path / "c.json", *common[:2], "--data", f"npz:{archive}", "--attacks", "clean")
    assert f"accuracy {attacked['clean']:.2f} %" in capsys.readouterr().out


def test_a_teacher_with_classes_in_another_order_teaches_the_same(
    make_config: MakeConfig, teacher: str, permuted: str, tmp_path: Path
) -> None:
    settings = {"method": "kd", "teacher": teacher, "batch_size": 20, "eval_limit": None, "limit": None}
    result = train(make_config(data=permuted, **settings))
    assert min(result["clean"], result["agreement"]) > 50, "labels and teacher would otherwise disagree"
    assert run(["report", str(make_config().out), "--out", str(tmp_path / "report.html")]) == 0


def test_extra_images_with_classes_in_another_order(
    make_config: MakeConfig, permuted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import advfunmatch.training.trainer as trainer

    runs, real = [], trainer.set_up
    monkeypatch.setattr(trainer, "set_up", lambda *given: runs.append(real(*given)) or runs[0])
    train(make_config(extra_data=permuted, epochs=1))
    extra, digits = runs[0].splits.extra, load_dataset("digits", split="train", limit=200)
    assert torch.equal(extra.labels, digits.labels)
    assert extra.class_names == digits.class_names


@pytest.mark.parametrize("where", ["evaluate", "attack", "teacher", "extra_data"])
def test_other_classes_and_sizes_are_refused(
    where: str, make_config: MakeConfig, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = write_digits(tmp_path / "words.npz", np.arange(10), [f"digit {d}" for d in range(10)])
    large = write_digits(tmp_path / "large.npz", np.arange(10), [str(d) for d in range(10)], repeat=2)
    both = ["'0', '1', '2', '3', '4' and 5 more", "'digit 0', 'digit 1'"]
    sizes = [r"8×8", r"16×16"] if where != "extra_data" else ["(1, 8, 8)", "(1, 16, 16)"]
    for data, parts in ((words, both), (large, sizes)):
        out = tmp_path / "out"
        if where in ("evaluate", "attack"):
            assert run([where, "--checkpoint", teacher, "--data", data, "--out", str(out)]) == 2
            said = capsys.readouterr().err
        else:
            more = (
                {"data": data, "method": "kd", "teacher": teacher}
                if where == "teacher"
                else {"extra_data": data}
            )
            with pytest.raises(InputError) as caught:
                train(make_config(out=out, **more))
            said = str(caught.value)
        assert all(part in said for part in parts), said
        assert not out.exists()


def test_extra_images_without_labels_need_no_classes(
    make_config: MakeConfig, teacher: str, tmp_path: Path
) -> None:
    names = [f"digit {d}" for d in range(10)]
    extra = write_digits(tmp_path / "words.npz", np.arange(10), names)
    config = make_config(method="funmatch", teacher=teacher, extra_data=extra, epochs=1)
    assert train(config)["train_images"] == 200
