"""Arrows run one way: kernels <- memory <- xlroute <- examples and benchmarks."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each folder may import of the package, besides itself.
ALLOWED = {
    "kernels": {"xlroute.kernels"},
    "memory": {"xlroute.memory", "xlroute.kernels"},
    "xlroute": {"xlroute", "xlroute.memory", "xlroute.kernels"},
}


def imported_modules(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which way an arrow runs"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "xlroute"}
    return names


def package_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[1:2] in (["kernels"], ["memory"]) else parts[0]


@pytest.mark.parametrize("folder", ALLOWED)
def test_each_folder_imports_only_what_lies_below_it(folder: str) -> None:
    files = sorted((ROOT / folder).glob("*.py"))
    assert files
    for file in files:
        modules = {name for name in imported_modules(file.read_text()) if name.split(".")[0] == "xlroute"}
        assert {package_of(name) for name in modules} <= ALLOWED[folder], file
        assert not {"examples", "benchmarks", "kernels", "memory"} & imported_modules(file.read_text())


@pytest.mark.parametrize("folder", ALLOWED)
def test_folders_are_flat(folder: str) -> None:
    assert not [path for path in (ROOT / folder).rglob("*.py") if path.parent != ROOT / folder]


def test_the_rule_would_be_noticed_if_broken() -> None:
    assert package_of("xlroute.memory.store") == "xlroute.memory"
    assert imported_modules("from xlroute import memory") >= {"xlroute.memory"}
    assert package_of("xlroute.router") == "xlroute"
