"""Which of the iterates of an image is kept."""

from __future__ import annotations

import torch
from torch import Tensor


class Best:
    """The best images by score of all that were offered; of equals the latest. Reads nothing from the device."""

    def __init__(self) -> None:
        self.images: Tensor | None = None
        self.score: Tensor | None = None

    def offer(self, images: Tensor, score: Tensor) -> None:
        """``score``: one a row, larger is better; a NaN never replaces a number, and any number replaces it."""
        if self.images is None or self.score is None:
            self.images, self.score = images, score
            return
        better = (score >= self.score) | self.score.isnan()
        self.images = torch.where(better.view(-1, *[1] * (images.dim() - 1)), images, self.images)
        self.score = torch.where(better, score, self.score)
