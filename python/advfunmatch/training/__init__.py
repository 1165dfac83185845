"""Training: one readable loop, what a run holds, and what is kept of it."""

from __future__ import annotations

from .trainer import train

__all__ = ["train"]
