"""What networks return: logits, or an object that holds them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def logits_in(output: Any) -> Any:
    """The logits in what a network returned: the ``logits`` of Hugging Face's outputs and of torchvision's Inception.

    What is a tensor already, or has no ``logits``, is returned as it is.
    """
    if isinstance(output, Tensor):
        return output
    return getattr(output, "logits", output)
