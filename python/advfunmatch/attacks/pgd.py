"""The attack engine: K steps of projected gradient ascent on an objective, and nothing else.

A step is a forward of the networks that move with x, the objective's logit gradients, one input gradient through
them, and one fused update. No loss value exists, no weight gradient is computed, and nothing is read back from
the device, so on CUDA the whole attack (starts, steps and restarts) is one captured graph: Note [Captured attack] in
``capture``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from afm_kernels import pgd_start, pgd_step

from ..lean import unwrap
from . import arguments
from .best import Best
from .capture import CapturedAttack, GraphCache, capture_key, is_captured
from .gradient import ScaledBackward
from .input_gradient import input_gradient
from .objectives import Objective
from .target import Forward, Target, eval_modes, in_format_of, logits_of, rows_of, score_of

__all__ = ["PGDAttack", "input_gradient"]


class PGDAttack:
    """Projected gradient ascent in an l_p ball, through student and teacher at once.

    Args:
        objective: "mismatch", "fixed_teacher", "cross_entropy", "margin", or a callable of logits to logit gradients;
            see Note [Objective contract] in ``objectives``.
        norm: "linf" (steps of the gradient's sign) or "l2" (steps of the gradient divided by its norm).
        eps: radius of the ball, in the units of x.
        step_size: length of a step in that norm; None is eps/4.
        steps: number of steps K.
        init: "gaussian" (x + 0.001·N(0, 1)), "uniform" (in the ball) or "zero".
        clip: the range of valid images, or None.
        seed: seeds a generator of the attack's own, which then serves every call, and leaves the caller's random state
            alone. None draws from PyTorch's default generator.
        restarts: number of independent starts; each image keeps its best by the objective's score.
        keep: which iterate of an image is returned. "last"; or "best", the one with the largest score of all iterates,
            the start and the clean image included: its forwards at the clean image and at the last iterate cost
            2/(3 steps) of the attack. None: what the objective says, "best" for mismatch and "last" for the others.
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

    Attributes:
        zero_gradients: after a call, a tensor of shape () on the images' device: how many of its images had a gradient
            of exactly zero, or none that was finite, at every step, so that they have not been attacked. None before.

    Warns:
        UserWarning: eps or step_size is one that nobody means, such as steps that do not reach the edge of the ball
            together: see ``radius_warnings``.

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
        step_size: float | None = None,
        steps: int = 10,
        init: str = "gaussian",
        clip: tuple[float | None, float | None] | None = (0.0, 1.0),
        seed: int | None = None,
        *,
        restarts: int = 1,
        keep: str | None = None,
        bn: str = "eval",
        targeted: bool = False,
        temperature: float = 1.0,
        early_stop: bool = False,
        cuda_graph: bool | None = None,
        streams: bool = False,
        max_graphs: int = 8,
    ) -> None:
        arguments.check_options(norm, init, bn, eps, step_size)
        step_size = eps / 4 if step_size is None else step_size
        arguments.check_counts(steps=(steps, 0), restarts=(restarts, 1), max_graphs=(max_graphs, 1))
        arguments.check_counts(seed=(0 if seed is None else seed, 0))
        self.objective = arguments.checked_objective(objective, targeted, temperature)
        if keep is None:
            keep = "last" if early_stop else getattr(self.objective, "keep", "last")
        arguments.check_choice("keep", keep, arguments.KEEPS)
        arguments.check_against_objective(self.objective, restarts, early_stop, bn, cuda_graph, keep)
        self.clip = arguments.checked_clip(clip)
        arguments.warn_of_sizes(norm, eps, step_size, steps, init, self.clip)
        self.norm = norm
        self.eps = float(eps)
        self.step_size = float(step_size)
        self.steps = int(steps)
        self.init = init
        self.seed = None if seed is None else int(seed)
        self.restarts = int(restarts)
        self.keep = keep
        self.bn = bn
        self.early_stop = early_stop
        self.cuda_graph = cuda_graph
        self.streams = streams
        self.zero_gradients: Tensor | None = None
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
            student: maps images to logits (N, C), or to an object that has them as ``logits``; dense ones (N, C, ...)
                are one row a pixel, whose objectives an image sums. A DDP or DataParallel wrapper is looked through.
            teacher: the same, or None where the objective needs none. For "fixed_teacher", None means the student's
                own clean logits.
            x: images (N, ...), floating point, in the clip range.
            labels: integers of any width, (N,), for the objectives that need them; of dense logits (N, ...), −100
                where a pixel does not count.
            teacher_logits: for objectives with the teacher on clean images, its logits, where the caller has
                them already.
            x_start: where the first run starts, for a caller that drew it itself; ``init`` decides otherwise.

        Returns:
            x_adv: x's shape, dtype, device and memory format; within eps of x and within the clip range to one ulp.
        """
        arguments.check_networks(student, teacher)
        student, teacher = unwrap(student), None if teacher is None else unwrap(teacher)
        use = self._teacher_use(teacher)
        arguments.check_images(x, self.clip)
        arguments.check_known(self.objective, use, teacher, x, labels, teacher_logits, x_start)
        teacher = None if use == "none" or teacher_logits is not None else teacher
        arguments.check_bn(self.bn, student, teacher)
        known_logits = None if teacher_logits is None else rows_of(teacher_logits)
        target = Target(student, teacher, arguments.as_rows(labels), known_logits)
        target.follow_()
        # Inference tensors cannot be saved for a backward, and a caller's no_grad would leave nothing to differentiate.
        with torch.inference_mode(False), torch.enable_grad(), eval_modes(student, teacher, self.bn):
            self.zero_gradients = torch.zeros((), dtype=torch.int64, device=x.device)
            x = x.detach()
            if x.is_inference() or x.numel() == 0:
                x = x.clone()
            if x.numel() == 0:
                return x
            x_start = None if x_start is None else x_start.detach().clone()
            if self.early_stop:
                return self._attack_until_success(target, x, x_start)
            if self._captures(target, x):
                return self._attack_captured(target, x, x_start)
            return self._attack(target, x, x_start, self._generator(x.device), self.zero_gradients)

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
            f"keep={self.keep!r}, bn={self.bn!r})"
        )

    # ---- the attack itself ---------------------------------------------------------------------------------------

    def _attack(
        self,
        target: Target,
        x: Tensor,
        x_start: Tensor | None,
        generator: torch.Generator | None,
        zero_gradients: Tensor | None = None,
    ) -> Tensor:
        """Starts, steps and restarts: all that a captured graph holds."""
        x_inner = target.in_its_format(x)
        target = self._with_clean_logits(target, x_inner)
        best = Best()
        keeps_best = self.keep == "best" and self.steps > 0  # without steps the start is what was asked for
        if keeps_best:
            clean = x_inner if self.clip is None else x_inner.clamp(*self.clip)
            best.offer(clean, self._score(target, clean))
        moved = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for run in range(self.restarts):
            start = self._start(x, generator) if run > 0 or x_start is None else x_start
            x_adv, backward = self._one_run(target, start, x_inner, best)
            moved = moved | backward.moved
            if self.restarts > 1 or keeps_best:
                best.offer(x_adv, self._score(target, x_adv))
        if self.steps > 0 and zero_gradients is not None:
            zero_gradients.copy_((~moved).sum())
        return in_format_of(x_adv if best.images is None else best.images, x)

    def _one_run(
        self, target: Target, x_start: Tensor, x_inner: Tensor, best: Best
    ) -> tuple[Tensor, ScaledBackward]:
        """K steps from one start."""
        x_adv = target.in_its_format(x_start)
        backward = ScaledBackward(x_adv, self.objective, shared=self.bn != "eval")
        for step in range(self.steps):
            forward = self._forward(target, x_adv)
            if self.keep == "best":  # the logits that the gradient needs also say how good the iterate is
                known = *forward.known(), target.labels
                best.offer(x_adv, score_of(self.objective, *known, len(x_adv)))
            gradient = backward(forward, target.labels, is_last=step == self.steps - 1)
            x_adv = self._step(x_adv, gradient, x_inner)
        return x_adv, backward

    def _attack_until_success(self, target: Target, x: Tensor, x_start: Tensor | None) -> Tensor:
        """The same with the broken images taken out of the batch as they break."""
        if target.labels is not None and len(target.labels) != len(x):
            raise ValueError(
                "early_stop=True goes with labels (N,) and logits (N, C), and not with dense ones"
            )
        x_inner = target.in_its_format(x)
        target = self._with_clean_logits(target, x_inner)
        result = x_inner.clone()
        active = torch.arange(len(x), device=x.device)
        moved = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for _ in range(self.restarts):
            x_left, left = x_inner[active], target.rows(active)
            x_adv = self._start(x_left, self._generator(x.device)) if x_start is None else x_start
            x_start = None  # the first run's alone
            backward = ScaledBackward(x_left, self.objective)
            for step in range(self.steps + 1):
                # The logits that the gradient needs also say which images are broken: no extra forward.
                forward = self._forward(left, x_adv)
                if len(forward.student) != len(x_adv):
                    raise ValueError("early_stop=True goes with logits (N, C), and not with dense ones")
                known = *forward.known(), left.labels
                unbroken = ~self.objective.success(*known)  # type: ignore[attr-defined]
                result[active] = x_adv
                kept = unbroken.nonzero().squeeze(1)
                moved[active] |= backward.moved | ~unbroken
                active = active[kept]
                if step == self.steps or len(kept) == 0:
                    break
                gradient = backward(forward, left.labels, is_last=step == self.steps - 1)
                backward.rows(kept)
                x_left, left = x_left[kept], left.rows(kept)
                x_adv = self._step(x_adv[kept], gradient[kept], x_left)
            if len(active) == 0:
                break
        if self.steps > 0:
            self.zero_gradients = (~moved).sum()
        return in_format_of(result, x)

    def _with_clean_logits(self, target: Target, x: Tensor) -> Target:
        """The target with the logits on clean images in the teacher's place, where the objective wants those."""
        if self._teacher_use(target.teacher) != "clean" or target.teacher_logits is not None:
            return target
        with torch.no_grad():
            logits = logits_of(target.student if target.teacher is None else target.teacher, x)
        return target._replace(teacher=None, teacher_logits=logits)

    def _start(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        # From the caller's x: noise is drawn in memory order, so a seed means one start however x is converted.
        return pgd_start(x, eps=self.eps, init=self.init, norm=self.norm, clip=self.clip, generator=generator)

    def _step(self, x_adv: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
        return pgd_step(
            x_adv, gradient, x, step_size=self.step_size, eps=self.eps, norm=self.norm, clip=self.clip
        )

    def _forward(self, target: Target, x_adv: Tensor) -> Forward:
        side = None
        if self.streams and x_adv.is_cuda:
            side = self._side_streams.setdefault(x_adv.device, torch.cuda.Stream(x_adv.device))
        forward = target.forward(x_adv, self._teacher_use(target.teacher) == "moving", side)
        arguments.check_rows(target, len(x_adv), forward.student, forward.teacher)
        return forward

    @torch.no_grad()
    def _score(self, target: Target, x_adv: Tensor) -> Tensor:
        # Running statistics are the steps' to update, not this look's.
        bn = "batch" if self.bn == "train" else self.bn
        with eval_modes(target.student, target.teacher, bn):
            z_s = logits_of(target.student, x_adv)
            z_t = target.teacher_logits if target.teacher is None else logits_of(target.teacher, x_adv)
        return score_of(self.objective, z_s, z_t, target.labels, len(x_adv))

    # ---- around it -----------------------------------------------------------------------------------------------

    def _captures(self, target: Target, x: Tensor) -> bool:
        return is_captured(self.cuda_graph, (target.student, target.teacher), x)

    def _attack_captured(self, target: Target, x: Tensor, x_start: Tensor | None) -> Tensor:
        networks = target.student, target.teacher
        inputs = x, x_start, target.labels, target.teacher_logits
        generator = self._generator(x.device)

        def capture() -> tuple[CapturedAttack, Tensor]:
            count = torch.zeros((), dtype=torch.int64, device=x.device)

            def attack(x: Tensor, x_start: Tensor | None, *known: Tensor | None) -> Tensor:
                return self._attack(Target(*networks, *known), x, x_start, generator, count)

            return CapturedAttack(attack, networks, inputs, generator), count

        captured, count = self._graphs.get(capture_key(networks, inputs), capture)
        result: Tensor = captured(inputs)
        self.zero_gradients = count.clone()
        return result

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
