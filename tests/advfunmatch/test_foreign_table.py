"""docs/foreign-files.md is what comes of each form today."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import foreign_table
import pytest
from foreign_checkpoints import ROWS
from foreign_data import DATA_ROWS


@pytest.mark.parametrize(
    ("heading", "rows", "table"),
    [("Checkpoints", ROWS, foreign_table.checkpoints), ("Data", DATA_ROWS, foreign_table.data)],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_files_of_others_are_read_as_the_document_says(
    heading: str, rows: Sequence[Any], table: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    section = foreign_table.DOCUMENT.read_text().split(f"## {heading}\n")[1].partition("\n## ")[0]
    said = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(said) == len(rows)
    assert table(tmp_path) == [line for line, row in zip(said, rows, strict=True) if find_spec(row.needs)]
