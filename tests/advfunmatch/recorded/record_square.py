"""Records trajectories of the published Square Attack in float64.

``python tests/advfunmatch/recorded/record_square.py``
Needs pyautoattack 0.2.0. Writes square.npz beside this file: a small network, images and labels, and for each run the
random numbers of its start and its queries (squares' places, whether they are turned, colours), every point that was
asked for (its product with fixed weights, one number an image), and the last points.
"""

from pathlib import Path

import numpy as np
import torch
from pyautoattack.square import SquareAttack

torch.set_default_dtype(torch.float64)  # of the published code's own arrays
as_double = torch.Tensor.double
torch.Tensor.float = as_double  # it takes flags to float32

IMAGES, SHAPE, HIDDEN, CLASSES, QUERIES = 5, (2, 10, 10), 8, 6, 110
EPS = {"linf": 0.05, "l2": 0.3}


class Network:
    def __init__(self, generator: torch.Generator) -> None:
        size = int(np.prod(SHAPE))
        self.first = 0.4 * torch.randn(size, HIDDEN, generator=generator)
        self.second = 0.4 * torch.randn(HIDDEN, CLASSES, generator=generator)
        self.weights = torch.randn(size, generator=generator)
        self.weights /= self.weights.abs().sum()  # so that a product differs no more than a pixel
        self.points: list[torch.Tensor] = []
        self.answers: list[torch.Tensor] = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.points.append(images.flatten(1) @ self.weights)
        logits = torch.tanh(images.flatten(1) @ self.first) @ self.second
        self.answers.append(logits.clone())  # the published code writes to what it is given
        return logits


def main() -> None:
    generator = torch.Generator().manual_seed(5)
    network, x = Network(generator), torch.rand(IMAGES, *SHAPE, generator=generator)
    y = network(x).argmax(1)
    arrays = {"first": network.first, "second": network.second, "weights": network.weights, "x": x, "y": y}
    for norm, eps in EPS.items():
        arrays |= {f"{norm}/{key}": value for key, value in recorded(network, x, y, norm, eps).items()}
    path = Path(__file__).with_name("square.npz")
    np.savez_compressed(path, **{key.replace("/", "."): value.numpy() for key, value in arrays.items()})
    print(path, path.stat().st_size)


def recorded(
    network: Network, x: torch.Tensor, y: torch.Tensor, norm: str, eps: float
) -> dict[str, torch.Tensor]:
    attack = SquareAttack(network, norm=norm.capitalize(), n_queries=QUERIES, eps=eps, resc_schedule=False)
    attack.init_hyperparam(x)
    drawn: list[torch.Tensor] = []
    rand = torch.rand

    def watched(*args: object) -> torch.Tensor:
        drawn.append(rand(*args))
        return drawn[-1]

    torch.manual_seed(3)
    network.points.clear()
    network.answers.clear()
    torch.rand = watched
    try:
        _, best = attack.attack_single_run(x, y)
    finally:
        torch.rand = rand
    print(norm, (network(best).argmax(1) == y).tolist(), len(drawn))
    images, channels, _, width = x.shape
    if norm == "linf":
        start = {"stripes": torch.sign(2 * drawn.pop(0) - 1)}
    else:
        tiles = (width // (width // 5)) ** 2
        pairs = [(drawn.pop(0), drawn.pop(0)) for _ in range(tiles)]
        start = {
            "turns": torch.cat([turn for turn, _ in pairs]),
            "stripes": torch.sign(2 * torch.stack([sign for _, sign in pairs], 1) - 1),
        }
    each = 3 if norm == "linf" else 6
    queries = [drawn[k : k + each] for k in range(0, len(drawn), each)]
    colours, left = torch.zeros(images, len(queries), channels), torch.arange(images)
    left = left[margin(network.answers[0], y) > 0]
    for query, numbers in enumerate(queries):
        # One colour for all in "linf"; otherwise one for each image that still takes part.
        colours[left, query] = torch.sign(2 * numbers[-1] - 1).view(-1, channels)
        left = left[margin(network.answers[1 + query], y[left]) > 0]
    return start | {
        "places": torch.stack([torch.cat(numbers[:-1]) for numbers in queries]),
        "colours": colours,
        "points": torch.cat(network.points[: 1 + len(queries)]),
        "best": best,
    }


def margin(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    own = logits.gather(1, y[:, None])
    return (own - logits.scatter(1, y[:, None], -torch.inf)).amin(1)


if __name__ == "__main__":
    main()
