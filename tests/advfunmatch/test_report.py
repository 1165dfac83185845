"""`advfunmatch report` and `advfunmatch attack`: whole files that stand on their own."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from advfunmatch import TrainConfig, load_dataset, load_model, train
from advfunmatch.cli import run
from PIL import Image


class Links(HTMLParser):
    """Collects everything that a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_report_is_one_page_with_every_run(
    make_config: Callable[..., TrainConfig], tmp_path: Path, teacher: str
) -> None:
    train(make_config(out=tmp_path / "a", method="ce"))
    train(make_config(out=tmp_path / "b", method="advfunmatch", teacher=teacher))
    out = tmp_path / "page" / "report.html"
    assert run(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 0
    page = out.read_text()
    links = Links()
    links.feed(page)
    assert len(links.sources) == 2  # the curves, and the examples of both runs
    for source in links.sources:
        assert source.startswith("data:image/png;base64,")
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
            picture.load()
    assert {"advfunmatch", "ce"} <= set(re.findall(r"<td>(\w+)</td>", page))
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.width > 1000


def test_report_has_the_evaluations_in_a_runs_folder(
    make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    train(make_config(epochs=1))
    arguments = [
        "evaluate",
        "--checkpoint",
        str(folder / "checkpoint.pt"),
        "--data",
        "digits",
        "--limit",
        "20",
    ]
    arguments += ["--eps", "0.1", "--attacks", "clean,pgd10,cw", "--out"]
    assert run([*arguments, str(folder / "evaluation.json")]) == 0
    assert run([*arguments, str(folder / "old.json")]) == 0
    os.utime(folder / "old.json", (0, 0))
    (folder / "notes.json").write_text("[1]")
    assert run(["report", str(folder), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    stored = json.loads((folder / "evaluation.json").read_text())
    cells = [
        "evaluation.json",
        "20",
        "0.1 (linf)",
        *(f"{stored[name]:.2f}" for name in ("clean", "pgd10", "cw")),
    ]
    assert "".join(f"<td>{cell}</td>" for cell in cells) in page
    assert "<th>clean, %</th><th>PGD-10, %</th><th>C&amp;W, %</th></tr>" in page
    assert "<td>old.json, before this training</td>" in page
    assert "notes.json" not in page


def test_report_of_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"pgd20": "much"}, "'f'"), ({"config": {}}, "'data'"), ({"seconds": None}, "NoneType")],
)
def test_report_of_a_damaged_run(
    make_config: Callable[..., TrainConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    reason: str,
) -> None:
    config = make_config(epochs=1)
    result = train(config)
    (Path(config.out) / "result.json").write_text(json.dumps({**result, **changes}))
    assert run(["report", config.out, "--out", str(tmp_path / "report.html")]) == 2
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint.startswith("error: run ")
    assert reason in complaint
    assert not (tmp_path / "report.html").exists()


def test_attack_writes_examples_that_are_data_again(tmp_path: Path, teacher: str) -> None:
    out = tmp_path / "examples.npz"
    arguments = ["attack", "--checkpoint", teacher, "--data", "digits", "--eps", "0.1", "--limit", "50"]
    assert run([*arguments, "--attack", "pgd20", "--out", str(out)]) == 0
    with np.load(out) as archive:
        difference = np.abs(archive["x_test"] - archive["x_clean"]).max()
        assert 0.09 < difference <= 0.1 + 1e-6
    attacked = load_dataset(f"npz:{out}", split="test")
    clean = load_dataset("digits", split="test", limit=50)
    assert torch.equal(attacked.labels, clean.labels)
    model = load_model(teacher)
    accuracy = (model(attacked.images).argmax(1) == attacked.labels).double().mean()
    assert accuracy < (model(clean.images.float() / 255).argmax(1) == clean.labels).double().mean() - 0.2


def test_mismatch_needs_a_teacher_and_an_attack_a_name(
    tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["attack", "--checkpoint", teacher, "--data", "digits", "--limit", "10"]
    arguments += ["--out", str(tmp_path / "x.npz")]
    assert run([*arguments, "--attack", "mismatch"]) == 2
    assert "needs --teacher" in capsys.readouterr().err
    assert run([*arguments, "--attack", "pdg"]) == 2
    assert "must be one of: mismatch, clean" in capsys.readouterr().err
    assert not (tmp_path / "x.npz").exists()
    assert run([*arguments, "--attack", "mismatch", "--teacher", teacher]) == 0


def test_what_cannot_be_shown_is_left_out_and_named(
    make_config: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = {split: load_dataset("digits", split=split, limit=60) for split in ("train", "test")}
    for channels in (2, 3):
        arrays = {f"x_{s}": np.repeat(data.images.numpy(), channels, 1) for s, data in digits.items()}
        arrays |= {f"y_{split}": data.labels.numpy() for split, data in digits.items()}
        np.savez(tmp_path / f"{channels}.npz", **arrays)
    settings = {"epochs": 1, "limit": None, "eval_limit": None}
    for name, data in (
        ("whole", "digits"),
        ("two", f"npz:{tmp_path / '2.npz'}"),
        ("gone", f"npz:{tmp_path / '3.npz'}"),
    ):
        train(
            make_config(
                out=tmp_path / name, data=data, **settings | ({"limit": 60} if name == "whole" else {})
            )
        )
    (tmp_path / "3.npz").unlink()
    train(make_config(out=tmp_path / "no weights", epochs=1, eval_limit=60))
    (tmp_path / "no weights" / "checkpoint.pt").write_bytes(b"")
    (tmp_path / "unfinished").mkdir()
    capsys.readouterr()

    folders = [str(tmp_path / name) for name in ("two", "gone", "unfinished", "no weights", "whole")]
    out = tmp_path / "page" / "report.html"
    assert run(["report", *folders, "--out", str(out)]) == 0
    warnings, page = capsys.readouterr().err.splitlines(), out.read_text()
    assert len(warnings) == 4
    for part in (
        "no adversarial examples of two: images of 2 channels cannot be drawn",
        "no adversarial examples of gone: ",
        "no adversarial examples of no weights: checkpoint ",
        "unfinished' holds no finished run",
    ):
        assert any(part in warning for warning in warnings), part
        assert html.escape(part) in page
    assert page.count("<img") == 2, "the curves, and the examples of the run that is whole"
    assert run(["report", folders[0], "--out", str(tmp_path / "one.html")]) == 0
    assert run(["report", folders[0], "--out", str(tmp_path / "one.png")]) == 2
