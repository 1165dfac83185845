"""The figures of the docs, drawn from committed results."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.results import Record, load, records
from benchmarks.tables import by_name, order_of, pretty_shape, provenance, shape_of, step_words

# Okabe and Ito's palette, which the colour-blind can tell apart; pale or dark forms belong to the same peer.
COLOURS = {
    "ours": "#0072b2",
    "ours recompute": "#56b4e9",
    "ours bf16": "#56b4e9",
    "eager": "#999999",
    "eager float32": "#c4c4c4",
    "compile": "#e69f00",
    "formula": "#66c2a5",
    "compiled formula": "#00755a",
    "eager probabilities": "#d55e00",
    "limit": "#22262b",
}
_MARKERS = {"ours": "o", "ours recompute": "P", "compile": "s", "eager": "D"}
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5f6670",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "svg.hashsalt": "advfunmatch",  # the same results give the same file
    "svg.fonttype": "path",
}


def save_figure(figure: Any, path: Path, note: str = "") -> Path:
    """Write and close a figure, with a note on where its numbers come from at the bottom."""
    if note:
        bottom = 0.16 / figure.get_figheight()
        figure.get_layout_engine().set(rect=(0, bottom, 1, 1 - bottom))
        figure.text(0.995, 0.005, note, ha="right", va="bottom", fontsize=6.5, color="#7a818b")
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, dpi=150, metadata=metadata, facecolor="white")
    plt.close(figure)
    return path


def kernels(results: Path, path: Path) -> Path:
    """How many times faster than the peers, by shape: loss and both gradients; the gradients alone."""
    found = by_name(results, "kernels")
    panels = (
        ("both", "Loss and both gradients", ("eager", "compile")),
        ("grad", "Both gradients alone", ("eager", "compile", "formula", "compiled formula")),
    )
    rows = len({r.group for r in found.values() if r.name.startswith("softmax_kl/grad/")})
    figure, axes = plt.subplots(1, 2, figsize=(11, max(3.6, 0.46 * rows + 1.4)), layout="constrained")
    for axis, (mode, title, peers) in zip(axes, panels, strict=True):
        chosen = [
            r for r in found.values() if r.variant == "ours" and r.name.startswith(f"softmax_kl/{mode}/")
        ]
        chosen.sort(key=order_of, reverse=True)
        height = 0.8 / len(peers)
        for k, peer in enumerate(peers):
            have = [(i, r.speedup[peer]) for i, r in enumerate(chosen) if peer in r.speedup]
            if not have:
                continue
            speedups = {i + 0.4 - height * (k + 0.5): s for i, s in have}
            speedup_bars(axis, speedups, 0.9 * height, COLOURS[peer], f"over {_PEER_WORDS[peer]}")
        labels = [shape_label(r, "\n") for r in chosen]
        axis.set_yticks(range(len(chosen)), labels, fontsize=8)
        axis.axvline(1, color=COLOURS["limit"], linewidth=0.9)
        axis.set_xlabel("times faster")
        axis.set_title(title)
        axis.grid(axis="y", visible=False)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2, fontsize=8)
    return save_figure(figure, path, provenance(load(results / "kernels-cpu.json")))


def speedup_bars(
    axis: Any, speedups: dict[float, dict[str, float]], thickness: float, colour: str, label: str
) -> None:
    """A bar at each height as long as the median, with the quartiles as its whisker and the number beside it."""
    where, values = list(speedups), list(speedups.values())
    medians = [s["median"] for s in values]
    whiskers = [[s["median"] - s["low"] for s in values], [s["high"] - s["median"] for s in values]]
    axis.barh(where, medians, thickness, color=colour, label=label)
    axis.errorbar(medians, where, xerr=whiskers, fmt="none", ecolor="#30343a", elinewidth=0.8)
    for y, s in speedups.items():
        axis.text(s["high"], y, f" {s['median']:#.3g}", va="center", fontsize=7, color="#30343a")
        axis.set_xlim(0, max(axis.get_xlim()[1], 1.12 * s["high"]))


def shape_label(record: Record, separator: str) -> str:
    """The shape in words, and the dtype where it is not float32."""
    _, _, shape, dtype = shape_of(record)
    return pretty_shape(shape) + ("" if dtype == "float32" else separator + dtype)


_PEER_WORDS = {
    "eager": "PyTorch eager",
    "compile": "torch.compile",
    "formula": "hand-written gradients, eager",
    "compiled formula": "hand-written gradients, compiled",
}


def limits(results: Path, path: Path) -> Path:
    """Where each shape stands: times as multiples of the limit that binds."""
    found = by_name(results, "kernels")
    ours = [
        r
        for r in found.values()
        if r.variant == "ours" and r.name.startswith(("softmax_kl/both/", "softmax_kl/grad/"))
    ]
    ours.sort(key=lambda r: (shape_of(r)[1] == "both", order_of(r)), reverse=True)
    figure, axis = plt.subplots(figsize=(9.5, 0.29 * len(ours) + 1.6), layout="constrained")
    for y, record in enumerate(ours):
        bound = max(record.limits.values())
        points = {}
        for variant in _MARKERS:
            other = found.get(f"{record.group}/{variant}")
            if other is not None and other.time is not None:
                points[variant] = other.time["median"] / bound
        axis.plot([1, max(points.values())], [y, y], color="#d5d9de", linewidth=1.2, zorder=1)
        for variant, x in points.items():
            axis.scatter(x, y, s=34, marker=_MARKERS[variant], color=COLOURS[variant], zorder=3, linewidth=0)
    handles = [
        plt.Line2D([], [], marker=marker, color=COLOURS[v], linestyle="none", label=v)
        for v, marker in _MARKERS.items()
    ]
    axis.axvline(1, color=COLOURS["limit"], linewidth=1.3)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(plt.FuncFormatter(lambda v, _: f"{v:g}"))
    labels = []
    for record in ours:
        mode, bound_name = shape_of(record)[1], record.bound()[0]
        labels.append(
            f"{'gradients' if mode == 'grad' else 'loss + gradients'}  {shape_label(record, ' ')}  [{bound_name}]"
        )
    axis.set_yticks(range(len(ours)), labels, fontsize=8)
    axis.set_ylim(-0.7, len(ours) - 0.3)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("time; the tightest limit (in brackets) = 1")
    axis.set_title("How far from what the machine can do")
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.4, -0.055), ncols=4, fontsize=8)
    return save_figure(figure, path, provenance(load(results / "kernels-cpu.json")))


def sweep(results: Path, path: Path) -> Path:
    """Cost over four decades of rows and of classes, with the limits and the region each binds."""
    content = load(results / "sweep-cpu.json")
    found = list(records(content))
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.8), layout="constrained", sharey=True)
    for axis, family in zip(axes, ("rows", "classes"), strict=True):
        place = 0 if family == "rows" else 1

        def size(record: Record, place: int = place) -> int:
            return int(shape_of(record)[2].split("x")[place])

        here = [r for r in found if r.details["family"] == family and r.time is not None]
        ours = sorted((r for r in here if r.variant == "ours"), key=size)
        unit = ours[0].limits["call"]
        x = np.array([size(r) for r in ours], dtype=float)
        _shade(axis, x, {name: np.array([r.limits[name] for r in ours]) for name in ("call", "exp", "copy")})
        for name, style in (("call", ":"), ("exp", "-."), ("copy", "--")):
            bound = [r.limits[name] / unit for r in ours]
            axis.plot(x, bound, style, color="#70767f", linewidth=1.0, label=_LIMITS[name])
        tightest = [max(r.limits.values()) / unit for r in ours]
        axis.plot(x, tightest, color=COLOURS["limit"], linewidth=2.2, label="limit: the tightest")
        for variant in ("eager", "compile", "ours"):
            line = sorted((r for r in here if r.variant == variant), key=size)
            y = np.array([[r.time[k] / unit for k in ("low", "median", "high")] for r in line if r.time])
            sizes = [size(r) for r in line]
            axis.fill_between(sizes, y[:, 0], y[:, 2], color=COLOURS[variant], alpha=0.2, linewidth=0)
            marker = _MARKERS[variant]
            axis.plot(
                sizes,
                y[:, 1],
                marker + "-",
                color=COLOURS[variant],
                markersize=4.5,
                linewidth=1.8,
                label=variant,
            )
        other = "1000 classes" if family == "rows" else "64 rows"
        axis.set(xscale="log", yscale="log", xlabel=f"{family} ({other})", xlim=(x[0] * 0.8, x[-1] * 1.25))
        axis.set_title(f"Loss and both gradients over {family}, float32")
        axis.set_ylim(bottom=0.02)
    axes[0].set_ylabel("time of a call; an empty autograd.Function = 1")
    regions = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour, _ in _REGIONS.values()]
    handles, words = axes[1].get_legend_handles_labels()
    handles, words = handles[::-1] + regions, words[::-1] + [word for _, word in _REGIONS.values()]
    axes[1].legend(handles, words, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    return save_figure(figure, path, provenance(content))


_LIMITS = {
    "call": "limit: autograd's own calls",
    "exp": "limit: exponentials",
    "copy": "limit: copy of the bytes",
}
_REGIONS = {
    "call": ("#e4e9f1", "launch-bound"),
    "exp": ("#fdebc8", "compute-bound"),
    "copy": ("#d9eee3", "bandwidth-bound"),
}


def _shade(axis: Any, x: np.ndarray, bounds: dict[str, np.ndarray]) -> None:
    """Colour the background by the limit that is highest there."""
    fine = np.geomspace(x[0] * 0.8, x[-1] * 1.25, 600)
    curves = {n: np.exp(np.interp(np.log(fine), np.log(x), np.log(y))) for n, y in bounds.items()}
    names = list(curves)
    highest = np.argmax([curves[n] for n in names], axis=0)
    starts = [0, *(np.flatnonzero(np.diff(highest)) + 1), len(fine)]
    for a, b in pairwise(starts):
        colour = _REGIONS[names[highest[a]]][0]
        axis.axvspan(fine[a], fine[min(b, len(fine) - 1)], color=colour, linewidth=0, zorder=0)


def accuracy(results: Path, path: Path) -> Path:
    """The error of a row's KL as the student comes near its teacher."""
    content = load(results / "accuracy-cpu.json")
    found = list(records(content))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    words = {
        "ours": ("ours", "o-"),
        "eager": ("F.kl_div, log-space", "D-"),
        "eager probabilities": ("F.kl_div, probabilities", "^--"),
    }
    for axis, offset in zip(axes, (0.0, 1000.0), strict=True):
        for variant, (label, style) in words.items():
            chosen = [r for r in found if r.variant == variant and r.details["offset"] == offset]
            for number, classes in enumerate(sorted({r.details["classes"] for r in chosen})):
                line = sorted(
                    (r for r in chosen if r.details["classes"] == classes), key=lambda r: r.details["kl"]
                )
                points = [(r.details["kl"], r.error["row_median"]) for r in line]
                points = [(kl, error) for kl, error in points if error]
                axis.plot(
                    *zip(*points, strict=True),
                    style,
                    color=COLOURS[variant],
                    markersize=4.5,
                    linewidth=1.3,
                    alpha=0.75,
                    label=label if number == 0 else None,
                )
        axis.axhline(1, color=COLOURS["limit"], linewidth=0.9, linestyle=":")
        axis.set(xscale="log", yscale="log", xlabel="KL(teacher ‖ student) of a row, median")
        axis.set_title("logits around 0" if offset == 0 else "logits offset by 1000")
        axis.text(
            0.99,
            1,
            "no digit right ",
            transform=axis.get_yaxis_transform(),
            ha="right",
            va="bottom",
            fontsize=7.5,
        )
    axes[0].set_ylabel("median relative error of a row's KL, float32")
    axes[0].legend(loc="center left", bbox_to_anchor=(0.02, 0.32), fontsize=8)
    return save_figure(figure, path, "one line for each number of classes, 2 to 128256; truth in float64")


def attack(results: Path, path: Path) -> Path:
    """The attack engine's speed over the loops that people run."""
    content = load(results / "attack-cpu.json")
    engines = [r for r in records(content) if r.variant == "engine"]
    colours = {"": COLOURS["eager"], "+autocast": "#cc79a7", "+compile": COLOURS["compile"]}
    words = {
        "": "the official loop",
        "+autocast": "it + autocast, channels-last",
        "+compile": "it + torch.compile",
    }
    figure, axis = plt.subplots(figsize=(10.5, 0.75 * len(engines) + 1.3), layout="constrained")
    engines = engines[::-1]
    for k, (suffix, colour) in enumerate(colours.items()):
        have = [(i, r.speedup.get(r.group.split("/")[0] + suffix)) for i, r in enumerate(engines)]
        speedups = {i + 0.27 - 0.27 * k: s for i, s in have if s is not None}
        speedup_bars(axis, speedups, 0.24, colour, f"over {words[suffix]}")
    labels = [step_words(record.group).replace(", ", "\n", 1) for record in engines]
    axis.set_yticks(range(len(engines)), labels, fontsize=8)
    axis.axvline(1, color=COLOURS["limit"], linewidth=0.9)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("times faster, whole attack, float32")
    axis.set_title("The attack engine against the loops of AdaAD, RSLAD and TRADES")
    axis.legend(loc="best", fontsize=8)
    return save_figure(figure, path, provenance(content))


_STEP = {
    "3×3 Winograd": "#1765c1",
    "3×3 Winograd, input gradient": "#7fb2ea",
    "convolution": "#e07b28",
    "convolution, input gradient": "#f2b37c",
    "linear": "#5b9a5b",
    "objective and update": "#b0463c",
    "ReLU, pooling, copies": "#8d949e",
}


def attack_step(results: Path, path: Path) -> Path:
    """Every operator of an attack step under the machine's roof, and what it takes of the step."""
    content = load(results / "attack-cpu.json")
    engines = [
        (Record(**record), run["limits"])
        for run in content["runs"]
        for record in run["records"]
        if record["name"].endswith("/engine")
    ]
    record, limits_then = max(engines, key=lambda pair: float(pair[0].details["flops"]))
    parts = record.details["parts"]
    matmul = record.details["matmul_per_second"]
    largest_copy = max(limits_then["copy"], key=lambda row: row["bytes"])
    copy = largest_copy["bytes_per_second"]["median"]
    _, networks, shape, _ = record.group.split("/")
    whole = sum(part["seconds"] * part["calls"] for part in parts)
    shares = {
        group: sum(p["seconds"] * p["calls"] for p in parts if p["group"] == group) / whole for group in _STEP
    }
    figure, (roof, bars) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(3, 2), layout="constrained")
    figure.suptitle(
        f"One step of the mismatch attack, {networks.replace('<-', ' ← ')}, {pretty_shape(shape)}",
        fontsize=11.5,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    heavy = [p for p in parts if p["seconds"] * p["calls"] > 2e-3 * whole]
    intensity = [p["flops"] / p["bytes"] for p in heavy]
    low, high = min(intensity) / 2, max(*intensity, matmul / copy) * 3
    roof.plot([low, matmul / copy, high], [low * copy, matmul, matmul], color=COLOURS["limit"], linewidth=1.2)
    roof.text(high, matmul * 1.12, "matrix rate ", ha="right", fontsize=8, color=COLOURS["limit"])
    roof.text(
        0.7, 0.55 * copy, f"copy of {largest_copy['bytes'] >> 20} MiB", fontsize=8, color=COLOURS["limit"]
    )
    for part in sorted(heavy, key=lambda p: -p["seconds"] * p["calls"]):
        roof.scatter(
            part["flops"] / part["bytes"],
            part["flops"] / part["seconds"],
            s=14 + 4000 * part["seconds"] * part["calls"] / whole,
            color=_STEP[part["group"]],
            alpha=0.75,
            edgecolor="white",
            linewidth=0.7,
            zorder=3,
        )
    roof.set(xscale="log", yscale="log", xlim=(low, high), ylim=(None, matmul * 2.5))
    roof.set_xlabel("operations for each byte that must be moved")
    roof.set_ylabel("operations a second")
    roof.set_title("Every operator under the roof (area: its share of the step)", fontweight="normal")
    names = list(shares)[::-1]
    bars.barh(names, [100 * shares[name] for name in names], 0.66, color=[_STEP[name] for name in names])
    for y, name in enumerate(names):
        bars.text(100 * shares[name], y, f" {shares[name]:.1%}", va="center", fontsize=8)
    bars.set_xlim(0, 118 * max(shares.values()))
    bars.tick_params(axis="y", labelsize=8.5, length=0)
    bars.grid(axis="y", visible=False)
    bars.set_xlabel("% of the step's time")
    bars.set_title("Shares by kind", fontweight="normal")
    return save_figure(figure, path, provenance(content))


_SHARES = {
    "teacher": "#0072b2",
    "student": "#56b4e9",
    "loss": "#d55e00",
    "step": "#009e73",
    "data": "#f0e442",
}


def training(results: Path, path: Path) -> Path:
    """Where a training step's time goes, ours beside the official loop's."""
    content = load(results / "training-cpu.json")
    found = {r.name: r for r in records(content)}
    groups = list(dict.fromkeys(r.group for r in found.values()))
    variants = ("ours", "ours bf16", "official compile", "official autocast", "official")
    figure, axis = plt.subplots(figsize=(9.5, 1.35 * len(groups) + 1.3), layout="constrained")
    labels, where = [], []
    for i, group in enumerate(reversed(groups)):
        base = found[f"{group}/official"].time
        assert base is not None
        here = [(v, found[f"{group}/{v}"]) for v in variants if f"{group}/{v}" in found]
        for k, (variant, record) in enumerate(here):
            assert record.time is not None
            y = i + 0.15 * k - 0.35
            total = record.time["median"] / base["median"]
            axis.barh(y, total, 0.13, color="#d5d9de")
            left = 0.0
            for name, share in record.details.get("share", {}).items():
                if name in _SHARES:
                    axis.barh(y, total * share, 0.13, left=left, color=_SHARES[name])
                    left += total * share
            axis.text(max(total, left), y, f" {total:.2f}", va="center", fontsize=7.5)
            labels.append(variant)
            where.append(y)
        above = i + 0.15 * len(here) - 0.38
        axis.text(0.004, above, step_words(group), fontsize=8.5, va="bottom", weight="bold")
    axis.set_yticks(where, labels, fontsize=8)
    axis.set_ylim(-0.5, len(groups) - 0.38)
    parts = {**_SHARES, "not taken apart": "#d5d9de"}
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in parts.values()]
    below = (0.45, -0.55 / figure.get_figheight())
    axis.legend(handles, list(parts), loc="upper center", ncols=6, fontsize=8, bbox_to_anchor=below)
    axis.set_xlim(left=0)
    axis.grid(axis="y", visible=False)
    axis.set_title("A training step: where the time of ours goes, beside the official loops")
    axis.set_xlabel("time, the official loop's = 1")
    return save_figure(figure, path, provenance(content))


def linear(results: Path, path: Path) -> Path:
    """The loss from hidden states: time against memory, ours with chunks of every size."""
    content = load(results / "linear-cpu.json")
    found = [r for r in records(content) if r.time is not None and r.peak_bytes]
    shapes = sorted({r.name.split("/")[2] for r in found}, key=lambda shape: int(shape.rpartition("x")[2]))
    figure, axes = plt.subplots(1, len(shapes), figsize=(5.6 * len(shapes), 4.2), layout="constrained")
    for axis, shape in zip(np.atleast_1d(axes), shapes, strict=True):
        here = [r for r in found if r.name.split("/")[2] == shape]
        line = [r for r in here if re.fullmatch(r"ours \d+ rows", r.variant)]
        line.sort(key=lambda r: r.peak_bytes or 0)

        def place(record: Record) -> tuple[float, float]:
            assert record.time is not None
            assert record.peak_bytes is not None
            return record.peak_bytes / 2**20, record.time["median"] / record.limits["matmul"]

        if line:
            axis.plot(*zip(*map(place, line), strict=True), "-", color=COLOURS["ours"], linewidth=1.6)
        seen = set()
        for record in here:
            if record.variant in seen:  # eager is in both runs
                continue
            seen.add(record.variant)
            x, y = place(record)
            ours = record.variant.startswith("ours")
            colour = COLOURS["ours"] if ours else COLOURS.get(record.variant, "#d55e00")
            is_chosen = record.variant == "ours"
            axis.plot(x, y, "*" if is_chosen else "o", markersize=13 if is_chosen else 6, color=colour)
            label = record.variant.removeprefix("ours ") if ours and not is_chosen else record.variant
            axis.annotate(
                label,
                (x, y),
                (6, -14 if is_chosen else 5),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
        axis.axhline(1, color=COLOURS["limit"], linewidth=1.0, linestyle="--")
        axis.set_xscale("log")
        axis.set_ylim(bottom=0.8)
        axis.margins(x=0.16)
        axis.set_title(f"{pretty_shape(shape.replace(',', '|'))} classes".replace("|", ", "))
        axis.set_xlabel("peak memory beyond inputs and gradients, MiB")
    np.atleast_1d(axes)[0].set_ylabel("time; products at the measured rate = 1")
    return save_figure(figure, path, provenance(content))


FIGURES: dict[str, tuple[str, Callable[[Path, Path], Path]]] = {
    "kernels": ("kernels", kernels),
    "limits": ("kernels", limits),
    "sweep": ("sweep", sweep),
    "accuracy": ("accuracy", accuracy),
    "linear": ("linear", linear),
    "attack": ("attack", attack),
    "attack-step": ("attack", attack_step),
    "training": ("training", training),
}
"""name -> (the part whose results it draws, the function)."""


def draw(results: Path, folder: Path) -> list[Path]:
    """Draw every figure whose results are there, as SVG for the documents and as PNG for everything else."""
    with plt.rc_context(STYLE):
        return [
            function(results, folder / f"{name}{suffix}")
            for name, (part, function) in FIGURES.items()
            if (results / f"{part}-cpu.json").exists()
            for suffix in (".svg", ".png")
        ]
