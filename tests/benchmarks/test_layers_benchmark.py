"""benchmarks/layers.py at a tiny size on the CPU: what it writes, and that nothing unchecked is printed."""

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

Load = Callable[[str], ModuleType]
PEER = "colt5 0.11.2"


def rows_of(path: Path) -> list[dict[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def run(load: Load, out: Path, *arguments: str) -> int:
    code: int = load("layers").main(["--tiny", "--device", "cpu", "--out", str(out), *arguments])
    return code


def test_table_and_csv(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(load, tmp_path) == 0
    printed = capsys.readouterr().out
    names = [
        "autoregressive, 2 x 50 x 16",
        "block, 2 x 60 x 16",
        "feedforward, 2 x 60 x 16",
        "image, 1 x 8 x 12 x 8",
    ]
    works = [f"{name}, {dtype}, forward" for name in names for dtype in ("float32", "bfloat16")]
    works += [f"block, 1 x {n} x 16, bfloat16, forward + backward" for n in (20, 30)]
    for work in works:
        assert work in printed
    ours = [row for row in rows_of(tmp_path / "layers.csv") if row["subject"] != PEER]
    # Forward, and forward with backward, of two dtypes: three subjects, or four where a floor is measured.
    assert len(ours) == 2 * 2 * (3 + 3 + 4 + 4) + 2 * 3
    assert all(float(row["median_ms"]) > 0 and row["checks"] and not row["failure"] for row in ours)
    for row in ours:
        floor = {"feedforward": "matrix products", "image": "light branch"}.get(row["work"].split(",")[0])
        beside = [each for each in ours if each["work"] == row["work"] and each["subject"] == floor]
        assert [row["floor_ms"]] == ([each["median_ms"] for each in beside] if floor else [""])


def test_a_red_check_prints_the_error_instead_of_a_speed(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    contest = load("layers_contest")
    right = contest.run

    def wrong(layer: Any, x: torch.Tensor) -> Any:
        out, gradients = right(layer, x)
        return out * 1.1, gradients

    monkeypatch.setattr(contest, "run", wrong)
    assert run(load, tmp_path, "--only", "image") == 1
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("image, 1 x 8 x 12 x 8, float32"))
    assert line.split("forward")[1].split()[0] == "error"
    rows = [row for row in rows_of(tmp_path / "layers.csv") if row["subject"] != PEER]
    assert {row["subject"] for row in rows} == {"xlroute", "reference", "dense", "light branch"}
    assert all(bool(row["median_ms"]) == row["work"].endswith("backward") for row in rows)


def test_a_wrong_gradient_is_seen(load: Load) -> None:
    contest = load("layers_contest")
    x, cotangent = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    layer = nn.Linear(8, 8)
    ours, _ = contest.routed(lambda use_triton: layer.float(), x, cotangent)
    layer.float()
    out, gradients = ours.both()
    assert all(check.passed for check in ours.verify((out, gradients)))
    gradients["bias"] *= 1.01
    assert [check.what for check in ours.verify((out, gradients)) if not check.passed] == ["gradient to bias"]


@pytest.mark.parametrize("causal", [True, False])
def test_dense_attention_is_the_formula(load: Load, causal: bool) -> None:
    dense = load("layers_dense").DenseSelfAttention(12, 3, 4, causal=causal).double()
    x = torch.randn(2, 9, 12).double()
    q, k, v = dense.to_qkv(dense.norm(x)).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    logits = q @ k.mT / 2
    if causal:
        logits = logits.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
    expected = dense.to_out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(dense(x), expected)
    torch.testing.assert_close(dense.last(x, 4), expected[:, -4:])


def test_the_last_tokens_of_a_dense_block(load: Load) -> None:
    block = load("layers_dense").DenseBlock(12, 3, 4, mult=2).double()
    x = torch.randn(2, 9, 12).double()
    torch.testing.assert_close(block.last(x, 4), block(x)[:, -4:])


def test_the_matrix_products_are_those_of_the_layer(load: Load) -> None:
    """They count the multiply-adds of a feedforward of so many tokens, and of so many routed ones."""
    contest, work = load("layers_contest"), load("layers_work")
    layer = work.builder(work.ConditionalRoutedFeedForward, {"dim": 16, "num_heavy_tokens": 5})(None)
    x, cotangent = torch.randn(2, 20, 16, requires_grad=True), torch.randn(2, 20, 16)
    products = contest.matrix_products(layer, x.detach(), cotangent, 5)
    for call, of_layer in (
        (products.forward, lambda: contest.run(layer, x)),
        (products.both, lambda: layer(x).backward(cotangent)),
    ):
        with FlopCounterMode(display=False) as counted:
            call()
        with FlopCounterMode(display=False) as whole:
            of_layer()
        ops = (torch.ops.aten.addmm, torch.ops.aten.mm)  # the router's scores are neither
        of_linear = sum(whole.get_flop_counts()["Global"].get(op, 0) for op in ops)
        assert counted.get_total_flops() == of_linear


def test_the_margin_keeps_scores_apart_and_changes_nothing_else(load: Load) -> None:
    work = load("layers_work")
    options = {"dim": 16, "light_window_size": 8, **work.heads(work.TINY)}
    for name in ("attn_tokens_q", "attn_tokens_kv", "ff_tokens"):
        options[f"num_heavy_{name}"] = 40
    block = work.builder(work.ConditionalRoutedTransformerBlock, options)(False).double()
    x = torch.randn(2, 400, 16).double()
    apart = work.keep_apart(block, x, 40)
    scores = block.conditional_ff.router.scores(apart + block.conditional_attn(apart))[:, 0]
    best = scores.topk(41).values
    assert (best[:, 39] - best[:, 40] > work.MARGIN).all()
    assert ((apart - x).norm(dim=-1) > 0).sum() < 80


def test_refused_options(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load("layers").main(["--device", "cpu"])
    assert stopped.value.code == 2
    assert "--tiny: expected on a CPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        load("layers").main(["--tiny", "--only", "blocks"])
    assert "--only: invalid choice: 'blocks'" in capsys.readouterr().err
