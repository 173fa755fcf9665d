"""What benchmarks/step.py measures: models of several sizes and modes, their steps, and their memory alone.

Shapes: b streams, n tokens in a segment, m memory rows, d dim, e dim_head, r routing tokens, k rows routed,
g chunks of a segment that have rows of their own, l memory layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measurement import Check, close, finite
from routing_settings import normal
from torch import Tensor, nn

from xlroute import RoutedTransformerXL, TransformerXLState
from xlroute.blocks import MemoryBranch, RoutedMemoryAttention, UnreadRows, read_rows
from xlroute.token_memory import TokenMemoryAttention

FILLED_AT_ONCE = 8192  # rows of each stream
VOCABULARY = 256  # bytes
GRADIENT_NORM = 1.0

# What each mode gives the constructor, over what the size gives it. Both: half of the heads each.
MODES: dict[str, dict[str, Any]] = {
    "none": {"mem_len": 0, "memory_layers": ()},
    "xl": {"memory_layers": ()},
    "learned": {"memory_routing": "learned"},
    "learned-shortlist": {"memory_routing": "learned", "routing_shortlist": 2.0},
    "content-64": {"memory_routing": "content", "routing_chunk": 64},
    "content-1": {"memory_routing": "content", "routing_chunk": 1},
    "content-1-shortlist": {"memory_routing": "content", "routing_chunk": 1, "routing_shortlist": 2.0},
    "both": {"memory_routing": "both", "routing_chunk": 64, "kv_routing_tokens": 1},
}
BASELINE = "xl"


@dataclass(frozen=True)
class Size:
    """A model, and the memories that it reads.

    Attributes:
        options: of the constructor, in all modes.
        memories: rows of each stream, and how many streams.
        grad_rows: those at which `memory_grad_segments` is measured.
    """

    name: str
    options: dict[str, Any]
    memories: tuple[tuple[int, int], ...] = ((8192, 16), (65_536, 16), (1_048_576, 4))
    grad_rows: int = 65_536

    def streams(self, rows: int) -> int:
        """How many streams read a memory of so many rows each."""
        return dict(self.memories)[rows]


SEGMENTS = {"dim_head": 64, "mem_len": 512, "segment_len": 512, "num_tokens_kv": 512}
SIZES = {
    size.name: size
    for size in (
        Size(
            "tiny",
            {
                "dim": 16,
                "depth": 2,
                "heads": 4,
                "dim_head": 8,
                "mem_len": 12,
                "segment_len": 12,
                "memory_layers": (2,),
                "num_tokens_kv": 8,
                "kv_routing_tokens": 2,
                "num_content_tokens_kv": 3,
                "routing_key_dim": 8,
            },
            memories=((32, 2), (80, 1)),
            grad_rows=32,
        ),
        Size("10M", {**SEGMENTS, "dim": 384, "depth": 6, "heads": 6, "memory_layers": (4,)}),
        Size("50M", {**SEGMENTS, "dim": 512, "depth": 12, "heads": 8, "memory_layers": (6, 9)}),
    )
}


def build_model(
    size: Size, mode: str, device: torch.device, *, grad_segments: int = 0, use_triton: bool | None = None
) -> RoutedTransformerXL:
    """A model with the same weights each time, whose memory adds to its output from the start."""
    torch.manual_seed(0)
    model = RoutedTransformerXL(
        VOCABULARY,
        **{**size.options, **MODES[mode]},
        memory_grad_segments=grad_segments,
        router_kwargs={"use_triton": use_triton},
    )
    for block in model.typed_blocks():
        for memory in block.memories():
            nn.init.normal_(memory.to_out.weight, std=memory.to_out.in_features**-0.5)
    return model.to(device)


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """Bfloat16 on a GPU, full precision on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def begin_step() -> None:
    """Tell CUDA graphs that nothing of the step before is needed."""
    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


class Reader:
    """A model that reads on, from call to call, with a full XL window and a full memory of random rows.

    Args:
        model: in any mode; on a GPU its blocks are compiled.
        streams: b.
        rows: m of each stream, of the scale of the states that enter the block; 0 without a memory.
        segments: that a training step reads before it goes backward.
    """

    def __init__(self, model: RoutedTransformerXL, *, streams: int, rows: int, segments: int = 1) -> None:
        self.model = model
        self.rows = rows
        self.device = model.embedding.weight.device
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
        shape = (segments, 2, streams, model.segment_len)
        self.text = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
        self.text = self.text.to(self.device)  # tokens, and what to predict
        self.state = self._filled(streams)

    @torch.no_grad()
    def _filled(self, streams: int) -> TransformerXLState:
        memory = None
        if self.rows:
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
            memory = self.model.create_memory(streams=streams, capacity=self.rows, dtype=dtype)
        state: TransformerXLState
        begin_step()
        with autocast(self.device):
            fresh = self.model.initial_state(streams=streams, memory=memory)
            _, state = self.model(self.text[0, 0], fresh)
        if state.memory is not None:
            entering = state.window[[number - 1 for number in self.model.memory_layers]]
            scale = entering.std(dim=(1, 2, 3), keepdim=True)
            for start in range(0, self.rows, FILLED_AT_ONCE):
                count = min(FILLED_AT_ONCE, self.rows - start)
                shape = (*entering.shape[:2], count, self.model.dim)
                state.memory.append(scale * normal(*shape, device=self.device, seed=start))
            state.note_memory()
        return state

    def train(self) -> Tensor:
        """One step of the optimizer: the loss."""
        begin_step()
        loss = torch.zeros((), device=self.device)
        for tokens, targets in self.text:
            with autocast(self.device):
                logits, self.state = self.model(tokens, self.state)
            loss = loss + F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        self.optimizer.zero_grad()  # gradients stay until then, for whoever wants to see them
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """The logits of one segment."""
        begin_step()
        with autocast(self.device):
            logits: Tensor
            logits, self.state = self.model(self.text[0, 0], self.state)
        return logits

    @torch.no_grad()
    def reference(self, model: RoutedTransformerXL) -> Tensor:
        """What `evaluate` is to give next, by a model in PyTorch's own operations."""
        model.load_state_dict(self.model.state_dict())
        with autocast(self.device):
            logits: Tensor
            logits, _ = model(self.text[0, 0], self.state.fork())
        return logits

    @torch.no_grad()
    def gradient_share(self) -> float:
        """The share of chosen rows that carry gradient to the router, on average."""
        begin_step()
        with autocast(self.device):
            _, _, routings = self.model(self.text[0, 0], self.state.fork(), return_routing=True)
        return float(torch.stack([each.gradient_share.mean() for each in routings]).mean())

    def memory_part(self, *, training: bool) -> Callable[[], Tensor]:
        """What the model does with its memory for one segment, alone; in training, there and back.

        Opening the memory, routing, taking rows, attention to them, and appending the next rows.
        """
        model, device = self.model, self.device
        assert self.state.memory is not None
        numbers = [number - 1 for number in model.memory_layers]
        entering = [normal(*self.state.window[i].shape, device=device, seed=i) for i in numbers]
        entering = [x.requires_grad_(training) for x in entering]
        leaving = torch.stack(entering).detach()

        def attend(branch: MemoryBranch, rows: UnreadRows, x: Tensor) -> Tensor:
            return branch.gated(x, branch.context(read_rows(branch, rows, x)), None)

        if device.type == "cuda":
            attend = torch.compile(attend, mode="reduce-overhead")

        def call() -> Tensor:
            state, found = self.state, []
            assert state.memory is not None
            begin_step()
            with torch.set_grad_enabled(training), autocast(device):
                mask = model.window_mask(state)
                memories, as_assumed = model.begin_to_open(state)
                for i, x in zip(numbers, entering, strict=True):
                    memory = memories[i]
                    assert memory is not None
                    for j, branch in enumerate(model.typed_blocks()[i].memories()):
                        rows = model.find(i, j, memory, x, state.window[i], mask)
                        assert memory.at_hand is not None
                        found.append(attend(branch, UnreadRows(memory.at_hand, rows), x))
            if training:
                for x in entering:
                    x.grad = None  # which a CUDA graph has written, and will write anew
                self.optimizer.zero_grad()
                torch.autograd.backward(found, [torch.ones_like(out) for out in found])
            assert as_assumed()
            state.memory.append(leaving)
            state.note_memory()
            return torch.stack(found).detach()

        return call

    def verify_step(self, loss: Tensor) -> Iterator[Check]:
        """A training step has a loss and gradients, and the memory holds what it held."""
        yield finite("loss", loss)
        gradients = [each.grad.flatten() for each in self.model.parameters() if each.grad is not None]
        yield finite("gradients", torch.cat(gradients))
        yield self._full()

    def verify_logits(self, logits: Tensor, expected: Tensor) -> Iterator[Check]:
        """Logits are those of the reference, and the memory holds what it held."""
        yield close("logits", logits, expected, "PyTorch's own operations")
        yield self._full()

    def verify_part(self, out: Tensor) -> Iterator[Check]:
        """The memory's output is one, and the memory holds what it held."""
        yield finite("output", out)
        yield self._full()

    def _full(self) -> Check:
        memory = self.state.memory
        wrong = 0.0 if memory is None else float((memory.lengths != self.rows).sum())
        return Check("streams with another number of rows", wrong, 0.0, f"{self.rows:,}")


@dataclass
class Floor:
    """What the memory's part of a segment cannot do without.

    Attributes:
        read: bytes that must be read.
        products: multiply-adds, counted as two each.
    """

    read: int = 0
    products: int = 0


def memory_floor(reader: Reader, *, training: bool) -> Floor:
    """Of the memory's part: rows or keys or scores read, chosen rows read, and products.

    In training, rows are scored anew, and their scores' gradient needs them once more; a token's routing keys
    have none. With a shortlist, older scores or keys are read, and the rows of the shortlist scored anew.
    Products for which both factors have a gradient count three times.
    """
    model, memory = reader.model, reader.state.memory
    assert memory is not None
    (b, m, d), itemsize = memory.layer(0).shape, memory.dtype.itemsize
    n, rows = model.segment_len, b * m * d * itemsize
    floor = Floor()
    for number in model.memory_layers:
        reads = 0  # of all rows, for whichever branches need them
        for branch in model.typed_blocks()[number - 1].memories():
            assert isinstance(branch, (RoutedMemoryAttention, TokenMemoryAttention))
            r, k, inner = branch.sets, branch.num_tokens_kv, branch.to_out.in_features
            assert isinstance(k, int)
            k = min(k, m)
            if isinstance(branch, TokenMemoryAttention):
                routing = branch.content_routing
                width, shortlist = routing.projection.shape[1], routing.shortlist
                # What followed the chosen rows, each once for all tokens; sums of those, values and output.
                floor.read += (2 if training else 1) * min(b * n * r * k, b * m) * d * itemsize
                attention = 2 * b * n * branch.heads * k * d + 4 * b * n * d * inner
                floor.products += (3 if training else 1) * attention
                floor.products += 2 * b * n * r * width * (d + m)  # queries, and the search
                if training and shortlist is None:
                    reads = max(reads, 1)
                    floor.products += 2 * b * m * r * width * d
                    continue
                floor.read += b * r * m * width * itemsize
                if training and shortlist is not None:
                    listed = min(b * n * r * math.ceil(shortlist * k), b * m)
                    floor.read += 2 * listed * d * itemsize
                    floor.products += 3 * 2 * listed * r * width * d
                continue
            shortlist = branch.routing_shortlist
            chunks = 1 if branch.content_routing is None else -(-n // branch.content_routing.chunk)
            chosen = b * chunks * r * k
            floor.read += (2 if training else 1) * 2 * chosen * d * itemsize  # they, and what followed them
            attention = 4 * b * n * d * inner + 4 * chosen * d * inner // r + 4 * b * n * k * inner
            floor.products += (3 if training else 1) * attention
            if branch.content_routing is None and (shortlist is not None or not training):
                floor.read += 4 * b * r * m  # scores are float32
                if training and shortlist is not None:
                    listed = b * r * math.ceil(shortlist * k)
                    floor.read += 2 * listed * d * itemsize
                    floor.products += 3 * 2 * listed * d
            else:
                reads = max(reads, 2 if training else 1)
                floor.products += (2 if training else 1) * 2 * b * m * chunks * r * d
        floor.read += reads * rows
    return floor
