"""The tables of the README and the docs, as Markdown, made of committed results and of nothing else.

A document marks where a table goes:

    <!-- table:kernels -->
    <!-- /table -->

``python -m benchmarks.report`` writes what is between the markers; a table whose results
are not committed stays empty.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.kernels import floors as floors_of_softmax_kl
from benchmarks.markdown import markdown
from benchmarks.results import FOLDER, Json, MissingResults, Record, load, records

_MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
_DTYPES = ("float64", "float32", "bfloat16", "float16")


def fill(text: str, folder: Path = FOLDER) -> str:
    """The document with every marked table made anew."""

    def made(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise ValueError(f"there is no table {name!r}; there are {', '.join(TABLES)}")
        try:
            table = TABLES[name](folder) + "\n"
        except MissingResults:
            table = ""
        return f"{match[1]}{table}{match[4]}"

    return _MARKED.sub(made, text)


def names_in(text: str) -> list[str]:
    """The tables a document asks for."""
    return [match[2] for match in _MARKED.finditer(text)]


def by_name(folder: Path, part: str) -> dict[str, Record]:
    """The records of one part's CPU results."""
    return {record.name: record for record in records(load(folder / f"{part}-cpu.json"))}


def provenance(content: Json) -> str:
    """Where the numbers come from, in one line under a table."""
    runs = content["runs"]
    machine, versions = runs[-1]["machine"], runs[-1]["versions"]
    commits = sorted({run["commit"][:8] for run in runs})
    dates = sorted({run["date"] for run in runs})
    load = max(run["settings"].get("other_load") or 0 for run in runs)
    return (
        f"{machine['cpu']}, {machine['instruction_set']}, {machine['threads']} threads; torch {versions['torch']}; "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commit {', '.join(commits)}; other programs used at "
        f"most {load:.0%} of the processors. Ratios of interleaved calls, medians."
    )


def _with_provenance(table: str, folder: Path, part: str) -> str:
    return f"{table}\n\n<sub>{provenance(load(folder / f'{part}-cpu.json'))}</sub>"


def times_(record: Record | None, peer: str) -> str:
    """A speedup as "6.3", or a dash where there is none."""
    if record is None or peer not in record.speedup:
        return "–"
    return digits(record.speedup[peer]["median"])


def digits(value: float) -> str:
    """Two significant digits, three from 10 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def error_(value: float | None) -> str:
    return "NaN" if value is None else "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def shape_of(record: Record) -> tuple[str, str, str, str]:
    """(op, mode, shape, dtype) of a kernel record."""
    op, mode, shape, dtype = record.group.split("/")
    return op, mode, shape, dtype


def pretty_shape(shape: str) -> str:
    return shape.replace("-cl", " channels-last").replace("x", " × ")


def step_words(group: str) -> str:
    """A case of the attack or of the training step, in words."""
    method, networks, shape, steps = group.split("/")
    method = "AdaAD" if method == "adaad" else method.upper()
    count = steps.removesuffix("steps")
    return (
        f"{method}: {networks.replace('<-', ' ← ')}, {pretty_shape(shape)}, "
        f"{count} step{'' if count == '1' else 's'}"
    )


def order_of(record: Record) -> tuple[Any, ...]:
    _, mode, shape, dtype = shape_of(record)
    sizes = [int(n) for n in re.findall(r"\d+", shape)]
    return (
        _DTYPES.index(dtype) if dtype in _DTYPES else 9,
        len(sizes),
        sizes[-1] if len(sizes) == 2 else 0,
        sizes,
        mode,
    )


def kernels(folder: Path) -> str:
    """The README's table: forward and both gradients, and the gradients alone."""
    found = by_name(folder, "kernels")
    rows = []
    both = [r for r in found.values() if r.variant == "ours" and r.name.startswith("softmax_kl/both/")]
    for record in sorted(both, key=order_of):
        _, _, shape, dtype = shape_of(record)
        if dtype not in ("float32", "bfloat16"):
            continue
        grad = found.get(f"softmax_kl/grad/{shape}/{dtype}/ours")
        name, share = record.bound()
        rows.append(
            (
                f"{pretty_shape(shape)}{'' if dtype == 'float32' else ' ' + dtype}",
                times_(record, "eager"),
                times_(record, "compile"),
                times_(found.get(f"softmax_kl/both/{shape}/{dtype}/ours recompute"), "eager"),
                times_(grad, "eager"),
                times_(grad, "compile"),
                f"{share:.0%} of {_LIMIT_WORDS[name]}",
            )
        )
    head = (
        "rows × classes",
        "× eager",
        "× compile",
        "O(rows) memory × eager",
        "gradients only × eager",
        "× compile",
        "reaches",
    )
    return _with_provenance(markdown(head, rows), folder, "kernels")


_LIMIT_WORDS = {"copy": "the copy", "exp": "exp", "call": "autograd's own time", "matmul": "the matrix rate"}


def kernels_full(folder: Path) -> str:
    """Every kernel case: ratios, limit, memory and errors."""
    found = by_name(folder, "kernels")
    rows = []
    ours = [r for r in found.values() if r.variant == "ours"]
    for record in sorted(ours, key=lambda r: (shape_of(r)[0], order_of(r))):
        op, mode, shape, dtype = shape_of(record)
        name, share = record.bound()
        eager = found[f"{record.group}/eager"]
        others = {p: s["median"] for p, s in record.speedup.items() if p not in ("eager", "compile")}
        memory = "–"
        if record.peak_bytes is not None and eager.peak_bytes:
            memory = f"{record.peak_bytes / eager.peak_bytes:.2f}"
        rows.append(
            (
                f"{op} {mode}",
                pretty_shape(shape),
                dtype,
                times_(record, "eager"),
                times_(record, "compile"),
                ", ".join(f"{digits(value)} {peer}" for peer, value in others.items()) or "–",
                f"{share:.0%} {name}",
                memory,
                f"{_worst(record)} ({_worst(eager)})",
            )
        )
    head = (
        "op, mode",
        "shape",
        "dtype",
        "× eager",
        "× compile",
        "× others",
        "of the limit",
        "memory / eager's",
        "error (eager's)",
    )
    return _with_provenance(markdown(head, rows), folder, "kernels")


def _worst(record: Record) -> str:
    if any(error is None for error in record.error.values()):
        return "NaN"
    return error_(max(error for error in record.error.values() if error is not None))


def accuracy(folder: Path) -> str:
    """The worst median, over the numbers of classes, of the relative error of a row's KL."""
    found = list(by_name(folder, "accuracy").values())
    rows = []
    for delta in (1.0, 1e-2, 1e-3):
        for offset in (0.0, 1000.0):
            these = [r for r in found if (r.details["delta"], r.details["offset"]) == (delta, offset)]
            kls = [r.details["kl"] for r in these if r.details["classes"] >= 10]
            row = [f"{_about(kls)}{', logits + 1000' if offset else ''}"]
            for variant in ("ours", "eager", "eager probabilities"):
                errors = [r.error["row_median"] for r in these if r.variant == variant]
                worst = "NaN" if None in errors else f"{max(e for e in errors if e is not None):.0e}"
                negative = max(r.error["negative"] or 0 for r in these if r.variant == variant)
                row.append(
                    worst.replace("e-0", "e-").replace("e+00", "")
                    + (f", {_share(negative)} < 0" if negative else "")
                )
            rows.append(row)
    classes = sorted({r.details["classes"] for r in found})
    head = ("KL", "ours", "`F.kl_div`, log-space", "`F.kl_div`, probabilities")
    note = (
        f"<sub>The worst over {', '.join(map(str, classes))} classes; with the share of negative rows.</sub>"
    )
    return f"{markdown(head, rows)}\n\n{note}"


def _share(value: float) -> str:
    return "<1%" if value < 0.01 else f"{value:.0%}"


def _about(values: Sequence[float]) -> str:
    middle = sorted(values)[len(values) // 2]
    return f"≈ {middle:.1g}".replace("e-0", "e-")


def attack(folder: Path) -> str:
    """The attack engine against the official loops."""
    content = load(folder / "attack-cpu.json")
    found = {record.name: record for record in records(content)}
    rows = []
    for record in found.values():
        if record.variant != "engine":
            continue
        loop = record.group.split("/")[0]
        bf16 = found.get(f"{record.group}/engine_bf16")
        rows.append(
            (
                step_words(record.group),
                times_(record, loop),
                times_(record, f"{loop}+autocast"),
                times_(record, f"{loop}+compile"),
                times_(bf16, loop),
                f"{record.details['kl_share_of_loop']:.1%}",
            )
        )
    head = (
        "attack: student ← teacher, images",
        "× official loop",
        "× + autocast, channels-last",
        "× + compile",
        "bf16 × official",
        "KL reached",
    )
    return f"{markdown(head, rows)}\n\n<sub>{provenance(content)}</sub>"


def attack_quality(folder: Path) -> str:
    """Robust accuracy left by the engine's attacks and by those of other libraries."""
    path = folder / "attack-quality.json"
    if not path.exists():
        raise MissingResults(f"there are no results at {path}")
    content = json.loads(path.read_text())
    steps = sorted({row["steps"] for row in content["rows"]})
    cells: dict[str, dict[int, str]] = {}
    for row in content["rows"]:
        low, high = min(row["robust_accuracy"]), max(row["robust_accuracy"])
        cells.setdefault(row["attack"], {})[row["steps"]] = f"{row['mean']:.2f} ({low:.2f}–{high:.2f})"
    ball = _ball("linf", content["eps"])
    head = ("attack", *(f"robust accuracy %, PGD-{count}, {ball}" for count in steps))
    rows = [(name, *(found[count] for count in steps)) for name, found in cells.items()]
    seeds = len(content["rows"][0]["robust_accuracy"])
    note = (
        f"<sub>{content['images']} test digits, linf ε = {content['eps']}, clean accuracy "
        f"{content['clean_accuracy']:.1f} %, mean (range) of {seeds} seeds.</sub>"
    )
    return f"{markdown(head, rows)}\n\n{note}"


def attack_units(folder: Path) -> str:
    """What attacks leave standing as the unit of the logits grows, by attack and dtype."""
    path = folder / "attack-units.json"
    if not path.exists():
        raise MissingResults(f"there are no results at {path}")
    content = json.loads(path.read_text())
    units = sorted({row["unit"] for row in content["rows"]})
    cells: dict[tuple[str, str], dict[float, str]] = {}
    for row in content["rows"]:
        cells.setdefault((row["attack"], row["dtype"]), {})[row["unit"]] = f"{row['left']:.1f}"
    names = list(dict.fromkeys(attack for attack, _ in cells))
    head = ("attack", "dtype", *(f"unit {unit:g}" for unit in units))
    rows = [
        (name, dtype, *(found.get(unit, "–") for unit in units))
        for name in names
        for (attack, dtype), found in cells.items()
        if attack == name
    ]
    missing = f" Not installed: {', '.join(content['missing'])}." if content["missing"] else ""
    note = (
        f"<sub>% of {content['images']} test digits left, linf ε = {content['eps']}, {content['steps']} steps: "
        "of labels, for mismatch of agreement with the teacher, for fixed_teacher of its clean classes. "
        f"–: the logits themselves overflow.{missing}</sub>"
    )
    return f"{markdown(head, rows)}\n\n{note}"


def demo(folder: Path) -> str:
    """The demo's table."""
    path = folder / "demo.json"
    if not path.exists():
        raise MissingResults(f"there are no results at {path}")
    content = json.loads(path.read_text())
    rows = []
    for name, run in content["runs"].items():
        is_teacher = name == "teacher"
        rows.append(
            (
                "teacher, " + run["method"] if is_teacher else name,
                f"`{run['model']}`",
                f"{run['clean']:.1f}",
                f"{run['pgd20']:.1f}",
                f"{run['autoattack']:.1f}",
                "–" if is_teacher else f"{run['agreement']:.1f}",
                "–" if is_teacher else f"{run['agreement_mismatched']:.1f}",
                "–" if is_teacher else f"{run['kl_mismatched']:.3f}",
            )
        )
    ball = _ball("linf", content["eps"])
    head = (
        "trained by",
        "model",
        "clean %",
        f"PGD-20 %, {ball}",
        f"AutoAttack %, {ball}",
        "agrees with teacher %",
        f"on mismatched examples %, {ball}",
        "KL there",
    )
    note = (
        f"<sub>{content['data']}, {content['test_images']} test images, linf ε = {content['eps']}, "
        f"{content['epochs']} epochs each, one seed.</sub>"
    )
    return f"{markdown(head, rows)}\n\n{note}"


def limits(folder: Path) -> str:
    """What the machine can do, from the newest run of the kernel part."""
    run = load(folder / "kernels-cpu.json")["runs"][-1]
    measured = run["limits"]
    rows = [
        (
            f"copy of {row['bytes'] / 2**20:g} MiB (read and written)",
            f"{row['bytes_per_second']['median'] / 1e9:.0f} GB/s",
        )
        for row in measured["copy"]
    ]
    rows.append(("exponentials in cache", f"{measured['exp_per_second']['median'] / 1e9:.1f} G/s"))
    for dtype in ("float32", "bfloat16"):
        rate = measured[f"matmul_{dtype}_per_second"]["median"]
        rows.append((f"matrix product, {dtype}", f"{rate / 1e9:.0f} Gflop/s"))
    calls = measured["call_seconds"]
    rows.append(
        (
            "an autograd.Function of nothing, forward and backward, in calls of one small operator",
            f"{calls['autograd'] / calls['op']:.0f}",
        )
    )
    return _with_provenance(markdown(("limit", "measured"), rows), folder, "kernels")


def training(folder: Path) -> str:
    """The training step against the official loops."""
    content = load(folder / "training-cpu.json")
    found = {record.name: record for record in records(content)}
    rows = []
    for record in found.values():
        if record.variant != "ours":
            continue
        official = found[f"{record.group}/official"]
        share = record.details["share"]
        assert record.peak_bytes is not None
        assert official.peak_bytes is not None
        rows.append(
            (
                step_words(record.group),
                times_(record, "official"),
                times_(record, "official autocast"),
                times_(record, "official compile"),
                times_(found.get(f"{record.group}/ours bf16"), "official"),
                f"{record.details['objective'] / official.details['objective']:.1%}",
                f"{record.peak_bytes / official.peak_bytes:.2f}",
                *(f"{share[name]:.0%}" for name in ("teacher", "student", "loss", "step", "data")),
            )
        )
    head = (
        "training step: student ← teacher, images",
        "× official",
        "× + autocast, channels-last",
        "× + compile",
        "bf16 × official",
        "objective / official",
        "memory / official",
        "teacher",
        "student",
        "loss",
        "step",
        "data",
    )
    return f"{markdown(head, rows)}\n\n<sub>{provenance(content)}</sub>"


def _ball(norm: str, eps: float) -> str:
    """A norm and a radius, as heads of columns have them."""
    levels = round(255 * eps, 6)
    fraction = levels.is_integer() and float(f"{eps:.3g}") != eps
    return f"{norm} {levels:.0f}/255" if fraction else f"{norm} {eps:.3g}"


# figure of a study -> (title, decimals)
_STUDIED = {
    "clean": ("clean %", 1),
    "pgd20": ("PGD-20 %, {ball}", 1),
    "autoattack": ("AutoAttack %, {ball}", 1),
    "agreement": ("agrees with teacher %", 1),
    "agreement_mismatched": ("on mismatched examples %, {ball}", 1),
    "kl_mismatched": ("KL there", 3),
}


def study(data: str, folder: Path) -> str:
    """Every row of a study: mean and standard deviation over its seeds."""
    content = load(folder / f"study-{data}-cpu.json")
    seeds: dict[str, list[Json]] = {}
    for record in records(content):
        seeds.setdefault(record.group.partition("/")[2], []).append(record.details)
    rows = [
        (
            name.replace("+", " + "),
            *(_mean_and_spread(runs, figure, decimals) for figure, (_, decimals) in _STUDIED.items()),
        )
        for name, runs in seeds.items()
    ]
    run = content["runs"][-1]
    chosen, shared = run["settings"], run["settings"]["shared"]
    ball = _ball(shared.get("norm", "linf"), shared["eps"])  # that of every row: see Study.shared
    head = ("trained by", *(title.format(ball=ball) for title, _ in _STUDIED.values()))
    counts = sorted({len(runs) for name, runs in seeds.items() if name != "teacher"})
    note = (
        f"<sub>{data}: teacher `{chosen['teacher']['model']}` by {chosen['teacher']['method']}, students "
        f"`{chosen['student']['model']}`; linf ε = {shared['eps']:.3g}, {shared['epochs']} epochs, "
        f"{shared['steps']} attack steps; mean ± standard deviation over {' or '.join(map(str, counts))} seeds"
        f"{', one where no deviation is given' if counts[0] == 1 else ''}; "
        f"commit {run['commit'][:8]}.</sub>"
    )
    return f"{markdown(head, rows)}\n\n{note}"


def _mean_and_spread(runs: Sequence[Json], figure: str, decimals: int) -> str:
    values = [run[figure] for run in runs if figure in run]
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{decimals}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{decimals}f}"


def floors(folder: Path, capability: str) -> str:
    """The speeds that softmax_kl is held to, as one instruction set reached them (-fresh: with fresh pages)."""
    content = load(folder / f"floors-{capability}.json")
    rows = floors_of_softmax_kl.rows({record.name: record for record in records(content)})
    table = markdown(floors_of_softmax_kl.HEAD, list(rows))
    return f"{table}\n\n<sub>{provenance(content)}</sub>"


def behind(folder: Path) -> str:
    """Every case in which a peer is faster than ours, by the median, whatever the variant."""
    rows = []
    for part in ("kernels", "attack", "training"):
        path = folder / f"{part}-cpu.json"
        for record in records(load(path)) if path.exists() else ():
            if record.peer:
                continue
            for peer, speedup in record.speedup.items():
                if speedup["median"] < 1:
                    reach = f"{digits(speedup['low'])} to {digits(speedup['high'])}"
                    words = record.group.replace("<-", " ← ")
                    rows.append((words, record.variant, peer, digits(speedup["median"]), reach))
    if not rows:
        return "None of the committed results."
    return markdown(("case", "variant of ours", "peer", "our speed over the peer's", "quartiles"), rows)


def linear(folder: Path) -> str:
    """The loss from hidden states: time, memory, distance from the products alone."""
    head = (
        "rows × hidden, teacher's × classes",
        "",
        "s",
        "× eager",
        "of the products' rate",
        "peak MiB",
        "of eager's",
    )
    body = []
    by_shape: dict[str, dict[str, Record]] = {}
    for record in by_name(folder, "linear").values():
        if record.name.split("/")[1] == "peers":
            by_shape.setdefault(record.name.split("/")[2], {})[record.variant] = record
    for shape, found in by_shape.items():
        for variant, record in sorted(
            found.items(), key=lambda item: item[1].time["median"] if item[1].time else 0
        ):
            assert record.time is not None
            eagers, own = found["eager"].peak_bytes, record.peak_bytes
            body.append(
                (
                    shape.replace(",", ", ").replace("x", " × "),
                    variant,
                    f"{record.time['median']:.2f}",
                    times_(record, "eager") if variant != "eager" else "",
                    f"{record.bound()[1]:.0%}",
                    "" if own is None else f"{own / 2**20:.0f}",
                    "" if own is None or eagers is None else f"1/{eagers / own:.1f}",
                )
            )
    return _with_provenance(markdown(head, body), folder, "linear")


TABLES: dict[str, Callable[[Path], str]] = {
    "kernels": kernels,
    "kernels-full": kernels_full,
    "behind": behind,
    "accuracy": accuracy,
    "linear": linear,
    "attack": attack,
    "attack-quality": attack_quality,
    "attack-units": attack_units,
    "training": training,
    "demo": demo,
    "limits": limits,
    "study-digits": partial(study, "digits"),
    "study-cifar10": partial(study, "cifar10"),
    "floors": partial(floors, capability="avx512"),
    "floors-fresh": partial(floors, capability="avx512-fresh"),
    "floors-avx2": partial(floors, capability="avx2"),
    "floors-portable": partial(floors, capability="portable"),
}
