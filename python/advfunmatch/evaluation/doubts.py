"""What suggests that figures flatter a network: weak attacks that beat strong ones, and what only the margin breaks."""

from __future__ import annotations

from torch import Tensor

from .networks import percent

MARGIN_FINDS_MORE = 5.0  # percent of the images that only the margin attack breaks, beyond which it is said
MARGIN_PGD = ("cw_pgd", "cw")  # one attack, under its name and under its earlier one
MASKING_MARGIN = 1.0  # percentage points by which a weak attack may beat a strong one by chance


def margin_warnings(standing: dict[str, Tensor]) -> list[str]:
    """Sentences about margin PGD breaking many images that cross-entropy PGD leaves.

    ``standing``: attack name to a bool for each image, whether it is still classified correctly.

    >>> from torch import tensor
    >>> margin_warnings({"pgd20": tensor([True, True]), "cw_pgd": tensor([True, False])})[0]
    'cw_pgd breaks 50 % of the images that pgd20 leaves: cross-entropy PGD is not what this network is weakest against'
    """
    weak = next((name for name in ("pgd100", "pgd20", "pgd10") if name in standing), None)
    margin = next((name for name in MARGIN_PGD if name in standing), None)
    if weak is None or margin is None:
        return []
    more = percent(standing[weak] & ~standing[margin])
    if more <= MARGIN_FINDS_MORE:
        return []
    return [
        f"{margin} breaks {more:g} % of the images that {weak} leaves: cross-entropy PGD is not what this network "
        "is weakest against"
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
