"""Processes among which the images of an attack are shared out."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..errors import ProcessLost

__all__ = ["ALONE", "Processes", "joined"]

PATIENCE = timedelta(hours=24)  # a share may have harder images than another


@dataclass(frozen=True)
class Processes:
    """Those of one run; by default there is only this one."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def gathered(self, mine: Any) -> list[Any]:
        """What each process has, in the order of ranks."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, mine, group=self.group)
        except RuntimeError as error:
            raise ProcessLost("another process of this run has ended") from error
        return found


ALONE = Processes()


@contextmanager
def joined(shared: bool) -> Iterator[Processes]:
    """The processes that torchrun started, or that have already joined, over gloo; or this one alone."""
    initialised = dist.is_available() and dist.is_initialized()
    size = dist.get_world_size() if initialised else int(os.environ.get("WORLD_SIZE", "1"))
    if not shared or size == 1:
        yield ALONE
        return
    if initialised:
        group: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
    else:
        # Its functions take the group of all processes as a default argument: imported later, it would keep the group.
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group("gloo", timeout=PATIENCE)
        group = None
    try:
        yield Processes(dist.get_rank(), size, group)
    finally:
        dist.destroy_process_group(group if initialised else None)
