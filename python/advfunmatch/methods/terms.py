"""What the methods' losses are made of: the logits of both networks on one batch, and the terms on them.

S is the student, T the teacher, x the images, x' the adversarial ones, and KL(a‖b) the divergence between softmaxes.
Nothing is computed that a loss does not ask for, so a term of weight zero costs nothing.

Note [Loss arithmetic]
~~~~~~~~~~~~~~~~~~~~~~
Networks may answer in half precision; what a loss computes from their answers is float32 at least, which `Logits` sees
to for every loss. Where a term needs 1 − p of a probability near 1, it takes it from the class's log-odds, in which
nothing cancels: p = σ(m), 1 − p = σ(−m), log p = log σ(m).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afm_kernels import distillation_loss, softmax_kl_div

from ..config import TrainConfig
from ..data import UNLABELLED
from ..errors import one_of
from ..models import logits_in
from .features import Layers, features_of

Network = Callable[[Tensor], Any]


class Logits:
    """What both networks say about one batch; each runs on each input once, when a loss first asks for it.

    Logits are float32 at least, whatever the network computes in: see Note [Loss arithmetic].

    Args:
        student, teacher: the networks; of one that answers with an object, its ``logits`` are taken.
        x: clean images (N, C, H, W).
        labels: (N,), integers of any width, int64 from then on; −1 for an image without one.
        epoch: counted from 0.
        layers: whose outputs are kept for `features`.

    Attributes:
        x_adv: adversarial images like x; x itself for a method without an attack.
        student_clean, student_adv, teacher_clean, teacher_adv: logits (N, classes); the teacher's without a graph.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | None,
        x: Tensor,
        labels: Tensor,
        epoch: int,
        layers: Layers | None = None,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.x, self.x_adv, self.labels, self.epoch = x, x, labels.long(), epoch
        self._layers = layers or {}
        self._modules: dict[str, Any] = {"student": student, "teacher": teacher}
        self._features: dict[str, dict[str, Tensor]] = {}

    def for_student(self, student: Network) -> Logits:
        """The same batch for another function of the same student; what the teacher said is kept."""
        other = Logits(student, self.teacher, self.x, self.labels, self.epoch, self._layers)
        other.x_adv, other._modules = self.x_adv, self._modules
        kept = ("teacher_clean", "teacher_adv")
        other.__dict__.update({name: value for name, value in self.__dict__.items() if name in kept})
        other._features = {name: found for name, found in self._features.items() if name in kept}
        return other

    def features(self, of: str) -> dict[str, Tensor]:
        """The outputs of the layers that the method names, by name.

        Args:
            of: ``"student_clean"``, ``"student_adv"``, ``"teacher_clean"`` or ``"teacher_adv"``: the forward that gave
                them, the same that gave the logits.

        Raises:
            InputError: one of the layers is none of the network's, or cannot be kept; see ``features``.
        """
        if of not in FORWARDS:
            raise one_of("features", of, FORWARDS)
        getattr(self, of)
        return self._features[of]

    @cached_property
    def student_clean(self) -> Tensor:
        return self._student(self.x, "student_clean")

    @cached_property
    def student_adv(self) -> Tensor:
        return self._student(self.x_adv, "student_adv")

    @cached_property
    def teacher_clean(self) -> Tensor:
        return self._teacher(self.x, "teacher_clean")

    @cached_property
    def teacher_adv(self) -> Tensor:
        return self._teacher(self.x_adv, "teacher_adv")

    def _student(self, x: Tensor, name: str) -> Tensor:
        return self._logits("student", self.student, x, name)

    @torch.no_grad()
    def _teacher(self, x: Tensor, name: str) -> Tensor:
        if self.teacher is None:
            raise RuntimeError("a loss that matches a teacher was called without one")
        return self._logits("teacher", self.teacher, x, name)

    def _logits(self, side: str, network: Network, x: Tensor, name: str) -> Tensor:
        with features_of(self._modules[side], self._layers.get(side, ()), side) as found:
            logits = logits_in(network(x))
        self._features[name] = found
        return _wide(logits)


FORWARDS = ("student_clean", "student_adv", "teacher_clean", "teacher_adv")
# Of `Logits`, the resolved `TrainConfig`, and a method's own settings.
Loss = Callable[..., Tensor]


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _match(student: Tensor, target: Tensor, config: TrainConfig) -> Tensor:
    """KL(target ‖ student) with the settings' temperature, T² and reduction."""
    return softmax_kl_div(
        student,
        target,
        temperature=config.temperature,
        reduction=config.reduction,
        scale_by_t2=config.scale_by_t2,
        dim=1,
    )


def _cross_entropy(logits: Tensor, labels: Tensor, config: TrainConfig) -> Tensor:
    # With alpha = 0 the fused loss is the cross-entropy alone, and looks at no teacher.
    return distillation_loss(
        logits,
        logits.detach(),
        labels,
        alpha=0.0,
        temperature=1.0,
        label_smoothing=config.label_smoothing,
        ignore_index=UNLABELLED,
    )


def cross_entropy_clean(logits: Logits, config: TrainConfig) -> Tensor:
    """CE(S(x), y)."""
    return _cross_entropy(logits.student_clean, logits.labels, config)


def cross_entropy_adversarial(logits: Logits, config: TrainConfig) -> Tensor:
    """CE(S(x'), y)."""
    return _cross_entropy(logits.student_adv, logits.labels, config)


def match_clean(logits: Logits, config: TrainConfig) -> Tensor:
    """KL(T(x) ‖ S(x))."""
    return _match(logits.student_clean, logits.teacher_clean, config)


def match_adversarial(logits: Logits, config: TrainConfig) -> Tensor:
    """KL(T(x') ‖ S(x')), or KL(T(x) ‖ S(x')) where `teacher_input` is clean."""
    adversarial = config.teacher_input == "adversarial"
    target = logits.teacher_adv if adversarial else logits.teacher_clean
    return _match(logits.student_adv, target, config)


def mixed(first: Loss, second: Loss) -> Loss:
    """α of one loss and 1 − α of another; what has no weight is not computed."""

    def loss(logits: Logits, config: TrainConfig) -> Tensor:
        weights = ((config.alpha, first), (1 - config.alpha, second))
        terms = [weight * term(logits, config) for weight, term in weights if weight]
        return sum(terms[1:], terms[0])

    return loss


def trades(logits: Logits, config: TrainConfig) -> Tensor:
    """CE(S(x), y) + β·KL(S(x) ‖ S(x')), with a gradient through both sides of the divergence."""
    clean = logits.student_clean
    robust = _match(logits.student_adv, clean.detach() if config.detach_target else clean, config)
    return cross_entropy_clean(logits, config) + config.beta * robust


def mart(logits: Logits, config: TrainConfig) -> Tensor:
    """Cross-entropy and a margin on x', and the divergence from x where the student is unsure of the label there."""
    wrong = logits.student_adv.detach().scatter(1, logits.labels[:, None], float("-inf")).argmax(1)
    # log(1.0001 - p_wrong + 1e-12) and 1.0000001 - p_label, with the official code's constants.
    margin = (1e-4 + 1e-12 + (-_log_odds(logits.student_adv, wrong)).sigmoid()).log()
    unsure = 1e-7 + (-_log_odds(logits.student_clean, logits.labels)).sigmoid()
    rows = softmax_kl_div(logits.student_adv, logits.student_clean, reduction="none")
    boosted = cross_entropy_adversarial(logits, config) - margin.mean()
    return boosted + config.beta * (rows * unsure).mean()


def iad(logits: Logits, config: TrainConfig) -> Tensor:
    """The match on x', and from `begin_epoch` on the student's own clean outputs where the teacher is not trusted."""
    loss = match_adversarial(logits, config)
    if logits.epoch < config.begin_epoch:
        return loss
    # How far the teacher is not to be trusted on x': 1 minus its probability of the label there, to the power β.
    doubt = -(config.beta * F.logsigmoid(_log_odds(logits.teacher_adv, logits.labels))).expm1()
    own = softmax_kl_div(
        logits.student_adv, logits.student_clean, row_weight=doubt, reduction=config.reduction
    )
    return loss + own


def _log_odds(logits: Tensor, classes: Tensor) -> Tensor:
    """log(p / (1 − p)) of one class of each row."""
    column = classes[:, None]
    others = logits.scatter(1, column, float("-inf")).logsumexp(1)
    return logits.gather(1, column).squeeze(1) - others
