"""gather and scatter in Triton, against the reference; in Triton's interpreter where there is no GPU."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from xlroute.kernels import (
    gather,
    gather_gated_rows,
    gather_pinned_rows,
    gather_rows,
    gather_rows_apart,
    gather_rows_at,
    gather_triton,
    row_places,
    row_scores,
    scatter_rows,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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


def distinct(b: int, n: int, k: int) -> Tensor:
    """Places [b, k] of which some are -1."""
    places = torch.stack([torch.randperm(n, device=DEVICE)[:k] for _ in range(b)])
    return places.masked_fill_(torch.rand(b, k, device=DEVICE) < 0.2, -1)


def both(function: Any, inputs: tuple[Tensor, ...], *rest: Tensor) -> list[tuple[Tensor, ...]]:
    """Outputs and gradients of the reference and of Triton, for the same cotangents."""
    results = []
    cotangents: list[Tensor] | None = None
    for backend in ("torch", "triton"):
        leaves = tuple(x.detach().requires_grad_() for x in inputs)
        outputs = function(*leaves, *rest, backend)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        cotangents = cotangents or [torch.randn_like(out) for out in outputs]
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, cotangents)))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(50, 33, 21), (9, 130, 40), (4, 1500, 3), (0, 8, 2), (5, 8, 0)], ids=str)
def test_gather_from_the_host(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, d, k = shape
    x, indices = randn(m, d, dtype=dtype).cpu(), torch.randint(-1, m, (k,))
    pinned = x.pin_memory() if DEVICE == "cuda" else x
    given = gather_pinned_rows(pinned, indices.to(DEVICE))
    assert given.device.type == DEVICE
    assert torch.equal(given.cpu(), gather_rows(x[None], indices[None])[0])
    # Part of a larger buffer.
    given = gather_pinned_rows(pinned[m // 2 :], (indices - m // 2).clamp(min=-1).to(DEVICE))
    expected = gather_rows(x[None], indices.masked_fill(indices < m // 2, -1)[None])[0]
    assert torch.equal(given.cpu(), expected)


@needs_gpu
def test_rows_on_the_host_may_go_before_they_are_read() -> None:
    x, indices = torch.randn(4096, 64), torch.randint(4096, (1000,), device=DEVICE)
    gather_pinned_rows(x.pin_memory(), indices)
    torch.cuda.synchronize()
    pinned = x.pin_memory()
    torch.cuda._sleep(100_000_000)
    rows = gather_pinned_rows(pinned, indices)
    del pinned
    torch.zeros(4096, 64).pin_memory()
    assert torch.equal(rows.cpu(), x[indices.cpu()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 50, 33, 3, 7), (1, 1, 1, 1, 1), (3, 9, 130, 2, 20), (1, 4, 1500, 1, 3)], ids=str
)
def test_gather(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    b, m, d, r, k = shape
    x, gates = randn(b, m, d, dtype=dtype), torch.rand(b, r, m, device=DEVICE)
    indices = torch.randint(-1, m, (b, r, k), device=DEVICE)
    expected, given = both(gather_gated_rows, (x, gates), indices)
    assert torch.equal(given[0], expected[0])
    assert torch.equal(given[1], expected[1])
    # Gradients add up in float32 and in order, also where the reference adds in the dtype of the rows.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(given[2], expected[2], rtol=16 * eps, atol=16 * eps)
    torch.testing.assert_close(given[3], expected[3])
    assert torch.equal(gather_rows(x, indices, "triton"), expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "start"), [(32, 0), (33, 0), (32, 3), (5, 1), (1504, 2)])
def test_gather_from_streams_that_lie_apart(d: int, start: int, dtype: torch.dtype) -> None:
    """Some at addresses that are no multiple of 16 bytes from each other."""
    streams = [randn(m + start * i, d, dtype=dtype)[start * i :] for i, m in enumerate((50, 0, 9, 1))]
    indices = torch.stack([torch.randint(-1, max(len(x), 0), (2, 7), device=DEVICE) for x in streams])
    given = gather_rows_apart(streams, indices, "triton")
    assert torch.equal(given, gather_rows_apart(streams, indices, "torch"))
    none = indices[:, :0]
    assert gather_rows_apart(streams, none, "triton").shape == (4, 0, 7, d)


@needs_gpu
def test_streams_that_lie_apart_in_a_graph() -> None:
    streams, indices = [randn(9, 8), randn(3, 8)], torch.randint(-1, 3, (2, 5), device=DEVICE)
    gather_rows_apart(streams, indices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = gather_rows_apart(streams, indices)
    indices.copy_(torch.randint(-1, 3, (2, 5), device=DEVICE))
    graph.replay()
    assert torch.equal(given, gather_rows_apart(streams, indices, "torch"))


def places_of(streams: list[Tensor]) -> tuple[Tensor, Tensor]:
    """See `row_places`, and how many rows there are; the streams begin at multiples of 16 bytes."""
    counts = [len(x) for x in streams]
    places = row_places([x.data_ptr() for x in streams], counts, streams[0].device)
    assert places is not None
    return torch.tensor(places, device=DEVICE), torch.tensor(counts, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "start"), [(32, 0), (33, 0), (32, 3), (1504, 2)])
def test_gather_from_where_rows_are(d: int, start: int, dtype: torch.dtype) -> None:
    streams = [randn(m + start * i, d, dtype=dtype)[start * i :] for i, m in enumerate((50, 0, 9, 1))]
    places = places_of(streams)
    for shape in ((7,), (2, 7), (3, 2, 5)):
        indices = torch.stack([torch.randint(-1, len(x), shape, device=DEVICE) for x in streams])
        indices[:, 0] = -1
        given = gather_rows_at(*places, indices, d, dtype)
        assert given.dtype == dtype
        assert torch.equal(given, gather_rows_apart(streams, indices, "torch"))
    spread = indices.movedim(-1, 1)
    assert torch.equal(gather_rows_at(*places, spread, d, dtype), gather_rows_apart(streams, spread, "torch"))
    assert gather_rows_at(*places, indices[:, :0], d, dtype).shape == (4, 0, 2, 5, d)
    # It reads what is there now.
    streams[0].copy_(randn(50, d, dtype=dtype))
    given = gather_rows_at(*places, indices, d, dtype)
    assert torch.equal(given, gather_rows_apart(streams, indices, "torch"))


def test_where_no_rows_are() -> None:
    streams = [randn(0, 8), randn(0, 8)]
    places = places_of(streams)
    assert places[0].tolist() == [0, 0]
    indices = torch.full((2, 3), -1, device=DEVICE)
    assert torch.equal(gather_rows_at(*places, indices, 8, torch.float32), streams[0].new_zeros(2, 3, 8))
    none = (each[:0] for each in places)
    assert gather_rows_at(*none, indices[:0], 8, torch.float32).shape == (0, 3, 8)


def test_indices_where_no_row_is() -> None:
    """Of a stream, whatever another holds: a row that is not there is not read, nor taken for -1."""
    streams = [randn(4, 8), randn(9, 8), randn(0, 8)]
    indices = torch.tensor([[3, 4, -1, -2], [4, 9, 8, 1 << 40], [0, -1, -(1 << 40), 5]], device=DEVICE)
    given = gather_rows_at(*places_of(streams), indices, 8, torch.float32)
    missing = torch.tensor([[0, 1, 0, 1], [0, 1, 0, 1], [1, 0, 1, 1]], dtype=torch.bool, device=DEVICE)
    assert torch.equal(given.isnan().all(-1), missing)
    assert torch.equal(given.isnan().any(-1), missing)
    expected = gather_rows_apart(streams, indices.masked_fill(missing, -1), "torch")
    assert torch.equal(given[~missing], expected[~missing])


def test_rows_past_2_to_the_31_elements() -> None:
    """Before and behind what places are counted from, by more than 32 bits tell."""
    rows = torch.from_numpy(np.zeros(((1 << 28) + 8, 8), np.float16)).to(DEVICE)  # a CPU makes room for few
    last = torch.randn(8, 8, device=DEVICE).half()
    rows[-8:] = last
    indices = torch.tensor([[len(rows) - 8, -1, len(rows) - 1], [7, 0, -1]], device=DEVICE)
    given = gather_rows_at(*places_of([rows, rows[-8:]]), indices, 8, torch.float16)
    none = torch.zeros_like(last[0])
    assert torch.equal(given, torch.stack((last[0], none, last[7], last[7], last[0], none)).view(2, 3, 8))


def test_rows_at_addresses_that_cannot_be_told() -> None:
    x, at = randn(9, 4), gather_triton.VECTOR
    address = x.data_ptr()
    assert row_places([address, address + 2 * at], [9, 7], x.device) is not None
    assert row_places([address, address + 4], [9, 7], x.device) is None
    # Nothing is read of a stream that is empty, wherever it is.
    assert row_places([address, address + 4], [9, 0], x.device) is not None
    with pytest.raises(ValueError, match="shorter"):
        row_places([address, address], [9], x.device)


def test_bad_arguments_of_rows_that_are_somewhere() -> None:
    x = [randn(9, 4), randn(3, 4)]
    places, indices = places_of(x), torch.zeros(2, 5, dtype=torch.int64, device=DEVICE)
    for wrong in range(2):
        for bad, error in (
            (places[wrong].int(), TypeError),
            (places[wrong][:1], ValueError),
            (places[wrong][None], ValueError),
            (places[wrong].to("meta"), ValueError),
        ):
            given = [*places]
            given[wrong] = bad
            with pytest.raises(error, match=f"{('places', 'counts')[wrong]} must"):
                gather_rows_at(*given, indices, 4, torch.float32)
    with pytest.raises(TypeError, match="int64"):
        gather_rows_at(*places, indices.int(), 4, torch.float32)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU needs no interpreter")
@pytest.mark.usefixtures("no_interpreter")
def test_rows_of_a_cpu_are_known_by_where_they_are_in_the_interpreter_alone() -> None:
    x = [randn(9, 4)]
    places, indices = places_of(x), torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="needs a CUDA tensor"):
        gather_rows_at(*places, indices, 4, torch.float32)


def test_threads_count_places_from_one_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are the first to ask, at the same time."""
    monkeypatch.setattr(gather, "_origins", {})
    x, empty, both_ask = randn(9, 4), torch.empty, threading.Barrier(2, timeout=20)

    def late(*size: Any, **options: Any) -> Tensor:
        both_ask.wait()
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", late)
    with ThreadPoolExecutor(2) as threads:
        found = [*threads.map(lambda _: row_places([x.data_ptr()], [9], x.device), range(2))]
    assert found == [places_of([x])[0].tolist()] * 2


@needs_gpu
def test_rows_that_a_graph_reads_anew() -> None:
    """It is told where they are each time that it runs."""
    streams, indices = [randn(9, 8), randn(3, 8)], torch.randint(-1, 3, (2, 5), device=DEVICE)
    places = places_of(streams)
    gather_rows_at(*places, indices, 8, torch.float32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = gather_rows_at(*places, indices, 8, torch.float32)
    others = [randn(5, 8), randn(20, 8)]
    for ours, theirs in zip(places, places_of(others), strict=True):
        ours.copy_(theirs)
    indices.copy_(torch.stack([torch.randint(-1, n, (5,), device=DEVICE) for n in (5, 20)]))
    graph.replay()
    assert torch.equal(given, gather_rows_apart(others, indices, "torch"))


def test_straight_through() -> None:
    x, gates = randn(2, 9, 5), torch.rand(2, 2, 9, device=DEVICE)
    gates[0, 0, 3] = math.nan
    indices = torch.randint(-1, 9, (2, 2, 20), device=DEVICE)
    indices[0, 0, :2] = torch.tensor([3, -1])

    def gather(x: Tensor, gates: Tensor, indices: Tensor, backend: Any) -> tuple[Tensor, Tensor]:
        return gather_gated_rows(x, gates, indices, backend, straight_through=True)

    expected, given = both(gather, (x, gates), indices)
    for ours, theirs in zip(given[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(given[2:], expected[2:])
    ones = torch.where(indices < 0, 0.0, 1.0)
    ones[0, 0] = torch.where(indices[0, 0] == 3, math.nan, ones[0, 0])
    torch.testing.assert_close(given[1], ones, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("k", [3, 1030 if DEVICE == "cuda" else 150])
def test_gradients_of_one_row_add_up_in_order(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather_triton, "INDICES", 64)  # so that several blocks are compared
    x = randn(1, 3, 5).requires_grad_()
    indices = torch.full((1, k), 1, device=DEVICE)
    indices[:, ::3] = 2
    indices[:, 1::5] = -1
    cotangent = randn(1, k, 5)
    runs = [torch.autograd.grad(gather_rows(x, indices, "triton"), x, cotangent)[0] for _ in range(2)]
    assert torch.equal(runs[0], runs[1])
    for row in range(3):
        total = torch.zeros(5, device=DEVICE)
        for place in (indices[0] == row).nonzero()[:, 0].tolist():
            total += cotangent[0, place]
        assert torch.equal(runs[0][0, row], total)


def test_more_indices_than_are_compared_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, indices = randn(2, 9, 4).requires_grad_(), torch.randint(-1, 9, (2, 30), device=DEVICE)
    cotangent = randn(2, 30, 4)
    (expected,) = torch.autograd.grad(gather_rows(x, indices, "triton"), x, cotangent)
    monkeypatch.setattr("xlroute.kernels.gather._ALL_PAIRS", 10)
    (given,) = torch.autograd.grad(gather_rows(x, indices, "triton"), x, cotangent)
    torch.testing.assert_close(given, expected)


def test_minus_one_hides_even_nan() -> None:
    x = torch.full((1, 2, 3), math.nan, device=DEVICE, requires_grad=True)
    rows = gather_rows(x, torch.tensor([[-1, -1]], device=DEVICE), "triton")
    assert torch.equal(rows, torch.zeros(1, 2, 3, device=DEVICE))
    rows.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros(1, 2, 3, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_index_out_of_range_is_not_read(dtype: torch.dtype) -> None:
    x, gates = randn(1, 4, 3, dtype=dtype), randn(1, 4)
    indices = torch.tensor([[-2, 4, 1 << 40, -1, 3]], device=DEVICE)
    rows, chosen = gather_triton.gather(x, gates, indices)
    assert rows[0, :3].isnan().all()
    assert chosen[0, :3].isnan().all()
    assert torch.equal(rows[0, 3:], torch.stack((torch.zeros_like(x[0, 0]), x[0, 3])))
    gradient = gather_triton.gather_backward(torch.ones_like(rows), indices, 4)
    assert torch.equal(gradient.sum((0, 2)), torch.tensor([0, 0, 0, 3], device=DEVICE, dtype=dtype))
    scattered = gather_triton.scatter(x, rows, None, indices)
    assert torch.equal(scattered, torch.cat((x[:, :3], rows[:, 4:]), 1))


def test_views() -> None:
    buffer = randn(9, 3, 8).transpose(0, 1)
    indices = torch.randint(-1, 5, (3, 7), device=DEVICE)
    for x in (buffer[:, 2:7, ::2], buffer[:, 2:7], buffer[:1, 2:7].expand(3, 5, 8), buffer[:, 2:7, 1:]):
        assert torch.equal(gather_rows(x, indices, "triton"), gather_rows(x.clone(), indices, "torch"))
        places = distinct(3, 5, 4)
        rows = randn(3, 4, x.shape[-1], dtype=torch.float32)
        assert torch.equal(
            scatter_rows(x, rows, places, "triton"), scatter_rows(x.clone(), rows, places, "torch")
        )


def test_nothing_to_gather() -> None:
    minus_one = torch.full((2, 4), -1, device=DEVICE)
    assert torch.equal(gather_rows(randn(2, 0, 3), minus_one, "triton"), torch.zeros(2, 4, 3, device=DEVICE))
    none = minus_one[:, :0]
    x = randn(2, 5, 3).requires_grad_()
    rows, chosen = gather_gated_rows(x, randn(2, 5), none, "triton")
    assert rows.shape == (2, 0, 3)
    assert chosen.shape == (2, 0)
    rows.sum().backward()
    assert x.grad is not None
    assert not x.grad.any()
    assert torch.equal(scatter_rows(x, randn(2, 0, 3), none, "triton"), x)
    assert gather_rows(randn(0, 5, 3), none[:0], "triton").shape == (0, 0, 3)
    assert gather_rows(randn(2, 5, 0), minus_one, "triton").shape == (2, 4, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 50, 33, 7), (1, 1, 1, 1), (3, 9, 130, 9), (1, 300, 3, 200)], ids=str)
def test_scatter(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    b, n, d, k = shape
    base, rows, places = randn(b, n, d, dtype=dtype), randn(b, k, d, dtype=dtype), distinct(b, n, k)
    expected, given = both(scatter_rows, (base, rows), places)
    for a, b_ in zip(given, expected, strict=True):
        assert torch.equal(a, b_)
    added = scatter_rows(base, rows, places, "triton", add=True)
    eps = torch.finfo(dtype).eps if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.0  # cut off, as below
    torch.testing.assert_close(
        added, scatter_rows(base, rows, places, add=True, backend="torch"), rtol=eps, atol=0.0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("add", [False, True], ids=["replaced", "added"])
@pytest.mark.parametrize("shape", [(2, 50, 33, 7), (1, 1, 1, 1), (3, 9, 300, 9)], ids=str)
def test_scatter_of_gated_rows(shape: tuple[int, ...], add: bool, dtype: torch.dtype) -> None:
    b, n, d, k = shape
    base, rows, places = randn(b, n, d, dtype=dtype), randn(b, k, d, dtype=dtype), distinct(b, n, k)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gates = torch.rand(b, k, device=DEVICE, dtype=wide)

    def scatter(base: Tensor, rows: Tensor, gates: Tensor, places: Tensor, backend: Any) -> Tensor:
        return scatter_rows(base, rows, places, backend, gates=gates, add=add)

    expected, given = both(scatter, (base, rows, gates), places)
    # The interpreter cuts off where it should round to bfloat16, and a GPU may fuse the product and the sum.
    rtol = torch.finfo(dtype).eps if add or (dtype == torch.bfloat16 and DEVICE == "cpu") else 0.0
    for a, b_ in zip(given[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b_, rtol=rtol, atol=4 * rtol if add else 0.0)
    torch.testing.assert_close(given[3], expected[3])  # a sum over d, in another order


@pytest.mark.parametrize(("add", "start"), [(False, 0), (True, 0), (True, 4)])
def test_scatter_adds_another_to_the_rest(add: bool, start: int) -> None:
    base, rows, other, places = randn(2, 9, 20), randn(2, 5, 20), randn(20), distinct(2, 9, 5)
    residual = randn(2, 20, 9).mT if add else None

    def scatter(base: Tensor, rows: Tensor, other: Tensor, places: Tensor, backend: Any) -> Tensor:
        options = {"add": add, "other": other, "other_from": start, "residual": residual}
        return scatter_rows(base, rows, places, backend, **options)

    expected, given = both(scatter, (base, rows, other), places)
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_scatter_over_one_vector() -> None:
    vector, rows, places = randn(16), randn(2, 5, 16), distinct(2, 9, 5)

    def scatter(vector: Tensor, rows: Tensor, places: Tensor, backend: Any) -> Tensor:
        return scatter_rows(vector.expand(2, 9, 16), rows, places, backend)

    expected, given = both(scatter, (vector, rows), places)
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives() -> None:
    x, gates = randn(1, 3, 2, dtype=torch.float64), randn(1, 3, dtype=torch.float64)
    indices = torch.tensor([[0, 2, 2, -1]], device=DEVICE)
    rows, places = randn(1, 2, 2, dtype=torch.float64), torch.tensor([[1, -1]], device=DEVICE)
    inputs = tuple(t.requires_grad_() for t in (x, gates, rows))

    def function(x: Tensor, gates: Tensor, rows: Tensor) -> Tensor:
        found, chosen = gather_gated_rows(x, gates, indices, "triton")
        scattered = scatter_rows(x, rows, places, "triton", gates=gates[:, 1:])
        return (found * chosen[..., None]).sum() * scattered.square().sum()

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x, rows = randn(2, 6, 5, dtype=dtype).requires_grad_(), randn(2, 3, 5, dtype=dtype).requires_grad_()
    gates = torch.rand(2, 2, 6, device=DEVICE, requires_grad=True)
    indices, places = torch.randint(-1, 6, (2, 2, 3), device=DEVICE), distinct(2, 6, 3)
    factors = torch.rand(2, 3, device=DEVICE, requires_grad=True)
    ops = torch.ops.xlroute
    torch.library.opcheck(ops.gather_rows.default, (x, gates, indices, True, "triton"))
    torch.library.opcheck(
        ops.gather_rows.default, (x.detach()[:, ::2, 1:], None, indices % 3, False, "triton")
    )
    torch.library.opcheck(ops.gather_rows_backward.default, (rows, places, 6, "triton"))
    torch.library.opcheck(ops.scatter_rows.default, (x, rows, factors, places, None, None, True, 0, "triton"))
    grad = x.detach().requires_grad_()
    torch.library.opcheck(ops.scatter_rows_backward.default, (grad, rows, factors, places, "triton"))
    torch.library.opcheck(
        ops.scatter_rows.default,
        (x[:1].detach().expand(2, 6, 5), None, None, places, None, None, False, 0, "triton"),
    )


def routed(x: Tensor, gates: Tensor, base: Tensor, indices: Tensor, places: Tensor) -> Tensor:
    rows, chosen = gather_gated_rows(x, gates, indices, "triton")
    return scatter_rows(base.expand(2, 9, 8), rows, places, "triton", gates=chosen)


def test_compiles_as_one_graph() -> None:
    inputs = tuple(t.requires_grad_() for t in (randn(2, 11, 8), randn(2, 11), randn(8)))
    rest = torch.randint(-1, 11, (2, 4), device=DEVICE), distinct(2, 9, 4)
    compiled = torch.compile(routed, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    expected, given = routed(*inputs, *rest), compiled(*inputs, *rest)
    torch.testing.assert_close(given, expected)
    cotangent = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(given, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)
    )


@needs_gpu
def test_cuda_graph() -> None:
    inputs = tuple(t.requires_grad_() for t in (randn(2, 11, 8), randn(2, 11), randn(8)))
    rest = torch.randint(-1, 11, (2, 4), device=DEVICE), distinct(2, 9, 4)
    cotangent = randn(2, 9, 8)

    def run() -> tuple[Tensor, ...]:
        result = routed(*inputs, *rest)
        return result.detach(), *torch.autograd.grad(result, inputs, cotangent)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for tensor in inputs:
        tensor.data.copy_(torch.randn_like(tensor))
    rest[0].copy_(torch.randint(-1, 11, (2, 4), device=DEVICE))
    rest[1].copy_(distinct(2, 9, 4))
    graph.replay()
    for a, b in zip(captured, run(), strict=True):
        assert torch.equal(a, b)


@needs_gpu
def test_past_2_to_the_31_elements() -> None:
    x = torch.zeros(2, (1 << 21) + 5, 512, dtype=torch.bfloat16, device=DEVICE)
    x[1, -3:] = 7.0
    indices = torch.tensor([[0, 1], [x.shape[1] - 2, -1]], device=DEVICE)
    rows = gather_rows(x, indices, "triton")
    assert torch.equal(rows.sum((0, 2)), torch.tensor([7.0 * 512, 0.0], device=DEVICE).bfloat16())
    result = scatter_rows(x, -rows, indices, "triton")
    assert torch.equal(result[1, -3:, 0], torch.tensor([7.0, -7.0, 7.0], device=DEVICE).bfloat16())
    gradient = gather_triton.gather_backward(rows, indices, x.shape[1])
    assert torch.equal(gradient[1, -3:, 0], torch.tensor([0.0, 7.0, 0.0], device=DEVICE).bfloat16())


@needs_gpu
def test_columns_past_2_to_the_31_elements() -> None:
    buffer = torch.zeros((1 << 31) + 8, dtype=torch.bfloat16, device=DEVICE)
    x = buffer.as_strided((1, 2, 5), (0, 1, 1 << 29))
    x.copy_(torch.arange(10.0, device=DEVICE).view(1, 2, 5))
    indices = torch.tensor([[1, 0]], device=DEVICE)
    assert torch.equal(gather_rows(x, indices, "triton"), x.flip(1))
    assert torch.equal(scatter_rows(x, x[:, :1].clone(), indices[:, :1], "triton"), x[:, :1].expand_as(x))
    tokens = torch.ones(2, 5, device=DEVICE)
    given, expected = (
        row_scores(x, tokens, normalize=None, scale=1.0, backend=backend) for backend in ("triton", "torch")
    )
    torch.testing.assert_close(given, expected)
