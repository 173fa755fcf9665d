"""Which backend the ops run on, from the option `use_triton` of the layers."""

from __future__ import annotations

import functools
import warnings

import torch

from xlroute.kernels import Backend


def pick_backend(use_triton: bool | None, device: torch.device) -> Backend | None:
    """The `backend` argument of the ops; on a CPU that is the reference, with one warning for True."""
    if use_triton is None:
        return None
    if not use_triton:
        return "torch"
    if device.type != "cpu":
        return "triton"
    if not torch.compiler.is_compiling():
        _warn_once()
    return "torch"


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "Triton was asked for, but the rows are on a CPU: the PyTorch reference runs instead", stacklevel=2
    )
