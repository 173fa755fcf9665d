"""Exports: what other programs read is what the commit holds, or there is no file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from xlroute.memory import CommitNotFoundError, CorruptionError, MemoryStore
from xlroute.memory.export import export_store

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def make(path: Path, dtype: torch.dtype = torch.float32) -> tuple[list[list[Tensor]], list[int], list[str]]:
    """A store of 2 layers and 3 streams: the rows it holds, the positions of the first, and its commits."""
    states = torch.randn(2, 3, 25, 5).to(dtype)
    counts = [25, 9, 0]
    with MemoryStore.create(
        path, layers=2, streams=3, dim=5, dtype=dtype, capacity=20, chunk_bytes=7 * 40
    ) as store:
        store.append(states, counts)
        store.fingerprint = "f"
        store.commit()
        commits = store.commits()
    held = [states[:, stream, max(0, count - 20) : count] for stream, count in enumerate(counts)]
    return [[held[stream][layer] for stream in range(3)] for layer in range(2)], [5, 0, 0], commits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_npz_holds_the_rows(tmp_path: Path, dtype: torch.dtype) -> None:
    rows, firsts, commits = make(tmp_path / "s", dtype)
    told: list[tuple[int, int]] = []
    found = export_store(tmp_path / "s", tmp_path / "a.npz", progress=lambda *numbers: told.append(numbers))
    assert found == commits[-1]
    size = 2 * (20 + 9) * 5 * dtype.itemsize
    assert told[-1] == (size, size)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    with np.load(tmp_path / "a.npz") as arrays:
        assert len(arrays.files) == 2 * 3 + 3
        for stream, first in enumerate(firsts):
            positions = arrays[f"stream-{stream}.positions"]
            assert positions.dtype == np.int64
            assert positions.tolist() == [*range(first, first + len(rows[0][stream]))]
            for layer in range(2):
                given = torch.from_numpy(arrays[f"layer-{layer}.stream-{stream}.rows"])
                assert given.dtype == wide
                assert given.shape == rows[layer][stream].shape
                assert torch.equal(given, rows[layer][stream].to(wide))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_positions_with_gaps_and_what_was_routed_are_exported(tmp_path: Path, suffix: str) -> None:
    with MemoryStore.create(
        tmp_path / "s", layers=1, streams=2, dim=3, capacity=20, eviction="every_nth", keep_every=4
    ) as store:
        store.append(torch.randn(1, 2, 70, 3), [70, 9])
        counts = store.record_routes()
        store.layer(0).take_routed(torch.stack([torch.randint(20, (30,)), torch.full((30,), -1)]))
        store.append(torch.randn(1, 2, 6, 3), [6, 0])
        store.commit()
        expected = [log.positions().tolist() for log in store.logs]
        times = dict(zip(*(each.tolist() for each in counts.of(0, 0)), strict=True))
        rows = store.rows(0)[0]
    assert expected[0][-1] - expected[0][0] > len(expected[0])
    export_store(tmp_path / "s", tmp_path / f"a{suffix}")
    if suffix == ".npz":
        with np.load(tmp_path / "a.npz") as arrays:
            found = dict(arrays)
    else:
        with safe_open(tmp_path / "a.safetensors", "np") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for stream in range(2):
        assert found[f"stream-{stream}.positions"].tolist() == expected[stream]
        given = torch.from_numpy(found[f"layer-0.stream-{stream}.rows"])
        assert torch.equal(given, rows[stream, : len(expected[stream])])
    # Nothing was counted of the other stream.
    assert {name for name in found if "routed" in name} == {"layer-0.stream-0.routed"}
    assert found["layer-0.stream-0.routed"].tolist() == [times.get(each, 0) for each in expected[0]]
    assert found["layer-0.stream-0.routed"].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_safetensors_hold_the_rows(tmp_path: Path, dtype: torch.dtype) -> None:
    rows, firsts, commits = make(tmp_path / "s", dtype)
    export_store(tmp_path / "s", tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"commit": commits[-1], "fingerprint": "f"}
        assert len(file.keys()) == 2 * 3 + 3
        for stream, first in enumerate(firsts):
            expected = torch.arange(first, first + len(rows[0][stream]))
            assert torch.equal(file.get_tensor(f"stream-{stream}.positions"), expected)
            for layer in range(2):
                given = file.get_tensor(f"layer-{layer}.stream-{stream}.rows")
                assert given.dtype == dtype
                assert torch.equal(given, rows[layer][stream])


def test_another_commit_can_be_exported(tmp_path: Path) -> None:
    _, _, commits = make(tmp_path / "s")
    assert export_store(tmp_path / "s", tmp_path / "a.safetensors", commit=commits[0]) == commits[0]
    with safe_open(tmp_path / "a.safetensors", framework="np") as file:
        assert file.metadata() == {"commit": commits[0]}
        assert file.get_tensor("layer-1.stream-0.rows").shape == (0, 5)
    with pytest.raises(CommitNotFoundError):
        export_store(tmp_path / "s", tmp_path / "b.npz", commit="000000000007-00000000")


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
def test_nothing_is_left_of_an_export_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make(tmp_path / "s")
    target = tmp_path / "out" / name
    target.parent.mkdir()

    def replace(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(OSError, match="No space left"):
            export_store(tmp_path / "s", target)
    assert not list(target.parent.iterdir())
    file = tmp_path / "s" / "layer-1.stream-0.rows" / "c.1.0"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptionError, match=str(file)):
        export_store(tmp_path / "s", target)
    assert not list(target.parent.iterdir())
    with pytest.raises(OSError, match="No such file or directory"):
        export_store(tmp_path / "s", tmp_path / "missing" / name)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "s")
    for name in ("a.npz", "a.safetensors"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(FileExistsError, match=f"{tmp_path / name}: expected nothing, got something"):
            export_store(tmp_path / "s", tmp_path / name)
        assert (tmp_path / name).read_text() == "mine"
    with pytest.raises(ValueError, match=r"target: expected a name that ends in \.npz or \.safetensors, got"):
        export_store(tmp_path / "s", tmp_path / "a.pt")
