"""docs/foreign-files.md: what other projects' files were read as when they were first tried, and are now.

    python tests/advfunmatch/foreign_table.py    # writes it anew

Every form is made, small, and read; `test_foreign_table` compares what comes of it with the document.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import foreign_checkpoints
import foreign_data

DOCUMENT = Path(__file__).parents[2] / "docs" / "foreign-files.md"
INTRODUCTION = """# What other projects' files hold, and what is made of it

Written by `python tests/advfunmatch/foreign_table.py`, which makes each form, small, and reads it; a test compares this
page with what comes of them. "Right" is what a re-statement of the official forward computes on the official state
dict, too. Networks are narrow (eight channels at first, `wrn-10-1` for Wide ResNets of any size); `advfunmatch models`
lists the names.

What a file leaves open is warned of ("says: …"), and settled by the name of the architecture, by `normalize` or by
`weights_key`. Nothing loads without a word and computes something else, and nothing in a file is run.
"""


def checkpoint_line(row: foreign_checkpoints.Row, now: str) -> str:
    return f"| {row.repository} | {row.holds} | `{row.plain or row.model}` | {row.before} | {now} |"


def data_line(row: foreign_data.DataRow, now: str) -> str:
    return f"| {row.holds} | {row.before} | {now} |"


def lines(
    rows: Sequence[Any], outcome: Callable[[Any, Path], str], line: Callable[[Any, str], str], folder: Path
) -> list[str]:
    """A table's lines, each of a form that was made and read below a folder; those whose library is there."""
    with foreign_checkpoints.narrow_networks(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [line(row, outcome(row, folder)) for row in rows if find_spec(row.needs)]


def checkpoints(folder: Path) -> list[str]:
    return lines(foreign_checkpoints.ROWS, foreign_checkpoints.outcome, checkpoint_line, folder)


def data(folder: Path) -> list[str]:
    return lines(foreign_data.DATA_ROWS, foreign_data.outcome, data_line, folder / "data")


def document(folder: Path) -> str:
    return "\n".join([
        INTRODUCTION,
        "## Checkpoints",
        "",
        "| repository | what the file holds | as | at first | now |",
        "|---|---|---|---|---|",
        *checkpoints(folder),
        "",
        "## Data",
        "",
        "| form | at first | now |",
        "|---|---|---|",
        *data(folder),
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        DOCUMENT.write_text(document(Path(made)))
    print(os.path.relpath(DOCUMENT))
