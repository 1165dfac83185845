"""A saved student serves where this project is not installed: the lines that docs/quickstart.md shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from advfunmatch import create_model
from advfunmatch.checkpoint import save_checkpoint

QUICKSTART = Path(__file__).parents[2] / "docs" / "quickstart.md"
BLOCKS = re.findall(r"^```py\n(.*?)^```", QUICKSTART.read_text(), re.DOTALL | re.MULTILINE)
ABSENT = (
    "import sys\nsys.modules['advfunmatch'] = sys.modules['afm_kernels'] = None  # an import of them fails\n"
)
ANSWER = "torch.save(student(torch.load('images.pt')), 'logits.pt')\n"


@pytest.mark.parametrize(
    ("block", "name"),
    [(0, "small_cnn-8"), (1, "resnet18"), (2, "torchvision:shufflenet_v2_x0_5")],
)
def test_ten_lines_give_the_saved_network(block: int, name: str, tmp_path: Path) -> None:
    lines = BLOCKS[block]
    assert len([line for line in lines.splitlines() if line.strip()]) <= 10
    torch.manual_seed(0)
    model = create_model(name, num_classes=7, in_channels=3)
    images = torch.rand(4, 3, 32, 32)
    model(images)  # moves the batch-norm statistics
    fixed = {"model": name, "num_classes": 7, "in_channels": 3, "image_size": [32, 32], "config": {}}
    folder = tmp_path / "runs" / "student"
    folder.mkdir(parents=True)
    save_checkpoint(
        folder / "checkpoint.pt", {**fixed, "class_names": list("abcdefg"), "state_dict": model.state_dict()}
    )
    torch.save(images, tmp_path / "images.pt")
    done = subprocess.run(
        [sys.executable, "-c", ABSENT + lines + ANSWER], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model.eval()(images))
