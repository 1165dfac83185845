"""The command line: `advfunmatch train`, `evaluate`, `demo`; also `python -m advfunmatch`.

Note [Exit codes]
~~~~~~~~~~~~~~~~~
0: done. 2: what was asked for cannot be done (a name, a value, a file, a full disk); one sentence on stderr says why.
1: training diverged. 130: interrupted. Anything else is a bug and shows its traceback.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from . import demo as demo_module
from .checkpoint import model_of, read_checkpoint, require_fit
from .config import FRACTIONS, TrainConfig, config_from, parse_number, read_settings
from .data import load_dataset
from .errors import InputError, TrainingDiverged
from .evaluate import check_attacks
from .evaluate import evaluate as evaluate_model
from .files import make_folder, write_json
from .methods import methods_text
from .presets import PRESETS
from .presets import preset as make_preset
from .report import demo_table
from .trainer import choose_device
from .trainer import train as train_model

app = typer.Typer(
    name="advfunmatch",
    help="Adversarial distillation: train, attack and evaluate robust students.",
    no_args_is_help=True,
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
        if setting.default not in (None, False, "", dataclasses.MISSING):
            default = "8/255" if setting.name == "eps" else setting.default
            text += f" [default: {default}]"
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
    """Train a network; writes checkpoint.pt, metrics.jsonl and result.json into --out."""
    settings = make_preset(preset) if preset else {}
    settings |= read_settings(config) if config else {}
    settings |= {name: value for name, value in flags.items() if value is not None}
    resolved = config_from(settings)
    result = train_model(resolved)
    line = f"clean {result['clean']:.2f} %   PGD-20 {result['pgd20']:.2f} %"
    if "agreement" in result:
        line += f"   agreement {result['agreement']:.2f} %"
    print(f"{line}   {result['seconds']:.1f} s   {resolved.out}")


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Option(help="checkpoint.pt of advfunmatch train")],
    data: Annotated[str, typer.Option(help="digits, folder:PATH or npz:PATH; its test split is used")],
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    attacks: Annotated[
        str, typer.Option(help="names with commas: clean, pgd20, autoattack, ...")
    ] = "clean,pgd20",
    eps: Annotated[
        str, typer.Option(help="radius of the attack ball, e.g. 8/255", metavar="NUMBER")
    ] = "8/255",
    norm: Annotated[str, typer.Option(help="norm of the ball: linf or l2")] = "linf",
    teacher: Annotated[
        str | None, typer.Option(help="checkpoint to measure agreement and KL against")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="measure on this many test images instead of all")] = None,
    batch_size: Annotated[int, typer.Option(help="images attacked at a time")] = 500,
    seed: Annotated[int, typer.Option(help="seeds the attacks")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto")] = "auto",
) -> None:
    """Measure a checkpoint on the test split, and write the figures as JSON."""
    names = [name.strip() for name in attacks.split(",") if name.strip()]
    check_attacks(names)
    radius = parse_number(eps)
    _check_radius(radius, norm)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, but must be at least 1")
    target = choose_device(device)
    stored = read_checkpoint(checkpoint)
    model = model_of(stored, checkpoint).to(target)
    test_set = load_dataset(data, split="test", limit=limit).to(target)
    require_fit(stored, checkpoint, test_set)
    # A student remembers its teacher; the file may have moved since, and then fidelity is simply not measured.
    remembered = stored["config"].get("teacher")
    if teacher is None and remembered and Path(remembered).is_file():
        teacher = remembered
    teacher_model = None
    if teacher is not None:
        stored_teacher = read_checkpoint(teacher, "teacher")
        require_fit(stored_teacher, teacher, test_set, "teacher")
        teacher_model = model_of(stored_teacher, teacher, "teacher").to(target)
    make_folder(out.parent, "the folder of out")
    result = evaluate_model(
        model, test_set, names, eps=radius, norm=norm, seed=seed, teacher=teacher_model, batch_size=batch_size
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
def methods() -> None:
    """Print the methods: what each attack maximises, its loss, and its defaults with their sources."""
    print(methods_text())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the table, the picture and the runs")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="of all four runs")] = 0,
    epochs: Annotated[int, typer.Option(help="of all four runs")] = demo_module.EPOCHS,
) -> None:
    """Distil a robust student on digits and compare it with two that are not, in a few minutes on a CPU."""
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit. See Note [Exit codes]."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        code = app(args=arguments, prog_name="advfunmatch", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except InputError as error:
        return _fail(str(error), 2)
    except TrainingDiverged as error:
        return _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; the last checkpoint is whole", 130)
    except Exception as error:
        # typer's own complaints about flags know their exit code and say what is wrong.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            return _fail(error.format_message(), 2)
        if isinstance(error, torch.OutOfMemoryError):
            return _fail(f"the device is out of memory; a smaller --batch-size needs less ({error})", 2)
        raise


def _fail(sentence: str, code: int) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return code
