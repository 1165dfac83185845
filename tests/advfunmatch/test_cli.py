"""The command line: what it writes, and one sentence with exit code 2 for whatever it cannot do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import advfunmatch
import numpy as np
import pytest
import torch
from advfunmatch import create_model, load_dataset, load_model
from advfunmatch.cli import run
from advfunmatch.config import config_from, read_settings
from advfunmatch.methods import PRESETS, preset
from processes import start

TRAIN = ["train", "--data", "digits", "--model", "small_cnn-4", "--method", "ce", "--epochs", "1"]
TRAIN += ["--eps", "0.15", "--limit", "100", "--eval-limit", "20"]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run, check the manner of the refusal, and return its sentence."""
    capsys.readouterr()
    assert run(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_train_then_evaluate(tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "train",
        "--data",
        "digits",
        "--model",
        "small_cnn-4",
        "--method",
        "advfunmatch",
        "--teacher",
        teacher,
    ]
    arguments += [
        "--epochs",
        "1",
        "--eps",
        "8/255",
        "--seed",
        "0",
        "--limit",
        "100",
        "--out",
        str(tmp_path / "run"),
    ]
    assert run(arguments) == 0
    assert "PGD-20" in capsys.readouterr().out
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored["config"]["eps"] == 8 / 255

    checkpoint, out = str(tmp_path / "run" / "checkpoint.pt"), tmp_path / "new" / "figures.json"
    arguments = [
        "evaluate",
        "--checkpoint",
        checkpoint,
        "--data",
        "digits",
        "--attacks",
        "clean,pgd20,autoattack",
    ]
    # A ball so large that AutoAttack's first attacks leave nothing for the slow ones.
    arguments += ["--limit", "30", "--out", str(out), "--fidelity"]
    assert run([*arguments, "--eps", "0.5"]) == 0
    figures = json.loads(out.read_text())
    assert figures["images"] == 30
    assert set(figures["environment"]) >= {"torch", "python", "advfunmatch", "git_commit"}
    assert figures["autoattack"] <= figures["clean"]
    assert figures["teacher"] == teacher
    assert {"agreement", "kl_clean", "kl_mismatched"} <= set(figures)
    assert "autoattack, 0.5 (linf)" in capsys.readouterr().out


def test_as_a_module_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "advfunmatch", *TRAIN, "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoint.pt").is_file()
    assert "images/s" in done.stderr
    said = tmp_path / "said"
    process = start([*TRAIN, "--eps", "-1", "--out", str(tmp_path / "bad")], said)
    process.join(timeout=300)
    assert process.exitcode == 2
    assert said.read_text().strip() == "error: eps is -1, but must be positive and finite"
    assert not (tmp_path / "bad").exists()


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    said, checkpoint = tmp_path / "said", tmp_path / "run" / "checkpoint.pt"
    process = start([*TRAIN, "--epochs", "10000", "--out", str(tmp_path / "run")], said)
    while not checkpoint.exists() and process.is_alive():  # one of them will be, however slow the machine
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)  # type: ignore[arg-type]
    process.join(timeout=300)
    process.kill()  # one that goes on would do so for hours
    assert process.exitcode == 130
    assert said.read_text().splitlines()[-1].startswith("error: interrupted; what was written is whole")
    assert torch.load(checkpoint, weights_only=True)["epoch"] >= 1


def test_without_the_packages_of_the_extra() -> None:
    """The attack needs torch alone; the command line says what it lacks."""
    hide = "import sys; sys.modules.update(dict.fromkeys(('rich', 'typer', 'torchvision', 'sklearn', 'matplotlib')))"
    attack = (
        "import torch; from advfunmatch import PGDAttack, create_model, prepare_for_attack;"
        "lean = prepare_for_attack(create_model('small_cnn', num_classes=10, in_channels=3).eval());"
        "print(tuple(PGDAttack(steps=1)(lean, lean, torch.rand(2, 3, 8, 8)).shape))"
    )
    command = "sys.argv = ['advfunmatch', 'methods']; from advfunmatch.__main__ import main; main()"
    expected = (
        (attack, 0, "(2, 3, 8, 8)"),
        (command, 2, "the command line needs typer: pip install 'advfunmatch[train]'"),
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", f"{hide}; {code}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for code, _, _ in expected
    ]
    for process, (_, returncode, says) in zip(both, expected, strict=True):
        said, _ = process.communicate()
        assert process.returncode == returncode, said
        assert said.strip().endswith(says)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["--data", "folder:/no/such/folder"], "'/no/such/folder' does not exist"),
        (["--data", "mnist"], "data is 'mnist', but must be one of: digits"),
        (["--model", "vgg"], "model is 'vgg', but must be one of: small_cnn"),
        (["--method", "at"], "method is 'at', but must be one of: ce"),
        (["--method", "advfunmatch"], "teacher must name a checkpoint"),
        (["--method", "funmatch", "--teacher", "nowhere.pt"], "teacher 'nowhere.pt' does not exist"),
        (["--epochs", "0"], "epochs is 0"),
        (["--epochs", "many"], "'--epochs'"),
        (["--eps", "0"], "eps is 0"),
        (["--eps", "big"], "eps is 'big', but must be a number"),
        (["--eps", "1/0"], "eps is '1/0', but must be a number"),
        (["--no-such-flag"], "No such option: --no-such-flag"),
        (["--seed", "9" * 30], "seed is 9999"),
        (["--milestones", "nan"], "milestones is 'nan'"),
        (["--device", "meta"], "device is 'meta', but must be one of: cpu, cuda, auto"),
        (["--model", "small_cnn-99999999999"], "too large to be made here"),
        (
            ["--model", "torchvision:fasterrcnn_resnet50_fpn"],
            "model is 'torchvision:fasterrcnn_resnet50_fpn', but",
        ),
        (
            ["--model", "resnet18", "--limit", "9", "--batch-size", "8"],
            "leaves a batch of one of the 9 images",
        ),
        (["--config", "."], "config '.' cannot be read as YAML: Is a directory"),
    ],
)
def test_train_refuses(
    changes: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert expected in refused([*TRAIN, *changes, "--out", str(out)], capsys)
    assert not out.exists()


def test_out_without_a_name(tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "out is empty" in refused([*TRAIN, "--out", ""], capsys)
    for command in (evaluate(teacher, tmp_path), attack(teacher, tmp_path)):
        assert "which is a folder, but must be a file" in refused(command, capsys)
    assert not list(tmp_path.iterdir())


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "evaluate" in capsys.readouterr().out


def test_a_config_with_nothing_after_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("seed:\n")
    arguments = [*TRAIN, "--out", str(tmp_path / "run"), "--config", str(tmp_path / "run.yaml")]
    assert "run.yaml, line 1: seed is None, but must be of type int" in refused(arguments, capsys)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nepochs: 0\n", "line 2: epochs is 0, but must be at least 1"),
        ("# a\n\nepocs: 3\n", "line 3: setting is 'epocs', but must be one of: "),
        ("lr: much\n", "line 1: lr is 'much', but must be a number"),
        ("model: resnet\n", "line 1: model is 'resnet', but"),
        ("epochs: 3\nseed: 0\nepochs: 4\n", "line 3: epochs was given in line 1 already"),
        ("epochs: [3\n", "line 2, column 1"),
        ("lr: 0.1\neps: -1\n", "error: eps is -2"),  # the flag's
    ],
)
def test_an_error_in_a_config_names_its_line(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    arguments = ["train", "--data", "digits", "--method", "ce", "--out", str(tmp_path / "run")]
    arguments += ["--model", "small_cnn-4"] if "model" not in text else []
    arguments += ["--eps", "-2"] if "eps:" in text else []
    said = refused([*arguments, "--config", str(tmp_path / "run.yaml")], capsys)
    assert expected in said
    assert "epocs" not in text or said.endswith("Did you mean 'epochs'?")


def test_a_presets_text_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["presets"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(PRESETS)
    for name in PRESETS:
        assert run(["presets", name]) == 0
        (tmp_path / "preset.yaml").write_text(capsys.readouterr().out)
        assert read_settings(str(tmp_path / "preset.yaml")).keys() == preset(name).keys()
        common = {"data": "digits", "out": "x", "teacher": "t.pt"}
        read = config_from({**common, **read_settings(str(tmp_path / "preset.yaml"))})
        assert read == config_from({**common, **preset(name)})
    assert "Did you mean 'mart-cifar10'?" in refused(["presets", "mart_cifar"], capsys)


def test_the_folder_of_a_run_does_for_its_checkpoint(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = tmp_path / "runs" / "student"
    folder = str(Path(teacher).parent)
    assert run([*TRAIN, "--method", "funmatch", "--teacher", folder, "--out", str(student)]) == 0
    assert run(evaluate(student, tmp_path / "figures.json", "--attacks", "clean", "--fidelity")) == 0
    assert json.loads((tmp_path / "figures.json").read_text())["teacher"] == folder
    assert torch.equal(*(next(load_model(path).parameters()) for path in (folder, teacher)))
    assert run([*TRAIN, "--seed", "1", "--out", str(tmp_path / "runs" / "other")]) == 0
    assert run(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "report.html")]) == 0
    assert "2 runs" in (tmp_path / "report.html").read_text()
    assert "as a folder it holds no checkpoint.pt" in refused(evaluate(tmp_path, tmp_path / "x.json"), capsys)


def test_each_option_of_train_has_its_heading(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--help"]) == 0
    assert capsys.readouterr().out.split("Options:")[1].split() == [
        "--help",
        "Show",
        "this",
        "message",
        "and",
        "exit.",
    ]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"advfunmatch {advfunmatch.__version__}\n"


def test_missing_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert "out is missing" in refused(TRAIN, capsys)


def test_out_that_cannot_be_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("kept")
    assert "cannot be created" in refused([*TRAIN, "--out", str(tmp_path / "file" / "run")], capsys)
    assert (tmp_path / "file").read_text() == "kept"


def evaluate(checkpoint: Path | str, out: Path, *more: str) -> list[str]:
    return [
        "evaluate",
        "--checkpoint",
        str(checkpoint),
        "--data",
        "digits",
        "--out",
        str(out),
        "--limit",
        "20",
        *more,
    ]


def attack(checkpoint: Path | str, out: Path, *more: str) -> list[str]:
    return ["attack", *evaluate(checkpoint, out, *more)[1:]]


def test_checkpoints_that_are_none(tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    whole = Path(teacher).read_bytes()
    cases = {
        "truncated.pt": (whole[: len(whole) // 2], "is truncated"),
        "empty.pt": (b"", "is empty"),
        "text.pt": (b"hello", "is not a PyTorch checkpoint"),
    }
    for name, (content, expected) in cases.items():
        (tmp_path / name).write_bytes(content)
        assert expected in refused(evaluate(tmp_path / name, out), capsys)
    assert "does not exist" in refused(evaluate(tmp_path / "absent.pt", out), capsys)
    assert "not a file" in refused(evaluate(tmp_path, out), capsys)

    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    assert "was not written by advfunmatch" in refused(evaluate(tmp_path / "foreign.pt", out), capsys)
    stored = torch.load(teacher, weights_only=True)
    torch.save({**stored, "model": "resnet18"}, tmp_path / "other.pt")
    assert "does not hold the weights of a resnet18" in refused(evaluate(tmp_path / "other.pt", out), capsys)
    torch.save({name: value for name, value in stored.items() if name != "config"}, tmp_path / "lacking.pt")
    assert "lacks 'config'" in refused(evaluate(tmp_path / "lacking.pt", out), capsys)
    torch.save({**stored, "model": 5}, tmp_path / "odd.pt")
    assert "lacks 'model'" in refused(evaluate(tmp_path / "odd.pt", out), capsys)
    assert not out.exists()


def test_a_checkpoint_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    refused(evaluate(tmp_path / "evil.pt", tmp_path / "figures.json"), capsys)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("command", "goes_on"),
    [("train", True), ("evaluate", False), ("attack", False), ("methods", False)],
)
def test_only_train_goes_on_after_an_interrupt(
    command: str,
    goes_on: bool,
    teacher: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    stopped = ("train.train_model", "evaluate.load_dataset", "attack.load_dataset", "listings.methods_text")
    for name in stopped:
        monkeypatch.setattr(f"advfunmatch.cli.{name}", interrupted)
    arguments = {
        "train": [*TRAIN, "--out", str(tmp_path / "run")],
        "evaluate": evaluate(teacher, tmp_path / "figures.json"),
        "attack": attack(teacher, tmp_path / "x.npz"),
        "methods": ["methods"],
    }
    assert run(arguments[command]) == 130
    said = capsys.readouterr().err
    assert said.startswith("error: interrupted; what was written is whole")
    assert ("train --resume goes on" in said) == goes_on


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_examples_of_a_pixel_are_read_back(tmp_path: Path, channels: int) -> None:
    images, labels = np.random.default_rng(0).random((6, channels, 1, 1), np.float32), np.arange(6) % 3
    arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(tmp_path / "pixels.npz", **arrays, axes=np.array("NCHW"))
    network = create_model("small_cnn-4", num_classes=3, in_channels=channels)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    data, model = f"npz:{tmp_path / 'pixels.npz'}", ["--model", "small_cnn-4", "--normalize", "none"]
    command = attack(
        tmp_path / "w.pt", tmp_path / "x.npz", *model, "--data", data, "--attack", "fgsm", "--eps", "0.1"
    )
    assert run(command) == 0
    assert load_dataset(f"npz:{tmp_path / 'x.npz'}", split="test").images.shape == images.shape


@pytest.mark.parametrize("limit", [1, 3])
def test_an_archive_of_adversarial_examples_is_data_again(
    limit: int, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, out = tmp_path / "x.npz", tmp_path / "figures.json"
    assert run(attack(teacher, archive, "--attack", "fgsm", "--eps", "0.1", "--limit", str(limit))) == 0
    said = capsys.readouterr().out
    data = load_dataset(f"npz:{archive}", split="test")
    assert data.class_names == tuple("0123456789")
    assert len(data) == limit
    assert run(evaluate(teacher, out, "--data", f"npz:{archive}", "--attacks", "clean")) == 0
    assert f"accuracy {json.loads(out.read_text())['clean']:.2f} %" in said


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--attack", "pdg"], "attack is 'pdg', but must be one of: mismatch, clean"),
        (["--attack", "mismatch"], "needs --teacher"),
        (["--teacher", "absent.pt"], "teacher is 'absent.pt', but attack 'pgd20' uses none"),
        (["--teacher-model", "resnet18"], "teacher_model is 'resnet18', but teacher names no file"),
        (["--attack", "mismatch", "--teacher", "absent.pt"], "teacher 'absent.pt' does not exist"),
        (["--batch-size", "0"], "batch_size is 0"),
    ],
)
def test_attack_refuses(
    more: list[str], expected: str, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(attack(teacher, tmp_path / "x.npz", *more), capsys)
    assert not (tmp_path / "x.npz").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--attacks", "clean,pdg"], "attack is 'pdg', but must be one of: clean"),
        (["--attacks", ","], "attacks is empty"),
        (["--eps", "2"], "eps is 2"),
        (["--norm", "l0"], "norm is 'l0'"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--limit", "0"], "limit is 0"),
        (["--teacher", "absent.pt"], "teacher 'absent.pt' does not exist"),
        (["--teacher", "a" * 5000], "does not exist or is not a file"),
        (["--teacher", ""], "teacher '' does not exist"),
        (["--device", "abacus"], "device is 'abacus'"),
    ],
)
def test_evaluate_refuses(
    more: list[str], expected: str, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(evaluate(teacher, tmp_path / "figures.json", *more), capsys)
    assert not (tmp_path / "figures.json").exists()


def test_full_disk(teacher: str, capsys: pytest.CaptureFixture[str]) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    assert "No space left on device" in refused(evaluate(teacher, full, "--attacks", "clean"), capsys)
    assert full.is_char_device()


@pytest.mark.parametrize("model", ["torchvision:shufflenet_v2_x0_5", "timm:mobilenetv3_small_050"])
def test_a_network_of_another_library_is_trained_saved_and_measured_again(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if model.startswith("timm:"):
        pytest.importorskip("timm")
    labels = np.arange(24) % 3
    images = np.random.default_rng(0).integers(0, 100, (24, 32, 32, 3), dtype=np.uint8)
    images[..., 0] += (50 * labels[:, None, None]).astype(np.uint8)
    data = tmp_path / "three.npz"
    np.savez(data, x_train=images, y_train=labels, x_test=images, y_test=labels)
    arguments = ["train", "--data", f"npz:{data}", "--model", model, "--method", "pgd_at", "--steps", "1"]
    arguments += ["--epochs", "1", "--batch-size", "12", "--lr", "0.01", "--out", str(tmp_path / "run")]
    assert run(arguments) == 0
    trained = json.loads((tmp_path / "run" / "result.json").read_text())
    arguments = ["evaluate", "--checkpoint", str(tmp_path / "run" / "checkpoint.pt"), "--data", f"npz:{data}"]
    assert run([*arguments, "--out", str(tmp_path / "figures.json")]) == 0
    measured = json.loads((tmp_path / "figures.json").read_text())
    assert [measured[name] for name in ("clean", "pgd20")] == [trained[name] for name in ("clean", "pgd20")]


def test_weights_of_another_project(tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str]) -> None:
    stored = torch.load(teacher, weights_only=True)
    weights = {f"module.{name}": value for name, value in stored["state_dict"].items()}
    torch.save({"state_dict": weights}, tmp_path / "foreign.pt")
    figures = []
    for checkpoint, more in ((teacher, []), (tmp_path / "foreign.pt", ["--model", stored["model"]])):
        more = [*more, "--attacks", "clean,pgd20", "--eps", "8/255", "--overwrite"]
        assert run(evaluate(checkpoint, tmp_path / "figures.json", *more)) == 0
        figures.append(json.loads((tmp_path / "figures.json").read_text()))
    assert figures[0]["pgd20"] == figures[1]["pgd20"]
    more = [
        "--method",
        "funmatch",
        "--teacher",
        str(tmp_path / "foreign.pt"),
        "--teacher-model",
        stored["model"],
    ]
    assert run([*TRAIN, *more, "--out", str(tmp_path / "run")]) == 0
    # The student remembers its teacher and what that is; both sides may be another project's.
    student = tmp_path / "run" / "checkpoint.pt"
    more = ["--attacks", "clean", "--fidelity", "--overwrite"]
    assert run(evaluate(student, tmp_path / "figures.json", *more)) == 0
    assert "agreement" in json.loads((tmp_path / "figures.json").read_text())
    both = ["--eps", "8/255", "--model", stored["model"], "--teacher-model", stored["model"], "--teacher"]
    command = attack(tmp_path / "foreign.pt", tmp_path / "x.npz", "--attack", "mismatch")
    assert run([*command, *both, str(tmp_path / "foreign.pt")]) == 0

    out = tmp_path / "x.json"
    for more, expected in (
        (["--model", "resnet18"], "lacks"),
        ([], "if it is another project's, model must name its architecture"),
        (["--teacher", str(tmp_path / "foreign.pt"), "--model", stored["model"]], "teacher_model must name"),
        (["--teacher-model", "resnet18", "--model", stored["model"]], "but teacher names no file"),
    ):
        assert expected in refused(evaluate(tmp_path / "foreign.pt", out, *more), capsys)
    assert not out.exists()


def test_a_teacher_that_cannot_take_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels, images = np.array([0, 1] * 4), np.zeros((8, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "small.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    torch.save(
        create_model("torchvision:squeezenet1_1", num_classes=2, in_channels=3).state_dict(),
        tmp_path / "t.pt",
    )
    command = [
        *TRAIN,
        "--data",
        f"npz:{tmp_path / 'small.npz'}",
        "--method",
        "rslad",
        "--out",
        str(tmp_path / "run"),
    ]
    more = ["--teacher", str(tmp_path / "t.pt"), "--teacher-model", "torchvision:squeezenet1_1"]
    assert "cannot take images of 8×8 pixels" in refused([*command, *more], capsys)
    assert not (tmp_path / "run").exists()
