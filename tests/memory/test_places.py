"""Where a store is: paths with `..`, links, and files of somebody else's."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from xlroute.memory import MemoryStore, StoreExistsError, StoreLockedError


def create(path: Path, **options: Any) -> MemoryStore:
    """A store of one layer and one stream, with chunk files of 4 rows."""
    return MemoryStore.create(path, layers=1, streams=1, dim=3, chunk_bytes=48, **options)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with five rows that tell their number."""
    with create(tmp_path / "s") as store:
        store.append(torch.arange(5.0)[None, None, :, None].expand(1, 1, 5, 3))
        store.commit()
    return tmp_path / "s"


def check(path: Path) -> None:
    with MemoryStore.open(path) as store:
        assert store.rows(0)[0][0, :, 0].tolist() == [0, 1, 2, 3, 4]
    assert MemoryStore.verify(path).ok


def test_a_path_with_dots_is_the_place_that_it_names(tmp_path: Path, path: Path) -> None:
    check(tmp_path / "s" / ".." / "s")
    with MemoryStore.open(tmp_path / "s" / "commits" / "..", mode="r+") as store:
        with pytest.raises(StoreLockedError):
            MemoryStore.open(path, mode="r+")
        store.append(torch.ones(1, 1, 1, 3))
        store.commit()
    assert MemoryStore.open(path).lengths.tolist() == [6]
    create(tmp_path / "s" / ".." / "other").close()
    assert {each.name for each in tmp_path.iterdir()} == {"s", "other"}
    with pytest.raises(StoreExistsError):
        create(tmp_path / "other" / "..")
    assert {each.name for each in tmp_path.iterdir()} == {"s", "other"}


def test_a_link_to_a_store_is_that_store(tmp_path: Path, path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    check(link)
    with MemoryStore.open(link, mode="r+") as store:
        for place in (path, link):
            with pytest.raises(StoreLockedError):
                MemoryStore.open(place, mode="r+")
        store.append(torch.ones(1, 1, 1, 3))
        store.commit()
    assert MemoryStore.open(path).lengths.tolist() == [6]


def test_nothing_is_made_behind_a_link(tmp_path: Path) -> None:
    """Not even where the link leads to nothing, or to an empty folder."""
    (tmp_path / "empty").mkdir()
    for target in ("empty", "nothing"):
        link = tmp_path / f"link to {target}"
        link.symlink_to(tmp_path / target)
        with pytest.raises(StoreExistsError, match=f"{link}: expected nothing or an empty folder"):
            create(link)
        with (
            MemoryStore.create(layers=1, streams=1, dim=3) as store,
            pytest.raises(StoreExistsError, match=str(link)),
        ):
            store.copy_to(link)
    assert not [*(tmp_path / "empty").iterdir()]
    assert not (tmp_path / "nothing").exists()


SOMEBODY_ELSE = """
import os, sys
import torch
from xlroute.memory import MemoryStore


def read(store):
    with store:
        store.gather(0, torch.tensor([[0]]))
        store.rows(0)


# What is imported when it is first needed may belong to others as well.
with MemoryStore.create(layers=1, streams=1, dim=3) as store:
    store.append(torch.ones(1, 1, 1, 3))
    read(store)
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for path in sys.argv[1:]:
    for mode in ("r", "r+"):
        try:
            read(MemoryStore.open(path, mode=mode))
        except OSError as error:
            print(f"{type(error).__name__}: {error}")
"""


def test_what_belongs_to_somebody_else_is_refused_by_name_and_not_called_damaged(path: Path) -> None:
    names = ["zarr.json", "layer-0.stream-0.rows/c.0.0", "layer-0.stream-0.crc32c", "commits"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        files = [
            shutil.copytree(path, Path(folder) / str(number)) / name for number, name in enumerate(names)
        ]
        for file in files:
            file.chmod(0)
        stores = [str(Path(folder) / str(number)) for number in range(len(names))]
        result = subprocess.run(
            [sys.executable, "-P", "-c", SOMEBODY_ELSE, *stores], capture_output=True, text=True, timeout=100
        )
        for file in files:
            file.chmod(0o700)
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        assert len(lines) == 2 * len(files)
        for number, line in enumerate(lines):
            assert line.startswith(("PermissionError: ", "StoreWriteError: "))
            assert "ermission denied" in line
            assert stores[number // 2] in line
        for store in stores:
            check(Path(store))
