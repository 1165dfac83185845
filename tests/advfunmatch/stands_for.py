"""Whether a prepared network stands for the live one: outputs and input gradients, before and after an update."""

from __future__ import annotations

import copy

import torch
from advfunmatch.lean import PreparedModel, prepare_for_attack
from torch import Tensor, nn

SEED = 0


def settle(model: nn.Module, seed: int = SEED) -> nn.Module:
    """BatchNorms as training leaves them: a fresh one is nearly the identity, and folding it wrong would not show."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.weight is not None:
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.bias.data.normal_(0, 0.3, generator=generator)
    return model.eval()


def out_and_gradient(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    out = model(leaf)
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
    return out.detach(), gradient


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    error = (got.double() - want.double()).abs().max() / want.double().abs().max()
    assert error <= tolerance, f"relative error {error:.3g}, allowed {tolerance}"


def assert_stands_for(model: nn.Module, x: Tensor) -> PreparedModel:
    """1e-10 in float64 in outputs and gradients, 1e-4 in float32 in outputs; before and after an update."""
    model = settle(model.double())
    x = x.double()
    prepared = prepare_for_attack(model)
    half_way = prepare_for_attack(copy.deepcopy(model).float())
    wants = [out_and_gradient(model, x)]
    for got, want in zip(out_and_gradient(prepared, x), wants[0], strict=True):
        assert_near(got, want, 1e-10)
    assert_near(half_way(x.float()), wants[0][0], 1e-4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05).add_(1e-3)
    settle(model, SEED + 1)
    half_way._live[0].load_state_dict(model.state_dict())
    wants.append(out_and_gradient(model, x))
    assert not torch.allclose(wants[0][0], wants[1][0], rtol=1e-3)  # the update is one that shows
    for got, want in zip(out_and_gradient(prepared.refresh_(), x), wants[1], strict=True):
        assert_near(got, want, 1e-10)
    assert_near(half_way.refresh_()(x.float()), wants[1][0], 1e-4)
    return prepared
