"""benchmarks/index.py at a tiny size: what it writes, and that nothing unchecked is printed."""

import csv
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from xlroute import RoutedTransformerXL

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module as the script has it, timing each call but twice."""
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(importlib.import_module("timing"), "REPEATS", (2, 2))
    yield importlib.import_module("index")
    for name in names & (set(sys.modules) - before):
        del sys.modules[name]


def cells(printed: str) -> dict[str, list[str]]:
    """The cells of each line of the table, by the search that it begins with."""
    lines = printed.split("---\n")[1].split("\n\n")[0].splitlines()
    return {line[:13].strip(): line[13:].split() for line in lines}


def test_table_and_csv(benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss")
    threads = torch.get_num_threads()
    assert benchmark.main(["--tiny", "--out", str(tmp_path), "--nprobe", "1000"]) == 0
    assert torch.get_num_threads() == threads
    lines = cells(capsys.readouterr().out)
    assert list(lines) == ["plain PyTorch", "exact", "flat", "ivf", "ivfpq"]
    for name, line in lines.items():
        recall, queries = float(line[0]), float(line[1].replace(",", ""))
        assert recall == 1.0 if name != "ivfpq" else 0.5 < recall <= 1.0
        assert queries > 0
    text = (tmp_path / "index.csv").read_text(encoding="utf-8").splitlines()
    facts = [line for line in text if line.startswith("# ")]
    assert "# rows: 6,000 x 32 float32, synthetic, clustered" in facts
    rows = list(csv.DictReader(text[len(facts) :]))
    assert [row["search"] for row in rows] == list(lines)
    assert [row["x_exact"] for row in rows if row["search"] == "exact"] == ["1"]
    certain = [float(row["x_fastest_exact"]) for row in rows if row["search"] in benchmark.EXACT]
    assert (len(certain), max(certain)) == (3, 1.0)
    assert all(row["checks"] and not row["failure"] for row in rows)


PEER = """
import torch

class KNNMemory:
    def __init__(self, dim, max_memories, num_indices, memmap_filename, multiprocessing):
        assert (num_indices, multiprocessing) == (1, False)
        self.rows, self.room = torch.empty(1, 0, 2, dim), max_memories

    def add(self, memories):
        self.rows = torch.cat((self.rows, memories), 1)
        assert self.rows.shape[1] <= self.room, "no room"

    def search(self, queries, topk):
        {search}
        found = (queries @ self.rows[..., 0, :].mT).topk(topk, -1).indices
        mask = torch.arange(topk).expand(found.shape) < topk - {fewer}
        return self.rows[0, found].masked_fill(~mask[..., None, None], 0), mask
"""


@pytest.mark.parametrize(
    ("search", "fewer", "recall", "message"),
    [
        ("", 0, "1.0000", ""),
        ("", 16, "0.7500", ""),
        ("self.rows = self.rows.roll(1, 2)", 0, "failed", "KNNMemory: scores: error"),
        ("raise IndexError('out of\\\\nthe graph')", 0, "failed", "KNNMemory: IndexError: out of"),
    ],
    ids=["right", "fewer", "wrong", "broken"],
)
def test_a_peer_is_measured_beside_the_others(
    benchmark: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    search: str,
    fewer: int,
    recall: str,
    message: str,
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "memorizing_transformers_pytorch", raising=False)
    monkeypatch.setattr(benchmark, "ROWS_AT_ONCE", 700)
    (tmp_path / "memorizing_transformers_pytorch.py").write_text(PEER.format(search=search, fewer=fewer))
    arguments = ["--tiny", "--out", str(tmp_path), "--kinds", "exact", "--peer", str(tmp_path)]
    assert benchmark.main(arguments) == (1 if message else 0)
    printed = capsys.readouterr().out
    line = cells(printed)["KNNMemory"]
    assert line[0] == recall
    assert (line[1] == "-") is bool(message)
    assert message in printed
    text = (tmp_path / "index.csv").read_text(encoding="utf-8").splitlines()
    rows = [*csv.DictReader(each for each in text if not each.startswith("#"))]
    assert [row["search"] for row in rows] == ["plain PyTorch", "exact", "KNNMemory"]
    assert bool(rows[-1]["median_ms"]) is not bool(message)
    sys.modules.pop("memorizing_transformers_pytorch")


def test_a_red_check_prints_no_speed(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = benchmark.MemoryIndex.search

    def wrong(*arguments: Any) -> Any:
        scores, indices = right(*arguments)
        return scores * 1.01, indices

    monkeypatch.setattr(benchmark.MemoryIndex, "search", wrong)
    assert benchmark.main(["--tiny", "--out", str(tmp_path), "--kinds", "exact"]) == 1
    printed = capsys.readouterr().out
    lines = cells(printed)
    assert lines["exact"][:2] == ["failed", "-"]
    assert float(lines["plain PyTorch"][0]) == 1.0
    assert "exact: scores: error 1.0e-02 against float64" in printed


def test_rows_of_a_file_become_rows_and_queries(benchmark: ModuleType, tmp_path: Path) -> None:
    rows = np.random.default_rng().normal(size=(500, 6)).astype(np.float16)
    np.save(tmp_path / "rows.npy", rows)
    options = benchmark.parse(["--tiny", "--rows", str(tmp_path / "rows.npy")])
    kept, queries = benchmark.inputs(options)
    assert (kept.shape, queries.shape, kept.dtype) == ((480, 6), (20, 6), torch.float32)
    both = torch.cat([kept, queries])
    assert sorted(both.tolist()) == sorted(rows.astype(np.float32).tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "nowhere.npy"], "--rows: expected a file, got nowhere.npy"),
        (["--peer", "nowhere"], "--peer: expected a folder, got nowhere"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--nprobe", "-1"], "--nprobe: expected at least 1, got -1"),
    ],
)
def test_refused_options(
    arguments: list[str], message: str, benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_hidden_states_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    model = RoutedTransformerXL(
        vocab_size=256,
        dim=16,
        depth=2,
        heads=2,
        dim_head=8,
        mem_len=8,
        memory_layers=(2,),
        num_tokens_kv=4,
        segment_len=8,
    )
    model.save_pretrained(tmp_path / "model")
    for number in range(2):
        (tmp_path / f"{number}.txt").write_bytes(bytes(np.random.randint(256, size=70, dtype=np.uint8)))
    states = importlib.import_module("hidden_states")
    arguments = [str(tmp_path / "model"), str(tmp_path), str(tmp_path / "x.npy"), "--device", "cpu"]
    assert states.main([*arguments, "--rows", "101"]) == 0
    rows = np.load(tmp_path / "x.npy")
    assert (rows.shape, rows.dtype) == ((101, 16), np.float32)
    np.testing.assert_allclose((rows**2).mean(-1), 1, rtol=1e-2)
    assert len(np.unique(rows, axis=0)) > 50
    with pytest.raises(SystemExit):
        states.main([*arguments, "--rows", "1000"])
