"""The attack engine against the loops of AdaAD, RSLAD and TRADES: same networks, same start, same steps, interleaved.

    python -m benchmarks.attack                      # every case of this device, a table and JSON
    python -m benchmarks.attack --case small_cnn     # the cases whose name holds that word
    python -m benchmarks.attack --full               # on CPUs: other batches and loops of the large networks too
    python -m benchmarks.attack --no-compile         # without the torch.compile variants (minutes on CPUs)

Variants of a case:

    <loop>              the official form: fp32, NCHW, eval mode
    <loop>+autocast     the same under bf16 autocast, networks and images in channels_last
    <loop>+compile      the same with both networks through torch.compile (on CUDA with autocast too)
    live                the engine on the live networks
    engine              the engine on prepared networks; on CUDA in bf16 and captured
    engine_best         the same keeping each image's best iterate, which costs a mismatch attack two forwards more
    engine_bf16         on CPUs: prepared in bf16
    engine_fp32         on CUDA: prepared in fp32, captured
    engine_eager        on CUDA: bf16, not captured

For each: time, speed-up, images/s, FLOP/s as a share of the matrix rate interleaved with it (in the variant's dtype),
peak memory, and the mean KL reached as a share of the fp32 loop's, all evaluated on the fp32 networks. FLOPs are those
of the networks by definition, whoever computes them: Winograd's convolutions do a quarter of theirs, so a share above
100 % is possible.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import OtherLoad, interleave, peak_memory, settle_allocator

if __name__ == "__main__" and "--default-allocator" not in sys.argv:
    settle_allocator()

import torch
from advfunmatch import create_model
from advfunmatch.attacks.pgd import PGDAttack
from advfunmatch.lean import prepare_for_attack, vjp
from torch import Tensor, nn

from benchmarks import limits, results
from benchmarks.attack.loops import LOOPS, with_autocast
from benchmarks.attack.roofline import FlopCounter, profile_step

EPS, STEP_SIZE = 8 / 255, 2 / 255
SEED = 0


@dataclass(frozen=True)
class Case:
    """One pair of networks, a batch, and the loop it is compared with."""

    student: str
    teacher: str
    size: int
    channels: int
    batch: int
    loop: str = "adaad"
    steps: int = 10
    cost: float = 30.0
    """Seconds beside the timed rounds, roughly, on two cores: torch.compile of the small networks, which later cases
    find compiled, and the first calls and least number of rounds of the large ones."""

    @property
    def name(self) -> str:
        pair = self.student if self.loop == "trades" else f"{self.student}<-{self.teacher}"
        return f"{self.loop}/{pair}/{self.batch}x{self.channels}x{self.size}x{self.size}/{self.steps}steps"


# Steps are all alike, so one is enough where it takes half a second.
CPU_CASES = (
    Case("small_cnn", "small_cnn", 8, 1, 128, cost=15),
    Case("resnet18", "resnet18", 32, 3, 32, steps=1, cost=20),
    Case("preactresnet18", "wrn-16-2", 32, 3, 32, steps=1, cost=13),
    Case("small_cnn", "small_cnn", 8, 1, 128, "rslad", cost=8),
    Case("small_cnn", "small_cnn", 8, 1, 128, "trades", cost=8),
)
CPU_FULL_CASES = (
    *CPU_CASES,
    Case("resnet18", "resnet18", 32, 3, 8, steps=2),
    Case("resnet18", "resnet18", 32, 3, 32, steps=10),
    Case("resnet18", "resnet18", 32, 3, 128, steps=1),
    Case("resnet18", "resnet18", 32, 3, 32, "trades", steps=2),
    Case("preactresnet18", "wrn-16-2", 32, 3, 32, "rslad", steps=2),
)
CUDA_CASES = (
    Case("resnet18", "wrn-34-10", 32, 3, 128),
    Case("resnet18", "wrn-34-10", 32, 3, 512),
    Case("resnet18", "wrn-34-10", 32, 3, 128, "rslad"),
    Case("resnet18", "resnet18", 32, 3, 128),
    Case("resnet18", "resnet18", 32, 3, 128, "trades"),
)


def network(name: str, case: Case, device: str, seed: int) -> nn.Module:
    """A network in eval mode whose BatchNorm statistics come from data, as a trained one's do."""
    torch.manual_seed(seed)
    model = create_model(name, num_classes=10, in_channels=case.channels).to(device)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # an average over all batches
    with torch.no_grad():
        for _ in range(2):
            model(torch.rand(64, case.channels, case.size, case.size, device=device))
    return model.eval()


def cases_of(device: str, full: bool) -> tuple[Case, ...]:
    if device.startswith("cuda"):
        return CUDA_CASES
    return CPU_FULL_CASES if full else CPU_CASES


def matrix_product(dtype: torch.dtype, device: str) -> tuple[Callable[[], Tensor], float]:
    """A square product large enough for the machine's matrix rate, and its FLOPs."""
    n = 4096 if device.startswith("cuda") else 1024
    left, right = (torch.rand(n, n, device=device, dtype=dtype) for _ in range(2))
    return lambda: left @ right, 2.0 * n**3


def mean_kl(student: nn.Module, teacher: nn.Module, x: Tensor, x_adv: Tensor, loop: str) -> float:
    """What the loop maximises, in float64 from float32 logits."""
    with torch.no_grad():
        log_q = student(x_adv).double().log_softmax(1)
        target = {"adaad": lambda: teacher(x_adv), "rslad": lambda: teacher(x), "trades": lambda: student(x)}[
            loop
        ]
        log_p = target().double().log_softmax(1)
    return float((log_p.exp() * (log_p - log_q)).sum(1).mean())


def variants(
    case: Case, student: nn.Module, teacher: nn.Module, x: Tensor, compile_too: bool
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """What to time, by name, and the dtype whose matrix rate bounds each."""
    cuda = x.is_cuda
    loop, objective = LOOPS[case.loop]
    settings = (EPS, STEP_SIZE, case.steps)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    autocast = with_autocast(loop)

    def copy_of(model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).to(memory_format=torch.channels_last)

    nhwc_student, nhwc_teacher = copy_of(student), copy_of(teacher)

    def engine(dtype: torch.dtype | None, prepared: bool = True, **options: Any) -> Callable[[], Tensor]:
        # The loops return their last iterate.
        options = {"keep": "last"} | options
        attack = PGDAttack(objective, eps=EPS, step_size=STEP_SIZE, steps=case.steps, **options)
        pair = [prepare_for_attack(m, dtype) if prepared else m for m in (student, teacher)]
        return lambda: attack(pair[0], None if case.loop == "trades" else pair[1], x)

    calls = {
        case.loop: lambda: loop(student, teacher, x, *settings),
        f"{case.loop}+autocast": lambda: autocast(nhwc_student, nhwc_teacher, nhwc, *settings),
        "live": engine(None, prepared=False),
    }
    dtypes = {case.loop: "float32", f"{case.loop}+autocast": "bfloat16", "live": "float32"}
    if compile_too:
        compiled = torch.compile(nhwc_student), torch.compile(nhwc_teacher)
        with_compile = autocast if cuda else loop
        calls[f"{case.loop}+compile"] = lambda: with_compile(*compiled, nhwc, *settings)
        dtypes[f"{case.loop}+compile"] = "bfloat16" if cuda else "float32"
    if case.loop == "adaad":
        calls["engine_best"] = engine(torch.bfloat16 if cuda else None, keep="best")
        dtypes["engine_best"] = "bfloat16" if cuda else "float32"
    if cuda:
        calls["engine"] = engine(torch.bfloat16)
        calls["engine_streams"] = engine(torch.bfloat16, streams=True)
        calls["engine_eager"] = engine(torch.bfloat16, cuda_graph=False)
        calls["engine_fp32"] = engine(None)
        bf16 = ("engine", "engine_streams", "engine_eager")
        return calls, dtypes | dict.fromkeys(bf16, "bfloat16") | {"engine_fp32": "float32"}
    calls["engine"] = engine(None)
    calls["engine_bf16"] = engine(torch.bfloat16)
    return calls, dtypes | {"engine": "float32", "engine_bf16": "bfloat16"}


def refresh_share(
    case: Case, student: nn.Module, teacher: nn.Module, x: Tensor, budget: float
) -> dict[str, float]:
    """Seconds of ``refresh_`` over those of the attack it precedes."""
    pair = [prepare_for_attack(m, torch.bfloat16 if x.is_cuda else None) for m in (student, teacher)]
    attack = PGDAttack(LOOPS[case.loop][1], eps=EPS, step_size=STEP_SIZE, steps=case.steps, keep="last")
    times = interleave(
        {"attack": lambda: attack(pair[0], pair[1], x), "refresh": pair[0].refresh_},
        budget=budget,
        min_rounds=3,
        device=str(x.device),
        clock="wall",
    )
    share = times["refresh"].median / times["attack"].median
    return {"of_this_attack": share, "of_ten_steps": share * case.steps / 10}


def gradient_over_forward(
    case: Case, student: nn.Module, teacher: nn.Module, x: Tensor, budget: float
) -> dict[str, float]:
    """Of each prepared network, the time of an input gradient, its forward not included, over that of a forward."""
    ratios = {}
    x = x.contiguous(memory_format=torch.channels_last)
    for name, model in {case.student: student, case.teacher: teacher}.items():
        network = prepare_for_attack(model, torch.bfloat16 if x.is_cuda else None)

        def forward(network: nn.Module = network) -> Tensor:
            with torch.no_grad():
                logits: Tensor = network(x)
            return logits

        def both(network: nn.Module = network) -> Tensor:
            logits, pullback = vjp(network, x)
            return pullback(logits)

        times = interleave(
            {"forward": forward, "both": both},
            budget=budget,
            min_rounds=5,
            device=str(x.device),
            clock="wall",
        )
        ratios[name] = times["both"].median / times["forward"].median - 1
    return ratios


def run_case(case: Case, device: str, arguments: argparse.Namespace) -> list[results.Record]:
    student, teacher = (
        network(case.student, case, device, SEED),
        network(case.teacher, case, device, SEED + 1),
    )
    torch.manual_seed(SEED)
    x = torch.rand(case.batch, case.channels, case.size, case.size, device=device)
    # On a CPU, compiling the large networks takes minutes.
    compile_too = arguments.compile and (x.is_cuda or case.size == 8 or arguments.full)
    calls, dtypes = variants(case, student, teacher, x, compile_too)
    calls = {
        name: call
        for name, call in calls.items()
        if name in (case.loop, "live", "engine") or re.search(arguments.variants, name)
    }
    dtypes = {name: dtypes[name] for name in calls}

    reached = {}
    for name, call in calls.items():
        torch.manual_seed(SEED)  # the same start for each
        reached[name] = mean_kl(student, teacher, x, call(), case.loop)
    with FlopCounter() as counter:
        calls["live"]()
    flops = counter.flops

    products = {name: matrix_product(getattr(torch, name), device) for name in sorted(set(dtypes.values()))}
    timed = calls | {f"product in {name}": call for name, (call, _) in products.items()}
    with OtherLoad() as load:
        times = interleave(
            timed, budget=arguments.budget, min_rounds=arguments.min_rounds, warmup=1, device=device
        )
    rates = {name: work / times.pop(f"product in {name}").median for name, (_, work) in products.items()}
    records = results.records_of(case.name, times, peers=tuple(n for n in calls if n.startswith(case.loop)))
    for name, record in records.items():
        rate = rates[dtypes[name]]
        record.peak_bytes = peak_memory(calls[name], device)
        record.limits = {"matmul": flops / rate}
        record.details = {
            "dtype": dtypes[name],
            "images_per_second": case.batch / times[name].median,
            "flops": flops,
            "share_of_matmul_rate": flops / times[name].median / rate,
            "kl_reached": reached[name],
            "kl_share_of_loop": reached[name] / reached[case.loop],
            "other_load": load.fraction,
        }
    records["engine"].details["refresh_share"] = refresh_share(
        case, student, teacher, x, arguments.budget / 4
    )
    records["engine"].details["gradient_over_forward"] = gradient_over_forward(
        case, student, teacher, x, arguments.budget / 8
    )
    pair = [prepare_for_attack(m, torch.bfloat16 if x.is_cuda else None) for m in (student, teacher)]
    records["engine"].details["parts"] = profile_step(pair[0], pair[1], x)
    records["engine"].details["matmul_per_second"] = rates[dtypes["engine"]]
    return list(records.values())


def table(records: list[results.Record]) -> str:
    lines = []
    group = None
    for record in records:
        if record.group != group:
            group = record.group
            lines += ["", group]
            lines.append(
                f"  {'':<18}{'speed-up':>9}{'quartiles':>13}{'matmul':>8}{'KL':>8}{'MiB':>8}{'images/s':>10}"
            )
        over = record.speedup.get(group.split("/")[0])
        gain = f"{over['median']:.2f}" if over else "1"
        spread = f"{over['low']:.2f}-{over['high']:.2f}" if over else ""
        details = record.details
        lines.append(
            f"  {record.variant:<18}{gain:>9}{spread:>13}{details['share_of_matmul_rate']:>8.0%}"
            f"{details['kl_share_of_loop']:>8.1%}{(record.peak_bytes or 0) / 2**20:>8.0f}"
            f"{details['images_per_second']:>10.0f}"
        )
        if "gradient_over_forward" in details:
            ratios = ", ".join(f"{n} {r:.2f}" for n, r in details["gradient_over_forward"].items())
            lines.append(f"  {'':<18}an input gradient is, of its forward: {ratios}")
        if "refresh_share" in details:
            lines.append(
                f"  {'':<18}refresh_ is {details['refresh_share']['of_ten_steps']:.2%} of a ten-step attack"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", default="", help="only cases whose name holds this")
    parser.add_argument("--full", action="store_true", help="more cases, and every one beside torch.compile")
    parser.add_argument("--steps", type=int, help="steps of every case")
    parser.add_argument(
        "--variants",
        default="",
        metavar="REGEX",
        help="beside the loop and the float32 engine only these: bf16 takes minutes with AVX2, compile on CPUs",
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of timing for each case")
    parser.add_argument("--min-rounds", type=int, default=5)
    parser.add_argument(
        "--out", type=Path, help="JSON to write; default benchmarks/results/attack-<device>.json"
    )
    parser.add_argument(
        "--threads", type=int, help="PyTorch's threads; one is steadier beside other programs"
    )
    parser.add_argument(
        "--default-allocator",
        action="store_true",
        help="glibc as users have it, which gives large blocks back to the system and faults them in again",
    )
    arguments = parser.parse_args()
    device = arguments.device
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if device.startswith("cuda"):
        torch.backends.cudnn.benchmark = True
    cases = [case for case in cases_of(device, arguments.full) if arguments.case in case.name]
    if arguments.steps:
        cases = [Case(**{**vars(case), "steps": arguments.steps}) for case in cases]
    if not cases:
        parser.error(f"no case's name holds {arguments.case!r}")
    out = arguments.out or results.FOLDER / f"attack-{torch.device(device).type}.json"

    rates = limits.measure(device, budget=3.0, copy_sizes=(1 << 26,))
    records = []
    for case in cases:
        records += run_case(case, device, arguments)
        run = results.new_run(rates, records, steps=case.steps, eps=EPS, step_size=STEP_SIZE)
        results.save(out, "attack", run, append=True)
        print(table(records[-len([r for r in records if r.group == case.name]) :]), flush=True)
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
