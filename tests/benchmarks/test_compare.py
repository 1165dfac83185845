"""A regression is seen, noise is not."""

import time

import pytest

from benchmarks import compare, results
from benchmarks.timing import Samples, interleave

NAME = "op/both/8x10/float32"


def busy(seconds):
    def call():
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return call


def saved(path, times, error=1e-7, peak_bytes=1000):
    records = results.records_of(NAME, times, peers=("eager", "compile"))
    records["ours"].error = {"loss": error}
    records["ours"].peak_bytes = peak_bytes
    results.save(path, "kernels", results.new_run({}, list(records.values())))
    return str(path)


def test_an_artificial_slowdown_is_caught(tmp_path, capsys):
    """The real thing: measured, saved, compared, with a tenth of a call's time added to ours."""

    def measure(path, seconds):
        calls = {"eager": busy(2e-3), "ours": busy(seconds)}
        return saved(path, interleave(calls, budget=0.3, min_sample=1e-3))

    old, same, slower = (
        measure(tmp_path / name, seconds) for name, seconds in (("a", 1e-3), ("b", 1e-3), ("c", 1.3e-3))
    )
    assert compare.main([old, same]) == 0
    assert compare.main([old, slower]) == 1
    assert f"slower      {NAME}/ours: 2 -> 1.5" in capsys.readouterr().out.replace("1.54", "1.5")
    assert compare.main([slower, old]) == 0
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
