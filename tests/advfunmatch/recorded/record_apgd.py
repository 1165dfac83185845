"""Records trajectories of the published APGD in float64: ``python tests/advfunmatch/recorded/record_apgd.py``.

Needs pyautoattack 0.2.0. Writes apgd.npz beside this file: a small network, images and labels, and for each run the
random numbers of its start, every point that was evaluated (its product with fixed weights, one number an image), the
last misclassified point, and whether there was one.
"""

from pathlib import Path

import numpy as np
import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

torch.set_default_dtype(torch.float64)  # of the published code's own arrays

IMAGES, SHAPE, HIDDEN, CLASSES = 5, (3, 2, 2), 16, 10
EPS = {"linf": 0.1, "l2": 0.25}
#: name -> norm, loss, steps, rank of the target. A start's seed is its place here.
RUNS = {
    "ce_linf": ("linf", "ce", 100, 0),
    "ce_l2": ("l2", "ce", 100, 0),
    "ce_linf_short": ("linf", "ce", 17, 0),
    "dlr_linf": ("linf", "dlr", 100, 0),
    "dlr_l2": ("l2", "dlr", 100, 0),
    "dlr_targeted_linf": ("linf", "dlr_targeted", 100, 2),
    "dlr_targeted_l2": ("l2", "dlr_targeted", 100, 4),
}


def main() -> None:
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    first, second = 0.9 * draw(12, HIDDEN), 0.9 * draw(HIDDEN, CLASSES)
    x = torch.rand(IMAGES, *SHAPE, generator=generator)
    weights = draw(12)
    weights /= weights.abs().sum()  # so that a product differs no more than a pixel
    evaluated: list[torch.Tensor] = []

    def network(images: torch.Tensor) -> torch.Tensor:
        evaluated.append((images.detach().flatten(1) @ weights).clone())
        return torch.tanh(images.flatten(1) @ first) @ second

    y = network(x).argmax(1)
    arrays = {"first": first, "second": second, "x": x, "y": y, "weights": weights}
    for seed, (name, (norm, loss, steps, rank)) in enumerate(RUNS.items()):
        kind = APGDAttack_targeted if rank else APGDAttack
        options = {} if rank else {"loss": loss}
        attack = kind(network, n_iter=steps, norm=norm.capitalize(), eps=EPS[norm], seed=0, **options)
        attack.init_hyperparam(x)
        if rank:
            attack.y_target = network(x).sort(dim=1)[1][:, -rank]
            arrays[f"{name}/targets"] = attack.y_target
        torch.manual_seed(seed)
        arrays[f"{name}/noise"] = (torch.rand if norm == "linf" else torch.randn)(x.shape)
        torch.manual_seed(seed)
        evaluated.clear()
        _, accurate, _, x_hit = (part.detach() for part in attack.attack_single_run(x, y))
        arrays[f"{name}/points"] = torch.stack(evaluated)
        arrays[f"{name}/x_hit"], arrays[f"{name}/hit"] = x_hit, ~accurate
        print(name, (~accurate).tolist())
    path = Path(__file__).with_name("apgd.npz")
    np.savez_compressed(
        path, **{key.replace("/", "."): value.detach().numpy() for key, value in arrays.items()}
    )
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
