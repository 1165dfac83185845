"""What a run measures: a little after epochs, by which the best of them is kept, and the test split at the end."""

from __future__ import annotations

import copy
from typing import Any

from ..evaluation import Ball, evaluate
from ..files import write_json
from .run import Run


def monitor(run: Run, epoch: int) -> dict[str, Any]:
    """Accuracies on what is watched while training, where `eval_every` asks for them; see Note [Splits].

    Returns:
        ``validation_clean`` and ``validation_pgd10``, or ``train_clean`` and ``train_pgd10``, in percent, and the
        ``norm`` and ``eps`` of that attack; nothing in processes that only follow.
    """
    config = run.config
    due = config.eval_every and ((epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs)
    if not (due and run.world.leads):
        return {}
    few = run.splits.to_watch(config.monitor_images)
    measured = evaluate(run.state.evaluated, few, ["clean", "pgd10"], eps=config.eps, norm=config.norm)
    found: dict[str, Any] = {
        f"{run.splits.watched}_{name}": value for name, value in measured.accuracies.items()
    }
    return found | {"norm": config.norm, "eps": config.eps}


def sentence(run: Run, measured: dict[str, Any]) -> str:
    """What `monitor` found, for the progress bar."""
    watched, ball = run.splits.watched, Ball(run.config.norm, run.config.eps)
    where = {"train": "on training images", "validation": "on validation images"}[watched]
    clean, attacked = (measured[f"{watched}_{name}"] for name in ("clean", "pgd10"))
    return f"clean {clean:.1f} % · PGD-10, {ball}, {attacked:.1f} % {where}"


def keep_best(run: Run, epoch: int, measured: dict[str, Any]) -> None:
    """Remember the evaluated weights if they resist the attack on validation images better than any epoch's so far."""
    state, score = run.state, measured.get("validation_pgd10")
    if score is None or (state.best and score <= state.best["validation_pgd10"]):
        return
    weights = {name: value.detach().clone() for name, value in state.evaluated.state_dict().items()}
    state.best = {"epoch": epoch + 1, "step": state.step, **measured, "state_dict": weights}


def final_result(run: Run) -> dict[str, Any]:
    """Measure the trained network, and that of the best epoch, on the whole test split, and write result.json."""
    config, state = run.config, run.state
    measured = _measure(run, state.evaluated)
    result = {
        **measured,
        "method": config.method,
        "model": config.model,
        "data": config.data,
        "epochs": config.epochs,
        "train_images": len(run.train_set),
        "seconds": round(state.seconds, 2),
        "images_per_second": round(config.epochs * run.images_per_epoch / state.seconds, 1),
    }
    if run.teacher_accuracy:
        result["teacher_accuracy"] = run.teacher_accuracy
    if state.best:
        watched = ("validation_clean", "validation_pgd10")
        last = {name: state.metrics[-1][name] for name in watched}
        best = {name: state.best[name] for name in watched}
        result["last"] = {"epoch": config.epochs, "checkpoint": run.checkpoint_path.name, **last}
        result["best"] = {"epoch": state.best["epoch"], "checkpoint": run.best_path.name, **best}
        if state.best["epoch"] != config.epochs:
            network = copy.deepcopy(state.evaluated)
            network.load_state_dict(state.best["state_dict"])
            measured = _measure(run, network)
        result["best"] |= measured
    result |= {"config": config.to_dict(), "environment": run.made_with}
    write_json(run.out / "result.json", result)
    return result


def _measure(run: Run, network: Any) -> dict[str, Any]:
    config = run.config
    return evaluate(
        network,
        run.splits.test,
        ["clean", "pgd20"],
        eps=config.eps,
        norm=config.norm,
        teacher=run.teacher,
    ).to_dict()
