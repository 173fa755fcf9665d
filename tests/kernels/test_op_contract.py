"""What all ops share: registration, torch.compile, autocast, and the checks of their arguments."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import xlroute.kernels
from xlroute.kernels import (
    bias_gelu,
    coordinate_descent,
    gather_rows,
    norm_beside,
    row_places,
    row_scores,
    soft_topk,
    top_indices,
)
from xlroute.kernels.arguments import HAS_TRITON


def descend(s: Tensor, k: float | Tensor, mask: Tensor | None = None) -> Tensor:
    return coordinate_descent(s, k=k, n_iters=4, eps=0.1, eps_init=1.0, eps_decay=0.7, mask=mask)


def exact(s: Tensor, k: float | Tensor, mask: Tensor | None = None) -> Tensor:
    return soft_topk(s, k=k, mask=mask)


SOLVERS = [pytest.param(descend, id="coordinate_descent"), pytest.param(exact, id="soft_topk")]


def test_public_names() -> None:
    for name in xlroute.kernels.__all__:
        assert callable(getattr(xlroute.kernels, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck_coordinate_descent(dtype: torch.dtype) -> None:
    op = torch.ops.xlroute.coordinate_descent.default
    s = torch.randn(2, 3, 9, dtype=dtype, requires_grad=True)
    k = torch.rand(2, 3, dtype=torch.float64).add_(1.0).requires_grad_()
    torch.library.opcheck(op, (s, k, torch.rand(9) < 0.7, 3, 0.1, 1.0, 0.5, "torch"))
    budget = torch.ones(1, 1).double().expand(9, 3)
    torch.library.opcheck(op, (s.detach().transpose(0, 2), budget, None, 1, 0.1, 0.1, 1.0, "torch"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck_soft_topk(dtype: torch.dtype) -> None:
    op = torch.ops.xlroute.soft_topk.default
    s = torch.randn(2, 3, 9, dtype=dtype, requires_grad=True)
    k = torch.rand(2, 3, dtype=torch.float64).add_(1.0).requires_grad_()
    torch.library.opcheck(op, (s, k, 0.0, torch.rand(9) < 0.7, 0.1, None, 2, "torch"))
    budgets = torch.ones(1, 1).double().expand(9, 3)
    torch.library.opcheck(op, (s.detach().transpose(0, 2), budgets, 0.0, None, 0.1, 1, 0, "torch"))
    torch.library.opcheck(op, (s, None, 1.5, None, 0.1, 2, 0, "torch"))


def test_opcheck_top_indices() -> None:
    op = torch.ops.xlroute.top_indices.default
    s = torch.randn(2, 3, 9, requires_grad=True)
    torch.library.opcheck(op, (s, 4, torch.rand(9) < 0.7, "torch"))
    torch.library.opcheck(op, (s.detach().bfloat16().transpose(0, 2), 1, None, "torch"))


def test_opcheck_search_topk() -> None:
    op = torch.ops.xlroute.search_topk.default
    queries, keys = torch.randn(2, 3, 4), torch.randn(2, 9, 4)
    torch.library.opcheck(op, (queries, keys, 5, torch.rand(2, 9) < 0.7, "torch"))
    torch.library.opcheck(op, (queries.bfloat16(), keys.bfloat16()[:, ::2], 1, None, "torch"))


@pytest.mark.parametrize("normalize", ["rms", "l2", None])
def test_opcheck_row_scores(normalize: str | None) -> None:
    op = torch.ops.xlroute.row_scores.default
    rows = torch.randn(2, 7, 5, requires_grad=True)
    tokens = torch.randn(2, 3, 5, requires_grad=True)
    torch.library.opcheck(op, (rows, tokens, normalize, 0.5, "torch"))
    torch.library.opcheck(op, (rows.detach().bfloat16()[:, ::2], tokens, normalize, 0.5, "torch"))
    torch.library.opcheck(op, (rows, tokens.detach(), normalize, 0.5, "torch"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_gather_and_scatter(dtype: torch.dtype) -> None:
    ops = torch.ops.xlroute
    x = torch.randn(2, 6, 5, dtype=dtype, requires_grad=True)
    gates = torch.rand(2, 2, 6, requires_grad=True)
    indices = torch.randint(-1, 6, (2, 2, 3))
    torch.library.opcheck(ops.gather_rows.default, (x, gates, indices, False, "torch"))
    torch.library.opcheck(
        ops.gather_rows.default, (x.detach()[:, ::2, 1:], None, indices % 3, False, "torch")
    )
    streams = [torch.randn(m, 5, dtype=dtype) for m in (3, 6)]
    torch.library.opcheck(ops.gather_rows_apart.default, (streams, indices % 3, "torch"))
    if HAS_TRITON:
        # In Triton alone, which takes tensors of a CPU in its interpreter.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        streams = [torch.randn(m, 8, dtype=dtype, device=device) for m in (3, 6)]
        places = row_places([x.data_ptr() for x in streams], [3, 6], streams[0].device)
        assert places is not None
        where = (torch.tensor(places, device=device), torch.tensor([3, 6], device=device))
        for chosen in (indices % 3, indices[..., :0], indices.transpose(1, 2) % 3):
            arguments = (*where, chosen.to(device), 8, dtype)
            torch.library.opcheck(ops.gather_rows_at.default, arguments)
    rows = torch.randn(2, 3, 5, dtype=dtype, requires_grad=True)
    places = torch.tensor([[4, -1, 0], [5, 3, -1]])
    torch.library.opcheck(ops.gather_rows_backward.default, (rows, places, 6, "torch"))
    torch.library.opcheck(ops.scatter_rows.default, (x, rows, None, places, None, None, False, 0, "torch"))
    torch.library.opcheck(
        ops.scatter_rows.default,
        (x.detach()[:1].expand(2, 6, 5), None, None, places, None, None, False, 0, "torch"),
    )


@pytest.mark.parametrize("solve", SOLVERS)
def test_no_second_derivative(solve: Callable[..., Tensor]) -> None:
    s = torch.randn(2, 9, requires_grad=True)
    (first,) = torch.autograd.grad(solve(s, 3).square().sum(), s, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        first.sum().backward()


def route(rows: Tensor, tokens: Tensor, k: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """All ops in a row, as a router and the layers around it use them."""
    rows, normed = norm_beside(rows, weight)
    rows = rows + bias_gelu(normed, weight)
    scores = row_scores(rows, tokens, normalize="rms", scale=0.5)
    gates = soft_topk(scores, k=k, mask=mask) + descend(scores, 3, mask)
    indices = top_indices(scores, 4, mask)
    weights = gates.gather(-1, indices.clamp(min=0))
    return gather_rows(rows, indices) * weights[..., None]


def test_compiles_as_one_graph() -> None:
    inputs = (
        torch.randn(2, 11, 6, requires_grad=True),
        torch.randn(2, 3, 6, requires_grad=True),
        torch.full((2, 3), 2.5, requires_grad=True),
        torch.randn(6, requires_grad=True),
        torch.rand(2, 1, 11) < 0.8,
    )
    expected = route(*inputs)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs[:4], cotangent)
    given = torch.compile(route, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(given, expected)
    torch.testing.assert_close(torch.autograd.grad(given, inputs[:4], cotangent), wanted)


# PyTorch 2.13's inductor warns of a decorator that it uses itself.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_compiles_with_inductor() -> None:
    rows, tokens = torch.randn(2, 11, 6), torch.randn(2, 3, 6, requires_grad=True)

    def gates(rows: Tensor, tokens: Tensor) -> Tensor:
        scores = row_scores(rows, tokens, normalize="rms")
        return soft_topk(scores, k=3) * descend(scores, 3)

    expected = gates(rows, tokens)
    cotangent = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, tokens, cotangent)
    given = torch.compile(gates, fullgraph=True, backend="inductor")(rows, tokens)
    torch.testing.assert_close(given, expected)
    torch.testing.assert_close(torch.autograd.grad(given, tokens, cotangent)[0], wanted)


@pytest.mark.parametrize("solve", SOLVERS)
def test_compiles_for_changing_sizes_and_budgets(solve: Callable[..., Tensor]) -> None:
    compiled = torch.compile(solve, fullgraph=True, backend="aot_eager")
    for n, k in ((9, 2), (12, 3), (15, 4), (15, 4.5), (15, 5.5)):
        s = torch.randn(2, n)
        assert torch.equal(compiled(s, k), solve(s, k))


def test_compiled_rows_may_be_a_view_of_a_buffer() -> None:
    buffer = torch.randn(2, 10, 4)
    tokens = torch.randn(2, 4, requires_grad=True)

    def score(rows: Tensor, tokens: Tensor) -> Tensor:
        return row_scores(rows, tokens, normalize="l2")

    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    cotangent = torch.randn(2, 2, 7)
    scores = compiled(buffer[:, :7], tokens)
    expected = score(buffer[:, :7], tokens)
    assert torch.equal(scores, expected)
    torch.testing.assert_close(
        torch.autograd.grad(scores, tokens, cotangent), torch.autograd.grad(expected, tokens, cotangent)
    )


def test_autocast_changes_nothing() -> None:
    rows, tokens = torch.randn(2, 50, 16, requires_grad=True), torch.randn(2, 3, 16, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        scores = row_scores(rows, tokens, normalize="rms")
        gates = soft_topk(scores, k=4) + descend(scores, 4)
        return scores, gates, *torch.autograd.grad(gates.square().sum(), (rows, tokens))

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run()
    for ours, expected in zip(cast, plain, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float32, torch.float64], ids=str)
def test_budget_of_any_dtype(solve: Callable[..., Tensor], dtype: torch.dtype) -> None:
    s = torch.randn(3, 9)
    k = torch.tensor([1, 2, 5], dtype=dtype, requires_grad=dtype.is_floating_point)
    gates = solve(s, k)
    alone = [solve(row, int(budget)) for row, budget in zip(s, k, strict=True)]
    torch.testing.assert_close(gates, torch.stack(alone))
    if dtype.is_floating_point:
        (dk,) = torch.autograd.grad(gates.sum(), k)
        assert dk.dtype == dtype


@pytest.mark.parametrize("solve", SOLVERS)
def test_argument_errors(solve: Callable[..., Tensor]) -> None:
    s = torch.randn(2, 5)
    with pytest.raises(TypeError, match=r"s must be a floating-point tensor, got dtype torch.int64"):
        solve(s.long(), 2)
    with pytest.raises(TypeError, match=r"s must be a floating-point tensor, got list"):
        solve([1.0, 2.0], 2)
    with pytest.raises(ValueError, match=r"s must have shape \[\.\.\., n\]"):
        solve(torch.tensor(1.0), 1)
    with pytest.raises(TypeError, match=r"mask must be a bool tensor, got torch.float32"):
        solve(s, 2, torch.ones(2, 5))
    with pytest.raises(
        ValueError, match=r"mask must broadcast to the shape of s, \(2, 5\), got shape \(3, 5\)"
    ):
        solve(s, 2, torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask must broadcast .* got shape \(1, 2, 5\)"):
        solve(s, 2, torch.ones(1, 2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must be on the device of s, cpu, got meta"):
        solve(s, 2, torch.ones(2, 5, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match=r"k must broadcast to s.shape\[:-1\], \(2,\), got shape \(3,\)"):
        solve(s, torch.ones(3))
    with pytest.raises(ValueError, match="k must be on the device of s, cpu, got meta"):
        solve(s, torch.ones(2, device="meta"))
    with pytest.raises(TypeError, match="k must be a number or a real tensor, got str"):
        solve(s, "2")
    with pytest.raises(TypeError, match=r"k must be .* of dtype torch.bool"):
        solve(s, torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="k must be finite, got nan"):
        solve(s, math.nan)


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize("op", [partial(coordinate_descent, n_iters=1), soft_topk], ids=["descent", "exact"])
def test_backend_errors(op: Callable[..., Tensor]) -> None:
    s = torch.randn(2, 5)
    assert torch.equal(op(s, k=1, backend="torch"), op(s, k=1))
    with pytest.raises(ValueError, match="backend='triton' needs a CUDA tensor, got a tensor on cpu"):
        op(s, k=1, backend="triton")
    with pytest.raises(ValueError, match="backend must be None, 'torch' or 'triton', got 'jax'"):
        op(s, k=1, backend="jax")
    with pytest.raises(ValueError, match="eps must be a positive finite number, got -1"):
        op(s, k=1, eps=-1)
