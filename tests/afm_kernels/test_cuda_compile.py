"""What nvcc made of the CUDA kernels, read from the module that was built: no GPU is needed.

Fails on spills, on more registers than a kernel's launch allows, and where the machine code lost its 128-bit accesses.
Skips, saying so, where the module was not built (no nvcc) or cuobjdump is missing.
"""

from __future__ import annotations

import functools
import re

import pytest

from benchmarks.gpu import resources

if not resources.MODULE.exists():
    pytest.skip(f"{resources.MODULE.name} was not built here", allow_module_level=True)
if resources.cuobjdump() is None:
    pytest.skip("cuobjdump was not found", allow_module_level=True)

REGISTERS = 65536  # of a multiprocessor


@functools.cache
def kernels() -> tuple[resources.Kernel, ...]:
    return tuple(resources.kernels())


def tuned(kernel: resources.Kernel) -> bool:
    """Float64 is served, not tuned: its kernels have all the registers they want."""
    return "float64" not in kernel.name and "double" not in kernel.name


def test_every_kernel_is_there() -> None:
    names = {kernel.name for kernel in kernels()}
    for dtype in ("float16", "bfloat16", "float32", "float64", "mixed", "mixed with float64"):
        for variant in ("KL", "Jeffreys, JS", "distillation"):
            assert f"stream_rows_kernel<{dtype}, {variant}>" in names
    steps = ("pgd_linf", "pgd_l2", "apgd_linf", "apgd_l2")
    for stem in (*steps, "scale_shift_relu_forward", "scale_shift_relu_backward", "sum"):
        assert any(name.startswith(f"{stem}_kernel") for name in names), stem


def test_nothing_spills() -> None:
    spilling = [f"{k.target} {k.name}: {k.stack} B" for k in kernels() if k.stack or k.local]
    assert not spilling, "\n".join(spilling)


def test_two_blocks_fit_a_multiprocessor() -> None:
    """So that one reads while the other computes."""
    for kernel in filter(tuned, kernels()):
        if match := re.search(r"rows_kernel<.*, (\d+) threads x", kernel.name):
            threads = max(256, int(match[1]))
            if match[1] == "4":  # one block of 512
                continue
        elif kernel.name.startswith("stream_"):
            threads = 384 if "float16" in kernel.name else 512  # bfloat16 too
        else:
            continue
        per_thread = (kernel.registers + 7) // 8 * 8
        assert 2 * threads * per_thread <= REGISTERS, f"{kernel.target} {kernel.name}: {kernel.registers}"


def test_shared_memory_stays_small() -> None:
    assert max(kernel.shared for kernel in kernels()) <= 4096


@pytest.mark.parametrize(
    ("prefix", "wide_load", "wide_store"),
    [
        ("rows_kernel<float32, 32 threads x 8 vectors, KL>", 128, 128),
        ("rows_kernel<bfloat16, 256 threads x 4 vectors, KL>", 128, 128),
        ("rows_kernel<float16, 256 threads x 6 vectors, distillation>", 128, 128),
        ("stream_rows_kernel<bfloat16, KL>", 128, 128),
        ("stream_rows_kernel<float32, Jeffreys, JS>", 128, 128),
        ("stream_finish_kernel<float16, KL>", 128, 128),
        ("stream_partial_kernel<bfloat16, KL>", 128, 0),
        ("stream_rows_kernel<mixed, KL>", 128, 128),
        ("pgd_linf_kernel<float>", 128, 128),
        ("apgd_linf_kernel<float>", 128, 128),
        ("scale_shift_relu_forward_kernel<float>", 128, 128),
        ("scale_shift_relu_backward_kernel<float>", 128, 128),
    ],
)
def test_accesses_are_128_bits_wide(prefix: str, wide_load: int, wide_store: int) -> None:
    found = [kernel for kernel in kernels() if kernel.name == prefix]
    assert found, f"no kernel is called {prefix}"
    kernel = max(found, key=lambda k: int(k.target.removeprefix("sm_")))
    load, store = resources.access_widths(kernel)
    assert load >= wide_load
    assert store >= wide_store
