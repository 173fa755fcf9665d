"""unit_projections against float64: in Triton, only the result is rounded."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute.kernels import projections, unit_projections

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
Project = Callable[[Tensor, Tensor, Tensor], None]
SIZES = ("b", "m", "d", "r", "e")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the kernel, with few rows a program. Nothing may fall back to the reference."""
    kernels = pytest.importorskip("xlroute.kernels.projections_triton", exc_type=ImportError)
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "ROWS", 16)
    monkeypatch.setattr(projections, "_reference", None)
    return kernels


@pytest.fixture(params=["torch", "triton"])
def project(request: pytest.FixtureRequest) -> Project:
    """unit_projections by one backend."""
    if request.param == "triton":
        request.getfixturevalue("kernels")
    return partial(unit_projections, backend=request.param)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def nothing(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype, device=DEVICE)


def exactly(rows: Tensor, projection: Tensor) -> Tensor:
    """In float64, of the projection as it is rounded: [b, r, m, e]."""
    rounded = projection.to(torch.bfloat16 if rows.dtype == torch.bfloat16 else torch.float32)
    products = torch.einsum("bmd,red->brme", rows.double(), rounded.double())
    return products / products.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-10)


def furthest(given: Tensor, exact: Tensor) -> float:
    """The largest distance of a projection from its exact one; these have length 1."""
    return (given.double() - exact).norm(dim=-1).max().item()


def wide_error(rows: Tensor, projection: Tensor, exact: Tensor) -> float:
    """How far the formula in float32 is from float64."""
    rounded = projection.to(rows.dtype if rows.dtype == torch.bfloat16 else torch.float32).float()
    products = torch.einsum("bmd,red->brme", rows.float(), rounded)
    return furthest(products / products.norm(dim=-1, keepdim=True), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    SIZES,
    [
        (2, 37, 40, 2, 20),
        (1, 16, 128, 1, 64),
        (3, 5, 333, 3, 16),
        (1, 3, 7, 5, 100),  # of the last group of two sets, one is missing
        (2, 17, 64, 4, 128),
        (1, 2, 1, 1, 1),
    ],
)
def test_is_exact_but_for_rounding(
    kernels: Any, b: int, m: int, d: int, r: int, e: int, dtype: torch.dtype
) -> None:
    rows, projection = random(b, m, d, dtype=dtype), random(r, e, d)
    exact = exactly(rows, projection)
    # Tensor cores cut off what sums in float32 would round.
    times = 16 if DEVICE == "cuda" and dtype == torch.bfloat16 else 2
    # And of so few numbers, the error of the formula may be small by chance.
    error = times * wide_error(rows, projection, exact) + 4 * torch.finfo(torch.float32).eps
    for kept in {torch.float32, dtype}:
        out = nothing(b, r, m, e, dtype=kept)
        unit_projections(rows, projection, out, backend="triton")
        # The interpreter cuts off where it should round to bfloat16.
        roundings = 1.0 if DEVICE == "cpu" and kept == torch.bfloat16 else 0.5
        assert furthest(out, exact) <= error + roundings * torch.finfo(kept).eps


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_reference(dtype: torch.dtype) -> None:
    rows, projection = random(2, 90, 40, dtype=dtype), random(3, 20, 40)
    out = nothing(2, 3, 90, 20, dtype=dtype)
    unit_projections(rows, projection, out, backend="torch")
    exact = exactly(rows, projection)
    if dtype == torch.float64:
        assert furthest(out, exact) <= 1e-13
    else:
        roundings = 4 if dtype == torch.bfloat16 else 0.5
        bound = roundings * torch.finfo(dtype).eps + 2 * wide_error(rows, projection, exact)
        assert furthest(out, exact) <= bound + torch.finfo(torch.float32).eps


def test_slices_of_longer_buffers(project: Project) -> None:
    rows, projection = random(2, 19, 28), random(2, 24, 28)
    expected = nothing(2, 2, 19, 24)
    project(rows, projection, expected)
    buffer = nothing(2, 50, 40)
    buffer[:, 7:26, 4:32] = rows
    buffer[:, 27:46, 3:31] = rows
    for given in (buffer[:, 7:26, 4:32], buffer[:, 27:46, 3:31], rows.mT.contiguous().mT):
        for laid_out in (
            nothing(2, 2, 60, 24),
            nothing(2, 2, 24, 60).mT,
            nothing(2, 60, 2, 24).transpose(1, 2),
        ):
            project(given, projection.mT.contiguous().mT, laid_out[:, :, 30:49])
            torch.testing.assert_close(laid_out[:, :, 30:49], expected)
            assert laid_out[:, :, :30].isnan().all()
            assert laid_out[:, :, 49:].isnan().all()


def test_one_stream_repeated(project: Project) -> None:
    rows, projection = random(1, 5, 8), random(1, 16, 8)
    out = nothing(3, 1, 5, 16)
    project(rows.expand(3, 5, 8), projection, out)
    alone = nothing(1, 1, 5, 16)
    project(rows, projection, alone)
    torch.testing.assert_close(out, alone.expand(3, 1, 5, 16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_projection_and_result_of_another_type(project: Project, dtype: torch.dtype) -> None:
    rows, projection = random(1, 20, 24), random(2, 16, 24, dtype=dtype)
    out = nothing(1, 2, 20, 16, dtype=torch.float16)
    project(rows, projection, out)
    assert furthest(out, exactly(rows, projection)) <= 0.6 * torch.finfo(torch.float16).eps


def test_rows_of_zeros_and_short_ones(project: Project) -> None:
    rows, projection = random(1, 6, 24), random(2, 16, 24)
    rows[0, 2] = 0
    rows[0, 4] *= 1e-15
    out = nothing(1, 2, 6, 16)
    project(rows, projection, out)
    assert (out[:, :, 2] == 0).all()
    products = torch.einsum("d,red->re", rows[0, 4].double(), projection.double())
    torch.testing.assert_close(out[0, :, 4], (products / 1e-10).float(), rtol=1e-4, atol=1e-9)
    assert (out[0, :, 4].norm(dim=-1) < 1e-2).all()
    others = [0, 1, 3, 5]
    torch.testing.assert_close(out[:, :, others].norm(dim=-1), torch.ones(1, 2, 4, device=DEVICE))


# The interpreter warns of what it computes.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_no_number_stays_none(project: Project) -> None:
    rows, projection = random(1, 6, 24), random(2, 20, 24)
    expected = nothing(1, 2, 6, 20)
    project(rows, projection, expected)
    rows[0, 1, 3] = math.nan
    out = nothing(1, 2, 6, 20)
    project(rows, projection, out)
    assert out[:, :, 1].isnan().all()
    others = [0, 2, 3, 4, 5]
    torch.testing.assert_close(out[:, :, others], expected[:, :, others])
    projection[1, 7, 5] = math.nan
    project(rows, projection, out)
    assert out[:, 1].isnan().all()
    torch.testing.assert_close(out[:, 0, others], expected[:, 0, others])


def test_products_of_float16_do_not_overflow(project: Project) -> None:
    rows, projection = 1e4 * random(1, 9, 24, dtype=torch.float16), 1e3 * random(1, 16, 24)
    out = nothing(1, 1, 9, 16, dtype=torch.float16)
    project(rows, projection, out)
    assert furthest(out, exactly(rows, projection)) <= 0.6 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing(backend: Any) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    for empty in SIZES:
        b, m, d, r, e = (0 if name == empty else 3 for name in SIZES)
        out = nothing(b, r, m, e)
        unit_projections(random(b, m, d), random(r, e, d), out, backend=backend)
        assert (out == 0).all()  # of rows of no columns; else there is none


@pytest.mark.parametrize(("dtype", "e"), [(torch.float64, 5), (torch.float32, 300)], ids=str)
def test_what_the_kernel_does_not_project(dtype: torch.dtype, e: int) -> None:
    kernels = pytest.importorskip("xlroute.kernels.projections_triton", exc_type=ImportError)
    rows, projection = random(1, 4, 6, dtype=dtype), random(1, e, 6)
    assert not kernels.can_project(rows, projection)
    assert kernels.can_project(rows.float(), projection[:, :256])
    ours, wanted = nothing(1, 1, 4, e, dtype=dtype), nothing(1, 1, 4, e, dtype=dtype)
    unit_projections(rows, projection, ours, backend="triton")
    unit_projections(rows, projection, wanted, backend="torch")
    assert torch.equal(ours, wanted)


def test_tf32_is_used_where_matrix_products_use_it() -> None:
    kernels = pytest.importorskip("xlroute.kernels.projections_triton", exc_type=ImportError)
    before = torch.get_float32_matmul_precision()
    try:
        for precision, tf32 in (("high", True), ("highest", False)):
            torch.set_float32_matmul_precision(precision)
            assert kernels._allows_tf32() is tf32
    finally:
        torch.set_float32_matmul_precision(before)
    for dtype, tf32, expected in (
        (torch.float32, False, "ieee"),
        (torch.float32, True, "tf32"),
        (torch.float16, False, "ieee"),
    ):
        assert kernels.constants(1, 64, 512, dtype, tf32)["PRECISION"] == expected


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch has one name for it"
)
def test_tf32_by_its_newer_name() -> None:
    kernels = pytest.importorskip("xlroute.kernels.projections_triton", exc_type=ImportError)
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            products.fp32_precision = precision
            assert kernels._allows_tf32() is (precision == "tf32")
    finally:
        products.fp32_precision = before


def test_carries_no_graph(project: Project) -> None:
    rows, projection = random(1, 4, 6).requires_grad_(), random(1, 5, 6).requires_grad_()
    out = nothing(1, 1, 4, 5)
    project(rows, projection, out)
    assert not out.requires_grad


def test_autocast_changes_nothing(project: Project) -> None:
    rows, projection = random(1, 9, 16), random(2, 5, 16)
    expected, out = nothing(1, 2, 9, 5), nothing(1, 2, 9, 5)
    project(rows, projection, expected)
    with torch.autocast(DEVICE, torch.bfloat16):
        project(rows, projection, out)
    assert torch.equal(out, expected)


def test_compiles_for_changing_sizes() -> None:
    def run(rows: Tensor, projection: Tensor) -> Tensor:
        out = rows.new_zeros(2, 1, rows.shape[1] + 4, 5)
        unit_projections(rows, projection, out[:, :, 1 : 1 + rows.shape[1]])
        return out

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    projection = random(1, 5, 6)
    for m in (9, 12, 15):
        rows = random(2, m, 6)
        assert torch.equal(compiled(rows, projection), run(rows, projection))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    op = torch.ops.xlroute.unit_projections.default
    rows, projection = random(2, 9, 8), random(2, 5, 8)
    torch.library.opcheck(op, (rows, projection, random(2, 2, 9, 5), backend))
    sliced = (rows.half()[:, 2:7], projection, random(2, 2, 9, 5)[:, :, 1:6], backend)
    torch.library.opcheck(op, sliced)


def test_errors() -> None:
    rows, projection, out = random(2, 3, 4), random(2, 5, 4), random(2, 2, 3, 5)
    for given, message in (
        ((rows.long(), projection, out), "rows must be a floating-point tensor, got dtype torch.int64"),
        ((rows, [1.0], out), "projection must be a floating-point tensor, got list"),
        ((rows, projection, out.int()), "out must be a floating-point tensor, got dtype torch.int32"),
    ):
        with pytest.raises(TypeError, match=message):
            unit_projections(*given)  # type: ignore[arg-type]
    meta = "must be on the device of rows, .*, got meta"
    for moved, message in (
        ((rows, projection.to("meta"), out), f"projection {meta}"),
        ((rows, projection, out.to("meta")), f"out {meta}"),
        ((rows[0], projection, out), r"must share d, got shapes \(3, 4\) and \(2, 5, 4\)"),
        ((rows, projection[0], out), r"must share d, got shapes \(2, 3, 4\) and \(5, 4\)"),
        ((rows, projection[..., 1:], out), r"must share d, got shapes \(2, 3, 4\) and \(2, 5, 3\)"),
        ((rows, projection, out.mT), r"out must have shape \(2, 2, 3, 5\), got \(2, 2, 5, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            unit_projections(*moved)


@pytest.mark.usefixtures("no_interpreter")
def test_backend_errors() -> None:
    with pytest.raises(ValueError, match="backend='triton' needs a CUDA tensor, got a tensor on cpu"):
        unit_projections(
            torch.randn(1, 2, 3), torch.randn(1, 4, 3), torch.empty(1, 1, 2, 4), backend="triton"
        )


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    SIZES, [(3, 10_007, 512, 2, 64), (1, 40_000, 2048, 4, 128), (2, 5_000, 1000, 3, 100)]
)
def test_many_rows(kernels: Any, b: int, m: int, d: int, r: int, e: int, dtype: torch.dtype) -> None:
    rows, projection = random(b, m, d, dtype=dtype), random(r, e, d)
    out = nothing(b, r, m, e, dtype=dtype)
    unit_projections(rows, projection, out)
    exact = exactly(rows, projection)
    bound = torch.finfo(dtype).eps / 2 + 2 * wide_error(rows, projection, exact)
    assert furthest(out, exact) <= bound


@needs_gpu
def test_beyond_2_to_the_31_elements() -> None:
    """Of rows and of the result."""
    rows = torch.empty(3, 1 << 21, 512, dtype=torch.bfloat16, device=DEVICE).normal_()
    projection = random(4, 96, 512)
    out = nothing(3, 4, 1 << 21, 96, dtype=torch.bfloat16)
    unit_projections(rows, projection, out)
    for i in range(3):
        part = slice(-1000, None) if i else slice(1000)
        alone = nothing(1, 4, 1000, 96, dtype=torch.bfloat16)
        unit_projections(rows[i : i + 1, part].clone(), projection, alone, backend="torch")
        torch.testing.assert_close(out[i : i + 1, :, part], alone, rtol=0.03, atol=0.01)
        assert out[i].isfinite().all()


@needs_gpu
def test_cuda_graph() -> None:
    rows, projection = random(1, 500, 64), random(2, 32, 64)
    out, expected = nothing(1, 2, 500, 32), nothing(1, 2, 500, 32)
    unit_projections(rows, projection, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        unit_projections(rows, projection, out)
    for _ in range(3):
        rows.normal_()
        graph.replay()
        unit_projections(rows, projection, expected)
        assert torch.equal(out, expected)
