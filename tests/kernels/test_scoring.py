"""row_scores: its values and gradients, and that a score never depends on what it is computed with."""

import math
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from xlroute.kernels import row_scores
from xlroute.kernels.scoring import L2_EPS, RMS_EPS, Normalize, blocks

NORMALIZE: tuple[Normalize | None, ...] = ("rms", "l2", None)


def expected_scores(rows: Tensor, tokens: Tensor, normalize: Normalize | None, scale: float) -> Tensor:
    if normalize == "rms":
        rows = rows / (rows.square().mean(-1, keepdim=True) + RMS_EPS).sqrt()
    elif normalize == "l2":
        rows = rows / (rows.square().sum(-1, keepdim=True) + L2_EPS).sqrt()
    return scale * torch.einsum("...md,...rd->...rm", rows, tokens)


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("normalize", NORMALIZE, ids=str)
@pytest.mark.parametrize(
    ("lead_rows", "lead_tokens"),
    [((), ()), ((3,), ()), ((), (3,)), ((2, 1), (1, 3)), ((2, 3), (2, 3))],
    ids=str,
)
def test_values_and_gradients(
    lead_rows: tuple[int, ...], lead_tokens: tuple[int, ...], normalize: Normalize | None
) -> None:
    rows = torch.randn(*lead_rows, 7, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(*lead_tokens, 2, 5, dtype=torch.float64, requires_grad=True)
    scores = row_scores(rows, tokens, normalize=normalize, scale=0.3)
    expected = expected_scores(rows, tokens, normalize, 0.3)
    cotangent = torch.randn_like(expected)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(
        torch.autograd.grad(scores, (rows, tokens), cotangent),
        torch.autograd.grad(expected, (rows, tokens), cotangent),
    )


@pytest.mark.parametrize("normalize", NORMALIZE, ids=str)
def test_gradcheck(normalize: Normalize | None) -> None:
    rows = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda rows, tokens: row_scores(rows, tokens, normalize=normalize, scale=0.7), (rows, tokens)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_over_several_blocks(dtype: torch.dtype) -> None:
    rows, tokens = torch.randn(2, 3000, 128).to(dtype), torch.randn(2, 3, 128)
    scores = row_scores(rows, tokens, normalize="rms", scale=128**-0.5)
    assert scores.dtype == torch.float32
    exact = expected_scores(rows.double(), tokens.double(), "rms", 128**-0.5)
    plain = expected_scores(rows.float(), tokens, "rms", 128**-0.5)
    assert (scores - exact).norm() <= 2 * (plain - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_error_over_several_blocks(dtype: torch.dtype) -> None:
    rows = torch.randn(2, 3000, 128).to(dtype).requires_grad_()
    tokens = torch.randn(2, 3, 128, requires_grad=True)
    cotangent = torch.randn(2, 3, 3000)
    given = torch.autograd.grad(row_scores(rows, tokens, normalize="rms"), (rows, tokens), cotangent)
    assert given[0].dtype == dtype
    exact_inputs = tuple(x.detach().double().requires_grad_() for x in (rows, tokens))
    exact = torch.autograd.grad(expected_scores(*exact_inputs, "rms", 1.0), exact_inputs, cotangent.double())
    plain_inputs = tuple(x.detach().float().requires_grad_() for x in (rows, tokens))
    plain = torch.autograd.grad(expected_scores(*plain_inputs, "rms", 1.0), plain_inputs, cotangent)
    for ours, reference, true in zip(given, plain, exact, strict=True):
        reference = reference.to(ours.dtype)
        assert (ours - true).norm() <= 2 * (reference - true).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [1, 3, 64, 100, 513, 40_000])
def test_a_score_never_depends_on_its_company(d: int, dtype: torch.dtype, threads: int) -> None:
    choose = random.Random(d)
    m = 1000 if d <= 100 else 200 if d < 1000 else 9
    rows = torch.randn(m, d).to(dtype)
    tokens = torch.randn(3, d, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    normalize = choose.choice(NORMALIZE)
    reference = row_scores(rows, tokens, normalize=normalize, scale=0.1)

    for size in [1, 1, 1, 2, 3, 7, 64, m]:
        size = min(size, m)
        start = choose.randrange(m - size + 1)
        wanted = reference[:, start : start + size]
        part = rows[start : start + size]
        # One token alone, some rows alone, in a batch, and in a larger buffer at an odd offset.
        assert torch.equal(row_scores(part, tokens, normalize=normalize, scale=0.1), wanted)
        assert torch.equal(row_scores(part, tokens[1:2], normalize=normalize, scale=0.1), wanted[1:2])
        batch = torch.randn(4, size, d).to(dtype)
        batch[2] = part
        assert torch.equal(row_scores(batch, tokens, normalize=normalize, scale=0.1)[2], wanted)
        offset = choose.randrange(1, 5)
        buffer = torch.randn(2, size + 3, d + offset).to(dtype)
        view = buffer[:, 1 : size + 1, offset:]
        view[1] = part
        assert torch.equal(row_scores(view, tokens, normalize=normalize, scale=0.1)[1], wanted)
        flat = torch.empty(size * d + offset, dtype=dtype)[offset:].view(size, d).copy_(part)
        assert torch.equal(row_scores(flat, tokens, normalize=normalize, scale=0.1), wanted)
        # Columns first, every other element, and a batch of one row each.
        transposed = part.T.contiguous().T
        assert torch.equal(row_scores(transposed, tokens, normalize=normalize, scale=0.1), wanted)
        spaced = torch.zeros(size, d, 2, dtype=dtype)
        spaced[..., 0] = part
        assert torch.equal(row_scores(spaced[..., 0], tokens, normalize=normalize, scale=0.1), wanted)
        alone = row_scores(part[:, None], tokens, normalize=normalize, scale=0.1)
        assert torch.equal(alone[..., 0].T, wanted)


def test_score_is_the_same_with_any_number_of_threads() -> None:
    rows, tokens = torch.randn(1, 60_000), torch.randn(1, 60_000)
    before = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 8):
            torch.set_num_threads(n)
            results.append(row_scores(rows, tokens, normalize="rms"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_saves_a_view_and_scalars() -> None:
    buffer = torch.randn(2, 100, 16)
    tokens = torch.randn(3, 16, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        row_scores(buffer[:, :80], tokens, normalize="rms")
    assert buffer.untyped_storage().data_ptr() in [x.untyped_storage().data_ptr() for x in saved]
    own = [x for x in saved if x.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr()]
    assert sum(x.untyped_storage().nbytes() for x in own) == 4 * (3 * 16 + 2 * 80)


def test_buffer_may_grow_before_the_backward() -> None:
    buffer = torch.randn(2, 10, 4)
    tokens = torch.randn(1, 4, requires_grad=True)
    cotangent = torch.randn(2, 1, 6)
    (expected,) = torch.autograd.grad(
        row_scores(buffer[:, :6].clone(), tokens, normalize="rms"), tokens, cotangent
    )
    scores = row_scores(buffer[:, :6], tokens, normalize="rms")
    buffer[:, 6:] = 1.0
    assert torch.equal(torch.autograd.grad(scores, tokens, cotangent)[0], expected)


def test_changed_rows_that_need_a_gradient_are_refused() -> None:
    rows = torch.randn(6, 4, requires_grad=True) * 1.0
    scores = row_scores(rows, torch.randn(1, 4), normalize="rms")
    rows.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


@pytest.mark.parametrize("normalize", NORMALIZE, ids=str)
def test_zero_rows_have_zero_scores_and_finite_gradients(normalize: Normalize | None) -> None:
    rows = torch.zeros(2, 4, requires_grad=True)
    scores = row_scores(rows, torch.randn(1, 4), normalize=normalize)
    assert torch.equal(scores, torch.zeros(1, 2))
    scores.sum().backward()
    assert rows.grad is not None
    assert rows.grad.isfinite().all()


def test_scale_of_zero() -> None:
    rows, tokens = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    row_scores(rows, tokens, normalize="rms", scale=0.0).sum().backward()
    assert rows.grad is not None
    assert tokens.grad is not None
    assert not rows.grad.any()
    assert not tokens.grad.any()


@pytest.mark.parametrize(
    ("shape", "r"), [((0, 4), 2), ((5, 4), 0), ((0, 5, 4), 2), ((2, 0, 4), 1), ((5, 0), 2)], ids=str
)
def test_empty(shape: tuple[int, ...], r: int) -> None:
    rows = torch.randn(shape, requires_grad=True)
    tokens = torch.randn(r, shape[-1], requires_grad=True)
    scores = row_scores(rows, tokens, normalize="rms")
    assert scores.shape == (*shape[:-2], r, shape[-2])
    assert not scores.any()
    scores.sum().backward()
    assert rows.grad is not None
    assert rows.grad.shape == shape


@pytest.mark.parametrize("sizes", [(5,), (3, 4), (2, 3, 7), (1, 1), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("limit", [1, 3, 8, 20, 1000])
def test_blocks_cover_everything_once(sizes: tuple[int, ...], limit: int) -> None:
    seen = torch.zeros(sizes, dtype=torch.int64)
    for block in blocks(sizes, limit):
        assert seen[block].numel() <= limit
        seen[block] += 1
    assert (seen == 1).all()


def test_few_blocks_for_many_small_batches() -> None:
    assert len(list(blocks((64, 16), 1024))) == 1
    assert len(list(blocks((64, 16), 512))) == 2


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize(
    ("rows", "tokens", "change", "error", "message"),
    [
        ((3, 4), (2, 5), {}, ValueError, r"must share d, got shapes \(3, 4\) and \(2, 5\)"),
        ((4,), (2, 4), {}, ValueError, "must share d"),
        ((2, 3, 4), (3, 2, 4), {}, ValueError, "leading dimensions of rows and tokens must broadcast"),
        (
            (3, 4),
            (2, 4),
            {"normalize": "max"},
            ValueError,
            "normalize must be 'rms', 'l2' or None, got 'max'",
        ),
        ((3, 4), (2, 4), {"scale": math.inf}, ValueError, "scale must be finite, got inf"),
        ((3, 4), (2, 4), {"backend": "triton"}, ValueError, "needs a CUDA tensor"),
    ],
    ids=str,
)
def test_errors(
    rows: tuple[int, ...],
    tokens: tuple[int, ...],
    change: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    arguments = {"normalize": "rms"} | change
    with pytest.raises(error, match=message):
        row_scores(torch.randn(rows), torch.randn(tokens), **arguments)  # type: ignore[arg-type]


def test_integer_rows_are_refused() -> None:
    with pytest.raises(TypeError, match=r"rows must be a floating-point tensor, got dtype torch.int64"):
        row_scores(torch.ones(2, 3, dtype=torch.int64), torch.ones(1, 3), normalize=None)
