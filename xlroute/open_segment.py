"""Reading tokens a few at a time, with the keys and values of the segment so far kept.

Shapes: b streams, n tokens, t tokens of the open segment so far, d dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from xlroute.beside import normed
from xlroute.blocks import BlockContext, MemoryContext
from xlroute.state import TransformerXLState
from xlroute.token_memory import TokenRows

if TYPE_CHECKING:
    from xlroute.transformer_xl import OpenMemory, RoutedTransformerXL


class OpenSegment:
    """Reads on from a state token by token; the logits are those of the parallel forward on the same cuts.

    The state is moved along in place: whenever `segment_len` tokens are read, the segment ends, and its
    states go to the XL window and the memory. `leave` puts the tokens of the last, unfinished segment into
    the state.
    """

    def __init__(self, model: RoutedTransformerXL, state: TransformerXLState, segment_len: int) -> None:
        self.model = model
        self.state = state
        self.segment_len = segment_len
        self.states = [state.open]  # states entering the blocks, pieces of [L, b, n, d]
        self.length = state.open.shape[2]
        self.mask: Tensor  # of the XL window, which places are in use
        self.memories: list[OpenMemory | None] = []
        self.contexts: list[BlockContext] = []  # both empty until the segment's first token is read

    def read(self, tokens: Tensor) -> Tensor:
        """Read tokens [b, n]: their logits [b, n, vocab_size]."""
        pieces = []
        while tokens.shape[1]:
            if self.length >= self.segment_len:
                self._end_segment()
            room = self.segment_len - self.length
            if self.model.routing_chunk is not None and self.length % self.model.routing_chunk:
                # A chunk that has begun has its rows; those that begin with a piece are routed together.
                room = min(room, -self.length % self.model.routing_chunk)
            pieces.append(self._read_piece(tokens[:, :room]))
            tokens = tokens[:, room:]
            if self.length == self.segment_len:
                self._end_segment()
        return torch.cat(pieces, dim=1)

    def leave(self) -> None:
        """Put the tokens read since the last segment's end into the state."""
        self.state.open = torch.cat(self.states, dim=2)

    def _read_piece(self, tokens: Tensor) -> Tensor:
        if not self.contexts:
            self._open_contexts()
        x = self.model.embedding(tokens)
        view = self.model.segment_view(F.pad(self.mask, (0, self.length), value=True), tokens.shape[1])
        entering, contexts = [], []
        for i, (block, context) in enumerate(zip(self.model.typed_blocks(), self.contexts, strict=True)):
            entering.append(x)
            memories = self._routed(i, x, context.memories)
            x, context = block.read(x, context._replace(memories=memories), view)
            contexts.append(context)
        logits = self.model.to_logits(normed(self.model.norm, x))
        # Nothing is kept before all blocks have read the piece.
        self.contexts = contexts
        self.states.append(torch.stack(entering))
        self.length += tokens.shape[1]
        self.state.positions = self.state.positions + tokens.shape[1]
        scores = torch.stack([context.scores[:, -tokens.shape[1] :] for context in contexts])
        self.state.scores = torch.cat((self.state.scores, scores), dim=2)[:, :, scores.shape[2] :]
        return logits  # type: ignore[no-any-return]

    def _open_contexts(self) -> None:
        opened = torch.cat(self.states, dim=2)
        self.mask = self.model.window_mask(self.state)
        self.memories = self.model.open_memories(self.state)
        self.contexts = [
            block.context(self.state.window[i], self.mask, opened[i], (), self.state.scores[i])
            for i, block in enumerate(self.model.typed_blocks())
        ]

    def _routed(
        self, i: int, x: Tensor, present: tuple[MemoryContext | TokenRows, ...]
    ) -> tuple[MemoryContext | TokenRows, ...]:
        """What block i reads of the memory for a piece x [b, n, d]: as before if no chunk begins there."""
        memory = self.memories[i]
        if memory is None:
            return ()
        found = []
        for j, branch in enumerate(self.model.typed_blocks()[i].memories()):
            begin = branch.begin_of_chunk(self.length)
            if present and begin < self.length:
                found.append(present[j])
                continue
            chunk, before, mask = x, self.state.window[i], self.mask
            if branch.looks_back:
                opened = torch.cat([piece[i] for piece in self.states], dim=1)
                chunk = torch.cat((opened[:, begin:], x), dim=1)
                before = torch.cat((before, opened[:, :begin]), dim=1)
                mask = F.pad(mask, (0, begin), value=True)
            found.append(branch.context(self.model.route(i, j, memory, chunk, before, mask)[0]))
        return tuple(found)

    def _end_segment(self) -> None:
        self.leave()
        self.model.end_open_segment(self.state)
        self.states = [self.state.open]
        self.length = 0
        self.memories, self.contexts = [], []
