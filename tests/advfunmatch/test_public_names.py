"""What a user may import: the names of every `__all__`, and the modules that lay beside the package's first file."""

from __future__ import annotations

import importlib

import advfunmatch
import pytest

PACKAGES = ("attacks", "lean", "models", "data", "methods", "training", "evaluation", "report")


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_package_calls_public_is_there(package):
    module = importlib.import_module(f"advfunmatch.{package}")
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("attack", "PGDAttack"),
        ("checkpoint", "load_network"),
        ("config", "config_from"),
        ("evaluate", "evaluate"),
        ("lean", "prepare_for_attack"),
        ("methods", "METHODS"),
        ("objectives", "Mismatch"),
        ("presets", "PRESETS"),
        ("trainer", "train"),
    ],
)
def test_modules_of_the_flat_package_can_still_be_imported(module, name):
    assert hasattr(importlib.import_module(f"advfunmatch.{module}"), name)
    assert callable(advfunmatch.evaluate)  # the function, not the module of that name
