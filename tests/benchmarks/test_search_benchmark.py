"""benchmarks/search.py at a tiny size on the CPU: what it writes, and that nothing unchecked is printed."""

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

Load = Callable[[str], ModuleType]
TINY = ["--tiny", "--device", "cpu"]
ROWS = ("20 queries, 3,000 keys of 16, k = 4", "1 queries, 3,000 keys of 16, k = 4")


def rows_of(path: Path) -> list[dict[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def test_table_and_csv(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss")
    assert load("search").main([*TINY, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for row in ROWS:
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{row} "))
        assert float(line.removeprefix(row).split()[0]) > 0
    rows = rows_of(tmp_path / "search.csv")
    subjects = ["xlroute", "reference", "matmul + topk", "product alone", "faiss CPU"]
    assert [row["subject"] for row in rows] == 2 * subjects
    assert all(float(row["median_ms"]) > 0 and row["checks"] and not row["failure"] for row in rows)


@pytest.mark.parametrize("broken", ["second", "twice", "scores"])
def test_a_red_check_prints_the_error_instead_of_a_speed(
    broken: str,
    load: Load,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    benchmark = load("search")
    right = benchmark.search_topk

    def wrong(queries: Tensor, keys: Tensor, k: int, backend: Any) -> tuple[Tensor, Tensor]:
        scores, indices = right(queries, keys, k + 1, backend=backend)
        if broken == "second":  # all but the best
            scores, indices = scores[..., 1:], indices[..., 1:]
        elif broken == "twice":
            scores, indices = (t[..., [0, 0, *range(2, k)]] for t in (scores, indices))
        else:
            scores, indices = scores[..., :k] * 1.01, indices[..., :k]
        return scores, indices

    monkeypatch.setattr(benchmark, "search_topk", wrong)
    monkeypatch.setattr(benchmark, "TINY", benchmark.TINY[:1])
    assert benchmark.main([*TINY, "--out", str(tmp_path)]) == 1
    assert f"{ROWS[0]}, xlroute: " in capsys.readouterr().out
    for row in rows_of(tmp_path / "search.csv"):
        ours = row["subject"] in ("xlroute", "reference")
        assert bool(row["failure"]) is ours
        assert bool(row["median_ms"]) is not ours


def test_blocks_of_keys(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load("search")
    monkeypatch.setattr(benchmark, "SCORES_AT_ONCE", 35)
    monkeypatch.setattr(benchmark, "EXACT_AT_ONCE", 35)
    queries, keys = torch.randn(3, 8), torch.randn(100, 8)
    scores, indices = (queries @ keys.T).topk(6)
    found = benchmark.plain_search(queries, keys, 6)
    torch.testing.assert_close(found, (scores, indices))
    torch.testing.assert_close(benchmark.exact_best(queries, keys, 6), scores.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(benchmark.product(queries, keys), queries @ keys[99:].T)


def test_refused_options(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load("search").main(["--device", "cpu"])
    assert stopped.value.code == 2
    assert "--tiny: expected on a CPU" in capsys.readouterr().err
