"""One training step of AdaAD, RSLAD and TRADES as their official code runs it.

Facts kept from those codes: images decoded and augmented one by one on the CPU by a DataLoader's collation, the attack
with parameters that require gradients and the student in eval mode, the outer forwards each loss asks for (of terms
whose weight is zero too), PyTorch's own losses, SGD.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.attack.loops import LOOPS

Batch = Callable[[], tuple[Tensor, Tensor]]


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss that all three are written with."""
    return F.kl_div(F.log_softmax(student, dim=1), F.softmax(teacher, dim=1), reduction="batchmean")


def adaad_loss(student: nn.Module, teacher: nn.Module, x: Tensor, x_adv: Tensor, labels: Tensor) -> Tensor:
    """α·KL on x' + (1 − α)·KL on x at its default α = 1: the second term is computed and multiplied by zero."""
    with torch.no_grad():
        teacher_adv, teacher_clean = teacher(x_adv), teacher(x)
    return 1.0 * kl(student(x_adv), teacher_adv) + 0.0 * kl(student(x), teacher_clean)


def rslad_loss(student: nn.Module, teacher: nn.Module, x: Tensor, x_adv: Tensor, labels: Tensor) -> Tensor:
    """5/6 KL on x' and 1/6 on x, both to the teacher's clean logits."""
    with torch.no_grad():
        teacher_clean = teacher(x)
    return 5 / 6 * kl(student(x_adv), teacher_clean) + 1 / 6 * kl(student(x), teacher_clean)


def trades_loss(student: nn.Module, teacher: Any, x: Tensor, x_adv: Tensor, labels: Tensor) -> Tensor:
    """CE on x + 6·KL(S(x) ‖ S(x')); the clean logits are evaluated twice."""
    natural = F.cross_entropy(student(x), labels)
    return natural + 6.0 * kl(student(x_adv), student(x))


LOSSES = {"adaad": adaad_loss, "rslad": rslad_loss, "trades": trades_loss}


class PerImageData(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """A dataset in torchvision's manner: a PIL image made, cropped, flipped and converted for each item."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        from torchvision.transforms import v2

        self.images, self.labels = images, labels.tolist()
        size, padding = images.shape[-1], max(1, round(4 * images.shape[-1] / 32))
        self.transform = v2.Compose(
            [
                v2.ToPILImage(),
                v2.RandomCrop(size, padding=padding),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def step(
    method: str,
    student: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    settings: tuple[float, float, int],
    *,
    autocast: bool = False,
    attacked: tuple[Any, Any] | None = None,
    channels_last: bool = False,
) -> Callable[[], Tensor]:
    """One official training step as a callable; ``attacked`` are compiled stand-ins for both networks."""
    optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    loop, loss_of = LOOPS[method][0], LOSSES[method]
    run_student, run_teacher = attacked or (student, teacher)

    def run() -> Tensor:
        x, labels = batch()
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            student.eval()
            x_adv = loop(run_student, run_teacher, x, *settings)
            student.train()
            loss = loss_of(run_student, run_teacher, x, x_adv, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run
