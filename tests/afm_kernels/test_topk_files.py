"""save_topk and load_topk: what comes back, in shards and by rows, and what is said of files that are not ours."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from afm_kernels import TopK, load_topk, save_topk

pytest.importorskip("safetensors")


def drawn(rows: tuple[int, ...] = (6,), temperature: float = 2.0) -> TopK:
    return TopK.from_logits(
        3 * torch.randn(*rows, 40, generator=torch.Generator().manual_seed(len(rows))),
        5,
        temperature=temperature,
    )


def assert_same(got: TopK, wanted: TopK) -> None:
    assert (got.mode, got.temperature, got.num_classes) == (
        wanted.mode,
        wanted.temperature,
        wanted.num_classes,
    )
    assert torch.equal(got.indices, wanted.indices)
    assert torch.equal(got.log_probs, wanted.log_probs)
    assert got.log_tail is not None
    assert wanted.log_tail is not None
    assert torch.equal(got.log_tail, wanted.log_tail)


def test_a_file_and_its_head(tmp_path: Path) -> None:
    from safetensors import safe_open

    topk = drawn((3, 4))
    save_topk(tmp_path / "a.safetensors", topk)
    assert_same(load_topk(tmp_path / "a.safetensors"), topk)
    assert safe_open(tmp_path / "a.safetensors", "pt").metadata() == {
        "format": "afm_kernels.TopK",
        "version": "1",
        "num_classes": "40",
        "k": "5",
        "temperature": "2.0",
        "dtype": "float32",
        "mode": "tail",
    }
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_topk(tmp_path / "a.safetensors", topk[:1])
    save_topk(tmp_path / "a.safetensors", topk, dtype=torch.float16, overwrite=True)
    half = load_topk(tmp_path / "a.safetensors")
    assert half.log_probs.dtype == torch.float16
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]  # nothing partial is left


def test_shards_and_rows(tmp_path: Path) -> None:
    """A folder of files is one TopK; rows are taken across their borders."""
    whole = drawn((10,))
    for i, rows in enumerate((slice(0, 4), slice(4, 5), slice(5, 10))):
        save_topk(tmp_path / f"{i:05}.safetensors", whole[rows])
    assert_same(load_topk(tmp_path), whole)
    assert_same(load_topk(sorted(tmp_path.iterdir())[1:]), whole[4:])
    for rows in (slice(3, 7), slice(-2, None), slice(0, 4), slice(6, 6)):
        assert_same(load_topk(tmp_path, rows=rows), whole[rows])
    save_topk(tmp_path / "00003.safetensors", drawn(temperature=3.0))
    with pytest.raises(ValueError, match=r"parts\[3\] has temperature=3.0"):
        load_topk(tmp_path)


def test_files_that_are_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "a.safetensors"
    save_topk(file, drawn())
    content = file.read_bytes()
    for cut in (4, 100, len(content) - 1):
        file.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"a\.safetensors is no file of safetensors, or is cut short"):
            load_topk(file)
    save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="was not written by save_topk"):
        load_topk(file)
    head = {"format": "afm_kernels.TopK", "version": "1", "mode": "tail", "temperature": "1.0"}
    save_file(
        {"indices": torch.zeros(2, 1).int()}, file, head | {"num_classes": "4", "k": "1", "dtype": "float32"}
    )
    with pytest.raises(ValueError, match="does not hold what its head says"):
        load_topk(file)
    file.write_bytes(content.replace(b'"num_classes":"40"', b'"num_classes":"04"'))
    with pytest.raises(ValueError, match=r"indices holds .*; allowed: 0 to 3"):
        load_topk(file)
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors"):
        load_topk(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="num_classes=None"):
        save_topk(tmp_path / "c.safetensors", TopK(torch.tensor([[0]]), torch.zeros(1, 1), torch.zeros(1)))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save_topk(tmp_path / "d.safetensors", drawn())
