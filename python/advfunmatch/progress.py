"""What long work shows of itself: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

QUIET_SECONDS = 15.0  # between the lines of a run whose output is not a terminal


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} images/s")


class ProgressBar:
    """Images a second and the time left, as a rich bar on a terminal and as quiet lines elsewhere.

    Args:
        label: what is being done.
        total: images in all of it.
        done: images of it that were done before.
        show: False says nothing.
        says_end: whether there is a line at the end too, where there is no terminal.
    """

    def __init__(
        self, label: str, total: int, done: int = 0, *, show: bool = True, says_end: bool = True
    ) -> None:
        self.label, self.total, self.first = label, total, done
        self.done, self.note = done, ""
        self.show, self.says_end = show, says_end
        self.console = Console(stderr=True)
        self.started = self.last_line = time.monotonic()
        self.bar: Progress | None = None
        if show and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:3.0f}%"),
                _Rate(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[note]}", markup=False),
                console=self.console,
            )
            self.task = self.bar.add_task(label, total=total, completed=done, note="")

    def __enter__(self) -> ProgressBar:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()
        elif kind is None and self.says_end:
            self._line()

    def advance(self, images: int) -> None:
        """Count `images` more as done."""
        self.done += images
        if self.bar:
            self.bar.advance(self.task, images)
        elif time.monotonic() - self.last_line > QUIET_SECONDS:
            self._line()

    def expect(self, total: int) -> None:
        """Replace how many there are in all, those done included."""
        self.total = total
        if self.bar:
            self.bar.update(self.task, total=total)

    def say(self, note: str) -> None:
        """Replace the text at the end of the bar, such as the last epoch's accuracies."""
        self.note = note
        if self.bar:
            self.bar.update(self.task, note=note)

    def _line(self) -> None:
        if not self.show:
            return
        now = time.monotonic()
        self.last_line = now
        rate = (self.done - self.first) / max(now - self.started, 1e-9)
        left = (self.total - self.done) / rate if rate else float("inf")
        share = self.done / max(self.total, 1)
        ending = "done" if self.done >= self.total else f"{_clock(left)} left"
        print(
            f"{self.label}: {share:4.0%}, {rate:,.0f} images/s, {ending}  {self.note}",
            file=sys.stderr,
            flush=True,
        )


def _clock(seconds: float) -> str:
    if seconds == float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
