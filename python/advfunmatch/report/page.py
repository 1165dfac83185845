"""One self-contained HTML page that compares runs, and the same as a PNG."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..files import prepare_file, write_atomically
from .pictures import draw_curves, draw_examples, draw_table, stacked
from .tables import COLOURS, COLUMNS, Run, Table, evaluations, figures, read_evaluations

REQUIRED = ("method", "model", "clean", "pgd20", "images_per_second")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; } td { white-space: nowrap; } tr.best td { font-weight: 600; }
div.wide { overflow-x: auto; } img { max-width: 100%; height: auto; } .warning { color: #a33; }
figure { margin: 1rem 0; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
details pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; font-size: .8rem; }
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
    curves = draw_curves(runs)
    same_images = {run.images: [other for other in runs if other.images == run.images] for run in runs}
    examples = []
    for group in same_images.values():
        picture, missing = draw_examples(group)
        examples += [picture] if picture else []
        left_out += missing
    tables = [figures(runs)]
    sections = [
        _warnings(left_out),
        "<h2>Figures</h2>" + _table(tables[0], _best([run for run, _ in tables[0].rows])) + _notes(runs),
    ]
    if evaluated := evaluations(runs):
        tables.append(evaluated)
        sections.append(
            "<h2>Evaluations</h2>"
            + _table(evaluated)
            + "<p>What <code>advfunmatch evaluate</code> wrote into the runs' folders.</p>"
        )
    sections.append("<h2>While training</h2>" + _figure(curves, "curves"))
    if examples:
        sections.append(
            "<h2>Adversarial examples</h2><p>PGD-20 on each network, and the change, magnified to the full range: "
            "mid-grey is no change. Above each image, what the network says; a wrong class is red.</p>"
        )
        sections += [_figure(picture, "adversarial examples") for picture in examples]
    sections.append("<h2>Settings</h2>" + "".join(_settings(run) for run in runs))
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>advfunmatch report</title><style>{STYLE}</style>'
        f"<h1>advfunmatch: {len(runs)} run{'s' * (len(runs) > 1)}</h1>{''.join(sections)}</html>\n"
    )
    write_atomically(out, page.encode())
    write_atomically(out.with_suffix(".png"), stacked([*map(draw_table, tables), curves, *examples]))
    return left_out


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
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(folder) for folder in folders]


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
        for key in ("data", "eps", "norm"):
            result["config"][key]
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
        shown = [dot + html.escape(run.name), *map(html.escape, cells)]
        mark = ' class="best"' if run in best else ""
        rows.append(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in shown) + "</tr>")
    head = "".join(f"<th>{html.escape(title)}</th>" for title in table.head)
    return f"<div class=wide><table><tr>{head}</tr>{''.join(rows)}</table></div>"


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
    return f"<details><summary>{html.escape(run.name)}</summary><pre>{html.escape(shown)}</pre></details>"


def _figure(picture: bytes, alt: str) -> str:
    source = "data:image/png;base64," + base64.b64encode(picture).decode()
    return f'<figure><img alt="{alt}" src="{source}"></figure>'
