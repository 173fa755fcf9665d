"""Who is measured at a layer's work, and what their results are checked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from layers_dense import DenseBlock, DenseFeedForward, DenseSelfAttention
from measurement import Check, close, earned, finite, measure
from routing_report import OURS, REFERENCE, Work
from torch import Tensor, nn

from xlroute.feedforward import ConditionalRoutedFeedForward

DENSE, PEER, PRODUCTS, LIGHT = "dense", "colt5 0.11.2", "matrix products", "light branch"
DENSE_CHECKED = 4  # tokens of a dense layer, the last ones, that are compared with float64

Gradients = dict[str, Tensor]
Result = tuple[Tensor, Gradients]  # an output; after a backward the gradients of the input and the parameters


@dataclass(frozen=True)
class Contender:
    """One who does the work.

    Attributes:
        subject: who it is.
        forward: does the forward, without a graph.
        both: does forward and backward.
        verify: checks the result of either.
    """

    subject: str
    forward: Callable[[], Result]
    both: Callable[[], Result]
    verify: Callable[[Result], list[Check]]


@dataclass(frozen=True)
class Reach:
    """What is to be reached by forward, forward and backward, and GPU memory; None for no such line."""

    forward: str | None
    both: str
    memory: str | None = None


def works(
    name: str,
    x: Tensor,
    contenders: list[Contender],
    reach: Reach,
    floor_subject: str | None = None,
) -> Iterator[Work]:
    """Measure all contenders at a layer's work on x: forward, forward and backward, and the memory for it."""
    shape = " x ".join(f"{side:,}" for side in x.shape)
    name = f"{name}, {shape}, {str(x.dtype).removeprefix('torch.')}"

    def work(part: str, reach: str, call: Callable[[Contender], Callable[[], Result]]) -> Work:
        measurements = [
            measure(
                each.subject,
                partial(call, each),
                each.verify,
                x.device,
                graph=False if each.subject == PEER else None,  # it waits for the device
            )
            for each in contenders
        ]
        title = f"{name}, {part}"
        return Work(title, title, reach, floor_subject=floor_subject, measurements=measurements)

    if reach.forward is not None:
        yield work("forward", reach.forward, lambda each: each.forward)
    both = work("forward + backward", reach.both, lambda each: each.both)
    yield both
    if reach.memory is not None:
        title = f"{name}, extra GPU memory"
        yield Work(title, title, reach.memory, quantity="MiB", measurements=list(both.measurements))


def routed(build: Callable[[bool | None], nn.Module], x: Tensor, cotangent: Tensor) -> list[Contender]:
    """Our layer and its reference: their errors against float64 may differ by a factor of two.

    Args:
        build: makes the layer, with the same weights each time, given `use_triton`.
        x: its input.
        cotangent: of its output.
    """
    ours, reference = (build(use_triton).to(x) for use_triton in (None, False))
    expected = train(reference, x, cotangent)
    exact = train(build(False).to(x).double(), x.double(), cotangent.double())

    def verify(result: Result) -> list[Check]:
        checks = [earned("output", result[0], expected[0], exact[0])]
        return [*checks, _worst_gradient(result[1], expected[1], exact[1])] if result[1] else checks

    return [
        _of_module(OURS, ours, x, cotangent, verify),
        _of_module(REFERENCE, reference, x, cotangent, verify),
    ]


def dense(
    layer: DenseSelfAttention | DenseFeedForward | DenseBlock, x: Tensor, cotangent: Tensor
) -> Contender:
    """A layer without routing, whose last tokens are compared with float64."""
    with torch.no_grad():
        exact = layer.to(x).double().last(x.double(), DENSE_CHECKED)

    def verify(result: Result) -> list[Check]:
        return [close("last tokens", result[0][:, -DENSE_CHECKED:], exact), *_all_finite(result)]

    return _of_module(DENSE, layer.to(x.dtype), x, cotangent, verify)


def light_branch(layer: nn.Module, x: Tensor, cotangent: Tensor) -> Contender:
    """The light branch of a layer alone, on its own input."""
    with torch.no_grad():
        exact = layer.to(x).double()(x.double())

    def verify(result: Result) -> list[Check]:
        return [close("output", result[0], exact), *_all_finite(result)]

    return _of_module(LIGHT, layer.to(x.dtype), x, cotangent, verify)


def matrix_products(
    layer: ConditionalRoutedFeedForward, x: Tensor, cotangent: Tensor, num_heavy_tokens: int
) -> Contender:
    """The matrix products of a routed feedforward alone, on rows that lie ready."""

    def branches(x: Tensor, cotangent: Tensor) -> dict[str, tuple[Tensor, ...]]:
        layer.to(x)
        return {
            name: (
                *(each[:, :tokens].flatten(0, 1) for each in (x, cotangent)),
                *(ff[i].get_parameter("weight").detach().clone() for i in (1, 4)),
            )
            for name, ff, tokens in (
                ("light", layer.light_ff, x.shape[1]),
                ("heavy", layer.heavy_ff, num_heavy_tokens),
            )
        }

    def products(branches: dict[str, tuple[Tensor, ...]], backward: bool) -> Result:
        results: Gradients = {}
        for name, (rows, to_out, wide, narrow) in branches.items():
            hidden = rows @ wide.T
            results |= {f"{name} hidden": hidden, f"{name} output": hidden @ narrow.T}
            if backward:
                to_hidden = to_out @ narrow
                results |= {
                    f"{name} gradient to narrow": to_out.T @ hidden,
                    f"{name} gradient to rows": to_hidden @ wide,
                    f"{name} gradient to wide": to_hidden.T @ rows,
                }
        return results["light output"], results

    _, exact = products(branches(x.double(), cotangent.double()), backward=True)

    def verify(result: Result) -> list[Check]:
        return [close(name, each, exact[name]) for name, each in result[1].items()]

    ready = branches(x, cotangent)
    return Contender(PRODUCTS, partial(products, ready, False), partial(products, ready, True), verify)


def peer(name: str, x: Tensor, cotangent: Tensor, **options: Any) -> list[Contender]:
    """The layer of colt5-attention, whose results must be finite; none if it is not installed."""
    try:
        package: Any = importlib.import_module("colt5_attention")
    except ImportError:
        return []
    torch.manual_seed(0)
    layer = getattr(package, name)(use_triton=x.device.type == "cuda", **options).to(x)
    return [_of_module(PEER, layer, x, cotangent, _all_finite)]


@torch.no_grad()
def run(layer: nn.Module, x: Tensor) -> Result:
    """The output, without a graph."""
    return layer(x), {}


def train(layer: nn.Module, x: Tensor, cotangent: Tensor) -> Result:
    """The output, and the gradients of the input and of every parameter that gets one."""
    x = x.detach().requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    out = layer(x)
    gradients = torch.autograd.grad(out, (x, *parameters), cotangent, allow_unused=True)
    named = zip(("input", *names), gradients, strict=True)
    return out.detach(), {name: each for name, each in named if each is not None}


def _of_module(
    subject: str, layer: nn.Module, x: Tensor, cotangent: Tensor, verify: Callable[[Result], list[Check]]
) -> Contender:
    return Contender(subject, partial(run, layer, x), partial(train, layer, x, cotangent), verify)


def _all_finite(result: Result) -> list[Check]:
    return [finite("output", result[0]), *(finite(name, each) for name, each in result[1].items())]


def _worst_gradient(given: Gradients, reference: Gradients, exact: Gradients) -> Check:
    """The check of the tensor whose gradient is the furthest off, against what its tolerance is."""
    missing = exact.keys() - (given.keys() & reference.keys())
    if missing:
        return Check(f"no gradient to {min(missing)}", float("inf"), 0.0, "float64")
    checks = [
        earned(f"gradient to {name}", given[name], reference[name], each) for name, each in exact.items()
    ]
    return max(checks, key=lambda check: (not check.passed, check.error / check.tolerance))
