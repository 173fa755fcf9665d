"""bias_gelu against the formula, and in Triton against the reference's error from float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xlroute.kernels import bias_gelu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's bfloat16 is wrong.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return tuple((2 * torch.randn(size, device=DEVICE)).to(dtype) for size in (shape, shape[-1:]))  # type: ignore[return-value]


def run(h: Tensor, bias: Tensor, cotangent: Tensor, backend: str) -> tuple[Tensor, ...]:
    leaves = tuple(t.detach().requires_grad_() for t in (h, bias))
    out = bias_gelu(*leaves, backend=backend)  # type: ignore[arg-type]
    return out.detach(), *torch.autograd.grad(out, leaves, cotangent)


def test_reference() -> None:
    h, bias = (t.requires_grad_() for t in inputs(3, 4, 6, dtype=torch.float64))
    z = h + bias
    expected = z / 2 * (1 + torch.erf(z / math.sqrt(2)))
    given = bias_gelu(h, bias, backend="torch")
    torch.testing.assert_close(given, expected)
    cotangent = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(given, (h, bias), cotangent), torch.autograd.grad(expected, (h, bias), cotangent)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 37, 24), (150, 5), (9, 1100), (3, 64), (1, 1)], ids=str)
def test_triton(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("xlroute.kernels.bias_gelu_triton", exc_type=ImportError)
    monkeypatch.setattr(kernels, "PROGRAMS", 2)  # so that each takes several tiles, some one more than others
    h, bias = inputs(*shape, dtype=dtype)
    cotangent = torch.randn(shape, device=DEVICE).to(dtype)
    exact = run(h.double(), bias.double(), cotangent.double(), "torch")
    reference = run(h, bias, cotangent, "torch")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(math.nan))
    given = run(h, bias, cotangent, "triton")
    for ours, theirs, wanted in zip(given, reference, exact, strict=True):
        assert ours.dtype == dtype
        error, allowed = (ours - wanted).norm(), 2 * (theirs - wanted).norm()
        # The slope is the sum of two terms that cancel at -0.75.
        size = max(t.norm().item() for t in (wanted, h, cotangent))
        assert error <= allowed.clamp(min=4 * torch.finfo(dtype).eps * size)


def test_far_from_zero() -> None:
    pytest.importorskip("triton")
    h = torch.tensor([[-1e18, -60.0, -6.0, -0.0, 6.0, 60.0, 1e18, math.nan]], device=DEVICE)
    bias, cotangent = torch.zeros(8, device=DEVICE), torch.ones_like(h)
    given, expected = (run(h, bias, cotangent, backend) for backend in ("triton", "torch"))
    torch.testing.assert_close(given, expected, equal_nan=True)


def test_any_strides_and_another_dtype_of_the_bias() -> None:
    pytest.importorskip("triton")
    h, bias = inputs(2, 24, 7)
    h = h.half().transpose(1, 2)
    bias = torch.randn(24, device=DEVICE)
    cotangent = torch.randn(2, 24, 7, device=DEVICE).half().transpose(1, 2)
    given, expected = (run(h, bias, cotangent, backend) for backend in ("triton", "torch"))
    for ours, theirs in zip(given, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_row_does_not_depend_on_its_neighbours(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    h, bias = inputs(40, 48)
    cotangent = torch.randn_like(h)
    i = int(torch.randint(40, ()))
    together = run(h, bias, cotangent, backend)
    alone = run(h[i : i + 1], bias, cotangent[i : i + 1], backend)
    for each, one in zip(together[:2], alone[:2], strict=True):
        assert torch.equal(each[i : i + 1], one)


def test_float64_and_nothing_run_the_reference() -> None:
    pytest.importorskip("triton")
    for h, bias in (inputs(3, 8, dtype=torch.float64), inputs(0, 8), inputs(4, 0, 8), inputs(4, 0)):
        assert torch.equal(bias_gelu(h, bias, backend="triton"), F.gelu(h + bias))


def test_autocast_changes_nothing() -> None:
    pytest.importorskip("triton")
    h, bias = inputs(5, 24)
    for backend in ("torch", "triton"):
        expected = bias_gelu(h, bias, backend=backend)  # type: ignore[arg-type]
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(bias_gelu(h, bias, backend=backend), expected)  # type: ignore[arg-type]


def test_opcheck() -> None:
    pytest.importorskip("triton")
    h, bias = inputs(2, 5, 24)
    ops = torch.ops.xlroute
    torch.library.opcheck(ops.bias_gelu.default, (h.requires_grad_(), bias.requires_grad_()))
    torch.library.opcheck(
        ops.bias_gelu_backward.default, (torch.randn_like(h), h.detach().half(), bias.detach())
    )


def test_no_second_derivative() -> None:
    pytest.importorskip("triton")
    h, bias = (t.requires_grad_() for t in inputs(2, 24))
    out = bias_gelu(h, bias, backend="triton")
    (first,) = torch.autograd.grad(out.square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        first.sum().backward()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_the_same_bits_in_every_run() -> None:
    h, bias = inputs(30_000, 512)
    cotangent = torch.randn_like(h)
    runs = [run(h, bias, cotangent, "triton") for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(*pair) for pair in zip(runs[0], other, strict=True))


def test_errors() -> None:
    h, bias = inputs(2, 5, 4)
    with pytest.raises(TypeError, match=r"h must be a floating-point tensor, got dtype torch.int64"):
        bias_gelu(h.long(), bias)
    with pytest.raises(ValueError, match=r"h must have shape .* got \(2, 5, 4\) and \(3,\)"):
        bias_gelu(h, bias[1:])
    with pytest.raises(ValueError, match=r"bias must be on the device of h, .*, got meta"):
        bias_gelu(h, bias.to("meta"))


@pytest.mark.usefixtures("no_interpreter")
def test_backend_errors() -> None:
    with pytest.raises(ValueError, match="backend='triton' needs a CUDA tensor, got a tensor on cpu"):
        bias_gelu(torch.randn(2, 3), torch.ones(3), backend="triton")
