"""What the documents say is true: their Python examples run, and their tables are those of the committed results."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.report import documents
from benchmarks.results import ROOT
from benchmarks.tables import fill, names_in

_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
EXAMPLES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]
EXAMPLES = [path for path in EXAMPLES if _BLOCK.search(path.read_text())]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_examples_run(path):
    """The examples of a document run in order, in one namespace.

    They may use a ``teacher``, a ``student`` and images ``x`` that the text has only spoken of.
    """
    pytest.importorskip("advfunmatch")
    from advfunmatch import create_model

    torch.manual_seed(0)
    text = path.read_text()
    scope = {
        "teacher": create_model("resnet18", num_classes=10, in_channels=3).eval(),
        "student": create_model("small_cnn", num_classes=10, in_channels=3),
        "x": torch.rand(2, 3, 8, 8),
    }
    for match in _BLOCK.finditer(text):
        line = text[: match.start()].count("\n") + 1
        code = "\n" * line + match[1]  # so that a traceback names the document's own line
        exec(compile(code, str(path), "exec"), scope)


@pytest.mark.parametrize("path", documents(), ids=name)
def test_tables_are_those_of_the_committed_results(path):
    text = path.read_text()
    assert fill(text) == text, "run python -m benchmarks.report"


@pytest.mark.parametrize("path", documents(), ids=name)
def test_figures_of_the_documents_exist(path):
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{name(path)} shows {target}"


def test_an_unknown_table_is_named():
    with pytest.raises(ValueError, match="there is no table 'kernel'"):
        fill("<!-- table:kernel -->\n<!-- /table -->")


def test_a_table_is_made_anew_and_only_of_results_that_are_there(tmp_path):
    text = "before\n<!-- table:demo -->\nold\n<!-- /table -->\nafter\n"
    assert names_in(text) == ["demo"]
    assert fill(text, tmp_path) == "before\n<!-- table:demo -->\n<!-- /table -->\nafter\n"
    runs = {
        "teacher": {"method": "pgd_at", "model": "a", "clean": 99.44, "pgd20": 80.83, "autoattack": 79.44},
        "ce": {"method": "ce", "model": "b", "clean": 98.33, "pgd20": 3.33, "autoattack": 1.39}
        | {"agreement": 98.89, "agreement_mismatched": 28.33, "kl_mismatched": 4.281},
    }
    demo = {"data": "digits", "test_images": 360, "eps": 0.15, "epochs": 30, "runs": runs}
    (tmp_path / "demo.json").write_text(json.dumps(demo))
    filled = fill(text, tmp_path)
    assert "| ce | `b` | 98.3 | 3.3 | 1.4 | 98.9 | 28.3 | 4.281 |" in filled
    assert "old" not in filled
    assert fill(filled, tmp_path) == filled
