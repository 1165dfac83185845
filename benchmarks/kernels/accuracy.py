"""How exact the KL and its gradients are, against float64, where a student is far from, near and very near its teacher.

The student's logits are the teacher's plus δ·randn, the teacher's 3·randn plus an offset: δ of 1, 1e-2 and 1e-3 gives
KL of about 0.4, 4e-5 and 4e-7. Adversarial training starts from near-equal networks and ends there. The error of a row
is |KL − truth| / truth, and the median over rows is quoted; "negative" is the share of rows below 0, which a divergence
never is. Truth is float64 on the same float32 logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import afm_kernels
from benchmarks.kernels.case import relative_error
from benchmarks.options import Options
from benchmarks.results import Record, finite

DELTAS = (1.0, 1e-2, 1e-3)
OFFSETS = (0.0, 1000.0)
CLASSES = (2, 10, 100, 1000, 32000, 128256)
_ELEMENTS = 1 << 21  # rows are as many as fit; at most _ROWS, so that short rows take no longer
_ROWS = 2048


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    classes: int
    delta: float
    offset: float

    @property
    def name(self) -> str:
        return f"accuracy/{self.classes}/delta{self.delta:g}/offset{self.offset:g}"

    @property
    def cost(self) -> float:
        """Seconds, roughly, on two cores."""
        return 0.05 + 2.5e-7 * self.rows * self.classes

    @property
    def rows(self) -> int:
        return max(16, min(_ROWS, _ELEMENTS // self.classes))

    def logits(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.classes)
        teacher = 3 * torch.randn(self.rows, self.classes, generator=generator) + self.offset
        return teacher + self.delta * torch.randn(self.rows, self.classes, generator=generator), teacher


def _ours(student: Tensor, teacher: Tensor) -> Tensor:
    return afm_kernels.softmax_kl_div(student, teacher, reduction="none")


def _log_space(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def _probabilities(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="none").sum(-1)


VARIANTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ours": _ours,
    "eager": _log_space,
    "eager probabilities": _probabilities,
}


def exact(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The KL of each row and the gradients of their sum, in float64, centred like the kernels."""
    log_q, log_p = F.log_softmax(student.double(), -1), F.log_softmax(teacher.double(), -1)
    p, difference = log_p.exp(), log_q - log_p
    mean = (p * difference).sum(-1, keepdim=True)
    x = difference - mean
    kl = torch.log1p((p * (torch.expm1(x) - x)).sum(-1))
    return kl, p * torch.expm1(difference), -p * x


def cases(options: Options) -> list[Setting]:
    """What is measured; a smoke run leaves out the long rows."""
    every = [Setting(*each) for each in product(CLASSES, DELTAS, OFFSETS)]
    named = options.named(every)
    if named is not None:
        return named
    return [setting for setting in every if not options.smoke or setting.classes <= 1000]


def errors(setting: Setting, variant: str) -> dict[str, float | None]:
    """The median relative error of the rows, the share of negative rows, and the gradients' relative L2 errors."""
    student, teacher = setting.logits()
    true, true_student, true_teacher = exact(student, teacher)
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    rows = VARIANTS[variant](student, teacher)
    grad_student, grad_teacher = torch.autograd.grad(rows.sum(), (student, teacher))
    # Two float32 rows may be equal after rounding; 0 is then right, and has no relative error.
    differing = true > 0
    off = ((rows.detach().double() - true).abs() / true)[differing]
    return {
        "row_median": finite(off.median().item()) if not off.isnan().any() else None,
        "negative": (rows < 0).double().mean().item(),
        "grad_student": finite(relative_error(grad_student, true_student)),
        "grad_teacher": finite(relative_error(grad_teacher, true_teacher)),
        "kl": finite(true[differing].median().item()),
    }


def measure(setting: Setting, seconds: float, options: Options, limits: Any) -> list[Record]:
    """One record for each variant; nothing is timed, and no limit applies."""
    records = []
    for variant in VARIANTS:
        error = errors(setting, variant)
        details = {
            "classes": setting.classes,
            "delta": setting.delta,
            "offset": setting.offset,
            "kl": error.pop("kl") or math.nan,
        }
        name = f"{setting.name}/{variant}"
        records.append(Record(name, None, peer=variant != "ours", error=error, details=details))
    return records


HEAD = f"median relative error of a row's KL\n{'classes':>8} {'KL':>9} {'offset':>7}" + "".join(
    f"{name:>22}" for name in VARIANTS
)


def lines(records: list[Record]) -> Iterator[str]:
    """One line: the variants beside each other."""
    rows = [record.error["row_median"] for record in records]
    details = records[0].details
    yield f"{details['classes']:>8} {details['kl']:>9.1e} {details['offset']:>7g}" + "".join(
        f"{'NaN' if row is None else format(row, '.1e'):>22}" for row in rows
    )


def wrong_answers(records: list[Record]) -> Iterator[str]:
    """A sentence for every row of ours less exact than what the kernels promise, or negative."""
    for record in records:
        if record.peer:
            continue
        allowed = {1.0: 2e-6, 1e-2: 2e-5, 1e-3: 3e-4}[record.details["delta"]]
        row = record.error["row_median"]
        if row is None or row > allowed:
            yield f"{record.name}: median relative error {row}, allowed {allowed}"
        if record.error["negative"]:
            yield f"{record.name}: {record.error['negative']:.1%} of the rows are negative"
