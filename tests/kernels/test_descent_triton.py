"""The Triton backend of coordinate_descent against the PyTorch reference, in the interpreter or on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from xlroute.kernels import coordinate_descent, descent, descent_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCHEDULES = {"constant": (0.1, None, 1.0), "steep": (0.03, 4.0, 0.7), "slow": (0.5, 1.0, 0.95)}
Schedule = tuple[float, float | None, float]

on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
# The interpreter takes the maximum of a tile with numpy, which warns where all of it is NaN.
all_nan = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")


def cut_rows(monkeypatch: pytest.MonkeyPatch, tile: int, most_tiles: int = 1024) -> None:
    """Has every row cut into tiles of ``tile`` elements, a quarter of it for float64."""
    monkeypatch.setattr(descent_triton, "LARGEST_ROW", 0)
    monkeypatch.setattr(descent_triton, "LARGEST_ROW_BACKWARD", 0)
    monkeypatch.setattr(descent_triton, "TILE", tile)
    monkeypatch.setattr(descent_triton, "TILE_BACKWARD", tile)
    monkeypatch.setattr(descent_triton, "MOST_TILES", most_tiles)
    monkeypatch.setattr(descent_triton, "TERMS_AT_ONCE", 4)


@pytest.fixture(params=["rows", "tiles"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How rows are taken: whole, or in tiles of one block."""
    if request.param == "tiles":
        cut_rows(monkeypatch, 64)
    name: str = request.param
    return name


def descend(
    s: Tensor,
    k: float | Tensor,
    *,
    n_iters: int = 4,
    schedule: Schedule = SCHEDULES["slow"],
    mask: Tensor | None = None,
    backend: Any = "triton",
) -> Tensor:
    eps, eps_init, eps_decay = schedule
    return coordinate_descent(
        s, k=k, n_iters=n_iters, eps=eps, eps_init=eps_init, eps_decay=eps_decay, mask=mask, backend=backend
    )


def gates_and_gradients(
    s: Tensor, k: Tensor, cotangent: Tensor, dtype: torch.dtype, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    s = s.detach().to(dtype).requires_grad_()
    k = k.detach().clone().requires_grad_()
    gates = descend(s, k, **options)
    ds, dk = torch.autograd.grad(gates, (s, k), cotangent.to(dtype))
    return gates.detach().double(), ds.double(), dk.double()


def row_errors(given: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Errors of each row's gates, ds and dk, against what a row measures: one's own may happen to cancel."""
    found = []
    for ours, theirs in zip(given, exact, strict=True):
        difference = (ours - theirs[: len(ours)]).view(len(ours), -1).norm(dim=-1)
        found.append(difference * math.sqrt(len(theirs)) / theirs.norm())
    return tuple(found)


def first_rows(case: dict[str, Any], rows: int) -> dict[str, Any]:
    return {name: value[:rows] if isinstance(value, Tensor) else value for name, value in case.items()}


def compare(cases: list[dict[str, Any]], dtype: torch.dtype = torch.float32, rows: int = 6) -> None:
    """Gates, ds and dk are at most twice as far from float64 as those of the reference in the same dtype.

    That is in the root mean square over rows, and a unit in the last place further, for below that it is
    chance which one is closer: where scores are far apart, the reference often happens to round nothing. The
    reference takes all rows, which tells its error better, and Triton the first of them; where those happen
    to be hard rows, they are hard for both. In a hard row it is luck how far off one is, so the reference
    takes each several times, with scores that differ in their last bits, and its worst counts. The worst row
    of either is left out: where a score lies at the very point from which on it counts, two gradients are
    right, and there is one such row in a few thousand.
    """
    given: dict[str, list[Tensor]] = {"gates": [], "ds": [], "dk": []}
    plain: dict[str, list[Tensor]] = {"gates": [], "ds": [], "dk": []}
    for case in cases:
        exact = gates_and_gradients(**case, dtype=torch.float64, backend="torch")
        ours = row_errors(gates_and_gradients(**first_rows(case, rows), dtype=dtype), exact)
        if dtype == torch.float64:
            assert max(errors.max() for errors in ours) < 1e-10
            continue
        runs = [_reference_errors(case, dtype)]
        for _ in range(7):
            nudged = case["s"] * (1 + 2**-22 * torch.randn_like(case["s"]))
            runs.append(_reference_errors({**case, "s": nudged}, dtype))
        for name, our_errors, *their_errors in zip(given, ours, *runs, strict=True):
            given[name].append(our_errors)
            plain[name].append(torch.stack(their_errors).amax(0))
    for name, ours_by_case in given.items():
        if ours_by_case:
            our_errors, their_errors = _but_the_worst(ours_by_case), _but_the_worst(plain[name])
            same_rows = _but_the_worst([each[:rows] for each in plain[name]])
            assert _rms(our_errors) <= 2 * max(_rms(their_errors), _rms(same_rows)) + 2**-23, name
            assert our_errors.max() <= 4 * their_errors.max() + 1e-6, name


def _reference_errors(case: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
    given = gates_and_gradients(**case, dtype=dtype, backend="torch")
    exact = gates_and_gradients(**case, dtype=torch.float64, backend="torch")
    return row_errors(given, exact)


def _but_the_worst(errors: list[Tensor]) -> Tensor:
    return torch.cat(errors).sort().values[:-1]


def _rms(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())


def random_case(rows: int, n: int, masked: bool = False, **options: Any) -> dict[str, Any]:
    """Random inputs; the cotangent has a mean of 1, so that few dk cancel."""
    return {
        "s": torch.randn(rows, n, device=DEVICE),
        "k": torch.rand(rows, dtype=torch.float64, device=DEVICE) * min(n, 8) + 0.5,
        "cotangent": torch.randn(rows, n, device=DEVICE) + 1,
        "mask": torch.rand(rows, n, device=DEVICE) < 0.7 if masked else None,
        **options,
    }


# ---- Values and gradients ----


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_gates_and_gradients(path: str, schedule: Schedule) -> None:
    shapes = ((63, False), (111, True), (70, False))
    compare([random_case(64, n, masked, n_iters=4, schedule=schedule) for n, masked in shapes], rows=4)


def test_one_iteration(path: str) -> None:
    compare([random_case(64, 100, n_iters=1)])


def test_tiles_of_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_rows(monkeypatch, 32, most_tiles=2)
    compare([random_case(64, 150, masked=True, n_iters=3)], rows=4)


def test_float64(path: str) -> None:
    steep, slow = SCHEDULES["steep"], SCHEDULES["slow"]
    cases = [
        random_case(2, 37, n_iters=5, schedule=steep),
        random_case(1, 21, masked=True, n_iters=3, schedule=slow),
        random_case(2, 30, n_iters=1, schedule=slow),
    ]
    compare(cases, torch.float64)


def test_a_row_that_several_warps_share() -> None:
    compare([random_case(64, 2500, n_iters=3, schedule=SCHEDULES["constant"])])


def test_float32_gradient_error_after_many_iterations() -> None:
    case = random_case(4, 512, n_iters=50, schedule=SCHEDULES["steep"])
    case["k"].fill_(64.0)
    exact = gates_and_gradients(**case, dtype=torch.float64, backend="torch")
    given = gates_and_gradients(**case, dtype=torch.float32)
    assert float((given[1] - exact[1]).norm() / exact[1].norm()) < 1e-6


def test_more_iterations_than_the_backward_prepares_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_rows(monkeypatch, 64)
    cases = [random_case(64, 40, n_iters=11, schedule=schedule) for schedule in SCHEDULES.values()]
    compare(cases, rows=3)


@pytest.mark.parametrize(
    ("spread", "offset"), [(0.1, 0.5), (10.0, 0.0), (100.0, 0.0), (1.0, -1000.0)], ids=str
)
def test_spreads_and_offsets(path: str, spread: float, offset: float) -> None:
    case = random_case(64, 70, n_iters=4, schedule=SCHEDULES["constant"])
    case["s"] = case["s"] * spread + offset
    # The wider the scores, the fewer rows hold most of the error: it takes more to compare.
    compare([case], rows=16)


def test_temperatures_are_those_of_the_schedule() -> None:
    for eps, eps_init, eps_decay in ((0.1, 0.1, 1.0), (0.03, 4.0, 0.7), (0.5, 1.0, 0.95), (0.1, 0.3, 1.0)):
        compare([random_case(2, 20, n_iters=9, schedule=(eps, eps_init, eps_decay))], torch.float64)


# ---- Edges ----


@pytest.mark.parametrize("n_iters", [1, 5])
def test_one_score(path: str, n_iters: int) -> None:
    s = torch.tensor([[-3.0], [0.0], [5.0]], device=DEVICE)
    k = torch.ones(3, dtype=torch.float64, device=DEVICE)
    case = {"s": s, "k": k, "cotangent": torch.randn_like(s), "n_iters": n_iters}
    given = gates_and_gradients(**case, dtype=torch.float32)
    exact = gates_and_gradients(**case, dtype=torch.float64, backend="torch")
    for ours, theirs in zip(given, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_budget_beyond_n(path: str) -> None:
    s = torch.randn(1, 90, device=DEVICE)
    for k in (90, 1000):
        given, expected = descend(s, k, n_iters=6), descend(s, k, n_iters=6, backend="torch")
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n_iters", [1, 4])
def test_rows_without_choice_or_budget(path: str, n_iters: int) -> None:
    s = torch.randn(5, 70, device=DEVICE)
    s[2] = -math.inf
    s.requires_grad_()
    k = torch.tensor([2.0, 2.0, 2.0, 0.0, -1.0], device=DEVICE, requires_grad=True)
    mask = torch.ones(5, 70, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    gates = descend(s, k, n_iters=n_iters, mask=mask)
    gates.backward(torch.randn_like(gates))
    assert s.grad is not None
    assert k.grad is not None
    for values in (gates, s.grad, k.grad):
        assert values.isfinite().all()
        assert not values[1:].any()
        assert values[0].any()


def test_minus_infinity_is_masked(path: str) -> None:
    s = torch.randn(2, 100, device=DEVICE)
    mask = torch.rand(2, 100, device=DEVICE) < 0.6
    case = {"k": torch.full((2,), 9.0, dtype=torch.float64, device=DEVICE), "cotangent": torch.randn_like(s)}
    given = gates_and_gradients(s.masked_fill(~mask, -math.inf), **case, dtype=torch.float32)
    expected = gates_and_gradients(s, **case, dtype=torch.float32, mask=mask)
    for ours, theirs in zip(given, expected, strict=True):
        assert torch.equal(ours, theirs)


@all_nan
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("n_iters", [1, 4])
def test_nan_poisons_its_row_alone(path: str, n_iters: int, backend: str) -> None:
    s = torch.randn(3, 100, device=DEVICE)
    s[1, 80] = math.nan
    s.requires_grad_()
    k = torch.full((3,), 5.0, device=DEVICE, requires_grad=True)
    gates = descend(s, k, n_iters=n_iters, backend=backend)
    gates.backward(torch.randn_like(gates))
    assert s.grad is not None
    assert k.grad is not None
    for values in (gates, s.grad, k.grad):
        assert values[1].isnan().all()
        assert values[[0, 2]].isfinite().all()
    mask = torch.ones(3, 100, dtype=torch.bool, device=DEVICE)
    mask[1, 80] = False
    assert descend(s, k, n_iters=n_iters, mask=mask, backend=backend).isfinite().all()


def test_nan_budget_poisons_its_row_alone(path: str) -> None:
    gates = descend(torch.randn(2, 90, device=DEVICE), torch.tensor([math.nan, 3.0], device=DEVICE))
    assert gates[0].isnan().all()
    assert gates[1].isfinite().all()


def test_plus_infinity_is_always_chosen(path: str) -> None:
    s = torch.randn(100, device=DEVICE)
    s[80] = math.inf
    gates = descend(s, 5, n_iters=5)
    assert gates[80] == 1
    torch.testing.assert_close(gates, descend(s, 5, n_iters=5, backend="torch"))


def test_equal_scores_and_ties_at_the_threshold(path: str) -> None:
    equal = torch.full((2, 100), 0.3, device=DEVICE)
    gates = descend(equal, 40, n_iters=8, schedule=SCHEDULES["constant"])
    torch.testing.assert_close(gates, torch.full_like(gates, 0.4))
    case = random_case(64, 70, n_iters=4, schedule=SCHEDULES["constant"])
    case["s"] = case["s"].mul(2).round().div(2)
    compare([case])


def test_nothing_underflows_when_all_scores_are_far_below_the_threshold(path: str) -> None:
    s = torch.full((1, 90), -1e4, device=DEVICE) - torch.arange(90, device=DEVICE)
    case = {"s": s, "k": torch.ones(1, dtype=torch.float64, device=DEVICE), "cotangent": torch.randn_like(s)}
    schedule = (0.01, None, 1.0)
    given = gates_and_gradients(**case, dtype=torch.float32, n_iters=5, schedule=schedule)
    exact = gates_and_gradients(**case, dtype=torch.float64, n_iters=5, schedule=schedule, backend="torch")
    for ours, theirs in zip(given, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# ---- How tensors lie in memory ----


def test_strides_and_broadcasts(path: str) -> None:
    s = torch.randn(70, 3, 2, device=DEVICE).permute(2, 1, 0)
    mask = torch.rand(2, 1, 70, device=DEVICE) < 0.7
    k = (torch.rand(2, 1, dtype=torch.float64, device=DEVICE) * 8 + 1).expand(2, 3)
    # A gradient with strides of its own, and one that is the same for a whole row, as that of a sum is.
    for cotangent in (torch.randn(2, 70, 3, device=DEVICE).mT, torch.randn(2, 3, 1, device=DEVICE)):
        wide = cotangent.expand(2, 3, 70)
        given = gates_and_gradients(s, k, wide, torch.float32, mask=mask)
        copies = (s.contiguous(), k.contiguous(), wide.contiguous())
        expected = gates_and_gradients(*copies, torch.float32, mask=mask.expand(2, 3, 70).contiguous())
        for ours, theirs in zip(given, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    every_other = torch.randn(1, 140, device=DEVICE)[:, ::2]
    given, expected = (descend(x, 5) for x in (every_other, every_other.contiguous()))
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_dtypes_compute_in_float32(path: str, dtype: torch.dtype) -> None:
    case = random_case(2, 100, masked=True)
    case["s"], case["cotangent"] = case["s"].to(dtype).float(), case["cotangent"].to(dtype).float()
    narrow = gates_and_gradients(**case, dtype=dtype)
    wide = gates_and_gradients(**case, dtype=torch.float32)
    # The interpreter cuts off where a GPU rounds to bfloat16.
    loose = 2**-7 if DEVICE == "cpu" and dtype == torch.bfloat16 else 0.0
    for ours, theirs in zip(narrow[:2], wide[:2], strict=True):
        torch.testing.assert_close(ours, theirs.to(dtype).double(), rtol=loose, atol=0.0)
    assert torch.equal(narrow[2], wide[2])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    s = torch.randn(shape, device=DEVICE, requires_grad=True)
    gates = descend(s, torch.ones(shape[:-1], device=DEVICE, requires_grad=True))
    assert gates.shape == shape
    gates.sum().backward()
    assert s.grad is not None
    assert s.grad.shape == shape


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills whatever is allocated uninitialised with NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
def test_poisoned_allocations_change_nothing(path: str) -> None:
    case = random_case(2, 100, masked=True, n_iters=3)
    assert torch.empty(3, device=DEVICE).isnan().all()
    poisoned = gates_and_gradients(**case, dtype=torch.float32)
    torch.use_deterministic_algorithms(False)
    for ours, theirs in zip(poisoned, gates_and_gradients(**case, dtype=torch.float32), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.isfinite().all()


def test_two_runs_give_the_same_bits(path: str) -> None:
    case = random_case(2, 100, masked=True)
    for first, second in zip(
        *(gates_and_gradients(**case, dtype=torch.float32) for _ in range(2)), strict=True
    ):
        assert torch.equal(first, second)


def test_rows_do_not_depend_on_their_batch(path: str) -> None:
    case = random_case(11, 96)
    together = gates_and_gradients(**case, dtype=torch.float32)
    for i in (0, 10):
        row = {name: value[i : i + 1] for name, value in case.items() if value is not None}
        alone = gates_and_gradients(**row, dtype=torch.float32)
        for ours, theirs in zip(alone, together, strict=True):
            assert torch.equal(ours[0], theirs[i])


# ---- The op ----


@pytest.mark.parametrize("tile", [None, 32], ids=["rows", "tiles"])
def test_opcheck(monkeypatch: pytest.MonkeyPatch, tile: int | None) -> None:
    if tile is not None:
        cut_rows(monkeypatch, tile)
    op = torch.ops.xlroute.coordinate_descent.default
    s = torch.randn(1, 2, 40, device=DEVICE, requires_grad=True)
    k = torch.rand(1, 2, dtype=torch.float64, device=DEVICE).add_(1.0).requires_grad_()
    mask = torch.rand(40, device=DEVICE) < 0.7
    torch.library.opcheck(op, (s, k, mask, 2, 0.1, 1.0, 0.5, "triton"))


def test_state_is_that_of_the_reference(path: str) -> None:
    case = random_case(4, 100, masked=True)
    arguments = (case["s"], case["k"], case["mask"], 5, 0.1, 1.0, 0.7)
    _, given = descent._forward(*arguments, "triton")
    _, expected = descent._forward(*arguments, "torch")
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)


def test_one_launch_equals_many(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a CPU only rows of one tile: a program would wait for ever for others to start.
    n = 300 if DEVICE == "cuda" else 60
    cut_rows(monkeypatch, 64)
    case = random_case(3, n, masked=True, n_iters=6)
    monkeypatch.setattr(descent_triton, "_programs_at_once", lambda device, warps: 0)
    many = gates_and_gradients(**case, dtype=torch.float32)
    monkeypatch.setattr(descent_triton, "_programs_at_once", lambda device, warps: 64)
    for ours, theirs in zip(gates_and_gradients(**case, dtype=torch.float32), many, strict=True):
        assert torch.equal(ours, theirs)


def test_rows_and_tiles_cover_any_length() -> None:
    for dtype in (torch.float32, torch.float64):
        for n in (1, 2, 15, 16, 17, 100, 512, 513, 1024, 5000, 8192, 16384, 32768):
            block = descent_triton.row_block(n, dtype, descent_triton.LARGEST_ROW)
            if block is None:
                assert dtype == torch.float64
                assert n > descent_triton.LARGEST_ROW // 4
                continue
            assert block.depth * block.columns >= n
            assert block.columns <= block.warps * 128
            assert block.warps <= 16
        for n in (32769, 100_000, 1 << 20, (1 << 27) - 1, 1 << 27, (1 << 31) + 5):
            for tile in (descent_triton.TILE, descent_triton.TILE_BACKWARD):
                block, n_blocks, n_tiles = descent_triton.tile_block(n, dtype, tile)
                elements = block.depth * block.columns * n_blocks
                assert elements * (n_tiles - 1) < n <= elements * n_tiles
                assert n_tiles <= descent_triton.MOST_TILES


# ---- On a GPU ----


@on_gpu
@pytest.mark.parametrize(("rows", "n"), [(16, 131_072), (2, 1_048_576), (3, 40_001)])
def test_long_rows(monkeypatch: pytest.MonkeyPatch, rows: int, n: int) -> None:
    case = random_case(rows, n, masked=True, n_iters=20, schedule=SCHEDULES["constant"])
    case["k"] *= 100
    compare([case], rows=rows)
    monkeypatch.setattr(descent_triton, "_programs_at_once", lambda device, warps: 0)
    many = gates_and_gradients(**case, dtype=torch.float32)
    monkeypatch.undo()
    for _ in range(3):
        for ours, theirs in zip(gates_and_gradients(**case, dtype=torch.float32), many, strict=True):
            assert torch.equal(ours, theirs)


@on_gpu
@pytest.mark.parametrize(
    ("rows", "n"), [(1, 40), (70_000, 8), (4096, 512), (300, 1000), (5, 16_384), (5, 32_768)]
)
def test_many_shapes(rows: int, n: int) -> None:
    # Of a few rows it would be chance how far off they are.
    draws = max(1, 64 // rows) if n < 1000 else 1
    cases = [random_case(rows, n, masked=True, n_iters=20, schedule=SCHEDULES["steep"]) for _ in range(draws)]
    compare(cases, rows=rows)


@on_gpu
def test_past_2_to_the_31_elements() -> None:
    rows, n = 17, 1 << 27
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB")
    s = torch.randn(rows, n, dtype=torch.float16, device=DEVICE).requires_grad_()
    k = torch.full((rows,), 1e5, device=DEVICE, requires_grad=True)
    cotangent = torch.randn(1, n, dtype=torch.float16, device=DEVICE).expand(rows, n)
    gates = descend(s, k, n_iters=3)
    ds, dk = torch.autograd.grad(gates, (s, k), cotangent)
    last = s.detach()[-1:].clone().requires_grad_()
    budget = k.detach()[-1:].clone().requires_grad_()
    expected = descend(last, budget, n_iters=3, backend="torch")
    expected_ds, expected_dk = torch.autograd.grad(expected, (last, budget), cotangent[-1:])
    torch.testing.assert_close(gates[-1:], expected)
    torch.testing.assert_close(ds[-1:], expected_ds)
    torch.testing.assert_close(dk[-1:], expected_dk)


@on_gpu
@pytest.mark.parametrize("n", [500, 100_000])
def test_compiles_as_one_graph(n: int) -> None:
    case = random_case(4, n, masked=True)
    s, k = case["s"].requires_grad_(), case["k"].requires_grad_()
    compiled: Callable[..., Tensor] = torch.compile(descend, fullgraph=True)
    for options in ({"mask": case["mask"]}, {}):
        given, expected = compiled(s, k, **options), descend(s, k, **options)
        assert torch.equal(given, expected)
        for ours, theirs in zip(
            *(torch.autograd.grad(gates, (s, k), case["cotangent"]) for gates in (given, expected)),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


@on_gpu
@pytest.mark.parametrize("n", [500, 100_000])
def test_cuda_graph(n: int) -> None:
    case = random_case(4, n)
    s, k, cotangent = case["s"].requires_grad_(), case["k"].requires_grad_(), case["cotangent"]

    def run() -> tuple[Tensor, ...]:
        gates = descend(s, k)
        return gates.detach(), *torch.autograd.grad(gates, (s, k), cotangent)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        with torch.no_grad():
            s.copy_(torch.randn_like(s))
            cotangent.copy_(torch.randn_like(cotangent))
        graph.replay()
        replayed = [x.clone() for x in captured]
        for ours, theirs in zip(replayed, run(), strict=True):
            assert torch.equal(ours, theirs)
