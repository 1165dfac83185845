"""Accuracy under attack, and fidelity: how far a student is from its teacher, on clean and on mismatched examples.

Every figure is a percentage of, or a mean over, all the images it was given; attacks are the same for every model.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from afm_kernels import softmax_kl_div

from ..attacks import PGDAttack, radius_warnings
from ..config import NORMS, check_radius, check_seed, parse_integer, parse_number
from ..data import ImageDataset, as_float
from ..errors import InputError, one_of
from ..lean import prepare_for_attack
from ..models import require_forward

BATCH_SIZE = 500
MISMATCH_STEPS = 20
MARGIN_FINDS_MORE = 5.0  # percent of the images that only the margin attack breaks, beyond which it is said
MASKING_MARGIN = 1.0  # percentage points by which a weak attack may beat a strong one by chance


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        accuracies: attack name to accuracy in percent.
        agreement: percentage of clean images on which student and teacher predict the same class.
        agreement_mismatched: the same on mismatched examples.
        kl_clean: mean KL(teacher ‖ student) on clean images, in nats.
        kl_mismatched: the same on mismatched examples, found by PGD on that KL through both networks.
        images: number of test images.
        settings: eps, norm, seed and the attacks' parameters.
        per_class: attack name to class name to accuracy in percent.
        attack_seconds: time for each attack.
        zero_gradients: attack name to the number of images whose gradient was exactly zero at every step, so that the
            attack says nothing of them; attacks without such images are left out.
        warnings: what suggests that the figures flatter the model: AutoAttack's own checks, and `masking_warnings`.
    """

    accuracies: dict[str, float]
    images: int
    settings: dict[str, Any]
    agreement: float | None = None
    agreement_mismatched: float | None = None
    kl_clean: float | None = None
    kl_mismatched: float | None = None
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    attack_seconds: dict[str, float] = field(default_factory=dict)
    zero_gradients: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the accuracies at the top level; fidelity is left out where no teacher was given."""
        values = asdict(self)
        accuracies = values.pop("accuracies")
        return accuracies | {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class AttackSettings:
    """What every attack of one evaluation shares; InputError names a value that cannot be."""

    eps: float
    norm: str = "linf"
    seed: int = 0
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise one_of("norm", self.norm, NORMS)
        check_radius(self.eps, self.norm)
        check_seed(self.seed)
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}, but must be at least 1")


def attack_settings(eps: float | str, norm: str, seed: int, batch_size: int) -> AttackSettings:
    """Settings from values as a user writes them; InputError names one that cannot be."""
    return AttackSettings(
        parse_number(eps, "eps"), norm, parse_integer(seed, "seed"), parse_integer(batch_size, "batch_size")
    )


def _clean(model: nn.Module, images: Tensor, labels: Tensor, settings: AttackSettings) -> Tensor:
    return images


class Attacked(NamedTuple):
    """What an attack made of the images, and of how many it never had a gradient."""

    images: Tensor
    zero_gradients: int


def _run_pgd(
    attack: PGDAttack, networks: tuple[nn.Module, nn.Module | None], parts: Iterable[tuple[Tensor, ...]]
) -> Attacked:
    x_adv, zero_gradients = [], []
    for part in parts:
        x_adv.append(attack(*networks, *part))
        zero_gradients.append(attack.zero_gradients)
    return Attacked(torch.cat(x_adv), int(torch.stack(zero_gradients).sum()))  # type: ignore[arg-type]


def _pgd(
    steps: int,
    *,
    objective: str = "cross_entropy",
    fraction: float = 1 / 4,
    init: str = "uniform",
    restarts: int = 1,
) -> Callable[[nn.Module, Tensor, Tensor, AttackSettings], Attacked]:
    def run(model: nn.Module, images: Tensor, labels: Tensor, settings: AttackSettings) -> Attacked:
        attack = PGDAttack(
            objective,
            norm=settings.norm,
            eps=settings.eps,
            step_size=settings.eps * fraction,
            steps=steps,
            init=init,
            restarts=restarts,
            seed=settings.seed,
        )
        parts = zip(images.split(settings.batch_size), labels.split(settings.batch_size), strict=True)
        return _run_pgd(attack, (prepare_for_attack(model), None), parts)

    return run


def _auto_attack(model: nn.Module, images: Tensor, labels: Tensor, settings: AttackSettings) -> Tensor:
    from pyautoattack import AutoAttack

    kwargs: dict[str, Any] = {"version": "standard"}
    num_classes = len(_logits(model, images[:1], 1)[0])
    if num_classes < 4:
        # The targeted DLR loss needs the third and fourth largest logit.
        kwargs = {"version": "custom", "attacks": ["apgd-ce", "fab", "square"]}
    norm = {"linf": "Linf", "l2": "L2"}[settings.norm]
    adversary = AutoAttack(
        model, device=images.device, eps=settings.eps, norm=norm, seed=settings.seed, **kwargs
    )
    targets = min(9, num_classes - 1)
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = targets
    # It draws from PyTorch's default generators, and seeds those of every device; it needs autograd, whoever calls.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.inference_mode(False), torch.random.fork_rng(devices=devices):
        x_adv, _ = adversary.run_standard_evaluation(images, labels, batch_size=settings.batch_size)
    return x_adv


# name -> (what it is, the function that returns the attacked images, and what it knows of their gradients)
ATTACKS: dict[str, tuple[str, Callable[[nn.Module, Tensor, Tensor, AttackSettings], Tensor | Attacked]]] = {
    "clean": ("no attack", _clean),
    "fgsm": ("one step of eps up the cross-entropy", _pgd(1, fraction=1.0, init="zero")),
    "pgd10": ("PGD on cross-entropy, 10 steps of eps/4, uniform start", _pgd(10)),
    "pgd20": ("PGD on cross-entropy, 20 steps of eps/4, uniform start", _pgd(20)),
    "pgd100": (
        "PGD on cross-entropy, 100 steps of eps/10, 5 uniform starts",
        _pgd(100, fraction=1 / 10, restarts=5),
    ),
    "cw": (
        "PGD on the margin of Carlini and Wagner, 100 steps of eps/10",
        _pgd(100, objective="margin", fraction=1 / 10),
    ),
    "autoattack": ("AutoAttack, standard version, through pyautoattack", _auto_attack),
}


def check_attacks(names: Iterable[str]) -> list[str]:
    """The names as a list; InputError for one that is no attack, or for none at all."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise InputError(f"attacks is {names!r}, but must be a list of names")
    names = list(names)
    for name in names:
        if not isinstance(name, str) or name not in ATTACKS:
            raise one_of("attack", name, ATTACKS)
    if not names:
        raise InputError(f"attacks is empty, but must name one or more of: {', '.join(ATTACKS)}")
    return names


def evaluate(
    model: nn.Module,
    data: ImageDataset,
    attacks: Iterable[str],
    *,
    eps: float,
    norm: str = "linf",
    seed: int = 0,
    teacher: nn.Module | None = None,
    batch_size: int = BATCH_SIZE,
) -> Evaluation:
    """Measure a model on every image of `data`.

    Args:
        model: maps images in [0, 1] to logits (N, C), C at least the classes of `data`; it is put into eval mode
            meanwhile.
        data: the images and labels.
        attacks: names in `ATTACKS`.
        eps: radius of the ball of every attack.
        norm: ``"linf"`` or ``"l2"``.
        seed: seeds every attack, so that the same call gives the same figures.
        teacher: measures fidelity to this network too, which has as many logits.
        batch_size: images attacked at a time.

    Returns:
        Accuracies in percent, fidelity where there is a teacher, settings and times.

    Raises:
        InputError: for an unknown attack, a setting that cannot be, data without images or with labels that are no
            classes, or a network that does not take these images or does not return such logits.
    """
    attacks = check_attacks(attacks)
    settings = attack_settings(eps, norm, seed, batch_size)
    _check_arguments(model, data, teacher)
    data = data.to(_device_of(model, data))
    images, labels = as_float(data.images), data.labels
    described: dict[str, Any] = {"eps": settings.eps, "norm": norm, "seed": settings.seed}
    described["attacks"] = {name: ATTACKS[name][0] for name in attacks}
    result = Evaluation({}, len(data), described, warnings=radius_warnings(norm, settings.eps))
    standing: dict[str, Tensor] = {}
    with _frozen(model), _frozen(teacher), _autoattack_warnings(result.warnings), _radius_is_said():
        ours = require_forward(model, data, "model")
        if teacher is not None and (theirs := require_forward(teacher, data, "teacher")) != ours:
            raise InputError(
                f"teacher returns {theirs} logits, but model {ours}, and only equal numbers can be compared"
            )
        for name in attacks:
            started = time.perf_counter()
            x_adv = _take_images(result, name, ATTACKS[name][1](model, images, labels, settings))
            logits = _logits(model, x_adv, settings.batch_size)
            if broken := int((~logits.isfinite().all(1)).sum()):
                result.warnings.append(f"{name}: the logits of {broken} images are not finite")
            correct = logits.argmax(1) == labels
            standing[name] = correct
            result.accuracies[name] = _percent(correct)
            result.per_class[name] = _per_class(correct, labels, data.class_names)
            result.attack_seconds[name] = round(time.perf_counter() - started, 3)
        if teacher is not None:
            _measure_fidelity(result, model, teacher, images, settings)
    result.warnings = list(dict.fromkeys(result.warnings)) + masking_warnings(result.accuracies)
    result.warnings += margin_warnings(standing)
    return result


def _take_images(result: Evaluation, name: str, attacked: Tensor | Attacked) -> Tensor:
    """The attacked images, with a note of those that were not attacked at all."""
    if not isinstance(attacked, Attacked):
        return attacked
    if attacked.zero_gradients:
        result.zero_gradients[name] = attacked.zero_gradients
        result.warnings.append(
            f"{name}: the gradient of {attacked.zero_gradients} of {result.images} images was exactly zero at every "
            "step, so they have not been attacked"
        )
    return attacked.images


def margin_warnings(standing: dict[str, Tensor]) -> list[str]:
    """Sentences about margin PGD breaking many images that cross-entropy PGD leaves.

    ``standing``: attack name to a bool for each image, whether it is still classified correctly.

    >>> margin_warnings({"pgd20": torch.tensor([True, True]), "cw": torch.tensor([True, False])})
    ['cw breaks 50 % of the images that pgd20 leaves: cross-entropy PGD is not what this network is weakest against']
    """
    weak = next((name for name in ("pgd100", "pgd20", "pgd10") if name in standing), None)
    if weak is None or "cw" not in standing:
        return []
    more = _percent(standing[weak] & ~standing["cw"])
    if more <= MARGIN_FINDS_MORE:
        return []
    return [
        f"cw breaks {more:g} % of the images that {weak} leaves: cross-entropy PGD is not what this network is weakest "
        "against"
    ]


def masking_warnings(accuracies: dict[str, float]) -> list[str]:
    """Sentences about accuracies that suggest masked gradients (Athalye et al. 2018): weak attacks beating strong ones.

    >>> masking_warnings({"pgd20": 60.0, "pgd100": 59.5})
    []
    """
    found = []
    for weak, strong, why in (
        ("fgsm", "pgd20", "one step does more than twenty, so gradients may be masked"),
        ("fgsm", "pgd10", "one step does more than ten, so gradients may be masked"),
    ):
        if (
            weak in accuracies
            and strong in accuracies
            and accuracies[weak] < accuracies[strong] - MASKING_MARGIN
        ):
            found.append(f"{weak} leaves {accuracies[weak]:g} % but {strong} {accuracies[strong]:g} %: {why}")
    for first, second, why in (
        ("pgd20", "pgd100", "PGD-20 has not converged, so its figure says little"),
        ("pgd100", "autoattack", "AutoAttack finds much that PGD cannot, so gradients may be masked"),
        ("pgd20", "autoattack", "AutoAttack finds much that PGD cannot, so gradients may be masked"),
    ):
        limit = 2 * MASKING_MARGIN if second == "pgd100" else 5 * MASKING_MARGIN
        if first in accuracies and second in accuracies and accuracies[first] > accuracies[second] + limit:
            found.append(
                f"{first} leaves {accuracies[first]:g} % but {second} {accuracies[second]:g} %: {why}"
            )
    return found


def attack_images(
    name: str,
    model: nn.Module,
    data: ImageDataset,
    *,
    eps: float,
    norm: str = "linf",
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """The images of `data` after the attack of that name in `ATTACKS`, float32 in [0, 1]."""
    check_attacks([name])
    settings = attack_settings(eps, norm, seed, batch_size)
    _check_arguments(model, data)
    data = data.to(_device_of(model, data))
    with _frozen(model), _autoattack_warnings([]):
        require_forward(model, data, "model")
        attacked = ATTACKS[name][1](model, as_float(data.images), data.labels, settings)
        return attacked.images if isinstance(attacked, Attacked) else attacked


def mismatched_examples(
    model: nn.Module, teacher: nn.Module, images: Tensor, *, eps: float, norm: str, seed: int, batch_size: int
) -> Tensor:
    """Images in the ball on which KL(teacher ‖ model) is largest, as far as PGD finds them: of each image's iterates,
    its start and itself the best."""
    return _mismatched(model, teacher, images, AttackSettings(eps, norm, seed, batch_size)).images


def _mismatched(model: nn.Module, teacher: nn.Module, images: Tensor, settings: AttackSettings) -> Attacked:
    attack = PGDAttack(
        "mismatch",
        norm=settings.norm,
        eps=settings.eps,
        step_size=settings.eps / 4,
        steps=MISMATCH_STEPS,
        seed=settings.seed,
    )
    networks = prepare_for_attack(model), prepare_for_attack(teacher)
    return _run_pgd(attack, networks, ((x,) for x in images.split(settings.batch_size)))


def _measure_fidelity(
    result: Evaluation, model: nn.Module, teacher: nn.Module, images: Tensor, settings: AttackSettings
) -> None:
    mismatched = _take_images(result, "mismatched", _mismatched(model, teacher, images, settings))
    result.settings["mismatched"] = (
        f"PGD on KL(teacher ‖ student), {MISMATCH_STEPS} steps of eps/4, gaussian start, each image's best iterate"
    )
    agrees, kl = [], []
    for x in (images, mismatched):
        ours, theirs = _logits(model, x, settings.batch_size), _logits(teacher, x, settings.batch_size)
        agrees.append(ours.argmax(1) == theirs.argmax(1))
        kl.append(softmax_kl_div(ours.double(), theirs.double(), reduction="none"))
    # Which is best was decided by the prepared networks; by these an image itself may be better by a rounding.
    clean_is_best = kl[0] > kl[1]
    result.agreement, result.kl_clean = _percent(agrees[0]), float(kl[0].mean())
    result.agreement_mismatched = _percent(torch.where(clean_is_best, agrees[0], agrees[1]))
    result.kl_mismatched = float(torch.where(clean_is_best, kl[0], kl[1]).mean())


@contextmanager
def _radius_is_said() -> Iterator[None]:
    """The attacks' own warnings about their radius are among the result's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="eps=.* is a radius of linf attacks")
        yield


def _check_arguments(model: nn.Module, data: ImageDataset, teacher: nn.Module | None = None) -> None:
    """InputError for what is no network, and for data that nothing can be measured on."""
    for what, network in (("model", model), ("teacher", teacher)):
        if not isinstance(network, nn.Module) and (what == "model" or network is not None):
            raise InputError(f"{what} is of type {type(network).__name__}, but must be a torch.nn.Module")
    if not isinstance(data, ImageDataset):
        raise InputError(
            f"data is of type {type(data).__name__}, but must be an ImageDataset, as load_dataset reads it"
        )
    if not len(data):
        raise InputError(f"data {data.name!r} has no images")
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0 or high >= data.num_classes:
        raise InputError(
            f"data {data.name!r} has labels from {low} to {high}, but only {data.num_classes} class names"
        )


def _device_of(model: nn.Module, data: ImageDataset) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), data.images.device)


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    return torch.cat([model(x) for x in images.split(batch_size)])


def _percent(flags: Tensor) -> float:
    return round(100 * float(flags.double().mean()), 2)


def _per_class(correct: Tensor, labels: Tensor, class_names: Sequence[str]) -> dict[str, float]:
    present = [label for label in range(len(class_names)) if bool((labels == label).any())]
    return {class_names[label]: _percent(correct[labels == label]) for label in present}


@contextmanager
def _frozen(model: nn.Module | None) -> Iterator[None]:
    """In eval mode and without parameter gradients for a while."""
    if model is None:
        yield
        return
    # Module by module, for a network may keep some, such as its batch norms, in eval mode while the rest is trained.
    # What was frozen in TorchScript has no modes any more.
    training = [module for module in model.modules() if getattr(module, "training", False)]
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for module in training:
        module.training = False
    for parameter in moving:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in moving:
            parameter.requires_grad_(True)


@contextmanager
def _autoattack_warnings(into: list[str]) -> Iterator[None]:
    """Collect what AutoAttack warns about (masked gradients, randomised outputs) instead of printing it."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            into.append(record.getMessage())

    logger, handler = logging.getLogger("auto-attack"), Collector(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
