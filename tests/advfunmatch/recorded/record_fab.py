"""Records trajectories of the published FAB in float64: ``python tests/advfunmatch/recorded/record_fab.py``.

Needs pyautoattack 0.2.0. Writes fab.npz beside this file: a small network, images and labels, and for each run the
point that each step led to (its product with fixed weights, one number an image), the nearest misclassified point, and
the random numbers of a restart's start.
"""

from pathlib import Path

import numpy as np
import torch
from pyautoattack.fab_pt import FABAttack_PT

torch.set_default_dtype(torch.float64)  # of the published code's own arrays
torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]  # which makes its images, and flags, float32

IMAGES, SHAPE, HIDDEN, CLASSES, STEPS = 6, (3, 2, 2), 16, 10, 100
EPS = {"linf": 0.1, "l2": 0.25}
#: name -> norm, rank of the target or 0 for none, whether it starts at random.
RUNS = {
    "untargeted_linf": ("linf", 0, False),
    "untargeted_l2": ("l2", 0, False),
    "targeted_linf": ("linf", 2, False),
    "targeted_l2": ("l2", 4, False),
    "restart_linf": ("linf", 3, True),
    "restart_l2": ("l2", 2, True),
}


def main() -> None:
    generator = torch.Generator().manual_seed(12)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    first, second = 0.9 * draw(12, HIDDEN), 0.9 * draw(HIDDEN, CLASSES)
    x = torch.rand(IMAGES, *SHAPE, generator=generator)
    weights = draw(12)
    weights /= weights.abs().sum()  # so that a product differs no more than a pixel
    labelled: list[torch.Tensor] = []

    def network(images: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            labelled.append((images.detach().flatten(1) @ weights).clone())
        return torch.tanh(images.flatten(1) @ first) @ second

    y = network(x).argmax(1)
    arrays = {"first": first, "second": second, "x": x, "y": y, "weights": weights}
    for seed, (name, (norm, rank, random)) in enumerate(RUNS.items()):
        attack = FABAttack_PT(network, norm=norm.capitalize(), n_iter=STEPS, eps=EPS[norm])
        attack.target_class = rank
        torch.manual_seed(seed)
        if random:
            arrays[f"{name}/noise"] = (torch.rand if norm == "linf" else torch.randn)(x.shape)
        if rank:
            arrays[f"{name}/targets"] = network(x).sort(dim=-1)[1][:, -rank]
        torch.manual_seed(seed)
        labelled.clear()
        with torch.no_grad():
            nearest = attack.attack_single_run(x, y, use_rand_start=random, is_targeted=bool(rank))
        arrays[f"{name}/points"] = torch.stack(labelled[-STEPS:])
        arrays[f"{name}/nearest"] = nearest
        print(name, (nearest != x).flatten(1).any(1).tolist())
    path = Path(__file__).with_name("fab.npz")
    np.savez_compressed(
        path, **{key.replace("/", "."): value.detach().numpy() for key, value in arrays.items()}
    )
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
