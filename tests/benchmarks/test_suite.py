"""The suite itself: what would run, that answers are checked, and that tables and figures come out of results."""

import re
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import limits, results, tables
from benchmarks.kernels import accuracy, case, losses, suite
from benchmarks.options import Options
from benchmarks.parts import PARTS
from benchmarks.schedule import LEAST

LIMITS = {"exp_per_second": {"median": 1e9}, "call_seconds": {"autograd": 3e-5, "op": 1e-6}}


def cases_of(part, **options):
    return PARTS[part].suite.cases(Options(**options))


def test_every_op_shape_dtype_and_mode_is_a_case():
    names = [c.name for c in cases_of("kernels", full=True)]
    assert len(names) == len(set(names))
    losses_of = {
        "softmax_kl",
        "softmax_kl-reverse_kl",
        "softmax_kl-jeffreys",
        "softmax_kl-js",
        "distillation",
        "dkl",
    }
    for op in losses_of:
        modes = losses.MODES if op.startswith("softmax_kl") else ("loss", "student", "both")
        for mode, shape, dtype in product(modes, losses.SHAPES, case.DTYPES):
            assert f"{op}/{mode}/{shape.label}/{dtype}" in names
    assert {name.partition("/")[0] for name in names} - losses_of == {
        "conv3x3",
        "apgd_step",
        "pgd_step",
        "scale_shift_relu",
        "scale_shift_relu-residual",
    }


def test_ten_minutes_and_a_smoke_run_touch_every_op_family_and_dtype():
    standard = cases_of("kernels")
    ops = {c.op for c in cases_of("kernels", full=True)}
    assert {
        c.op for c in standard[: len(ops)]
    } == ops  # what time may cut off is the second case of an op, not its first
    assert {c.family for c in standard} == {s.family for s in losses.SHAPES}
    assert {c.dtype for c in standard} == set(case.DTYPES)
    assert {c.mode for c in standard} >= set(losses.MODES)
    for part in PARTS:
        assert cases_of(part, smoke=True)


@pytest.mark.parametrize("part", PARTS)
def test_parts_fit_their_time(part):
    """By the costs as estimated: that the estimates are kept to at run time is the schedule's business."""
    taken = sum(c.cost + LEAST * PARTS[part].rounds * command.SECONDS for c in cases_of(part))
    assert taken < PARTS[part].share * 60 * command.MINUTES


def wanted(name, **changes):
    (chosen,) = [c for c in suite.kernel_cases() if c.name == name]
    return replace(chosen, compiles=0, **changes)


@pytest.mark.parametrize("mode", losses.MODES)
def test_a_case_is_measured_against_float64(mode):
    chosen = wanted(f"softmax_kl/{mode}/128x10/float32")
    found = {r.variant: r for r in case.measure(chosen, "cpu", LIMITS, budget=0.01)}
    ours = found["ours"]
    assert ours.speedup["eager"]["median"] > 0
    assert ours.bytes == 128 * 10 * 4 * {"loss": 2, "student": 3, "both": 4, "grad": 4}[mode]
    assert ours.limits["call"] == LIMITS["call_seconds"]["autograd" if mode in ("student", "both") else "op"]
    assert all(error is not None and error < 1e-5 for error in ours.error.values())
    assert not list(case.wrong_answers(list(found.values())))


@pytest.mark.parametrize("dtype", case.DTYPES)
@pytest.mark.parametrize("mode", ["loss", "both"])
@pytest.mark.parametrize(
    "maker", [partial(losses.softmax_kl, divergence="js"), losses.distillation, losses.dkl]
)
def test_answers_of_cases_that_only_a_full_run_has(maker, mode, dtype):
    """Called once, not timed: a full run takes hours, and must not find at its end that a case is broken."""
    for shape in (losses.SHAPES[0], losses.Shape("2x19x8x8-cl", (2, 19, 8, 8), "segmentation", dim=1)):
        built = maker(shape, dtype, mode, "cpu")
        for variant in ("ours", "eager"):
            errors = case.errors_of(built.candidates[variant](), built)
            assert all(error is not None and error < case.WRONG[dtype] for error in errors.values())


def test_a_wrong_answer_is_reported_and_fails_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(limits, "measure", lambda *_, **__: LIMITS)
    right = losses.afm_kernels.softmax_kl_div_grad

    def wrong(student, teacher, **kwargs):
        first, second = right(student, teacher, **kwargs)
        return first, 1.01 * second

    arguments = ["--part", "kernels", "--smoke", "--out", str(tmp_path)]
    arguments += ["--only", "^softmax_kl/grad/128x10/float32"]
    threads = torch.get_num_threads()
    try:
        assert command.main(arguments) == 0
        monkeypatch.setattr(losses.afm_kernels, "softmax_kl_div_grad", wrong)
        assert command.main(arguments) == 1
    finally:
        torch.set_num_threads(threads)
    assert "WRONG softmax_kl/grad/128x10/float32/ours: grad_teacher is off by" in capsys.readouterr().err
    assert results.load(tmp_path / "kernels-cpu.json")["runs"][0]["settings"]["smoke"] is True


def test_unknown_part(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.arguments(["--part", "kernel"])
    assert stopped.value.code == 2
    assert "'kernel' is unknown" in capsys.readouterr().err


def test_accuracy_sees_a_negative_and_an_inexact_divergence():
    setting = accuracy.Setting(classes=100, delta=1e-3, offset=0.0)
    ours, eager = (accuracy.errors(setting, variant) for variant in ("ours", "eager"))
    assert ours["row_median"] < 3e-4 < eager["row_median"]
    assert eager["negative"] > 0
    records = [
        results.Record(f"{setting.name}/ours", None, error={"row_median": error, "negative": negative})
        for error, negative in ((1e-2, 0.0), (1e-6, 0.1))
    ]
    for record in records:
        record.details = {"delta": 1e-3}
    assert [re.search("median|negative", s)[0] for s in accuracy.wrong_answers(records)] == [
        "median",
        "negative",
    ]


def test_kernel_tables_and_figures(tmp_path):
    from benchmarks import figures

    names = [f"softmax_kl/{mode}/128x10/float32" for mode in ("both", "grad")]
    records = [r for name in names for r in case.measure(wanted(name), "cpu", LIMITS, budget=0.01)]
    results.save(tmp_path / "kernels-cpu.json", "kernels", results.new_run(LIMITS, records))
    speed = next(r for r in records if r.name == f"{names[0]}/ours").speedup["eager"]["median"]
    table = tables.kernels(tmp_path)
    assert f"| 128 × 10 | {tables.digits(speed)} | – |" in table
    assert tables.kernels_full(tmp_path).count("softmax_kl") == 2
    drawn = figures.draw(tmp_path, tmp_path / "figures")
    assert [path.name for path in drawn] == ["kernels.svg", "kernels.png", "limits.svg", "limits.png"]
    before = [path.read_bytes() for path in drawn]
    assert before == [path.read_bytes() for path in figures.draw(tmp_path, tmp_path / "figures")]
