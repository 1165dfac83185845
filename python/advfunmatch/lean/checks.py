"""Checks of sizes in a network's code (``assert x.size(1) == 3``, ``if ...: raise``), kept as checks in its graph."""

from __future__ import annotations

import dis
import types
from typing import Any

__all__ = ["outcome_that_goes_on", "require_size"]


def require_size(condition: Any, wanted: bool) -> None:
    """What a check of sizes becomes in a graph."""
    if bool(condition) is not wanted:
        raise AssertionError("the network's code checks the sizes of its tensors, and these it refuses")


def outcome_that_goes_on(frame: types.FrameType) -> bool | None:
    """What the condition that the frame is asking about must be, if the other outcome only raises; None if not."""
    code = list(dis.get_instructions(frame.f_code))
    here = next(i for i, each in enumerate(code) if each.offset >= frame.f_lasti)
    while code[here].opname in ("TO_BOOL", "CACHE", "NOT_TAKEN", "UNARY_NOT"):
        if code[here].opname == "UNARY_NOT":
            return None
        here += 1
    jump = code[here]
    if "POP_JUMP" not in jump.opname or not jump.opname.endswith(("IF_TRUE", "IF_FALSE")):
        return None
    for each in code[here + 1 :]:
        if each.opname == "RAISE_VARARGS":
            return jump.opname.endswith("IF_TRUE")
        # The way to a raise is one of names, texts and calls.
        if "JUMP" in each.opname or each.opname.startswith(("RETURN", "STORE")) or each.is_jump_target:
            return None
    return None
