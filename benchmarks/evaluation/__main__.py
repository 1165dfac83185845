"""AutoAttack against pyautoattack: how long each stage takes, and which images only one of them breaks.

    python -m benchmarks.evaluation --part speed --case small_cnn-24        # interleaved, whole standard version
    python -m benchmarks.evaluation --part speed --case wrn-16-2 --data folder:DIR --share 0.05
    python -m benchmarks.evaluation --part paired --case small_cnn-24 --seeds 0 1 2 3 4

Parts are added to the JSON as they are done, so that each may be run by itself. ``--share`` makes that share of all
steps and queries on every side: seconds by stage shrink with it, their ratios do not. Networks are trained for a
minute unless ``--checkpoint`` names one. Peers that are not installed are left out.

Of a stage of ours, "passes" is the share of its seconds that its forwards and backwards would take by themselves, at
the cost of one forward and one input gradient measured in the same run at that stage's batch: 80 % is a stage that
takes 1.25 times its passes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.timing import OtherLoad, interleave, settle_allocator

if __name__ == "__main__" and "--default-allocator" not in sys.argv:
    settle_allocator()

import torch
from advfunmatch import prepare_for_attack
from advfunmatch.attacks.searched import Searched
from torch import Tensor, nn

from benchmarks import results
from benchmarks.evaluation.cases import CASES, network_and_images
from benchmarks.evaluation.contestants import STANDARD, Evaluated, contestants, official, ours

OUT = results.FOLDER / "evaluation-cpu.json"


def cost_of_passes(model: nn.Module, x: Tensor, batch: int) -> tuple[float, float]:
    """Seconds an image of one forward of the prepared network, and of one pullback after its forward."""
    searched, part = Searched(prepare_for_attack(model)), x[:batch]
    direction = torch.randn_like(searched.logits(part))
    calls = {
        "forward": lambda: searched.logits(part),
        "both": lambda: searched.vjp(part)[1](direction),
    }
    times = interleave(calls, budget=1.0, min_rounds=3, max_rounds=20)
    forward, both = (times[name].median / len(part) for name in ("forward", "both"))
    return forward, max(both - forward, 0.0)


def speed(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    """All contestants in turns, and of ours the share of the passes."""
    chosen = {
        name: each
        for name, each in contestants(model, tuple(arguments.stages)).items()
        if arguments.contestant in name
    }
    batches = dict.fromkeys(chosen, len(x)) | {"ours": arguments.batch or len(x)}
    settings = (eps, arguments.norm, arguments.seeds[0])
    runs: dict[str, list[Evaluated]] = {name: [] for name in chosen}
    with OtherLoad() as load:
        for turn in range(arguments.rounds):
            names = list(chosen) if turn % 2 == 0 else list(chosen)[::-1]
            for name in names:
                found = chosen[name](x, y, *settings, batches[name], arguments.share)
                runs[name].append(found)
                print(f"  {name}: {found.seconds['all']:.1f} s, {int(found.robust.sum())} robust", flush=True)
    rows = {name: _summary(found) for name, found in runs.items()}
    if "ours" in rows:
        for name, stage in rows["ours"]["stages"].items():
            images = min(runs["ours"][0].left[name], batches["ours"])
            if name == "clean" or not images:
                continue
            forward, backward = cost_of_passes(model, x, images)
            passes = stage["forwards"] * forward + stage["backwards"] * backward
            stage |= {
                "forward_seconds": forward,
                "backward_seconds": backward,
                "passes": passes / stage["seconds"],
            }
    return {"rows": rows, "batches": batches, "other_load": load.fraction}


def _summary(found: list[Evaluated]) -> dict[str, Any]:
    first = found[0]
    stages: dict[str, dict[str, Any]] = {}
    for name in first.seconds:
        if name == "all":
            continue
        stages[name] = {"seconds": _median([each.seconds[name] for each in found])}
        for what in ("left", "forwards", "backwards"):
            if name in getattr(first, what):
                stages[name][what] = getattr(first, what)[name]
    return {
        "seconds": [each.seconds["all"] for each in found],
        "robust": int(first.robust.sum()),
        "unverified": first.unverified,
        "stages": stages,
    }


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def paired(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """For each seed, how many images only the official program breaks, and only ours."""
    rows, stages = [], tuple(arguments.stages)
    for seed in arguments.seeds:
        settings = (x, y, eps, arguments.norm, seed, len(x), arguments.share)
        mine, theirs = ours(model, stages)(*settings), official(model, stages)(*settings)
        row = {
            "seed": seed,
            "images": len(x),
            "robust_ours": int(mine.robust.sum()),
            "robust_official": int(theirs.robust.sum()),
            "only_official": int((mine.robust & ~theirs.robust).sum()),
            "only_ours": int((theirs.robust & ~mine.robust).sum()),
            "unverified": mine.unverified,
        }
        rows.append(row)
        print(f"  {row}", flush=True)
    return rows


def mcnemar(first: int, second: int) -> float:
    """The two-sided exact p of so many discordant pairs on each side.

    >>> mcnemar(0, 0), round(mcnemar(1, 5), 4)
    (1.0, 0.2188)
    """
    pairs = first + second
    tail = sum(math.comb(pairs, k) for k in range(min(first, second) + 1)) / 2**pairs
    return min(1.0, 2 * tail)


def speed_table(case: str, found: dict[str, Any]) -> str:
    """The stages' seconds, and what ours are made of."""
    rows = found["rows"]
    lines = [f"{case}: seconds by stage, share {found['share']:g} of all steps, {found['images']} images"]
    lines.append(
        f"  {'':<20}"
        + "".join(f"{name:>10}" for name in (*STANDARD, "all"))
        + f"{'robust':>8}{'speed-up':>10}"
    )
    for name, row in rows.items():
        times = [row["stages"].get(stage, {}).get("seconds") for stage in STANDARD] + [
            _median(row["seconds"])
        ]
        shown = "".join(f"{'':>10}" if value is None else f"{value:>10.2f}" for value in times)
        base = _median(rows["official"]["seconds"]) if "official" in rows else float("nan")
        lines.append(f"  {name:<20}{shown}{row['robust']:>8}{base / times[-1]:>10.2f}")
    for name, stage in rows.get("ours", {"stages": {}})["stages"].items():
        if "passes" in stage:
            lines.append(
                f"  ours, {name}: {stage['left']} images, {stage['forwards']} F of "
                f"{1e6 * stage['forward_seconds']:.0f} us, "
                f"{stage['backwards']} B of {1e6 * stage['backward_seconds']:.0f} us, passes {stage['passes']:.0%}"
            )
    return "\n".join(lines)


def paired_table(case: str, rows: list[dict[str, Any]]) -> str:
    """All seeds together."""
    theirs, mine = (sum(row[what] for row in rows) for what in ("only_official", "only_ours"))
    images = sum(row["images"] for row in rows)
    p = mcnemar(theirs, mine)
    difference = 100 * sum(row["robust_ours"] - row["robust_official"] for row in rows) / images
    return (
        f"{case}: {len(rows)} seeds of {rows[0]['images']} images: {theirs} broken by the official program alone, "
        f"{mine} by ours alone, McNemar p = {p:.3g}; robust accuracy {difference:+.2f} points beside the official"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["speed", "paired"], default="speed")
    parser.add_argument("--case", choices=list(CASES), default="small_cnn-24")
    parser.add_argument("--data", help="CIFAR images, for the networks that take them, such as folder:DIR")
    parser.add_argument("--checkpoint", help="of that network; it is trained a little otherwise")
    parser.add_argument("--save", type=Path, help="where to keep the network's weights, for --weights")
    parser.add_argument("--weights", type=Path, help="what --save kept")
    parser.add_argument("--eps", type=float, help="default: the case's")
    parser.add_argument("--norm", choices=["linf", "l2"], default="linf")
    parser.add_argument("--images", type=int, help="default: the case's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--share", type=float, default=1.0, help="of all steps and queries")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each contestant")
    parser.add_argument("--batch", type=int, help="images at a time, of ours; default all")
    parser.add_argument("--contestant", default="", help="only those whose name holds this")
    parser.add_argument("--stages", nargs="+", choices=STANDARD, default=list(STANDARD))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--default-allocator", action="store_true", help="glibc as users have it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    case = CASES[arguments.case]
    eps = arguments.eps or case.eps
    model, x, y = network_and_images(case, arguments)
    about = {
        "case": arguments.case,
        "part": arguments.part,
        "eps": eps,
        "norm": arguments.norm,
        "images": len(x),
        "share": arguments.share,
        "stages": arguments.stages,
        "threads": arguments.threads,
        "data": "digits" if case.digits else "CIFAR-10 (JPEG q75)",
        "commit": results.commit(),
        "versions": results.versions(),
        "machine": results.machine(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    if arguments.part == "speed":
        about |= speed(model, x, y, eps, arguments)
    else:
        about["rows"] = paired(model, x, y, eps, arguments)
    content = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"runs": []}
    content["runs"].append(about)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.part == "speed":
        print(speed_table(arguments.case, about))
    else:
        alike = ("case", "part", "eps", "norm", "images", "share", "stages")
        runs = [run for run in content["runs"] if all(run[key] == about[key] for key in alike)]
        print(paired_table(arguments.case, [row for run in runs for row in run["rows"]]))
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
