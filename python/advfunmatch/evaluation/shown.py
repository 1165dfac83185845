"""What an evaluation shows while it works: a bar for each thing that it measures, or what its caller makes of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType


class Shown:
    """The bar of what is being measured.

    Args:
        progress: True for bars; a function for none, which is called with what is measured, how many of its images are
            done, and of how many; False for neither.
    """

    def __init__(self, progress: bool | Callable[[str, int, int], None]) -> None:
        self.progress = progress
        self.current = ExitStack()

    def bar(self, what: str, total: int) -> Callable[[int], None]:
        """End the bar before, and begin one; what is returned takes the number of images that are done."""
        self.current.close()
        if callable(self.progress):
            tell = self.progress
            tell(what, 0, total)
            return lambda done: tell(what, done, total)
        if not self.progress:
            return lambda done: None
        from ..progress import ProgressBar  # needs rich, which those who import only the attack may not have

        bar = self.current.enter_context(ProgressBar(what, total, says_end=False))
        return lambda done: bar.advance(done - bar.done)

    def __enter__(self) -> Shown:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.current.__exit__(kind, error, trace)
