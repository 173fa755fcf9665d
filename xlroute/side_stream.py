"""Work that nobody waits for yet runs beside other work, on a CUDA stream of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=tuple[Any, ...])


def run_beside(work: Callable[[Tensor], T], x: Tensor) -> Callable[[], T]:
    """Start ``work(x)``, and return a function that gives its results, tuples of tensors, once it is called.

    On a GPU, where nothing is differentiated, compiled or cast by autocast, the work runs on a side stream
    until then. Everywhere else it is done at once. In a CUDA graph the two become parallel branches.
    """
    if (
        x.device.type != "cuda"
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cuda")  # it keeps casts of weights, which both streams would share
    ):
        done = work(x)
        return lambda: done
    current = torch.cuda.current_stream(x.device)
    side = _side_stream(x.device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        results = work(x)
    # Whoever drops a tensor must not get it overwritten while the other stream still reads it.
    x.record_stream(side)

    def join() -> T:
        current.wait_stream(side)
        for tensor in _tensors(results):
            tensor.record_stream(current)
        return results

    return join


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _tensors(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [tensor for each in results or () for tensor in _tensors(each)]
