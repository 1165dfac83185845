"""The one set of sample inputs of the distribution losses, shared by the tests of every backend.

``SAMPLES`` maps a name to a function that draws the sample from a generator: a new seed is a new sample with the same
difficulty. ``draw(name, seed, ...)`` calls it. ``HARD_ROWS`` are single rows, one trouble each; "hard_rows" is the
batch of all of them between ordinary rows, so that a row that spoils its neighbours shows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

INF, NAN = float("inf"), float("nan")

# Student and teacher dtypes that every backend must take.
DTYPE_PAIRS = (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float64),
    (torch.float16, torch.bfloat16),
)


@dataclass(frozen=True)
class Sample:
    """Logits with the class dimension at ``dim``, and what goes with them."""

    student: Tensor
    teacher: Tensor
    dim: int = -1
    row_weight: Tensor | None = None  # broadcasts to the rows
    temperature: float = 1.0

    @property
    def rows(self) -> torch.Size:
        return self.student.movedim(self.dim, -1).shape[:-1]

    def class_last(self) -> tuple[Tensor, Tensor]:
        """The logits as the operators take them."""
        return self.student.movedim(self.dim, -1), self.teacher.movedim(self.dim, -1)

    def operator_row_weight(self) -> Tensor | None:
        """The row weights as the operators take them."""
        if self.row_weight is None:
            return None
        double = torch.float64 in (self.student.dtype, self.teacher.dtype)
        return self.row_weight.to(torch.float64 if double else torch.float32).expand(self.rows).contiguous()

    def labels(self, ignore_index: int = -100) -> Tensor:
        """A label for each row; every fifth is ``ignore_index``."""
        num_classes = self.student.shape[self.dim]
        index = torch.arange(self.rows.numel(), device=self.student.device)
        return torch.where(index % 5 == 4, ignore_index, index * 7 % num_classes).reshape(self.rows)


def _normal(generator: torch.Generator, *shape: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def _pair(*shape: int, scale: float = 3.0, **others: object) -> Callable[[torch.Generator], Sample]:
    def build(generator: torch.Generator) -> Sample:
        student, teacher = (_normal(generator, *shape, scale=scale) for _ in range(2))
        return Sample(student, teacher, **others)  # type: ignore[arg-type]

    return build


def _near(
    difference: float, offset: float = 0.0, shape: tuple[int, ...] = (17, 100)
) -> Callable[[torch.Generator], Sample]:
    """A student close to its teacher, where an attack starts and training ends."""

    def build(generator: torch.Generator) -> Sample:
        teacher = _normal(generator, *shape)
        return Sample(teacher + _normal(generator, *shape, scale=difference) + offset, teacher + offset)

    return build


#: name -> (student row, teacher row). One trouble each; see the tables of hard rows in afm_kernels/functional.
HARD_ROWS: dict[str, tuple[list[float], list[float]]] = {
    "ordinary": ([0.5, -1.0, 2.0, 0.0, 1.0], [1.0, 0.5, -2.0, 0.3, 0.0]),
    "equal": ([0.5, -1.0, 2.0, 0.0, 1.0], [0.5, -1.0, 2.0, 0.0, 1.0]),
    "shifted": ([8.5, 7.0, 10.0, 8.0, 9.0], [0.5, -1.0, 2.0, 0.0, 1.0]),
    "excluded_by_both": ([-INF, -1.0, 2.0, 0.0, 1.0], [-INF, 0.5, -2.0, 0.3, 0.0]),
    "excluded_by_teacher": ([0.5, -1.0, 2.0, 0.0, 1.0], [-INF, 0.5, -2.0, 0.3, 0.0]),
    "excluded_by_teacher_else_near": ([0.5, -1.0, 2.0, 0.0, 1.0], [-INF, -1.0, 2.0, 0.01, 1.0]),
    "excluded_by_student": ([-INF, -1.0, 2.0, 0.0, 1.0], [0.5, 0.5, -2.0, 0.3, 0.0]),
    # p > 0 means that the logit is above -inf: these probabilities are 0 in float32, and in float64 too.
    "excluded_by_student_underflowing": ([-INF, -1.0, 2.0, 0.0, 1.0], [-200.0, 0.5, -2.0, 0.3, 0.0]),
    "excluded_by_student_vanishing": ([-INF, -1.0, 2.0, 0.0, 1.0], [-3000.0, 0.5, -2.0, 0.3, 0.0]),
    "excluded_by_teacher_vanishing": ([-3000.0, -1.0, 2.0, 0.0, 1.0], [-INF, 0.5, -2.0, 0.3, 0.0]),
    "each_excludes_another": ([-INF, -1.0, 2.0, 0.0, 1.0], [1.0, 0.5, -INF, 0.3, 0.0]),
    "one_class_left_in_both": ([-INF, 1.0, -INF, -INF, -INF], [-INF, 3.0, -INF, -INF, -INF]),
    "disjoint": ([1.0, -INF, -INF, -INF, -INF], [-INF, 3.0, 1.0, 2.0, 0.0]),
    "nan_in_student": ([0.5, NAN, 2.0, 0.0, 1.0], [1.0, 0.5, -2.0, 0.3, 0.0]),
    "nan_in_teacher": ([0.5, -1.0, 2.0, 0.0, 1.0], [1.0, 0.5, -2.0, 0.3, NAN]),
    "nan_under_exclusion": ([NAN, -1.0, 2.0, 0.0, 1.0], [-INF, 0.5, -2.0, 0.3, 0.0]),
    "nan_beside_exclusion": ([-INF, NAN, 2.0, 0.0, 1.0], [1.0, 0.5, -2.0, 0.3, 0.0]),
    "inf_in_student": ([0.5, INF, 2.0, 0.0, 1.0], [1.0, 0.5, -2.0, 0.3, 0.0]),
    "inf_in_teacher": ([0.5, -1.0, 2.0, 0.0, 1.0], [1.0, 0.5, -2.0, INF, 0.0]),
    "inf_in_both": ([0.5, INF, 2.0, 0.0, 1.0], [1.0, INF, -2.0, 0.3, 0.0]),
    "nothing_in_student": ([-INF] * 5, [1.0, 0.5, -2.0, 0.3, 0.0]),
    "nothing_in_teacher": ([0.5, -1.0, 2.0, 0.0, 1.0], [-INF] * 5),
    "nothing_in_both": ([-INF] * 5, [-INF] * 5),
    "gap_in_teacher": ([0.5, -1.0, 2.0, 0.0, 1.0], [1e4, 0.5, -2.0, 0.3, 0.0]),
    "gap_in_student": ([1e4, -1.0, 2.0, 0.0, 1.0], [1.0, 0.5, -2.0, 0.3, 0.0]),
    "same_gap": ([1e4, -1.0, 2.0, 0.0, 1.0], [1e4, 0.5, -2.0, 0.3, 0.0]),
    "opposite_gaps": ([1e4, 0.0, 0.0, 0.0, -1e4], [-1e4, 0.0, 0.0, 0.0, 1e4]),
    "underflow": ([0.0, -120.0, -3.0, 1.0, 0.5], [0.2, -110.0, -2.0, 1.5, -130.0]),
    "lowest_not_excluded": ([0.0, -6e4, -3.0, 1.0, 0.5], [0.2, -6e4, -2.0, 1.5, -1.0]),
}


def _hard_rows(order: list[str] | None = None) -> Callable[[torch.Generator], Sample]:
    def build(generator: torch.Generator) -> Sample:
        names = order or list(HARD_ROWS)
        student, teacher = [], []
        for name in names:
            # Ordinary rows in between, and the trouble at another class each time.
            hard_student, hard_teacher = (torch.tensor(side, dtype=torch.float64) for side in HARD_ROWS[name])
            turn = int(torch.randint(5, (1,), generator=generator))
            student += [hard_student.roll(turn), _normal(generator, 5)]
            teacher += [hard_teacher.roll(turn), _normal(generator, 5)]
        return Sample(torch.stack(student), torch.stack(teacher))

    return build


def _hard_values_in_long_rows(generator: torch.Generator) -> Sample:
    """The hard values at random places of rows that take several vectors, and a remainder."""
    student, teacher = _normal(generator, 24, 203), _normal(generator, 24, 203)
    for row, (left, right) in enumerate(
        [(-INF, -INF), (0.0, -INF), (-INF, 0.0), (NAN, 0.0), (0.0, NAN), (INF, 0.0), (0.0, INF), (1e4, -1e4)]
        * 3
    ):
        place = int(torch.randint(203, (1,), generator=generator)) if row < 16 else (0 if row < 20 else 202)
        student[row, place], teacher[row, place] = left, right
    return Sample(student, teacher)


def _weighted(generator: torch.Generator) -> Sample:
    """Weights 0, over an ordinary row and over rows of NaN and infinities, fractions, and a negative one."""
    student, teacher = _normal(generator, 9, 33), _normal(generator, 9, 33)
    student[1], teacher[2], student[3, 4], teacher[4, 5] = NAN, NAN, -INF, INF
    weight = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.25, 3.0, -2.0])
    return Sample(student, teacher, row_weight=weight)


def _broadcast_weight(generator: torch.Generator) -> Sample:
    return replace(_pair(4, 5, 7)(generator), row_weight=torch.tensor([[1.0], [0.0], [2.0], [0.5]]))


def _expanded_teacher(generator: torch.Generator) -> Sample:
    """One teacher row for all: stride 0."""
    return Sample(_normal(generator, 6, 40), _normal(generator, 1, 40).expand(6, 40))


def _expanded_classes(generator: torch.Generator) -> Sample:
    """A uniform student, by stride 0 in the class dimension."""
    return Sample(_normal(generator, 6, 1).expand(6, 40), _normal(generator, 6, 40))


def _transposed(generator: torch.Generator) -> Sample:
    """Classes down the columns: the class stride is not 1."""
    return Sample(_normal(generator, 37, 8).t(), _normal(generator, 8, 37))


def _sliced(generator: torch.Generator) -> Sample:
    """Rows apart and off the alignment: a view of columns 3 to 60 of every other row."""
    return Sample(_normal(generator, 14, 80)[::2, 3:60], _normal(generator, 7, 57))


def _stepped(generator: torch.Generator) -> Sample:
    """Every other class: the class stride is 2."""
    return Sample(_normal(generator, 5, 66)[:, ::2], _normal(generator, 5, 99)[:, ::3])


def _channels_last(generator: torch.Generator) -> Sample:
    """Pixels are rows already where the class dimension is 1."""
    student, teacher = (
        _normal(generator, 2, 19, 4, 3).to(memory_format=torch.channels_last) for _ in range(2)
    )
    return Sample(student, teacher, dim=1)


def _mixed_layouts(generator: torch.Generator) -> Sample:
    student = _normal(generator, 2, 19, 4, 3).to(memory_format=torch.channels_last)
    return Sample(student, _normal(generator, 2, 19, 4, 3), dim=1)


def _permuted(generator: torch.Generator) -> Sample:
    """Dense, but with the batch dimensions out of order: gradients keep such strides."""
    return Sample(_normal(generator, 3, 4, 11).transpose(0, 1), _normal(generator, 4, 3, 11))


SAMPLES: dict[str, Callable[[torch.Generator], Sample]] = {
    **{
        f"classes_{c}": _pair(5, c)
        for c in (1, 2, 3, 7, 8, 10, 15, 16, 17, 31, 32, 33, 63, 65, 100, 1000, 1003)
    },
    "vocabulary": _pair(2, 4099),
    "one_row": _pair(1, 100),
    "many_rows": _pair(301, 10),
    "vector": _pair(12),
    "three_dimensions": _pair(3, 4, 21),
    "first_dimension": _pair(21, 3, 4, dim=0),
    "middle_dimension": _pair(3, 21, 4, dim=1),
    "no_rows": _pair(0, 10),
    "no_rows_of_many": _pair(3, 0, 10),
    "temperature_4": _pair(6, 50, temperature=4.0),
    "temperature_0.3": _pair(6, 50, scale=1.0, temperature=0.3),
    "saturated": _pair(9, 64, scale=30.0),
    "near_1e-2": _near(1e-2),
    "near_1e-3": _near(1e-3),
    "near_1e-3_few_classes": _near(1e-3, shape=(33, 10)),
    "equal": _near(0.0),
    "offset": _near(1.0, 1000.0),
    "near_offset": _near(1e-2, 1000.0),
    "hard_rows": _hard_rows(),
    "hard_values_in_long_rows": _hard_values_in_long_rows,
    "weighted": _weighted,
    "broadcast_weight": _broadcast_weight,
    "expanded_teacher": _expanded_teacher,
    "expanded_classes": _expanded_classes,
    "transposed": _transposed,
    "sliced": _sliced,
    "stepped": _stepped,
    "channels_last": _channels_last,
    "mixed_layouts": _mixed_layouts,
    "permuted": _permuted,
}

#: Samples whose every loss and gradient is finite.
FINITE = tuple(name for name in SAMPLES if not name.startswith(("hard", "weighted", "no_rows")))


def draw(
    name: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Sample:
    """Sample ``name`` from ``seed``, in the given dtypes. Layouts survive the conversion."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    sample = SAMPLES[name](generator)
    return Sample(
        _converted(sample.student, dtype, device),
        _converted(sample.teacher, teacher_dtype or dtype, device),
        sample.dim,
        None if sample.row_weight is None else sample.row_weight.to(device),
        sample.temperature,
    )


def _converted(tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """``tensor`` in another dtype and on another device, with its strides and offset in its storage."""
    storage_size = tensor.untyped_storage().nbytes() // tensor.element_size()
    flat = tensor.as_strided((storage_size,), (1,), 0).to(device=device, dtype=dtype)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
