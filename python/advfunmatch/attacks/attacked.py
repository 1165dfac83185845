"""What `AutoAttack` found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["CLEAN", "AutoAttackWarning", "AutoAttacked", "Stage"]

CLEAN = "clean"  # the stage before the first


class AutoAttackWarning(UserWarning):
    """Something about a network that makes a robust accuracy unreliable."""


@dataclass(frozen=True)
class Stage:
    """What one stage did.

    Attributes:
        name: such as ``"apgd_ce"``.
        images: how many it attacked.
        broken: (n,) int64, which it broke, in order.
        unverified: how many more the prepared network misclassifies, but not the network itself.
        accuracy: percent of all images that are left.
        seconds: in which it worked, those of all processes together.
        forwards, backwards: images that went through the searched network.
    """

    name: str
    images: int
    broken: Tensor
    unverified: int
    accuracy: float
    seconds: float
    forwards: int
    backwards: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, of the broken images their number."""
        return {**vars(self), "broken": len(self.broken), "seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class AutoAttacked:
    """What `AutoAttack` found.

    Attributes:
        x_adv: (N, ...): the adversarial image where there is one, else the clean one; in the images' dtype, float32 for
            those of 16 bits.
        robust: (N,) bool: classified correctly, and broken by no stage.
        stages: the clean images first.
        zero_gradients: how many correctly classified images have a gradient of exactly zero.
        warnings: what makes the figures doubtful, a sentence each.
    """

    x_adv: Tensor
    robust: Tensor
    stages: list[Stage]
    zero_gradients: int
    warnings: list[str]

    @property
    def accuracy(self) -> float:
        """Robust accuracy in percent."""
        return 100 * float(self.robust.double().mean())

    def __str__(self) -> str:
        lines = [
            f"{'stage':<10}{'images':>8}{'broken':>8}{'left %':>9}{'seconds':>10}{'forwards':>12}{'backwards':>12}"
        ]
        lines += [
            f"{stage.name:<10}{stage.images:>8}{len(stage.broken):>8}{stage.accuracy:>9.2f}{stage.seconds:>10.1f}"
            f"{stage.forwards:>12}{stage.backwards:>12}"
            for stage in self.stages
        ]
        return "\n".join(lines)
