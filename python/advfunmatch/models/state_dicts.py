"""Weights in the field's usual state dicts, put into a network: what others wrap around the same tensors.

Note [Whose entries]
~~~~~~~~~~~~~~~~~~~~
A network's entries are looked for behind every prefix that a name can be split at. A prefix counts if all of the
network's entries stand behind it: DataParallel's ``module.``, ``model.`` and ``net.`` of wrappers, ``1.`` of a
Sequential, or several of them. What then is left over must be known to be no weight: a normalisation, which goes in
front of the network, bookkeeping, or the same weights again, as wrappers hold them that know the network twice, or
networks that know their first layers under another name too.
Anything else refuses the file, unless weights are computed from it (Note [Computed weights]). Prefixes are thus
removed from the front only, and never from a part of the entries.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError, and_more
from .normalization import (
    Statistics,
    check_statistics,
    is_usual,
    normalizations_of,
    parse_normalization,
    put_before,
    seen_mean,
    statistics_beside,
    take_statistics,
)
from .reparametrized import with_plain_weights
from .zoo import find_family, same_weights

# Keys under which a file's main weights are stored, the first of them that fits being taken; others come after these.
HOLDERS = ("", "state_dict", "model_state_dict", "net", "model", "network", "weights", "best", "last")
# Words in the keys of what optimizers keep for each weight.
OF_OPTIMIZERS = ("optim", "momentum", "exp_avg", "grad")
# The same layer in CIFAR ResNets of the kuangliu family and in torchvision's naming, which ours follows.
RENAMED = (("shortcut.", "downsample."), ("linear.", "fc."))
# Last parts of names that averages and profilers leave, and the first of TRADES' block that its forward never uses.
BOOKKEEPING = ("n_averaged", "total_ops", "total_params")
UNUSED = "sub_block1."

Weights = dict[str, Tensor]


def load_weights(
    network: nn.Module,
    stored: Any,
    what: str,
    *,
    normalize: str | None = None,
    weights_key: str | None = None,
    settings: str = "",
) -> nn.Module:
    """A network with weights from a state dict in one of the field's usual forms.

    Args:
        network: of the architecture that the weights belong to, from `create_model`.
        stored: what ``torch.load`` gave: a state dict, or a dict that holds some. See Note [Whose entries].
        what: how to call the file in an error.
        normalize: as for `parse_normalization`: goes in front of the network in place of what the file holds.
        weights_key: which state dict of several, by its key, or keys with dots between; or the prefix of one network of
            several in one state dict.
        settings: what these two are called behind, as in "teacher_", for messages.

    Returns:
        `network`, behind a normalisation if there is one.

    Warns:
        UserWarning: several state dicts fit, several networks have such weights, the file does not show what is done to
            the images first, or what goes in front, or into the weights, was found beside them.

    Raises:
        InputError: if the entries are not this network's; it names the first that is missing or left over.
    """
    given = parse_normalization(normalize, f"{settings}normalize") if normalize is not None else None
    holders = state_dicts_of(stored)
    if weights_key is not None:
        holders = {weights_key: _chosen(stored, holders, weights_key, what, settings)}
    if not holders:
        raise InputError(f"{what} holds no state dict, but {_contents(stored)}")
    own, remarks = network.state_dict(), []
    fitting, refusals = {}, {}
    for key, entries in holders.items():
        try:
            fitting[key] = _fit_plain(entries, own, what, settings)
        except InputError as error:
            refusals[key] = error
    if not fitting:
        raise max(refusals.items(), key=lambda item: agreement(holders[item[0]], own))[1]
    key, (weights, prefix, found, computed) = next(iter(fitting.items()))
    remarks += [
        f"{what} holds {names[0]!r}{and_more(names)} by {kind}; that is computed into the weights"
        for kind, names in computed.items()
    ]
    if len(fitting) > 1:
        others = ", ".join(repr(each) for each in fitting if each != key)
        remarks.append(
            f"{what} holds several sets of weights that fit: {key!r} is taken, not {others}; {settings}weights_key "
            "chooses"
        )
    before = list(refusals)[: list(holders).index(key)]
    if main := [each for each in before if _is_of(holders[each], own)]:
        remarks.append(f"{key!r} of {what} is taken, since {main[0]!r} does not fit: {refusals[main[0]]}")
    name = str(getattr(network, "model_name", ""))
    family = find_family(name)
    normalizes = family is not None and family[0].normalizes
    remarks += _doubts_of_name(name, what, settings)
    if normalizes and (given or found):
        raise InputError(
            f"{what} is to be normalised by "
            f"{f'{settings}normalize = {normalize!r}' if given else 'statistics that it holds'}, but {name!r} "
            "normalises its images itself"
        )
    if normalize is None and found is None and (beside := statistics_beside(stored, _channels(own))):
        found, remark = _from_beside(*beside, normalizes, what, settings)
        remarks.append(remark)
    if normalize is None and found is not None:
        check_statistics(
            *found, f"{what} holds a normalisation that {settings}normalize does not replace, and whose"
        )
    if normalize is None and found is None and not normalizes:
        mean, channels = seen_mean(network, weights), _channels(own)
        remarks += _doubts_of_images(mean, channels, prefix, stored, what, settings)
    if normalize is not None and found is not None and not _same(given, found):
        values = "/".join(",".join(f"{value:.4g}" for value in part.tolist()) for part in found)
        remarks.append(
            f"{what} holds the normalisation {values}, but {settings}normalize = {normalize!r} is used"
        )
    if wrong := [name for name, value in weights.items() if not _is_finite(value)]:
        remarks.append(
            f"{what} has NaN or infinity in {wrong[0]!r}{and_more(wrong)}, as of a training that has diverged"
        )
    for remark in remarks:
        warnings.warn(remark, stacklevel=2)
    network.load_state_dict(weights, strict=False)
    statistics = found if normalize is None else given
    return network if statistics is None else put_before(network, statistics, _channels(own), what)


def state_dicts_of(stored: Any, key: str = "") -> dict[str, Weights]:
    """Every state dict in what a file holds, by its keys with dots between; the usual main ones first.

    A mapping is one if names in it stand for tensors, or for NumPy's arrays, at least one of them a matrix or a kernel.
    What else it holds, such as numbers of epochs, is no weight.
    """
    if isinstance(stored, list | tuple):
        stored = {str(index): each for index, each in enumerate(stored) if isinstance(each, Mapping)}
    if not isinstance(stored, Mapping):
        return {}
    tensors = {name: tensor for name, value in stored.items() if (tensor := _as_tensor(value)) is not None}
    found: dict[str, Weights] = {}
    if all(isinstance(name, str) for name in stored) and any(
        value.dim() >= 2 and value.is_floating_point() for value in tensors.values()
    ):
        found[key] = tensors
    for name, value in stored.items():
        if isinstance(name, str):  # the states of optimizers stand under numbers
            found |= state_dicts_of(value, f"{key}.{name}" if key else name)
    rank = {name: index for index, name in enumerate(HOLDERS)}

    def place(item: tuple[str, Weights]) -> tuple[bool, int]:
        main = item[0].split(".")[0]
        return any(word in main for word in OF_OPTIMIZERS), rank.get(main, len(rank))

    return dict(sorted(found.items(), key=place))


def _as_tensor(value: Any) -> Tensor | None:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.as_tensor(value.astype(value.dtype.newbyteorder("=")))
    if not isinstance(value, Tensor) or value.is_meta:
        return None
    return value.to_dense() if value.layout != torch.strided else value


def _is_finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(value.float().isfinite().all())


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether they are the same, NaN included, in any dtype."""
    if one is other:
        return True
    if one.dtype.is_floating_point and one.dtype.itemsize == 1:  # which torch.equal does not take
        one, other = one.float(), other.float()
    return torch.equal(one, other)


def _contents(stored: Any) -> str:
    """What a file holds, for a sentence."""
    if not isinstance(stored, Mapping):
        return f"a {type(stored).__name__}"
    shown = [f"{name!r} ({type(value).__name__})" for name, value in list(stored.items())[:5]]
    more = f" and {len(stored) - len(shown)} more" if len(stored) > len(shown) else ""
    return f"a {type(stored).__name__} of {', '.join(shown) or 'nothing'}{more}"


def align(weights: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, dict[str, str]]:
    """Where a network's entries are in a state dict: prefix -> the network's name -> the stored one.

    The prefixes behind which most entries stand come first, and of those the shortest.
    """
    names = set(own)
    found: dict[str, dict[str, str]] = {}
    for key in weights:
        parts = key.split(".")
        for index in range(len(parts)):
            name = _own_name(".".join(parts[index:]), names)
            if name in names:
                prefix = "".join(part + "." for part in parts[:index])
                found.setdefault(prefix, {})[name] = key
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), len(item[0]))))


def agreement(weights: Weights, own: Iterable[str]) -> int:
    """How many of a network's entries there are."""
    return max((len(place) for place in align(weights, own).values()), default=0)


def _is_of(weights: Weights, own: Mapping[str, Tensor]) -> bool:
    """Whether a network's entries are there in its own shapes, whatever is there besides."""
    place = next(iter(align(weights, own).values()), {})
    return 2 * sum(weights[key].shape == own[name].shape for name, key in place.items()) > len(own)


def _fit_plain(
    weights: Weights, own: Mapping[str, Tensor], what: str, settings: str
) -> tuple[Weights, str, Statistics | None, dict[str, list[str]]]:
    """As `_fit`, and which weights were computed, by how. See Note [Computed weights]."""
    try:
        return *_fit(weights, own, what, settings), {}
    except InputError:
        plain, computed = with_plain_weights(dict(weights), what)
        if not computed:
            raise
        return *_fit(plain, own, what, settings), computed


def _from_beside(
    key: str, statistics: Statistics, certain: bool, normalizes: bool, what: str, settings: str
) -> tuple[Statistics | None, str]:
    """What goes in front of the network of a mean and a deviation that were found beside it, and what to say of it."""
    values = "/".join(",".join(f"{value:.4g}" for value in part.tolist()) for part in statistics)
    has = f"{what} has the mean and deviation {values} beside its weights, at {key!r}"
    if normalizes:
        return None, f"{has}, which are not used: the network normalises its images itself"
    if not certain:
        return None, f"{has}; if they are the images', {settings}normalize = '{values}' puts them in front"
    try:
        check_statistics(*statistics, f"{has}, but")
    except InputError as error:
        raise InputError(f"{error}; {settings}normalize says what goes in front of the network") from None
    return statistics, f"{has}; they go in front of the network, unless {settings}normalize says otherwise"


def _fit(
    weights: Weights, own: Mapping[str, Tensor], what: str, settings: str
) -> tuple[Weights, str, Statistics | None]:
    """A network's weights under its own names, the prefix they had, and the normalisation beside them."""
    places = align(weights, own)
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    whole = {prefix: place for prefix, place in places.items() if all(name in place for name in needed)}
    if not whole:
        place = next(iter(places.values()), {})
        raise _refusal(what, "lacks", [name for name in needed if name not in place])
    prefix, place = next(iter(whole.items()))
    for other, again in whole.items():
        if any(not _equal(weights[place[name]], weights[again[name]]) for name in needed):
            raise InputError(
                f"{what} holds several networks of this architecture, behind {prefix!r} and {other!r}; "
                f"{settings}weights_key = {other.rstrip('.')!r} chooses one"
            )
    used = {key for place in whole.values() for key in place.values()}
    left = {
        key: value
        for key, value in weights.items()
        if key not in used
        and key.rpartition(".")[2] not in BOOKKEEPING
        and not any(key.startswith(each + UNUSED) for each in whole)
    }
    left = _without_second_names(left, weights, used, prefix)
    found = take_statistics(left, what)
    if left:
        remedy = (
            f"; if that is no part of the network, {settings}weights_key = {prefix.rstrip('.')!r} leaves it out"
            if prefix and not any(name.startswith(prefix) for name in left)
            else ""
        )
        raise _refusal(what, "has beyond the network's", list(left), remedy)
    taken = {name: weights[key] for name, key in place.items()}
    _require_shapes(taken, own, what)
    return taken, prefix, found


def _without_second_names(left: Weights, weights: Weights, used: set[str], prefix: str) -> Weights:
    """What is left without submodules whose entries, one a matrix or kernel at least, are all the network's again."""
    again: dict[str, list[str]] = {}
    for name in left:
        again.setdefault(name.removeprefix(prefix).partition(".")[0], []).append(name)

    def is_again(name: str) -> bool:
        last = name.rpartition(".")[2]
        return any(key.rpartition(".")[2] == last and _equal(left[name], weights[key]) for key in used)

    for names in again.values():
        if any(left[name].dim() >= 2 for name in names) and all(map(is_again, names)):
            left = {name: value for name, value in left.items() if name not in names}
    return left


def _chosen(stored: Any, holders: Mapping[str, Weights], key: str, what: str, settings: str) -> Weights:
    if key in holders:
        return holders[key]
    inside = [found for holder, found in holders.items() if key.startswith(f"{holder}.")]
    for weights in (*inside, *holders.values()):
        prefix = key
        for holder in holders:
            prefix = prefix.removeprefix(f"{holder}.") if holder else prefix
        below = {name: value for name, value in weights.items() if name.startswith(prefix + ".")}
        if below:
            return below
    there = ", ".join(repr(holder) for holder in holders if holder) or "a single state dict, without a key"
    raise InputError(f"{settings}weights_key is {key!r}, but {what} holds: {there}")


def _require_shapes(weights: Weights, own: Mapping[str, Tensor], what: str) -> None:
    wrong = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    if wrong:
        theirs, ours = (tuple(each[wrong[0]].shape) for each in (weights, own))
        last = list(own)[-1].rpartition(".")[0]
        reason = f": {theirs} in the file, {ours} in the network"
        if theirs and ours and theirs[1:] == ours[1:] and all(n.rpartition(".")[0] == last for n in wrong):
            reason += f"; its last layer is for {theirs[0]} classes, and not for {ours[0]}"
        raise _refusal(what, "has another shape of", wrong, reason)
    for name, value in weights.items():
        if value.is_floating_point() != own[name].is_floating_point() or value.is_quantized:
            raise _refusal(what, f"has {value.dtype} and not {own[name].dtype} as", [name])


def _refusal(what: str, problem: str, names: list[str], reason: str = "") -> InputError:
    return InputError(
        f"{what} does not hold the weights of this architecture: it {problem} {names[0]!r}{and_more(names)}{reason}"
    )


def _doubts_of_name(name: str, what: str, settings: str) -> list[str]:
    """Which other networks have such weights, where the name is the plain one of them."""
    others = same_weights(name)
    if not others or not all(other.startswith(name + "-") for other in others):
        return []
    listed = ", ".join(others)
    return [
        f"{what} is taken for a {name!r}, but its weights fit {listed} too, which compute something else; "
        "`advfunmatch models` says whose code each is"
    ]


def _doubts_of_images(
    mean: Tensor | None, channels: int | None, prefix: str, stored: Any, what: str, settings: str
) -> list[str]:
    """Whether the network was trained on normalised images, of which its file says nothing."""
    wanted = f"{settings}normalize ({normalizations_of(channels)}) says"
    behind = [part for part in prefix.split(".") if part.isdigit() and part != "0"]
    if behind:
        return [
            f"the weights in {what} stand behind {prefix!r}, second in a sequence whose first part, a normalisation as "
            f"a rule, left no trace; images go in as they are unless {wanted} how they were normalised"
        ]
    if isinstance(stored, Mapping) and stored.get("normalize_input") is True:
        return [f"{what} has normalize_input = True, but not the statistics; {wanted} which"]
    if mean is not None and is_usual(mean):
        return []
    values = "" if mean is None else ", ".join(f"{value:.2f}" for value in mean.tolist())
    shown = (
        "does not show whether it was trained on normalised images"
        if mean is None
        else f"was trained on images of mean {values}, going by its first BatchNorm, so perhaps normalised ones"
    )
    return [f"{what} {shown}; they go in as they are, in [0, 1], unless {wanted} otherwise"]


def _same(given: Statistics | None, found: Statistics) -> bool:
    if given is None:
        return False
    pairs = zip(given, found, strict=True)
    return all(len(a) in (1, len(b)) and bool(torch.isclose(a, b, atol=1e-4).all()) for a, b in pairs)


def _channels(own: Mapping[str, Tensor]) -> int | None:
    first = next((value for value in own.values() if value.dim() == 4), None)
    return None if first is None else first.shape[1]


def _own_name(name: str, own: set[str]) -> str:
    for theirs, ours in RENAMED:
        renamed = name.replace(theirs, ours)
        if name not in own and renamed in own:
            name = renamed
    return name
