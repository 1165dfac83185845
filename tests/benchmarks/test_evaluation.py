"""The evaluation benchmark: contestants agree on what they measure, and the paired statistics are right."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.evaluation import __main__ as program


def test_mcnemar_is_the_exact_binomial() -> None:
    assert program.mcnemar(0, 0) == 1
    assert program.mcnemar(3, 3) == 1
    assert program.mcnemar(0, 6) == pytest.approx(2 / 2**6)
    assert (
        program.mcnemar(2, 9)
        == program.mcnemar(9, 2)
        == pytest.approx(2 * sum(math.comb(11, k) for k in range(3)) / 2**11)
    )


def test_both_parts_run_and_are_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, out = tmp_path / "weights.pt", tmp_path / "out.json"
    torch.save(
        program.network_and_images.__globals__["trained_network"](2, name="small_cnn-24").state_dict(),
        weights,
    )
    few = [
        "--weights",
        str(weights),
        "--images",
        "12",
        "--share",
        "0.04",
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    for part in ("speed", "paired"):
        monkeypatch.setattr(sys, "argv", ["benchmarks.evaluation", "--part", part, *few])
        program.main()
    said = capsys.readouterr().out
    assert "ours, apgd_t:" in said
    assert "1 seeds of 12 images" in said
    speed, paired = json.loads(out.read_text())["runs"]
    rows = speed["rows"]
    assert {"ours", "official", "official, prepared"} <= set(rows)
    for name in ("ours", "official"):
        stages = rows[name]["stages"]
        assert 0 < sum(stages[stage]["seconds"] for stage in program.STANDARD) <= rows[name]["seconds"][0]
    (row,) = paired["rows"]
    assert row["robust_official"] - row["robust_ours"] == row["only_ours"] - row["only_official"]
