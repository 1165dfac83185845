"""Names of runs, classes and files as a picture can show them: a folder may be called anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unicodedata import bidirectional

LONGEST = 28  # characters of a name in a picture
# Fonts for what matplotlib's own has no letters of, where they are installed.
MORE_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Source Han Sans",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Noto Sans Arabic",
    "Noto Sans Hebrew",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Emoji",
    "Symbola",
)


def drawable(name: str, longest: int = LONGEST) -> str:
    """A name that matplotlib draws as it is.

    What is no formula is not to be read as one, a letter that no font has is written as its number, and of a long name
    the middle is left out.

    >>> drawable("$x_1^{$"), drawable("a\\nb"), drawable("x" * 50, 9)
    ('\\\\$x_1^{\\\\$', 'a\\\\nb', 'xxxx…xxxx')
    """
    shown = [each if _has_glyph(each) else escaped(each) for each in name]
    if sum(map(len, shown)) > longest:
        head, tail = [], []
        room = longest - 1
        while shown and len(shown[0]) + len(shown[-1]) <= room:
            head.append(shown.pop(0))
            room -= len(head[-1])
            if shown and len(shown[-1]) <= room:
                tail.append(shown.pop())
                room -= len(tail[-1])
        shown = [*head, "…", *reversed(tail)]
    # What follows the name stays behind it, whichever way that is written.
    mark = "\u200e" if runs_leftward(name) else ""
    return mark + "".join(shown).replace("$", r"\$")


@contextmanager
def drawing() -> Iterator[None]:
    """Within this, figures use what fonts there are."""
    from matplotlib import rc_context

    with rc_context({"font.family": _fonts()}):
        yield


def label_legend(legend: Any, names: list[str]) -> None:
    """Give a legend's entries their names afterwards: one that begins with _ would be left out of it."""
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def runs_leftward(name: str) -> bool:
    """Whether any of it is written from right to left."""
    return any(bidirectional(letter) in ("R", "AL") for letter in name)


def escaped(letter: str) -> str:
    """A letter as its number, as Python writes it."""
    return letter.encode("unicode_escape", "surrogatepass").decode()


@cache
def _has_glyph(letter: str) -> bool:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    if not letter.isprintable():
        return False
    return any(
        get_font(findfont(FontProperties(family=family))).get_char_index(ord(letter)) for family in _fonts()
    )


@cache
def _fonts() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(family for family in MORE_FONTS if family in installed)]
