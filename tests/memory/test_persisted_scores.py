"""Scores on disk: with them or without, routing gives the same bits; with them it reads no rows."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from torch import Tensor

from xlroute.kernels import row_scores
from xlroute.memory import CorruptionError, MemoryLayer, MemoryStore, scores
from xlroute.memory.chunks import ChunkFiles
from xlroute.memory.commits import record_path
from xlroute.memory.sealed import checksum

HOW: dict[str, Any] = {"normalize": "rms", "scale": 0.3}
DIM = 8


def create(path: Path, **options: Any) -> MemoryStore:
    # Two chunks and a bit in forty rows.
    defaults = {"layers": 2, "streams": 2, "dim": DIM, "chunk_bytes": 16 * DIM * 4}
    return MemoryStore.create(path, **(defaults | options))


def append(store: MemoryStore, count: int, lengths: list[int] | None = None) -> None:
    store.append(torch.randn(store.layers, store.streams, count, DIM), lengths)


def check(store: MemoryStore, tokens: list[Tensor]) -> None:
    """The scores of every layer are those that scoring all rows at once gives, bit for bit."""
    found = [store.layer(layer).scores(token, **HOW) for layer, token in enumerate(tokens)]
    for layer, (given, token) in enumerate(zip(found, tokens, strict=True)):
        with MemoryStore.open(store.path, commit=store.commits()[-1]) as other:
            rows, mask = other.rows(layer)
        assert torch.equal(given, row_scores(rows, token, **HOW).masked_fill(~mask[:, None], 0))


def loaded(layer: MemoryLayer) -> list[bool]:
    return [getattr(rows, "loaded", True) for rows in layer._streams]


@pytest.fixture
def tokens() -> list[Tensor]:
    return [torch.randn(3, DIM), torch.randn(2, DIM)]


def test_another_process_reads_scores_instead_of_rows(
    tmp_path: Path, tokens: list[Tensor], scored: list[int]
) -> None:
    with create(tmp_path / "s") as store:
        append(store, 40, [40, 23])
        store.commit()
        check(store, tokens)
        store.commit()
    assert sorted(scored) == [23, 23, 40, 40]
    for mode in ("r", "r+"):
        scored.clear()
        with MemoryStore.open(tmp_path / "s", mode=mode) as store:
            check(store, tokens)
            assert sorted(scored) == [16] * 4  # the samples alone
            assert loaded(store.layer(0)) == loaded(store.layer(1)) == [False, False]
            indices = torch.tensor([[39, 0, -1], [3, 3, 22]])
            assert torch.equal(store.gather(1, indices), store.fork().gather(1, indices))


def test_reading_on_scores_only_new_rows(tmp_path: Path, tokens: list[Tensor], scored: list[int]) -> None:
    path = tmp_path / "s"
    with create(path, capacity=50) as store:
        append(store, 40)
        store.commit()
        check(store, tokens)
        store.commit()
    for step in range(6):
        scored.clear()
        with MemoryStore.open(path, mode="r+") as store:
            if step == 3:
                store.reset([1])
            append(store, 9, [9, 4])
            store.commit()
            check(store, tokens)
            assert not any(loaded(store.layer(0)))
            assert sum(scored) <= 2 * (16 + 9) + 2 * (16 + 4)
            assert store.commit() == store.commits()[-1]


def test_rows_that_are_not_scored_yet(tmp_path: Path, tokens: list[Tensor], scored: list[int]) -> None:
    path = tmp_path / "s"
    with create(path) as store:
        append(store, 30)
        store.commit()
        check(store, tokens)
        append(store, 5, [5, 0])
        store.commit()
    scored.clear()
    with MemoryStore.open(path) as store:
        check(store, tokens)
        assert sum(scored) == 2 * 5 + 4 * 16


def test_other_weights_score_all_rows_again_and_take_the_place(
    tmp_path: Path, tokens: list[Tensor], scored: list[int]
) -> None:
    path = tmp_path / "s"
    with create(path, keep_commits=2) as store:
        append(store, 30)
        store.commit()
        check(store, tokens)
        store.commit()
    stale = sorted(folder.name for folder in (path / "scores").glob("layer-*"))
    others = [tokens[0] + 1, tokens[1]]
    with MemoryStore.open(path, mode="r+") as store:
        scored.clear()
        check(store, others)
        assert sorted(scored) == [16, 16, 30, 30]
        for _ in range(3):
            store.commit()
    now = sorted(folder.name for folder in (path / "scores").glob("layer-*"))
    assert now[1] == stale[1]
    assert now[0] != stale[0]
    scored.clear()
    with MemoryStore.open(path) as store:
        check(store, others)
    assert sorted(scored) == [16] * 4


def test_an_earlier_commit_keeps_its_scores(tmp_path: Path, tokens: list[Tensor], scored: list[int]) -> None:
    path = tmp_path / "s"
    with create(path) as store:
        append(store, 30)
        store.commit()
        check(store, tokens)
        early = store.commit()
        append(store, 10)
        store.commit()
        check(store, [token + 1 for token in tokens])
        store.commit()
    scored.clear()
    with MemoryStore.open(path, mode="r+", commit=early) as store:  # rolls back
        check(store, tokens)
        assert sorted(scored) == [16] * 4
        append(store, 7)
        store.commit()
        check(store, tokens)
        store.commit()
    scored.clear()
    with MemoryStore.open(path) as store:
        check(store, tokens)
    assert sorted(scored) == [16] * 4


def test_scores_that_another_machine_would_not_compute_are_not_used(
    tmp_path: Path, tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    with create(path) as store:
        append(store, 30)
        store.commit()
        with monkeypatch.context() as patch:
            patch.setattr(scores, "row_scores", lambda *rows, **how: row_scores(*rows, **how) * (1 + 1e-6))
            for layer, token in enumerate(tokens):
                store.layer(layer).scores(token, **HOW)
        store.commit()
    with MemoryStore.open(path) as store:
        check(store, tokens)


def harm_scores(folder: Path, harm: str) -> None:
    """Damages the scores of stream 1 in a folder of scores."""
    file = folder / "layer-0.stream-1.rows" / "c.1.0"
    if harm == "flip":
        data = bytearray(file.read_bytes())
        data[17] ^= 4
        file.write_bytes(data)
    elif harm == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "delete a file":
        file.unlink()
    elif harm == "metadata":
        (file.parent / "zarr.json").write_text("{}")
    elif harm == "delete an array":
        shutil.rmtree(file.parent)
    else:
        shutil.rmtree(folder)


def told(harm: str) -> AbstractContextManager[object]:
    """A warning is expected of all harms but one: what somebody has removed as a whole is not damaged."""
    if harm == "delete the folder":
        return nullcontext()
    return pytest.warns(UserWarning, match="the scores are computed anew: .*layer-1")


HARMS = ["flip", "truncate", "delete a file", "metadata", "delete an array", "delete the folder"]


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_scores_are_computed_anew(tmp_path: Path, tokens: list[Tensor], harm: str) -> None:
    path = tmp_path / "s"
    with create(path) as store:
        append(store, 40)
        store.commit()
        check(store, tokens)
        store.commit()
    [folder] = (path / "scores").glob("layer-1.*")
    harm_scores(folder, harm)
    with MemoryStore.open(path) as store:
        store.layer(0).scores(tokens[0], **HOW)
        with told(harm):
            store.layer(1).scores(tokens[1], **HOW)
        check(store, tokens)


@pytest.mark.parametrize("harm", HARMS)
def test_a_writer_goes_on_over_damaged_scores_and_mends_them(
    tmp_path: Path, tokens: list[Tensor], scored: list[int], harm: str
) -> None:
    path = tmp_path / "s"
    with create(path) as store:
        append(store, 40)
        for layer, token in enumerate(tokens):
            store.layer(layer).scores(token, **HOW)
        store.commit()
    [folder] = (path / "scores").glob("layer-1.*")
    harm_scores(folder, harm)
    with MemoryStore.open(path, mode="r+") as store:
        store.layer(0).scores(tokens[0], **HOW)
        with told(harm):
            store.layer(1).scores(tokens[1], **HOW)
        append(store, 7, [7, 3])
        store.commit()
        check(store, tokens)
        store.commit()
    scored.clear()
    with MemoryStore.open(path) as store:
        check(store, tokens)
    assert sorted(scored) == [16] * 4


@pytest.mark.parametrize("others", [False, True])
def test_scores_that_the_writer_has_dropped_itself_are_no_damage(
    tmp_path: Path, tokens: list[Tensor], others: bool
) -> None:
    path = tmp_path / "s"
    states = torch.randn(1, 2, 40, DIM)
    with create(path, layers=1, keep_commits=1) as store:
        store.append(states)
        store.layer(0).scores(tokens[0], **HOW)
        store.commit()
    with MemoryStore.open(path, mode="r+") as store:
        layer = store.layer(0)
        store.reset([0, 1])
        append(store, 40)
        store.layer(0).scores(tokens[0] + others, **HOW)
        store.commit()
        # A warning here is an error.
        assert torch.equal(layer.scores(tokens[0], **HOW), row_scores(states[0], tokens[0], **HOW))


def test_scores_that_a_writer_drops_while_they_are_read_are_no_damage(
    tmp_path: Path, tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    with create(path, layers=1, keep_commits=1) as store:
        append(store, 40)
        store.layer(0).scores(tokens[0], **HOW)
        store.commit()
        expected = store.layer(0).scores(tokens[0], **HOW)
        with MemoryStore.open(path) as reader:
            real = ChunkFiles.check_present

            def check_present(files: ChunkFiles, *arguments: Any) -> None:
                real(files, *arguments)
                if files.root.parent.name == "scores":
                    store.layer(0).scores(tokens[1], **HOW)
                    store.commit()

            monkeypatch.setattr(ChunkFiles, "check_present", check_present)
            assert torch.equal(reader.layer(0).scores(tokens[0], **HOW), expected)


def test_scores_of_another_layer_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    tokens = torch.randn(2, 2, DIM)
    with create(path) as store:
        append(store, 20)
        for layer in range(2):
            store.layer(layer).scores(tokens[layer], **HOW)
        store.commit()
    [first] = (path / "scores").glob("layer-0.*")
    [second] = (path / "scores").glob("layer-1.*")
    shutil.rmtree(second)
    shutil.copytree(first, second)
    with MemoryStore.open(path) as store, pytest.warns(UserWarning, match="the scores are computed anew"):
        check(store, [*tokens])


def test_a_copy_and_a_fork_have_the_scores(tmp_path: Path, tokens: list[Tensor], scored: list[int]) -> None:
    store = MemoryStore.create(layers=2, streams=2, dim=DIM)
    append(store, 20, [20, 0])
    for layer, token in enumerate(tokens):
        store.layer(layer).scores(token, **HOW)
    store.copy_to(tmp_path / "copy", durable=True)
    scored.clear()
    with MemoryStore.open(tmp_path / "copy") as copy:
        check(copy, tokens)
        fork = copy.fork()
        append(fork, 3)
        assert torch.equal(
            fork.layer(0).scores(tokens[0], **HOW)[..., :20][0], copy.layer(0).scores(tokens[0], **HOW)[0]
        )


def test_a_writer_killed_while_it_drops_scores_leaves_none_of_them(
    tmp_path: Path, tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    with create(path, layers=1, keep_commits=1) as store:
        append(store, 20)
        store.layer(0).scores(tokens[0], **HOW)
        store.commit(durable=True)
        store.layer(0).scores(tokens[1], **HOW)
        with monkeypatch.context() as patch:
            # As far as a killed process comes: one file is gone, and the rest is there.
            patch.setattr(shutil, "rmtree", lambda folder: next(folder.glob("layer-*/zarr.json")).unlink())
            store.commit(durable=True)
    with MemoryStore.open(path, mode="r+") as store:
        store.layer(0).scores(tokens[0], **HOW)
        store.commit(durable=True)
        check(store, tokens[:1])
    assert len([*(path / "scores").glob("*layer-*")]) == len([*(path / "scores").iterdir()]) - 1 == 1


def test_a_writer_killed_while_it_makes_the_folder_of_the_scores_leaves_one_that_zarr_reads(
    tmp_path: Path, tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    with create(path, layers=1) as store:
        append(store, 20)
        store.layer(0).scores(tokens[0], **HOW)
        with monkeypatch.context() as patch:
            # As far as a killed process comes: no file in the folder is written to.
            patch.setattr(Path, "write_bytes", raising)
            patch.setattr(os, "pwrite", raising)
            with pytest.raises(KeyboardInterrupt):
                store.commit()
    assert (path / "scores").exists()
    with MemoryStore.open(path, mode="r+") as store:
        append(store, 20)
        store.layer(0).scores(tokens[0], **HOW)
        store.commit()
    assert len([*zarr.open_group(path / "scores", mode="r").groups()]) == 1


def raising(*arguments: object) -> bytes:
    raise KeyboardInterrupt


def test_streams_with_tokens_of_their_own_keep_nothing(tmp_path: Path) -> None:
    with create(tmp_path / "s", layers=1) as store:
        append(store, 20)
        store.layer(0).scores(torch.randn(2, 3, DIM), **HOW)
        store.commit()
        record = max((tmp_path / "s" / "commits").glob("0*.json"))
        assert "scores" not in json.loads(record.read_text())


def test_zarr_reads_them(tmp_path: Path, tokens: list[Tensor]) -> None:
    path = tmp_path / "s"
    with create(path) as store:
        append(store, 20)
        expected = store.layer(0).scores(tokens[0], **HOW)
        store.commit()
    [folder] = (path / "scores").glob("layer-0.*")
    group = zarr.open_group(path, mode="r")
    found = group[f"scores/{folder.name}/layer-0.stream-1.rows"][:20]
    assert torch.equal(torch.from_numpy(found).T, expected[1])


def rewrite(path: Path, commit: str, change: dict[str, Any]) -> None:
    """Changes what a record says of the scores of layer 0, with the checksum that belongs to it."""
    document = json.loads(record_path(path, commit).read_text())
    document["scores"][0] |= change
    del document["crc32c"]
    crc = checksum(document)
    record_path(path, commit).unlink()
    record_path(path, f"{commit[:12]}-{crc}").write_text(json.dumps(document | {"crc32c": crc}))


def test_more_columns_than_there_are_tokens_are_not_read(tmp_path: Path, tokens: list[Tensor]) -> None:
    path = tmp_path / "s"
    with create(path, layers=1) as store:
        append(store, 20)
        store.layer(0).scores(tokens[0], **HOW)
        last = store.commit()
    rewrite(path, last, {"columns": 1 << 16})
    with (
        MemoryStore.open(path) as store,
        pytest.warns(UserWarning, match="the scores are computed anew: .*expected a chunk file of"),
    ):
        check(store, tokens[:1])


@pytest.mark.parametrize(
    "change",
    [
        {"stamp": "x" * 32},
        {"columns": 0},
        {"columns": True},
        {"spans": [[0, 20]]},
        {"spans": [[0, 21], [0, 20]]},
        {"spans": [[5, 4], [0, 20]]},
    ],
    ids=str,
)
def test_impossible_records_are_refused(tmp_path: Path, tokens: list[Tensor], change: dict[str, Any]) -> None:
    path = tmp_path / "s"
    with create(path, layers=1) as store:
        append(store, 20)
        store.layer(0).scores(tokens[0], **HOW)
        last = store.commit()
    rewrite(path, last, change)
    with pytest.raises(CorruptionError, match="expected a commit record, got another document"):
        MemoryStore.open(path)
