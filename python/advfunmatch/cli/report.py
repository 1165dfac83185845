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
    runs: Annotated[list[Path], typer.Argument(help="folders that advfunmatch train wrote")],
    out: Annotated[Path, typer.Option(help="HTML file to write; the same goes beside it as PNG")] = Path(
        "report.html"
    ),
    *,
    plugins: Plugins,
) -> None:
    """Compare runs in one HTML page.

    Figures, curves, adversarial examples and throughput; the page needs no other file.
    """
    for sentence in write_report(runs, out):
        print(f"warning: {sentence}", file=sys.stderr)
    print(f"{out} and {out.with_suffix('.png')}")
