"""`advfunmatch report`: several runs in one page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..report import write_report
from .options import Plugins, with_groups


@with_groups
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="folders that advfunmatch train wrote, or folders of such")
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write; the same goes beside it as PNG")] = Path(
        "report.html"
    ),
    *,
    plugins: Plugins,
) -> None:
    """Compare runs in one HTML page.

    Figures, curves, adversarial examples and throughput; the page needs no other file.
    """
    for sentence in write_report([run for folder in runs for run in _runs_in(folder)], out):
        print(f"warning: {sentence}", file=sys.stderr)
    print(f"{out} and {out.with_suffix('.png')}")


def _runs_in(folder: Path) -> list[Path]:
    """The folder, or, where it is no run itself, those in it that are."""
    if folder.is_dir() and not (folder / "run.json").exists():
        return sorted(run.parent for run in folder.glob("*/run.json")) or [folder]
    return [folder]
