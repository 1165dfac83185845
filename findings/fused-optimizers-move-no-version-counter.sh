#!/usr/bin/env bash
# torch's fused optimizers (fused=True, on CPUs too) update parameters without moving their version counters; the
# foreach and the plain ones move them. So autograd's check of tensors that were changed in place after a forward does
# not see a fused step: a backward through the old graph uses the new weights, without the RuntimeError that the other
# implementations of the same optimizer bring. Whatever watches `_version` to know that weights changed misses it too.
#
# Met with torch 2.14.1, SGD, Adam, AdamW and Adagrad. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.14.1" "numpy"
cat > "$folder/fused.py" <<'PY'
import sys

import torch

KINDS = {"plain": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def step_and_backward(optimizer, kind):
    """How far the counter moves in a step, and what a backward through the graph of before does."""
    weight = torch.nn.Parameter(torch.full((3,), 2.0))
    x = torch.ones(3, requires_grad=True)
    loss = (weight * x).sum()
    weight.grad = torch.ones(3)
    before = weight._version
    getattr(torch.optim, optimizer)([weight], lr=0.5, **KINDS[kind]).step()
    assert float(weight.detach()[0]) != 2.0
    moved = weight._version - before
    try:
        loss.backward()
    except RuntimeError:
        return moved, "RuntimeError"
    return moved, "gradient of x is that of the forward" if float(x.grad[0]) == 2.0 else "gradient of x is of the new weights"


print("torch", torch.__version__)
failed = False
for optimizer in ("SGD", "Adam", "AdamW", "Adagrad"):
    for kind in KINDS:
        moved, said = step_and_backward(optimizer, kind)
        print(f"{optimizer:<8} {kind:<8} version counter +{moved}; backward through the forward of before: {said}")
        failed |= (moved > 0, said) != ((False, "gradient of x is of the new weights") if kind == "fused" else (True, "RuntimeError"))
if failed:
    sys.exit("changed: fused steps moved no version counter, and the others did")
print("a fused step leaves no trace that autograd could see")
PY
"$folder/venv/bin/python" "$folder/fused.py"
