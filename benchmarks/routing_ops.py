"""The ops of routing one by one: coordinate descent, soft top-k, scores; and how exact a gradient is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal, TypeVar

import torch
from measurement import Check, Measurement, close, earned, equal, measure
from routing_report import OURS, PLAIN, REFERENCE, Work
from routing_settings import EPS, EPS_DECAY, EPS_INIT, EPS_SOFT_TOPK, Sizes, gradient_inputs, normal
from torch import Tensor

from xlroute.kernels import coordinate_descent, row_scores, soft_topk_with_indices

Backend = Literal["torch", "triton"]
GatesOf = Callable[[Tensor, Backend | None], Tensor]
T = TypeVar("T")

ROWS_AT_ONCE = 1 << 17  # rows that are copied to float64 at a time


def descent(sizes: Sizes, device: torch.device) -> list[Work]:
    """Coordinate descent, forward and backward."""
    shape = sizes.descent_shape
    s, cotangent = (normal(*shape, device=device, seed=seed) for seed in (1, 2))

    def gates(scores: Tensor, backend: Backend | None) -> Tensor:
        return coordinate_descent(
            scores,
            k=sizes.descent_k,
            n_iters=sizes.descent_iters,
            eps=EPS,
            eps_init=EPS_INIT,
            eps_decay=EPS_DECAY,
            backend=backend,
        )

    exact, reference = gates(s.double(), "torch"), gates(s, "torch")
    name = f"coordinate descent {shape[0]} x {shape[1]:,}, T = {sizes.descent_iters}"
    forward = Work(
        "descent forward",
        f"{name}, forward",
        "0.10 ms",
        floor_bytes=_bytes(s, s),
        input_bytes=_bytes(s),
        measurements=_ours_and_reference(
            lambda backend: lambda: gates(s, backend),
            lambda result: [earned("gates", result, reference, exact)],
            device,
            cold=True,
        ),
    )
    return [forward, _backward_work("descent backward", f"{name}, backward", "0.06 ms", gates, s, cotangent)]


def soft_topk(sizes: Sizes, device: torch.device) -> list[Work]:
    """Soft top-k with the indices of the largest scores, forward and backward."""
    shape, k = sizes.topk_shape, sizes.topk_k
    s, cotangent = (normal(*shape, device=device, seed=seed) for seed in (3, 4))

    def both(scores: Tensor, backend: Backend | None) -> tuple[Tensor, Tensor]:
        return soft_topk_with_indices(scores, k=k, num=k, eps=EPS_SOFT_TOPK, backend=backend)

    def gates(scores: Tensor, backend: Backend | None) -> Tensor:
        return both(scores, backend)[0]

    exact, reference = gates(s.double(), "torch"), gates(s, "torch")
    # The scores in order, equal ones by their index.
    order = s.sort(dim=-1, descending=True, stable=True).indices[:, :k]

    def verify(result: tuple[Tensor, Tensor]) -> list[Check]:
        gates, indices = result
        return [earned("gates", gates, reference, exact), equal("indices", indices, order, "a stable sort")]

    exact_parts = s.gather(-1, order).double(), s.double().logsumexp(-1)

    def verify_parts(result: tuple[Tensor, Tensor]) -> list[Check]:
        names = ("largest scores", "logsumexp")
        return [close(*each) for each in zip(names, result, exact_parts, strict=True)]

    name = f"soft_topk with indices, {shape[0]} x {shape[1]:,}, k = {k:,}"
    forward = Work(
        "soft_topk forward",
        f"{name}, forward",
        "0.05 ms",
        floor_bytes=_bytes(s, s, order),
        input_bytes=_bytes(s),
        measurements=[
            *_ours_and_reference(lambda backend: lambda: both(s, backend), verify, device, cold=True),
            measure(
                PLAIN,
                lambda: lambda: (s.topk(k, dim=-1).values, s.logsumexp(-1)),
                verify_parts,
                device,
                cold=True,
            ),
        ],
    )
    return [
        forward,
        _backward_work("soft_topk backward", f"{name}, backward", "0.03 ms", gates, s, cotangent),
    ]


def scores(sizes: Sizes, device: torch.device) -> list[Work]:
    """Scores of normalised rows, for few and for many routing tokens."""
    rows = normal(1, sizes.memories, sizes.dim, device=device, seed=5, dtype=torch.bfloat16)
    reaches = ("1.05 x floor", "1.1 x floor")
    return [_scores(rows, r, reach) for r, reach in zip(sizes.routing_tokens, reaches, strict=True)]


def gradient_error(sizes: Sizes, device: torch.device) -> Work:
    """How far the gradient of coordinate descent lies from float64 autograd."""
    k, n_iters = sizes.gradient_k, sizes.gradient_iters
    s, cotangent = gradient_inputs(sizes, device)
    exact = _backward(lambda x: unrolled_descent(x, k, n_iters), s.double(), cotangent.double())()

    def gates(scores: Tensor, backend: Backend | None) -> Tensor:
        return coordinate_descent(
            scores, k=k, n_iters=n_iters, eps=EPS, eps_init=EPS_INIT, eps_decay=EPS_DECAY, backend=backend
        )

    return Work(
        "gradient error",
        f"gradient error, n = {s.shape[-1]}, k = {k}, T = {n_iters}, eps {EPS_INIT:g} to {EPS}",
        "5e-06",
        quantity="relative error",
        measurements=_ours_and_reference(
            lambda backend: _backward(lambda x: gates(x, backend), s, cotangent),
            lambda result: [close("gradient", result, exact, "float64 autograd")],
            device,
        ),
    )


def unrolled_descent(s: Tensor, k: float, n_iters: int) -> Tensor:
    """Coordinate descent on both dual vectors, as its papers write it (arXiv 1502.04759, 2303.09752)."""
    eps, b = EPS_INIT, -s
    log_k = torch.tensor(float(k), dtype=s.dtype, device=s.device).log()
    for _ in range(n_iters):
        a = eps * (log_k - ((s + b) / eps).logsumexp(-1, keepdim=True))
        b = -(s + a).relu()
        eps = max(eps * EPS_DECAY, EPS)
    return ((s + a + b) / eps).exp()


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _ours_and_reference(
    build: Callable[[Backend | None], Callable[[], T]],
    verify: Callable[[T], Iterable[Check]],
    device: torch.device,
    *,
    cold: bool = False,
) -> list[Measurement]:
    """The backend that the device picks, which is Triton on a GPU, and the PyTorch reference."""
    subjects: tuple[tuple[str, Backend | None], ...] = ((OURS, None), (REFERENCE, "torch"))
    return [
        measure(subject, partial(build, backend), verify, device, cold=cold) for subject, backend in subjects
    ]


def _backward(function: Callable[[Tensor], Tensor], s: Tensor, cotangent: Tensor) -> Callable[[], Tensor]:
    """The backward alone, as often as one likes."""
    s = s.detach().requires_grad_()
    output = function(s)
    return lambda: torch.autograd.grad(output, s, cotangent, retain_graph=True)[0]


def _backward_work(key: str, name: str, reach: str, gates: GatesOf, s: Tensor, cotangent: Tensor) -> Work:
    """The backward of an op from scores to gates."""
    exact = _backward(lambda x: gates(x, "torch"), s.double(), cotangent.double())()
    reference = _backward(lambda x: gates(x, "torch"), s, cotangent)()
    return Work(
        key,
        name,
        reach,
        floor_bytes=_bytes(s, cotangent, reference),
        input_bytes=_bytes(s, cotangent),
        measurements=_ours_and_reference(
            lambda backend: _backward(lambda x: gates(x, backend), s, cotangent),
            lambda result: [earned("gradient", result, reference, exact)],
            s.device,
            cold=True,
        ),
    )


def _scores(rows: Tensor, r: int, reach: str) -> Work:
    """The scores of rows [1, m, d] against r routing tokens."""
    _, m, d = rows.shape
    tokens = normal(r, d, device=rows.device, seed=6)

    def given(backend: Backend | None) -> Tensor:
        return row_scores(rows, tokens, normalize="rms", scale=d**-0.5, backend=backend)

    norm = (
        torch.cat([part.double().square().mean(-1) for part in torch.split(rows[0], ROWS_AT_ONCE)])
        .add(1e-6)
        .sqrt()
    )
    exact = (_exact_product(rows, tokens) / norm * d**-0.5)[None]
    reference = given("torch")
    # A matrix product takes both in one dtype, and leaves out the normalising.
    narrow = tokens.to(rows.dtype)
    exact_product = _exact_product(rows, narrow)
    return Work(
        f"scores R = {r}",
        f"scores of {m:,} x {d} bf16, R = {r}",
        reach,
        floor_bytes=_bytes(rows, tokens, reference),
        input_bytes=_bytes(rows, tokens),
        measurements=[
            *_ours_and_reference(
                lambda backend: lambda: given(backend),
                lambda result: [earned("scores", result, reference, exact)],
                rows.device,
            ),
            measure(
                PLAIN,
                lambda: lambda: narrow @ rows[0].mT,
                lambda result: [close("product", result, exact_product)],
                rows.device,
            ),
        ],
    )


def _exact_product(rows: Tensor, tokens: Tensor) -> Tensor:
    """The product of tokens [r, d] and rows [1, m, d] in float64: [r, m]."""
    return torch.cat(
        [tokens.double() @ part.double().mT for part in torch.split(rows[0], ROWS_AT_ONCE)], dim=-1
    )
