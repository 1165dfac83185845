"""`advfunmatch evaluate`: the checkpoint's own radius, fidelity that is asked for, and files that are not lost."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from advfunmatch.cli import run
from processes import start


def evaluate(checkpoint: str, out: Path, *more: str) -> list[str]:
    return [
        "evaluate",
        "--checkpoint",
        checkpoint,
        "--data",
        "digits",
        "--limit",
        "40",
        "--out",
        str(out),
        *more,
    ]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert run(arguments) == 2
    return capsys.readouterr().err.strip()


def test_the_checkpoints_own_radius_unless_another_is_given(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = torch.load(teacher, weights_only=True)
    assert run(evaluate(teacher, tmp_path / "own.json", "--attacks", "fgsm")) == 0
    said = capsys.readouterr().out
    assert "eps 0.15 (the checkpoint's), norm linf" in said
    assert "fgsm, 0.15 (linf)" in said
    own = json.loads((tmp_path / "own.json").read_text())
    assert own["settings"]["eps"] == stored["config"]["eps"] == 0.15
    attacks = "fgsm,pgd(steps=2,step_size=eps/2),pgd10(norm=l2,eps=0.5)"
    assert run(evaluate(teacher, tmp_path / "x.json", "--attacks", attacks, "--eps", "4/255, 0.15")) == 0
    said = capsys.readouterr().out
    for name in ("fgsm, 4/255 (linf)", "fgsm, 0.15 (linf)", "pgd(steps=2, step_size=eps/2), 4/255 (linf)"):
        assert name in said
    assert "the checkpoint's" not in said
    rows = {
        (row["attack"], row["norm"], row["eps"]): row
        for row in json.loads((tmp_path / "x.json").read_text())["results"]
    }
    assert rows["fgsm", "linf", 0.15]["accuracy"] == own["fgsm"]
    assert ("pgd10", "l2", 0.5) in rows
    assert len(rows) == 5

    weights = {"state_dict": stored["state_dict"]}
    torch.save(weights, tmp_path / "foreign.pt")
    foreign = [str(tmp_path / "foreign.pt"), tmp_path / "y.json", "--model", stored["model"]]
    assert "eps is missing, but attack 'pgd20' needs" in refused(evaluate(*foreign), capsys)  # type: ignore[arg-type]
    assert run(evaluate(*foreign, "--attacks", "clean")) == 0  # type: ignore[arg-type]
    assert "is one of 'linf'" in refused(evaluate(teacher, tmp_path / "z.json", "--norm", "l2"), capsys)
    assert (
        run(evaluate(teacher, tmp_path / "z.json", "--norm", "l2", "--eps", "0.5", "--attacks", "fgsm")) == 0
    )
    archive = ["attack", *evaluate(teacher, tmp_path / "x.npz")[1:], "--attack"]
    capsys.readouterr()
    assert run([*archive, "pgd(steps=1)"]) == 0
    assert "pgd(steps=1), eps 0.15 (linf) (the checkpoint's): accuracy" in capsys.readouterr().out
    assert "an archive holds the images of one ball" in refused(
        [*archive, "fgsm", "--eps", "0.1,0.2"], capsys
    )


def test_fidelity_is_asked_for_and_its_absence_said(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = torch.load(teacher, weights_only=True)
    torch.save({**stored, "config": {**stored["config"], "teacher": teacher}}, tmp_path / "student.pt")
    student, few = str(tmp_path / "student.pt"), ("--attacks", "clean")
    assert run(evaluate(student, tmp_path / "a.json", *few)) == 0
    assert "fidelity was not measured (--fidelity does; --no-fidelity" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["fidelity"] == []
    assert run(evaluate(student, tmp_path / "b.json", *few, "--no-fidelity")) == 0
    assert "fidelity" not in capsys.readouterr().out
    for index, asked in enumerate((["--fidelity"], ["--teacher", teacher])):
        assert run(evaluate(student, tmp_path / f"{index}.json", *few, *asked, "--eps", "0.1,0.2")) == 0
        assert "agreement, mismatched, 0.2 (linf)" in capsys.readouterr().out
        found = json.loads((tmp_path / f"{index}.json").read_text())
        assert [(row["images"], row["eps"]) for row in found["fidelity"]] == [
            ("clean", None),
            ("mismatched", 0.1),
            ("mismatched", 0.2),
        ]
        assert found["agreement"] == 100
    both = evaluate(student, tmp_path / "c.json", "--teacher", teacher, "--no-fidelity")
    assert "but --no-fidelity says" in refused(both, capsys)
    assert "remembers no teacher" in refused(evaluate(teacher, tmp_path / "c.json", "--fidelity"), capsys)
    assert not (tmp_path / "c.json").exists()


def test_autoattack_beside_the_official_one_and_its_stages_in_two_processes(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A ball so large that little is left for the slow stages.
    both = (
        "--attacks",
        "autoattack,autoattack_official",
        "--eps",
        "0.4",
        "--limit",
        "12",
    )
    assert run(evaluate(teacher, tmp_path / "one.json", *both)) == 0
    said = capsys.readouterr().out
    rows = {row["attack"]: row for row in json.loads((tmp_path / "one.json").read_text())["results"]}
    assert rows["autoattack_official"]["stages"] == []
    assert abs(rows["autoattack"]["accuracy"] - rows["autoattack_official"]["accuracy"]) < 10
    stages = rows["autoattack"]["stages"]
    assert [stage["name"] for stage in stages] == ["clean", "apgd_ce", "apgd_t", "fab_t", "square"]
    assert stages[-1]["accuracy"] == pytest.approx(rows["autoattack"]["accuracy"], abs=0.01)
    assert f"{stages[1]['broken']} of {stages[1]['images']} broken" in said

    few = ("--attacks", "apgd_t(steps=5,targets=2)", "--eps", "0.15")
    assert run(evaluate(teacher, tmp_path / "alone.json", *few)) == 0
    two = evaluate(teacher, tmp_path / "two.json", *few)
    process = start([*two, "--processes", "2"], tmp_path / "said", environment={"OMP_NUM_THREADS": "1"})
    process.join(timeout=120)
    (alone,), (shared,) = (
        json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("alone", "two")
    )
    assert 0 < alone["accuracy"] < 100
    assert shared["standing"] == alone["standing"]
    assert (tmp_path / "said").read_text().count("eps 0.15, norm linf") == 1, "the first process reports"
    assert {path.name for path in tmp_path.iterdir()} == {"one.json", "alone.json", "said", "two.json"}
    assert "processes is 0, but must be" in refused([*two, "--overwrite", "--processes", "0"], capsys)


def test_killed_between_attacks_and_gone_on_with(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.json"
    command = evaluate(teacher, out, "--attacks", "clean,fgsm,pgd(steps=100000,restarts=20)", "--no-fidelity")
    process = start(command, tmp_path / "said")
    while process.is_alive() and not (out.exists() and "fgsm" in json.loads(out.read_text())):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    process.join(timeout=300)
    stored = json.loads(out.read_text())
    assert [row["attack"] for row in stored["results"]] == ["clean", "fgsm"]
    assert not stored["complete"]
    few = evaluate(teacher, out, "--attacks", "clean,fgsm,pgd10")
    assert "is already there; --resume goes on with it, and --overwrite replaces it" in refused(few, capsys)
    assert "seed was 0, and is 1" in refused([*few, "--seed", "1", "--resume"], capsys)
    assert json.loads(out.read_text()) == stored
    assert run([*few, "--resume"]) == 0
    whole = json.loads(out.read_text())
    assert whole["results"][:2] == stored["results"]
    assert [row["attack"] for row in whole["results"]] == ["clean", "fgsm", "pgd10"]
    assert whole["complete"]
