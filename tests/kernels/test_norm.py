"""norm_beside against the formulas, and in Triton against the reference's error from float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xlroute.kernels import norm_beside
from xlroute.kernels.norm import WIDEST

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's bfloat16 is wrong.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
NORMS = ("rms", "layer", "layer without bias")


def inputs(norm: str, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Rows that are not centered, and weights for them."""
    x = (0.7 + torch.randn(shape, device=DEVICE)).to(dtype)
    weights = [torch.randn(shape[-1], device=DEVICE).to(dtype) for _ in range(2 if norm == "layer" else 1)]
    return x, *weights


def run(
    norm: str, leaves: tuple[Tensor, ...], backend: Any, readers: int = 1, **options: Any
) -> tuple[Tensor, ...]:
    return norm_beside(
        *leaves, norm="rms" if norm == "rms" else "layer", readers=readers, backend=backend, **options
    )


def run_both_ways(
    norm: str, leaves: tuple[Tensor, ...], cotangents: list[Tensor], backend: str
) -> tuple[Tensor, ...]:
    leaves = tuple(t.detach().requires_grad_() for t in leaves)
    *read, normed = run(norm, leaves, backend, len(cotangents) - 1)
    for each in read:
        assert torch.equal(each, leaves[0])
    return normed.detach(), *torch.autograd.grad([*read, normed], leaves, cotangents)


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(math.nan))


def by_hand(norm: str, x: Tensor, weight: Tensor, bias: Tensor | float = 0.0, eps: float = 0.0) -> Tensor:
    if norm == "rms":
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


@pytest.mark.parametrize("norm", NORMS)
def test_reference(norm: str) -> None:
    leaves = tuple(t.requires_grad_() for t in inputs(norm, 3, 4, 6, dtype=torch.float64))
    x, *weights = leaves
    given = run(norm, leaves, "torch", readers=2, eps=0.3)
    expected = (x * 1.0, x * 1.0, by_hand(norm, x, *weights, eps=0.3))
    torch.testing.assert_close(given, expected)
    cotangents = [torch.randn_like(t) for t in expected]
    torch.testing.assert_close(
        torch.autograd.grad(given, leaves, cotangents), torch.autograd.grad(expected, leaves, cotangents)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("shape", "readers"), [((2, 37, 24), 1), ((150, 5), 0), ((3, 100), 2), ((9, 1100), 3), ((2, 3, 16), 3)]
)
def test_triton(
    shape: tuple[int, ...], readers: int, norm: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = pytest.importorskip("xlroute.kernels.norm_triton", exc_type=ImportError)
    monkeypatch.setattr(kernels, "WARPS", 8)  # so that programs take several tiles, some one more than others
    leaves = inputs(norm, *shape, dtype=dtype)
    cotangents = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(readers + 1)]
    wide, *wide_cotangents = ([t.double() for t in tensors] for tensors in (leaves, cotangents))
    exact = run_both_ways(norm, tuple(wide), *wide_cotangents, "torch")
    reference = run_both_ways(norm, leaves, cotangents, "torch")
    poison(monkeypatch)
    given = run_both_ways(norm, leaves, cotangents, "triton")
    for ours, theirs, wanted in zip(given, reference, exact, strict=True):
        assert ours.dtype == dtype
        error, allowed = (ours - wanted).norm(), 2 * (theirs - wanted).norm()
        # Sums over many rows, whose terms may cancel, are taken in float32.
        least = 4 * torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
        assert error <= allowed.clamp(min=least * wanted.norm().item())


@pytest.mark.parametrize("norm", NORMS)
def test_a_row_does_not_depend_on_its_neighbours(norm: str) -> None:
    pytest.importorskip("triton")
    x, *weights = inputs(norm, 40, 48)
    cotangents = [torch.randn_like(x) for _ in range(2)]
    together = run_both_ways(norm, (x, *weights), cotangents, "triton")
    i = int(torch.randint(40, ()))
    alone = run_both_ways(norm, (x[i : i + 1], *weights), [c[i : i + 1] for c in cotangents], "triton")
    for each, one in zip(together[:2], alone[:2], strict=True):
        assert torch.equal(each[i : i + 1], one)
    # Rows that are not adjacent, in each of two ways.
    wide = torch.randn(40, 2 * 48 + 3, device=DEVICE)
    for rows in (wide[:, 3:51], wide[:, :96:2]):
        assert torch.equal(
            run(norm, (rows, *weights), "triton")[1], run(norm, (rows.contiguous(), *weights), "triton")[1]
        )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_some_outputs_may_be_left_unused(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    leaves = tuple(t.requires_grad_() for t in inputs("layer", 5, 24))
    first, _, third, normed = run("layer", leaves, backend, readers=3)
    c, c_third, c_normed = torch.randn(3, 5, 24, device=DEVICE)
    total = (third * c_third).sum() + (normed * c_normed).sum()
    (d_x,) = torch.autograd.grad(total, leaves[0], retain_graph=True)
    (alone,) = torch.autograd.grad((normed * c_normed).sum(), leaves[0], retain_graph=True)
    torch.testing.assert_close(d_x, alone + c_third)
    # The norm itself.
    d_x, d_weight = torch.autograd.grad((first * c).sum(), leaves[:2], allow_unused=True)
    torch.testing.assert_close(d_x, c)
    assert d_weight is None or not d_weight.any()


def test_gradients_of_readers_are_added_by_the_norm() -> None:
    pytest.importorskip("triton")
    added = {}
    for backend in ("torch", "triton"):
        leaves = tuple(t.requires_grad_() for t in inputs("rms", 2, 7, 24))
        outputs = [t.sin() for t in run("rms", leaves, backend, readers=3)]
        with torch.profiler.profile(record_shapes=True, acc_events=True) as profile:
            torch.autograd.grad(outputs, leaves, [torch.randn_like(t) for t in outputs])
        added[backend] = sum(
            event.name in ("aten::add", "aten::add_") and event.input_shapes[0] == [2, 7, 24]
            for event in profile.events()
        )
    assert added["triton"] == 0
    assert added["torch"] >= 3


def test_readers_know_nothing_of_the_gradient_of_the_weight() -> None:
    pytest.importorskip("triton")
    x, weight = inputs("rms", 5, 24)
    weight.requires_grad_()
    read, normed = run("rms", (x, weight), "triton")
    assert not read.requires_grad
    cotangent = torch.randn_like(normed)
    (given,) = torch.autograd.grad(normed, weight, cotangent)
    (expected,) = torch.autograd.grad(run("rms", (x, weight), "torch")[1], weight, cotangent)
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_default_eps_is_pytorchs(dtype: torch.dtype, norm: str) -> None:
    pytest.importorskip("triton")
    x, *weights = inputs(norm, 6, 32, dtype=dtype)
    x = x * 2.0**-11  # squares that are near the eps
    given, expected = (run(norm, (x, *weights), backend)[1] for backend in ("triton", "torch"))
    torch.testing.assert_close(given, expected)
    assert (given - run(norm, (x, *weights), "torch", eps=0.0)[1]).norm() > 0.01 * given.norm()


# PyTorch warns that its own kernel does not.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("norm", NORMS)
def test_weights_may_be_of_another_dtype(norm: str) -> None:
    pytest.importorskip("triton")
    x, *weights = inputs(norm, 3, 7, 24)
    leaves = tuple(t.requires_grad_() for t in (x.half(), *weights))
    given, expected = run(norm, leaves, "triton"), (leaves[0], by_hand(norm, *leaves, eps=1e-5).half())
    torch.testing.assert_close(given, expected, rtol=2e-3, atol=2e-3)
    cotangents = [torch.randn_like(t) for t in expected]
    gradients = [torch.autograd.grad(outputs, leaves, cotangents) for outputs in (given, expected)]
    torch.testing.assert_close(*gradients, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_autocast_leaves_the_dtype_alone(norm: str) -> None:
    pytest.importorskip("triton")
    for dtype in (torch.float32, torch.bfloat16):
        x, *weights = inputs(norm, 3, 32)
        x = x.to(dtype).requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16):
            read, given = run(norm, (x, *weights), "triton", eps=1e-5)
        assert given.dtype == read.dtype == dtype
        expected = by_hand(norm, x.float(), *weights, eps=1e-5).to(dtype)
        torch.testing.assert_close(given, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_the_reference_runs_where_the_kernel_does_not(norm: str) -> None:
    pytest.importorskip("triton")
    for shape, dtype in (
        ((3, 8), torch.float64),
        ((2, WIDEST + 1), torch.float32),
        ((0, 8), torch.float32),
        ((4, 0, 8), torch.float32),
    ):
        leaves = inputs(norm, *shape, dtype=dtype)
        given, expected = (run(norm, leaves, backend) for backend in ("triton", "torch"))
        assert torch.equal(given[1], expected[1])


def test_opcheck() -> None:
    pytest.importorskip("triton")
    ops = torch.ops.xlroute
    for norm in ("rms", "layer"):
        x, weight, *bias = inputs(norm, 2, 5, 24)
        given = (x, weight, bias[0] if bias else None, norm == "layer", 1e-5)
        torch.library.opcheck(ops.norm.default, given)
        out, stats = ops.norm(*given)
        grad, *others = (torch.randn_like(out) for _ in range(3))
        torch.library.opcheck(ops.norm_backward.default, (grad, others, x, weight, stats, bool(bias)))


@pytest.mark.parametrize("readers", [0, 2])
def test_compiles_as_one_graph(readers: int) -> None:
    pytest.importorskip("triton")

    def total(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        *read, normed = norm_beside(x, weight, bias, norm="layer", readers=readers, backend="triton")
        return sum((each * (i + 2.0) for i, each in enumerate(read)), normed.sin())

    leaves = tuple(t.requires_grad_() for t in inputs("layer", 2, 5, 24))
    expected = total(*leaves)
    given = torch.compile(total, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(given, expected)
    cotangent = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(given, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent)
    )


def test_no_second_derivative() -> None:
    pytest.importorskip("triton")
    leaves = tuple(t.requires_grad_() for t in inputs("rms", 2, 24))
    normed = run("rms", leaves, "triton")[1]
    (first,) = torch.autograd.grad(normed.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        first.sum().backward()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_the_same_bits_in_every_run() -> None:
    leaves = inputs("layer", 30_000, 512)
    cotangents = [torch.randn_like(leaves[0]) for _ in range(2)]
    runs = [run_both_ways("layer", leaves, cotangents, "triton") for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(*pair) for pair in zip(runs[0], other, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_beyond_2_to_the_31_elements() -> None:
    x = torch.randn(2**31 // 512 + 3, 512, dtype=torch.float16, device=DEVICE).requires_grad_()
    weight = torch.randn(512, dtype=torch.float16, device=DEVICE)
    normed = run("rms", (x, weight), "triton")[1]
    torch.testing.assert_close(normed[-3:], F.rms_norm(x[-3:], (512,), weight))
    tail = torch.zeros_like(x)
    tail[-3:] = torch.randn(3, 512)
    (d_x,) = torch.autograd.grad(normed, x, tail)
    (expected,) = torch.autograd.grad(F.rms_norm(x[-3:], (512,), weight), x, tail[-3:])
    torch.testing.assert_close(d_x[-3:], expected[-3:])


def test_errors() -> None:
    x, weight, bias = inputs("layer", 2, 5, 4)
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got dtype torch.int64"):
        norm_beside(x.long(), weight)
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., d\]"):
        norm_beside(x[0, 0, 0], weight)
    with pytest.raises(ValueError, match=r"weight must have shape \(4,\), got \(3,\)"):
        norm_beside(x, weight[1:])
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\), got \(3,\)"):
        norm_beside(x, weight, bias[1:], norm="layer")
    with pytest.raises(ValueError, match="bias must be None with norm='rms'"):
        norm_beside(x, weight, bias)
    with pytest.raises(ValueError, match=r"weight must be on the device of x, .*, got meta"):
        norm_beside(x, weight.to("meta"))
    with pytest.raises(ValueError, match="norm must be 'rms' or 'layer', got 'l2'"):
        norm_beside(x, weight, norm="l2")  # type: ignore[arg-type]
    for eps in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="eps must be at least 0 and finite, got"):
            norm_beside(x, weight, eps=eps)
    for readers in (-1, 4):
        with pytest.raises(ValueError, match=f"readers must be between 0 and 3, got {readers}"):
            norm_beside(x, weight, readers=readers)


@pytest.mark.usefixtures("no_interpreter")
def test_backend_errors() -> None:
    with pytest.raises(ValueError, match="backend='triton' needs a CUDA tensor, got a tensor on cpu"):
        norm_beside(torch.randn(2, 3), torch.ones(3), backend="triton")
