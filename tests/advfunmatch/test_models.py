"""Networks by name: sizes known from the literature, shapes, and names that do not exist."""

from __future__ import annotations

import pytest
import torch
from advfunmatch import InputError, create_model

# From the papers' and reference implementations' counts at ten classes and three channels.
PARAMETERS = {
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "preactresnet18": 11_172_170,
    "wrn-28-10": 36_479_194,
    "wrn-34-10": 46_160_474,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=10, in_channels=3)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    "name", ["small_cnn", "small_cnn-8", "resnet18", "resnet50", "preactresnet18", "wrn-10-1"]
)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_logits_for_any_channels_and_size(name: str, channels: int, size: int) -> None:
    model = create_model(name, num_classes=7, in_channels=channels).eval()
    assert model(torch.rand(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet19", "wrn-34", "small_cnn-x", "", "wrn-34-10-1"])
def test_unknown_name_lists_what_there_is(name: str) -> None:
    with pytest.raises(InputError, match=r"must be one of: small_cnn, .*resnet18.*wrn-<depth>-<widen>"):
        create_model(name, num_classes=10, in_channels=3)


@pytest.mark.parametrize("name", ["wrn-33-10", "wrn-4-1", "wrn-34-0", "small_cnn-0"])
def test_impossible_numbers_in_a_name(name: str) -> None:
    with pytest.raises(InputError, match=name):
        create_model(name, num_classes=10, in_channels=3)


def test_resnet18_has_torchvisions_parameter_names() -> None:
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    theirs.maxpool = torch.nn.Identity()
    ours = create_model("resnet18", num_classes=10, in_channels=3)
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
