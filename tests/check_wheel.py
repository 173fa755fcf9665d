"""Builds the wheel, compares what it holds with the tree, and type-checks it as a user would see it.

    python tests/check_wheel.py

mypy follows the folder names, not the package names, when it runs over the tree, and so would leave most of
the package out. So the wheel is unpacked and checked from an empty folder, and the scripts against it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"xlroute": "xlroute", "xlroute/kernels": "kernels", "xlroute/memory": "memory"}


def expected_files() -> set[str]:
    """The package's files as the wheel should name them."""
    files = {
        f"{package}/{path.name}"
        for package, folder in PACKAGES.items()
        for path in (ROOT / folder).glob("*.py")
    }
    return files | {"xlroute/py.typed"}


def check_contents(wheel: Path) -> None:
    """Exit with a message if the wheel holds other files than the tree."""
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    if found != expected_files():
        lacks, has = sorted(expected_files() - found), sorted(found - expected_files())
        sys.exit(f"the wheel lacks {lacks} and has {has} besides")


def main() -> None:
    """Build, compare, type-check."""
    with tempfile.TemporaryDirectory() as temporary:
        # setuptools builds in the tree and takes what lies there from before along: build from a clean copy.
        source, out, site, empty = (Path(temporary) / name for name in ("source", "out", "site", "empty"))
        empty.mkdir()
        names = ["xlroute", "kernels", "memory", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"]
        source.mkdir()
        subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names), str(source)], check=True)
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "wheel",
                "--quiet",
                "--no-deps",
                "--wheel-dir",
                str(out),
                str(source),
            ],
            check=True,
        )
        (wheel,) = out.glob("*.whl")
        check_contents(wheel)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        mypy = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        environment = {**os.environ, "MYPYPATH": str(site)}
        subprocess.run([*mypy, "-p", "xlroute"], cwd=empty, env=environment, check=True)
        for folder in ("examples", "benchmarks"):
            scripts = [str(path) for path in sorted((ROOT / folder).glob("*.py"))]
            if scripts:
                # A benchmark may run what an example is made of.
                path = os.pathsep.join(str(each) for each in (site, ROOT / folder, ROOT / "examples"))
                subprocess.run(
                    [*mypy, *scripts], cwd=empty, env={**environment, "MYPYPATH": path}, check=True
                )
    print(f"{wheel.name}: {len(expected_files())} files as in the tree, types checked")


if __name__ == "__main__":
    main()
