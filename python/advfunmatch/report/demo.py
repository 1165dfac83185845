"""The demo's table and picture."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from ..data import ImageDataset, as_float, load_dataset
from ..evaluation import Ball, mismatched_examples
from ..files import write_atomically
from ..models import load_model
from .tables import COLOURS

EXAMPLES = 8  # test images shown, the first of as many classes


def demo_table(result: dict[str, Any]) -> Table:
    """The demo's figures as a terminal table."""
    ball = Ball("linf", result["eps"])
    title = f"{result['data']}, {result['test_images']} test images, attacks within {ball}; percent"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("network", no_wrap=True)
    table.add_column("method", no_wrap=True)
    for name in ("clean", "PGD-20", "AutoAttack", "agreement", "seconds"):
        table.add_column(name, justify="right")
    for run in result["runs"].values():
        agreement = f"{run['agreement']:.1f}" if "agreement" in run else "–"
        accuracies = (f"{run[name]:.1f}" for name in ("clean", "pgd20", "autoattack"))
        table.add_row(run["model"], run["method"], *accuracies, agreement, f"{run['train_seconds']:.0f}")
    return table


def draw_demo(out: Path, result: dict[str, Any]) -> None:
    """Write ``demo.png``: learning curves, final accuracies, and mismatched examples of two of the students."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9.2), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(1, 1.12))
    top, bottom = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    names = list(result["runs"])
    colours = dict(zip(names, COLOURS, strict=False))
    curves, bars = top.subplots(1, 2, width_ratios=(1.15, 1))

    for name in names:
        rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "train_pgd10" in row]
        epochs = [row["epoch"] for row in rows]
        curves.plot(
            epochs,
            [row["train_pgd10"] for row in rows],
            color=colours[name],
            label=_title(name, result),
            lw=2,
        )
        curves.plot(epochs, [row["train_clean"] for row in rows], color=colours[name], ls=":", lw=1.4)
    curves.set(xlabel="epoch", ylabel="accuracy on training images, %", ylim=(-3, 103))
    ball = Ball("linf", result["eps"])
    curves.set_title(f"Learning curves: solid under PGD-10, {ball}; dotted clean", loc="left", fontsize=11)
    curves.grid(alpha=0.25)
    curves.legend(loc="center right", frameon=True, framealpha=0.9, fontsize=9)
    curves.spines[["top", "right"]].set_visible(False)

    kinds = (("clean", "clean"), ("pgd20", "PGD-20"), ("autoattack", "AutoAttack"))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [kind + (index - (len(names) - 1) / 2) * width for kind in range(len(kinds))]
        heights = [result["runs"][name][key] for key, _ in kinds]
        drawn = bars.bar(places, heights, 0.92 * width, color=colours[name], label=name)
        bars.bar_label(drawn, fmt="%.0f", fontsize=9, padding=1)
    bars.set_xticks(range(len(kinds)), [label for _, label in kinds])
    bars.set(ylim=(0, 110), ylabel="test accuracy, %")
    bars.set_title(f"After {result['epochs']} epochs, attacks within {ball}", loc="left", fontsize=11)
    bars.spines[["top", "right"]].set_visible(False)

    _draw_examples(bottom, out, result)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    write_atomically(out / "demo.png", buffer.getvalue())


def _title(name: str, result: dict[str, Any]) -> str:
    run = result["runs"][name]
    return f"teacher: {run['method']}, {run['model']}" if name == "teacher" else f"student: {name}"


def _draw_examples(figure: Any, out: Path, result: dict[str, Any]) -> None:
    """Rows of images: clean, then for each distilled student its mismatched example of the same image."""
    data = load_dataset(result["data"], split="test")
    images = _first_of_each_class(data, EXAMPLES)
    teacher = load_model(out / "teacher" / "checkpoint.pt")
    rows: list[tuple[str, Tensor, nn.Module | None]] = [("clean", images, None)]
    for name in ("funmatch", "advfunmatch"):
        distilled = load_model(out / name / "checkpoint.pt")
        found = mismatched_examples(
            distilled,
            teacher,
            images,
            eps=result["eps"],
            norm="linf",
            seed=result["seed"],
            batch_size=len(images),
        )
        rows.append((name, found, distilled))
    axes = figure.subplots(len(rows), len(images))
    figure.suptitle(
        "Mismatched examples: where in the ball does the student differ most from its teacher? (red: they disagree)",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    for row, (name, pictures, student) in enumerate(rows):
        says = _predictions(teacher, pictures)
        answers = _predictions(student, pictures) if student else None
        for column in range(len(images)):
            axis = axes[row][column]
            axis.imshow(pictures[column].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            caption = f"teacher {says[column][0]} ({says[column][1]:.0%})"
            colour = "black"
            if answers:
                caption += f"\nstudent {answers[column][0]} ({answers[column][1]:.0%})"
                colour = "#009E73" if answers[column][0] == says[column][0] else "#C0392B"
            axis.set_title(caption, fontsize=8.5, color=colour)
            if column == 0:
                axis.set_ylabel("clean image" if student is None else f"found for\n{name}", fontsize=10)


def _first_of_each_class(data: ImageDataset, count: int) -> Tensor:
    firsts = [int((data.labels == label).nonzero()[0]) for label in range(data.num_classes)][:count]
    return as_float(data.images[firsts])


@torch.no_grad()
def _predictions(model: nn.Module | None, images: Tensor) -> list[tuple[int, float]]:
    assert model is not None
    confidence, prediction = model(images).softmax(1).max(1)
    return list(zip(prediction.tolist(), confidence.tolist(), strict=True))
