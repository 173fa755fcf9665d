"""search_topk against all scores in float64, by the bound that it states, and against a stable sort."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xlroute.kernels import search, search_topk, top_indices

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
Search = Callable[..., tuple[Tensor, Tensor]]


def in_small_blocks(width: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the kernels, with groups of 16 keys, of which two blocks more than k are scored again.

    Narrow blocks have 4 keys, wide ones all of a group.
    """
    kernels = pytest.importorskip("xlroute.kernels.search_triton", exc_type=ImportError)
    monkeypatch.setattr(kernels, "EXTRA", 2)
    monkeypatch.setattr(kernels, "group_of", lambda keys: 16)
    monkeypatch.setattr(kernels, "NARROW", 4)
    if width == "wide":
        monkeypatch.setattr(kernels, "SHORT", 0)
    monkeypatch.setattr(kernels, "SCORED", 32)
    monkeypatch.setattr(kernels, "FOUND", 4)
    if DEVICE == "cpu":  # where the interpreter takes seconds to sort a row
        monkeypatch.setattr(kernels, "top_indices", lambda s, k, backend: top_indices(s, k))
    return kernels


@pytest.fixture(params=["narrow", "wide"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the kernels, in small blocks."""
    return in_small_blocks(request.param, monkeypatch)


@pytest.fixture(params=["torch", "narrow", "wide"])
def find(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Search]:
    """search_topk by one backend, which cuts up few keys as it does many, into memory full of NaN."""
    monkeypatch.setattr(search, "_QUERIES", 3)
    monkeypatch.setattr(search, "_MOST_SCORES", 500)
    if request.param != "torch":
        in_small_blocks(request.param, monkeypatch)
        monkeypatch.setattr(search, "_search_in_blocks", None)  # nothing may fall back to it
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield partial(search_topk, backend="torch" if request.param == "torch" else "triton")
    torch.use_deterministic_algorithms(before)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def whole_numbers(*shape: int) -> Tensor:
    """Their scores have no rounding error, and many of them tie."""
    return torch.randint(-2, 3, shape, device=DEVICE).float()


def by_sorting(queries: Tensor, keys: Tensor, k: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k best of all scores in float64, by a stable sort."""
    scores = queries.double() @ keys.double().mT
    hidden = scores.isnan() if mask is None else scores.isnan() | ~mask[:, None]
    scores = scores.masked_fill(hidden, -math.inf)
    scores, indices = (t[..., :k] for t in scores.sort(dim=-1, descending=True, stable=True))
    return scores, indices.masked_fill(scores == -math.inf, -1)


def assert_exact(
    found: tuple[Tensor, Tensor], queries: Tensor, keys: Tensor, k: int, mask: Tensor | None = None
) -> None:
    """What the docstring promises, against float64."""
    scores, indices = found
    best, where = by_sorting(queries, keys, k, mask)
    assert scores.dtype == torch.float32
    assert indices.dtype == torch.int64
    assert scores.shape == indices.shape == best.shape
    assert torch.equal(indices < 0, where < 0)
    assert torch.equal(scores == -math.inf, indices < 0)
    falling = (scores[..., :-1] > scores[..., 1:]) | (indices[..., 1:] < 0)
    ties = (scores[..., :-1] == scores[..., 1:]) & (indices[..., :-1] < indices[..., 1:])
    assert (falling | ties).all()
    found_keys = indices >= 0
    exact = (queries.double() @ keys.double().mT).gather(-1, indices.clamp(min=0))
    longest = keys.double().nan_to_num().norm(dim=-1).amax(-1, keepdim=True)
    bound = (keys.shape[-1] + 16) * 2.0**-21 * queries.double().norm(dim=-1) * longest
    bound = bound[..., None].expand_as(best)[found_keys]
    assert ((scores - exact)[found_keys].abs() <= bound).all()
    # The i-th best that was found is as good as the i-th best, but for twice the bound.
    assert ((exact - best)[found_keys].abs() <= 2 * bound).all()
    if mask is not None:
        seen = mask[:, None].expand(-1, queries.shape[1], -1).gather(-1, indices.clamp(min=0))
        assert seen[found_keys].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", [(2, 5, 203, 24), (1, 1, 150, 5), (1, 17, 128, 64)], ids=str)
def test_finds_the_best(find: Search, shape: tuple[int, ...], masked: bool, dtype: torch.dtype) -> None:
    b, n, m, e = shape
    queries, keys = random(b, n, e, dtype=dtype), random(b, m, e, dtype=dtype)
    mask = torch.rand(b, m, device=DEVICE) < 0.5 if masked else None
    assert_exact(find(queries, keys, 2, mask=mask), queries, keys, 2, mask)


def test_equals_a_stable_sort_where_scores_tie(find: Search) -> None:
    queries, keys = whole_numbers(2, 2, 3), whole_numbers(2, 301, 3)
    mask = torch.rand(2, 301, device=DEVICE) < 0.6
    for seen in (None, mask):
        scores, indices = find(queries, keys, 7, mask=seen)
        wanted, where = by_sorting(queries, keys, 7, seen)
        assert torch.equal(indices, where)
        assert torch.equal(scores.double(), wanted)
    # All keys are equal: more blocks tie than are scored again.
    indices = find(queries, keys[:, :1].expand(2, 301, 3), 7)[1]
    assert torch.equal(indices, torch.arange(7, device=DEVICE).expand(2, 2, 7))


def test_streams_of_different_length(find: Search) -> None:
    queries, keys = random(4, 2, 8), random(4, 160, 8)
    held = torch.tensor([160, 3, 0, 17], device=DEVICE)
    mask = torch.arange(160, device=DEVICE) < held[:, None]
    scores, indices = find(queries, keys, 3, mask=mask)
    assert (indices >= 0).sum(-1).T.tolist() == [[3, 3, 0, 3]] * 2
    assert_exact((scores, indices), queries, keys, 3, mask)
    for i in range(4):
        one = slice(i, i + 1)
        alone = find(queries[one], keys[one], 3, mask=mask[one])
        torch.testing.assert_close((scores[one], indices[one]), alone)


@pytest.mark.parametrize("kept", ["all", "some", "none"])
def test_the_best_lie_together_or_apart(find: Search, kept: str) -> None:
    """In one narrow block, in each of one group, or in as many groups as there are best keys."""
    b, n, m, e, k = 3, 2, 203, 8, 3
    queries, keys = random(b, n, e), 0.01 * random(b, m, e)
    first = torch.randint(0, 11, (), device=DEVICE)
    for i, places in enumerate((torch.arange(k), 4 * torch.arange(k), 16 * torch.arange(k))):
        best = places.to(DEVICE) + 16 * first
        best = best if i else best + torch.randint(0, 2, (), device=DEVICE)
        keys[i, best] = queries[i, 0] * (1 + torch.rand(k, 1, device=DEVICE))
    mask = torch.ones(b, m, dtype=torch.bool, device=DEVICE)
    if kept == "some":  # whole groups, whole narrow blocks and single keys are hidden
        for width in (16, 4, 1):
            mask &= (torch.rand(b, m // width + 1, device=DEVICE) < 0.7).repeat_interleave(width, 1)[:, :m]
    elif kept == "none":
        mask[1] = False
    assert_exact(find(queries, keys, k, mask=mask), queries, keys, k, mask)


# The interpreter warns of blocks that hold nothing else.
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_what_is_no_number_is_never_found(find: Search) -> None:
    queries, keys = random(1, 3, 8), random(1, 160, 8)
    keys[0, :80] = 0.1 * keys[0, :80]
    mask = torch.ones(1, 160, dtype=torch.bool, device=DEVICE)
    for place, value, seen in (
        (20, math.nan, True),
        (30, math.nan, False),
        (31, math.inf, False),
        (32, -math.inf, False),
    ):
        keys[0, place, 2] = value
        mask[0, place] = seen
    assert_exact(find(queries, keys, 3, mask=mask), queries, keys, 3, mask)
    # A block may hold nothing else. A score of inf is the best.
    keys[0, 48:64] = math.nan
    keys[0, 99] = queries[0, 0].sign() * math.inf
    scores, indices = find(queries[:, :1], keys, 2, mask=mask)
    assert indices[0, 0, 0] == 99
    assert scores[0, 0, 0] == math.inf
    assert scores[0, 0, 1].isfinite()


# The interpreter warns of blocks that hold nothing else.
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize("m", [193, 207])  # the last group holds one key, or all but one
def test_blocks_are_chosen_as_by_a_stable_sort(kernels: Any, m: int) -> None:
    """Exactly k + EXTRA of the best by their maxima, equal ones by the lower index, in ascending order."""
    queries, keys = whole_numbers(2, 2, 4), whole_numbers(2, m, 4)
    keys[0, -1] = 3 * queries[0, 0]
    keys[1, m // 2 :, 0] = math.nan
    mask = torch.rand(2, m, device=DEVICE) < 0.5
    mask[:, 32:64] = False  # two groups
    mask[:, -1] = True
    for seen in (None, mask):
        block = kernels.block_of(keys, 1)
        chosen = kernels.best_blocks(queries, kernels.prepare_keys(keys, seen, block), 1 + kernels.EXTRA)
        scores = queries.double() @ keys.double().mT
        hidden = scores.isnan() if seen is None else scores.isnan() | ~seen[:, None]
        scores = scores.masked_fill(hidden, -math.inf)
        blocks = torch.nn.functional.pad(scores, (0, -m % block), value=-math.inf).unflatten(-1, (-1, block))
        maxima, order = blocks.amax(-1).sort(dim=-1, descending=True, stable=True)
        wanted = order.masked_fill(maxima == -math.inf, -1)[..., : 1 + kernels.EXTRA]
        assert torch.equal(chosen, wanted.sort(-1).values.flatten(0, 1))


def test_widths_of_blocks() -> None:
    kernels = pytest.importorskip("xlroute.kernels.search_triton", exc_type=ImportError)
    for m, e, dtype, k, width in (
        (65_536, 64, torch.bfloat16, 16, 32),
        (262_144, 64, torch.bfloat16, 504, 32),
        (262_144, 64, torch.bfloat16, 505, 128),
        (262_145, 64, torch.bfloat16, 1, 128),
        (262_144, 128, torch.float32, 504, 32),
        (131_072, 129, torch.float32, 1016, 32),
        (131_072, 129, torch.float32, 1017, 64),
        (131_073, 129, torch.float32, 1, 64),
    ):
        assert kernels.block_of(torch.empty(1, m, e, dtype=dtype, device="meta"), k) == width


def test_blocks_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 and of 128 keys, neither of which m is a multiple of: the same bits."""
    kernels = pytest.importorskip("xlroute.kernels.search_triton", exc_type=ImportError)
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "top_indices", lambda s, k, backend: top_indices(s, k))
    m = 256 * (1 + kernels.EXTRA) + 141
    queries, keys = random(2, 1, 20), random(2, m, 20)
    mask = torch.rand(2, m, device=DEVICE) < 0.7
    monkeypatch.setattr(search, "_search_in_blocks", None)
    for seen in (None, mask):
        narrow = search_topk(queries, keys, 1, mask=seen, backend="triton")
        assert_exact(narrow, queries, keys, 1, seen)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "SHORT", 0)
            wide = search_topk(queries, keys, 1, mask=seen, backend="triton")
        for ours, others in zip(narrow, wide, strict=True):
            assert torch.equal(ours, others)


def test_slices_of_queries_and_of_rows(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SCRATCH", 15_000)
    assert kernels.rows_at_once(29, 14, 2) == 4  # two queries of each stream
    assert kernels.rows_at_once(14 * 16, 12, 2) == 3  # their scores three rows at a time
    queries, keys = whole_numbers(2, 3, 4), whole_numbers(2, 450, 4)
    _, indices = search_topk(queries, keys, 12, backend="triton")
    assert torch.equal(indices, by_sorting(queries, keys, 12, None)[1])


def test_slices_of_queries_are_padded_alone(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "rows_at_once", lambda width, num, streams: 2)
    padded: list[torch.Size] = []

    def pad(t: Tensor, missing: tuple[int, int]) -> Tensor:
        padded.append(t.shape)
        return torch.nn.functional.pad(t, missing)

    monkeypatch.setattr(kernels, "pad", pad)
    queries, keys = whole_numbers(1, 3, 3), whole_numbers(1, 150, 3)
    _, indices = search_topk(queries, keys, 1, backend="triton")
    assert padded == [(1, 150, 3), (1, 2, 3), (1, 1, 3)]
    assert torch.equal(indices, by_sorting(queries, keys, 1, None)[1])


def test_keys_lie_anywhere(find: Search) -> None:
    queries, keys = random(2, 2, 16), random(2, 150, 16)
    expected = find(queries, keys, 2)
    buffer = random(2, 400, 40)
    buffer[:, 100:250, 4:20] = keys
    buffer[:, :150, 21:37] = keys
    mask = torch.ones(2, 300, 2, dtype=torch.bool, device=DEVICE)[:, ::2, 1]
    for given in (
        buffer[:, 100:250, 4:20],
        buffer[:, :150, 21:37],  # at no multiple of 16 bytes
        keys.mT.contiguous().mT,
    ):
        torch.testing.assert_close(find(queries.mT.contiguous().mT, given, 2), expected)
    torch.testing.assert_close(find(queries, keys, 2, mask=mask), expected)


def test_a_score_has_the_same_bits_wherever_its_key_lies(kernels: Any) -> None:
    queries, keys = random(3, 4, 20, dtype=torch.float16), random(3, 150, 20, dtype=torch.float16)
    buffer = random(3, 200, 24, dtype=torch.float16)
    buffer[:, 3:153, 1:21] = keys
    together = search_topk(queries, keys, 2, backend="triton")
    elsewhere = search_topk(queries, buffer[:, 3:153, 1:21], 2, backend="triton")
    alone = search_topk(queries[1:2, 2:3], keys[1:2], 2, backend="triton")
    for ours, other, one in zip(together, elsewhere, alone, strict=True):
        assert torch.equal(ours, other)
        assert torch.equal(ours[1:2, 2:3], one)


def test_float64() -> None:
    queries, keys = (t.double() for t in (random(2, 5, 7), random(2, 90, 7)))
    scores, indices = search_topk(queries, keys, 20)
    wanted, where = by_sorting(queries, keys, 20, None)
    assert torch.equal(indices, where)
    torch.testing.assert_close(scores, wanted)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_few_keys_and_nothing(backend: Any) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    for b, n, m, e, k in (
        (2, 1, 5, 4, 5),
        (2, 1, 5, 4, 9),
        (2, 1, 1, 4, 1),
        (2, 1, 0, 4, 2),
        (2, 0, 5, 4, 2),
        (0, 1, 5, 4, 2),
        (2, 1, 5, 4, 0),
        (2, 1, 5, 0, 2),
    ):
        queries, keys = whole_numbers(b, n, e), whole_numbers(b, m, e)
        mask = torch.rand(b, m, device=DEVICE) < 0.5
        for seen in (None, mask):
            scores, indices = search_topk(queries, keys, k, mask=seen, backend=backend)
            wanted, where = by_sorting(queries, keys, k, seen)
            assert scores.shape == (b, n, min(k, m))
            assert torch.equal(indices, where)
            assert torch.equal(scores.double(), wanted)


def test_what_the_kernels_do_not_search() -> None:
    kernels = pytest.importorskip("xlroute.kernels.search_triton", exc_type=ImportError)
    keys = torch.empty(1, 128 * 80, 64, device="meta")
    assert kernels.can_search(keys, 32)
    assert kernels.can_search(keys.expand(1, -1, 64).repeat(1, 1, 4), 32)
    assert not kernels.can_search(keys.repeat(1, 1, 5), 32)  # too wide
    assert not kernels.can_search(keys.double(), 32)
    assert not kernels.can_search(keys, 33)  # more than half of the blocks
    assert not kernels.can_search(keys[:, 1:], 32)
    queries, keys = random(1, 2, 300), random(1, 150, 300)
    assert_exact(search_topk(queries, keys, 3, backend="triton"), queries, keys, 3)


def test_the_reference_never_holds_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(each.numel() for each in (out if isinstance(out, tuple) else (out,)))
            return out

    monkeypatch.setattr(search, "_QUERIES", 64)
    monkeypatch.setattr(search, "_MOST_SCORES", 2**12)
    queries, keys = random(1, 200, 8), random(1, 1000, 8)
    with Sizes():
        found = search._search_in_blocks(queries, keys, 5, None, "torch")
    assert max(sizes) <= 2**12
    assert_exact(found, queries, keys, 5)


def test_scratch_of_the_kernels_is_bounded() -> None:
    kernels = pytest.importorskip("xlroute.kernels.search_triton", exc_type=ImportError)
    selection = pytest.importorskip("xlroute.kernels.selection_triton", exc_type=ImportError)
    for width in (2049, 8192, 100_000, 1 << 22):
        for num in (1, 40, 500, 1032, 8000):
            if num <= width:
                plan = selection.plan(width, num)
                a_row = 4 * width + 8 * plan.folds * plan.chunks + 12 * plan.capacity + 8 * num
                for streams in (1, 3, 16):
                    rows = kernels.rows_at_once(width, num, streams)
                    assert rows == 1 or rows * a_row <= min(streams, 4) * 60 << 20


def test_carries_no_graph() -> None:
    queries, keys = random(1, 2, 4).requires_grad_(), random(1, 9, 4).requires_grad_()
    assert not search_topk(queries, keys, 3)[0].requires_grad


def test_autocast_changes_nothing() -> None:
    queries, keys = random(1, 9, 16), random(1, 50, 16)
    expected = search_topk(queries, keys, 4)
    with torch.autocast(DEVICE, torch.bfloat16):
        given = search_topk(queries, keys, 4)
    for ours, wanted in zip(given, expected, strict=True):
        assert ours.dtype == wanted.dtype
        assert torch.equal(ours, wanted)


def test_compiles_for_changing_sizes() -> None:
    compiled = torch.compile(search_topk, fullgraph=True, backend="aot_eager")
    for m, k in ((9, 2), (12, 3), (15, 4), (3, 4)):
        queries, keys = whole_numbers(2, 3, 4), whole_numbers(2, m, 4)
        mask = torch.rand(2, m, device=DEVICE) < 0.7
        for ours, expected in zip(
            compiled(queries, keys, k, mask=mask), search_topk(queries, keys, k, mask=mask), strict=True
        ):
            assert torch.equal(ours, expected)


def test_opcheck_triton(kernels: Any) -> None:
    mask = torch.rand(2, 130, device=DEVICE) < 0.5
    arguments = (random(2, 2, 8), random(2, 130, 8), 2, mask, "triton")
    torch.library.opcheck(torch.ops.xlroute.search_topk.default, arguments)


def test_errors() -> None:
    queries, keys = random(2, 3, 4), random(2, 5, 4)
    with pytest.raises(TypeError, match=r"queries must be a floating-point tensor, got dtype torch.int64"):
        search_topk(queries.long(), keys, 1)
    with pytest.raises(TypeError, match=r"keys must be a floating-point tensor, got list"):
        search_topk(queries, [1.0], 1)  # type: ignore[arg-type]
    for wrong in (keys[0], keys[:1], keys[..., 1:]):
        with pytest.raises(ValueError, match=r"must share b and e, got shapes \(2, 3, 4\) and \("):
            search_topk(queries, wrong, 1)
    with pytest.raises(
        TypeError, match=r"keys must have the dtype of queries, torch.float32, got torch.float6"
    ):
        search_topk(queries, keys.double(), 1)
    with pytest.raises(ValueError, match=r"keys must be on the device of queries, .*, got meta"):
        search_topk(queries, keys.to("meta"), 1)
    with pytest.raises(TypeError, match=r"mask must be a bool tensor, got torch.float32"):
        search_topk(queries, keys, 1, mask=torch.ones(2, 5, device=DEVICE))
    with pytest.raises(TypeError, match=r"mask must be a bool tensor, got list"):
        search_topk(queries, keys, 1, mask=[True])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 5\), got \(1, 5\)"):
        search_topk(queries, keys, 1, mask=torch.ones(1, 5, dtype=torch.bool, device=DEVICE))
    with pytest.raises(ValueError, match=r"mask must be on the device of queries, .*, got meta"):
        search_topk(queries, keys, 1, mask=torch.ones(2, 5, dtype=torch.bool, device="meta"))
    with pytest.raises(TypeError, match="k must be an int, got float"):
        search_topk(queries, keys, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        search_topk(queries, keys, -1)


@pytest.mark.usefixtures("no_interpreter")
def test_backend_errors() -> None:
    queries, keys = torch.randn(1, 2, 4), torch.randn(1, 5, 4)
    with pytest.raises(ValueError, match="backend='triton' needs a CUDA tensor, got a tensor on cpu"):
        search_topk(queries, keys, 1, backend="triton")


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 200, 100_003, 64, 32),
        (1, 200, 300_003, 64, 32),
        (2, 1, 50_000, 64, 32),
        (3, 40, 30_000, 200, 5),
        (2, 5, 262_144, 64, 504),
        (16, 130, 65_536, 64, 16),
    ],
    ids=str,
)
def test_many_keys(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    b, n, m, e, k = shape
    queries, keys = random(b, n, e, dtype=dtype), random(b, m, e, dtype=dtype)
    mask = torch.rand(b, m, device=DEVICE) < 0.5
    for seen in (None, mask):
        found = search_topk(queries, keys, k, mask=seen, backend="triton")
        assert_exact(found, queries, keys, k, seen)
    queries, keys = whole_numbers(b, n, e).to(dtype), whole_numbers(b, m, e).to(dtype)
    assert torch.equal(search_topk(queries, keys, k)[1], by_sorting(queries, keys, k, None)[1])


@needs_gpu
def test_memory_and_many_queries() -> None:
    for b, n, m, k in (
        (1, 1024, 1 << 20, 32),
        (1, 1024, 1 << 20, 1000),
        (1, 2048, 1 << 18, 32),
        (1, 20_000, 2304, 1),
        (16, 1024, 1 << 16, 16),
    ):
        queries, keys = (random(b, length, 64, dtype=torch.bfloat16) for length in (n, m))
        search_topk(queries, keys, k)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = search_topk(queries, keys, k)
        torch.cuda.synchronize()
        result = sum(t.numel() * t.itemsize for t in found)
        assert torch.cuda.max_memory_allocated() - held - result <= min(b, 4) * 64 << 20
        some = slice(1000, 1010)
        assert_exact(tuple(t[:, some] for t in found), queries[:, some], keys, k)  # type: ignore[arg-type]


@needs_gpu
def test_keys_beyond_2_to_the_31_elements() -> None:
    keys = torch.empty(3, 1 << 23, 96, dtype=torch.float16, device=DEVICE).normal_()
    queries = random(3, 2, 96, dtype=torch.float16)
    keys[-1, -1] = 3 * queries[-1, 0]
    scores, indices = search_topk(queries, keys, 4)
    assert indices[-1, 0, 0] == len(keys[-1]) - 1
    alone = search_topk(queries[-1:], keys[-1:].clone(), 4)
    assert torch.equal(indices[-1:], alone[1])
    assert torch.equal(scores[-1:], alone[0])


@needs_gpu
def test_cuda_graph() -> None:
    queries, keys = random(1, 20, 64), random(1, 20_000, 64)
    search_topk(queries, keys, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = search_topk(queries, keys, 8)
    for _ in range(3):
        keys.normal_()
        graph.replay()
        assert_exact(found, queries, keys, 8)
