"""gather_rows, gather_gated_rows and scatter_rows against loops."""

import pytest
import torch

from xlroute.kernels import gather_gated_rows, gather_rows, gather_rows_apart, scatter_rows


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


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 4), (3, 0)], ids=str)
def test_streams_that_lie_apart(shape: tuple[int, ...]) -> None:
    streams = [torch.randn(m, 4) for m in (6, 0, 9)]
    indices = torch.stack([torch.randint(-1, len(x), shape[1:]) for x in streams])
    given = gather_rows_apart(streams, indices)
    for x, index, rows in zip(streams, indices, given, strict=True):
        assert torch.equal(rows, gather_rows(x[None], index[None])[0])
    with pytest.raises(IndexError, match=r"\[-1, 0\)"):
        gather_rows_apart(streams, torch.zeros(shape[0], 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least 1, got 2 and 3"):
        gather_rows_apart(streams[:2], indices)


@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 4), (3, 2, 1, 4)], ids=str)
def test_gates_are_gathered_beside_their_rows(shape: tuple[int, ...]) -> None:
    x = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(*shape[:-1], 6, requires_grad=True)
    indices = torch.randint(-1, 6, shape)
    rows, chosen = gather_gated_rows(x, gates, indices)
    assert torch.equal(rows, gather_rows(x, indices))
    assert chosen.dtype == gates.dtype
    cotangent = torch.randn_like(chosen)
    gradient = torch.zeros(gates.numel() // 6, 6)
    for place, index in enumerate(indices.flatten().tolist()):
        i = place // shape[-1]
        assert chosen.flatten()[place] == (gates.view(-1, 6)[i, index] if index >= 0 else 0)
        if index >= 0:
            gradient[i, index] += cotangent.flatten()[place]
    (given,) = torch.autograd.grad(chosen, gates, cotangent)
    torch.testing.assert_close(given.view(-1, 6), gradient)

    _, straight = gather_gated_rows(x, gates, indices, straight_through=True)
    assert torch.equal(straight, (indices >= 0).float())
    assert torch.equal(torch.autograd.grad(straight, gates, cotangent)[0], given)
    poisoned = torch.full_like(gates, torch.nan)
    _, straight = gather_gated_rows(x, poisoned, indices, straight_through=True)
    assert torch.equal(straight.isnan(), indices >= 0)


@pytest.mark.parametrize("other_from", [None, 0, 2, 6])
@pytest.mark.parametrize("add", [False, True], ids=["replaced", "added"])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("k", [0, 1, 4])
def test_scatter_equals_a_loop(k: int, has_residual: bool, add: bool, other_from: int | None) -> None:
    base = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(3, k, 4, dtype=torch.float64, requires_grad=True)
    indices = torch.stack([torch.randperm(6)[:k] for _ in range(3)])
    indices[torch.rand(3, k) < 0.3] = -1
    other = None if other_from is None else torch.randn(4, dtype=torch.float64, requires_grad=True)
    expected = base.clone()
    if other is not None:
        expected[:, other_from:] = expected[:, other_from:] + other
    for stream in range(3):
        for place, index in enumerate(indices[stream].tolist()):
            if index >= 0:
                expected[stream, index] = rows[stream, place] + (base[stream, index] if add else 0)
    residual = torch.randn_like(base, requires_grad=True) if has_residual else None
    if residual is not None:
        expected = expected + residual
    options = {"add": add, "other": other, "other_from": other_from or 0, "residual": residual}
    given = scatter_rows(base, rows, indices, **options)
    cotangent = torch.randn_like(expected)
    assert torch.equal(given, expected)
    leaves = tuple(t for t in (base, rows, other, residual) if t is not None)
    wanted = torch.autograd.grad(expected, leaves, cotangent, allow_unused=True)
    gradients = torch.autograd.grad(given, leaves, cotangent)
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


def test_scatter_multiplies_rows_by_their_gates() -> None:
    base, rows = torch.randn(3, 6, 4).bfloat16(), torch.randn(3, 2, 4).bfloat16()
    gates, indices = torch.rand(3, 2), torch.tensor([[5, 0], [-1, 2], [1, -1]])
    products = (rows.double() * gates.double()[..., None]).float().bfloat16()
    given = scatter_rows(base, rows, indices, gates=gates)
    torch.testing.assert_close(given, scatter_rows(base, products, indices), rtol=1e-2, atol=0)
    assert torch.equal(given[0, 1:5], base[0, 1:5])
    # Added, the sums are rounded once: better than the sum of rounded products.
    exact = scatter_rows(base.double(), rows.double(), indices, gates=gates.double(), add=True)
    added = scatter_rows(base, rows, indices, gates=gates.double(), add=True)
    assert torch.equal(added, exact.bfloat16())
    residual = torch.randn(3, 6, 4).bfloat16()
    wide = (base, rows, gates, residual)
    wide = [t.double() for t in wide]
    exact = scatter_rows(*wide[:2], indices, gates=wide[2], add=True, residual=wide[3])
    added = scatter_rows(base, rows, indices, gates=gates.double(), add=True, residual=residual)
    assert torch.equal(added, exact.bfloat16())


def test_scatter_over_one_vector() -> None:
    vector, rows = torch.randn(4, requires_grad=True), torch.randn(2, 2, 4)
    indices = torch.tensor([[2, 0], [-1, 1]])
    result = scatter_rows(vector.expand(2, 3, 4), rows, indices)
    assert torch.equal(result[0], torch.stack((rows[0, 1], vector, rows[0, 0])))
    assert torch.equal(result[1], torch.stack((vector, rows[1, 1], vector)))
    (gradient,) = torch.autograd.grad(result.sum(), vector)
    assert torch.equal(gradient, torch.full((4,), 3.0))


def test_gradcheck() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 4, -1, 4], [1, 1, 1, -1]])
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, gates: gather_gated_rows(x, gates, indices), (x, gates))
    rows = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([[3, -1], [0, 4]])
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, rows: scatter_rows(x, rows, places), (x, rows))
        for add in (False, True):
            assert check(
                lambda x, rows, gates, other, add=add: scatter_rows(
                    x, rows, places, gates=gates[:, :2], add=add, other=other, other_from=2, residual=x.sin()
                ),
                (x, rows, gates, torch.randn(3, dtype=torch.float64, requires_grad=True)),
            )


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
    with pytest.raises(IndexError, match=r"indices must be in \[-1, 5\)"):
        scatter_rows(torch.randn(2, 5, 3), torch.randn(2, 2, 3), torch.tensor([[0, 1], [2, index]]))


def test_errors() -> None:
    x = torch.randn(2, 5, 3)
    with pytest.raises(TypeError, match=r"indices must be an int64 tensor, got torch.int32"):
        gather_rows(x, torch.zeros(2, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"with the same b, got \(2, 5, 3\) and \(3, 4\)"):
        gather_rows(x, torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        gather_rows(x.long(), torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="indices must be on the device of x, cpu, got meta"):
        gather_rows(x, torch.zeros(2, 4, dtype=torch.int64, device="meta"))
    indices = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"gates must have shape \[b, ..., m\].* got \(2, 4\) for"):
        gather_gated_rows(x, torch.rand(2, 4), indices)
    with pytest.raises(TypeError, match="gates must be a floating-point tensor"):
        gather_gated_rows(x, torch.ones(2, 5, dtype=torch.int64), indices)
    with pytest.raises(TypeError, match=r"rows must have the dtype of base, torch\.float32"):
        scatter_rows(x, torch.randn(2, 4, 3, dtype=torch.float64), indices)
    with pytest.raises(ValueError, match=r"rows must have shape \[b, k, d\].* got \(2, 3, 3\) for \(2, 4\)"):
        scatter_rows(x, torch.randn(2, 3, 3), indices)
    rows = torch.randn(2, 4, 3)
    with pytest.raises(ValueError, match=r"other must have shape \(3,\), got \(2,\)"):
        scatter_rows(x, rows, indices, other=torch.randn(2))
    with pytest.raises(
        TypeError, match=r"residual must have the dtype of base, torch.float32, got torch.float64"
    ):
        scatter_rows(x, rows, indices, residual=x.double())
    with pytest.raises(
        ValueError, match=r"residual must have the shape of base, \(2, 5, 3\), got \(2, 4, 3\)"
    ):
        scatter_rows(x, rows, indices, residual=rows)
    with pytest.raises(ValueError, match=r"other_from must be in \[0, 5\], got 6"):
        scatter_rows(x, rows, indices, other=torch.randn(3), other_from=6)
    with pytest.raises(ValueError, match=r"gates must have the shape of indices, \(2, 4\), got \(2, 4, 1\)"):
        scatter_rows(x, rows, indices, gates=torch.rand(2, 4, 1))
    with pytest.raises(TypeError, match="gates must be a floating-point tensor"):
        scatter_rows(x, rows, indices, gates=indices)


@pytest.mark.usefixtures("no_interpreter")
def test_backend_errors() -> None:
    x, indices = torch.randn(2, 5, 3), torch.zeros(2, 4, dtype=torch.int64)
    message = "backend='triton' needs a CUDA tensor, got a tensor on cpu"
    with pytest.raises(ValueError, match=message):
        gather_rows(x, indices, "triton")
    with pytest.raises(ValueError, match=message):
        gather_gated_rows(x, torch.rand(2, 5), indices, backend="triton")
    with pytest.raises(ValueError, match=message):
        scatter_rows(x, torch.randn(2, 4, 3), indices, backend="triton")
