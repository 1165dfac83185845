"""What the attack benchmark measures beside whole attacks."""

from __future__ import annotations

import torch
from advfunmatch.lean import prepare_for_attack

from benchmarks.attack.__main__ import CPU_CASES, gradient_over_forward, network
from benchmarks.attack.roofline import profile_step


def test_the_parts_of_a_step_and_the_cost_of_a_gradient_are_measured():
    case = CPU_CASES[0]
    student, teacher = (network(case.student, case, "cpu", seed) for seed in (0, 1))
    x = torch.rand(4, case.channels, case.size, case.size)
    ratios = gradient_over_forward(case, student, teacher, x, budget=0.1)
    assert set(ratios) == {case.student}
    assert all(0 < ratio < 50 for ratio in ratios.values())
    parts = profile_step(prepare_for_attack(student), prepare_for_attack(teacher), x, repeats=2)
    groups = {part["group"] for part in parts}
    assert {"linear", "objective and update"} < groups
    assert any(group.endswith("input gradient") for group in groups)
    assert all(part["seconds"] > 0 and part["calls"] >= 1 for part in parts)
