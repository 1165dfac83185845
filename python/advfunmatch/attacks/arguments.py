"""The checks on what an attack is made with and called with: each names the argument, what came and what is allowed."""

from __future__ import annotations

import math
import warnings
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import did_you_mean
from ..lean import PreparedModel
from .objectives import Objective, create_objective
from .target import BN_MODES, Target, batch_norms

NORMS = ("linf", "l2")
INITS = ("gaussian", "uniform", "zero")
KEEPS = ("best", "last")

# An l2 ball of the usual linf radius reaches no further than one pixel by that much: half of CIFAR's 3072 numbers
# moved by 8/255 are 1.2 apart.
_LINF_RADII = 16 / 255


def checked_objective(objective: str | Objective, targeted: bool, temperature: float) -> Objective:
    """The objective of that name, or the callable itself."""
    if isinstance(objective, str):
        return create_objective(objective, targeted=targeted, temperature=temperature)
    if not callable(objective):
        raise TypeError(f"objective must be a name or a callable, got {type(objective).__name__}")
    if targeted or temperature != 1.0:
        raise ValueError(
            "targeted and temperature go with an objective's name; give them to the callable itself"
        )
    return objective


def check_against_objective(
    objective: Objective, restarts: int, early_stop: bool, bn: str, cuda_graph: bool | None, keep: str
) -> None:
    """Options that need something of the objective, or of each other."""
    for option, wanted in ((f"restarts={restarts}", restarts > 1), ("keep='best'", keep == "best")):
        if wanted and not hasattr(objective, "score"):
            raise ValueError(f"{option} needs an objective with a score(student, teacher, labels) method")
    if not early_stop:
        return
    if not hasattr(objective, "success"):
        raise ValueError("early_stop=True needs an objective with a success(student, teacher, labels) method")
    if bn != "eval":
        raise ValueError(f"early_stop=True needs bn='eval' (it shrinks the batch), got bn={bn!r}")
    if cuda_graph:
        raise ValueError("early_stop=True reads the device at every step, so cuda_graph=True is not possible")
    if keep == "best":
        raise ValueError("early_stop=True keeps each image's first success, so keep='best' is not possible")


def warn_of_sizes(
    norm: str,
    eps: float,
    step_size: float,
    steps: int,
    init: str,
    clip: tuple[float | None, float | None] | None,
) -> None:
    """Say so where a radius or a step is one that nobody means."""
    if norm == "linf" and clip is not None and None not in clip:
        low, high = clip
        if eps > high - low:  # type: ignore[operator]
            warnings.warn(
                f"eps={eps:g} is more than the whole range of clip={clip}, so nothing of an image need be "
                "kept; for images in [0, 1] a radius such as 8/255 is usual",
                stacklevel=3,
            )
    for text in radius_warnings(norm, eps, step_size, steps, init):
        warnings.warn(text, stacklevel=3)


def radius_warnings(
    norm: str, eps: float, step_size: float | None = None, steps: int = 0, init: str = "uniform"
) -> list[str]:
    """Sentences about a radius or a step that is not the one usually meant.

    >>> radius_warnings("l2", 0.5, 0.125, steps=10)
    []
    """
    found = []
    if norm == "l2" and eps <= _LINF_RADII:
        found.append(
            f"eps={eps:g} is a radius of linf attacks; in l2 it lets an image change next to nothing, and "
            "0.5 = 128/255 is usual for CIFAR"
        )
    if step_size is None:
        return found
    if step_size > 2 * eps:
        found.append(
            f"step_size={step_size:g} is more than the diameter of the ball, 2 * eps = {2 * eps:g}, so every step "
            f"leaves it; eps/4 = {eps / 4:g} is usual"
        )
    reach = steps * step_size
    if steps > 0 and reach < _furthest_from_edge(norm, eps, init) * (1 - 1e-6):
        found.append(
            f"steps={steps} of step_size={step_size:g} go {reach:g} from the {init} start and do not reach the edge of "
            f"the ball, eps={eps:g}; take more steps, or larger ones (eps/4 = {eps / 4:g} is usual)"
        )
    return found


def _furthest_from_edge(norm: str, eps: float, init: str) -> float:
    """How far steps must reach for some of what ``init`` starts from to get to the edge of the ball.

    In linf a uniform start is half a radius from the nearer edge on average; in l2 it lies next to the edge, as nearly
    all of a ball in many dimensions does. A Gaussian of 0.001 is within 0.004 of the image in linf, and at right angles
    to a gradient in l2.
    """
    if init == "uniform":
        return eps / 2 if norm == "linf" else 0.0
    return eps - 0.004 if (norm, init) == ("linf", "gaussian") else eps


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(
            f"{name} must be one of {', '.join(allowed)}, got {value!r}{did_you_mean(value, allowed)}"
        )


def check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_options(norm: str, init: str, bn: str, eps: float, step_size: float | None) -> None:
    for name, value, allowed in (("norm", norm, NORMS), ("init", init, INITS), ("bn", bn, BN_MODES)):
        check_choice(name, value, allowed)
    check_positive("eps", eps)
    if step_size is not None:
        check_positive("step_size", step_size)


def check_counts(**counts: tuple[int, int]) -> None:
    """Each is its value, and the least that is allowed."""
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def checked_clip(
    clip: tuple[float | None, float | None] | None,
) -> tuple[float | None, float | None] | None:
    if clip is None:
        return None
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise ValueError(f"clip must be a pair (lowest, highest) or None, got {clip!r}")
    if not all(bound is None or (isinstance(bound, Real) and not isinstance(bound, bool)) for bound in clip):
        raise TypeError(f"clip must hold numbers or None, got {clip!r}")
    low, high = (None if bound is None else float(bound) for bound in clip)
    if any(bound is not None and math.isnan(bound) for bound in (low, high)) or (
        low is not None and high is not None and low >= high
    ):
        raise ValueError(f"clip must be a pair with lowest < highest, got {clip!r}")
    return low, high


def check_networks(student: Any, teacher: Any) -> None:
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module) and not (model is None and name == "teacher"):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")


def check_images(x: Tensor, clip: tuple[float | None, float | None] | None) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor of images, got {got}")
    if clip is not None and x.numel() and x.device.type == "cpu":  # elsewhere it would wait for the device
        _warn_outside(x, clip)
    if x.dim() < 2:
        raise ValueError(f"x must have shape (N, ...) with at least 2 dimensions, got {tuple(x.shape)}")


def checked_labels(y: Tensor, x: Tensor) -> Tensor:
    """One label for each image, as int64."""
    if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        got = f"dtype {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y must be a tensor of integer labels, got {got}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"y must have one label for each of {len(x)} images, got shape {tuple(y.shape)}")
    return y.long()


def check_known(
    objective: Objective,
    teacher_use: str,
    teacher: nn.Module | None,
    x: Tensor,
    labels: Tensor | None,
    teacher_logits: Tensor | None,
    x_start: Tensor | None,
) -> None:
    """What came with the images, against the objective and them."""
    name = type(objective).__name__
    for argument, value in (("labels", labels), ("teacher_logits", teacher_logits)):
        if not (value is None or isinstance(value, Tensor)):
            raise TypeError(f"{argument} must be a tensor or None, got {type(value).__name__}")
    if teacher_use in ("moving", "detached") and teacher is None:
        raise ValueError(
            f"objective {name} evaluates the teacher at x_adv, so teacher must be a module, got None"
        )
    if teacher_logits is not None and teacher_use != "clean":
        raise ValueError(
            f"teacher_logits go with an objective on clean teacher logits, and {name} is not one"
        )
    if teacher_logits is not None and len(teacher_logits) != len(x):
        raise ValueError(
            f"teacher_logits must have a row for each of the {len(x)} images, got {tuple(teacher_logits.shape)}"
        )
    if x_start is not None and (x_start.shape, x_start.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"x_start must be like x, {x.dtype} of shape {tuple(x.shape)}, got {x_start.dtype} of shape "
            f"{tuple(x_start.shape)}"
        )
    if labels is None and getattr(objective, "needs_labels", False):
        raise ValueError(f"objective {name} needs labels, got None")
    if labels is not None:
        is_integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        if not is_integer or labels.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"labels must be integers of shape ({len(x)},), or ({len(x)}, ...) where logits are dense, got "
                f"{labels.dtype} of shape {tuple(labels.shape)}"
            )
        if labels.device != x.device:
            raise ValueError(f"labels must be on the images' device {x.device}, got {labels.device}")


def as_rows(labels: Tensor | None) -> Tensor | None:
    """Labels as int64, one for each row of logits."""
    return None if labels is None else labels.long().flatten()


def check_rows(target: Target, images: int, *logits: Tensor | None) -> None:
    """That there are labels and logits for the same rows, which only shows once the networks have answered."""
    rows = [len(z) for z in logits if z is not None]
    if len(set(rows)) > 1:
        raise ValueError(f"student and teacher must have logits for the same pixels, got {rows} rows")
    if target.labels is not None and rows and len(target.labels) != rows[0]:
        raise ValueError(
            f"labels must be one for each row of logits, {rows[0] // images} for each image, got {len(target.labels)} "
            f"for {images} images"
        )


def check_bn(bn: str, student: nn.Module, teacher: nn.Module | None) -> None:
    """``teacher``: None where it is not evaluated."""
    if bn == "eval":
        return
    if isinstance(student, PreparedModel):
        raise ValueError(f"a prepared student has its BatchNorm in eval mode, so bn={bn!r} is not possible")
    if teacher is not None and set(map(id, batch_norms(student))) & set(map(id, batch_norms(teacher))):
        raise ValueError(
            f"bn must be 'eval' where the teacher has BatchNorm modules of the student, which cannot be in two "
            f"modes at once; got {bn!r}. A copy.deepcopy of the teacher has its own"
        )


def _warn_outside(x: Tensor, clip: tuple[float | None, float | None]) -> None:
    """Say so if the images lie outside the range that the attack will clip them to, as normalised ones do."""
    lowest, highest = (float(bound) for bound in x.detach().aminmax())
    low, high = clip
    slack = 1e-3
    if (low is not None and lowest < low - slack) or (high is not None and highest > high + slack):
        warnings.warn(
            f"x holds values from {lowest:.4g} to {highest:.4g}, outside clip={clip}, into which the attack moves them "
            "however far that is; give the range of these images as clip, or None, and normalise inside the network",
            stacklevel=5,
        )
