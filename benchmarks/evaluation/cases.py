"""Networks and images to evaluate: adversarially trained a little, so that some images are robust and some are not."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

import torch
from advfunmatch import create_model, load_dataset, load_model
from advfunmatch.data import as_float
from torch import Tensor, nn

from benchmarks.attack.quality import trained_network


@dataclass(frozen=True)
class Case:
    """A network, the images it is attacked on, and how it is trained where no checkpoint is given."""

    model: str
    eps: float
    images: int
    epochs: int
    training_images: int | None
    training_steps: int
    digits: bool = False


CASES = {
    "small_cnn-24": Case("small_cnn-24", 0.15, 360, 20, None, 10, digits=True),
    # Little training, by few steps: it is the attacks that are measured.
    "wrn-16-2": Case("wrn-16-2", 8 / 255, 64, 2, 3000, 2),
    "resnet18": Case("resnet18", 8 / 255, 64, 1, 2000, 1),
}


def network_and_images(case: Case, arguments: Namespace) -> tuple[nn.Module, Tensor, Tensor]:
    """The network in eval mode, and images of the test split; of CIFAR's those that it classifies correctly."""
    name = "digits" if case.digits else arguments.data
    if name is None:
        raise SystemExit(f"--data is missing: {case.model} is measured on CIFAR images, such as folder:DIR")
    model = _network(case, name, arguments)
    wanted = arguments.images or case.images
    test = load_dataset(name, split="test", limit=None if case.digits else 8 * wanted)
    x, y = as_float(test.images), test.labels
    if not case.digits:  # a network that was hardly trained is right about few
        with torch.no_grad():
            right = torch.cat([model(part) for part in x.split(64)]).argmax(1) == y
        x, y = x[right], y[right]
    return model, x[:wanted].contiguous(), y[:wanted].contiguous()


def _network(case: Case, data: str, arguments: Namespace) -> nn.Module:
    if arguments.checkpoint:
        return load_model(arguments.checkpoint).eval().requires_grad_(False)
    channels = 1 if case.digits else 3
    if arguments.weights:
        model = create_model(case.model, num_classes=10, in_channels=channels)
        model.load_state_dict(torch.load(arguments.weights, weights_only=True))
    else:
        train = load_dataset(data, split="train", limit=case.training_images)
        model = trained_network(
            case.epochs, name=case.model, data=train, eps=case.eps, steps=case.training_steps
        )
    if arguments.save:
        torch.save(model.state_dict(), arguments.save)
    return model.eval().requires_grad_(False)
