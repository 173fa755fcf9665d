"""A speed is measured only once the result it belongs to was checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from timing import TOTAL_MS, Timing, extra_bytes, time_call
from torch import Tensor

T = TypeVar("T")

# The largest relative error that passes for arithmetic in a dtype, whatever the reference's own error is.
LOOSEST = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
POISON_BYTES = 1 << 29


@dataclass(frozen=True)
class Check:
    """An error, and what it may be at most."""

    what: str
    error: float
    tolerance: float
    against: str

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return f"{self.what}: error {self.error:.1e} against {self.against}, tolerance {self.tolerance:.1e}"


@dataclass(frozen=True)
class Measurement:
    """What was measured of one subject, or why nothing was.

    Attributes:
        subject: who did the work.
        timing: of calls that follow one upon the other.
        cold: of calls that each find nothing in the L2 cache; None where not taken.
        extra_bytes: the most memory held beyond what was held before.
        checks: what the result was checked for.
        failure: a red check, or an error; then there is no number.
    """

    subject: str
    timing: Timing | None = None
    cold: Timing | None = None
    extra_bytes: int | None = None
    checks: tuple[Check, ...] = ()
    failure: str | None = None

    @classmethod
    def broken(cls, subject: str, error: Exception, checks: tuple[Check, ...] = ()) -> Measurement:
        """Of a subject that raises an error."""
        first = next(iter(str(error).splitlines()), "")
        return cls(subject, checks=checks, failure=f"{type(error).__name__}: {first}")

    def to_json(self) -> dict[str, Any]:
        """As plain values, for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Measurement:
        """What `to_json` made plain values of."""
        timing, cold = (
            None if values[name] is None else Timing(**values[name]) for name in ("timing", "cold")
        )
        checks = tuple(Check(**each) for each in values["checks"])
        return cls(values["subject"], timing, cold, values["extra_bytes"], checks, values["failure"])


def measure(
    subject: str,
    build: Callable[[], Callable[[], T]],
    verify: Callable[[T], Iterable[Check]],
    device: torch.device,
    *,
    graph: bool | None = None,
    cold: bool = False,
    total_ms: float = TOTAL_MS,
) -> Measurement:
    """Check the result of a call, and time the call if all checks are green.

    Args:
        subject: who does the work.
        build: makes the call, with everything in place that is not to be timed.
        verify: checks its result.
        device: where it runs.
        graph: see `timing.time_call`.
        cold: also time it with a cold L2 cache, on a GPU.
        total_ms: about how long a timing may take.
    """
    checks: tuple[Check, ...] = ()
    try:
        call = build()
        _poison(device)
        checks = tuple(verify(call()))
        red = [str(check) for check in checks if not check.passed]
        if red:
            return Measurement(subject, checks=checks, failure="; ".join(red))
        extra = extra_bytes(call, device)
        timing = time_call(call, device, graph=graph, total_ms=total_ms)
        flushed = time_call(call, device, graph=graph, cold=True) if cold and device.type == "cuda" else None
        return Measurement(subject, timing, flushed, extra, checks)
    except Exception as error:  # one that breaks must not hide what the others do
        return Measurement.broken(subject, error, checks)


def _poison(device: torch.device) -> None:
    """Fill memory that is about to be handed out with NaN, so that what a kernel does not write is seen."""
    if device.type == "cuda":
        torch.full((POISON_BYTES // 4,), math.nan, device=device)


def relative_error(given: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm of the exact result, in float64; infinite if shapes differ.

    Where both are zero everywhere, it is 0.
    """
    if given.shape != exact.shape:
        return math.inf
    exact = exact.detach().to(torch.float64)
    difference = (given.detach().to(torch.float64) - exact).norm()
    return 0.0 if difference == 0 else (difference / exact.norm()).item()


def close(what: str, given: Tensor, exact: Tensor, against: str = "float64") -> Check:
    """An error that may be as large as arithmetic in the dtype of ``given`` can excuse."""
    return Check(what, relative_error(given, exact), LOOSEST[given.dtype], against)


def earned(what: str, given: Tensor, reference: Tensor, exact: Tensor) -> Check:
    """An error that may be twice that of the reference in the same dtype, both against float64.

    A single rounding of that dtype is always allowed, and never more than `LOOSEST`.
    """
    dtype = reference.dtype
    tolerance = max(2 * relative_error(reference, exact), torch.finfo(dtype).eps)
    return Check(what, relative_error(given, exact), min(tolerance, LOOSEST[dtype]), "float64")


def equal(what: str, given: Tensor, expected: Tensor, against: str) -> Check:
    """How many entries differ; none may."""
    if given.shape != expected.shape:
        return Check(what, math.inf, 0.0, against)
    return Check(what, float((given != expected).sum()), 0.0, against)


def finite(what: str, given: Tensor) -> Check:
    """How many entries are infinite or NaN; none may be."""
    return Check(what, float((~given.isfinite()).sum()), 0.0, "finite numbers")
