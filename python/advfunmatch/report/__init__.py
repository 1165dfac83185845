"""What runs looked like: terminal tables, pictures, and one HTML page that compares them."""

from __future__ import annotations

from .demo import demo_table, draw_demo
from .page import write_report

__all__ = ["demo_table", "draw_demo", "write_report"]
