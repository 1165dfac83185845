"""A regression stands out of the history of a results file."""

import subprocess

import pytest

from benchmarks import history, results
from benchmarks.timing import Samples

GROUP = "softmax_kl/both/512x1000/float32"


@pytest.fixture
def repository(tmp_path):
    """A clone that has committed one results file three times; ours became slower in the third."""

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    path = tmp_path / "kernels-cpu.json"
    for seconds in (0.2, 0.2, 0.25):
        save(path, seconds)
        git("add", ".")
        git("commit", "--allow-empty", "-m", "measured")
    return path


def save(path, seconds):
    times = {"eager": Samples((1.0, 1.0, 1.0)), "ours": Samples((seconds, seconds, seconds * 1.001))}
    found = results.records_of(GROUP, times, peers=("eager",))
    results.save(path, "kernels", results.new_run({"seconds": seconds}, list(found.values())))


def test_versions_and_what_became_slower(repository, tmp_path):
    found = history.versions(repository)
    assert len(found) == 2  # the second commit changed nothing
    assert history.slower(found) == {(1, f"{GROUP}/ours")}
    save(repository, 0.2)
    found = history.versions(repository)
    assert [label for label, _ in found][-1] == "working copy"
    assert history.slower(found) == {(1, f"{GROUP}/ours")}
    drawn = history.draw(found, tmp_path / "history.svg")
    assert drawn.stat().st_size > 1000
    assert drawn.read_bytes() == history.draw(found, tmp_path / "again.svg").read_bytes()
