"""Weights that a file holds as what they are computed from: pruning, weight norm and spectral norm.

Note [Computed weights]
~~~~~~~~~~~~~~~~~~~~~~~
In eval mode each of these is a function of what is stored, so the plain weight is computed once, as PyTorch would:

    weight_orig, weight_mask                            pruning: their product
    weight_g, weight_v                                  weight norm: v · g / ‖v‖, a norm for each entry of g
    weight_orig, weight_u, weight_v                     spectral norm: W / (uᵀ W v), of the stored u and v
    parametrizations.weight.original0 and .original1    weight norm in torch.nn.utils.parametrizations
    parametrizations.weight.original, .0._u, .0._v      spectral norm there

Other parametrizations are their own code, of which the file holds nothing. HYDRA's scores need the share of the weights
that it kept, which is not in the file either.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..errors import InputError, and_more

SCORES = "popup_scores"
PARAMETRIZED = re.compile(r"(.*?)parametrizations\.(\w+)\.(.+)")
PLAIN = "save the state dict of the network with plain weights"


def with_plain_weights(
    weights: dict[str, Tensor], what: str
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """The entries with every computed weight in place of what it is computed from. See Note [Computed weights].

    Returns:
        The entries, and the names of the weights that were computed, by how.

    Raises:
        InputError: one cannot be computed from what is stored.
    """
    weights = _in_hooks_names(weights, what)
    done: dict[str, list[str]] = {}
    for name in [name.removesuffix("_mask") for name in weights if name.endswith("_mask")]:
        if f"{name}_orig" in weights:
            stored, mask = weights.pop(f"{name}_orig"), weights.pop(f"{name}_mask")
            _require(stored.shape == mask.shape, name, "pruning", what)
            weights[name] = stored * mask.to(stored.dtype)
            done.setdefault("pruning", []).append(name)
    for name in [name.removesuffix("_g") for name in weights if name.endswith("_g")]:
        if f"{name}_v" in weights:
            direction, length = weights.pop(f"{name}_v"), weights.pop(f"{name}_g")
            over = [axis for axis in range(direction.dim()) if not length.dim() or length.shape[axis] == 1]
            fits = length.dim() in (0, direction.dim()) and all(
                length.dim() == 0 or length.shape[axis] in (1, size)
                for axis, size in enumerate(direction.shape)
            )
            _require(fits and direction.is_floating_point(), name, "weight norm", what)
            norm = torch.linalg.vector_norm(direction, dim=over, keepdim=True) if over else direction.abs()
            weights[name] = direction * (length / norm)
            done.setdefault("weight norm", []).append(name)
    for name in [name.removesuffix("_u") for name in weights if name.endswith("_u")]:
        if f"{name}_orig" in weights and f"{name}_v" in weights:
            stored, u, v = (weights.pop(f"{name}_{part}") for part in ("orig", "u", "v"))
            matrix = stored.flatten(1) if stored.dim() > 1 else stored.reshape(0, 0)
            # Of another dimension than the first, as a transposed convolution has it, the file says nothing.
            _require(matrix.shape == (*u.shape, *v.shape), name, "spectral norm", what)
            weights[name] = stored / torch.dot(u, matrix @ v)
            done.setdefault("spectral norm", []).append(name)
    if scores := [name for name in weights if name.rpartition(".")[2] == SCORES]:
        raise InputError(
            f"{what} has {scores[0]!r}{and_more(scores)}, HYDRA's: of each layer only the weights with the highest "
            "scores are used, and how many those are is not in the file; multiply each weight by the mask of the "
            f"pruning rate that it was trained with, and {PLAIN}"
        )
    return weights, done


def _in_hooks_names(weights: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """The entries of torch.nn.utils.parametrizations under the names that the older hooks use for the same."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        if match := PARAMETRIZED.fullmatch(name):
            parts.setdefault(match[1] + match[2], {})[match[3]] = value
    renamed = {name: value for name, value in weights.items() if not PARAMETRIZED.fullmatch(name)}
    for name, stored in parts.items():
        if stored.keys() == {"original0", "original1"}:
            renamed[f"{name}_g"], renamed[f"{name}_v"] = stored["original0"], stored["original1"]
        elif stored.keys() == {"original", "0._u", "0._v"}:
            renamed |= {
                f"{name}_{ours}": stored[theirs] for ours, theirs in (("orig", "original"), ("u", "0._u"))
            }
            renamed[f"{name}_v"] = stored["0._v"]
        else:
            raise InputError(
                f"{what} has {name!r} as a parametrization of {', '.join(map(repr, stored))}, whose code is not in the "
                f"file; call torch.nn.utils.parametrize.remove_parametrizations on it, and {PLAIN}"
            )
    return renamed


def _require(fits: bool, name: str, kind: str, what: str) -> None:
    if not fits:
        raise InputError(f"{what} has {name!r} as the parts of {kind}, whose shapes do not fit; {PLAIN}")
