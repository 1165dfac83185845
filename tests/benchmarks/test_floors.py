"""The table of speeds that softmax_kl is held to: it runs, and shows what was missed."""

import pytest
import torch

from benchmarks.kernels import floors
from benchmarks.results import Record
from benchmarks.tables import TABLES, fill


def record(variant, eager, **details):
    summary = {"median": eager}
    speedup = {"eager": summary, "compile": {"median": eager / 2}}
    return Record(f"floors/128x10/float32/{variant}", None, speedup=speedup, details=details)


def test_what_is_missed_is_bold():
    records = [record("default", 2.0), record("recompute", 6.0), record("upstream", 1.0, kept=0.5)]
    records.append(record("grad", 9.0, copies=20.0))
    (row,) = floors.rows({r.name: r for r in records})
    assert row == [
        "128 × 10",
        "2.0 (1.8) / **1.0** (2.5)",
        "6.0 (1.5) / 3.0 (2.2)",
        "**0.50** (0.75)",
        "9.0 (8)",
        "20.0",
    ]


def test_a_shape_without_results_has_no_line():
    assert list(floors.rows({})) == []


def test_command(capsys, tmp_path):
    threads = torch.get_num_threads()
    out = tmp_path / "floors-avx512.json"
    try:
        arguments = ["--only", "^128x10/", "--no-compile", "--seconds", "0.05", "--out", str(out)]
        assert floors.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "| 128 × 10 |" in printed
    assert "KL 4e-07" in printed
    assert "128 × 10" in TABLES["floors"](tmp_path)
    marked = "<!-- table:floors-avx2 -->\n<!-- /table -->"
    assert fill(marked, tmp_path) == marked  # not measured: left empty


def test_no_shape_matches(capsys):
    with pytest.raises(SystemExit):
        floors.main(["--only", "no such shape"])
    assert "matches none of 128x10/float32" in capsys.readouterr().err
