"""A saved student serves where this project is not installed: the lines that docs/quickstart.md shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from advfunmatch import create_model
from advfunmatch.models.checkpoint import save_checkpoint

QUICKSTART = Path(__file__).parents[2] / "docs" / "quickstart.md"
BLOCKS = re.findall(r"^```py\n(.*?)^```", QUICKSTART.read_text(), re.DOTALL | re.MULTILINE)
NETWORKS = (
    "small_cnn-8",
    "resnet18",
    "torchvision:shufflenet_v2_x0_5",
)  # of which the blocks speak, in order
# Each block in a folder of its own, where an import of this project fails.
RUN = """
import os, pathlib, sys
sys.modules["advfunmatch"] = sys.modules["afm_kernels"] = None
for block in sorted(pathlib.Path().glob("*/lines.py")):
    os.chdir(block.parent)
    names = {}
    exec(pathlib.Path("lines.py").read_text(), names)
    names["torch"].save(names["student"](names["torch"].load("images.pt")), "logits.pt")
    os.chdir("..")
"""


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each block with a saved network, images, the network's logits on them, and the block's."""
    root = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    for index, name in enumerate(NETWORKS):
        folder = root / str(index)
        (folder / "runs" / "student").mkdir(parents=True)
        (folder / "lines.py").write_text(BLOCKS[index])
        model = create_model(name, num_classes=7, in_channels=3)
        images = torch.rand(4, 3, 32, 32)
        model(images)  # moves the batch-norm statistics
        fixed = {"model": name, "num_classes": 7, "in_channels": 3, "image_size": [32, 32], "config": {}}
        state = {"class_names": list("abcdefg"), "state_dict": model.state_dict()}
        save_checkpoint(folder / "runs" / "student" / "checkpoint.pt", {**fixed, **state})
        torch.save(images, folder / "images.pt")
        torch.save(model.eval()(images), folder / "expected.pt")
    done = subprocess.run([sys.executable, "-c", RUN], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize(("block", "name"), list(enumerate(NETWORKS)))
def test_ten_lines_give_the_saved_network(block: int, name: str, answered: Path) -> None:
    assert len([line for line in BLOCKS[block].splitlines() if line.strip()]) <= 10
    folder = answered / str(block)
    torch.testing.assert_close(torch.load(folder / "logits.pt"), torch.load(folder / "expected.pt"))
