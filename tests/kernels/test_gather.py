"""gather_rows against a loop."""

import pytest
import torch

from xlroute.kernels import gather_rows


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 4), (3, 0)], ids=str)
def test_equals_a_loop(shape: tuple[int, ...]) -> None:
    x = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    indices = torch.randint(-1, 6, shape)
    rows = gather_rows(x, indices)
    assert rows.shape == (*shape, 4)
    cotangent = torch.randn_like(rows)
    gradient = torch.zeros_like(x)
    for place in range(indices.numel()):
        stream = place // max(indices.numel() // 3, 1)
        index = int(indices.flatten()[place])
        row = rows.reshape(-1, 4)[place]
        assert torch.equal(row, x[stream, index] if index >= 0 else torch.zeros(4, dtype=torch.float64))
        if index >= 0:
            gradient[stream, index] += cotangent.reshape(-1, 4)[place]
    rows.backward(cotangent)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, gradient)


def test_gradcheck() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 4, -1, 4], [1, 1, 1, -1]])
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, indices), x)


def test_minus_one_hides_even_nan() -> None:
    x = torch.full((1, 2, 3), torch.nan, requires_grad=True)
    rows = gather_rows(x, torch.tensor([[-1, -1]]))
    rows.sum().backward()
    assert torch.equal(rows, torch.zeros(1, 2, 3))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros(1, 2, 3))


def test_no_rows_at_all() -> None:
    assert torch.equal(gather_rows(torch.empty(2, 0, 3), torch.full((2, 4), -1)), torch.zeros(2, 4, 3))
    assert gather_rows(torch.empty(0, 5, 3), torch.empty(0, 4, dtype=torch.int64)).shape == (0, 4, 3)


def test_view_of_a_larger_buffer() -> None:
    buffer = torch.randn(9, 3, 8).transpose(0, 1)
    indices = torch.randint(-1, 5, (3, 7))
    assert torch.equal(
        gather_rows(buffer[:, 2:7, ::2], indices), gather_rows(buffer[:, 2:7, ::2].clone(), indices)
    )


@pytest.mark.parametrize("index", [-2, 5, 1 << 40])
def test_index_out_of_range(index: int) -> None:
    with pytest.raises(IndexError, match=r"indices must be in \[-1, 5\)"):
        gather_rows(torch.randn(2, 5, 3), torch.tensor([[0, 1], [2, index]]))
    with pytest.raises(IndexError, match=r"indices must be in \[-1, 0\)"):
        gather_rows(torch.randn(2, 0, 3), torch.tensor([[0], [-1]]))


def test_errors() -> None:
    x = torch.randn(2, 5, 3)
    with pytest.raises(TypeError, match=r"indices must be an int64 tensor, got torch.int32"):
        gather_rows(x, torch.zeros(2, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"with the same b, got \(2, 5, 3\) and \(3, 4\)"):
        gather_rows(x, torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        gather_rows(x.long(), torch.zeros(2, 4, dtype=torch.int64))
