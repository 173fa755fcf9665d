"""Copies of what the host knows, to the device where it is needed."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The values on a device; of those that the host has in ordinary memory, it does not wait for a GPU.

    CUDA takes such values over before it returns, so they may change then. A CUDA graph would read them from
    where they were each time that it runs, and so refuses them.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return values.to(device, non_blocking=values.device.type == "cpu" and not capturing)
