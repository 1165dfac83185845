"""The attack engine: K steps of projected gradient ascent on an objective, and nothing else.

A step is a forward of the networks that move with x, the objective's logit gradients, one input gradient through
them, and one fused update. No loss value exists, no weight gradient is computed, and nothing is read back from
the device, so on CUDA the whole attack (starts, steps and restarts) is one captured graph: Note [Captured attack] in
``capture``.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from afm_kernels import pgd_start, pgd_step

from ..lean import PreparedModel, unwrap
from .capture import CapturedAttack, GraphCache, capture_key
from .objectives import Objective, create_objective

__all__ = ["PGDAttack", "input_gradient"]

NORMS = ("linf", "l2")
INITS = ("gaussian", "uniform", "zero")
BN_MODES = ("eval", "batch", "train")


class Target(NamedTuple):
    """What is attacked: both networks, and what is known of the clean images."""

    student: nn.Module
    teacher: nn.Module | None = None
    labels: Tensor | None = None
    teacher_logits: Tensor | None = None

    def rows(self, index: Tensor) -> Target:
        """The same for some of the images."""
        return self._replace(
            labels=None if self.labels is None else self.labels[index],
            teacher_logits=None if self.teacher_logits is None else self.teacher_logits[index],
        )

    def in_its_format(self, x: Tensor) -> Tensor:
        """x in the memory format of the prepared networks, so that it is converted once and not at every step."""
        formats = {m.memory_format for m in (self.student, self.teacher) if isinstance(m, PreparedModel)}
        if x.dim() == 4 and torch.channels_last in formats:
            return x.contiguous(memory_format=torch.channels_last)
        return x


class PGDAttack:
    """Projected gradient ascent in an l_p ball, through student and teacher at once.

    Args:
        objective: "mismatch", "fixed_teacher", "cross_entropy", "margin", or a callable of logits to logit gradients;
            see Note [Objective contract] in ``objectives``.
        norm: "linf" (steps of the gradient's sign) or "l2" (steps of the gradient divided by its norm).
        eps: radius of the ball, in the units of x.
        step_size: length of a step in that norm.
        steps: number of steps K.
        init: "gaussian" (x + 0.001·N(0, 1)), "uniform" (in the ball) or "zero".
        clip: the range of valid images, or None.
        seed: seeds a generator of the attack's own, which then serves every call, and leaves the caller's random state
            alone. None draws from PyTorch's default generator.
        restarts: number of independent starts; each image keeps its best by the objective's score.
        bn: the student's BatchNorm during the attack. "eval": running statistics (RSLAD, TRADES, AdaAD); "batch": the
            batch's own, the running ones untouched; "train": running ones updated too, as the code of ARD, IAD and
            Fast-AT does. Everything else, and the teacher, is in eval mode always.
        targeted: for cross_entropy and margin: labels are targets.
        temperature: for mismatch and fixed_teacher.
        early_stop: stop with each image at its first success and spend no more time on it. This reads the
            device at every step and is never captured.
        cuda_graph: capture the attack as one CUDA graph. None: where both networks are prepared and on CUDA.
        streams: on CUDA, run the teacher on a stream of its own beside the student's.
        max_graphs: captured graphs kept, by least recent use.

    Raises:
        ValueError, TypeError: an argument outside what is listed here.

    Example:
        >>> attack = PGDAttack("cross_entropy", eps=0.1, step_size=0.03, steps=5, seed=0)
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
        >>> x_adv = attack(net, None, x, labels)
        >>> bool(((x_adv - x).abs() <= 0.1 + 1e-6).all())
        True
    """

    def __init__(
        self,
        objective: str | Objective = "mismatch",
        norm: str = "linf",
        eps: float = 8 / 255,
        step_size: float = 2 / 255,
        steps: int = 10,
        init: str = "gaussian",
        clip: tuple[float | None, float | None] | None = (0.0, 1.0),
        seed: int | None = None,
        *,
        restarts: int = 1,
        bn: str = "eval",
        targeted: bool = False,
        temperature: float = 1.0,
        early_stop: bool = False,
        cuda_graph: bool | None = None,
        streams: bool = False,
        max_graphs: int = 8,
    ) -> None:
        _check_choice("norm", norm, NORMS)
        _check_choice("init", init, INITS)
        _check_choice("bn", bn, BN_MODES)
        _check_positive("eps", eps)
        _check_positive("step_size", step_size)
        _check_count("steps", steps, least=0)
        _check_count("restarts", restarts, least=1)
        _check_count("max_graphs", max_graphs, least=1)
        if seed is not None:
            _check_count("seed", seed, least=0)
        if isinstance(objective, str):
            self.objective = create_objective(objective, targeted=targeted, temperature=temperature)
        elif not callable(objective):
            raise TypeError(f"objective must be a name or a callable, got {type(objective).__name__}")
        elif targeted or temperature != 1.0:
            raise ValueError(
                "targeted and temperature go with an objective's name; give them to the callable itself"
            )
        else:
            self.objective = objective
        if restarts > 1 and not hasattr(self.objective, "score"):
            raise ValueError(
                f"restarts={restarts} needs an objective with a score(student, teacher, labels) method"
            )
        if early_stop and not hasattr(self.objective, "success"):
            raise ValueError(
                "early_stop=True needs an objective with a success(student, teacher, labels) method"
            )
        if early_stop and bn != "eval":
            raise ValueError(f"early_stop=True needs bn='eval' (it shrinks the batch), got bn={bn!r}")
        if early_stop and cuda_graph:
            raise ValueError(
                "early_stop=True reads the device at every step, so cuda_graph=True is not possible"
            )
        self.clip = _checked_clip(clip)
        if norm == "linf" and self.clip is not None and None not in self.clip:
            low, high = self.clip
            if eps > high - low:  # type: ignore[operator]
                warnings.warn(
                    f"eps={eps:g} is more than the whole range of clip={self.clip}, so nothing of an image need be "
                    "kept; for images in [0, 1] a radius such as 8/255 is usual",
                    stacklevel=2,
                )
        self.norm = norm
        self.eps = float(eps)
        self.step_size = float(step_size)
        self.steps = int(steps)
        self.init = init
        self.seed = None if seed is None else int(seed)
        self.restarts = int(restarts)
        self.bn = bn
        self.early_stop = early_stop
        self.cuda_graph = cuda_graph
        self.streams = streams
        self._generators: dict[torch.device, torch.Generator] = {}
        self._graphs = GraphCache(max_graphs)
        self._side_streams: dict[torch.device, torch.cuda.Stream] = {}

    def __call__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        teacher_logits: Tensor | None = None,
        x_start: Tensor | None = None,
    ) -> Tensor:
        """Attack the images x.

        Args:
            student: maps images to logits (N, C). A DDP or DataParallel wrapper is looked through.
            teacher: the same, or None where the objective needs none. For "fixed_teacher", None means the student's
                own clean logits.
            x: images (N, ...), floating point, in the clip range.
            labels: int64 (N,), for the objectives that need them.
            teacher_logits: for objectives with the teacher on clean images, its logits, where the caller has
                them already.
            x_start: where the first run starts, for a caller that drew it itself; ``init`` decides otherwise.

        Returns:
            x_adv: x's shape, dtype, device and memory format; within eps of x and within the clip range to one ulp.
        """
        for name, model in (("student", student), ("teacher", teacher)):
            if not isinstance(model, nn.Module) and not (model is None and name == "teacher"):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")
        student = unwrap(student)
        teacher = None if teacher is None else unwrap(teacher)
        self._check_call(student, teacher, x, labels, teacher_logits, x_start)
        if x.numel() == 0:
            return x.detach().clone()
        if self._teacher_use(teacher) == "none" or teacher_logits is not None:
            teacher = None
        target = Target(student, teacher, labels, teacher_logits)
        # Inference tensors cannot be saved for a backward, and a caller's no_grad would leave nothing to differentiate.
        with torch.inference_mode(False), torch.enable_grad(), _eval_modes(student, teacher, self.bn):
            x = x.detach()
            if x.is_inference():
                x = x.clone()
            x_start = None if x_start is None else x_start.detach().clone()
            if self.early_stop:
                return self._attack_until_success(target, x, x_start)
            if self._captures(target, x):
                return self._attack_captured(target, x, x_start)
            return self._attack(target, x, x_start, self._generator(x.device))

    def draw_start(self, x: Tensor) -> Tensor:
        """A point of the ball for each image, as ``init`` says: what ``x_start`` takes."""
        return self._start(x, self._generator(x.device))

    def get_rng_state(self) -> dict[str, Tensor]:
        """The state of the attack's own generators by device, for an exact resume; empty without a seed."""
        return {str(device): generator.get_state() for device, generator in self._generators.items()}

    def set_rng_state(self, state: dict[str, Tensor]) -> None:
        """Continue where ``get_rng_state`` was called."""
        for device, value in state.items():
            generator = self._generator(torch.device(device))
            if generator is None:
                raise ValueError("set_rng_state needs an attack with a seed, and this one has seed=None")
            generator.set_state(value.cpu())

    def __repr__(self) -> str:
        objective = type(self.objective).__name__
        return (
            f"PGDAttack({objective}, norm={self.norm!r}, eps={self.eps:.5g}, step_size={self.step_size:.5g}, "
            f"steps={self.steps}, init={self.init!r}, clip={self.clip}, seed={self.seed}, restarts={self.restarts}, "
            f"bn={self.bn!r})"
        )

    # ---- the attack itself ---------------------------------------------------------------------------------------

    def _attack(
        self, target: Target, x: Tensor, x_start: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Starts, steps and restarts: all that a captured graph holds."""
        x_inner = target.in_its_format(x)
        target = self._with_clean_logits(target, x_inner)
        best = self._one_run(target, self._start(x, generator) if x_start is None else x_start, x_inner)
        if self.restarts > 1:
            best_score = self._score(target, best)
        for _ in range(self.restarts - 1):
            x_adv = self._one_run(target, self._start(x, generator), x_inner)
            score = self._score(target, x_adv)
            better = score > best_score
            best = torch.where(better.view(-1, *[1] * (x.dim() - 1)), x_adv, best)
            best_score = torch.where(better, score, best_score)
        return _in_format_of(best, x)

    def _one_run(self, target: Target, x_start: Tensor, x_inner: Tensor) -> Tensor:
        """K steps from one start."""
        x_adv = target.in_its_format(x_start)
        for _ in range(self.steps):
            x_adv = self._step(x_adv, self._input_gradient(target, x_adv), x_inner)
        return x_adv

    def _attack_until_success(self, target: Target, x: Tensor, x_start: Tensor | None) -> Tensor:
        """The same with the broken images taken out of the batch as they break."""
        x_inner = target.in_its_format(x)
        target = self._with_clean_logits(target, x_inner)
        result = x_inner.clone()
        active = torch.arange(len(x), device=x.device)
        for _ in range(self.restarts):
            x_left, left = x_inner[active], target.rows(active)
            x_adv = self._start(x_left, self._generator(x.device)) if x_start is None else x_start
            x_start = None  # the first run's alone
            for step in range(self.steps + 1):
                # The logits that the gradient needs also say which images are broken: no extra forward.
                leaf, z_s, z_t = self._forward(left, x_adv)
                unbroken = ~self.objective.success(z_s.detach(), _detached(z_t), left.labels)  # type: ignore[attr-defined]
                result[active] = x_adv
                kept = unbroken.nonzero().squeeze(1)
                active = active[kept]
                if step == self.steps or len(kept) == 0:
                    break
                gradient = self._backward(leaf, z_s, z_t, left.labels)
                x_left, left = x_left[kept], left.rows(kept)
                x_adv = self._step(x_adv[kept], gradient[kept], x_left)
            if len(active) == 0:
                break
        return _in_format_of(result, x)

    def _with_clean_logits(self, target: Target, x: Tensor) -> Target:
        """The target with the logits on clean images in the teacher's place, where the objective wants those."""
        if self._teacher_use(target.teacher) != "clean" or target.teacher_logits is not None:
            return target
        with torch.no_grad():
            logits = _logits(target.student if target.teacher is None else target.teacher, x)
        return target._replace(teacher=None, teacher_logits=logits)

    def _start(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        # From the caller's x: noise is drawn in memory order, so a seed means one start however x is converted.
        return pgd_start(x, eps=self.eps, init=self.init, norm=self.norm, clip=self.clip, generator=generator)

    def _step(self, x_adv: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
        return pgd_step(
            x_adv, gradient, x, step_size=self.step_size, eps=self.eps, norm=self.norm, clip=self.clip
        )

    def _forward(self, target: Target, x_adv: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """A fresh leaf at x_adv, the student's logits there, and the teacher's (with a graph where it moves)."""
        leaf = x_adv.detach().requires_grad_(True)
        student, teacher = target.student, target.teacher
        if teacher is None:
            return leaf, _logits(student, leaf), target.teacher_logits
        moving = self._teacher_use(teacher) == "moving"
        if not (self.streams and leaf.is_cuda):
            z_s = _logits(student, leaf)
            with torch.set_grad_enabled(moving):
                return leaf, z_s, _logits(teacher, leaf)
        here = torch.cuda.current_stream(leaf.device)
        side = self._side_streams.setdefault(leaf.device, torch.cuda.Stream(leaf.device))
        side.wait_stream(here)
        with torch.cuda.stream(side), torch.set_grad_enabled(moving):
            z_t = _logits(teacher, leaf)
        z_s = _logits(student, leaf)
        here.wait_stream(side)
        # Allocated on the side stream and used on this one: its memory must not be reused before this one is done.
        z_t.record_stream(here)
        leaf.record_stream(side)
        return leaf, z_s, z_t

    def _backward(self, leaf: Tensor, z_s: Tensor, z_t: Tensor | None, labels: Tensor | None) -> Tensor:
        """The objective's gradient at the leaf. Autograd runs each network's part on its forward's stream."""
        gradients = self.objective(z_s.detach(), _detached(z_t), labels)
        outputs, grads = _moving_sides(z_s, z_t, gradients)
        if leaf.dtype == torch.float16 or any(z.dtype == torch.float16 for z in outputs):
            grads = _scaled_rows(grads)
        (gradient,) = torch.autograd.grad(outputs, leaf, grads, allow_unused=True)
        if gradient is None:
            raise ValueError(
                "no logits that the objective gave a gradient for depend on x_adv differentiably"
            )
        return gradient

    def _input_gradient(self, target: Target, x_adv: Tensor) -> Tensor:
        return self._backward(*self._forward(target, x_adv), target.labels)

    @torch.no_grad()
    def _score(self, target: Target, x_adv: Tensor) -> Tensor:
        z_s = _logits(target.student, x_adv)
        z_t = target.teacher_logits if target.teacher is None else _logits(target.teacher, x_adv)
        score: Tensor = self.objective.score(z_s, z_t, target.labels)  # type: ignore[attr-defined]
        return score

    # ---- capture -------------------------------------------------------------------------------------------------

    def _captures(self, target: Target, x: Tensor) -> bool:
        if self.cuda_graph is None:
            prepared = all(
                model is None or (isinstance(model, PreparedModel) and model.traced)
                for model in (target.student, target.teacher)
            )
            return x.is_cuda and prepared
        if self.cuda_graph and not x.is_cuda:
            raise ValueError(f"cuda_graph=True needs images on a CUDA device, got {x.device}")
        return self.cuda_graph

    def _attack_captured(self, target: Target, x: Tensor, x_start: Tensor | None) -> Tensor:
        networks = target.student, target.teacher
        inputs = x, x_start, target.labels, target.teacher_logits
        generator = self._generator(x.device)

        def attack(x: Tensor, x_start: Tensor | None, *known: Tensor | None) -> Tensor:
            return self._attack(Target(*networks, *known), x, x_start, generator)

        captured = self._graphs.get(
            capture_key(networks, inputs), lambda: CapturedAttack(attack, networks, inputs, generator)
        )
        result: Tensor = captured(inputs)
        return result

    # ---- small parts ---------------------------------------------------------------------------------------------

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if self.seed is None:
            return None
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]

    def _teacher_use(self, teacher: nn.Module | None) -> str:
        default = "none" if teacher is None else "moving"
        use: str = getattr(self.objective, "teacher", default)
        return use

    def _check_call(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        x: Tensor,
        labels: Tensor | None,
        teacher_logits: Tensor | None,
        x_start: Tensor | None,
    ) -> None:
        name = type(self.objective).__name__
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point tensor of images, got {got}")
        for argument, value in (("labels", labels), ("teacher_logits", teacher_logits)):
            if not (value is None or isinstance(value, Tensor)):
                raise TypeError(f"{argument} must be a tensor or None, got {type(value).__name__}")
        if (
            self.clip is not None and x.numel() and x.device.type == "cpu"
        ):  # elsewhere it would wait for the device
            _warn_outside(x, self.clip)
        if x.dim() < 2:
            raise ValueError(f"x must have shape (N, ...) with at least 2 dimensions, got {tuple(x.shape)}")
        use = self._teacher_use(teacher)
        if use in ("moving", "detached") and teacher is None:
            raise ValueError(
                f"objective {name} evaluates the teacher at x_adv, so teacher must be a module, got None"
            )
        if teacher_logits is not None and use != "clean":
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
        if labels is None and getattr(self.objective, "needs_labels", False):
            raise ValueError(f"objective {name} needs labels, got None")
        if labels is not None:
            if labels.dtype != torch.int64 or labels.shape != x.shape[:1]:
                raise ValueError(
                    f"labels must be int64 of shape ({len(x)},), got {labels.dtype} of shape {tuple(labels.shape)}"
                )
            if labels.device != x.device:
                raise ValueError(f"labels must be on the images' device {x.device}, got {labels.device}")
        if self.bn != "eval" and isinstance(student, PreparedModel):
            raise ValueError(
                f"a prepared student has its BatchNorm in eval mode, so bn={self.bn!r} is not possible"
            )
        if self.bn != "eval" and use != "none" and teacher_logits is None and teacher is not None:
            shared = set(map(id, _batch_norms(student))) & set(map(id, _batch_norms(teacher)))
            if shared:
                raise ValueError(
                    f"bn must be 'eval' where the teacher has BatchNorm modules of the student, which cannot be in two "
                    f"modes at once; got {self.bn!r}. A copy.deepcopy of the teacher has its own"
                )


def input_gradient(
    student: nn.Module,
    teacher: nn.Module | None,
    x_adv: Tensor,
    objective: str | Objective = "mismatch",
    labels: Tensor | None = None,
    teacher_logits: Tensor | None = None,
) -> Tensor:
    """The gradient at x_adv that one step of an attack on this objective follows, networks in the modes they are in.

    Args:
        student, teacher, labels: as ``PGDAttack`` takes them.
        x_adv: images (N, ...), floating point.
        objective: as ``PGDAttack`` takes it.
        teacher_logits: the logits on the clean images, which an objective on those ("fixed_teacher") needs here: the
            clean images themselves are not known.

    Returns:
        A tensor like x_adv.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Example:
        >>> net = torch.nn.Linear(3, 2)
        >>> input_gradient(net, None, torch.rand(5, 3), "margin", torch.zeros(5, dtype=torch.int64)).shape
        torch.Size([5, 3])
    """
    attack = PGDAttack(objective, clip=None)
    student, teacher = unwrap(student), None if teacher is None else unwrap(teacher)
    attack._check_call(student, teacher, x_adv, labels, teacher_logits, None)
    if attack._teacher_use(teacher) == "clean" and teacher_logits is None:
        raise ValueError(
            f"objective {type(attack.objective).__name__} needs teacher_logits on the clean images, got None"
        )
    with torch.inference_mode(False), torch.enable_grad():
        return attack._input_gradient(Target(student, teacher, labels, teacher_logits), x_adv)


def _batch_norms(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))


@contextlib.contextmanager
def _eval_modes(student: nn.Module, teacher: nn.Module | None, bn: str) -> Iterator[None]:
    """Both networks in eval mode but for the student's BatchNorm as ``bn`` says; afterwards all is as it was."""
    changed: list[tuple[nn.Module, str, bool]] = []

    def switch(module: nn.Module, flag: str, value: bool) -> None:
        # What was frozen in TorchScript has no modes any more.
        if getattr(module, flag, value) != value:
            changed.append((module, flag, getattr(module, flag)))
            setattr(module, flag, value)

    try:
        for model, mode in ((student, bn), (teacher, "eval")):
            for module in () if model is None else model.modules():
                is_bn = isinstance(module, nn.modules.batchnorm._BatchNorm)
                switch(module, "training", is_bn and mode != "eval")
                if is_bn and mode == "batch":
                    # With nothing tracked, one in training mode neither reads nor writes running statistics.
                    switch(module, "track_running_stats", False)
        yield
    finally:
        for module, flag, value in reversed(changed):
            setattr(module, flag, value)


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(x)
    if not isinstance(logits, Tensor):
        raise TypeError(f"{type(model).__name__} must return a tensor of logits, got {type(logits).__name__}")
    if logits.dim() != 2 or len(logits) != len(x):
        raise ValueError(
            f"{type(model).__name__} must return logits (N, C) with N = {len(x)}, got {tuple(logits.shape)}"
        )
    return logits


def _moving_sides(z_s: Tensor, z_t: Tensor | None, gradients: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The logits that have a gradient, and their gradients."""
    sides = gradients if isinstance(gradients, (tuple, list)) else (gradients, None)
    if len(sides) != 2:
        raise ValueError(f"an objective must return one gradient or a pair of them, got {len(sides)}")
    outputs, grads = [], []
    for name, z, gradient in (("student", z_s, sides[0]), ("teacher", z_t, sides[1])):
        if gradient is None:
            continue
        if z is None or not isinstance(gradient, Tensor) or gradient.shape != z.shape:
            got = tuple(gradient.shape) if isinstance(gradient, Tensor) else type(gradient).__name__
            want = (
                "no gradient, there are no such logits"
                if z is None
                else f"a tensor of shape {tuple(z.shape)}"
            )
            raise ValueError(f"the objective's {name} gradient must be {want}, got {got}")
        if not z.requires_grad:
            raise ValueError(
                f"the objective gave a gradient for the {name}'s logits, which do not depend on x_adv differentiably"
            )
        outputs.append(z)
        grads.append(gradient.to(z.dtype))
    if not outputs:
        raise ValueError("the objective returned no gradient for either side")
    return outputs, grads


def _scaled_rows(grads: list[Tensor]) -> list[Tensor]:
    """Each row's gradients divided by their largest entry, one factor for both sides."""
    wide = [g.float() for g in grads]
    largest = torch.stack([g.abs().amax(1, keepdim=True) for g in wide]).amax(0)
    factor = torch.where(largest > 0, largest, torch.ones_like(largest))
    return [(w / factor).to(g.dtype) for w, g in zip(wide, grads, strict=True)]


def _detached(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


def _in_format_of(result: Tensor, x: Tensor) -> Tensor:
    if result.stride() == x.stride():
        return result
    return torch.empty_like(x).copy_(result)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _checked_clip(
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


def _warn_outside(x: Tensor, clip: tuple[float | None, float | None]) -> None:
    """Say so if the images lie outside the range that the attack will clip them to, as normalised ones do."""
    lowest, highest = (float(bound) for bound in x.detach().aminmax())
    low, high = clip
    slack = 1e-3
    if (low is not None and lowest < low - slack) or (high is not None and highest > high + slack):
        warnings.warn(
            f"x holds values from {lowest:.4g} to {highest:.4g}, outside clip={clip}, into which the attack moves them "
            "however far that is; give the range of these images as clip, or None, and normalise inside the network",
            stacklevel=4,
        )
