"""The table of methods as text, for ``advfunmatch methods``."""

from __future__ import annotations

from typing import Any

from .method import METHODS
from .own import MISSING


def methods_text() -> str:
    """Every method: its loss, its attack, what it needs, and its defaults with their sources."""
    attacks: dict[Any, str] = {
        None: "none: clean images",
        "cross_entropy": "max CE(S(x'), y)",
        "margin": "max of the best other logit of S(x') less y's",
        "mismatch": "max KL(T(x')‖S(x')), through both networks",
    }
    lines = ["S student, T teacher, x images, x' adversarial images, y labels; every method takes --awp", ""]
    outside = METHODS.outside()
    for method in METHODS.values():
        if not (method.objective is None or isinstance(method.objective, str)):
            attack = f"max {getattr(method.objective, '__name__', type(method.objective).__name__)}"
        else:
            fixed = "T" if method.needs_teacher else "S"
            attack = attacks.get(method.objective, f"max KL({fixed}(x)‖S(x')), {fixed}(x) fixed")
        needs = [
            name
            for name, needed in (("teacher", method.needs_teacher), ("labels", method.needs_labels))
            if needed
        ]
        lines += [
            f"{method.name}  ({method.source})",
            f"  loss    {method.formula}",
            f"  attack  {attack}",
            f"  needs   {' and '.join(needs) or 'images alone'}",
        ]
        if method.name in outside:
            lines.append(f"  from    {outside[method.name]}")
        for name, default in method.defaults.items():
            lines.append(f"  {_as_flag(name, default.value)}".ljust(34) + default.source)
        for setting in method.own:
            value = "…" if setting.default is MISSING else setting.default
            lines.append(f"  --set {setting.name}={value}".ljust(34) + "its own")
        lines.append("")
    return "\n".join(lines).rstrip()


def _as_flag(name: str, value: Any) -> str:
    """A setting as it is typed on the command line."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value:.4g}" if isinstance(value, float) else f"--{name} {value}"
