"""The suite itself: what would run, that answers are checked, and that tables and figures come out of results."""

import re

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import results, tables
from benchmarks.kernels import accuracy, case, losses, suite
from benchmarks.options import Options
from benchmarks.parts import PARTS

LIMITS = {"exp_per_second": {"median": 1e9}, "call_seconds": {"autograd": 3e-5, "op": 1e-6}}


def test_names_are_unique_and_every_op_has_a_case():
    names = [c.name for c in (*suite.kernel_cases(), *suite.sweep_cases())]
    assert len(names) == len(set(names))
    ops = {c.op.partition("-")[0] for c in suite.kernel_cases()}
    assert ops == {"softmax_kl", "distillation", "dkl", "pgd_step", "scale_shift_relu"}
    for part in PARTS.values():
        assert part.names(Options(smoke=True))


@pytest.mark.parametrize("mode", losses.MODES)
def test_a_case_is_measured_against_float64(mode):
    (chosen,) = [c for c in suite.kernel_cases() if c.name == f"softmax_kl/{mode}/128x10/float32"]
    without = ("compile", "compiled formula")
    found = {r.variant: r for r in case.measure(chosen, "cpu", LIMITS, budget=0.01, without=without)}
    ours = found["ours"]
    assert ours.speedup["eager"]["median"] > 0
    assert ours.bytes == 128 * 10 * 4 * {"loss": 2, "student": 3, "both": 4, "grad": 4}[mode]
    assert ours.limits["call"] == LIMITS["call_seconds"]["autograd" if mode in ("student", "both") else "op"]
    assert all(error is not None and error < 1e-5 for error in ours.error.values())
    assert not list(case.wrong_answers(list(found.values())))


def test_a_wrong_answer_is_reported_and_fails_the_run(monkeypatch, tmp_path, capsys):
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
    pytest.importorskip("matplotlib")
    from benchmarks import figures

    wanted = [f"softmax_kl/{mode}/128x10/float32" for mode in ("both", "grad")]
    chosen = [c for c in suite.kernel_cases() if c.name in wanted]
    records = [
        r
        for c in chosen
        for r in case.measure(c, "cpu", LIMITS, budget=0.01, without=("compile", "compiled formula"))
    ]
    results.save(tmp_path / "kernels-cpu.json", "kernels", results.new_run(LIMITS, records))
    speed = next(r for r in records if r.name == f"{wanted[0]}/ours").speedup["eager"]["median"]
    table = tables.kernels(tmp_path)
    assert f"| 128 × 10 | {tables.digits(speed)} | – |" in table
    assert tables.kernels_full(tmp_path).count("softmax_kl") == 2
    drawn = figures.draw(tmp_path, tmp_path / "figures")
    assert [path.name for path in drawn] == ["kernels.svg", "limits.svg"]
    before = [path.read_bytes() for path in drawn]
    assert before == [path.read_bytes() for path in figures.draw(tmp_path, tmp_path / "figures")]
