"""The command line: `advfunmatch train`, `evaluate`, `attack`, `report`, `methods`, `models`, `demo`.

Note [Exit codes]
~~~~~~~~~~~~~~~~~
0: done. 2: what was asked for cannot be done (a name, a value, a file, a full disk); one sentence on stderr says why.
1: training diverged. 130: interrupted. Anything else is a bug and shows its traceback. Of the processes that torchrun
started, all end with that code, and the first one says why.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import os
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch import nn

from . import demo as demo_module
from .config import FRACTIONS, TrainConfig, check_teacher_settings, config_from, read_settings
from .data import ImageDataset, as_float, corruption_cells, is_corrupted_set, load_dataset
from .environment import environment
from .errors import InputError, ProcessLost, TrainingDiverged, one_of
from .evaluation import (
    ATTACKS,
    attack_images,
    attack_settings,
    check_attacks,
    evaluate_corruptions,
    mismatched_examples,
)
from .evaluation import evaluate as evaluate_model
from .files import prepare_file, write_atomically, write_json
from .methods import PRESETS, methods_text
from .methods import preset as make_preset
from .models import NORMALIZATIONS, ClassesReordered, load_network, models_text
from .report import demo_table, write_report
from .training import train as train_model
from .training.digests import digest_of_network
from .training.distributed import leave_world
from .training.run import choose_device

INTERRUPTED = 130
# Of another project's file: architecture, normalisation, key of the weights.
ForeignOptions = tuple[str | None, str | None, str | None]

app = typer.Typer(
    name="advfunmatch",
    help="Adversarial distillation: train, attack and evaluate robust students.\n\nStart with `advfunmatch demo`, or "
    "`advfunmatch train --data digits --model small_cnn --method pgd_at --eps 0.15 --out runs/teacher`.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of `TrainConfig`, so that flags and configuration cannot differ.

    Every option is None unless it is given, so that --preset and --config can be told from flags.
    """
    types = typing.get_type_hints(TrainConfig)
    options: dict[str, tuple[Any, str]] = {
        "preset": (str, "start from a published recipe: " + ", ".join(PRESETS)),
        "config": (str, "YAML file of settings, or the run.json of a run to repeat; flags override it"),
    }
    for setting in dataclasses.fields(TrainConfig):
        text = setting.metadata["help"]
        if setting.default is dataclasses.MISSING:
            text += " [required]"
        elif setting.default is not None and setting.default is not False and setting.default != "":
            text += f" [default: {'8/255' if setting.name == 'eps' else setting.default}]"
        options[setting.name] = (str if setting.name in FRACTIONS else types[setting.name], text)
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[kind | None, typer.Option(help=text, show_default=False)],
        )
        for name, (kind, text) in options.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


@app.command()
@_with_settings
def train(preset: str | None, config: str | None, **flags: Any) -> None:
    """Train a network.

    Writes checkpoint.pt, metrics.jsonl (a row an epoch), result.json and run.json into --out, and with --validation
    best.pt, the best epoch. A setting comes from its
    flag, else from --config, else from --preset, else from the method (see `advfunmatch methods`). Several processes:
    torchrun --nproc-per-node=N -m advfunmatch train ...
    """
    settings = make_preset(preset) if preset else {}
    settings |= read_settings(config) if config else {}
    settings |= {name: value for name, value in flags.items() if value is not None}
    resolved = config_from(settings)
    try:
        result = train_model(resolved)
    finally:
        leave_world()
    if not result:  # the first process reports
        return
    print(f"{_line(result)}   {result['seconds']:.1f} s   {resolved.out}")
    if best := result.get("best"):
        print(
            f"{_line(best)}   best epoch, {best['epoch']}   {os.path.join(resolved.out, best['checkpoint'])}"
        )


# Options that evaluate and attack share.
Checkpoint = Annotated[str, typer.Option(help="checkpoint.pt of advfunmatch train")]
Data = Annotated[str, typer.Option(help="as for train; its test split is used")]
Eps = Annotated[str, typer.Option(help="radius of the attack ball, e.g. 8/255", metavar="NUMBER")]
Norm = Annotated[str, typer.Option(help="norm of the ball: linf or l2")]
Model = Annotated[str | None, typer.Option(help="architecture, if --checkpoint is another project's")]
TeacherModel = Annotated[str | None, typer.Option(help="architecture, if --teacher is another project's")]
Normalize = Annotated[
    str | None,
    typer.Option(help="what such a checkpoint expects of images: " + NORMALIZATIONS, metavar="HOW"),
]
TeacherNormalize = Annotated[
    str | None, typer.Option(help="what such a teacher expects, likewise", metavar="HOW")
]
WeightsKey = Annotated[
    str | None, typer.Option(help="key of the weights, where --checkpoint holds several", metavar="KEY")
]
TeacherWeightsKey = Annotated[
    str | None, typer.Option(help="key of the weights, where --teacher holds several", metavar="KEY")
]
Limit = Annotated[int | None, typer.Option(help="use this many test images instead of all")]
Resize = Annotated[
    int | None, typer.Option(help="scale images so that their shorter side has this many pixels")
]
Crop = Annotated[
    int | None, typer.Option(help="cut a square of this many pixels from the middle of each image")
]
BatchSize = Annotated[int, typer.Option(help="images attacked at a time")]
Seed = Annotated[int, typer.Option(help="seeds the attacks")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto")]


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    data: Data,
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    attacks: Annotated[
        str | None,
        typer.Option(
            help="names with commas: "
            + ", ".join(ATTACKS)
            + " [default: clean,pgd20; of corrupted sets clean]",
            show_default=False,
        ),
    ] = None,
    eps: Eps = "8/255",
    norm: Norm = "linf",
    teacher: Annotated[
        str | None, typer.Option(help="checkpoint to measure agreement and KL against")
    ] = None,
    model: Model = None,
    normalize: Normalize = None,
    weights_key: WeightsKey = None,
    teacher_model: TeacherModel = None,
    teacher_normalize: TeacherNormalize = None,
    teacher_weights_key: TeacherWeightsKey = None,
    limit: Limit = None,
    resize: Resize = None,
    crop: Crop = None,
    batch_size: BatchSize = 500,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Measure a checkpoint on the test split.

    Writes the figures as JSON. A student is compared with its teacher too, if that is where it was. Of a corrupted set,
    such as cifar10c:PATH, each corruption and severity is measured, and their means.
    """
    corrupted = is_corrupted_set(data)
    attacks = ("clean" if corrupted else "clean,pgd20") if attacks is None else attacks
    names = check_attacks(name.strip() for name in attacks.split(",") if name.strip())
    if "autoattack" in names:
        importlib.import_module("pyautoattack")  # before the other attacks have taken their time
    settings = dataclasses.asdict(attack_settings(eps, norm, seed, batch_size))
    theirs = (teacher_model, teacher_normalize, teacher_weights_key)
    check_teacher_settings(teacher, *theirs)
    if corrupted and teacher is not None:
        raise InputError(f"teacher is {teacher!r}, but corrupted sets measure no fidelity")
    one = corruption_cells(data)[0].name if corrupted else data
    test_set = load_dataset(one, split="test", limit=limit, resize=resize, crop=crop).to(
        choose_device(device)
    )
    network, stored = _load(checkpoint, (model, normalize, weights_key), test_set)
    if corrupted:
        prepare_file(out, "out")
        measured = evaluate_corruptions(
            network, data, names, limit=limit, resize=resize, crop=crop, **settings
        )
        about = {"checkpoint": checkpoint, "model": stored["model"], "data": data}
        write_json(out, measured.to_dict() | about | {"environment": environment(test_set.images.device)})
        print("\n".join(measured.to_text(name) for name in names))
        return
    digest = None
    if teacher is None:
        teacher, theirs = _remembered_teacher(stored)
        digest = stored.get("digests", {}).get("teacher")
    teacher_network, doubts = None, []
    if teacher is not None:
        teacher_network, known = _load(teacher, theirs, test_set, "teacher")
        if digest is not None and digest != digest_of_network(teacher_network, known["model"]):
            doubts.append(f"teacher {teacher!r} is no longer the network that this student was trained with")
    prepare_file(out, "out")
    result = evaluate_model(network, test_set, names, teacher=teacher_network, **settings).to_dict()
    result["warnings"] = doubts + result["warnings"]
    result |= {"checkpoint": checkpoint, "model": stored["model"], "data": data, "teacher": teacher}
    write_json(out, result | {"environment": environment(test_set.images.device)})
    _print_figures(result, names)


@app.command()
def attack(
    checkpoint: Checkpoint,
    data: Data,
    out: Annotated[Path, typer.Option(help=".npz file to write: x_test, y_test, x_clean, class_names")],
    attack: Annotated[str, typer.Option(help="one of: mismatch, " + ", ".join(ATTACKS))] = "pgd20",
    eps: Eps = "8/255",
    norm: Norm = "linf",
    teacher: Annotated[str | None, typer.Option(help="checkpoint, for mismatch")] = None,
    model: Model = None,
    normalize: Normalize = None,
    weights_key: WeightsKey = None,
    teacher_model: TeacherModel = None,
    teacher_normalize: TeacherNormalize = None,
    teacher_weights_key: TeacherWeightsKey = None,
    limit: Limit = None,
    resize: Resize = None,
    crop: Crop = None,
    batch_size: BatchSize = 500,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Write adversarial examples as .npz.

    The archive can be read with --data npz:FILE.
    """
    if attack != "mismatch" and attack not in ATTACKS:
        raise one_of("attack", attack, ["mismatch", *ATTACKS])
    if attack == "mismatch" and teacher is None:
        raise InputError("attack 'mismatch' needs --teacher, a checkpoint to differ from")
    if attack != "mismatch" and teacher is not None:
        raise InputError(f"teacher is {teacher!r}, but attack {attack!r} uses none; mismatch does")
    theirs = (teacher_model, teacher_normalize, teacher_weights_key)
    check_teacher_settings(teacher, *theirs)
    settings = dataclasses.asdict(attack_settings(eps, norm, seed, batch_size))
    test_set = load_dataset(data, split="test", limit=limit, resize=resize, crop=crop).to(
        choose_device(device)
    )
    network, _ = _load(checkpoint, (model, normalize, weights_key), test_set)
    x = as_float(test_set.images)
    if attack == "mismatch":
        assert teacher is not None
        other, _ = _load(teacher, theirs, test_set, "teacher")
        prepare_file(out, "out")
        x_adv = mismatched_examples(network, other, x, **settings)
    else:
        prepare_file(out, "out")
        x_adv = attack_images(attack, network, test_set, **settings)
    with torch.no_grad():
        correct = torch.cat([network(part).argmax(1) for part in x_adv.split(batch_size)]) == test_set.labels
    buffer = io.BytesIO()
    tensors = {"x_test": x_adv, "y_test": test_set.labels, "x_clean": x}
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    arrays["class_names"] = np.array(test_set.class_names)  # for a class that no image kept
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(out, buffer.getvalue())
    print(f"{attack}: accuracy {100 * correct.double().mean():.2f} % on {len(test_set)} images; {out}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="folders that advfunmatch train wrote")],
    out: Annotated[Path, typer.Option(help="HTML file to write; the same goes beside it as PNG")] = Path(
        "report.html"
    ),
) -> None:
    """Compare runs in one HTML page.

    Figures, curves, adversarial examples and throughput; the page needs no other file.
    """
    for sentence in write_report(runs, out):
        print(f"warning: {sentence}", file=sys.stderr)
    print(f"{out} and {out.with_suffix('.png')}")


@app.command()
def methods() -> None:
    """Print the table of methods.

    What each attack maximises, its loss, and its defaults with their sources.
    """
    print(methods_text())


@app.command()
def models() -> None:
    """Print the table of networks.

    The names that --model takes, whose code each network is equal to, and which share one state dict.
    """
    print(models_text())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the table, the picture and the runs")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="of all four runs")] = 0,
    epochs: Annotated[int, typer.Option(help="of all four runs")] = demo_module.EPOCHS,
) -> None:
    """Run everything once, on digits.

    Distils a robust student and compares it with two that are not, in a few minutes on a CPU.
    """
    result = demo_module.run_demo(out, seed=seed, epochs=epochs)
    console = Console()
    console.print(demo_table(result))
    print(f"{result['seconds']:.0f} s in all; {out / 'demo.png'}, {out / 'demo.json'}")


def _line(result: dict[str, Any]) -> str:
    """The figures of one network after training."""
    line = f"clean {result['clean']:.2f} %   PGD-20 {result['pgd20']:.2f} %"
    return line + (f"   agreement {result['agreement']:.2f} %" if "agreement" in result else "")


def _load(
    path: str, options: ForeignOptions, data: ImageDataset, what: str = "checkpoint"
) -> tuple[nn.Module, dict[str, Any]]:
    """`load_network`, which says so where classes were put into another order."""
    model, normalize, weights_key = options
    if model is None:
        prefix = "teacher_" if what == "teacher" else ""
        for name, value in (("normalize", normalize), ("weights_key", weights_key)):
            if value is not None:
                raise InputError(
                    f"{prefix}{name} is {value!r}, which needs {prefix}model, the architecture of the weights"
                )
    network, stored = load_network(path, model, data, what, normalize=normalize, weights_key=weights_key)
    if isinstance(network, ClassesReordered):
        print(
            f"note: {what} {path!r} counts its classes in another order than data {data.name!r}; matched by name",
            file=sys.stderr,
        )
    return network, stored


def _remembered_teacher(stored: dict[str, Any]) -> tuple[str | None, ForeignOptions]:
    """The teacher that a student was trained with and what else was said of it, if the file is still there."""
    known = stored["config"].get
    path = known("teacher")
    there = path is not None and os.path.isfile(path)
    options = known("teacher_model"), known("teacher_normalize"), known("teacher_weights_key")
    return (path, options) if there else (None, (None, None, None))


def _say(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as one sentence; of several processes only the first says it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr)


def _print_figures(result: dict[str, Any], attacks: Sequence[str]) -> None:
    for name in attacks:
        print(f"{name:<22} {result[name]:6.2f} %")
    for suffix, where in (("", "clean"), ("_mismatched", "mismatched")):
        if f"agreement{suffix}" in result:
            agreement, kl = result[f"agreement{suffix}"], result[f"kl_{where}"]
            print(f"{f'agreement, {where}':<22} {agreement:6.2f} %, KL {kl:.4g}")
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit. See Note [Exit codes]."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _say
            code = app(args=arguments or ["--help"], prog_name="advfunmatch", standalone_mode=False)
        if code == INTERRUPTED:  # typer has swallowed the KeyboardInterrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except InputError as error:
        return _fail(str(error), 2)
    except TrainingDiverged as error:
        return _fail(str(error), 1)
    except ProcessLost:
        return 2
    except (KeyboardInterrupt, typer.Abort):
        sentence = "interrupted; what was written is whole"
        if "train" in arguments[:1]:
            sentence += ", and train --resume goes on from its last checkpoint"
        return _fail(sentence, INTERRUPTED)
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is not installed: pip install 'advfunmatch[train]'", 2)
    except Exception as error:
        # typer's own complaints about flags know their exit code and say what is wrong.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            return _fail(error.format_message(), 2)
        if isinstance(error, torch.OutOfMemoryError):
            sentence = f"the device is out of memory; a smaller --batch-size needs less ({error})"
            return _fail(sentence, 2, everywhere=True)
        raise


def _fail(sentence: str, code: int, *, everywhere: bool = False) -> int:
    """Say what is wrong; of several processes only the first does, unless each fails for itself."""
    if everywhere or os.environ.get("RANK", "0") == "0":
        print(f"error: {sentence}", file=sys.stderr)
    return code
