"""``vjp``: logits, and the gradients by the images, of networks prepared and not."""

from __future__ import annotations

import pytest
import torch
from advfunmatch import create_model
from advfunmatch.lean import prepare_for_attack, vjp
from torch import nn


def expected(network: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.detach().clone().requires_grad_(True)
    logits = network(leaf)
    return logits.detach(), torch.autograd.grad(logits, leaf, grad)[0]


@pytest.mark.parametrize("prepared", [False, True])
def test_vjp_is_autograds_and_leaves_no_trace(prepared):
    torch.manual_seed(0)
    live = create_model("small_cnn", num_classes=5, in_channels=1).eval().double()
    network = prepare_for_attack(live) if prepared else live
    x, grads = torch.rand(3, 1, 8, 8, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with context:
            logits, pullback = vjp(network, x)
            pulled = [pullback(grad) for grad in (*grads, grads[0])]
        assert not logits.requires_grad
        for grad, got in zip((*grads, grads[0]), pulled, strict=True):
            want_logits, want = expected(live, x, grad)
            torch.testing.assert_close(logits, want_logits, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert all(parameter.grad is None for parameter in live.parameters())
    assert not x.requires_grad


def test_a_gradient_of_another_shape_is_refused():
    _, pullback = vjp(nn.Linear(3, 2), torch.rand(4, 3))
    with pytest.raises(ValueError, match=r"grad_logits must have the logits' shape \(4, 2\), got \(4, 3\)"):
        pullback(torch.rand(4, 3))


def test_a_prepared_networks_own_pullback_refuses_it_too_and_its_hooks_are_run():
    prepared = prepare_for_attack(create_model("small_cnn-24", num_classes=5, in_channels=1).eval())
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        want = prepared(x)
    logits, pullback = vjp(prepared, x)
    torch.testing.assert_close(logits, want)
    with pytest.raises(ValueError, match="grad_logits must have the logits' shape"):
        pullback(logits[:2])
    hook = prepared.register_forward_hook(lambda module, args, out: 2 * out)
    twice, pullback_twice = vjp(prepared, x)
    hook.remove()
    torch.testing.assert_close(twice, 2 * logits)
    torch.testing.assert_close(pullback_twice(logits), 2 * pullback(logits))


def test_logits_that_do_not_depend_on_the_images_have_no_gradient():
    class Steps(nn.Module):
        def forward(self, x):
            return (x > 0.5).float()

    logits, pullback = vjp(Steps(), torch.rand(4, 3))
    with pytest.raises(ValueError, match="do not depend on x differentiably"):
        pullback(torch.ones_like(logits))
