"""TensorBoard's log of a run."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from ..evaluation import Ball


class Board:
    """DIR/tensorboard, with the rows of metrics.jsonl; nothing where it is not wanted.

    Args:
        out: the run's folder.
        rows: what the run has measured so far. It replaces what an earlier process left, some of which may have come
            after the checkpoint that the run continues from.
        wanted: False writes nothing.
    """

    def __init__(self, out: Path, rows: list[dict[str, Any]], *, wanted: bool) -> None:
        self.writer: Any = None
        if not wanted:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder = out / "tensorboard"
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.writer = SummaryWriter(str(folder))
        for row in rows:
            self.show(row)

    def show(self, row: dict[str, Any]) -> None:
        """Add one epoch's row."""
        if self.writer is None:
            return
        for name, value in row.items():
            if name not in ("epoch", "step", "norm", "eps"):
                # Runs that are shown together may have been attacked in different balls.
                ball = f" {Ball(row['norm'], row['eps'])}" if name.endswith("_pgd10") and "eps" in row else ""
                self.writer.add_scalar(f"{name}{ball}", value, row["epoch"])

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writer is not None:
            self.writer.close()
