"""Figures and tables from committed results: ``python -m benchmarks.report``.

Draws docs/figures/*.svg and *.png, the history of the kernels out of git (``benchmarks.history``), and writes the
tables between the markers of README.md and docs/*.md. With ``--check``, writes nothing and exits with 1 if a document's
table is not what the results say.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.results import FOLDER, ROOT
from benchmarks.tables import fill, names_in


def documents(root: Path = ROOT) -> list[Path]:
    """Every document that holds a table."""
    found = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    return [path for path in found if path.exists() and names_in(path.read_text())]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a table is stale")
    args = parser.parse_args(argv)
    stale = []
    try:
        for path in documents():
            text = path.read_text()
            filled = fill(text, args.results)
            if filled != text:
                stale.append(path)
                if not args.check:
                    path.write_text(filled)
    except ValueError as error:
        print(f"benchmarks.report: {path.name}: {error}", file=sys.stderr)
        return 2
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'differs from the results' if args.check else 'written'}")
    if args.check:
        return 1 if stale else 0

    from benchmarks import history
    from benchmarks.figures import draw

    for path in draw(args.results, args.figures):
        print(f"{path}: drawn")
    try:
        for path, found in history.draw_all(args.figures):
            print(f"{path}: drawn, {len(found)} versions")
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"benchmarks.report: history.svg needs a clone with its git history: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
