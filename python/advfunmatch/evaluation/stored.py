"""The file of an evaluation: written whole after each row, and read again to go on where one was stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import prepare_file, write_json
from .results import Evaluation

STATE = ".state"


class EvaluationFile:
    """JSON that holds what is done so far, marked as not complete until it is.

    Args:
        path: the file, or None for none.
        resume: go on with what it holds.
        overwrite: replace what it holds, once there is a row to replace it by.
        about: what else it says, such as the checkpoint's name; its ``warnings`` come before the others.

    Raises:
        InputError: it is there, and neither is asked for; or both are; or it cannot be written.
    """

    def __init__(
        self, path: str | Path | None, *, resume: bool, overwrite: bool, about: Mapping[str, Any] | None
    ) -> None:
        self.path = None if path is None else Path(path)
        self.about = dict(about or {})
        self.resume = resume
        if resume and overwrite:
            raise InputError(
                "resume and overwrite are both given, but a file can only be continued or replaced"
            )
        if self.path is None:
            if resume or overwrite:
                raise InputError(f"{'resume' if resume else 'overwrite'} is given, but out names no file")
            return
        if self.path.is_file() and not (resume or overwrite):
            raise InputError(
                f"out {str(self.path)!r} is already there; --resume goes on with it, and --overwrite replaces it"
            )
        if self.path.is_dir():
            raise InputError(f"out is {str(self.path)!r}, which is a folder, but must be a file to write")

    def prepare(self) -> None:
        """Make its folder; InputError says why that cannot be. What rows have kept is removed, unless it goes on."""
        if self.path is None:
            return
        prepare_file(self.path, "out")
        if not self.resume:
            for path in self.path.parent.iterdir():
                if path.name.startswith(f".{self.path.name}.") and path.suffix == STATE:
                    path.unlink(missing_ok=True)

    def state_of(self, row: str) -> Path | None:
        """Where a row may keep what is done of it."""
        if self.path is None:
            return None
        return self.path.with_name(
            f".{self.path.name}.{blake2b(row.encode(), digest_size=4).hexdigest()}{STATE}"
        )

    def read(self) -> dict[str, Any] | None:
        """What the file holds, if it is to be continued and is there; InputError if that is no evaluation."""
        if self.path is None or not self.resume or not self.path.is_file():
            return None
        try:
            stored = json.loads(self.path.read_text())
        except (OSError, ValueError) as error:
            raise self.unusable() from error
        if not isinstance(stored, dict):
            raise self.unusable()
        return stored

    def unusable(self) -> InputError:
        """The error for a file that holds something else."""
        return InputError(
            f"out {str(self.path)!r} holds nothing that can be continued; --overwrite replaces it"
        )

    def continued(self, stored: Mapping[str, Any], wanted: Evaluation) -> Evaluation:
        """An evaluation that the file holds.

        Args:
            stored: its dict.
            wanted: one without rows, with the settings and digests of that which is to go on.

        Raises:
            InputError: the file holds something else, or what another model, other data or settings gave.
        """
        try:
            done = Evaluation.from_dict(stored)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self.unusable() from error
        if differences := _differences(done, wanted):
            raise InputError(
                f"out {str(self.path)!r} cannot be continued: {'; '.join(differences)}. --overwrite replaces it"
            )
        return done

    def write(self, measured: Mapping[str, Any]) -> None:
        """Replace the file by what there is."""
        if self.path is not None:
            said = [*self.about.get("warnings", []), *measured["warnings"]]
            write_json(self.path, {**measured, **self.about, "warnings": list(dict.fromkeys(said))})


def _differences(stored: Evaluation, wanted: Evaluation) -> list[str]:
    """What was otherwise when the file was begun, in words."""
    found = []
    for name in ("model", "data", *sorted(wanted.digests.keys() - {"model", "data"})):
        before, now = stored.digests.get(name), wanted.digests.get(name)
        if before != now and (name in ("model", "data") or (before and now)):
            found.append(f"{name} is not the one it was begun with")
    for name in ("eps", "norm", "seed"):
        before, now = stored.settings.get(name), wanted.settings.get(name)
        if before != now:
            found.append(f"{name} was {before}, and is {now}")
    attacks = stored.settings.get("attacks", {})
    for name, about in wanted.settings["attacks"].items():
        if name in attacks and attacks[name] != about:
            found.append(f"attack {name!r} was {attacks[name]!r}, and is {about!r}")
    return found
