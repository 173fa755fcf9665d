"""coordinate_descent against the two-vector iteration of the papers, differentiated by autograd."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xlroute.kernels import coordinate_descent

SCHEDULES = {"constant": (0.1, None, 1.0), "steep": (0.03, 4.0, 0.7), "slow": (0.5, 1.0, 0.95)}


def unrolled(
    s: Tensor, k: Tensor | float, n_iters: int, schedule: tuple[float, float | None, float], mask: Tensor
) -> Tensor:
    """The dual updates of both vectors, written out as in Wright's paper and CoLT5."""
    eps, eps_init, eps_decay = schedule
    now = eps if eps_init is None else eps_init
    log_k = torch.as_tensor(k, dtype=s.dtype).log()[..., None]
    b = -s
    for _ in range(n_iters):
        exponents = ((s + b) / now).masked_fill(~mask, -math.inf)
        a = now * (log_k - exponents.logsumexp(-1, keepdim=True))
        b = -(s + a).relu()
        now = max(now * eps_decay, eps)
    return ((s + a + b) / now).exp().masked_fill(~mask, 0.0)


def descend(
    s: Tensor, k: Tensor | float, n_iters: int, schedule: tuple[float, float | None, float], mask: Tensor
) -> Tensor:
    eps, eps_init, eps_decay = schedule
    return coordinate_descent(
        s, k=k, n_iters=n_iters, eps=eps, eps_init=eps_init, eps_decay=eps_decay, mask=mask
    )


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("n_iters", [1, 5, 20, 50])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_equals_unrolled_iteration(
    n_iters: int, schedule: tuple[float, float | None, float], masked: bool
) -> None:
    generator = torch.Generator().manual_seed(n_iters)
    for lead, n in (((), 17), ((3,), 63), ((2, 3), 200)):
        s = torch.randn(*lead, n, dtype=torch.float64, generator=generator, requires_grad=True)
        mask = torch.rand(*lead, n, generator=generator) < (0.7 if masked else 2.0)
        cotangent = torch.randn(*lead, n, dtype=torch.float64, generator=generator)
        budget = torch.rand(lead, dtype=torch.float64, generator=generator) * 8 + 0.5
        for k in (5, 3.5, budget.requires_grad_()):
            inputs = (s, k) if isinstance(k, Tensor) else (s,)
            gates = descend(s, k, n_iters, schedule, mask)
            expected = unrolled(s, k, n_iters, schedule, mask)
            torch.testing.assert_close(gates, expected, rtol=0, atol=1e-10)
            given = torch.autograd.grad(gates, inputs, cotangent)
            wanted = torch.autograd.grad(expected, inputs, cotangent)
            torch.testing.assert_close(given, wanted, rtol=1e-10, atol=1e-10)


def test_budget_and_mask_broadcast() -> None:
    s = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    k = torch.tensor([[2.0], [3.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.rand(11) < 0.8
    schedule = SCHEDULES["slow"]
    cotangent = torch.randn_like(s)
    gates = descend(s, k, 5, schedule, mask)
    expected = unrolled(s, k.expand(2, 3), 5, schedule, mask)
    torch.testing.assert_close(gates, expected)
    torch.testing.assert_close(
        torch.autograd.grad(gates, (s, k), cotangent), torch.autograd.grad(expected, (s, k), cotangent)
    )


def test_temperature_of_the_gates_is_decayed_once_more() -> None:
    s = torch.tensor([0.0, -1.0, -2.0], dtype=torch.float64)
    gates = coordinate_descent(s, k=1, n_iters=1, eps=0.1, eps_init=1.0, eps_decay=0.5)
    torch.testing.assert_close(gates, ((s + math.log(1 / 3)).clamp(max=0) / 0.5).exp())


@pytest.mark.parametrize("n_iters", [1, 4])
def test_gradcheck(n_iters: int) -> None:
    s = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    k = torch.tensor([1.3, 2.0, 4.5], dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 7) < 0.8
    mask[:, 0] = True
    assert torch.autograd.gradcheck(
        lambda s, k: coordinate_descent(
            s, k=k, n_iters=n_iters, eps=0.5, eps_init=1.0, eps_decay=0.8, mask=mask
        ),
        (s, k),
    )


def relative_error(given: Tensor, exact: Tensor) -> float:
    return float((given.double() - exact).norm() / exact.norm())


def test_float32_gradient_error() -> None:
    schedule = SCHEDULES["steep"]
    s = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    cotangent = torch.randn(8, 512, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(8, 512, dtype=torch.bool)

    def gradient(function: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        x = s.to(dtype).requires_grad_()
        return torch.autograd.grad(function(x, 64.0, 50, schedule, mask), x, cotangent.to(dtype))[0]

    exact = gradient(unrolled, torch.float64)
    assert relative_error(gradient(descend, torch.float32), exact) < 1e-6
    assert relative_error(gradient(descend, torch.float32), exact) < relative_error(
        gradient(unrolled, torch.float32), exact
    )


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_float32_gates_at_large_offsets(offset: float) -> None:
    s = torch.randn(4, 2000) + offset
    mask = torch.rand(4, 2000) < 0.9
    exact = unrolled(s.double(), 100.0, 20, SCHEDULES["steep"], mask)
    given = descend(s, 100.0, 20, SCHEDULES["steep"], mask)
    reference = unrolled(s, 100.0, 20, SCHEDULES["steep"], mask)
    assert relative_error(given, exact) <= 2 * relative_error(reference, exact)
    assert relative_error(given, exact) < 1e-5


def saved_elements(n_iters: int) -> int:
    count = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal count
        count += tensor.numel()
        return tensor

    s = torch.randn(3, 1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        coordinate_descent(s, k=10, n_iters=n_iters)
    return count


def test_saves_three_scalars_an_iteration_and_row() -> None:
    assert saved_elements(50) - saved_elements(5) == 3 * 45 * 3
    assert saved_elements(5) == 3 * 1000 + 3 + 3 * 5 * 3


@pytest.mark.parametrize("n_iters", [1, 20])
def test_fully_masked_rows(n_iters: int) -> None:
    s = torch.randn(3, 9, requires_grad=True)
    k = torch.tensor([2.0, 2.0, 2.0], requires_grad=True)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1] = False
    gates = coordinate_descent(s, k=k, n_iters=n_iters, mask=mask)
    gates.backward(torch.randn_like(gates))
    assert s.grad is not None
    assert k.grad is not None
    assert torch.equal(gates[1], torch.zeros(9))
    assert torch.equal(s.grad[1], torch.zeros(9))
    assert k.grad[1] == 0
    assert s.grad.isfinite().all()
    assert (gates[0] > 0).any()
    assert (s.grad[0] != 0).any()


def test_budget_that_is_not_positive_gives_zero_gates() -> None:
    s = torch.randn(3, 9, requires_grad=True)
    k = torch.tensor([0.0, -1.0, 2.0], requires_grad=True)
    gates = coordinate_descent(s, k=k, n_iters=5)
    gates.backward(torch.randn_like(gates))
    assert s.grad is not None
    assert k.grad is not None
    assert torch.equal(gates[:2], torch.zeros(2, 9))
    assert torch.equal(s.grad[:2], torch.zeros(2, 9))
    assert torch.equal(k.grad[:2], torch.zeros(2))
    assert torch.equal(coordinate_descent(s, k=0, n_iters=5), torch.zeros(3, 9))


def test_budget_beyond_n_saturates_every_gate() -> None:
    s = torch.randn(2, 9)
    for k in (9, 12):
        gates = coordinate_descent(s, k=k, n_iters=300, eps=0.5)
        torch.testing.assert_close(gates, torch.ones(2, 9))


def test_one_score() -> None:
    s = torch.tensor([[-3.0], [0.0], [5.0]], requires_grad=True)
    gates = coordinate_descent(s, k=1, n_iters=3)
    torch.testing.assert_close(gates, torch.ones(3, 1))
    gates.backward(torch.randn_like(gates))
    assert s.grad is not None
    torch.testing.assert_close(s.grad, torch.zeros(3, 1))


def test_nothing_underflows_when_all_scores_are_far_below_the_threshold() -> None:
    s = torch.tensor([[-1e4, -1e4 - 1, -1e4 - 2]], dtype=torch.float32)
    mask = torch.ones_like(s, dtype=torch.bool)
    exact = unrolled(s.double(), 1.0, 5, (0.01, None, 1.0), mask)
    torch.testing.assert_close(coordinate_descent(s, k=1, n_iters=5, eps=0.01).double(), exact)


def test_equal_scores_get_equal_gates() -> None:
    gates = coordinate_descent(torch.full((1, 10), 0.3, dtype=torch.float64), k=4, n_iters=20)
    torch.testing.assert_close(gates, torch.full((1, 10), 0.4, dtype=torch.float64))


def test_minus_infinity_is_masked() -> None:
    s = torch.randn(2, 8, dtype=torch.float64)
    s[:, 3] = -math.inf
    s.requires_grad_()
    cotangent = torch.randn(2, 8, dtype=torch.float64)
    gates = coordinate_descent(s, k=2, n_iters=5)
    mask = torch.ones(8, dtype=torch.bool)
    mask[3] = False
    finite = s.detach().masked_fill(~mask, 0.0).requires_grad_()
    expected = coordinate_descent(finite, k=2, n_iters=5, mask=mask)
    assert torch.equal(gates, expected)
    assert torch.equal(
        torch.autograd.grad(gates, s, cotangent)[0], torch.autograd.grad(expected, finite, cotangent)[0]
    )


def test_nan_poisons_its_row_alone() -> None:
    s = torch.randn(3, 8)
    s[1, 2] = math.nan
    s.requires_grad_()
    gates = coordinate_descent(s, k=2, n_iters=5)
    gates.backward(torch.randn_like(gates))
    assert s.grad is not None
    assert gates[1].isnan().all()
    assert s.grad[1].isnan().all()
    assert gates[[0, 2]].isfinite().all()
    assert s.grad[[0, 2]].isfinite().all()
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 2] = False
    assert coordinate_descent(s, k=2, n_iters=5, mask=mask).isfinite().all()


def test_plus_infinity_is_always_chosen() -> None:
    s = torch.randn(8)
    s[5] = math.inf
    gates = coordinate_descent(s, k=2, n_iters=20)
    assert gates[5] == 1
    assert gates.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_compute_in_float32(dtype: torch.dtype) -> None:
    s = torch.randn(2, 100).to(dtype)
    narrow, wide = s.clone().requires_grad_(), s.float().requires_grad_()
    cotangent = torch.randn(2, 100).to(dtype)
    gates = coordinate_descent(narrow, k=7, n_iters=20)
    expected = coordinate_descent(wide, k=7, n_iters=20)
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
    gates = coordinate_descent(s, k=k, n_iters=3)
    assert gates.shape == shape
    gates.sum().backward()
    assert s.grad is not None
    assert s.grad.shape == shape


def test_non_contiguous() -> None:
    base = torch.randn(20, 6, 4)
    s = base.permute(2, 1, 0)[..., ::2].requires_grad_()
    copy = s.detach().contiguous().requires_grad_()
    cotangent = torch.randn(10, 6, 4).permute(2, 1, 0)
    gates, expected = (coordinate_descent(x, k=2, n_iters=5) for x in (s, copy))
    assert torch.equal(gates, expected)
    assert torch.equal(
        torch.autograd.grad(gates, s, cotangent)[0], torch.autograd.grad(expected, copy, cotangent)[0]
    )


def test_rows_do_not_depend_on_their_batch() -> None:
    s = torch.randn(5, 300)
    together = coordinate_descent(s, k=9, n_iters=10)
    alone = torch.stack([coordinate_descent(row, k=9, n_iters=10) for row in s])
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n_iters": 0}, ValueError, "n_iters must be at least 1, got 0"),
        ({"n_iters": 2.0}, TypeError, "n_iters must be an int, got float"),
        ({"eps": 0.0}, ValueError, "eps must be a positive finite number, got 0.0"),
        ({"eps": math.nan}, ValueError, "eps must be a positive finite number, got nan"),
        ({"eps_init": 0.01}, ValueError, "eps_init must be finite and at least eps = 0.1, got 0.01"),
        ({"eps_decay": 0.0}, ValueError, r"eps_decay must be in \(0, 1\], got 0.0"),
        ({"eps_decay": 1.1}, ValueError, r"eps_decay must be in \(0, 1\], got 1.1"),
    ],
    ids=str,
)
def test_errors(change: dict[str, float], error: type[Exception], message: str) -> None:
    arguments = {"k": 2, "n_iters": 3} | change
    with pytest.raises(error, match=message):
        coordinate_descent(torch.randn(2, 5), **arguments)  # type: ignore[arg-type]
