"""The pictures of `advfunmatch report`, as PNGs: tables, curves, and adversarial examples."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data import as_float, load_dataset
from ..evaluation import attack_images
from ..models import load_model
from .tables import Run, Table, ball

EXAMPLES = 8  # images, the first of as many classes
DPI = 110
WIDTH = 13.0  # of every picture, in inches


def draw_table(contents: Table) -> bytes:
    """A table, each row's name in the colour of its run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.3 * len(contents.rows) + 0.6), layout="constrained")
    axis = figure.subplots()
    axis.set_axis_off()
    table = axis.table(
        [[run.name, *cells] for run, cells in contents.rows],
        colLabels=contents.head,
        loc="center",
        edges="horizontal",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.auto_set_column_width(range(len(contents.head)))
    for row, (run, _) in enumerate(contents.rows, start=1):
        table[row, 0].get_text().set(color=run.colour, weight="bold")
    return _png(figure)


def draw_curves(runs: Sequence[Run]) -> bytes:
    """Accuracy and loss by epoch, and training speed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    accuracy, loss, speed = figure.subplots(1, 3, width_ratios=(1.3, 1.3, 1))
    for run in runs:
        seen = [row for row in run.metrics if "pgd10" in row]
        epochs = [row["epoch"] for row in seen]
        accuracy.plot(epochs, [row["pgd10"] for row in seen], color=run.colour, lw=2, label=run.name)
        accuracy.plot(epochs, [row["clean"] for row in seen], color=run.colour, ls=":", lw=1.4)
        loss.plot(
            [row["epoch"] for row in run.metrics],
            [row["loss"] for row in run.metrics],
            color=run.colour,
            lw=2,
        )
    accuracy.set(xlabel="epoch", ylabel="test accuracy, %", ylim=(-3, 103))
    accuracy.set_title("accuracy: solid under PGD-10, dotted clean", loc="left", fontsize=11)
    loss.set(xlabel="epoch", ylabel="each method's own loss", yscale="log")
    loss.set_title("training loss", loc="left", fontsize=11)
    places = range(len(runs))
    bars = speed.barh(
        places, [run.result["images_per_second"] for run in runs], color=[run.colour for run in runs]
    )
    speed.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=9)
    speed.set_yticks(places, [run.name for run in runs])
    speed.invert_yaxis()
    speed.margins(x=0.2)
    speed.set_title("training images a second", loc="left", fontsize=11)
    for axis in (accuracy, loss, speed):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.legend(
        *accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=9, frameon=False
    )
    return _png(figure)


def draw_examples(runs: Sequence[Run]) -> bytes:
    """Clean images, then for each run the attacked ones with what its network says, and the change; one data set."""
    from matplotlib.figure import Figure

    data, eps, norm = runs[0].images
    test = load_dataset(data, split="test", limit=1000)
    firsts = [(test.labels == label).nonzero()[0, 0] for label in test.labels.unique()[:EXAMPLES]]
    shown = test.subset(torch.stack(firsts))
    clean = as_float(shown.images)
    truth = [shown.class_names[label] for label in shown.labels.tolist()]
    rows: list[tuple[str, str, Tensor, list[str]]] = [("clean", "black", clean, truth)]
    for run in runs:
        model = load_model(run.folder / "checkpoint.pt")
        attacked = attack_images("pgd20", model, shown, eps=eps, norm=norm)
        change = attacked - clean
        scale = change.flatten(1).abs().amax(1).clamp_min(1e-12).view(-1, 1, 1, 1)
        rows.append((run.name, run.colour, attacked, _classes(model, attacked, shown.class_names)))
        rows.append(("change", run.colour, 0.5 + change / scale / 2, []))
    figure = Figure(figsize=(WIDTH, 1.15 * len(rows) + 0.4), layout="constrained")
    figure.suptitle(f"{data}, ε = {ball(eps, norm)}", fontsize=10)
    axes = figure.subplots(len(rows), len(shown), squeeze=False)
    for row, (name, colour, pictures, said) in zip(axes, rows, strict=True):
        row[0].set_ylabel(name, fontsize=8.5, color=colour, rotation="horizontal", ha="right", va="center")
        for column, axis in enumerate(row):
            axis.imshow(pictures[column].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if said:
                right = said[column] == truth[column]
                axis.set_title(said[column], fontsize=8, pad=2, color="black" if right else "#C0392B")
    return _png(figure)


def stacked(pictures: Sequence[bytes]) -> bytes:
    """The pictures below one another, as one PNG."""
    from PIL import Image

    opened = [Image.open(io.BytesIO(picture)) for picture in pictures]
    whole = Image.new(
        "RGB", (max(each.width for each in opened), sum(each.height for each in opened)), "white"
    )
    top = 0
    for picture in opened:
        whole.paste(picture, (0, top))
        top += picture.height
    buffer = io.BytesIO()
    whole.save(buffer, "PNG")
    return buffer.getvalue()


@torch.no_grad()
def _classes(model: torch.nn.Module, images: Tensor, class_names: tuple[str, ...]) -> list[str]:
    return [class_names[index] for index in model(images).argmax(1).tolist()]


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI)
    return buffer.getvalue()
