"""What the documents say is true: their Python examples run, and their tables are those of the committed results."""

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


def test_a_stale_table_is_replaced(tmp_path):
    text = "before\n<!-- table:accuracy -->\nold\n<!-- /table -->\nafter\n"
    assert names_in(text) == ["accuracy"]
    with pytest.raises(ValueError, match="there are no results at"):
        fill(text, tmp_path)
