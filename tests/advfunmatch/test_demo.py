"""The demo, with two epochs of 300 images instead of thirty of all, and without AutoAttack's minutes."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from advfunmatch import cli, demo, load_dataset
from PIL import Image


def test_demo_writes_table_picture_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Here:
        """Runs in this process, where the attacks can be cut short."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, function, *arguments):  # type: ignore[no-untyped-def]
            future: Future[object] = Future()
            measured = function(*arguments)
            future.set_result({"autoattack": measured["pgd20"], **measured})
            return future

    arrays = {}
    for split, count in (("train", 300), ("test", 100)):
        part = load_dataset("digits", split=split, limit=count)
        arrays |= {f"x_{split}": part.images.numpy(), f"y_{split}": part.labels.numpy()}
    np.savez(tmp_path / "few.npz", **arrays)
    monkeypatch.setattr(demo, "DATA", f"npz:{tmp_path / 'few.npz'}")
    monkeypatch.setattr(demo, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(demo, "ATTACKS", ("clean", "pgd20"))
    monkeypatch.setattr(demo, "TEACHER_MODEL", "small_cnn-8")
    out = tmp_path / "demo"
    assert cli.run(["demo", "--out", str(out), "--epochs", "2"]) == 0
    table = capsys.readouterr().out
    assert all(word in table for word in ("pgd_at", "advfunmatch", "AutoAttack", "agreement", "small_cnn-8"))
    result = json.loads((out / "demo.json").read_text())
    assert list(result["runs"]) == ["teacher", "ce", "funmatch", "advfunmatch"]
    assert result["test_images"] == 100
    students = [run for name, run in result["runs"].items() if name != "teacher"]
    assert all(
        {"clean", "pgd20", "agreement", "kl_mismatched", "train_seconds"} <= set(run) for run in students
    )
    with Image.open(out / "demo.png") as picture:
        picture.load()
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(maxcolors=10**7)) > 100
