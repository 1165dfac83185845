"""One self-contained HTML page that compares runs, and its curves as a PNG."""

from __future__ import annotations

import base64
import html
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import load_model
from .data import as_float, load_dataset
from .errors import InputError
from .evaluate import attack_images
from .files import prepare_file, write_atomically
from .report import COLOURS

EXAMPLES = 8  # images a run, the first of as many classes
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; } tr.best td { font-weight: 600; }
img { max-width: 100%; height: auto; } .warning { color: #a33; }
figure { margin: 1rem 0; } figcaption { color: #555; font-size: .9rem; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
details pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; font-size: .8rem; }
"""
# (key of result.json, title, format)
COLUMNS = (
    ("method", "method", "{}"),
    ("model", "model", "{}"),
    ("data", "data", "{}"),
    ("clean", "clean, %", "{:.2f}"),
    ("pgd20", "PGD-20, %", "{:.2f}"),
    ("agreement", "agreement, %", "{:.2f}"),
    ("kl_clean", "KL clean", "{:.4f}"),
    ("kl_mismatched", "KL mismatched", "{:.4f}"),
    ("images_per_second", "images/s", "{:,.0f}"),
    ("seconds", "seconds", "{:,.0f}"),
)
REQUIRED = ("method", "model", "clean", "pgd20", "images_per_second")


@dataclass(frozen=True)
class Run:
    """A folder that `advfunmatch train` wrote, as read back."""

    name: str
    folder: Path
    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    colour: str


def write_report(folders: list[Path], out: Path) -> None:
    """Write the page to `out`, and the curves beside it as a PNG.

    Raises:
        InputError: a folder that holds no finished run, or an `out` that cannot be written.
    """
    prepare_file(out, "out")
    names = _names(folders)
    runs = [
        _read(folder, names[index], COLOURS[index % len(COLOURS)]) for index, folder in enumerate(folders)
    ]
    curves = _curves(runs)
    sections = (
        "<h2>Figures</h2>" + _table(runs),
        f'<h2>While training</h2><figure><img alt="curves" src="{_inline(curves)}"></figure>',
        "<h2>Adversarial examples</h2><p>PGD-20 on each network. The last row is the change, magnified to the full "
        "range of grey; mid-grey is no change.</p>" + "".join(_examples(run) for run in runs),
        "<h2>Settings</h2>" + "".join(_settings(run) for run in runs),
    )
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>advfunmatch report</title><style>{STYLE}</style>'
        f"<h1>advfunmatch: {len(runs)} run{'s' * (len(runs) > 1)}</h1>{''.join(sections)}</html>\n"
    )
    write_atomically(out, page.encode())
    write_atomically(out.with_suffix(".png"), curves)


def _names(folders: list[Path]) -> list[str]:
    short = [folder.resolve().name for folder in folders]
    return [
        name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders, strict=True)
    ]


def _read(folder: Path, name: str, colour: str) -> Run:
    try:
        result = json.loads((folder / "result.json").read_text())
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for key, _, form in COLUMNS:
            if key in (*REQUIRED, *result):
                form.format(result[key])
        for key in ("data", "eps", "norm"):
            result["config"][key]
        for row in metrics:
            float(row["epoch"] + row["loss"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__} {error}"
        raise InputError(
            f"run {str(folder)!r} holds no finished run (result.json, metrics.jsonl): {reason}"
        ) from error
    return Run(name, folder, result, metrics, colour)


def _table(runs: list[Run]) -> str:
    best = max(run.result["pgd20"] for run in runs)
    rows, warnings = [], []
    for run in runs:
        dot = f'<span class="dot" style="background:{run.colour}"></span>'
        cells = [dot + html.escape(run.name)]
        for key, _, form in COLUMNS:
            cells.append(html.escape(form.format(run.result[key])) if key in run.result else "–")
        mark = ' class="best"' if run.result["pgd20"] == best else ""
        rows.append(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        for text in run.result.get("warnings", ()):
            warnings.append(f'<p class="warning">{html.escape(run.name)}: {html.escape(text)}</p>')
    head = "".join(f"<th>{title}</th>" for title in ("run", *(title for _, title, _ in COLUMNS)))
    images = " or ".join(map(str, sorted({run.result["images"] for run in runs})))
    note = f"<p>Accuracies on {images} test images, with the weights after the last epoch.</p>"
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>{note}{''.join(warnings)}"


def _curves(runs: list[Run]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
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
    accuracy.set_title("solid under PGD-10, dotted clean", loc="left", fontsize=11)
    accuracy.legend(fontsize=9)
    loss.set(xlabel="epoch", ylabel="training loss (each method's own)", yscale="log")
    loss.set_title("loss", loc="left", fontsize=11)
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
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    return buffer.getvalue()


def _examples(run: Run) -> str:
    """Clean images, attacked ones with what the network says, and their difference."""
    from matplotlib.figure import Figure

    config = run.result["config"]
    data = load_dataset(config["data"], split="test", limit=1000)
    model = load_model(run.folder / "checkpoint.pt")
    shown = data.subset(
        torch.stack([(data.labels == label).nonzero()[0, 0] for label in data.labels.unique()[:EXAMPLES]])
    )
    clean = as_float(shown.images)
    attacked = attack_images("pgd20", model, shown, eps=config["eps"], norm=config["norm"])
    change = attacked - clean
    scale = change.flatten(1).abs().amax(1).clamp_min(1e-12).view(-1, 1, 1, 1)
    figure = Figure(figsize=(1.35 * len(shown) + 0.4, 4.6), layout="constrained")
    axes = figure.subplots(3, len(shown), squeeze=False)
    for row, (name, pictures) in enumerate(
        (("clean", clean), ("attacked", attacked), ("change", 0.5 + change / scale / 2))
    ):
        said = _classes(model, pictures, shown.class_names) if name != "change" else None
        for column in range(len(shown)):
            axis = axes[row][column]
            axis.imshow(pictures[column].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if said:
                right = said[column] == shown.class_names[int(shown.labels[column])]
                axis.set_title(said[column], fontsize=9, color="black" if right else "#C0392B")
            if column == 0:
                axis.set_ylabel(name, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90)
    caption = f"{html.escape(run.name)}, ε = {config['eps']:.4g} ({config['norm']}); a class in red is wrong"
    return f'<figure><img alt="examples" src="{_inline(buffer.getvalue())}"><figcaption>{caption}</figcaption></figure>'


@torch.no_grad()
def _classes(model: torch.nn.Module, images: Tensor, class_names: tuple[str, ...]) -> list[str]:
    return [class_names[index] for index in model(images).argmax(1).tolist()]


def _settings(run: Run) -> str:
    shown = json.dumps(
        {"config": run.result["config"], "environment": run.result.get("environment")}, indent=2
    )
    return f"<details><summary>{html.escape(run.name)}</summary><pre>{html.escape(shown)}</pre></details>"


def _inline(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()
