"""The command line: `advfunmatch train`, `evaluate`, `attack`, `report`, `methods`, `demo`; or `python -m advfunmatch`.

Note [Exit codes]
~~~~~~~~~~~~~~~~~
0: done. 2: what was asked for cannot be done (a name, a value, a file, a full disk); one sentence on stderr says why.
1: training diverged. 130: interrupted. Anything else is a bug and shows its traceback. Of the processes that torchrun
started, all end with that code, and the first one says why.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from . import demo as demo_module
from .checkpoint import load_foreign, model_of, read_checkpoint, require_fit
from .config import FRACTIONS, TrainConfig, check_seed, config_from, parse_number, read_settings
from .data import ImageDataset, as_float, load_dataset
from .distributed import leave_world
from .errors import InputError, ProcessLost, TrainingDiverged, one_of
from .evaluate import ATTACKS, attack_images, check_attacks, mismatched_examples
from .evaluate import evaluate as evaluate_model
from .files import prepare_file, write_atomically, write_json
from .methods import methods_text
from .presets import PRESETS
from .presets import preset as make_preset
from .report import demo_table
from .report_html import write_report
from .trainer import choose_device
from .trainer import train as train_model

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
        "config": (str, "YAML file of settings; flags override it"),
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

    Writes checkpoint.pt, metrics.jsonl (a row an epoch), result.json and run.json into --out. A setting comes from its
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
    line = f"clean {result['clean']:.2f} %   PGD-20 {result['pgd20']:.2f} %"
    if "agreement" in result:
        line += f"   agreement {result['agreement']:.2f} %"
    print(f"{line}   {result['seconds']:.1f} s   {resolved.out}")


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Option(help="checkpoint.pt of advfunmatch train")],
    data: Annotated[str, typer.Option(help="as for train; its test split is used")],
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    attacks: Annotated[str, typer.Option(help="names with commas: " + ", ".join(ATTACKS))] = "clean,pgd20",
    eps: Annotated[
        str, typer.Option(help="radius of the attack ball, e.g. 8/255", metavar="NUMBER")
    ] = "8/255",
    norm: Annotated[str, typer.Option(help="norm of the ball: linf or l2")] = "linf",
    teacher: Annotated[
        str | None, typer.Option(help="checkpoint to measure agreement and KL against")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="architecture, if --checkpoint is another project's")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="measure on this many test images instead of all")] = None,
    batch_size: Annotated[int, typer.Option(help="images attacked at a time")] = 500,
    seed: Annotated[int, typer.Option(help="seeds the attacks")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto")] = "auto",
) -> None:
    """Measure a checkpoint on the test split.

    Writes the figures as JSON. A student is compared with its teacher too, if that is where it was.
    """
    names = [name.strip() for name in attacks.split(",") if name.strip()]
    check_attacks(names)
    radius = parse_number(eps, "eps")
    _check_radius(radius, norm)
    _check_batch_size(batch_size)
    check_seed(seed)
    target = choose_device(device)
    stored: dict[str, Any] = {"model": model, "config": {}} if model else read_checkpoint(checkpoint)
    test_set = load_dataset(data, split="test", limit=limit).to(target)
    if model:
        network = load_foreign(checkpoint, model, test_set).to(target)
    else:
        require_fit(stored, checkpoint, test_set)
        network = model_of(stored, checkpoint).to(target)
    # A student remembers its teacher; the file may have moved since, and then fidelity is simply not measured.
    remembered = None if stored["config"].get("teacher_model") else stored["config"].get("teacher")
    if teacher is None and remembered and Path(remembered).is_file():
        teacher = remembered
    teacher_model = _load(teacher, test_set, "teacher").to(target) if teacher else None
    prepare_file(out, "out")
    result = evaluate_model(
        network,
        test_set,
        names,
        eps=radius,
        norm=norm,
        seed=seed,
        teacher=teacher_model,
        batch_size=batch_size,
    ).to_dict()
    result |= {"checkpoint": checkpoint, "model": stored["model"], "data": data, "teacher": teacher}
    write_json(out, result)
    for name in names:
        print(f"{name:<12} {result[name]:6.2f} %")
    for name in ("agreement", "agreement_mismatched"):
        if name in result:
            print(f"{name:<20} {result[name]:6.2f} %")
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


@app.command()
def attack(
    checkpoint: Annotated[str, typer.Option(help="checkpoint.pt of advfunmatch train")],
    data: Annotated[str, typer.Option(help="as for train; its test split is attacked")],
    out: Annotated[Path, typer.Option(help=".npz file to write: x_test, y_test, x_clean")],
    attack: Annotated[str, typer.Option(help="one of: mismatch, " + ", ".join(ATTACKS))] = "pgd20",
    eps: Annotated[
        str, typer.Option(help="radius of the attack ball, e.g. 8/255", metavar="NUMBER")
    ] = "8/255",
    norm: Annotated[str, typer.Option(help="norm of the ball: linf or l2")] = "linf",
    teacher: Annotated[str | None, typer.Option(help="checkpoint, for mismatch")] = None,
    limit: Annotated[int | None, typer.Option(help="attack this many test images instead of all")] = None,
    batch_size: Annotated[int, typer.Option(help="images attacked at a time")] = 500,
    seed: Annotated[int, typer.Option(help="seeds the attack")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto")] = "auto",
) -> None:
    """Write adversarial examples as .npz.

    The archive can be read with --data npz:FILE.
    """
    if attack != "mismatch" and attack not in ATTACKS:
        raise one_of("attack", attack, ["mismatch", *ATTACKS])
    if attack == "mismatch" and teacher is None:
        raise InputError("attack 'mismatch' needs --teacher, a checkpoint to differ from")
    radius = parse_number(eps, "eps")
    _check_radius(radius, norm)
    _check_batch_size(batch_size)
    check_seed(seed)
    target = choose_device(device)
    test_set = load_dataset(data, split="test", limit=limit).to(target)
    model = _load(checkpoint, test_set, "checkpoint").to(target)
    prepare_file(out, "out")
    x = as_float(test_set.images)
    if attack == "mismatch":
        assert teacher is not None
        other = _load(teacher, test_set, "teacher").to(target)
        x_adv = mismatched_examples(model, other, x, eps=radius, norm=norm, seed=seed, batch_size=batch_size)
    else:
        x_adv = attack_images(
            attack, model, test_set, eps=radius, norm=norm, seed=seed, batch_size=batch_size
        )
    with torch.no_grad():
        correct = torch.cat([model(part).argmax(1) for part in x_adv.split(batch_size)]) == test_set.labels
    buffer = io.BytesIO()
    arrays = {"x_test": x_adv, "y_test": test_set.labels, "x_clean": x}
    np.savez_compressed(buffer, **{name: value.cpu().numpy() for name, value in arrays.items()})  # type: ignore[arg-type]
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
    write_report(runs, out)
    print(f"{out} and {out.with_suffix('.png')}")


@app.command()
def methods() -> None:
    """Print the table of methods.

    What each attack maximises, its loss, and its defaults with their sources.
    """
    print(methods_text())


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


def _check_radius(eps: float, norm: str) -> None:
    if norm not in ("linf", "l2"):
        raise InputError(f"norm is {norm!r}, but must be one of: linf, l2")
    if not 0 < eps < float("inf"):
        raise InputError(f"eps is {eps:g}, but must be positive and finite")
    if norm == "linf" and eps > 1:
        raise InputError(f"eps is {eps:g}, but images lie in [0, 1], so it must be at most 1 (try 8/255)")


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, but must be at least 1")


def _load(path: str, data: ImageDataset, what: str) -> torch.nn.Module:
    stored = read_checkpoint(path, what)
    require_fit(stored, path, data, what)
    return model_of(stored, path, what)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit. See Note [Exit codes]."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(args=arguments or ["--help"], prog_name="advfunmatch", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except InputError as error:
        return _fail(str(error), 2)
    except TrainingDiverged as error:
        return _fail(str(error), 1)
    except ProcessLost:
        return 2
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; the last checkpoint is whole", 130)
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
