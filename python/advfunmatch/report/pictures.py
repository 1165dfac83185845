"""The pictures of `advfunmatch report`, as PNGs: tables, curves, and adversarial examples."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data import ImageDataset, as_float, load_dataset
from ..errors import InputError
from ..evaluation import Curve, attack_images
from ..evaluation.balls import short_number
from ..models import load_network, logits_in, require_known_data
from .names import drawable, label_legend
from .tables import MONITORED, TITLES, Run, Table

EXAMPLES = 8  # images, the first of as many classes
DRAWABLE = (1, 3)  # channels: grey and colour
DPI = 110
WIDTH = 13.0  # of every picture but tables, in inches
LINES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"))  # one for each attack of a curve
ACROSS = 130  # characters of a legend that stand beside each other in it


def draw_table(contents: Table) -> bytes:
    """A table, each row's name in the colour of its run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.3 * len(contents.rows) + 0.6), layout="constrained")
    axis = figure.subplots()
    axis.set_axis_off()
    table = axis.table(
        [[drawable(run.name) + run.suffix, *map(drawable, cells)] for run, cells in contents.rows],
        colLabels=contents.head,
        loc="center",
        edges="horizontal",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.auto_set_column_width(range(len(contents.head)))
    for row, (run, _) in enumerate(contents.rows, start=1):
        table[row, 0].get_text().set(color=run.colour, weight="bold")
    return _png(figure, bbox_inches="tight")  # as wide as its columns


def draw_curves(runs: Sequence[Run]) -> bytes:
    """Accuracy and loss by epoch, and training speed, of runs that were attacked in one ball."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    accuracy, loss, speed = figure.subplots(1, 3, width_ratios=(1.3, 1.3, 1))
    kinds = {run.monitored for run in runs}
    labels: list[str] = []
    for run in runs:
        seen = [row for row in run.metrics if f"{run.monitored}pgd10" in row]
        epochs = [row["epoch"] for row in seen]
        kind = f"{MONITORED[run.monitored]}: " if len(kinds) > 1 else ""
        labels.append(kind + drawable(run.name))
        attacked, clean = ([row[f"{run.monitored}{attack}"] for row in seen] for attack in ("pgd10", "clean"))
        accuracy.plot(epochs, attacked, color=run.colour, lw=2, label=str(len(labels)))
        accuracy.plot(epochs, clean, color=run.colour, ls=":", lw=1.4)
        loss.plot(
            [row["epoch"] for row in run.metrics],
            [row["loss"] for row in run.metrics],
            color=run.colour,
            lw=2,
        )
    where = f" on {MONITORED[kinds.pop()]}" if len(kinds) == 1 else ""
    accuracy.set(xlabel="epoch", ylabel=f"accuracy{where}, %", ylim=(-3, 103))
    accuracy.set_title(f"solid: PGD-10, {runs[0].ball}; dotted: clean", loc="left", fontsize=11)
    loss.set(xlabel="epoch", ylabel="each method's own loss", yscale="log")
    loss.set_title("training loss", loc="left", fontsize=11)
    places = range(len(runs))
    bars = speed.barh(
        places, [run.result["images_per_second"] for run in runs], color=[run.colour for run in runs]
    )
    speed.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=9)
    speed.set_yticks(places, [drawable(run.name) for run in runs])
    speed.invert_yaxis()
    speed.margins(x=0.2)
    speed.set_title("training images a second", loc="left", fontsize=11)
    for axis in (accuracy, loss, speed):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    columns = max(1, min(8, ACROSS // (max(map(len, labels)) + 6)))
    handles, _ = accuracy.get_legend_handles_labels()
    legend = figure.legend(
        handles,
        ["run"] * len(handles),
        loc="outside lower center",
        ncols=columns,
        fontsize=9,
        frameon=False,
    )
    label_legend(legend, labels)
    return _png(figure)


def draw_radii(curves: Sequence[tuple[Run, str, Curve]]) -> bytes:
    """Accuracy against the radius, of curves of one norm; each run's own radius is a dotted line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axis = figure.subplots()
    several = {run.name: len({file for other, file, _ in curves if other is run}) > 1 for run, _, _ in curves}
    attacks = list(dict.fromkeys(curve.attack for _, _, curve in curves))
    labels: list[str] = []
    for run, file, curve in curves:
        style, marker = LINES[attacks.index(curve.attack) % len(LINES)]
        axis.plot(
            curve.eps,
            curve.accuracy,
            color=run.colour,
            ls=style,
            marker=marker,
            ms=4,
            lw=1.8,
            label=str(len(labels)),
        )
        of_file = f", {drawable(file.partition(',')[0])}" if several[run.name] else ""
        labels.append(f"{drawable(run.name)}{of_file}: {drawable(TITLES.get(curve.attack, curve.attack))}")
    norm = curves[0][2].norm
    own = {run.ball.eps for run, _, _ in curves if run.ball.norm == norm}
    for eps in own:
        axis.axvline(eps, color="#777777", ls=":", lw=1.2)
    seen = sorted({eps for _, _, curve in curves for eps in curve.eps})
    if len(seen) <= 12:
        axis.set_xticks(seen, [short_number(eps) for eps in seen])
    axis.set(xlabel=f"ε ({norm})", ylabel="accuracy, %", ylim=(-3, 103))
    if own:
        axis.set_title("dotted: the radius that a run was trained with", loc="left", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    columns = max(1, min(8, ACROSS // (max(map(len, labels)) + 6)))
    handles, _ = axis.get_legend_handles_labels()
    legend = figure.legend(
        handles, ["run"] * len(handles), loc="outside lower center", ncols=columns, fontsize=9, frameon=False
    )
    label_legend(legend, labels)
    return _png(figure)


def draw_examples(runs: Sequence[Run]) -> tuple[bytes | None, list[str]]:
    """Clean images, then for each run the attacked ones with what its network says, and the change; one data set.

    Returns:
        The picture, or None where there is nothing to draw; and sentences that say what was left out, and why.
    """
    from matplotlib.figure import Figure

    data, ball = runs[0].images
    try:
        require_known_data(runs[0].folder / "checkpoint.pt", data)
        shown = _examples(data)
    except (InputError, ModuleNotFoundError) as error:
        return None, [f"no adversarial examples of {', '.join(run.name for run in runs)}: {error}"]
    clean = as_float(shown.images)
    truth = [shown.class_names[label] for label in shown.labels.tolist()]
    rows: list[tuple[str, str, Tensor, list[str]]] = [("clean", "black", clean, truth)]
    left_out = []
    for run in runs:
        try:
            model, _ = load_network(run.folder / "checkpoint.pt", None, shown)
            attacked = attack_images("pgd20", model, shown, eps=ball.eps, norm=ball.norm)
        except (InputError, ModuleNotFoundError) as error:
            left_out.append(f"no adversarial examples of {run.name}: {error}")
            continue
        change = attacked - clean
        scale = change.flatten(1).abs().amax(1).clamp_min(1e-12).view(-1, 1, 1, 1)
        rows.append((run.name, run.colour, attacked, _classes(model, attacked, shown.class_names)))
        rows.append(("change", run.colour, 0.5 + change / scale / 2, []))
    if len(rows) == 1:
        return None, left_out
    figure = Figure(figsize=(WIDTH, 1.15 * len(rows) + 0.4), layout="constrained")
    figure.suptitle(f"PGD-20, {ball}; {drawable(data, 80)}", fontsize=10)
    axes = figure.subplots(len(rows), len(shown), squeeze=False)
    for row, (name, colour, pictures, said) in zip(axes, rows, strict=True):
        row[0].set_ylabel(
            drawable(name), fontsize=8.5, color=colour, rotation="horizontal", ha="right", va="center"
        )
        for column, axis in enumerate(row):
            axis.imshow(pictures[column].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if said:
                right = said[column] == truth[column]
                axis.set_title(
                    drawable(said[column], 14), fontsize=8, pad=2, color="black" if right else "#C0392B"
                )
    return _png(figure), left_out


def _examples(name: str) -> ImageDataset:
    """The first test image of each of the first classes; InputError if they cannot be read or drawn."""
    test = load_dataset(name, split="test", limit=1000)
    if test.in_channels not in DRAWABLE:
        raise InputError(f"images of {test.in_channels} channels cannot be drawn, but those of 1 or 3 can")
    firsts = [(test.labels == label).nonzero()[0, 0] for label in test.labels.unique()[:EXAMPLES]]
    return test.subset(torch.stack(firsts))


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
    return [class_names[index] for index in logits_in(model(images)).argmax(1).tolist()]


def _png(figure: Any, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, **settings)
    return buffer.getvalue()
