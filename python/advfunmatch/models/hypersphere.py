"""The last layer of Pang et al. (2020), "Boosting Adversarial Training with Hypersphere Embedding"."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Hypersphere(nn.Linear):
    """``scale`` times the cosine between the features (N, in_features) and each class's weight; no bias.

    The official code writes the normalised weight back at every forward; here the stored one keeps its length, which
    changes no logit.
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 1.0) -> None:
        super().__init__(in_features, num_classes, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.scale * F.normalize(x), F.normalize(self.weight))
