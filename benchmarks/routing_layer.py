"""Routed cross-attention to very many memories, and dense attention to all of them beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from measurement import Check, Measurement, close, earned, equal, finite, measure
from routing_report import OURS, PLAIN, REFERENCE, Point, Work
from routing_settings import Sizes, normal
from torch import Tensor, nn

from xlroute import ConditionalRoutedCrossAttention, RouterOutput
from xlroute.memory import MemoryLayer, MemoryStore

DTYPE = torch.bfloat16
DENSE_CHECKED = 4  # queries of dense attention that are compared with float64
ROWS_AT_ONCE = 1 << 17  # rows that are copied to a wider dtype at a time
SECOND = 1000.0  # dense attention is not drawn beyond
# What a size of the sweep needs beside the memories themselves, for the check included.
BYTES_A_ROW, BYTES_BESIDE = 128, 2 << 30

Gradients = dict[str, Tensor | None]
Trained = tuple[Tensor, Gradients]  # an output, and the gradient of every parameter


class DenseCrossAttention(nn.Module):
    """Attention of every query to every row, fused by PyTorch, with its four projections."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * dim_head
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Attend from x [b, n, d] to context [b, m, d]: [b, n, d]."""
        q, k, v = (
            projection(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, rows in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    @torch.no_grad()
    def exact(self, x: Tensor, context: Tensor) -> Tensor:
        """The same in float64, over parts of the context, by the plain formula."""
        wide = copy.deepcopy(self).double()
        q = wide.to_q(x.double()).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        total, weights = torch.zeros_like(q), torch.zeros_like(q[..., :1])
        for part in torch.split(context, ROWS_AT_ONCE, dim=1):
            k, v = (
                projection(part.double()).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for projection in (wide.to_k, wide.to_v)
            )
            # float64 holds these exponentials without a shift.
            weight = (q @ k.mT * q.shape[-1] ** -0.5).exp()
            total += weight @ v
            weights += weight.sum(-1, keepdim=True)
        return wide.to_out((total / weights).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


def routed_layer(
    sizes: Sizes, device: torch.device, use_triton: bool | None
) -> ConditionalRoutedCrossAttention:
    """The routed layer, with float32 weights that bfloat16 holds exactly."""
    torch.manual_seed(0)
    layer = ConditionalRoutedCrossAttention(
        sizes.dim,
        num_tokens_q=sizes.num_tokens_q,
        num_tokens_kv=sizes.num_tokens_kv,
        kv_routing_tokens=sizes.kv_routing_tokens,
        heads=sizes.heads,
        dim_head=sizes.dim_head,
        use_triton=use_triton,
    )
    # The output of queries that do not attend is large, and no error would be seen beside it.
    assert layer.null_q_token is not None
    nn.init.zeros_(layer.null_q_token)
    return layer.to(device, DTYPE).float()


def dense_layer(sizes: Sizes, device: torch.device) -> DenseCrossAttention:
    """Dense attention of the same widths."""
    torch.manual_seed(0)
    return DenseCrossAttention(sizes.dim, sizes.heads, sizes.dim_head).to(device, DTYPE)


def routed_attention(sizes: Sizes, device: torch.device) -> list[Work]:
    """The layer over a million memories: forward, forward and backward, and the memory they take."""
    m, d = sizes.memories, sizes.dim
    context = normal(1, m, d, device=device, seed=7, dtype=DTYPE)
    x, cotangent = (normal(1, sizes.queries, d, device=device, seed=seed, dtype=DTYPE) for seed in (8, 9))
    ours, reference = (routed_layer(sizes, device, use_triton).to(DTYPE) for use_triton in (None, False))
    autocast = routed_layer(sizes, device, None)
    dense = dense_layer(sizes, device)

    exact = train(
        routed_layer(sizes, device, False).double(), x.double(), context.double(), cotangent.double()
    )
    expected = train(reference, x, context, cotangent)
    exact_dense = dense.exact(x[:, :DENSE_CHECKED], context)

    def verify(out: Tensor) -> list[Check]:
        return [earned("output", out, expected[0], exact[0])]

    def verify_trained(trained: Trained) -> list[Check]:
        return [*verify(trained[0]), _worst_gradient(trained[1], expected[1], exact[1])]

    def verify_dense(out: Tensor) -> list[Check]:
        return [close("output", out[:, :DENSE_CHECKED], exact_dense), finite("output", out)]

    def verify_dense_trained(trained: Trained) -> list[Check]:
        gradients = torch.cat([each.flatten() for each in trained[1].values() if each is not None])
        return [*verify_dense(trained[0]), finite("gradients", gradients)]

    def forward(layer: nn.Module) -> Callable[[], Tensor]:
        return lambda: run(layer, x, context)

    def both(layer: nn.Module) -> Callable[[], Trained]:
        return lambda: train(layer, x, context, cotangent)

    name = f"ConditionalRoutedCrossAttention, {m:,} memories bf16"
    floor = context.numel() * context.element_size()
    routed = ((OURS, ours), (REFERENCE, reference))
    works = [
        Work(
            "layer forward",
            f"{name}, forward",
            "1.3 x floor",
            floor_bytes=floor,
            input_bytes=floor,
            measurements=[
                *(measure(subject, partial(forward, layer), verify, device) for subject, layer in routed),
                measure(PLAIN, partial(forward, dense), verify_dense, device),
            ],
        ),
        Work(
            "layer forward + backward",
            "the same, forward + backward",
            "3 x floor",
            floor_bytes=floor,
            input_bytes=floor,
            measurements=[
                *(
                    measure(subject, partial(both, layer), verify_trained, device)
                    for subject, layer in routed
                ),
                measure(PLAIN, partial(both, dense), verify_dense_trained, device),
            ],
        ),
    ]
    works.append(
        Work(
            "layer memory",
            "the same, extra GPU memory",
            "64 MiB",
            quantity="MiB",
            measurements=list(works[-1].measurements),
        )
    )
    # As training has it: float32 weights and queries, with autocast.
    widened = x.float()
    alone: tuple[tuple[str, Measurement], ...] = (
        ("forward", measure(OURS, lambda: lambda: run(autocast, widened, context), verify, device)),
        (
            "forward + backward",
            measure(
                OURS, lambda: lambda: train(autocast, widened, context, cotangent), verify_trained, device
            ),
        ),
    )
    works += [
        Work(
            f"autocast layer {what}",
            f"{name}, float32 weights and queries under autocast, {what}",
            "",
            floor_bytes=floor,
            input_bytes=floor,
            in_table=False,
            measurements=[measurement],
        )
        for what, measurement in alone
    ]
    return works


def stored_attention(sizes: Sizes, device: torch.device) -> Iterator[Work]:
    """The layer over a memory's rows whose scores are stored: forward, in one CUDA graph."""
    for m, reach in zip(sizes.stored, ("0.12 ms", "0.35 ms"), strict=True):
        layer = routed_layer(sizes, device, None).to(DTYPE)
        x, context = _inputs(m, sizes, device)
        expected = run(layer, x, context)
        store = MemoryStore.create(layers=1, streams=1, dim=sizes.dim, dtype=DTYPE, device=device)
        store.append(context[None])
        del context
        build = partial(_calling, layer, x, store.layer(0))
        verify = partial(_same_output, expected)
        yield Work(
            f"layer stored {m}",
            f"the same with stored scores, forward, {m:,} memories",
            reach,
            floor_bytes=m * sizes.kv_routing_tokens * torch.float32.itemsize,
            input_bytes=m * sizes.kv_routing_tokens * torch.float32.itemsize,
            measurements=[measure(OURS, build, verify, device, graph=True)],
        )


def _calling(layer: nn.Module, x: Tensor, rows: MemoryLayer) -> Callable[[], Tensor]:
    return lambda: run(layer, x, rows)


def _same_output(expected: Tensor, out: Tensor) -> list[Check]:
    return [equal("output", out, expected, "a call that scores all rows")]


def sweep(sizes: Sizes, device: torch.device) -> Iterator[Point]:
    """Forward times over the number of memories, up to where they no longer fit."""
    routed, reference = (routed_layer(sizes, device, use_triton).to(DTYPE) for use_triton in (None, False))
    dense: DenseCrossAttention | None = dense_layer(sizes, device)
    for m in sizes.sweep:
        size = m * sizes.dim * DTYPE.itemsize
        if not _fits(size + m * BYTES_A_ROW + BYTES_BESIDE, device):
            return
        yield from _routed_points(m, sizes, routed, reference, device)
        # Keys and values are each as large as the memories, and a CUDA graph holds them once more.
        if dense is None or not _fits(5 * size + BYTES_BESIDE, device):
            continue
        point = _dense_point(m, sizes, dense, device)
        if point.measurement.timing is None or point.measurement.timing.median > SECOND:
            dense = None
        yield point


def _inputs(m: int, sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Queries and memories."""
    x = normal(1, sizes.queries, sizes.dim, device=device, seed=8, dtype=DTYPE)
    return x, normal(1, m, sizes.dim, device=device, seed=m, dtype=DTYPE)


def _routed_points(
    m: int,
    sizes: Sizes,
    routed: ConditionalRoutedCrossAttention,
    reference: ConditionalRoutedCrossAttention,
    device: torch.device,
) -> list[Point]:
    x, context = _inputs(m, sizes, device)
    expected = run(reference, x, context)
    tokens = routed.kv_router.routing_token
    assert tokens is not None

    @torch.no_grad()
    def route() -> RouterOutput:
        return routed.route(context)

    return [
        Point(
            "router",
            m,
            measure(
                OURS,
                lambda: route,
                lambda out: _chosen(out.indices[0], context, tokens),
                device,
            ),
        ),
        Point(
            "layer",
            m,
            measure(
                OURS,
                lambda: lambda: run(routed, x, context),
                lambda out: [close("output", out, expected, "the reference")],
                device,
            ),
        ),
    ]


def _dense_point(m: int, sizes: Sizes, dense: DenseCrossAttention, device: torch.device) -> Point:
    x, context = _inputs(m, sizes, device)
    exact = dense.exact(x[:, :DENSE_CHECKED], context)
    measurement: Measurement = measure(
        PLAIN,
        lambda: lambda: run(dense, x, context),
        lambda out: [close("output", out[:, :DENSE_CHECKED], exact), finite("output", out)],
        device,
    )
    return Point("dense", m, measurement)


@torch.no_grad()
def _chosen(indices: Tensor, context: Tensor, tokens: Tensor) -> list[Check]:
    """Whether indices [r, k] are those of the largest scores, by a plain float32 product."""
    _, m, d = context.shape
    parts = [
        tokens.float() @ F.rms_norm(part.float(), (d,), eps=1e-6).mT * d**-0.5
        for part in torch.split(context[0], ROWS_AT_ONCE)
    ]
    scores = torch.cat(parts, dim=-1)
    outside = (indices < 0) | (indices >= m)
    indices = indices.clamp(0, m - 1)
    worst = scores.gather(-1, indices).amin(-1)
    rest = scores.scatter(-1, indices, -torch.inf)
    missed = (rest.amax(-1) - worst).amax().clamp(min=0).item()
    distinct = (rest == -torch.inf).sum(-1)
    return [
        equal("indices out of range", outside, torch.zeros_like(outside), "[0, m)"),
        equal("rows chosen twice", distinct, torch.full_like(distinct, indices.shape[-1]), "k rows"),
        Check("the best row left out less the worst row chosen", missed, 1e-5, "a plain product"),
    ]


def _fits(size: int, device: torch.device) -> bool:
    """Whether so many bytes are free on the device."""
    if device.type != "cuda":
        return True
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return size < free


@torch.no_grad()
def run(layer: nn.Module, x: Tensor, context: Tensor | MemoryLayer) -> Tensor:
    """The output, without a graph."""
    with _autocast(layer, context):
        return layer(x, context)  # type: ignore[no-any-return]


def train(layer: nn.Module, x: Tensor, context: Tensor, cotangent: Tensor) -> Trained:
    """The output, and the gradient of every parameter; None for those that get none."""
    names, parameters = zip(*layer.named_parameters(), strict=True)
    with _autocast(layer, context):
        out = layer(x, context)
    gradients = torch.autograd.grad(out, parameters, cotangent.to(out.dtype), allow_unused=True)
    return out.detach(), dict(zip(names, gradients, strict=True))


def _autocast(layer: nn.Module, context: Tensor | MemoryLayer) -> torch.autocast:
    """On for float32 weights beside narrower memories; no cast is kept, so that all can go into a graph."""
    narrow = next(layer.parameters()).dtype != context.dtype
    return torch.autocast(context.device.type, DTYPE, enabled=narrow, cache_enabled=False)


def _worst_gradient(given: Gradients, reference: Gradients, exact: Gradients) -> Check:
    """The check of the parameter whose gradient is the furthest off, against what its tolerance is."""
    checks = []
    for name, expected in exact.items():
        mine, other = given[name], reference[name]
        if mine is None or other is None or expected is None:
            return Check(f"no gradient to {name}", float("inf"), 0.0, "float64")
        checks.append(earned(f"gradient to {name}", mine.to(other.dtype), other, expected))
    return max(checks, key=lambda check: (not check.passed, check.error / check.tolerance))
