"""The toy model and data of these tests, as a module: `toy.train(folder)`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("zoo_training_toy", Path(__file__).with_name("toy.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # worker processes look the classes up by their module's name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def whole(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A run that nothing interrupted: its folder, its weights and its log."""
    folder = tmp_path_factory.mktemp("whole")
    state = toy.train(folder).state_dict()
    return {"folder": folder, "state": state, "lines": toy.lines(folder)}
