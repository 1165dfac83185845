"""What is done of an evaluation with several stages: a record for each batch, in a file that survives a kill.

Note [Records]
~~~~~~~~~~~~~~
A record says of some images what one stage made of them. What happens to an image does not depend on those that are
with it, so any records of the same run can be put together: those of several processes, each of which writes a file of
its own beside the first's, and those of a run that was killed, whatever its batches and processes were. An image that
two records know is taken from the first.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..files import prepare_file, write_atomically

__all__ = ["Record", "Records", "StateFile"]

PAUSE = 5.0  # seconds between two writes within a stage: as much as that is done again after a kill
_SHOWN = ("norm", "eps", "seed", "stages")  # what is said of them where they differ


@dataclass(frozen=True)
class Record:
    """What a stage made of some images, all on the CPU.

    Attributes:
        stage: its name.
        images: (n,) int64, which.
        broken: (n,) bool.
        x_adv: (broken, ...): the images that broke, in their order.
        counts: forwards and backwards in images, seconds, and whatever else is summed up.
    """

    stage: str
    images: Tensor
    broken: Tensor
    x_adv: Tensor
    counts: dict[str, float] = field(default_factory=dict)


class Records:
    """Of all stages so far."""

    def __init__(self, images: int) -> None:
        self.all: list[Record] = []
        self._images = images
        self._done: dict[str, Tensor] = {}

    def done(self, stage: str) -> Tensor:
        """(images,) bool."""
        return self._done.setdefault(stage, torch.zeros(self._images, dtype=torch.bool))

    def add(self, records: Iterable[Record]) -> None:
        """Add records, but of images that their stage is done with nothing."""
        for record in records:
            new = ~self.done(record.stage)[record.images]
            self.done(record.stage)[record.images] = True
            if not bool(new.any()):
                continue
            # Images that are left out took their share of the time, but stand in another record with it.
            share = float(new.double().mean())
            counts = {name: value * share for name, value in record.counts.items()}
            broken, x_adv = record.broken[new], record.x_adv
            if len(x_adv):  # none are kept of the clean images
                x_adv = x_adv[new[record.broken]]
            self.all.append(Record(record.stage, record.images[new], broken, x_adv, counts))

    def of(self, stage: str) -> list[Record]:
        """Those of one stage."""
        return [record for record in self.all if record.stage == stage]


class StateFile:
    """Where records are kept, with what they are of.

    Args:
        path: the file; None keeps nothing.
        about: plain values that must be the same where a file is continued, by what they are called.
        rank: of this process; others than the first write PATH.RANK.
    """

    def __init__(self, path: str | Path | None, about: dict[str, Any], rank: int = 0) -> None:
        self.path = None if path is None else Path(path)
        self.about, self.rank = about, rank
        self._written = float("-inf")
        if self.path is not None:
            prepare_file(self.path, "state")

    def read(self) -> list[Record]:
        """What this and any other process have written; InputError where that is of something else."""
        if self.path is None:
            return []
        return [record for path in (self.path, *self._others()) for record in self._read(path)]

    def _read(self, path: Path) -> list[Record]:
        if not path.is_file():
            return []
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            about, records = dict(stored["about"]), [Record(**each) for each in stored["records"]]
        except Exception as error:  # of whatever else the file holds
            raise InputError(
                f"state {str(path)!r} holds no state of AutoAttack; name another file"
            ) from error
        for name, now in self.about.items():
            if (before := about.get(name)) != now:
                what = f"{name} was {before}, and is {now}" if name in _SHOWN else f"{name} is another"
                raise InputError(f"state {str(path)!r} cannot be continued: {what}; name another file")
        return records

    def write(self, records: list[Record], *, now: bool = False) -> None:
        """Replace this process's file, at most every `PAUSE` seconds unless it must be now."""
        if self.path is None or not (now or time.monotonic() - self._written > PAUSE):
            return
        buffer = io.BytesIO()
        torch.save({"about": self.about, "records": [asdict(record) for record in records]}, buffer)
        path = self.path.with_name(f"{self.path.name}.{self.rank}") if self.rank else self.path
        write_atomically(path, buffer.getvalue())
        self._written = time.monotonic()

    def remove_others(self) -> None:
        """Remove what other processes wrote, once it is in the first's file."""
        for path in self._others():
            path.unlink(missing_ok=True)

    def _others(self) -> list[Path]:
        """The files of other processes than the first."""
        if self.path is None:
            return []
        beside = self.path.parent.iterdir()
        return sorted(path for path in beside if path.stem == self.path.name and path.suffix[1:].isdigit())
