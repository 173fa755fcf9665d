"""top_indices in Triton against its PyTorch reference: the same indices, not close ones."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from xlroute.kernels import top_indices

selection_triton = pytest.importorskip("xlroute.kernels.selection_triton", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


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


def chunks_of_row(n: int, largest: int) -> Tensor:
    """The chunk that each entry of a row is dealt to."""
    plan = selection_triton.plan(n, largest)
    i = torch.arange(n)
    segment = i // selection_triton.SEGMENT
    factor = selection_triton._HASH.value
    shift = segment // plan.tiles * factor >> 8 & 0xFFFF
    tile = (segment % plan.tiles - shift) % plan.tiles % (plan.tiles // plan.folds)
    rotation = (segment * factor >> 20 & 0x7F) * plan.group
    column = (i - rotation) % selection_triton.SEGMENT
    return tile * (selection_triton.SEGMENT // plan.group) + column // plan.group


def crowded_row(n: int, largest: int, ties: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """A row whose largest scores lie in fewer chunks than there are to select, too many for the buffer."""
    s = torch.randn(n, dtype=dtype)
    chunks = chunks_of_row(n, largest)
    plan = selection_triton.plan(n, largest)
    crowd = torch.isin(chunks, torch.randperm(plan.chunks)[: largest - 1])
    assert int(crowd.sum()) > plan.capacity, "not crowded enough to overflow the buffer"
    s[crowd] = 7.0 if ties else 7.0 + torch.rand(int(crowd.sum()), dtype=dtype)
    return s


def check(s: Tensor, k: int, mask: Tensor | None = None) -> None:
    s, mask = s.to(DEVICE), None if mask is None else mask.to(DEVICE)
    with poisoned():
        given = top_indices(s, k, mask, backend="triton")
    wanted = top_indices(s, k, mask, backend="torch")
    assert given.dtype == torch.int64
    assert given.is_contiguous()
    assert torch.equal(given, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("n", [1, 2, 63, 2111])
def test_equals_reference(n: int, masked: bool, dtype: torch.dtype) -> None:
    s = torch.stack((torch.randint(-3, 3, (n,)).float(), torch.randn(n) * 10)).to(dtype)
    s[torch.rand(2, n) < 0.05] = -math.inf
    s[torch.rand(2, n) < 0.01] = math.inf
    s[torch.rand(2, n) < 0.01] = math.nan
    check(s, min(n, 20), torch.rand(2, n) < 0.6 if masked else None)


@pytest.mark.parametrize("n", [257, 5003])
def test_ranks_of_any_number(n: int) -> None:
    s = torch.randint(-50, 50, (1, n)).float()
    for k in (1, 40):
        check(s, k)


@pytest.mark.parametrize("k", [1, 63, 64])
def test_as_many_as_there_are(k: int) -> None:
    check(torch.randn(2, 64), k)
    check(torch.randn(2, 64, dtype=torch.float64), k)
    check(torch.randn(1, 300, dtype=torch.float64), k + 236)


ORDERS = {
    "equal": lambda i: torch.full_like(i, 1.5),
    "rising": lambda i: i,
    "falling": lambda i: -i,
    "two_values": lambda i: (i % 3 == 0).to(i.dtype),
    "period_512": lambda i: torch.where(i % 512 < 2, 3.0 + torch.rand_like(i), torch.rand_like(i)),
    "period_64": lambda i: torch.where(i % 64 == 5, 3.0 + torch.rand_like(i), torch.rand_like(i)),
    "cluster": lambda i: torch.where((i > 4000) & (i < 6000), 3.0 + torch.rand_like(i), torch.rand_like(i)),
    "signed_zeros": lambda i: torch.where(i % 2 == 0, 0.0, -0.0),
    "one_valid_part": lambda i: torch.where(i < 3000, torch.rand_like(i), -math.inf),
    "huge": lambda i: torch.randn_like(i) * 1e37,
}


@pytest.mark.parametrize("order", ORDERS)
def test_patterns(order: str) -> None:
    i = torch.arange(10_001, dtype=torch.float32)
    check(torch.stack((ORDERS[order](i), torch.randn_like(i))), 40)


def test_tiles_of_long_rows_share_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = 20_001, 20
    monkeypatch.setattr(selection_triton, "SEGMENT_ROWS", 1)
    selection_triton.plan.cache_clear()
    try:
        assert selection_triton.plan(n, k).folds == 8
        check(torch.stack((torch.zeros(n), torch.randn(n))), k)
        check(crowded_row(n, k, ties=True)[None], k, torch.rand(n) < 0.9)
    finally:
        selection_triton.plan.cache_clear()


def test_one_program_sorts_the_candidates_where_rows_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection_triton, "MANY_ROWS", 1)
    n, k = 2100, 100
    mask = torch.rand(3, n) < 0.5
    mask[0, 7:] = False
    check(torch.stack((torch.randn(n), torch.randint(5, (n,)).float(), -torch.arange(n).float())), k)
    check(torch.randn(3, n), k, mask)
    # More than one program sorts, and fewer than overflow the buffer: they are counted.
    s = torch.randn(n)
    crowd = torch.isin(chunks_of_row(n, k), torch.randperm(selection_triton.plan(n, k).chunks)[: k - 1])
    s[crowd] += 9.0
    assert int(crowd.sum()) > 128
    check(s[None], k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_crowded_chunks_overflow_the_buffer(ties: bool, dtype: torch.dtype) -> None:
    n, k = 20_001, 20
    check(torch.stack((crowded_row(n, k, ties, dtype), torch.randn(n, dtype=dtype))), k)


def test_a_crowded_mask_overflows_the_buffer() -> None:
    n, k = 20_001, 20
    mask = crowded_row(n, k, ties=True) == 7.0
    check(torch.randn(2, n), k, mask)
    check(torch.zeros(1, n), k, mask)


@pytest.mark.parametrize("n", [50, 2100])
def test_rows_with_too_few_entries_end_in_minus_one(n: int) -> None:
    s = torch.randn(4, n)
    mask = torch.ones(4, n, dtype=torch.bool)
    mask[0] = False
    mask[1, 7:] = False
    s[2, :-3] = -math.inf
    s[3, 3:] = math.nan
    check(s, 20, mask)
    indices = top_indices(s.to(DEVICE), 20, mask.to(DEVICE), backend="triton")
    assert (indices >= 0).sum(-1).tolist() == [0, 7, 3, 3]


@pytest.mark.parametrize("n", [40, 2200])
def test_strides_and_broadcast_masks(n: int) -> None:
    check(torch.randn(n, 2, 2).permute(2, 1, 0), 9, torch.rand(n) < 0.5)
    check(torch.randn(1, 3, 2 * n)[..., ::2], 9, torch.rand(3, n) < 0.5)
    check(torch.randn(2, 2 * n)[:, :n], 9, torch.rand(2, 1) < 0.5)
    check(torch.randn(2, 2, 2, n)[:, 0], 9, torch.rand(2, 1, n) < 0.5)
    check(torch.randn(2, 2, 1, n), 9, torch.rand(2, 1, 1, n) < 0.5)
    check(torch.randn(n), 9, torch.rand(n, 2)[:, 0] < 0.5)


def test_more_than_triton_selects_runs_the_reference() -> None:
    n = selection_triton.LARGEST + 10
    check(torch.randn(1, n), n - 5)


def test_empty() -> None:
    for shape in ((0, 5), (3, 0)):
        result = top_indices(torch.randn(shape, device=DEVICE), min(2, shape[1]), backend="triton")
        assert result.shape == (shape[0], min(2, shape[1]))


@pytest.mark.parametrize("n", [20, 2500])
def test_opcheck(n: int) -> None:
    s = torch.randn(2, n, device=DEVICE, requires_grad=True)
    mask = torch.rand(n, device=DEVICE) < 0.5
    torch.library.opcheck(torch.ops.xlroute.top_indices.default, (s, 4, mask, "triton"))


@pytest.mark.usefixtures("no_interpreter")
def test_backend_errors() -> None:
    s = torch.randn(2, 5)
    assert torch.equal(top_indices(s, 2), top_indices(s, 2, backend="torch"))
    with pytest.raises(ValueError, match="backend='triton' needs a CUDA tensor, got a tensor on cpu"):
        top_indices(s, 2, backend="triton")


def test_plan_holds_for_all_lengths() -> None:
    for largest in (1, 20, 1152, 5000, selection_triton.LARGEST):
        for n in sorted(
            {largest, largest + 1, 4 * largest, 10_007, 131_072, 1 << 20, 12_345_678, 1 << 27, 1 << 30}
        ):
            if n < largest:
                continue
            plan = selection_triton.plan(n, largest)
            segment = selection_triton.SEGMENT
            assert plan.tiles * plan.segments * segment >= n
            assert plan.chunks * plan.group * plan.folds == plan.tiles * segment
            assert plan.chunks >= min(n, 2 * largest)
            assert plan.chunks <= 2 * selection_triton.LARGEST
            assert plan.capacity >= min(n, 8 * largest)


@pytest.mark.parametrize("largest", [72, 1152])
def test_what_recurs_is_spread_over_the_chunks(largest: int) -> None:
    n = 1 << 20
    chunks = chunks_of_row(n, largest)
    plan = selection_triton.plan(n, largest)
    assert chunks.bincount(minlength=plan.chunks).max() <= 2 * n / plan.chunks
    for period in (8, 64, 100, 512, 1000, 1024, 4096, 16_384):
        recurring = chunks[torch.arange(n) % period < 2]
        assert len(recurring.unique()) >= min(largest * 9 / 8, len(recurring) / 8)


@needs_gpu
def test_rows_beyond_2_to_the_31_elements() -> None:
    n = 1 << 27
    s = torch.empty(17, n, dtype=torch.float16, device=DEVICE).normal_()
    s[-1, -1] = 60.0
    given = top_indices(s, 100, backend="triton")
    assert given[-1, 0] == n - 1
    assert torch.equal(given[-1], top_indices(s[-1], 100, backend="torch"))


@needs_gpu
def test_cuda_graph() -> None:
    s, k = torch.randn(2, 100_000, device=DEVICE), 64
    top_indices(s, k, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices = top_indices(s, k, backend="triton")
    for _ in range(3):
        s.normal_()
        graph.replay()
        assert torch.equal(indices, top_indices(s, k, backend="torch"))
