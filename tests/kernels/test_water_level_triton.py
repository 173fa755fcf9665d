"""soft_topk in Triton against its PyTorch reference, both measured against float64."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

from xlroute.kernels import soft_topk, top_gates, top_indices, water_levels
from xlroute.kernels.water_level import soft_topk_with_indices

kernels = pytest.importorskip("xlroute.kernels.water_level_triton", exc_type=ImportError)
selection_triton = pytest.importorskip("xlroute.kernels.selection_triton", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")

# A row that one program sorts, and one that takes all the launches.
LENGTHS = {"short": 63, "long": 2111}
lengths = pytest.mark.parametrize("n", LENGTHS.values(), ids=LENGTHS)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills what is allocated with NaN, and with the largest integers."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def solve(
    s: Tensor, k: float | Tensor, eps: float, mask: Tensor | None, cotangent: Tensor, backend: str
) -> list[Tensor]:
    """Gates, ds and, for a tensor of budgets, dk."""
    s = s.detach().to(DEVICE).requires_grad_()
    inputs = [s]
    if isinstance(k, Tensor):
        k = k.detach().to(DEVICE).requires_grad_()
        inputs.append(k)
    mask = None if mask is None else mask.to(DEVICE)
    cotangent = cotangent.to(s)
    with poisoned() if backend == "triton" else nullcontext():
        gates = soft_topk(s, k=k, eps=eps, mask=mask, backend=backend)
        gradients = torch.autograd.grad(gates, inputs, cotangent)
    assert gates.shape == s.shape
    assert gates.dtype == s.dtype
    assert gates.is_contiguous()
    return [gates.detach(), *gradients]


def check(s: Tensor, k: float | Tensor, eps: float = 0.1, mask: Tensor | None = None) -> list[Tensor]:
    """The error is at most twice that of the reference in the same dtype, and a few roundings."""
    cotangent = torch.randn(s.shape)
    given = solve(s, k, eps, mask, cotangent, "triton")
    plain = solve(s, k, eps, mask, cotangent, "torch")
    # In the narrow dtypes the cotangent is rounded too.
    exact = solve(s.double(), k, eps, mask, cotangent.to(s.dtype), "torch")
    # What the gradients are sums and differences of: where they cancel, its rounding stays.
    gate = exact[0].where(exact[0] < 1, 0.0)
    sizes = [exact[0].norm(), (gate * cotangent.to(s.dtype).to(gate)).norm() / eps, len(s) ** 0.5]
    for ours, reference, truth, size in zip(given, plain, exact, sizes, strict=False):
        unit = torch.finfo(s.dtype).eps
        if s.dtype == torch.float64:
            unit *= 64  # the truth is no more exact
        elif s.dtype == torch.bfloat16 and DEVICE == "cpu":
            unit *= 2  # the interpreter cuts off where it should round
        error, allowed = (ours.double() - truth).norm(), (reference.double() - truth).norm()
        assert error <= 2 * allowed + unit * size
    return given


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@lengths
def test_equals_reference(n: int, masked: bool, dtype: torch.dtype) -> None:
    s = torch.randn(2, n).to(dtype)
    s[torch.rand(2, n) < 0.05] = -math.inf
    mask = torch.rand(2, n) < 0.6 if masked else None
    check(s, 20, mask=mask)
    check(s, torch.tensor([1.5, 17.25], dtype=torch.float64), mask=mask)


@pytest.mark.parametrize("spread", [0.1, 1.0, 22.0, 100.0])
@pytest.mark.parametrize("eps", [0.01, 0.1, 1.0])
@lengths
def test_spreads_and_temperatures(n: int, eps: float, spread: float) -> None:
    gates, *_ = check(torch.randn(1, n) * spread, 19.5, eps)
    assert float(gates.double().sum()) == pytest.approx(19.5, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 31, 2049, 4097, 9001])
def test_lengths_and_budgets(n: int, dtype: torch.dtype) -> None:
    s = torch.randn(1, n, dtype=dtype)
    for k in (1, 0.3, 20):
        gates, *_ = check(s, k)
        assert float(gates.double().sum()) == pytest.approx(min(k, n), rel=1e-5)


@lengths
def test_equal_scores_share_the_budget(n: int) -> None:
    gates, *_ = check(torch.full((2, n), -3.5), 18.5)
    torch.testing.assert_close(gates, torch.full_like(gates, 18.5 / n))
    check(torch.randint(-2, 3, (2, n)).float(), 20)


@lengths
def test_idle_and_full_rows(n: int) -> None:
    s = torch.randn(5, n)
    mask = torch.ones(5, n, dtype=torch.bool)
    mask[1] = False
    mask[2, 7:] = False
    s[3, 11:] = -math.inf
    k = torch.tensor([20.0, 20.0, 20.0, 11.0, -1.0])
    gates, ds, dk = check(s, k, mask=mask)
    valid = (mask & (s > -math.inf)).to(gates)
    assert torch.equal(gates[2:4], valid[2:4])
    for idle in (1, 4):
        assert not gates[idle].any()
    assert not ds[1:].any()
    assert not dk[1:].any()
    for number in (-3, 1e300):
        some = s[2:4].to(DEVICE)
        assert torch.equal(
            soft_topk(some, k=number, backend="triton"), soft_topk(some, k=number, backend="torch")
        )


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@lengths
def test_nan_poisons_its_row_alone(n: int, poison: float) -> None:
    s = torch.randn(3, n)
    s[1, 2] = poison
    for k in (9, torch.tensor([1.0, 30.0, 0.0])):
        gates, ds, *_ = solve(s, k, 0.1, None, torch.randn(3, n), "triton")
        assert gates[1].isnan().all()
        assert ds[1].isnan().all()
        assert gates[[0, 2]].isfinite().all()
        assert ds[[0, 2]].isfinite().all()
    mask = torch.ones(3, n, dtype=torch.bool)
    mask[1, 2] = False
    check(s[1:2], 9, mask=mask[1:2])


@lengths
def test_a_budget_of_nan_poisons_its_row_alone(n: int) -> None:
    budgets = torch.tensor([2.0, math.nan])
    gates, ds, _ = solve(torch.randn(2, n), budgets, 0.1, None, torch.randn(2, n), "triton")
    assert gates[1].isnan().all()
    assert ds[1].isnan().all()
    assert gates[0].isfinite().all()


@lengths
def test_strides_and_broadcast_masks(n: int) -> None:
    cotangent = torch.randn(n, 2, 2).permute(2, 1, 0)
    for s, mask in (
        (torch.randn(n, 2, 2).permute(2, 1, 0), torch.rand(n) < 0.6),
        (torch.randn(2, 2, 2 * n)[..., ::2], torch.rand(2, 1, n) < 0.6),
        (torch.randn(2, 2, 2, n)[:, 0], torch.tensor([[True], [False]])),
    ):
        given = solve(s, 5, 0.1, mask, cotangent, "triton")
        plain = solve(
            s.contiguous(), 5, 0.1, mask.expand(2, 2, n).contiguous(), cotangent.contiguous(), "torch"
        )
        for ours, expected in zip(given, plain, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@lengths
def test_bits_depend_on_the_row_alone(n: int) -> None:
    s, cotangent = torch.randn(3, n, device=DEVICE), torch.randn(3, n)
    first, second = (solve(s, 15, 0.1, None, cotangent, "triton") for _ in range(2))
    for ours, again in zip(first, second, strict=True):
        assert torch.equal(ours, again)
    buffer = torch.zeros(n + 1, device=DEVICE)
    buffer[1:] = s[1]
    assert torch.equal(first[0][1], soft_topk(buffer[1:], k=15, backend="triton"))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@lengths
def test_rows_are_chosen_from_alike_whatever_stands_beside_them(n: int, masked: bool) -> None:
    """Gates, indices and gradients, bit for bit."""
    s = torch.randn(6, n, device=DEVICE)
    mask = torch.rand(6, n, device=DEVICE) < 0.5 if masked else None
    cotangent = torch.randn(6, 17, device=DEVICE)

    def chosen(rows: slice) -> tuple[Tensor, ...]:
        given = s[rows].clone().requires_grad_()
        masks = None if mask is None else mask[rows]
        budget = 19.1 if masks is None else masks.sum(-1, dtype=torch.float64).clamp(max=19.1)
        gates, indices = top_gates(given, k=budget, num=17, mask=masks, backend="triton", largest=20)
        return gates.detach(), indices, *torch.autograd.grad(gates, given, cotangent[rows])

    together = chosen(slice(6))
    for rows in (slice(0, 2), slice(2, 3), slice(3, 6)):
        for ours, alone in zip(together, chosen(rows), strict=True):
            assert torch.equal(ours[rows], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_more_candidates_than_their_buffer_holds(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    n, whole = 5003, selection_triton.plan
    # Four neighbours share a chunk, so that both rows have some 80 candidates for 20.
    monkeypatch.setattr(selection_triton, "plan", lambda n, most: whole(n, most)._replace(capacity=most))
    s = torch.stack((torch.linspace(-3, 3, n), torch.arange(n).div(500, rounding_mode="floor"))).to(dtype)
    check(s, 19.5, eps=0.3)
    check(s, 19.5, mask=torch.rand(n) < 0.9)


@lengths
def test_with_indices_equals_both_ops(n: int) -> None:
    s = torch.randn(2, 2, n, device=DEVICE)
    mask = torch.rand(2, 1, n, device=DEVICE) < 0.9
    budget = mask.sum(-1).clamp(max=11.25).expand(2, 2)
    for backend in ("triton", "torch"):
        gates, indices = soft_topk_with_indices(
            s, k=budget, num=10, mask=mask, backend=backend, largest=math.ceil(11.25)
        )
        assert torch.equal(indices, top_indices(s, 10, mask, backend="torch"))
        torch.testing.assert_close(gates, soft_topk(s, k=budget, mask=mask, backend="torch"))
    for num, k in ((20, 2.5), (5, 0)):
        gates, indices = soft_topk_with_indices(s, k=k, num=num, backend="triton")
        assert torch.equal(indices, top_indices(s, num, backend="torch"))
        torch.testing.assert_close(gates, soft_topk(s, k=k, backend="torch"))


def choose(
    s: Tensor, k: Tensor, num: int, mask: Tensor | None, straight_through: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gates, indices, ds and dk; through all gates where there is no backend."""
    s, k = s.detach().requires_grad_(), k.detach().requires_grad_()
    torch.manual_seed(0)
    cotangent = torch.randn(*s.shape[:-1], num, dtype=torch.float64).to(s)
    if not backend:
        gates, indices = soft_topk_with_indices(s, k=k, num=num, mask=mask, backend="torch")
        gates = gates.gather(-1, indices.clamp(min=0)).masked_fill(indices < 0, 0.0)
    else:
        with poisoned() if backend == "triton" else nullcontext():
            gates, indices = top_gates(
                s, k=k, num=num, mask=mask, backend=backend, straight_through=straight_through
            )
            return gates.detach(), indices, *torch.autograd.grad(gates, (s, k), cotangent)
    return gates.detach(), indices, *torch.autograd.grad(gates, (s, k), cotangent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num", [1, 17, 60])
@lengths
def test_gates_of_the_largest_alone(n: int, num: int, dtype: torch.dtype) -> None:
    s = torch.randn(2, 2, n, device=DEVICE).to(dtype)
    s[0, 0, 5:] = -math.inf  # fewer than num
    mask = torch.rand(2, 1, n, device=DEVICE) < 0.9
    k = torch.tensor([[3.0, 0.4], [19.5, 33.25]], device=DEVICE, dtype=torch.float64)
    for masks in (None, mask):
        expected = choose(s, k, num, masks, False, "")
        exact = choose(s.double(), k, num, masks, False, "")
        for backend in ("torch", "triton"):
            gates, indices, ds, dk = choose(s, k, num, masks, False, backend)
            assert torch.equal(indices, expected[1])
            assert torch.equal(gates == 0, expected[0] == 0)
            unit = max(torch.finfo(dtype).eps, 1e-12)
            for ours, plain, truth in zip(
                (gates, ds, dk), (expected[i] for i in (0, 2, 3)), (exact[i] for i in (0, 2, 3)), strict=True
            ):
                error, allowed = (ours.double() - truth).norm(), (plain.double() - truth).norm()
                assert error <= 2 * allowed + 8 * unit * (1 + truth.norm())
            straight, same, straight_ds, straight_dk = choose(s, k, num, masks, True, backend)
            assert torch.equal(straight, (indices >= 0).to(dtype))
            assert torch.equal(same, indices)
            assert torch.equal(straight_ds, ds)
            assert torch.equal(straight_dk, dk)


@lengths
def test_chosen_gates_of_a_poisoned_row(n: int) -> None:
    s = torch.randn(3, n, device=DEVICE)
    s[1, 2] = math.nan
    k = torch.full((3,), 9.0, device=DEVICE)
    for backend in ("torch", "triton"):
        for straight_through in (False, True):
            gates, _, ds, _ = choose(s, k, 5, None, straight_through, backend)
            assert gates[1].isnan().all()
            assert ds[1].isnan().all()
            assert gates[[0, 2]].isfinite().all()
            assert ds[[0, 2]].isfinite().all()


@lengths
def test_chosen_gates_of_idle_and_full_rows(n: int) -> None:
    s = torch.randn(3, n, device=DEVICE)
    s[1, 7:] = -math.inf
    k = torch.tensor([0.0, 7.0, -2.0], device=DEVICE)
    for backend in ("torch", "triton"):
        gates, indices, ds, dk = choose(s, k, 9, None, False, backend)
        assert torch.equal(gates[[0, 2]], torch.zeros(2, 9, device=DEVICE))
        assert torch.equal(gates[1], torch.tensor([1.0] * 7 + [0.0] * 2, device=DEVICE))
        assert torch.equal(indices[1] < 0, gates[1] == 0)
        assert not ds.any()
        assert not dk.any()


@lengths
def test_a_bound_may_be_far_above_the_budget(n: int) -> None:
    s = torch.randn(2, n, device=DEVICE) * 3
    k = torch.tensor([1.5, 4.0], device=DEVICE)
    gates, _ = soft_topk_with_indices(s, k=k, num=2, eps=0.05, backend="triton", largest=40)
    torch.testing.assert_close(gates, soft_topk(s, k=k, eps=0.05, backend="torch"))


def test_indices_carry_no_graph() -> None:
    s = torch.randn(2, 9, requires_grad=True, device=DEVICE)
    _, indices = soft_topk_with_indices(s, k=3, num=2)
    assert not indices.requires_grad


def test_number_of_indices_is_checked() -> None:
    s = torch.randn(2, 9)
    with pytest.raises(ValueError, match=r"num must be in \[0, n\] with n = 9, got 10"):
        soft_topk_with_indices(s, k=3, num=10)
    with pytest.raises(TypeError, match="num must be an int, got float"):
        soft_topk_with_indices(s, k=3, num=2.0)  # type: ignore[arg-type]


def test_budgets_beyond_what_triton_selects_run_the_reference() -> None:
    n = selection_triton.LARGEST + 100
    check(torch.randn(1, n), n - 50)


def test_empty() -> None:
    for shape in ((0, 5), (3, 0), (2, 0, 4)):
        s = torch.randn(shape, requires_grad=True, device=DEVICE)
        k = torch.ones(shape[:-1], requires_grad=True, device=DEVICE)
        gates = soft_topk(s, k=k, backend="triton")
        gates.sum().backward()
        assert s.grad is not None
        assert s.grad.shape == shape


@pytest.mark.parametrize("n", [20, 2200])
def test_opcheck(n: int) -> None:
    op = torch.ops.xlroute.soft_topk.default
    s = torch.randn(1, 2, n, device=DEVICE, requires_grad=True)
    k = (torch.rand(1, 2, dtype=torch.float64, device=DEVICE) + 1.0).requires_grad_()
    mask = torch.rand(n, device=DEVICE) < 0.7
    torch.library.opcheck(op, (s, k, 0.0, mask, 0.1, None, 2, "triton"))
    torch.library.opcheck(
        op, (s.detach().transpose(0, 1), k.detach()[:, :1].expand(2, 1), 0.0, None, 0.1, 3, 0, "triton")
    )
    for backend in ("torch", "triton"):
        arguments = (s, k, 0.0, mask, 0.1, None, 2, True, backend)
        torch.library.opcheck(
            torch.ops.xlroute.top_gates.default, (s, None, 1.5, mask, 0.1, 2, 2, False, backend)
        )
        torch.library.opcheck(torch.ops.xlroute.top_gates.default, arguments)
        _, levels, indices = torch.ops.xlroute.top_gates.default(*arguments)
        grad = torch.randn(1, 2, 2, device=DEVICE)
        torch.library.opcheck(
            torch.ops.xlroute.top_gates_backward.default,
            (grad, indices, s.detach(), mask, levels.detach(), 0.1, backend),
        )


@needs_gpu
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend: str) -> None:
    def gates(s: Tensor, k: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return soft_topk_with_indices(s, k=k, num=30, mask=mask, largest=40)

    s = torch.randn(2, 10_000, device=DEVICE, requires_grad=True)
    k = torch.full((2,), 33.75, device=DEVICE, requires_grad=True)
    mask = torch.rand(2, 10_000, device=DEVICE) < 0.8
    expected, wanted = gates(s, k, mask)
    given, indices = torch.compile(gates, fullgraph=True, backend=backend)(s, k, mask)
    assert torch.equal(given, expected)
    assert torch.equal(indices, wanted)
    cotangent = torch.randn_like(given)
    for ours, reference in zip(
        torch.autograd.grad(given, (s, k), cotangent),
        torch.autograd.grad(expected, (s, k), cotangent),
        strict=True,
    ):
        assert torch.equal(ours, reference)


@needs_gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning")
@lengths
def test_nothing_waits_for_the_gpu_and_a_graph_replays(n: int) -> None:
    s = torch.randn(2, n, device=DEVICE, requires_grad=True)
    k = torch.full((2,), 15.5, device=DEVICE, requires_grad=True)
    cotangent = torch.randn_like(s)

    def run() -> tuple[Tensor, ...]:
        gates, indices = soft_topk_with_indices(s, k=k, num=14, largest=20, backend="triton")
        return gates, indices, *torch.autograd.grad(gates, (s, k), cotangent)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        with torch.no_grad():
            s.normal_()
            k.uniform_(1.0, 20.0)
            cotangent.normal_()
        graph.replay()
        for ours, expected in zip(captured, run(), strict=True):
            assert torch.equal(ours, expected)


@needs_gpu
def test_rows_beyond_2_to_the_31_elements() -> None:
    n = 1 << 27
    s = torch.empty(17, n, dtype=torch.bfloat16, device=DEVICE).normal_()
    mask = torch.rand(n, device=DEVICE) < 0.5
    cotangent = torch.randn(n, dtype=s.dtype, device=DEVICE)
    gates, ds = solve(s, 100, 0.1, mask, cotangent.expand(17, n), "triton")
    last_gates, last_ds = solve(s[-1], 100, 0.1, mask, cotangent, "torch")
    torch.testing.assert_close(gates[-1], last_gates)
    torch.testing.assert_close(ds[-1], last_ds, rtol=1.6e-2, atol=1e-3)


@needs_gpu
def test_extra_memory_is_small() -> None:
    s = torch.randn(2, 1 << 24, device=DEVICE)
    soft_topk_with_indices(s, k=1152.0, num=1024)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gates, _ = soft_topk_with_indices(s, k=1152.0, num=1024)
    assert torch.cuda.max_memory_allocated() - before - gates.nbytes < 4 << 20


@lengths
def test_levels_of_prefixes(n: int) -> None:
    """Rows that are one, and differ in the mask alone."""
    s = torch.randn(2, 1, n, device=DEVICE, requires_grad=True)
    ends = torch.tensor([n // 3, n // 2, n], device=DEVICE)
    mask = torch.arange(n, device=DEVICE) < ends[:, None]
    given, plain = (
        water_levels(s.expand(-1, 3, -1), k=ends * 0.1, eps=0.1, mask=mask, backend=backend, largest=n)
        for backend in ("triton", "torch")
    )
    torch.testing.assert_close(given, plain)
    cotangent = torch.randn_like(plain)
    torch.testing.assert_close(
        torch.autograd.grad(given, s, cotangent), torch.autograd.grad(plain, s, cotangent)
    )
