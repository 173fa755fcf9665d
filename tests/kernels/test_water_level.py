"""soft_topk against coordinate descent, a bisection on the water level, and its own closed form."""

import math

import pytest
import torch
from torch import Tensor

from xlroute.kernels import coordinate_descent, soft_topk, water_levels


def bisected(s: Tensor, k: Tensor, eps: float, mask: Tensor) -> Tensor:
    """Gates min(1, exp((s + a) / eps)) with a found by halving an interval: no sorting, no logsumexp."""
    valid = mask.sum(-1)
    s = s.masked_fill(~mask, -math.inf)
    high = s.masked_fill(~mask, math.inf).amin(-1).neg() + 1.0
    low = -s.amax(-1) - eps * 100.0
    for _ in range(80):
        middle = (low + high) / 2
        total = ((s + middle[..., None]) / eps).clamp(max=0).exp().sum(-1)
        low, high = torch.where(total < k, middle, low), torch.where(total < k, high, middle)
    gates = ((s + middle[..., None]) / eps).clamp(max=0).exp()
    gates = torch.where((k >= valid)[..., None], mask.to(s.dtype), gates)
    return torch.where((k <= 0)[..., None], 0.0, gates)


@pytest.mark.parametrize("eps", [0.03, 0.1, 1.0])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_equals_bisection(eps: float, masked: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    for lead, n in (((), 9), ((4,), 63), ((2, 3), 500)):
        for spread in (0.1, 1.0, 10.0):
            s = torch.randn(*lead, n, dtype=torch.float64, generator=generator) * spread
            mask = torch.rand(*lead, n, generator=generator) < (0.6 if masked else 2.0)
            budgets = torch.rand(lead, dtype=torch.float64, generator=generator) * 1.3 * n
            for k in (1, 3, 4.25, 0.4, n - 1, budgets):
                exact = bisected(s, torch.as_tensor(k, dtype=torch.float64).expand(lead), eps, mask)
                gates = soft_topk(s, k=k, eps=eps, mask=mask)
                torch.testing.assert_close(gates, exact, rtol=0, atol=1e-10)


def test_is_the_limit_of_coordinate_descent() -> None:
    s = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    k = torch.tensor([3.0, 5.5, 10.0], dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 40) < 0.9
    cotangent = torch.randn(3, 40, dtype=torch.float64)
    gates = soft_topk(s, k=k, eps=0.5, mask=mask)
    limit = coordinate_descent(s, k=k, n_iters=2000, eps=0.5, mask=mask)
    torch.testing.assert_close(gates, limit, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad(gates, (s, k), cotangent),
        torch.autograd.grad(limit, (s, k), cotangent),
        rtol=0,
        atol=1e-9,
    )


def test_gradcheck() -> None:
    s = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    k = torch.tensor([0.7, 1.3, 2.5, 4.4], dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 9) < 0.8
    mask[:, :6] = True
    assert torch.autograd.gradcheck(lambda s, k: soft_topk(s, k=k, eps=0.4, mask=mask), (s, k))


@pytest.mark.parametrize("spread", [0.1, 1.0, 22.0, 100.0])
@pytest.mark.parametrize("n", [1, 2, 63, 1000, 131_072, 1_000_000])
def test_sums_to_the_budget(n: int, spread: float) -> None:
    s = torch.randn(1, n, generator=torch.Generator().manual_seed(n)) * spread
    for k in (1, 7.5, 64, 1024) if n < 1_000_000 else (1, 1000.5):
        for eps in (0.03, 1.0) if n < 100_000 else (0.03,):
            total = float(soft_topk(s, k=k, eps=eps).double().sum())
            assert total == pytest.approx(min(k, n), rel=1e-5)


def test_float32_error_is_that_of_the_scores() -> None:
    s = torch.randn(4, 2000) * 22
    cotangent = torch.randn(4, 2000)
    eps = 0.03

    def run(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = s.to(dtype).requires_grad_()
        gates = soft_topk(x, k=300, eps=eps)
        return gates.detach().double(), torch.autograd.grad(gates, x, cotangent.to(dtype))[0].double()

    for given, exact in zip(run(torch.float32), run(torch.float64), strict=True):
        # Every difference of scores is rounded once, and the exponential magnifies that by 1 / eps.
        assert (given - exact).norm() <= 2 * torch.finfo(torch.float32).eps / eps * exact.norm()


def test_saturated_scores_and_full_rows_have_no_gradient() -> None:
    s = torch.tensor([[10.0, 0.1, 0.2, 0.3], [1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    k = torch.tensor([2.0, 4.0], requires_grad=True)
    gates = soft_topk(s, k=k, eps=0.1)
    gates.backward(torch.randn(2, 4))
    assert s.grad is not None
    assert k.grad is not None
    assert gates[0, 0] == 1
    assert s.grad[0, 0] == 0
    assert (s.grad[0, 1:] != 0).all()
    assert torch.equal(gates[1], torch.ones(4))
    assert torch.equal(s.grad[1], torch.zeros(4))
    assert k.grad[1] == 0


def test_gradient_of_a_row_sums_to_zero() -> None:
    s = torch.randn(3, 200, dtype=torch.float64, requires_grad=True)
    soft_topk(s, k=11, eps=0.1).backward(torch.randn(3, 200, dtype=torch.float64))
    assert s.grad is not None
    torch.testing.assert_close(s.grad.sum(-1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_fully_masked_and_idle_rows() -> None:
    s = torch.randn(4, 9, requires_grad=True)
    k = torch.tensor([2.0, 2.0, 0.0, -1.0], requires_grad=True)
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[1] = False
    gates = soft_topk(s, k=k, mask=mask)
    gates.backward(torch.randn_like(gates))
    assert s.grad is not None
    assert k.grad is not None
    assert torch.equal(gates[1:], torch.zeros(3, 9))
    assert torch.equal(s.grad[1:], torch.zeros(3, 9))
    assert torch.equal(k.grad[1:], torch.zeros(3))
    assert float(gates[0].detach().sum()) == pytest.approx(2.0, rel=1e-6)
    for budget in (0, -3, 1e-30):
        assert float(soft_topk(s.detach(), k=budget, mask=mask).sum()) <= 1e-29


def test_budget_beyond_the_valid_entries_gives_ones_on_them() -> None:
    s = torch.randn(2, 9)
    mask = torch.rand(2, 9) < 0.5
    for k in (9, 9.5, 1e300, torch.tensor([9.0, math.inf])):
        assert torch.equal(soft_topk(s, k=k, mask=mask), mask.float())


@pytest.mark.parametrize("k", [1, 3, 3.5, 9])
def test_ties(k: float) -> None:
    equal = soft_topk(torch.full((2, 10), 7.0, dtype=torch.float64), k=k)
    torch.testing.assert_close(equal, torch.full((2, 10), k / 10, dtype=torch.float64))
    s = torch.tensor([2.0, 1.0, 1.0, 1.0, 2.0, 0.0, 1.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    mask = torch.ones(10, dtype=torch.bool)
    exact = bisected(s, torch.tensor(k, dtype=torch.float64), 0.3, mask)
    torch.testing.assert_close(soft_topk(s, k=k, eps=0.3), exact, rtol=0, atol=1e-10)


def test_minus_infinity_is_masked() -> None:
    s = torch.tensor([[1.0, -math.inf, 0.5, 0.2], [-math.inf] * 4], requires_grad=True)
    gates = soft_topk(s, k=2)
    gates.backward(torch.randn(2, 4))
    assert s.grad is not None
    assert gates[0, 1] == 0
    assert float(gates[0].detach().sum()) == pytest.approx(2.0, rel=1e-6)
    assert torch.equal(gates[1], torch.zeros(4))
    assert s.grad.isfinite().all()
    assert s.grad[0, 1] == 0
    assert torch.equal(s.grad[1], torch.zeros(4))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("k", [1, 3, 8, 0])
def test_nan_poisons_its_row_alone(k: int, poison: float) -> None:
    s = torch.randn(3, 8)
    s[1, 2] = poison
    s.requires_grad_()
    gates = soft_topk(s, k=k)
    gates.backward(torch.randn(3, 8))
    assert s.grad is not None
    assert gates[1].isnan().all()
    assert s.grad[1].isnan().all()
    assert gates[[0, 2]].isfinite().all()
    assert s.grad[[0, 2]].isfinite().all()
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 2] = False
    assert soft_topk(s, k=k, mask=mask).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_compute_in_float32(dtype: torch.dtype) -> None:
    s = torch.randn(2, 100).to(dtype)
    narrow, wide = s.clone().requires_grad_(), s.float().requires_grad_()
    cotangent = torch.randn(2, 100).to(dtype)
    gates, expected = soft_topk(narrow, k=7), soft_topk(wide, k=7)
    assert torch.equal(gates, expected.to(dtype))
    gates.backward(cotangent)
    expected.backward(cotangent.float())
    assert narrow.grad is not None
    assert wide.grad is not None
    assert torch.equal(narrow.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    s = torch.randn(shape, requires_grad=True)
    k = torch.ones(shape[:-1], requires_grad=True)
    gates = soft_topk(s, k=k)
    assert gates.shape == shape
    gates.sum().backward()
    assert s.grad is not None
    assert s.grad.shape == shape


def test_non_contiguous() -> None:
    s = torch.randn(20, 6, 4).permute(2, 1, 0)[..., ::2].requires_grad_()
    copy = s.detach().contiguous().requires_grad_()
    cotangent = torch.randn(10, 6, 4).permute(2, 1, 0)
    gates, expected = soft_topk(s, k=2), soft_topk(copy, k=2)
    assert torch.equal(gates, expected)
    assert torch.equal(
        torch.autograd.grad(gates, s, cotangent)[0], torch.autograd.grad(expected, copy, cotangent)[0]
    )


def test_rows_do_not_depend_on_their_batch() -> None:
    s = torch.randn(5, 300)
    k = torch.tensor([1.0, 30.5, 7.0, 299.0, 2.2])
    together = soft_topk(s, k=k)
    alone = torch.stack([soft_topk(row, k=budget) for row, budget in zip(s, k, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [1, 3, 4.25, 8])
@pytest.mark.parametrize("spread", [0.1, 1.0, 22.0])
def test_the_level_gives_the_gates(k: float, spread: float) -> None:
    s = (torch.randn(3, 20, dtype=torch.float64) * spread).requires_grad_()
    mask = torch.rand(3, 20) < 0.6
    level = water_levels(s, k=k, eps=0.3, mask=mask)
    gates = ((s + level[:, None]) / 0.3).clamp(max=0).exp().masked_fill(~mask, 0)
    expected = soft_topk(s, k=k, eps=0.3, mask=mask)
    torch.testing.assert_close(gates, expected)
    cotangent = torch.randn_like(gates)
    torch.testing.assert_close(
        torch.autograd.grad(gates, s, cotangent), torch.autograd.grad(expected, s, cotangent)
    )


def test_the_level_has_the_gradient_of_a_difference() -> None:
    s = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 9) < 0.8
    mask[:, :4] = True
    assert torch.autograd.gradcheck(lambda s: water_levels(s, k=2.5, eps=0.4, mask=mask), (s,))


def test_levels_of_rows_that_choose_all_or_nothing() -> None:
    s = torch.randn(4, 6, requires_grad=True)
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3, [False] * 6, [True] * 6])
    level = water_levels(s, k=torch.tensor([2.0, 3.0, 2.0, 0.0]), mask=mask)
    assert level[0].isfinite()
    assert level[1:].tolist() == [math.inf, math.inf, -math.inf]
    (gradient,) = torch.autograd.grad(level, s, torch.randn(4))
    assert gradient[0].any()
    assert not gradient[1:].any()
    assert water_levels(s[:0], k=2).shape == (0,)
