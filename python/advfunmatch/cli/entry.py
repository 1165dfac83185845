"""Run the command that was asked for, and turn what goes wrong into one sentence and an exit code."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer

from afm_kernels.version import __version__

from ..errors import InputError, ProcessLost, TrainingDiverged
from ..plugins import fault_of_plugin
from .attack import attack
from .demo import demo
from .evaluate import evaluate
from .listings import methods, models, presets
from .processes import ProcessesEnded
from .report import report
from .sections import SectionedHelp
from .train import train

INTERRUPTED = 130
# Whoever started the processes ends them all when one has ended, and the first must have said why by then.
HEADSTART = 2.0

app = typer.Typer(
    name="advfunmatch",
    help="Adversarial distillation: train, attack and evaluate robust students.\n\nStart with `advfunmatch demo`, or "
    "`advfunmatch train --data digits --model small_cnn --method pgd_at --eps 0.15 --out runs/teacher`.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (train, evaluate, attack, report, methods, models, presets, demo):
    app.command(cls=SectionedHelp if command is train else None)(command)


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    """What comes before a command."""
    if version:
        print(f"advfunmatch {__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit. See Note [Exit codes]."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _say
            code = app(
                args=arguments or ["--help"],
                prog_name="advfunmatch",
                standalone_mode=False,
                obj=list(arguments),  # which other processes are started with
            )
        if code == INTERRUPTED:  # typer has swallowed the KeyboardInterrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except InputError as error:
        return _fail(str(error), 2)
    except TrainingDiverged as error:
        return _fail(str(error), 1)
    except ProcessLost:
        return 2
    except ProcessesEnded as elsewhere:
        return elsewhere.code
    except (KeyboardInterrupt, typer.Abort):
        sentence = "interrupted; what was written is whole"
        if "train" in arguments[:1]:
            sentence += ", and train --resume goes on from its last checkpoint"
        if "evaluate" in arguments[:1]:
            sentence += ", and evaluate --resume goes on after the last attack that was done"
        return _fail(sentence, INTERRUPTED)
    except ModuleNotFoundError as error:
        fault = fault_of_plugin(error)
        return _fail(fault or f"{error.name} is not installed: pip install 'advfunmatch[train]'", 2)
    except Exception as error:
        # typer's own complaints about flags know their exit code and say what is wrong.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            return _fail(error.format_message(), 2)
        if isinstance(error, torch.OutOfMemoryError):
            sentence = f"the device is out of memory; a smaller --batch-size needs less ({error})"
            return _fail(sentence, 2, everywhere=True)
        if fault := fault_of_plugin(error):
            return _fail(fault, 2, everywhere=True)
        raise


def _say(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as one sentence; of several processes only the first says it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr)


def _fail(sentence: str, code: int, *, everywhere: bool = False) -> int:
    """Say what is wrong; of several processes only the first does, unless each fails for itself."""
    first = os.environ.get("RANK", "0") == "0"
    if everywhere or first:
        print(f"error: {sentence}", file=sys.stderr)
    if not first and code != INTERRUPTED:
        time.sleep(HEADSTART)
    return code
