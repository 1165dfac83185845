"""`advfunmatch demo`: everything once, on digits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..demo import EPOCHS, run_demo
from ..report import demo_table


def demo(
    out: Annotated[Path, typer.Option(help="folder for the table, the picture and the runs")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="of all four runs")] = 0,
    epochs: Annotated[int, typer.Option(help="of all four runs")] = EPOCHS,
) -> None:
    """Run everything once, on digits.

    Distils a robust student and compares it with two that are not, in a few minutes on a CPU.
    """
    result = run_demo(out, seed=seed, epochs=epochs)
    console = Console()
    console.print(demo_table(result))
    print(f"{result['seconds']:.0f} s in all; {out / 'demo.png'}, {out / 'demo.json'}")
