"""One's own network, data and method: registered in a file or by an installed package, or given in Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from advfunmatch import (
    InputError,
    TrainConfig,
    create_model,
    load_dataset,
    load_model,
    load_plugins,
    plugins,
    train,
)
from advfunmatch.cli import run
from advfunmatch.methods import METHODS, Logits, Method, methods_text, register_method
from advfunmatch.models import Normalized, models_text, register_model
from torch import nn

MakeConfig = Callable[..., TrainConfig]

# What somebody writes outside of the package.
MINE = '''
import torch
from types import SimpleNamespace
from typing import Literal
from torch import nn
from afm_kernels import softmax_kl_div
from advfunmatch import register_dataset, register_method, register_model

class Head(nn.Linear):
    def forward(self, x):
        return SimpleNamespace(logits=super().forward(x))

@register_model("mine-<width>")
def mine(num_classes, in_channels, width):
    """My network."""
    return nn.Sequential(nn.Conv2d(in_channels, width, 3), nn.ReLU(), nn.Flatten(), Head(36 * width, num_classes))

@register_dataset("stripes")
def stripes(path="", split="train"):
    labels = torch.arange(90 if split == "train" else 30) % 3
    images = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    for row, label in enumerate(labels):
        images[row, 0, label::3] = 200 + row % 7
    return images, labels.to(torch.uint8)

@register_method("focal_match", objective="mismatch", needs_labels=False, defaults={"attack_init": "uniform"},
                 features={"student": ["1"], "teacher": ["1"]})
def focal_match(logits, config, *, gamma: float = 2.0, weight: float = 0.1, over: Literal["mean", "sum"] = "mean"):
    """KL(T(x')‖S(x'))^γ, and the squared distance of a layer"""
    rows = softmax_kl_div(logits.student_adv, logits.teacher_adv, reduction="none") ** gamma
    ours, theirs = logits.features("student_adv")["1"], logits.features("teacher_adv")["1"]
    return getattr(rows, over)() + weight * (ours - theirs).square().mean()
'''


@pytest.fixture(autouse=True)
def forget() -> Iterator[Callable[[], None]]:
    """Every test begins with the package's own tables; called, they are that again."""
    copies = [(registry, registry._copy()) for registry in plugins._registries]

    def put_back() -> None:
        for registry, copy in copies:
            registry._put_back(copy)
        plugins._loaded.clear()

    yield put_back
    put_back()


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return str(path)


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line refuses with."""
    capsys.readouterr()
    assert run(arguments) == 2
    return capsys.readouterr().err


def test_a_file_serves_every_command_and_its_runs_say_that_they_need_it(
    mine: str, tmp_path: Path, forget: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    out = {name: str(tmp_path / name) for name in ("teacher", "student")}
    file = str(tmp_path / "teacher" / "checkpoint.pt")
    common = ["--data", "stripes", "--model", "mine-4", "--epochs", "1", "--eps", "0.1", "--lr", "0.05"]
    assert run(["train", "--import", mine, *common, "--method", "ce", "--out", out["teacher"]]) == 0
    student = [
        "train",
        *common,
        "--method",
        "focal_match",
        "--set",
        "gamma=3/2",
        "--teacher",
        file,
        "--steps",
        "4",
    ]
    student += ["--awp", "--awp-warmup", "0", "--out", out["student"]]
    forget()
    assert run([*student, "--import", mine]) == 0
    record = json.loads((tmp_path / "student" / "run.json").read_text())
    assert record["config"]["settings"] == {"gamma": 1.5, "weight": 0.1, "over": "mean"}
    assert record["config"]["attack_init"] == "uniform"
    assert record["config"]["imports"] == [mine]
    assert record["origins"] == {
        setting: {"kind": "import", "name": mine} for setting in ("model", "method", "data")
    }
    forget()
    path = str(tmp_path / "student" / "checkpoint.pt")
    with pytest.raises(InputError, match=f"holds the weights of a 'mine-4'.* add --import {mine} "):
        load_model(path)
    assert "model is 'mine-4', which the run in" in (refusal := said([*student, "--resume"], capsys))
    assert f"add --import {mine}" in refusal
    assert "setting 'gamma' of method 'focal_match' is 'much'" in said(
        ["train", "--import", mine, *student[1:], "--set", "gamma=much", "--overwrite"], capsys
    )
    assert "setting of method 'focal_match' is 'gama', but must be one of: gamma" in said(
        ["train", "--import", mine, *student[1:], "--set", "gama=1", "--overwrite"], capsys
    )
    assert run([*student, "--import", mine, "--resume"]) == 0
    result = str(tmp_path / "measured.json")
    measure = ["evaluate", "--checkpoint", path, "--data", "stripes", "--attacks", "clean", "--out", result]
    assert run([*measure, "--import", mine]) == 0
    forget()
    assert f"data is 'stripes', which {path!r} was trained on, and which is not here: add --import" in said(
        measure, capsys
    )
    page = tmp_path / "page.html"
    assert run(["report", str(tmp_path / "student"), "--out", str(page)]) == 0
    assert "no adversarial examples of student: data is 'stripes', which" in capsys.readouterr().err
    assert run(["report", "--import", mine, str(tmp_path / "student"), "--out", str(page)]) == 0
    assert "no adversarial examples" not in capsys.readouterr().err
    for command, words in (("methods", "--set gamma=2.0"), ("models", "My network")):
        assert run([command, "--import", mine]) == 0
        printed = capsys.readouterr().out
        assert words in printed
        assert mine in printed


def test_an_installed_package_is_found_and_a_broken_one_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = "from advfunmatch import register_model\nregister_model('half')(lambda classes: 0)"
    for name, text in (("good", MINE), ("broken", broken)):
        (tmp_path / f"afm_{name}.py").write_text(text)
        info = tmp_path / f"afm_{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: afm-{name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[advfunmatch.plugins]\n{name} = afm_{name}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "_installed_were_loaded", False)
    with pytest.warns(
        UserWarning, match=r"plugin 'broken' of the package afm-broken 1.2 cannot be used.*model 'half'"
    ):
        network = create_model("mine-5", num_classes=3, in_channels=1)
    assert network[0].out_channels == 5
    assert "the package afm-good 1.2" in models_text()
    assert "the package afm-good 1.2" in methods_text()
    with pytest.raises(InputError, match="model is 'half', but must be one of"):
        create_model("half", num_classes=3, in_channels=1)


REGISTERING = "from advfunmatch import register_model\nregister_model"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import no_such", r"ModuleNotFoundError: No module named 'no_such' \(.*mine.py, line 1\)"),
        ("x = (", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        (MINE + "\n1 / 0", r"ZeroDivisionError.*line 34\)"),
        (REGISTERING + "('resnet18')(print)", "already registered by advfunmatch"),
        (REGISTERING + "('a')(lambda classes: 0)", r"cannot be called as \(num_classes"),
    ],
)
def test_a_file_that_fails_says_why_and_leaves_nothing(mine: str, text: str, words: str) -> None:
    before = list(METHODS)
    Path(mine).write_text(text)
    with pytest.raises(InputError, match=f"import '.*mine.py'.*{words}"):
        load_plugins(mine)
    assert list(METHODS) == before
    Path(mine).write_text(MINE)  # mended, it is run again
    assert load_plugins([mine, mine]) == (mine, mine)
    assert "focal_match" in METHODS
    with pytest.raises(InputError, match=r"there is no|cannot be read: No such file"):
        load_plugins(mine + "c.py")


def test_a_name_is_taken_once(mine: str) -> None:
    load_plugins(mine)
    ours = f"{mine}, line 13"
    for name, owner in (("mine-<depth>", ours), ("mine-12", ours), ("wrn-9-9", "advfunmatch")):
        with pytest.raises(InputError, match=f"{name}.*already registered by {owner}"):
            register_model(name)(lambda classes, channels, *numbers: nn.Flatten())
    for _ in range(2):  # as a notebook's cell that is run again
        register_model("again")(lambda classes, channels: nn.Flatten())


def test_a_method_refuses_what_it_cannot_be() -> None:
    for row, words in (
        ({"objective": "mismatched"}, "objective of method 'm' is 'mismatched'"),
        ({"defaults": {"gamma": 1}}, "default of method 'm' is 'gamma'"),
        ({"reads": ("gamma",)}, "what method 'm' reads is 'gamma'"),
        ({"need_labels": True}, "attribute of method 'm' is 'need_labels'"),
        ({"settings": dict}, "settings of method 'm' are <class 'dict'>, but must be a dataclass"),
    ):
        with pytest.raises(InputError, match=words):
            register_method("m", **row)(lambda logits, config: logits.student_clean.sum())
    with pytest.raises(InputError, match="setting 'a' of type dict"):

        @register_method("m")
        def loss(logits: Logits, config: TrainConfig, *, a: dict = {}) -> None:  # noqa: B006
            """Nothing."""


class Inner(nn.Module):
    """A network with dropout and a layer that is never used, which answers with an object."""

    def __init__(self) -> None:
        super().__init__()
        self.net = create_model("small_cnn-4", num_classes=10, in_channels=1)
        self.drop, self.unused = nn.Dropout(0.1), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.drop(self.net(x)))


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def test_networks_and_data_that_are_given(make_config: MakeConfig, tmp_path: Path, teacher: str) -> None:
    settings = {"method": "advfunmatch", "awp": True, "awp_warmup": 0, "ema": 0.5}
    named = make_config(**settings, teacher=teacher, out=tmp_path / "named")
    digits = {split: load_dataset("digits", split=split) for split in ("train", "test")}
    by_name = train(named)
    theirs = load_model(teacher)
    # The network of that seed itself, and its teacher and data as objects, are the same run.
    given = make_config(**settings, data="", model="", out=tmp_path / "given")
    student = seeded(lambda: create_model("small_cnn-4", num_classes=10, in_channels=1))
    theirs.train()
    result = train(given, model=student, teacher=theirs, data=digits)
    assert [result[name] for name in ("clean", "pgd20", "agreement")] == [
        by_name[name] for name in ("clean", "pgd20", "agreement")
    ]
    digests = [json.loads((tmp_path / run / "run.json").read_text())["digests"] for run in ("named", "given")]
    assert digests[0] == digests[1]
    assert theirs.training
    # The student has become what was measured.
    weights = load_model(tmp_path / "named" / "checkpoint.pt").state_dict()
    assert not student.training
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
    with pytest.raises(InputError, match=r"given in Python as model=: load_model\(path, model="):
        load_model(tmp_path / "given" / "checkpoint.pt")
    other = seeded(lambda: create_model("small_cnn-4", num_classes=10, in_channels=1), 5)
    back = load_model(tmp_path / "given" / "checkpoint.pt", model=other)
    assert all(torch.equal(value, weights[name]) for name, value in back.state_dict().items())


def test_a_given_run_goes_on_where_it_stopped(make_config: MakeConfig, tmp_path: Path) -> None:
    digits = {split: load_dataset("digits", split=split) for split in ("train", "test")}
    method = Method("my_ce", "CE", None, METHODS["ce"].loss, False, True, "a test")
    given = {"model": lambda classes, channels: Inner(), "data": digits, "method": method}
    named = {"data": "", "model": "", "method": ""}
    whole = train(make_config(**named, out=tmp_path / "whole"), **given)
    config = make_config(**named, out=tmp_path / "parts")

    def stop(run: object, epoch: int) -> dict[str, float]:
        if epoch == 1:
            raise KeyboardInterrupt
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("advfunmatch.training.trainer.monitor", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, **given)
    again = replace(config, resume=True)
    stored = json.loads((tmp_path / "parts" / "run.json").read_text())["config"]
    with pytest.raises(InputError, match="model is missing"):
        train(again, data=digits, method=method)
    with pytest.raises(InputError, match=r"had from elsewhere: give it in Python again, as model=…"):
        train(replace(again, model=stored["model"]), data=digits, method=method)
    resumed = train(again, **{**given, "model": Inner()})
    assert (resumed["clean"], resumed["pgd20"]) == (whole["clean"], whole["pgd20"])


def test_what_is_frozen_stays_and_what_cannot_be_is_said(make_config: MakeConfig, tmp_path: Path) -> None:
    digits = load_dataset("digits", split="train", limit=200)
    student = seeded(lambda: Normalized(Inner(), torch.tensor([0.5]), torch.tensor([0.5])))
    kept = student.network.net.features[0].weight.requires_grad_(False).clone()
    moved = student.network.net.fc.weight.detach().clone()
    with pytest.warns(UserWarning, match="20 of its 200 images"):
        train(make_config(model="", data=""), model=student, data=digits)
    assert torch.equal(student.network.net.features[0].weight, kept)
    assert not torch.equal(student.network.net.fc.weight, moved)
    config = make_config(model="", data="", out=tmp_path / "never")
    for given, words in (
        ({"model": student.requires_grad_(False), "data": digits}, "has no parameter that needs a gradient"),
        ({"model": "resnet18", "data": digits}, "model is of type str"),
        ({"model": lambda n, c: 3, "data": digits}, "as a int, but must be a torch.nn.Module"),
        ({"model": lambda: 3, "data": digits}, r"cannot be called as \(num_classes, in_channels\)"),
        ({"model": Inner(), "data": digits, "method": "ce"}, "method is of type str"),
        ({"model": nn.Flatten(), "data": digits}, "has no parameter"),
        ({"data": digits}, "model is missing"),
    ):
        with pytest.raises(InputError, match=words):
            train(config, **given)
    with pytest.raises(
        InputError, match="model is given twice: 'small_cnn-4' in the settings, and as model="
    ):
        train(make_config(data=""), model=Inner(), data=digits)
    with pytest.raises(InputError, match="data_cache is 'c', but data is given as data="):
        train(make_config(data="", data_cache="c"), data=digits)
    with pytest.raises(InputError, match="config is of type dict, but must be a TrainConfig"):
        train({"method": "ce"}, model=Inner(), data=digits)  # type: ignore[arg-type]
    assert not (tmp_path / "never").exists()


def test_a_fault_in_ones_own_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "faulty.py"
    file.write_text(
        "import torch\n"
        "from advfunmatch import register_dataset, register_method\n"
        "@register_method('faulty_loss', objective='cross_entropy')\n"
        "def faulty_loss(logits, config):\n"
        "    return logits.student_adv @ logits.student_adv\n"
        "@register_dataset('faulty_data')\n"
        "def faulty_data(split):\n"
        "    import a_module_that_is_not_there\n"
    )
    train_it = ["train", "--import", str(file), "--model", "small_cnn-4", "--epochs", "1", "--eps", "0.1"]
    train_it += ["--out", str(tmp_path / "run"), "--limit", "60", "--steps", "1", "--method"]
    for more, words in (
        (["faulty_loss", "--data", "digits"], "line 5, in faulty_loss: RuntimeError: mat1 and mat2 shapes"),
        (["ce", "--data", "faulty_data"], "line 8, in faulty_data: ModuleNotFoundError: No module named"),
    ):
        refusal = said([*train_it, *more], capsys)
        assert f"error: {file}, {words}" in refusal


def test_features_are_of_layers_that_run_once_and_stay(tmp_path: Path) -> None:
    shared = nn.ReLU()
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(inplace=True), shared, nn.Linear(4, 3), shared)
    x, labels = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    logits = Logits(net, None, x, labels, 0, {"student": ["2"]})
    assert torch.equal(logits.features("student_clean")["2"], net[:3](x))
    for layer, words in (
        ("1", "what layer '1' of student gives is changed in place"),
        ("3", "layer '3' of student ran 2 times"),
        ("9", "layer of student is '9', but must be one of"),
    ):
        with pytest.raises(InputError, match=words):
            Logits(net, None, x, labels, 0, {"student": [layer]}).student_clean  # noqa: B018
    with pytest.raises(InputError, match="features is 'student', but must be one of: student_clean"):
        logits.features("student")
