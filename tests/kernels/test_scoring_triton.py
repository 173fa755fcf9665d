"""row_scores in Triton, against the reference and float64; in Triton's interpreter where there is no GPU."""

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from xlroute.kernels import row_scores, scoring_triton
from xlroute.kernels.scoring import L2_EPS, RMS_EPS, Normalize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORMALIZE: tuple[Normalize | None, ...] = ("rms", "l2", None)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture(autouse=True)
def _poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that an op forgets to write shows as NaN."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE).to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def formula(rows: Tensor, tokens: Tensor, normalize: Normalize | None, scale: float) -> Tensor:
    if normalize == "rms":
        rows = rows / (rows.square().mean(-1, keepdim=True) + RMS_EPS).sqrt()
    elif normalize == "l2":
        rows = rows / (rows.square().sum(-1, keepdim=True) + L2_EPS).sqrt()
    return scale * torch.einsum("...md,...rd->...rm", rows, tokens)


def score(rows: Tensor, tokens: Tensor, normalize: Normalize | None = "rms", scale: float = 0.3) -> Tensor:
    return row_scores(rows, tokens, normalize=normalize, scale=scale, backend="triton")


def with_gradients(scores: Tensor, rows: Tensor, tokens: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
    return scores, *torch.autograd.grad(scores, (rows, tokens), cotangent.to(scores.dtype))


def check(rows: Tensor, tokens: Tensor, normalize: Normalize | None, scale: float = 0.3) -> None:
    """Scores and both gradients err at most twice as much as plain PyTorch in the same dtype."""

    def leaves(dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        return tuple(x.detach().to(dtype or x.dtype).requires_grad_() for x in (rows, tokens))  # type: ignore[return-value]

    inputs = leaves()
    scores = score(*inputs, normalize, scale)
    cotangent = torch.randn_like(scores)
    given = with_gradients(scores, *inputs, cotangent)
    inputs = leaves()
    reference = row_scores(*inputs, normalize=normalize, scale=scale, backend="torch")
    assert scores.dtype == reference.dtype
    assert scores.shape == reference.shape
    expected = with_gradients(reference, *inputs, cotangent)
    inputs = leaves(wide(rows.dtype))
    plain = with_gradients(formula(*inputs, normalize, scale), *inputs, cotangent)
    inputs = leaves(torch.float64)
    exact = with_gradients(formula(*inputs, normalize, scale), *inputs, cotangent)
    for ours, theirs, simple, true in zip(given, expected, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype
        error = (ours - true).norm()
        if rows.dtype == torch.float64:
            assert error <= 1e-14 * true.norm()
            continue
        if true.numel() < 100:  # a handful of numbers may happen to be exact in the reference
            assert error <= 10 * torch.finfo(ours.dtype).eps * true.norm()
            continue
        allowed = torch.maximum((theirs - true).norm(), (simple.to(ours.dtype) - true).norm())
        # The interpreter cuts bfloat16 off instead of rounding it.
        factor = 4 if ours.dtype == torch.bfloat16 and DEVICE == "cpu" else 2
        assert error <= factor * allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("r", "d", "normalize"),
    [
        (1, 100, "rms"),
        (3, 63, "rms"),
        (3, 20, "l2"),
        (2, 20, None),
        (5, 20, "l2"),
        (17, 70, "rms"),
        (7, 9, None),
    ],
    ids=str,
)
def test_values_and_gradients(r: int, d: int, normalize: Normalize | None, dtype: torch.dtype) -> None:
    check(randn(2, 21, d, dtype=dtype), randn(2, r, d, dtype=wide(dtype)), normalize)


@pytest.mark.parametrize(
    ("r", "d", "dtype"),
    [(2, 1500, torch.float32), (2, 1300, torch.bfloat16), (5, 1050, torch.bfloat16)],
    ids=str,
)
def test_wide_rows(r: int, d: int, dtype: torch.dtype) -> None:
    check(randn(9, d, dtype=dtype), randn(r, d), "rms")


@pytest.mark.parametrize("r", [33, 70])
def test_many_tokens(r: int) -> None:
    check(randn(70, 24, dtype=torch.bfloat16), randn(r, 24), "rms")


@pytest.mark.parametrize("r", [2, 5])
@pytest.mark.parametrize("m", [1, 2, 300])
def test_numbers_of_rows(m: int, r: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring_triton, "PROGRAMS", 3)  # so that each sums over several blocks
    check(randn(m, 16, dtype=torch.bfloat16), randn(r, 16), "l2")


@pytest.mark.parametrize("tokens_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("rows_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("r", [2, 5])
def test_tokens_of_other_dtypes(r: int, rows_dtype: torch.dtype, tokens_dtype: torch.dtype) -> None:
    rows, tokens = randn(120, 40, dtype=rows_dtype), randn(r, 40, dtype=tokens_dtype)
    exact = formula(rows.double(), tokens.double(), "rms", 0.3)
    plain = formula(rows.float(), tokens.float(), "rms", 0.3)
    assert (score(rows, tokens) - exact).norm() <= 2 * (plain - exact).norm()
    tokens.requires_grad_()
    (gradient,) = torch.autograd.grad(score(rows, tokens).sum(), tokens)
    assert gradient.dtype == tokens_dtype


@pytest.mark.parametrize(
    ("lead_rows", "lead_tokens"),
    [((3,), ()), ((), (3,)), ((2, 1), (1, 3)), ((1, 3), (2, 1))],
    ids=str,
)
@pytest.mark.parametrize("r", [2, 5])
def test_leading_dimensions(r: int, lead_rows: tuple[int, ...], lead_tokens: tuple[int, ...]) -> None:
    check(randn(*lead_rows, 30, 9), randn(*lead_tokens, r, 9), "rms")


@pytest.mark.parametrize("r", [2, 5])
def test_strides(r: int) -> None:
    base = randn(4, 20, 3, 16, dtype=torch.bfloat16)
    for rows in (
        base.transpose(0, 2)[1],  # views of a buffer
        base[:, 3:, 0, 8:],
        base[:, :, 1, ::2],  # no contiguous dimension
        base[:, :, 1, 1:],  # at odd addresses
        base[0, :, 0, :].T,
        base[:1, :1, 0].expand(3, 5, 16),
    ):
        check(rows, randn(r, rows.shape[-1]), "rms")
        tokens = randn(rows.shape[-1], r).T
        assert torch.equal(score(rows, tokens), score(rows.clone(), tokens.contiguous()))


@pytest.mark.parametrize(
    ("r", "d", "dtype"),
    [
        (2, 24, torch.bfloat16),
        (3, 5, torch.float32),
        (2, 10, torch.float64),
        (7, 40, torch.bfloat16),
        (5, 36, torch.float32),
    ],
    ids=str,
)
def test_a_score_never_depends_on_its_company(
    r: int, d: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = random.Random(d)
    m = 5000 if DEVICE == "cuda" else 150
    rows, tokens = randn(m, d, dtype=dtype), randn(r, d, dtype=wide(dtype))
    normalize = choose.choice(NORMALIZE)
    reference = score(rows, tokens, normalize)
    assert torch.equal(score(rows, tokens, normalize), reference)
    for size in (1, 2, 67, m):
        start = choose.randrange(m - size + 1)
        wanted = reference[:, start : start + size]
        part = rows[start : start + size]
        assert torch.equal(score(part, tokens, normalize), wanted)
        batch = randn(3, size, d, dtype=dtype)
        batch[2] = part
        assert torch.equal(score(batch, tokens, normalize)[2], wanted)
        assert torch.equal(score(batch, tokens.expand(3, r, d).contiguous(), normalize)[2], wanted)
        if size == 2 or DEVICE == "cuda":
            alone = score(part[:, None], tokens, normalize)
            assert torch.equal(alone[..., 0].T, wanted)
        # At other addresses rows are copied, all at once or in many pieces.
        offset = choose.randrange(1, 5)
        buffer = randn(2, size + 3, d + offset, dtype=dtype)
        view = buffer[:, 1 : size + 1, offset:]
        view[1] = part
        assert torch.equal(score(view, tokens, normalize)[1], wanted)
        if size == 67:
            with monkeypatch.context() as patch:
                patch.setattr(scoring_triton, "SCRATCH", 20 * d * dtype.itemsize)
                assert torch.equal(score(view, tokens, normalize)[1], wanted)
        flat = torch.empty(size * d + offset, dtype=dtype, device=DEVICE)[offset:].view(size, d).copy_(part)
        assert torch.equal(score(flat, tokens, normalize), wanted)
        assert torch.equal(score(part.T.contiguous().T, tokens, normalize), wanted)


@pytest.mark.parametrize("r", [2, 5])
def test_two_runs_give_the_same_bits(r: int) -> None:
    rows = randn(2, 300, 16, dtype=torch.bfloat16).requires_grad_()
    tokens = randn(2, r, 16).requires_grad_()
    cotangent = randn(2, r, 300)
    first, second = (with_gradients(score(rows, tokens), rows, tokens, cotangent) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("r", [2, 5])
def test_rows_without_gradient_are_not_read(r: int) -> None:
    rows, tokens = randn(300, 16, dtype=torch.bfloat16), randn(r, 16).requires_grad_()
    cotangent = randn(r, 300)
    cotangent[:, 64:192] = 0
    (expected,) = torch.autograd.grad(score(rows, tokens), tokens, cotangent)
    scores = score(rows, tokens)
    rows.data[64:192] = math.nan
    assert torch.equal(torch.autograd.grad(scores, tokens, cotangent)[0], expected)
    scores = score(rows, tokens)
    (gradient,) = torch.autograd.grad(scores, tokens, torch.zeros_like(cotangent))
    assert torch.equal(gradient, torch.zeros_like(tokens))


@pytest.mark.parametrize("r", [2, 5])
def test_nan_poisons_its_row_alone(r: int) -> None:
    rows, tokens = randn(70, 20), randn(r, 20)
    rows[7, 3] = math.nan
    rows.requires_grad_()
    scores = score(rows, tokens)
    others = torch.arange(70, device=DEVICE) != 7
    assert scores[:, 7].isnan().all()
    assert torch.equal(scores[:, others], score(rows[others], tokens))
    scores.sum().backward()
    assert rows.grad is not None
    assert rows.grad[7].isnan().all()
    assert rows.grad[others].isfinite().all()


@pytest.mark.parametrize("r", [2, 5])
def test_a_token_does_not_touch_the_others(r: int) -> None:
    rows, tokens = randn(70, 20, dtype=torch.bfloat16), randn(r, 20)
    expected = score(rows, tokens)
    tokens[1] = math.nan
    scores = score(rows, tokens)
    assert scores[1].isnan().all()
    others = torch.arange(r, device=DEVICE) != 1
    assert torch.equal(scores[others], expected[others])


@pytest.mark.parametrize("normalize", NORMALIZE, ids=str)
@pytest.mark.parametrize("r", [2, 5])
def test_zero_rows(r: int, normalize: Normalize | None) -> None:
    rows = torch.zeros(3, 20, device=DEVICE, requires_grad=True)
    scores = score(rows, randn(r, 20), normalize)
    assert torch.equal(scores, torch.zeros(r, 3, device=DEVICE))
    scores.sum().backward()
    assert rows.grad is not None
    assert rows.grad.isfinite().all()


@pytest.mark.parametrize("r", [2, 5])
@pytest.mark.parametrize("size", [1e-3, 100.0])
def test_spreads(size: float, r: int) -> None:
    check(size * randn(60, 32), randn(r, 32), None, scale=1.0)
    loud = randn(60, 32)
    loud[:, ::7] *= 1e4
    check(loud, randn(r, 32), "rms", scale=size)


def test_scale_keeps_float64() -> None:
    rows, tokens = randn(5, 8, dtype=torch.float64), randn(2, 8, dtype=torch.float64)
    torch.testing.assert_close(
        score(rows, tokens, None, math.pi), math.pi * tokens @ rows.T, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ("shape", "r"), [((0, 4), 2), ((5, 4), 0), ((0, 5, 4), 2), ((2, 0, 4), 1), ((5, 0), 2)], ids=str
)
def test_empty(shape: tuple[int, ...], r: int) -> None:
    rows = randn(*shape).requires_grad_()
    tokens = randn(r, shape[-1]).requires_grad_()
    scores = score(rows, tokens)
    assert scores.shape == (*shape[:-2], r, shape[-2])
    assert not scores.any()
    scores.sum().backward()
    assert rows.grad is not None
    assert rows.grad.shape == shape
    assert tokens.grad is not None
    assert not tokens.grad.any()


@pytest.mark.parametrize("r", [2, 5])
def test_buffer_may_grow_before_the_backward(r: int) -> None:
    buffer = randn(2, 10, 8)
    tokens, cotangent = randn(r, 8).requires_grad_(), randn(2, r, 6)
    (expected,) = torch.autograd.grad(score(buffer[:, :6].clone(), tokens), tokens, cotangent)
    scores = score(buffer[:, :6], tokens)
    buffer[:, 6:] = 1.0
    assert torch.equal(torch.autograd.grad(scores, tokens, cotangent)[0], expected)


@pytest.mark.parametrize(("r", "normalize"), [(2, None), (5, "rms")], ids=str)
def test_opcheck(r: int, normalize: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # opcheck compares allocations of its own
    op = torch.ops.xlroute.row_scores.default
    rows, tokens = randn(2, 7, 5).requires_grad_(), randn(2, r, 5).requires_grad_()
    torch.library.opcheck(op, (rows, tokens, normalize, 0.5, "triton"))
    torch.library.opcheck(op, (rows.detach().bfloat16()[:, ::2], tokens, normalize, 0.5, "triton"))
    torch.library.opcheck(op, (rows, tokens.detach(), normalize, 0.5, "triton"))


@pytest.mark.parametrize("r", [2, 5])
def test_compiles_as_one_graph(r: int) -> None:
    rows, tokens = randn(2, 11, 8).requires_grad_(), randn(2, r, 8).requires_grad_()
    cotangent = randn(2, r, 11)
    compiled = torch.compile(score, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    expected = with_gradients(score(rows, tokens), rows, tokens, cotangent)
    given = with_gradients(compiled(rows, tokens), rows, tokens, cotangent)
    for a, b in zip(given, expected, strict=True):
        assert torch.equal(a, b)


@needs_gpu
@pytest.mark.parametrize("r", [2, 5])
def test_cuda_graph(r: int) -> None:
    rows, tokens = randn(300, 64, dtype=torch.bfloat16), randn(r, 64).requires_grad_()
    cotangent = randn(r, 300)

    def run() -> tuple[Tensor, Tensor]:
        scores = score(rows, tokens)
        return scores.detach(), torch.autograd.grad(scores, tokens, cotangent)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    rows.copy_(randn(300, 64))
    tokens.data.copy_(randn(r, 64))
    cotangent.copy_(randn(r, 300))
    graph.replay()
    for a, b in zip(captured, run(), strict=True):
        assert torch.equal(a, b)


@needs_gpu
@pytest.mark.parametrize("r", [2, 5])
@pytest.mark.parametrize("two", [False, True], ids=["one stream", "two streams"])
def test_past_2_to_the_31_elements(two: bool, r: int) -> None:
    m, d = (1 << 21) + 5, 512
    rows = torch.zeros(2, m, d, dtype=torch.bfloat16, device=DEVICE)
    ends = randn(2, 200, d, dtype=torch.bfloat16)
    rows[:, -200:] = ends
    tokens = randn(r, d).requires_grad_()
    wanted = score(ends, tokens)
    scores = score(rows if two else rows.view(1, 2 * m, d), tokens)
    assert torch.equal(scores[-1, :, -200:], wanted[-1])
    cotangent = torch.zeros_like(scores)
    cotangent[-1, :, -200:] = randn(r, 200)
    (gradient,) = torch.autograd.grad(scores, tokens, cotangent)
    (expected,) = torch.autograd.grad(wanted[-1], tokens, cotangent[-1, :, -200:])
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-4)
    rows.requires_grad_()
    (gradient,) = torch.autograd.grad(score(rows, tokens)[-1, :, -200:].sum(), rows)
    ends.requires_grad_()
    (expected,) = torch.autograd.grad(score(ends, tokens)[-1].sum(), ends)
    assert torch.equal(gradient[-1, -200:], expected[-1])
