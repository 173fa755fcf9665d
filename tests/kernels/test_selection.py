"""top_indices against a stable sort of everything."""

import math

import pytest
import torch
from torch import Tensor

from xlroute.kernels import top_indices


def sorted_indices(s: Tensor, k: int, mask: Tensor | None) -> Tensor:
    valid = s > -math.inf
    if mask is not None:
        valid = valid & mask
    s = s.masked_fill(~valid, -math.inf)
    indices = s.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.where(torch.arange(k) < valid.sum(-1, keepdim=True), indices, -1)


@pytest.mark.parametrize("levels", [1, 2, 7, 1000], ids=lambda n: f"{n}levels")
@pytest.mark.parametrize("n", [1, 2, 10, 257, 5000])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_equals_stable_sort(n: int, levels: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(n + levels)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        s = torch.randint(-levels, levels, (2, 3, n), generator=generator).to(dtype)
        s[torch.rand(2, 3, n, generator=generator) < 0.1] = -math.inf
        s[torch.rand(2, 3, n, generator=generator) < 0.05] = math.inf
        mask = torch.rand(2, 3, n, generator=generator) < 0.5 if masked else None
        for k in sorted({0, 1, 2, n // 3, n - 1, n}):
            if k <= n:
                assert torch.equal(top_indices(s, k, mask), sorted_indices(s, k, mask))


def test_rows_with_too_few_entries_end_in_minus_one() -> None:
    s = torch.tensor([[1.0, 3.0, -math.inf, 2.0], [0.0, 0.0, 0.0, 0.0], [math.nan, 1.0, 2.0, 2.0]])
    mask = torch.tensor([[True, True, True, False], [False] * 4, [True] * 4])
    assert top_indices(s, 3, mask).tolist() == [[1, 0, -1], [-1, -1, -1], [2, 3, 1]]
    assert top_indices(s, 4, mask).tolist() == [[1, 0, -1, -1], [-1] * 4, [2, 3, 1, -1]]


def test_signed_zeros_are_equal() -> None:
    assert top_indices(torch.tensor([-0.0, 0.0, -0.0]), 2).tolist() == [0, 1]


def test_one_row_mask_broadcasts_and_strides_do_not_matter() -> None:
    s = torch.randint(0, 4, (50, 3)).float().T
    mask = torch.rand(50) < 0.5
    assert torch.equal(top_indices(s, 9, mask), sorted_indices(s.contiguous(), 9, mask.expand(3, 50)))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    result = top_indices(torch.randn(shape), min(2, shape[-1]))
    assert result.shape == (shape[0], min(2, shape[-1]))
    assert result.dtype == torch.int64


def test_carries_no_graph() -> None:
    assert not top_indices(torch.randn(3, 4, requires_grad=True), 2).requires_grad


def test_errors() -> None:
    s = torch.randn(2, 5)
    for k in (-1, 6):
        with pytest.raises(ValueError, match=rf"k must be in \[0, n\] with n = 5, got {k}"):
            top_indices(s, k)
    with pytest.raises(TypeError, match="k must be an int, got float"):
        top_indices(s, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mask must broadcast"):
        top_indices(s, 2, torch.ones(2, 4, dtype=torch.bool))
