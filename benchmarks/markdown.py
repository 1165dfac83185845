"""Tables as Markdown, for documents and for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.results import MissingResults


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    if not rows:
        raise MissingResults(f"no results for the table with columns {', '.join(head)}")
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
