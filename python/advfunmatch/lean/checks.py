"""Questions of sizes in a network's code, kept as checks in its graph.

Of ``assert x.size(1) == 3`` or ``if ...: raise`` one outcome goes on, and the graph refuses the other. Of a branch, as
in ``if x.size(2) > 8: x = pool(x)``, a graph holds one side; images that take the other need another graph.
"""

from __future__ import annotations

import dis
import types
from typing import Any

__all__ = ["OtherBranch", "outcome_that_goes_on", "require_branch", "require_size"]


class OtherBranch(Exception):
    """The images take another branch than the graph; ``decisions`` are the outcomes up to there, as they should be."""

    def __init__(self, decisions: tuple[bool, ...]) -> None:
        self.decisions = decisions
        super().__init__("the images take another branch of the network's code than the graph")


def require_branch(condition: Any, decisions: tuple[bool, ...]) -> None:
    """What the condition of a branch becomes in a graph that was traced with these outcomes, this one's last."""
    if bool(condition) is not decisions[-1]:
        raise OtherBranch((*decisions[:-1], not decisions[-1]))


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
