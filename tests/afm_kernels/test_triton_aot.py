"""Triton kernels compiled ahead of time for GPUs that need not be here: no spills, wide accesses, few variants.

Launches are recorded instead of made (``afm_kernels.triton.resources``), so what is compiled is what launchers launch.
"""

from __future__ import annotations

import os
import re
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing compiles under TRITON_INTERPRET=1", allow_module_level=True)

from afm_kernels.triton import apgd_step, dkl, pgd_step, resources, scale_shift_relu, softmax_kl
from afm_kernels.triton.resources import CALLS, MAX_REGISTERS, TARGETS, Launch, Resources, recorded, variants

# Kernels that only handle scalars of rows; the others move tensors, in accesses of 16 bytes.
SCALARS = ("sum_kernel", "combine_kernel", "js_combine_kernel")
OUTPUTS = ("g_grad_student", "g_grad_teacher", "g_out", "g_x_old", "g_grad_x", "g_grad_residual")
# Kernels that loop over a row with sums in every lane.
READERS = ("stream_kernel", "js_stream_kernel")


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[int, str], Resources]:
    return resources.compile_all(0)


def check(call_index: int, found: dict[tuple[int, str], Resources], target: str) -> None:
    """Every variant for a target: registers within the hardware's, nothing spilled, 128-bit accesses."""
    calls = (CALLS, resources.MORE_CALLS)[call_index]
    for index, (call, launch) in enumerate(variants(calls)):
        r = found[index, target]
        where = f"{launch.name}, launched by {call.name}, on {target}: {r[:5]}"
        assert r.spills == 0, where
        assert r.registers <= MAX_REGISTERS[target], where
        # a multiprocessor of sm_80 and later has 65536 registers: at least one program has to fit
        if TARGETS[target].backend == "cuda":
            assert r.registers * launch.num_warps * 32 <= 65536, where
        assert r.shared <= 48 * 1024, where
        if launch.name in SCALARS or "× 10 float32" in call.name or "× 100 float32" in call.name:
            continue
        assert r.widest_load >= 16, where
        if any(isinstance(launch.arguments.get(name), torch.Tensor) for name in OUTPUTS):
            assert r.widest_store >= 16, where


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_and_wide_accesses(compiled: dict[tuple[int, str], Resources], target: str) -> None:
    check(0, compiled, target)


@pytest.mark.slow
def test_all_variants() -> None:
    found = resources.compile_all(1)
    for target in TARGETS:
        check(1, found, target)


def test_every_kernel_is_compiled() -> None:
    """A kernel that no call of the default grid launches would go unchecked."""
    launched = {launch.name for _, launch in variants(CALLS)}
    kernels = set()
    for module in (softmax_kl, dkl, pgd_step, apgd_step, scale_shift_relu):
        kernels |= {
            name
            for name, value in vars(module).items()
            if type(value).__name__ == "JITFunction" and "kernel" in name
        }
    assert launched == kernels


def test_streaming_loop_has_no_barrier(compiled: dict[tuple[int, str], Resources]) -> None:
    """Lanes keep their own sums: neither a barrier nor a shuffle between a loop's first load and its jump back."""
    for index, (_, launch) in enumerate(variants(CALLS)):
        if launch.name not in READERS:
            continue
        assembly = compiled[index, "sm_90"].assembly
        loops = []
        for label in re.finditer(r"^(\$L__BB\d+_\d+):", assembly, flags=re.M):
            jumps = list(re.finditer(rf"bra\S*\s+{re.escape(label.group(1))};", assembly[label.end() :]))
            if jumps:
                body = assembly[label.end() : label.end() + jumps[-1].end()]
                if "ld.global.v4" in body:
                    loops.append(body)
        assert len(loops) == 1, f"{launch.name}: {len(loops)} loops with 128-bit loads"
        assert "bar.sync" not in loops[0]
        assert "shfl" not in loops[0]


def test_gradients_keep_what_is_below_the_normal_numbers(
    compiled: dict[tuple[int, str], Resources],
) -> None:
    """A certain row's gradient may be e^-87 of its peak and less, which NVIDIA's flushing exp2 makes 0."""
    seen = set()
    for index, (_, launch) in enumerate(variants(CALLS)):
        if launch.name in ("stream_grad_kernel", "dkl_kernel"):
            seen.add(launch.name)
            found = set(re.findall(r"ex2\.approx\S*", compiled[index, "sm_90"].assembly))
            assert found == {"ex2.approx.f32"}, launch.name
    assert len(seen) == 2


def kl_launches(
    rows: int,
    classes: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    temperature: float = 2.0,
    scale: float = 1.0,
    stride: int | None = None,
    reduction: int = 1,
) -> list[Launch]:
    stride = stride or classes
    student, teacher = (torch.empty(rows, stride, dtype=dtype)[:, :classes] for _ in range(2))
    with recorded() as launches:
        softmax_kl.softmax_kl_forward_grad(
            student, teacher, None, temperature, 0, 0.5, reduction, scale, True, True
        )
    return launches


def specialisation(launch: Launch) -> tuple[object, ...]:
    """What Triton's own launcher makes its cache key of, besides the device."""
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(TARGETS["sm_90"])
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    values = [launch.arguments[p.name] for p in launch.kernel.params]
    return (launch.name, str(bind(*values)[1]), launch.num_warps)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # batch sizes: 1, multiples of 16, odd ones; more than 2^31 logits
        ({"rows": 1, "classes": 1000}, {"rows": 48, "classes": 1000}),
        ({"rows": 1, "classes": 1000}, {"rows": 17, "classes": 1000}),
        ({"rows": 1000, "classes": 32000}, {"rows": 70000, "classes": 32000}),
        # classes within a power of two on chip; any number of them beyond
        ({"rows": 64, "classes": 520}, {"rows": 64, "classes": 1024}),
        ({"rows": 1000, "classes": 32000}, {"rows": 1000, "classes": 128256}),
        ({"rows": 1000, "classes": 32000}, {"rows": 1000, "classes": 50257}),
        # temperatures and scales: 1 is no special case
        (
            {"rows": 64, "classes": 1000, "temperature": 1.0},
            {"rows": 64, "classes": 1000, "temperature": 3.7},
        ),
        ({"rows": 64, "classes": 32000, "scale": 1.0}, {"rows": 64, "classes": 32000, "scale": 0.3}),
        # strides
        ({"rows": 64, "classes": 1000}, {"rows": 64, "classes": 1000, "stride": 1008}),
    ],
)
def test_nothing_is_compiled_again(first: dict[str, int], second: dict[str, int]) -> None:
    """By Triton's own rules: the cache keys of all launches are equal."""
    keys = [sorted({specialisation(each) for each in kl_launches(**call)}) for call in (first, second)]
    if first["rows"] == 1:  # one program needs no second stage
        keys[1] = [key for key in keys[1] if key[0] != "sum_kernel"]
    assert keys[0] == keys[1]


def test_dtypes_and_alignment_are_compiled_apart() -> None:
    """The other half of the claim: what does specialise."""
    keys = {
        tuple(sorted(map(specialisation, kl_launches(64, 1000, **others))))
        for others in ({}, {"dtype": torch.float32}, {"stride": 1001})
    }
    assert len(keys) == 3


def test_launches_of_tiny_shapes() -> None:
    """Overhead is all there is to them: one launch for gradients, and one with the summed loss of a single tile."""
    logits = torch.empty(128, 10), torch.empty(128, 10)
    with recorded() as launches:
        softmax_kl.softmax_kl_grad(*logits, None, 2.0, 0, 0.5, 1.0, True, True)
    assert [launch.name for launch in launches] == ["tile_kernel"]
    assert [launch.name for launch in kl_launches(128, 10)] == ["tile_kernel"]
    assert [launch.name for launch in kl_launches(256, 100)] == ["tile_kernel", "sum_kernel"]
    assert [launch.name for launch in kl_launches(256, 100, reduction=0)] == ["tile_kernel"]


def test_few_long_rows_are_split() -> None:
    """132 multiprocessors want at least as many programs; many rows are programs enough."""
    few, many = kl_launches(8, 128256), kl_launches(2048, 128256)
    assert [launch.name for launch in few] == [
        "stream_kernel",
        "combine_kernel",
        "stream_grad_kernel",
        "sum_kernel",
    ]
    assert few[0].grid[0] >= 132
    assert [launch.name for launch in many] == ["stream_kernel", "stream_grad_kernel", "sum_kernel"]


def test_bytes_moved() -> None:
    """On chip each logit is read once and each gradient written once; a streamed row is read twice."""
    for call in CALLS:
        if call.name.startswith("softmax_kl_forward_grad"):
            classes = call.row_elements
            expected = 1.0 if classes <= 8192 else 2.0 if " js" in call.name else 1.5
            assert call.moved() / call.least == expected, call.name


def test_odd_rows_keep_an_aligned_body() -> None:
    """50257 half-precision classes: every row starts elsewhere, and still most of it is read 16 bytes at a time."""
    stream = kl_launches(16, 50257)[0]
    assert stream.arguments["PHASE"] is True
    student, teacher = torch.empty(16, 50257), torch.empty(16, 50258)[:, :50257]
    with recorded() as launches:
        softmax_kl.softmax_kl_forward(student, teacher, None, 2.0, 0, 0.5, 1, 1.0)
    assert launches[0].arguments["PHASE"] is False  # the stated cost: phases differ, accesses are narrow
