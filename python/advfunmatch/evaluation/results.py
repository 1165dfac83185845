"""What an evaluation measured: a row for each attack in each ball, and how far a student is from its teacher."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .balls import Ball


@dataclass(frozen=True)
class Figure:
    """One accuracy.

    Attributes:
        attack: its label, such as ``"pgd20"`` or ``"pgd(steps=40)"``.
        norm, eps: the ball; None where there was no attack.
        accuracy: percent.
        per_class: class name to accuracy in percent.
        seconds: the time it took.
        zero_gradients: how many images had a gradient of exactly zero at every step, and have not been attacked.
        standing: which images were still classified correctly, in order, one bit each: base64 of ``np.packbits``.
        warnings: what was said of it.
        found, distance: of an attack that looks for the nearest adversarial image, whatever the radius: for how many
            of the images that are classified correctly it found one, and how far these are in the median, in ``norm``.
        source: the network that the images were made on, where that is another than the one that is measured.
        stages: of attacks that have some, what each did: see `Stage` in ``attacks``.
    """

    attack: str
    norm: str | None
    eps: float | None
    accuracy: float
    per_class: dict[str, float]
    seconds: float
    zero_gradients: int
    standing: str
    warnings: list[str]
    found: int | None = None
    distance: float | None = None
    source: str | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ball(self) -> Ball | None:
        """Where the attack stayed; None where there was none."""
        return _ball(self.norm, self.eps)

    def __str__(self) -> str:
        where = f", {self.ball}" if self.ball else ""
        return f"{self.attack}{where}: {self.accuracy:.2f} %"

    @property
    def nearest(self) -> str:
        """What is known of the nearest adversarial images, in words; nothing where they were not looked for."""
        if self.found is None:
            return ""
        middle = "" if self.distance is None else f", median distance {self.distance:.4g} ({self.norm})"
        return f"found {self.found}{middle}"

    def stood(self, images: int) -> Tensor:
        """(images,), bool: which were still classified correctly."""
        packed = np.frombuffer(base64.b64decode(self.standing), np.uint8)
        return torch.from_numpy(np.unpackbits(packed, count=images).astype(bool))


@dataclass(frozen=True)
class Fidelity:
    """How far a student is from its teacher, on images of one kind.

    Attributes:
        images: ``"clean"``, or ``"mismatched"``: those in the ball on which KL(teacher ‖ student) is largest.
        norm, eps: the ball; None for clean images.
        agreement: percentage of images on which both predict the same class.
        kl: mean KL(teacher ‖ student), in nats.
        seconds, zero_gradients, warnings: as for `Figure`.
    """

    images: str
    norm: str | None
    eps: float | None
    agreement: float
    kl: float
    seconds: float
    zero_gradients: int
    warnings: list[str]

    @property
    def ball(self) -> Ball | None:
        """As for `Figure`."""
        return _ball(self.norm, self.eps)


@dataclass(frozen=True)
class Curve:
    """Accuracy against the radius.

    Attributes:
        attack: its label.
        norm: of the balls.
        eps: their radii, growing, the first 0.
        accuracy: percent in each; an image that was broken in a smaller ball counts as broken in the larger ones.
        seconds: the time they took.
    """

    attack: str
    norm: str
    eps: list[float]
    accuracy: list[float]
    seconds: float


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        results: a row for each attack in each ball.
        images: number of test images.
        settings: norm, eps, seed, and what the attacks are.
        fidelity: a row for clean images, and one for mismatched ones in each ball; empty where it was not asked for.
        warnings: what suggests that the figures flatter the model: `masking_warnings`, `margin_warnings`, and what was
            said of single rows, AutoAttack's own checks among it.
        digests: of model, data and teacher, where a file is written.
        complete: False while rows are still missing.
        curves: accuracy against the radius; empty where it was not asked for.
    """

    results: list[Figure]
    images: int
    settings: dict[str, Any]
    fidelity: list[Fidelity] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    complete: bool = True
    curves: list[Curve] = field(default_factory=list)

    @property
    def once(self) -> dict[str, Figure]:
        """By its attack, each figure that is the only one of it: all of them where there is one ball."""
        counts = Counter(figure.attack for figure in self.results)
        return {figure.attack: figure for figure in self.results if counts[figure.attack] == 1}

    @property
    def accuracies(self) -> dict[str, float]:
        """Attack to accuracy in percent. An attack in several balls is left out: its figures are in `results`."""
        return {name: figure.accuracy for name, figure in self.once.items()}

    @property
    def per_class(self) -> dict[str, dict[str, float]]:
        """Attack to class name to accuracy in percent, likewise."""
        return {name: figure.per_class for name, figure in self.once.items()}

    @property
    def attack_seconds(self) -> dict[str, float]:
        """Attack to time, likewise."""
        return {name: figure.seconds for name, figure in self.once.items()}

    @property
    def zero_gradients(self) -> dict[str, int]:
        """Attack to how many images it never had a gradient for, likewise; attacks without such images are left out."""
        found = {name: figure.zero_gradients for name, figure in self.once.items()}
        mismatched = [row.zero_gradients for row in self.fidelity if row.ball]
        found |= {"mismatched": mismatched[0]} if len(mismatched) == 1 else {}
        return {name: count for name, count in found.items() if count}

    @property
    def agreement(self) -> float | None:
        """Percentage of clean images on which student and teacher predict the same class."""
        return self._near("clean", "agreement")

    @property
    def agreement_mismatched(self) -> float | None:
        """The same on mismatched examples; None with several balls, whose figures are in `fidelity`."""
        return self._near("mismatched", "agreement")

    @property
    def kl_clean(self) -> float | None:
        """Mean KL(teacher ‖ student) on clean images, in nats."""
        return self._near("clean", "kl")

    @property
    def kl_mismatched(self) -> float | None:
        """The same on mismatched examples; None with several balls."""
        return self._near("mismatched", "kl")

    def _near(self, images: str, what: str) -> float | None:
        found = [getattr(row, what) for row in self.fidelity if row.images == images]
        return found[0] if len(found) == 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values: all rows, and beside them, by name, whatever was measured in one ball only."""
        whole = asdict(self)
        near = {
            name: getattr(self, name)
            for name in ("agreement", "agreement_mismatched", "kl_clean", "kl_mismatched")
        }
        near = {name: value for name, value in near.items() if value is not None}
        by_name = {name: getattr(self, name) for name in ("per_class", "attack_seconds", "zero_gradients")}
        # An attack may have the name of a field: it is in the rows, and the field stays what it is.
        return self.accuracies | near | by_name | whole

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Evaluation:
        """What `to_dict` gave; KeyError or TypeError for anything else."""
        return cls(
            results=[Figure(**row) for row in stored["results"]],
            images=stored["images"],
            settings=stored["settings"],
            fidelity=[Fidelity(**row) for row in stored["fidelity"]],
            warnings=list(stored["warnings"]),
            digests=dict(stored["digests"]),
            complete=stored["complete"],
            curves=[Curve(**row) for row in stored.get("curves", [])],  # none in files of an earlier version
        )


def packed(correct: Tensor) -> str:
    """`Figure.standing` of flags."""
    return base64.b64encode(np.packbits(correct.cpu().numpy()).tobytes()).decode()


def _ball(norm: str | None, eps: float | None) -> Ball | None:
    return None if norm is None or eps is None else Ball(norm, eps)
