"""The command line: one module a command, what several commands are told in ``options``, and ``entry`` runs them.

Note [Exit codes]
~~~~~~~~~~~~~~~~~
0: done. 2: what was asked for cannot be done (a name, a value, a file, a full disk, code of one's own that
fails); one sentence on stderr says why. 1: training diverged. 130: interrupted. Anything else is a bug and shows its
traceback. Of the processes that torchrun (or `train --processes`) started, all end with that code, and the first one
says why.
"""

from __future__ import annotations

from .entry import main, run

__all__ = ["main", "run"]
