"""A regression is seen, noise is not."""

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import compare, limits, results
from benchmarks.kernels import losses
from benchmarks.timing import Samples

NAME = "op/both/8x10/float32"


def saved(path, times, error=1e-7, peak_bytes=1000):
    records = results.records_of(NAME, times, peers=("eager", "compile"))
    records["ours"].error = {"loss": error}
    records["ours"].peak_bytes = peak_bytes
    results.save(path, "kernels", results.new_run({}, list(records.values())))
    return str(path)


def test_an_artificial_slowdown_and_loss_of_exactness_are_caught(monkeypatch, tmp_path, capsys):
    """The real thing: the suite measures and saves a kernel, then one made five times slower and inexact."""
    machine = {"exp_per_second": {"median": 1e9}, "call_seconds": {"autograd": 3e-5, "op": 1e-6}}
    monkeypatch.setattr(limits, "measure", lambda *_, **__: machine)
    right = losses.afm_kernels.softmax_kl_div_grad

    def worse(student, teacher, **kwargs):
        for _ in range(4):
            right(student, teacher, **kwargs)
        return [gradient * (1 + 1e-5) for gradient in right(student, teacher, **kwargs)]

    def measured(name):
        arguments = ["--part", "kernels", "--smoke", "--out", str(tmp_path / name)]
        assert (
            command.main([*arguments, "--threads", "1", "--only", "^softmax_kl/grad/512x1000/float32"]) == 0
        )
        return str(tmp_path / name / "kernels-cpu.json")

    threads = torch.get_num_threads()
    try:
        before = measured("before")
        monkeypatch.setattr(losses.afm_kernels, "softmax_kl_div_grad", worse)
        after = measured("after")
    finally:
        torch.set_num_threads(threads)
    assert compare.main([before, before]) == 0
    capsys.readouterr()
    assert compare.main([before, after]) == 1
    said = capsys.readouterr().out
    for kind in ("slower ", "less exact "):
        assert f"{kind:<12}softmax_kl/grad/512x1000/float32/ours: " in said
    assert "1 compared" in said
    assert compare.main([after, before]) == 0
    assert "faster" in capsys.readouterr().out


STEADY = Samples((1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("times", "kinds"),
    [
        ({"eager": STEADY, "compile": STEADY, "ours": Samples((0.5, 0.5, 0.5))}, []),
        ({"eager": STEADY, "compile": STEADY, "ours": Samples((0.6, 0.6, 0.6))}, ["slower"]),
        # Within the tolerance, and within the spread.
        ({"eager": STEADY, "compile": STEADY, "ours": Samples((0.52, 0.52, 0.52))}, []),
        ({"eager": STEADY, "compile": STEADY, "ours": Samples((0.4, 0.6, 0.6))}, []),
        # A peer that got faster is not our regression.
        ({"eager": Samples((0.7, 0.7, 0.7)), "compile": STEADY, "ours": Samples((0.5, 0.5, 0.5))}, []),
        ({"eager": STEADY, "compile": STEADY, "ours": Samples((0.3, 0.3, 0.3))}, ["faster"]),
    ],
)
def test_speed(tmp_path, times, kinds):
    before = {"eager": STEADY, "compile": STEADY, "ours": Samples((0.5, 0.5, 0.5))}
    old, new = saved(tmp_path / "old", before), saved(tmp_path / "new", times)
    changes = list(compare.compare(*(results.load(tmp_path / name) for name in ("old", "new"))))
    assert [change.kind for change in changes] == kinds
    assert compare.main([old, new]) == (kinds == ["slower"])


def test_errors_memory_and_missing_records(tmp_path):
    times = {"eager": STEADY, "ours": STEADY}
    old = results.load(saved_path(tmp_path / "old", times))

    def kinds(**changed):
        new = results.load(saved_path(tmp_path / "new", times, **changed))
        return [change.kind for change in compare.compare(old, new)]

    assert kinds() == []
    assert kinds(error=1.5e-7) == []
    assert kinds(error=1e-6) == ["less exact"]
    assert kinds(error=None) == ["less exact"]
    assert kinds(error=1e-8) == ["more exact"]
    assert kinds(peak_bytes=100_000) == ["hungrier"]
    empty = {**old, "runs": []}
    assert [change.kind for change in compare.compare(old, empty)] == ["missing"]


def saved_path(path, times, **changed):
    saved(path, times, **changed)
    return path


def test_files_that_cannot_be_compared(tmp_path, capsys):
    good = saved(tmp_path / "good", {"eager": STEADY, "ours": STEADY})
    assert compare.main([good, str(tmp_path / "missing")]) == 2
    results.save(tmp_path / "other", "attack", results.new_run({}, []))
    assert compare.main([good, str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.count("benchmarks.compare:") == 2
