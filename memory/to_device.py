"""Copies of what the host knows, to the device where it is needed, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The values on a device; of those that the host has in ordinary memory, it does not wait for a GPU.

    CUDA takes such values over before it returns, so they may change then. A CUDA graph would read them from
    where they were each time that it runs, and so refuses them.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return values.to(device, non_blocking=values.device.type == "cpu" and not capturing)


def integers(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Tensor:
    """Numbers, or rows of equally many, on a device: int64."""
    # NumPy reads lists several times faster than PyTorch.
    array = np.array(values, dtype=np.int64)
    # A tensor made in inference mode could not be saved for backward later.
    with torch.inference_mode(False):
        return to_device(torch.from_numpy(array), torch.device(device))


def begin_to_host(values: Tensor) -> Callable[[], Tensor]:
    """Begin to copy values to the CPU.

    Returns:
        What gives the copy. Of values on a GPU, the host waits for them there, and not before.
    """
    # The copy goes to pinned memory, for which CUDA does not wait. Other devices' copies would be read early.
    copy = values.to("cpu", non_blocking=values.is_cuda)
    if not values.is_cuda:
        return lambda: copy
    there = torch.cuda.current_stream(values.device).record_event()

    def wait() -> Tensor:
        there.synchronize()
        return copy

    return wait
