"""How long a call takes, how much memory it needs, and how fast the memory is, on a GPU or a CPU."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

GRAPH_MS = 2.0  # a CUDA graph holds as many calls in a row as take about this long
TOTAL_MS = 200.0  # what one timing may take, warm-up aside
MOST_CALLS = 100  # in one graph
REPEATS = (5, 50)  # fewest and most
BUSY_CALLS = 5


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: the median, the 20% and 80% quantiles, and how they were taken."""

    median: float
    low: float
    high: float
    method: str


def on_one_stream(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Runs everything inside on one stream of its own.

    A CUDA graph cannot be captured on the default stream, and a backward runs on the stream of its forward.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def time_call(
    call: Call,
    device: torch.device,
    *,
    graph: bool | None = None,
    cold: bool = False,
    total_ms: float = TOTAL_MS,
) -> Timing:
    """Time a call that has run before.

    Args:
        call: what to time; its result is dropped.
        device: where it runs.
        graph: replay CUDA graphs of as many calls as take about 2 ms, without the host's part. None: unless
            the call waits for the device. False: CUDA events around single calls.
        cold: time single calls, each after the L2 cache was filled with something else. Without it, calls
            follow one upon the other, and inputs that fit in the cache stay there. Without effect on a CPU.
        total_ms: about how long it may take, warm-up aside.
    """
    if device.type != "cuda":
        return _time_on_cpu(call, total_ms)
    calls, run, kind = 1, call, "CUDA events around"
    call()
    if graph or (graph is None and not _waits_for_device(call)):
        with contextlib.suppress(RuntimeError):  # what no graph can hold is timed by events
            run, kind = _capture(call, 1), "replays of a CUDA graph of"
    estimate = min(_event_times(run, 3))
    if run is not call and not cold:
        calls = int(min(max(GRAPH_MS / estimate, 1), MOST_CALLS))
        run = _capture(call, calls)
    repeats = _repeats(estimate * calls, total_ms)
    flush: Call | None = None
    if cold:
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        flush = torch.empty(size, dtype=torch.uint8, device=device).zero_
    times = _event_times(run, repeats, flush)
    method = f"{repeats} x {kind} {calls} call{'s' if calls > 1 else ''}"
    return _summary([each / calls for each in times], method + (", L2 flushed before each" if cold else ""))


def extra_bytes(call: Call, device: torch.device) -> int | None:
    """The most GPU memory that a call holds beyond what was held before it, its result included.

    The call should have run before, so that workspaces which libraries keep are not counted. None on a CPU.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - held


def copy_rate(size: int, device: torch.device) -> float:
    """Bytes read plus bytes written a second by a copy of ``size`` bytes within the device's memory."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_call(lambda: target.copy_(source), device, graph=False)
    return 2 * size / (timing.median / 1e3)


def product_rate(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds a second, counted as two operations each, of a product of square matrices of a size."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timing = time_call(lambda: a @ b, device, graph=False)
    return 2 * size**3 / (timing.median / 1e3)


def host_waits(call: Call, device: torch.device) -> int | None:
    """How often the host waits for the device in a call. None on a CPU."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(each.message) for each in caught)


def busy_time(call: Call, device: torch.device) -> float | None:
    """Milliseconds for which the device is at work in a call that has run before, the mean of a few.

    All that it computes and copies counts, by PyTorch's profiler, and what goes on at the same time counts
    once. So the host's part is left out, which limits a call that is not one CUDA graph. None on a CPU.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
        for _ in range(BUSY_CALLS):
            call()
        torch.cuda.synchronize(device)
    return busy_of(trace.events()) / BUSY_CALLS


def busy_of(events: Iterable[FunctionEvent]) -> float:
    """Milliseconds for which a GPU is at work, of what a profiler saw."""
    spans = sorted(
        (each.time_range.start, each.time_range.end)
        for each in events
        if each.device_type == DeviceType.CUDA and not each.is_user_annotation
    )
    busy, until = 0.0, -math.inf
    for start, end in spans:
        busy += max(end - max(start, until), 0)
        until = max(until, end)
    return busy / 1e3  # of microseconds


def _time_on_cpu(call: Call, total_ms: float) -> Timing:
    start = time.perf_counter()
    call()
    repeats = _repeats(1e3 * (time.perf_counter() - start), total_ms)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return _summary(times, f"{repeats} x clock around 1 call")


def _repeats(estimate: float, total_ms: float) -> int:
    fewest, most = REPEATS
    return int(min(max(total_ms / max(estimate, 1e-6), fewest), most))


def _summary(times: list[float], method: str) -> Timing:
    low, median, high = (float(each) for each in np.quantile(times, (0.2, 0.5, 0.8)))
    return Timing(median, low, high, method)


def _event_times(call: Call, repeats: int, before: Call | None = None) -> list[float]:
    """Milliseconds of each call, between CUDA events."""
    pairs = []
    for _ in range(repeats):
        if before is not None:
            before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def _waits_for_device(call: Call) -> bool:
    """Whether the host waits for the device somewhere in a call, which no graph can hold.

    Asked beforehand, because a capture that breaks off may leave the allocator unusable.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this mode calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _capture(call: Call, calls: int) -> Call:
    """Replays a graph of so many calls in a row, and has done so once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(calls):
            call()
    graph.replay()
    return graph.replay
