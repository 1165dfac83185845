"""A small call of every CUDA kernel, for compute-sanitizer: every tier, aligned or not, with weights and without."""

from __future__ import annotations

import torch

from afm_kernels import APGDState, ops


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu.small needs a CUDA device")
    if ops.STATUS["cuda"] != "loaded":
        raise SystemExit(f"benchmarks.gpu.small needs the CUDA module: {ops.STATUS['cuda']}")
    call = torch.ops.afm_kernels
    generator = torch.Generator("cuda").manual_seed(0)
    for dtype, shapes in (
        (
            torch.float32,
            ((130, 10), (33, 61), (9, 250), (9, 1001), (3, 4001), (3, 8001), (1, 20001), (300, 9001)),
        ),
        (torch.bfloat16, ((130, 10), (9, 121), (9, 500), (9, 1003), (3, 8001), (3, 12001), (1, 40001))),
        (torch.float16, ((3, 33), (1, 30001))),
        (torch.float64, ((3, 100), (1, 9001))),
    ):
        for rows, classes in shapes:
            wide = torch.randn(2, rows, classes + 1, device="cuda", generator=generator).to(dtype)
            for student, teacher in ((wide[0, :, :-1], wide[1, :, :-1]), (wide[0, :, 1:], wide[1, :, :-1])):
                accumulation = torch.float64 if dtype == torch.float64 else torch.float32
                weight = torch.rand(rows, device="cuda", generator=generator, dtype=accumulation)
                for divergence in (0, 2, 3):
                    common = (2.0, divergence, 0.5)
                    loss, stats = call.softmax_kl_forward(student, teacher, weight, *common, 1, 1.0)
                    call.softmax_kl_backward(loss, student, teacher, weight, stats, *common, 1.0, True, True)
                    call.softmax_kl_forward_grad(student, teacher, None, *common, 0, 1.0, True, True)
                labels = torch.randint(classes, (rows,), device="cuda", generator=generator)
                mix = (4.0, 0.9, 0.1, -100)
                call.distillation_forward_grad(student, teacher, labels, weight, *mix, 1, 1.0, True, True)
    mixed = torch.randn(2, 5, 700, device="cuda")
    call.softmax_kl_grad(mixed[0], mixed[1].half(), None, 1.0, 0, 0.5, 1.0, True, True)
    for shape in ((3, 3, 31, 31), (2, 8, 16, 16)):
        x, grad = torch.rand(shape, device="cuda"), torch.randn(shape, device="cuda")
        for norm in (0, 1):
            call.pgd_step(x, grad, x, 0.01, 0.03, norm, 0.0, 1.0)
            call.pgd_start(x, grad, 0.001, 0.03, norm, 0.0, 1.0)
            at = APGDState.at(x, step_size=0.06)
            loss, wrong = (
                torch.rand(len(x), device="cuda"),
                torch.ones(len(x), dtype=torch.bool, device="cuda"),
            )
            call.apgd_step(*at, grad, x, loss, wrong, 0.03, norm, 0.0, 1.0, 0.25, 0.75, 3, False)
        for layout in (torch.contiguous_format, torch.channels_last):
            y = x.contiguous(memory_format=layout)
            scale, shift = torch.rand(shape[1], device="cuda"), torch.rand(shape[1], device="cuda")
            out = call.scale_shift_relu_forward(y, scale, shift, y)
            call.scale_shift_relu_backward(y, out, scale, True, True)
    torch.cuda.synchronize()
    print("every kernel was called")


if __name__ == "__main__":
    main()
