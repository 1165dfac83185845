#!/usr/bin/env bash
# What the cross-entropy attacks of pyautoattack (APGD-CE), torchattacks (PGD) and foolbox (LinfPGD) find depends on the
# unit of the logits, which changes no decision. Multiply a network's last layer by 1000: the softmax becomes 0 and 1 in
# float32, the gradient of the cross-entropy exactly 0, its sign 0, and the image is never moved: what the random start
# does not break stays. A network that each of them breaks completely is then reported as robust, without a word.
#
# The network here is one linear layer; each image can be broken by less than half of the radius, in closed form.
# Met with torch 2.14.1, pyautoattack 0.2.0, torchattacks 3.5.1, foolbox 3.3.4. Fails if one of them changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.14.1" "torchvision==0.29.1" \
    "pyautoattack==0.2.0" "torchattacks==3.5.1" "foolbox==3.3.4"
cat > "$folder/units.py" <<'PY'
import sys
from importlib.metadata import version

import foolbox
import torch
import torchattacks
from pyautoattack.autopgd_base import APGDAttack

EPS, STEPS, CLASSES, SIDE = 0.1, 20, 4, 8
torch.manual_seed(0)
x = 0.5 + 0.05 * torch.randn(64, 1, SIDE, SIDE)
halves = torch.cat([torch.ones(SIDE * SIDE // 2), -torch.ones(SIDE * SIDE // 2)])
directions = torch.stack([halves[torch.randperm(SIDE * SIDE)] for _ in range(CLASSES)])


def network(unit):
    linear = torch.nn.Linear(SIDE * SIDE, CLASSES, bias=False)
    linear.weight.data = unit * directions
    return torch.nn.Sequential(torch.nn.Flatten(), linear).eval()


y = network(1)(x).argmax(1)
logits = network(1)(x).detach()
runner_up = logits.topk(2).indices[:, 1]
gap = logits.topk(2).values.diff(dim=1).neg().flatten()
slope = (directions[y] - directions[runner_up]).abs().sum(1)
assert (gap / slope).max() < EPS / 2, "every image can be broken within half of the radius"


def apgd(model):
    attack = APGDAttack(model, n_iter=STEPS, norm="Linf", eps=EPS, seed=0, loss="ce", device="cpu")
    return attack.perturb(x, y)


def pgd(model):
    return torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=STEPS, random_start=True)(x, y)


def linf_pgd(model):
    attack = foolbox.attacks.LinfPGD(abs_stepsize=EPS / 4, steps=STEPS, random_start=True)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    return attack(wrapped, x, foolbox.criteria.Misclassification(y), epsilons=[EPS])[1][0]


print("torch", version("torch"))
failed = False
for package, name, attack in (
    ("pyautoattack", "APGD-CE", apgd), ("torchattacks", "PGD", pgd), ("foolbox", "LinfPGD", linf_pgd)
):
    left = {}
    for unit in (1.0, 1e3, 1e6):
        torch.manual_seed(0)
        left[unit] = 100 * float((network(1)(attack(network(unit))).argmax(1) == y).float().mean())
    print(f"{package} {version(package)} {name}: " + ", ".join(f"{v:.0f} % left in unit {u:g}" for u, v in left.items()))
    failed |= not (left[1.0] < 5 and left[1e6] > 30)
if failed:
    sys.exit("changed: the attacks broke everything in unit 1, and only what a random start finds in unit 1e6")
print("the same network, in a larger unit, is reported as robust")
PY
"$folder/venv/bin/python" "$folder/units.py"
