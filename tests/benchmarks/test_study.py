"""The study's command, on almost nothing, and its table."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("advfunmatch")

from advfunmatch.evaluation import ATTACKS

from benchmarks import study
from benchmarks.results import Record, load, new_run, records, save
from benchmarks.tables import TABLES


def test_a_study_can_be_repeated_and_gives_a_record_for_each_network(tmp_path, monkeypatch, capsys):
    row = "advfunmatch+autoaugment"
    monkeypatch.setattr(study, "ROWS", {row: study.ROWS[row]})
    monkeypatch.setattr(study.torch, "set_num_threads", lambda threads: None)  # for the tests that come after
    # AutoAttack has tests of its own, and takes long.
    monkeypatch.setitem(ATTACKS._rows, "autoattack", replace(ATTACKS["fgsm"], name="autoattack"))
    # In this process: a process of its own costs more than what it would do here.
    monkeypatch.setattr(study, "finish_all", lambda runs, jobs: ((run, study.finish(run)) for run in runs))
    command = ["digits", "--smoke", "--seeds", "2", "--out", str(tmp_path), "--results", str(tmp_path)]
    assert study.main(command) == 0
    names = [record.name for record in records(load(tmp_path / "study-digits-cpu.json"))]
    assert names == ["digits/teacher/seed 0", f"digits/{row}/seed 0", f"digits/{row}/seed 1"]
    for record in records(load(tmp_path / "study-digits-cpu.json")):
        assert 0 <= record.details["autoattack"] <= record.details["clean"] <= 100
        assert ("agreement" in record.details) == ("teacher" not in record.name)
    student = json.loads((tmp_path / "digits" / "advfunmatch+autoaugment-1" / "figures.json").read_text())
    assert (student["config"]["augment"], student["config"]["seed"]) == ("autoaugment", 1)

    monkeypatch.setattr(study, "train", None)  # nothing is trained again
    assert study.main(command) == 0
    assert study.main([*command, "--seeds", "3", "--finished-only"]) == 0
    assert len(list(records(load(tmp_path / "study-digits-cpu.json")))) == 3
    assert study.main([name for name in command if name != "--smoke"]) == 2
    assert "holds a run with other settings" in capsys.readouterr().err


def test_the_table_has_means_and_spreads(tmp_path):
    figures = {"clean": 90.0, "pgd20": 40.0, "autoattack": 38.0}
    near = {"agreement": 95.0, "agreement_mismatched": 80.0, "kl_mismatched": 0.25}
    found = [Record("digits/teacher/seed 0", None, details=figures)]
    for seed, clean in enumerate((88.0, 90.0, 92.0)):
        found.append(Record(f"digits/kd/seed {seed}", None, details={**figures, **near, "clean": clean}))
    chosen = study.STUDIES["digits"]
    settings = {"shared": chosen.shared, "teacher": chosen.teacher, "student": chosen.student}
    save(tmp_path / "study-digits-cpu.json", "study-digits", new_run({}, found, **settings))
    table = TABLES["study-digits"](tmp_path)
    assert "| teacher | 90.0 | 40.0 | 38.0 | – | – | – |" in table
    assert "| kd | 90.0 ± 2.0 | 40.0 ± 0.0 | 38.0 ± 0.0 | 95.0 ± 0.0 | 80.0 ± 0.0 | 0.250 ± 0.000 |" in table
    assert "over 3 seeds" in table
