"""What the compiler makes of every Triton kernel, ahead of time and without a GPU.

``LAUNCHES`` holds calls of the operators. Each is run with the launch itself replaced by a recorder, so that what is
compiled here is what launchers launch, for the targets below; registers, spills, shared memory and access widths are
read from the result. ``python -m afm_kernels.triton.resources`` prints the table of ``docs/gpu-resources.md``, and
rewrites it there with ``--write FILE``.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from afm_kernels.triton import (
    ROW_STATS,
    apgd_step,
    distillation,
    dkl,
    launch,
    pgd_step,
    scale_shift_relu,
    softmax_kl,
    softmax_kl_direction,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Registers a lane that the hardware has; more are spilled.
MAX_REGISTERS = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}
# Kernels that read a row's scalars and write some: they do not count in the bytes of a row.
_KERNELS_OF_SCALARS = ("sum_kernel", "combine_kernel", "js_combine_kernel")
_MULTIPROCESSORS = 132  # of the GPU that launchers believe in: it decides how often few long rows are split

FLOAT, BFLOAT = torch.float32, torch.bfloat16


class Launch(NamedTuple):
    """A recorded kernel launch: the kernel, its arguments by name, and the grid."""

    kernel: Any
    arguments: dict[str, Any]
    grid: tuple[int, ...]
    num_warps: int

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Kernels that are launched inside are only noted down."""
    launches: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        num_warps = kwargs.pop("num_warps", 4)
        names = [p.name for p in kernel.params]
        launches.append(Launch(kernel, {**dict(zip(names, args, strict=False)), **kwargs}, grid, num_warps))

    run = JITFunction.run
    # the interpreter's machine, which launchers see here, has one multiprocessor
    programs = launch.LIMITS.programs_per_multiprocessor * _MULTIPROCESSORS
    try:
        JITFunction.run = record
        with launch.override_limits(programs_per_multiprocessor=programs):
            yield launches
    finally:
        JITFunction.run = run


def source_of(recorded_launch: Launch) -> ASTSource:
    """The launch as a source to compile: types, constants and alignments as Triton's launcher derives them."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(recorded_launch.kernel.params):
        value = recorded_launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = (
                "*" + triton.runtime.jit.type_canonicalisation_dict[str(value.dtype).split(".")[1]]
            )
            if value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = parameter.annotation_type
            if not parameter.do_not_specialize and not isinstance(value, float):
                raise AssertionError(f"{recorded_launch.name}: {parameter.name} specialises on its value")
    return ASTSource(recorded_launch.kernel, signature, constants, attributes)


class Resources(NamedTuple):
    """What a compiled kernel takes. Access widths are in bytes; 0 where there is no such access."""

    registers: int  # a lane
    spills: int  # bytes of local (NVIDIA) or scratch (AMD) memory a lane
    shared: int  # bytes
    widest_load: int
    widest_store: int
    assembly: str


def compile_launch(recorded_launch: Launch, target: str) -> Resources:
    """Compiles a launch for a target of ``TARGETS``."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1; unset it")
    # launchers count lanes (``launch.warps``), and have counted in warps of 32 here
    num_warps = max(1, recorded_launch.num_warps * 32 // TARGETS[target].warp_size)
    compiled = triton.compile(
        source_of(recorded_launch), target=TARGETS[target], options={"num_warps": num_warps}
    )
    if TARGETS[target].backend == "hip":
        return _read_amdgcn(compiled.asm["amdgcn"])
    return _read_cubin(compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata.shared)


def _read_cubin(cubin: bytes, ptx: str, shared: int) -> Resources:
    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage says nothing of registers: {usage!r}")
    registers, stack, local = map(int, found.groups())
    return Resources(registers, stack + local, shared, _widest_ptx(ptx, "ld"), _widest_ptx(ptx, "st"), ptx)


def _widest_ptx(ptx: str, instruction: str) -> int:
    accesses = re.findall(rf"\b{instruction}\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)", ptx)
    return max((int(count or 1) * int(bits) // 8 for count, bits in accesses), default=0)


def _read_amdgcn(assembly: str) -> Resources:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"no {key} in the AMD assembly")
        return int(found.group(1))

    return Resources(
        number("vgpr_count"),
        # scalar registers are spilled to lanes of vector registers; what is left to spill goes to scratch memory
        number("private_segment_fixed_size"),
        number("group_segment_fixed_size"),
        _widest_amdgcn(assembly, "load"),
        _widest_amdgcn(assembly, "store"),
        assembly,
    )


def _widest_amdgcn(assembly: str, access: str) -> int:
    names = set(re.findall(rf"\b(?:global|buffer)_{access}_(\w+)", assembly))
    bytes_of = {"ubyte": 1, "byte": 1, "ushort": 2, "short": 2, "short_d16": 2, "dword": 4}
    widest = 0
    for name in names:
        found = re.match(r"dwordx(\d)", name)
        widest = max(widest, 4 * int(found.group(1)) if found else bytes_of.get(name, 2))
    return widest


@dataclass(frozen=True)
class Call:
    """A call of an operator, by a name for the table; ``least`` is the bytes that it has to move a row."""

    name: str
    run: Callable[[], object]
    row_elements: int  # of a tensor
    least: int

    def launches(self) -> list[Launch]:
        with recorded() as launches:
            self.run()
        return launches

    def moved(self) -> int:
        """Bytes a row that the launches move: each full-size tensor that a kernel is given, once."""
        total = 0
        for each in self.launches():
            if each.name in _KERNELS_OF_SCALARS:
                continue
            tensors = [a for a in each.arguments.values() if isinstance(a, Tensor)]
            full = max(t.numel() for t in tensors)
            total += sum(t.element_size() * self.row_elements for t in tensors if t.numel() == full)
        return total


def _logits(rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty(rows, classes, dtype=dtype), torch.empty(rows, classes, dtype=dtype)


def _kl(what: str, rows: int, classes: int, dtype: torch.dtype, divergence: str = "kl") -> Call:
    """softmax_kl_<what> at a shape."""
    index = ("kl", "reverse_kl", "jeffreys", "js").index(divergence)
    size = torch.empty((), dtype=dtype).element_size() * classes

    def run() -> object:
        student, teacher = _logits(rows, classes, dtype)
        first = (student, teacher, None, 2.0, index, 0.5)
        if what == "forward":
            return softmax_kl.softmax_kl_forward(*first, 1, 1.0)
        if what == "forward_grad":
            return softmax_kl.softmax_kl_forward_grad(*first, 1, 1.0, True, True)
        if what == "grad":
            return softmax_kl.softmax_kl_grad(*first, 1.0, True, True)
        stats = torch.empty(rows, ROW_STATS)
        return softmax_kl.softmax_kl_backward(
            torch.empty(()), student, teacher, None, stats, 2.0, index, 0.5, 1.0, True, True
        )

    kind = "" if divergence == "kl" else f" {divergence}"
    name = f"softmax_kl_{what}{kind}, {rows} × {classes} {str(dtype).split('.')[1]}"
    return Call(name, run, classes, size * (2 if what == "forward" else 4))


def _direction(rows: int, classes: int, dtype: torch.dtype) -> Call:
    def run() -> object:
        return softmax_kl_direction.softmax_kl_direction(*_logits(rows, classes, dtype), 2.0, True, True)

    name = f"softmax_kl_direction, {rows} × {classes} {str(dtype).split('.')[1]}"
    return Call(name, run, classes, 4 * classes * torch.empty((), dtype=dtype).element_size())


def _distillation(rows: int, classes: int, dtype: torch.dtype) -> Call:
    def run() -> object:
        labels = torch.empty(rows, dtype=torch.int64)
        return distillation.distillation_forward_grad(
            *_logits(rows, classes, dtype), labels, None, 2.0, 0.5, 0.1, -100, 1, 1.0, True, True
        )

    name = f"distillation_forward_grad, {rows} × {classes} {str(dtype).split('.')[1]}"
    return Call(name, run, classes, 4 * classes * torch.empty((), dtype=dtype).element_size())


def _dkl(rows: int, classes: int, dtype: torch.dtype, class_weights: bool = False) -> Call:
    def run() -> object:
        prior = torch.empty(rows, classes) if class_weights else None
        return dkl.dkl_forward_grad(
            *_logits(rows, classes, dtype), prior, None, 2.0, 4.0, 1.0, 1.0, True, 1, 1.0, True, True
        )

    kind = " class weights" if class_weights else ""
    name = f"dkl_forward_grad{kind}, {rows} × {classes} {str(dtype).split('.')[1]}"
    size = torch.empty((), dtype=dtype).element_size()
    return Call(name, run, classes, (4 * size + (4 if class_weights else 0)) * classes)


def _pgd(norm: int, dtype: torch.dtype) -> Call:
    shape = (128, 3, 32, 32)

    def run() -> object:
        x, grad, x_adv = (torch.empty(shape, dtype=dtype) for _ in range(3))
        return pgd_step.pgd_step(x_adv, grad, x, 0.01, 0.03, norm, 0.0, 1.0)

    name = f"pgd_step {('linf', 'l2')[norm]}, 128 × 3 × 32 × 32 {str(dtype).split('.')[1]}"
    return Call(name, run, 3072, 4 * 3072 * torch.empty((), dtype=dtype).element_size())


def _apgd(norm: int, dtype: torch.dtype) -> Call:
    shape = (128, 3, 32, 32)

    def run() -> None:
        images = [torch.empty(shape, dtype=dtype) for _ in range(7)]
        numbers, counts = torch.zeros(4, 128), torch.zeros(3, 128, dtype=torch.int32)
        given = torch.zeros(128), torch.zeros(128, dtype=torch.bool)
        options = (0.03, norm, 0.0, 1.0, 0.25, 0.75, 0, False)
        apgd_step.apgd_step(*images[:5], numbers, counts, *images[5:], *given, *options)

    name = f"apgd_step {('linf', 'l2')[norm]}, 128 × 3 × 32 × 32 {str(dtype).split('.')[1]}"
    return Call(name, run, 3072, 5 * 3072 * torch.empty((), dtype=dtype).element_size())


def _pgd_start(dtype: torch.dtype) -> Call:
    def run() -> object:
        x, noise = torch.empty(128, 3, 32, 32, dtype=dtype), torch.empty(128, 3, 32, 32, dtype=dtype)
        return pgd_step.pgd_start(x, noise, 0.001, 0.03, 0, 0.0, 1.0)

    name = f"pgd_start linf, 128 × 3 × 32 × 32 {str(dtype).split('.')[1]}"
    return Call(name, run, 3072, 3 * 3072 * torch.empty((), dtype=dtype).element_size())


def _scale_shift_relu(dtype: torch.dtype, backward: bool, channels_last: bool = True) -> Call:
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def run() -> object:
        x = torch.empty(128, 64, 32, 32, dtype=dtype).to(memory_format=layout)
        scale = torch.empty(64)
        if backward:
            return scale_shift_relu.scale_shift_relu_backward(x, x.clone(), scale, True, True)
        return scale_shift_relu.scale_shift_relu_forward(x, scale, scale, x.clone())

    kind = "backward" if backward else "forward"
    where = "channels-last" if channels_last else "contiguous"
    name = f"scale_shift_relu_{kind}, 128 × 64 × 32 × 32 {str(dtype).split('.')[1]} {where}"
    return Call(name, run, 64, (4 if backward else 3) * 64 * torch.empty((), dtype=dtype).element_size())


#: What the default tests compile: every kernel, in the dtype that it is used most in.
CALLS = (
    _kl("forward_grad", 1024, 1000, FLOAT),
    _kl("forward_grad", 4096, 8192, BFLOAT),
    _kl("forward_grad", 16, 50257, BFLOAT),
    _kl("forward_grad", 1024, 32000, BFLOAT, "js"),
    _dkl(1024, 1000, FLOAT),
    _pgd(0, FLOAT),
    _pgd(1, FLOAT),
    _apgd(0, FLOAT),
    _apgd(1, FLOAT),
    _scale_shift_relu(BFLOAT, backward=False),
    _scale_shift_relu(BFLOAT, backward=True),
)

#: What the slow tests and the table add.
MORE_CALLS = (
    _kl("forward_grad", 128, 10, FLOAT),
    _kl("forward_grad", 256, 100, FLOAT),
    _kl("forward_grad", 256, 100, FLOAT, "js"),
    _kl("grad", 1024, 1000, FLOAT),
    _kl("forward", 1024, 1000, BFLOAT),
    _kl("backward", 1024, 1000, BFLOAT),
    _kl("forward_grad", 1024, 1000, BFLOAT),
    _kl("forward_grad", 1024, 1000, BFLOAT, "jeffreys"),
    _kl("forward_grad", 1024, 1000, BFLOAT, "js"),
    _kl("forward_grad", 1024, 1000, torch.float64),
    _kl("forward_grad", 1024, 1000, torch.float64, "js"),
    _kl("forward_grad", 1024, 2048, torch.float64),
    _kl("forward_grad", 4096, 4096, BFLOAT, "js"),
    _kl("forward_grad", 4096, 4096, FLOAT, "js"),
    _kl("forward_grad", 4096, 8192, FLOAT),
    _kl("forward_grad", 4096, 8192, BFLOAT, "jeffreys"),
    _kl("forward", 8192, 128256, BFLOAT),
    _kl("forward_grad", 8192, 128256, BFLOAT),
    _kl("forward_grad", 4096, 21843, FLOAT),
    _kl("forward_grad", 8192, 32000, BFLOAT, "jeffreys"),
    _kl("forward_grad", 1024, 32000, torch.float64),
    _direction(128, 10, FLOAT),
    _direction(1024, 1000, FLOAT),
    _direction(1024, 32000, BFLOAT),
    _direction(128, 100, torch.float64),
    _distillation(128, 10, FLOAT),
    _distillation(1024, 1000, FLOAT),
    _distillation(4096, 8192, BFLOAT),
    _distillation(1024, 32000, BFLOAT),
    _dkl(128, 10, FLOAT),
    _dkl(128, 100, FLOAT, class_weights=True),
    _dkl(1024, 32000, BFLOAT),
    _dkl(128, 100, torch.float64),
    _pgd(0, BFLOAT),
    _pgd(1, BFLOAT),
    _apgd(0, BFLOAT),
    _apgd(1, BFLOAT),
    _pgd_start(FLOAT),
    _scale_shift_relu(FLOAT, backward=False, channels_last=False),
    _scale_shift_relu(FLOAT, backward=True, channels_last=False),
)


def variants(calls: tuple[Call, ...]) -> list[tuple[Call, Launch]]:
    """The distinct kernels that the calls launch, each with the first call that does."""
    seen = set()
    found = []
    for call in calls:
        for each in call.launches():
            source = source_of(each)
            key = (each.name, str(source.signature), str(source.constants), str(source.attrs), each.num_warps)
            if key not in seen:
                seen.add(key)
                found.append((call, each))
    return found


def _compile_variant(calls_index: int, variant: int, target: str) -> Resources:
    calls = (CALLS, MORE_CALLS, CALLS + MORE_CALLS)[calls_index]
    return compile_launch(variants(calls)[variant][1], target)


def compile_all(
    calls_index: int, targets: tuple[str, ...] = tuple(TARGETS)
) -> dict[tuple[int, str], Resources]:
    """All variants of CALLS (0), MORE_CALLS (1) or both (2) for all targets, on all processors."""
    calls = (CALLS, MORE_CALLS, CALLS + MORE_CALLS)[calls_index]
    keys = [(index, target) for index in range(len(variants(calls))) for target in targets]
    # A fork of a process with threads may hang in the compiler.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=context) as pool:
        jobs = [pool.submit(_compile_variant, calls_index, *key) for key in keys]
        return {key: job.result() for key, job in zip(keys, jobs, strict=True)}


def table() -> str:
    """The table of ``docs/gpu-resources.md``, in Markdown."""
    found = variants(CALLS + MORE_CALLS)
    results = compile_all(2)
    lines = [
        "| kernel | first launched by | warps | " + " | ".join(TARGETS) + " | widest load/store |",
        "|---|---|---|" + "---|" * (len(TARGETS) + 1),
    ]
    for index, (call, each) in enumerate(found):
        cells = []
        for target in TARGETS:
            r = results[index, target]
            cells.append(f"{r.registers} / {r.spills} / {r.shared}")
        widths = {(r.widest_load, r.widest_store) for r in (results[index, t] for t in TARGETS)}
        load, store = min(w[0] for w in widths), min(w[1] for w in widths)
        lines.append(
            f"| `{each.name}` | {call.name} | {each.num_warps} | "
            + " | ".join(cells)
            + f" | {load} / {store} |"
        )
    lines += ["", "| call | launches | bytes moved a row | the least | ratio |", "|---|---|---|---|---|"]
    for call in CALLS + MORE_CALLS:
        names = ", ".join(f"`{each.name}`" for each in call.launches())
        lines.append(
            f"| {call.name} | {names} | {call.moved()} | {call.least} | {call.moved() / call.least:.2f} |"
        )
    return "\n".join(lines)


_BEGIN, _END = "<!-- triton: begin -->", "<!-- triton: end -->"


def write_section(path: Path, text: str) -> None:
    """Puts ``text`` between the markers of a document, which gets them at its end where it has none."""
    document = path.read_text() if path.exists() else ""
    if _BEGIN not in document:
        document = document.rstrip() + f"\n\n{_BEGIN}\n{_END}\n"
    before, rest = document.split(_BEGIN)
    path.write_text(f"{before}{_BEGIN}\n{text}\n{_END}{rest.split(_END)[1]}".lstrip("\n"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path, metavar="FILE", help="rewrite the section of this document")
    arguments = parser.parse_args()
    text = table()
    print(text)
    if arguments.write:
        write_section(arguments.write, text)


if __name__ == "__main__":
    main()
