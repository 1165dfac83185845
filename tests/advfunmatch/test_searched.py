"""What an attack sees of a network: counted passes, logits that an attack can decide on."""

from __future__ import annotations

import pytest
import torch
from advfunmatch import create_model, prepare_for_attack
from advfunmatch.attacks.searched import Searched


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_passes_are_counted_and_logits_are_wide(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = create_model("small_cnn", num_classes=10, in_channels=1).to(dtype).eval()
    searched = Searched(prepare_for_attack(network))
    x = torch.rand(6, 1, 8, 8)
    logits = searched.logits(x)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not logits.requires_grad
    again, pullback = searched.vjp(x[:4])
    assert torch.equal(again.argmax(1), logits[:4].argmax(1))
    grads = [pullback(torch.ones_like(again)), pullback(2 * torch.ones_like(again))]
    assert grads[0].shape == (4, 1, 8, 8)
    assert grads[0].dtype == torch.float32
    torch.testing.assert_close(2 * grads[0], grads[1], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert (searched.forwards, searched.backwards) == (10, 8)
    assert searched.seconds > 0
