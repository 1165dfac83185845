"""How the kernels' speed went from commit to commit: ``python -m benchmarks.history``.

Takes every committed version of benchmarks/results/kernels-cpu.json and the file as it is, and draws ours over eager,
one panel a shape, quartiles as a band. A red ring marks what ``benchmarks.compare`` calls slower than before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.compare import compare
from benchmarks.figures import COLOURS, STYLE, save_figure, shape_label
from benchmarks.results import FOLDER, ROOT, Json, Record, records, validate
from benchmarks.tables import order_of

MODES = {"both": ("loss and both gradients", "o-"), "grad": ("both gradients alone", "s--")}
Versions = list[tuple[str, Json]]


def versions(path: Path) -> Versions:
    """(label, content) of every version of a results file that git has, oldest first, and last the file as it is."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=path.parent, capture_output=True, text=True, check=True
        )
        return done.stdout

    log = git("log", "--reverse", "--format=%h", "--", path.name).split()
    texts = [(rev, git("show", f"{rev}:./{path.name}")) for rev in log]
    now = path.read_text()
    if not texts or texts[-1][1] != now:
        texts.append(("working copy", now))
    found = []
    for label, text in texts:
        content = json.loads(text)
        try:
            validate(content)
        except ValueError:  # of an older schema
            continue
        found.append((label, content))
    return found


def slower(found: Versions) -> set[tuple[int, str]]:
    """(place, name) of each record that is slower than in the version before."""
    return {
        (place, change.name)
        for place in range(1, len(found))
        for change in compare(found[place - 1][1], found[place][1])
        if change.kind == "slower"
    }


def draw(found: Versions, path: Path) -> Path:
    """One panel a shape and dtype that at least two versions have measured."""
    named: list[dict[str, Record]] = [{r.name: r for r in records(content)} for _, content in found]
    counts: dict[str, int] = {}
    for group in (r.group for each in named for r in each.values() if r.variant == "ours"):
        op, mode, rest = group.split("/", 2)
        if op == "softmax_kl" and mode == "both":
            counts[rest] = counts.get(rest, 0) + 1
    shapes = [rest for rest, count in counts.items() if count > 1]
    latest = {r.group.split("/", 2)[2]: r for each in named for r in each.values() if r.group.count("/") == 3}
    shapes.sort(key=lambda rest: order_of(latest[rest]))
    worse = slower(found)
    columns = 4
    rows = max(1, -(-len(shapes) // columns))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(11.5, 1.9 * rows + 0.9), sharex=True, squeeze=False, layout="constrained"
        )
        for axis in axes.flat[len(shapes) :]:
            axis.set_visible(False)
        for axis, rest in zip(axes.flat, shapes, strict=False):
            for mode, (_, style) in MODES.items():
                name = f"softmax_kl/{mode}/{rest}/ours"
                line = [(i, each[name].speedup.get("eager")) for i, each in enumerate(named) if name in each]
                points = [(i, s) for i, s in line if s is not None]
                if not points:
                    continue
                colour = COLOURS["ours" if mode == "both" else "compile"]
                x = [i for i, _ in points]
                axis.fill_between(
                    x, [s["low"] for _, s in points], [s["high"] for _, s in points], color=colour, alpha=0.2
                )
                axis.plot(x, [s["median"] for _, s in points], style, color=colour, markersize=4)
                marked = [(i, s["median"]) for i, s in points if (i, name) in worse]
                axis.plot(*zip(*marked, strict=True) if marked else ([], []), "o", **_RING)
            title = shape_label(latest[rest], " ")
            axis.set_title(title, fontsize=8.5 if len(title) < 34 else 6.5)
            axis.set_ylim(bottom=0)
            axis.axhline(1, color=COLOURS["limit"], linewidth=0.8)
            axis.set_xticks(
                range(len(found)), [label for label, _ in found], rotation=45, ha="right", fontsize=7
            )
            axis.tick_params(labelbottom=True)
        for axis in axes[:, 0]:
            axis.set_ylabel("times eager's speed")
        handles = [
            plt.Line2D(
                [], [], color=COLOURS["ours" if mode == "both" else "compile"], marker=style[0], label=word
            )
            for mode, (word, style) in MODES.items()
        ]
        handles.append(plt.Line2D([], [], linestyle="none", marker="o", label="slower than before", **_RING))
        figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8)
        return save_figure(figure, path)


_RING = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": "#cc0000", "markeredgewidth": 1.6}


def draw_all(folder: Path) -> list[tuple[Path, Versions]]:
    """The figure in each format, and what it shows.

    Raises:
        OSError, CalledProcessError: there is no git, or no history.
    """
    found = versions(FOLDER / "kernels-cpu.json")
    return [(draw(found, folder / f"history{suffix}"), found) for suffix in (".svg", ".png")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.history", description=__doc__.split("\n")[0])
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures", help="where to draw it")
    args = parser.parse_args(argv)
    try:
        drawn = draw_all(args.figures)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"benchmarks.history needs a clone with its git history: {error}", file=sys.stderr)
        return 2
    for path, found in drawn:
        print(f"{path}: {len(found)} versions")
    for place, name in sorted(slower(found)):
        print(f"slower at {found[place][0]}: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
