"""Reading tokens a few at a time, with the keys and values of the segment so far kept.

Shapes: b streams, n tokens, t tokens of the open segment so far, d dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xlroute.beside import normed
from xlroute.blocks import BlockContext
from xlroute.state import TransformerXLState

if TYPE_CHECKING:
    from xlroute.transformer_xl import RoutedTransformerXL


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
        self.contexts: list[BlockContext] = []  # empty until the segment's first token is read

    def read(self, tokens: Tensor) -> Tensor:
        """Read tokens [b, n]: their logits [b, n, vocab_size]."""
        pieces = []
        while tokens.shape[1]:
            if self.length >= self.segment_len:
                self._end_segment()
            room = self.segment_len - self.length
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
        entering, contexts = [], []
        for block, context in zip(self.model.typed_blocks(), self.contexts, strict=True):
            entering.append(x)
            x, context = block.read(x, context)
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
        mask = self.model.window_mask(self.state)
        self.contexts = [
            block.context(
                self.state.window[i],
                mask,
                opened[i],
                None if routed is None else routed[0],
                self.state.scores[i],
            )
            for i, (block, routed) in enumerate(self.model.route(self.state))
        ]

    def _end_segment(self) -> None:
        self.leave()
        self.model.end_open_segment(self.state)
        self.states = [self.state.open]
        self.length = 0
        self.contexts = []
