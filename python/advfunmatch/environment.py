"""What a run was made with: versions, machine and commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from afm_kernels.version import __version__


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and, where the package lies in a git checkout, its commit."""
    return {
        "advfunmatch": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """The commit of the checkout that this file is tracked in, with "-dirty" after local changes; None elsewhere."""
    here = Path(__file__).resolve()
    try:
        tracked = ["git", "ls-files", "--error-unmatch", here.name]
        subprocess.run(tracked, cwd=here.parent, check=True, capture_output=True)
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here.parent,
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
