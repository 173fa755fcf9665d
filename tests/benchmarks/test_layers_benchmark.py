"""benchmarks/layers.py at a tiny size on the CPU: what it writes, and that nothing unchecked is printed."""

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

Load = Callable[[str], ModuleType]


def rows_of(path: Path) -> list[dict[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def test_table_and_csv(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load("layers").main(["--tiny", "--device", "cpu", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for dtype in ("float32", "bfloat16"):
        assert f"autoregressive, 2 x 50 x 16, {dtype}, forward" in printed
    ours = [row for row in rows_of(tmp_path / "layers.csv") if row["subject"] != "colt5 0.11.2"]
    assert len(ours) == 12
    assert {row["subject"] for row in ours} == {"xlroute", "reference", "dense"}
    assert all(float(row["median_ms"]) > 0 and row["checks"] and not row["failure"] for row in ours)


def test_a_red_check_prints_the_error_instead_of_a_speed(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = load("layers")
    right = layers.run

    def wrong(layer: Any, x: torch.Tensor) -> torch.Tensor:
        return right(layer, x) * (1.1 if x.dtype != torch.float64 else 1.0)

    monkeypatch.setattr(layers, "run", wrong)
    assert layers.main(["--tiny", "--device", "cpu", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    line = next(
        line for line in printed.splitlines() if line.startswith("autoregressive, 2 x 50 x 16, float32")
    )
    assert line.split("forward")[1].split()[0] == "error"
    assert not any(
        row["median_ms"]
        for row in rows_of(tmp_path / "layers.csv")
        if row["work"].endswith("forward") and row["subject"] != "colt5 0.11.2"
    )


def test_dense_attention_is_the_formula(load: Load) -> None:
    dense = load("layers").DenseSelfAttention(12, 3, 4).double()
    x = torch.randn(2, 9, 12).double()
    q, k, v = dense.to_qkv(dense.norm(x)).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    logits = (q @ k.mT / 2).masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
    expected = dense.to_out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(dense(x), expected)


def test_refused_options(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load("layers").main(["--device", "cpu"])
    assert stopped.value.code == 2
    assert "--tiny: expected on a CPU" in capsys.readouterr().err
