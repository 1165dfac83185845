"""Networks by name: sizes known from the literature, shapes, and names that do not exist."""

from __future__ import annotations

import pytest
import torch
from advfunmatch import InputError, create_model
from advfunmatch.models import load_weights

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


def test_mobilenetv2_size() -> None:
    with torch.device("meta"):
        model = create_model("mobilenetv2", num_classes=10, in_channels=3)
    assert sum(p.numel() for p in model.parameters()) == 2_296_922


def test_networks_of_torchvision() -> None:
    model = create_model("torchvision:squeezenet1_1", num_classes=4, in_channels=3)
    assert model.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 4)
    with pytest.raises(InputError, match="torchvision has no such classifier"):
        create_model("torchvision:resnet19", num_classes=4, in_channels=3)
    with pytest.raises(InputError, match="takes 3 channels, but the images have 1"):
        create_model("torchvision:squeezenet1_1", num_classes=4, in_channels=1)


def foreign_forms() -> dict[str, object]:
    """The same ResNet-18 weights as other projects store them."""
    torch.manual_seed(0)
    plain = create_model("resnet18", num_classes=10, in_channels=3).state_dict()
    kuangliu = {
        name.replace("downsample.", "shortcut.").replace("fc.", "linear."): value
        for name, value in plain.items()
    }
    return {
        "plain": plain,
        "DataParallel": {f"module.{name}": value for name, value in plain.items()},
        "nested": {
            "epoch": 3,
            "state_dict": {f"module.model.{name}": value for name, value in kuangliu.items()},
        },
    }


@pytest.mark.parametrize("form", ["plain", "DataParallel", "nested"])
def test_weights_of_other_projects(form: str) -> None:
    forms = foreign_forms()
    x = torch.rand(2, 3, 32, 32)
    expected = create_model("resnet18", num_classes=10, in_channels=3)
    expected.load_state_dict(forms["plain"])  # type: ignore[arg-type]
    model = load_weights(create_model("resnet18", num_classes=10, in_channels=3), forms[form], "weights")
    torch.testing.assert_close(model.eval()(x), expected.eval()(x))


def test_normalisation_that_comes_with_the_weights() -> None:
    plain = foreign_forms()["plain"]
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    stored = {"mu": mean.view(3, 1, 1), "sigma": std.view(3, 1, 1)}
    stored |= {f"model.{name}": value for name, value in plain.items()}  # type: ignore[attr-defined]
    model = load_weights(create_model("resnet18", num_classes=10, in_channels=3), stored, "weights").eval()
    bare = create_model("resnet18", num_classes=10, in_channels=3).eval()
    bare.load_state_dict(plain)  # type: ignore[arg-type]
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(x), bare((x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)))


def test_weights_of_another_architecture_are_refused() -> None:
    network = create_model("resnet34", num_classes=10, in_channels=3)
    with pytest.raises(InputError, match=r"it lacks 'layer1\.2\.conv1\.weight' and \d+ more"):
        load_weights(network, foreign_forms()["plain"], "weights")
    with pytest.raises(InputError, match="holds no state dict"):
        load_weights(network, [1, 2], "weights")
    with pytest.raises(InputError, match=r"another shape of 'fc\.weight'"):
        load_weights(
            create_model("resnet18", num_classes=7, in_channels=3), foreign_forms()["plain"], "weights"
        )
