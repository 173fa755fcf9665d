"""The benchmarks as modules, for tests that call them."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of the benchmarks as the scripts do, timing each call but twice."""
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    before, threads = set(sys.modules), torch.get_num_threads()
    torch.set_num_threads(1)  # where cores are shared, threads that wait for each other are slow
    sys.path.insert(0, str(BENCHMARKS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("timing"), "REPEATS", (2, 2))
        yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))
    torch.set_num_threads(threads)
    for name in names & (set(sys.modules) - before):
        del sys.modules[name]
