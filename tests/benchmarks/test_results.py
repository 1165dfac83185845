"""The JSON that tables and figures are made of."""

import copy
import json
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.timing import Samples

TIMES = {
    "eager": Samples((4.0, 5.0, 6.0)),
    "ours": Samples((2.0, 2.0, 2.0)),
    "copy": Samples((1.0, 1.0, 1.0)),
}


def a_run(times=TIMES, group="op/both/8x10/float32"):
    records = results.records_of(group, times, peers=("eager", "compile"))
    records["ours"].error = {"loss": 1e-7, "grad_student": results.finite(float("nan"))}
    records["ours"].limits = {"copy": 1.0}
    return results.new_run(
        {"exp_per_second": {"median": 1e9, "best": 1e9}}, list(records.values()), smoke=True
    )


def content():
    return {"schema": results.SCHEMA, "part": "kernels", "runs": [a_run()]}


def test_speedups_are_taken_within_rounds():
    ours, eager = (results.records_of("g", TIMES, peers=("eager",))[name] for name in ("ours", "eager"))
    assert ours.speedup["eager"]["median"] == 2.5
    assert ours.speedup["eager"]["minimum"] == 2.0
    assert (ours.variant, ours.group, ours.peer) == ("ours", "g", False)
    assert eager.peer
    assert not eager.speedup
    assert "copy" not in results.records_of("g", TIMES, peers=())


def test_round_trip(tmp_path):
    path = tmp_path / "folder" / "kernels.json"
    results.save(path, "kernels", a_run())
    loaded = results.load(path)
    assert loaded["part"] == "kernels"
    assert {record.name for record in results.records(loaded)} == {
        "op/both/8x10/float32/eager",
        "op/both/8x10/float32/ours",
    }
    assert loaded["runs"][0]["machine"]["threads"] >= 1
    assert list(tmp_path.rglob("*")) == [path.parent, path]


def test_append_replaces_records_of_the_same_name(tmp_path):
    path = tmp_path / "kernels.json"
    results.save(path, "kernels", a_run())
    results.save(path, "kernels", a_run(group="op/both/9x10/float32"), append=True)
    assert [len(run["records"]) for run in results.load(path)["runs"]] == [2, 2]
    faster = {**TIMES, "ours": Samples((1.0, 1.0, 1.0))}
    results.save(path, "kernels", a_run(faster), append=True)
    loaded = results.load(path)
    assert [run["records"][0]["name"] for run in loaded["runs"]] == [
        "op/both/9x10/float32/eager",
        "op/both/8x10/float32/eager",
    ]
    ours = {record.name: record for record in results.records(loaded)}["op/both/8x10/float32/ours"]
    assert ours.speedup["eager"]["median"] == 5


def change(path, value):
    """The valid content with one place changed."""
    changed = place = copy.deepcopy(content())
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


RECORD = ("runs", 0, "records", 1)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("schema",), 99, "file.schema is 99"),
        (("runs",), {}, "file.runs is"),
        (("runs", 0, "commit"), None, r"runs\[0\].commit is None"),
        (("runs", 0, "machine", "threads"), "two", "machine.threads is 'two'"),
        ((*RECORD, "name"), "op/both/8x10/float32/eager", "appears twice"),
        ((*RECORD, "name"), "op", "not what/variant"),
        ((*RECORD, "times"), 1, "unknown fields: times"),
        ((*RECORD, "time", "median"), "fast", "time.median is 'fast'"),
        ((*RECORD, "time", "minimum"), 0.0, "time is not in order"),
        ((*RECORD, "speedup", "eager", "high"), 0.1, "not in order"),
        ((*RECORD, "error", "loss"), float("nan"), r"error\['loss'\] is nan"),
        ((*RECORD, "limits", "copy"), -1, "not a number of at least 0"),
    ],
)
def test_validation_names_the_place(path, value, words):
    with pytest.raises(ValueError, match=words):
        results.validate(change(path, value))


def test_missing_field_and_broken_file(tmp_path):
    incomplete = content()
    del incomplete["runs"][0]["versions"]
    with pytest.raises(ValueError, match="no field 'versions'"):
        results.validate(incomplete)
    path = tmp_path / "broken.json"
    with pytest.raises(ValueError, match="no results at"):
        results.load(path)
    path.write_text(json.dumps(content())[:-20])
    with pytest.raises(ValueError, match="is not JSON"):
        results.load(path)


@pytest.mark.parametrize("path", sorted(results.FOLDER.glob("*.json")), ids=lambda path: path.name)
def test_committed_results_are_valid(path: Path):
    """Files of other tools (the demo writes its own) have no schema and are not checked here."""
    raw = json.loads(path.read_text())
    if "schema" not in raw:
        pytest.skip("not a results file")
    results.validate(raw)
