"""`advfunmatch report` and `advfunmatch attack`: whole files that stand on their own."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from advfunmatch import TrainConfig, load_dataset, load_model, train
from advfunmatch.cli import run
from advfunmatch.evaluation import Ball
from advfunmatch.report.breakdowns import ByClass, shown_classes
from advfunmatch.report.names import drawable, label_legend
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
    arguments = ["evaluate", "--checkpoint", str(folder / "checkpoint.pt"), "--data", "digits"]
    arguments += ["--limit", "20", "--attacks", "clean,pgd10,cw"]
    train(make_config(epochs=1, seed=1))
    assert run([*arguments, "--eps", "0.1", "--out", str(folder / "old.json")]) == 0
    train(make_config(epochs=1, overwrite=True))
    assert run([*arguments, "--eps", "0.1", "--out", str(folder / "evaluation.json")]) == 0
    assert run([*arguments, "--eps", "0.1,8/255", "--out", str(folder / "two.json")]) == 0
    stored = json.loads((folder / "evaluation.json").read_text())
    flat = {name: value for name, value in stored.items() if name not in ("results", "fidelity", "digests")}
    (folder / "0.1.0.json").write_text(json.dumps(flat))
    (folder / "notes.json").write_text("[1]")
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in sorted(folder.iterdir(), reverse=True):  # whatever is copied last is newest
        shutil.copyfile(path, copied / path.name)
        os.utime(copied / path.name, (len(list(copied.iterdir())),) * 2)
    assert run(["report", str(copied), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    cells = ["20", "0.1 (linf)", *(f"{stored[name]:.2f}" for name in ("clean", "pgd10", "cw"))]
    for name in ("evaluation.json", "two.json", "0.1.0.json, which does not say of what weights"):
        assert "".join(f"<td>{cell}</td>" for cell in (name, *cells)) in page, name
    assert page.count("<th>clean, %</th><th>PGD-10, %</th><th>C&amp;W, %</th></tr>") == 2, (
        "a table for each ball"
    )
    assert page.index("Evaluations, 0.1 (linf)") < page.index("Evaluations, 8/255 (linf)")
    assert page.count("<td>8/255 (linf)</td>") == 1
    assert "<td>old.json, before this training or of another network</td>" in page
    assert page.count("before this training") == 1
    assert "notes.json" not in page


def test_runs_of_different_balls_share_no_table_and_no_curve(
    make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    folders = []
    for eps, norm in ((0.15, "linf"), (8 / 255, "linf"), (0.15, "l2")):
        folders.append(str(tmp_path / f"{norm} {eps:.3f}"))
        train(make_config(out=folders[-1], epochs=1, eps=eps, norm=norm, eval_limit=20))
    assert run(["report", *folders, "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    balls = ("0.15 (linf)", "8/255 (linf)", "0.15 (l2)")
    for ball in balls:
        (table,) = re.findall(rf"<h2>Figures, {re.escape(ball)}</h2>(.*?)</table>", page)
        assert table.count("<tr") == 2, "the head, and one run"
        assert table.count('class="best"') == 1, "the best of its ball"
        assert f"<td>{ball}</td>" in table
        assert page.count(f'alt="curves, {ball}"') == 1
    assert page.count("<img") == 2 * len(balls)


HOSTILE = [
    "$x_1^{$",
    "_lead",
    "<b>bold",
    "漢字 \N{GRINNING FACE}",
    "n" * 200,
    "שלום",
    "a\nb\u202ec",
    "\udcff",
]


def test_names_are_shown_as_they_are(
    make_config: Callable[..., TrainConfig], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    train(make_config(epochs=1, eval_limit=20))
    for name in HOSTILE:
        shutil.copytree(tmp_path / "run", tmp_path / name)
    folders = [str(tmp_path / name) for name in HOSTILE]
    assert run(["report", *folders, "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    for name in (*HOSTILE[:-2], r"a\nb\u202ec", r"\udcff"):
        shown = html.escape(name)
        assert f"</span>{f'<bdi>{shown}</bdi>' if name == 'שלום' else shown}</td>" in page
    said = [str(each.message) for each in recwarn if "Glyph" in str(each.message) or "_" in str(each.message)]
    assert not said, said
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width < 3000


def test_names_in_pictures() -> None:
    from matplotlib.figure import Figure

    assert drawable("_lead") == "_lead"
    assert drawable("n" * 200) == "n" * 13 + "…" + "n" * 13
    assert drawable("a\nb\udcff") == r"a\nb\udcff"
    figure = Figure()
    lines = [figure.subplots().plot([0, 1], label="_lead")[0]]
    legend = figure.legend(lines, ["run"])
    label_legend(legend, [drawable("_a $x_1^{$")])
    figure.canvas.draw()
    assert [text.get_text() for text in legend.get_texts()] == [r"_a \$x_1^{\$"]


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


def test_report_has_curves_and_classes_of_the_evaluations(
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
    arguments += [
        "--attacks",
        "clean,fgsm",
        "--curve",
        "fgsm,pgd10",
        "--out",
        str(folder / "evaluation.json"),
    ]
    assert run(arguments) == 0
    stored = json.loads((folder / "evaluation.json").read_text())
    shutil.copyfile(folder / "evaluation.json", folder / "broken.json")
    broken = {**stored, "curves": [{**stored["curves"][0], "accuracy": [1.0]}]}
    (folder / "broken.json").write_text(json.dumps(broken))
    assert run(["report", str(folder), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert (
        page.index("Evaluations, 0.15 (linf)")
        < page.index("Accuracy against ε, linf")
        < page.index("By class")
    )
    for curve, title in zip(stored["curves"], ("FGSM", "PGD-10"), strict=True):
        cells = ["evaluation.json", title, *(f"{value:.2f}" for value in curve["accuracy"])]
        assert "".join(f"<td>{cell}</td>" for cell in cells) in page
    assert "<th>0</th><th>0.0375</th>" in page
    by_class = [f"{value:.1f}" for value in stored["results"][1]["per_class"].values()]
    assert "".join(f"<td>{cell}</td>" for cell in ("evaluation.json", "FGSM, 0.15 (linf)", *by_class)) in page
    assert "broken.json" not in page


def test_of_many_classes_the_worst_are_shown() -> None:
    names = [f"class {index}" for index in range(100)]
    clean = ByClass("clean", None, dict.fromkeys(names, 100.0))
    attacked = ByClass("pgd20", Ball("linf", 0.1), {name: 100.0 - index for index, name in enumerate(names)})
    assert shown_classes([clean, attacked]) == names[:-11:-1]
    assert shown_classes([clean]) == names[:10]
    few = ByClass("pgd20", None, {"b": 3.0, "a": 1.0})
    assert shown_classes([few]) == ["b", "a"]
