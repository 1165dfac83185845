"""The pages say what is so: the file that one of them writes works, and the fields that another lists are a run's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from advfunmatch import TrainConfig, train
from advfunmatch.cli import run
from processes import start

DOCS = Path(__file__).parents[2] / "docs"


def test_the_file_of_one_s_own_things_works(tmp_path: Path) -> None:
    page = (DOCS / "extending.md").read_text()
    (tmp_path / "my.py").write_text(
        "\n\n".join(re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    )
    commands = re.findall(r"^    advfunmatch (.*)$", page, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        words = re.findall(r'"([^"]*)"|(\S+)', command)
        arguments = [quoted or plain for quoted, plain in words]
        here = [re.sub(r"^(runs\b|my\.py$)", rf"{tmp_path}/\1", each) for each in arguments]
        process = start(here, tmp_path / "said")
        process.join()
        assert process.exitcode == 0, (tmp_path / "said").read_text()
    measured = json.loads((tmp_path / "runs" / "hard" / "noise.json").read_text())
    assert measured["noise(tries=3)"] <= measured["clean"]
    assert "noise(tries=3)" in (tmp_path / "runs" / "report.html").read_text()


def listed(heading: str, after: str = "") -> set[str]:
    """The names in the first column of the table under a heading of docs/files.md, or after a sentence of it."""
    section = (DOCS / "files.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    table = section.split(after)[1] if after else section
    rows = [line for line in table.split("|---|")[1].split("\n\n")[0].splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split(" | ")[0])}


def test_the_fields_of_the_files_are_those_that_are_listed(
    make_config: Callable[..., TrainConfig], teacher: str, tmp_path: Path
) -> None:
    config = make_config(method="advfunmatch", teacher=teacher, validation=20, limit=100)
    train(config, show=False)
    folder = Path(config.out)
    result = json.loads((folder / "result.json").read_text())
    assert set(result) == listed("result.json")
    assert set(result["results"][0]) == listed("result.json", "A row of `results`:")
    assert set(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])) == listed("metrics.jsonl")
    assert set(json.loads((folder / "run.json").read_text())) == listed("run.json")
    whole = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert set(whole) == listed("checkpoint.pt")

    common = ["--checkpoint", str(folder), "--data", "digits", "--limit", "10", "--out"]
    assert run(["evaluate", *common, str(tmp_path / "e.json"), "--fidelity"]) == 0
    own = {
        "method",
        "epochs",
        "train_images",
        "seconds",
        "images_per_second",
        "teacher_accuracy",
        "last",
        "best",
        "config",
    }
    evaluated = set(json.loads((tmp_path / "e.json").read_text()))
    assert evaluated == (set(result) - own) | listed("The JSON of `evaluate`")
    assert run(["attack", *common, str(tmp_path / "x.npz"), "--attack", "fgsm"]) == 0
    with np.load(tmp_path / "x.npz") as archive:
        assert set(archive) == listed("The archive of `attack`")
