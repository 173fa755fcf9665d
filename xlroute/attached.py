"""Rows of the last segments that still have their graph, beside a memory whose own rows carry none.

The store gets every row detached, when it leaves the XL window. For as long as gradient is to reach the
states that were stored, they are kept here as well, and take the places of their copies when the memory is
read: the same numbers, with a graph.

Shapes: b streams, n tokens in a segment, N tokens in all segments that are kept, a rows of them that are in
question, m memory rows, d dim, r routing tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlroute.kernels import Backend, gather_rows, row_scores
from xlroute.memory import MemoryLayer
from xlroute.memory.at_hand import RowsAtHand
from xlroute.memory.layer import Keep
from xlroute.memory.routing_keys import RoutingKeys
from xlroute.memory.to_device import to_device


class AttachedSegment(NamedTuple):
    """The states of one segment as its forward has computed them."""

    states: Mapping[int, Tensor]  # by block, counted from 0: what entered it, [b, n, d], out of `attach`
    lengths: Tensor  # int64 [b] on the CPU, how many of each stream count, the first ones

    @property
    def spent(self) -> bool:
        """Whether a backward has been through the states, and left nothing for a second one."""
        return any(_spent(states) for states in self.states.values())


def attach(states: Tensor) -> Tensor:
    """The states, by which it can be told later whether a backward has been through them."""
    return _Watched.apply(states)  # type: ignore[no-any-return, no-untyped-call]


def still_attached(segments: tuple[AttachedSegment, ...]) -> tuple[AttachedSegment, ...]:
    """Those of segments, oldest first, that gradient can reach: the ones after the last that is spent.

    None, where no gradient is recorded.
    """
    if not torch.is_grad_enabled():
        return ()
    spent = [i for i, segment in enumerate(segments) if segment.spent]
    return segments[spent[-1] + 1 :] if spent else segments


class AttachedRows:
    """The newest rows of segments, but for the very newest; they take the places of their copies.

    Copies are found by age. So rows of a document that has ended, of which there are none, do no harm.

    Args:
        segments: Oldest first.
        newer: How many rows of each stream are left out, the newest, int64 [b] on the CPU.
        most: How many rows of each stream are wanted at most; None for all.
    """

    def __init__(
        self, segments: Sequence[AttachedSegment], newer: Tensor, *, most: int | None = None
    ) -> None:
        self._segments = segments
        self._width = 0
        if not segments:
            return
        counts = []
        for states, lengths in segments:
            n = next(iter(states.values())).shape[1]
            counts.append(torch.arange(n) < lengths[:, None])
        valid = torch.cat(counts, dim=1)  # [b, N]
        self._lengths = (valid.sum(1) - newer).clamp(min=0, max=most)
        self._width = int(self._lengths.max())
        # Those that count come last, in their order.
        order = valid.int().argsort(dim=1, stable=True)
        ages = torch.arange(self._width, 0, -1)
        places = order.gather(1, (valid.shape[1] - newer[:, None] - ages).clamp(min=0))
        places = places.masked_fill(ages > self._lengths[:, None], -1)
        device = next(iter(segments[0].states.values())).device
        self._places = to_device(places, device)  # once for all blocks

    def in_window(self, window: Tensor, block: int) -> Tensor:
        """The XL window [b, w, d] of a block, counted from 0, with these rows as its newest ones.

        Places that are not in use may get some, of documents that have ended.
        """
        if not self._width:
            return window
        before = window.shape[1] - self._width
        there = (self._places >= 0)[..., None]
        newest = torch.where(there, self._of(block).to(window.dtype), window[:, before:])
        return torch.cat((window[:, :before], newest), dim=1)

    def in_memory(self, layer: MemoryLayer, block: int) -> MemoryRows:
        """The memory layer of a block, counted from 0, with these rows as its newest ones."""
        return AttachedLayer(layer, self._of(block), self._lengths) if self._width else layer

    def _of(self, block: int) -> Tensor:
        """What entered the block, [b, a, d], right-aligned, 0 for none."""
        states = torch.cat([segment.states[block] for segment in self._segments], dim=1)
        return gather_rows(states, self._places)


class AttachedLayer:
    """A layer of a memory whose newest rows carry gradient to the states that they are copies of.

    It is read as a `MemoryLayer` is by routers and by the model (`MemoryRows` is either), and gives the same
    numbers: whatever is computed from a row is the layer's own for rows without a graph, and is computed from
    the row that has one for the others, which `_places` finds. What depends on the order of rows alone is the
    layer's.

    Args:
        layer: All rows.
        rows: The states of which the newest rows are copies, [b, a, d], right-aligned.
        lengths: How many there are of each stream, int64 [b]; of some, the memory may hold no copy.
    """

    def __init__(self, layer: MemoryLayer, rows: Tensor, lengths: Tensor) -> None:
        self._layer = layer
        # Rounded as the store has rounded them.
        self._rows = rows.to(layer.device, layer.dtype)
        self._lengths = to_device(lengths, layer.device)
        self.shape = layer.shape
        self.even = layer.even
        self.device = layer.device

    @property
    def mask(self) -> Tensor:
        """See `MemoryLayer`."""
        return self._layer.mask

    def positions(self, indices: Tensor) -> Tensor:
        """See `MemoryLayer`."""
        return self._layer.positions(indices)

    def ages(self, indices: Tensor) -> Tensor:
        """See `MemoryLayer`."""
        return self._layer.ages(indices)

    def followers(self, indices: Tensor) -> Tensor:
        """See `MemoryLayer`."""
        return self._layer.followers(indices)

    def take(self, indices: Tensor) -> Tensor:
        """See `MemoryLayer`; differentiable in the rows that have a graph."""
        return self._attached(indices, self._layer.take(indices))

    def take_routed(self, indices: Tensor) -> Tensor:
        """See `MemoryLayer`; differentiable in the rows that have a graph."""
        return self._attached(indices, self._layer.take_routed(indices))

    def count_routed(self, indices: Tensor) -> None:
        """See `MemoryLayer`."""
        self._layer.count_routed(indices)

    def scores(
        self,
        tokens: Tensor,
        *,
        normalize: Literal["rms", "l2"] | None,
        scale: float,
        backend: Backend | None = None,
        keep: Keep = True,
        copy: bool = True,
    ) -> Tensor:
        """See `MemoryLayer`; differentiable in the rows that have a graph too, but for their first scores."""
        scores = self._layer.scores(
            tokens, normalize=normalize, scale=scale, backend=backend, keep=keep, copy=copy
        )
        if keep == "first":
            return scores
        m, a = self.shape[1], self._rows.shape[1]
        lengths = to_device(self._layer.lengths, self.device)
        newest = lengths[:, None] - torch.arange(a, 0, -1, device=self.device)
        newest = newest.clamp(min=-1)
        places = self._places(newest)
        own = row_scores(
            gather_rows(self._rows, places),
            self._layer.tokens_of_streams(tokens),
            normalize=normalize,
            scale=scale,
            backend=backend,
        )
        # What has no place goes to a column that is cut off again.
        columns = torch.where(places < 0, m, newest)[:, None].expand_as(own)
        return F.pad(scores, (0, 1)).scatter(-1, columns, own)[..., :m]

    def keys(self, projection: Tensor, *, keep: Keep) -> RoutingKeys:
        """See `MemoryLayer`."""
        return self._layer.keys(projection, keep=keep)

    def score_ages(self, indices: Tensor, kind: Literal["first scores", "first keys"]) -> Tensor:
        """See `MemoryLayer`."""
        return self._layer.score_ages(indices, kind)

    def _places(self, indices: Tensor) -> Tensor:
        """Where the rows at indices [b, ...] are among those that have a graph; -1 for the others."""
        ages = self._layer.ages(indices)
        lengths = self._lengths.view(-1, *[1] * (indices.ndim - 1))
        return torch.where((indices >= 0) & (ages <= lengths), self._rows.shape[1] - ages, -1)

    def _attached(self, indices: Tensor, rows: Tensor) -> Tensor:
        """Rows [b, ..., d] at indices [b, ...], those with a graph in place of their copies."""
        places = self._places(indices)
        return torch.where(places[..., None] >= 0, gather_rows(self._rows, places), rows)


MemoryRows = MemoryLayer | AttachedLayer
ReadableRows = MemoryRows | RowsAtHand


class _Watched(torch.autograd.Function):
    """The identity. What it saves for the backward is gone once a backward has been there."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        ctx.save_for_backward(states.new_empty(0))
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _spent(states: Tensor) -> bool:
    """Whether a backward has been through the states, and was not told to retain the graph."""
    node: Any = states.grad_fn
    if node is None:
        return False
    try:
        node.saved_tensors  # noqa: B018
    except RuntimeError:
        return True
    return False
