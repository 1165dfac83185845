"""One self-contained HTML page that compares runs, and the same as a PNG."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..evaluation import Ball
from ..files import prepare_file, write_atomically
from .breakdowns import classes_of
from .names import drawing, escaped, runs_leftward
from .pictures import draw_curves, draw_examples, draw_radii, draw_table, stacked
from .tables import (
    COLOURS,
    COLUMNS,
    Run,
    Table,
    by_ball,
    classes,
    drawn_curves,
    evaluations,
    figures,
    radii,
    read_evaluations,
)

REQUIRED = ("method", "model", "clean", "pgd20", "images_per_second")
RUNS_TOGETHER = 5  # in one picture of examples, which fits a sheet of paper then
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
div.wide, figure { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; }
td, th { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top; }
th { vertical-align: bottom; overflow-wrap: normal; } td { white-space: nowrap; }
.words-2 td:nth-child(-n+2), .words-4 td:nth-child(-n+4) { white-space: normal; overflow-wrap: break-word;
  max-width: 16rem; }
.wide td:first-child { overflow-wrap: anywhere; min-width: min(12rem, 40vw); padding-left: 1.4rem; position: relative; }
td:first-child, th:first-child { text-align: left; }
tr.best td { font-weight: 600; }
img { width: 100%; min-width: 44rem; max-width: none; height: auto; display: block; } .warning { color: #a33; }
.dot { position: absolute; left: .3rem; top: .75em; width: .7em; height: .7em; border-radius: 50%; }
details pre { background: #f6f6f6; padding: .7rem; white-space: pre-wrap; font-size: .8rem; }
@page { size: A4 landscape; margin: 12mm; }
@media print {
  body { font-size: 9pt; max-width: none; margin: 0; padding: 0; }
  div.wide, figure { overflow: visible; } figure, tr { break-inside: avoid; }
  table { width: 100%; font-size: 7.5pt; } td, th { padding: .2rem .3rem; }
  .words-2 td:nth-child(-n+2), .words-4 td:nth-child(-n+4) { overflow-wrap: anywhere; min-width: 5.5rem;
    max-width: none; }
  .wide td:first-child { min-width: 9rem; } h2 + p { break-after: avoid; }
  img { min-width: 0; max-width: 100%; max-height: 150mm; width: auto; } h2 { break-after: avoid; }
  * { print-color-adjust: exact; }
}
"""


def write_report(folders: list[Path], out: Path) -> list[str]:
    """Write the page to `out`, and its tables and pictures beside it as a PNG.

    Returns:
        Sentences that say what was left out, and why: runs that are not finished, and pictures that cannot be drawn.

    Raises:
        InputError: none of the folders holds a finished run, or `out` cannot be written.
    """
    if out.suffix == ".png":
        raise InputError(f"out is {str(out)!r}, where the PNG beside the page goes; it must end otherwise")
    runs, left_out = _read_all(folders)
    prepare_file(out, "out")
    with drawing():
        pictures, examples, missing = _draw(runs)
        left_out += missing
        tables = [figures(group) for group in by_ball(runs).values()]
        evaluated, of_classes = evaluations(runs), classes(runs)
        against_eps = {norm: (draw_radii(found), radii(found)) for norm, found in drawn_curves(runs).items()}
        drawn = [draw_table(table) for table in (*tables, *evaluated)]
        for picture, below in against_eps.values():
            drawn += [picture, *map(draw_table, below)]
        drawn += map(draw_table, of_classes)
    best = _best([run for table in tables for run, _ in table.rows])
    sections = [_warnings(left_out)]
    sections += [f"<h2>Figures{_of(table)}</h2>{_table(table, best)}" for table in tables]
    sections.append(_notes(runs))
    sections += [f"<h2>Evaluations{_of(table)}</h2>{_table(table)}" for table in evaluated]
    if evaluated:
        sections.append("<p>What <code>advfunmatch evaluate</code> wrote into the runs' folders.</p>")
    for norm, (picture, below) in against_eps.items():
        sections.append(
            f"<h2>Accuracy against ε, {norm}</h2>{_figure(picture, f'accuracy against ε, {norm}')}"
        )
        sections += map(_table, below)
    sections += [f"<h2>By class, %</h2>{_table(table)}" for table in of_classes]
    for ball, picture in pictures.items():
        sections.append(f"<h2>While training, {ball}</h2>{_figure(picture, f'curves, {ball}')}")
    if examples:
        sections.append(
            "<h2>Adversarial examples</h2><p>PGD-20 on each network, and the change, magnified to the full range: "
            "mid-grey is no change. Above each image, what the network says; a wrong class is red.</p>"
        )
        sections += [_figure(picture, "adversarial examples") for picture in examples]
    sections.append("<h2>Settings</h2>" + "".join(_settings(run) for run in runs))
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>advfunmatch report</title><style>{STYLE}</style>"
        f"<h1>advfunmatch: {len(runs)} run{'s' * (len(runs) > 1)}</h1>{''.join(sections)}</html>\n"
    )
    write_atomically(out, page.encode())
    write_atomically(out.with_suffix(".png"), stacked([*drawn, *pictures.values(), *examples]))
    return left_out


def _draw(runs: list[Run]) -> tuple[dict[Ball, bytes], list[bytes], list[str]]:
    """Curves for each ball, examples for each set of images, and what is missing of these."""
    curves = {ball: draw_curves(group) for ball, group in by_ball(runs).items()}
    same_images = {run.images: [other for other in runs if other.images == run.images] for run in runs}
    examples, left_out = [], []
    for group in same_images.values():
        for first in range(0, len(group), RUNS_TOGETHER):
            picture, missing = draw_examples(group[first : first + RUNS_TOGETHER])
            examples += [picture] if picture else []
            left_out += missing
    return curves, examples, left_out


def _of(table: Table) -> str:
    return f", {table.ball}" if table.ball else ""


def _read_all(folders: list[Path]) -> tuple[list[Run], list[str]]:
    """The runs that can be read, and what is wrong with the others; InputError if there are only others."""
    runs, unreadable = [], []
    for index, (folder, name) in enumerate(zip(folders, _names(folders), strict=True)):
        try:
            runs.append(_read(folder, name, COLOURS[index % len(COLOURS)]))
        except InputError as error:
            unreadable.append(str(error))
    if not runs:
        raise InputError(unreadable[0])
    return runs, unreadable


def _names(folders: list[Path]) -> list[str]:
    """As much of each path's end as it takes to tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths))):
        names = [_readable("/".join(path[-length:])) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [_readable(str(folder)) for folder in folders]


def _readable(name: str) -> str:
    """A name all of which shows: line breaks, marks that turn text around and bytes that are no text as numbers."""
    return "".join(each if each.isprintable() else escaped(each) for each in name)


def _read(folder: Path, name: str, colour: str) -> Run:
    try:
        result = json.loads((folder / "result.json").read_text())
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        best = result.get("best", {"epoch": result["epochs"]})
        for shown in (result, result | best):
            for key, _, form in COLUMNS:
                if key in (*REQUIRED, *shown):
                    form.format(shown[key])
        int(best["epoch"])
        result["config"]["data"]
        classes_of(result)
        Ball(result["config"]["norm"], float(result["config"]["eps"]))
        for row in metrics:
            float(row["epoch"] + row["loss"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__} {error}"
        raise InputError(
            f"run {str(folder)!r} holds no finished run (result.json, metrics.jsonl): {reason}"
        ) from error
    return Run(name, folder, result, metrics, colour, read_evaluations(folder))


def _best(runs: list[Run]) -> list[Run]:
    """Of the rows on the same images, those with the highest accuracy under PGD-20."""
    highest = {run.images: max(r.result["pgd20"] for r in runs if r.images == run.images) for run in runs}
    return [run for run in runs if run.result["pgd20"] == highest[run.images]]


def _table(table: Table, best: Sequence[Run] = ()) -> str:
    rows = []
    for run, cells in table.rows:
        dot = f'<span class="dot" style="background:{run.colour}"></span>'
        name = f"{dot}{_isolated(run.name)}{html.escape(run.suffix)}"
        shown = [name, *map(html.escape, cells)]
        mark = ' class="best"' if run in best else ""
        rows.append(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in shown) + "</tr>")
    head = "".join(f"<th>{html.escape(title)}</th>" for title in table.head)
    head = f"<thead><tr>{head}</tr></thead>"
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return f"{note}<div class=wide><table class=words-{table.words}>{head}{''.join(rows)}</table></div>"


def _isolated(name: str) -> str:
    """A name, kept from turning around what stands beside it if it is written from right to left."""
    return f"<bdi>{html.escape(name)}</bdi>" if runs_leftward(name) else html.escape(name)


def _notes(runs: list[Run]) -> str:
    images = " or ".join(map(str, sorted({run.result["images"] for run in runs})))
    note = f"<p>Accuracies on {images} test images, after the last epoch unless a row says otherwise.</p>"
    return note + _warnings(
        [f"{run.name}: {text}" for run in runs for text in run.result.get("warnings", ())]
    )


def _warnings(sentences: list[str]) -> str:
    return "".join(f'<p class="warning">{html.escape(sentence)}</p>' for sentence in sentences)


def _settings(run: Run) -> str:
    shown = json.dumps(
        {"config": run.result["config"], "environment": run.result.get("environment")}, indent=2
    )
    return f"<details><summary>{_isolated(run.name)}</summary><pre>{html.escape(shown)}</pre></details>"


def _figure(picture: bytes, alt: str) -> str:
    source = "data:image/png;base64," + base64.b64encode(picture).decode()
    return f'<figure><img alt="{html.escape(alt)}" src="{source}"></figure>'
