"""Models of examples/recall.py: how they are made, trained and asked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from recall_peer import MemorizingPeer
from recall_tasks import MOST_PAIRS, SYMBOLS, Documents, Piece, slot_width, training_documents
from torch import Tensor, nn

from xlroute import RoutedTransformerXL
from xlroute.blocks import RoutedMemoryAttention
from xlroute.token_memory import TokenMemoryAttention

WARM_UP = 50  # updates
FINAL_LEARNING_RATE = 0.05  # of the highest one
FAST_RATE = 10.0  # learning rate of gates and routing tokens, in those of the other weights
FAST = ("memory_gate", "null_logit", "routing_token")
GRADIENT_NORM = 1.0
GROWTH = 0.5  # share of the training in which documents grow to their full length
FEWEST_SEGMENTS = 4  # of a training document

# How the models start, see `build_model`.
SHARPNESS = 30.0  # by which the biases of heads that look back are multiplied
GATE = 0.5
COSINE_SCALE, NULL_LOGIT = 10_000.0, 4_000.0
AGE_SLOPE = 8.0  # by which a row's logit falls from one age to the next that has a bias, two to a doubling


@dataclass(frozen=True)
class Settings:
    """What the models and their training depend on."""

    device: str = "cpu"
    seed: int = 0
    steps: int = 80  # batches of documents
    minutes: float = math.inf  # of each training, which ends then at the latest
    streams: int = 8
    training_len: int = 512
    segment_len: int = 64
    mem_len: int = 16
    dim: int = 64
    depth: int = 2
    heads: int = 4
    dim_head: int = 32
    memory_layer: int = 2
    rows: int = 8  # that a routing token or a token chooses
    value_len: int = 2
    gap: int = 64
    memory_grad_segments: int = 0  # as of the model; an update follows so many segments and one more
    learning_rate: float = 1e-3
    peer: str | None = None  # the folder that memorizing-transformers-pytorch was installed in

    @property
    def nearest(self) -> int:
        """Tokens that a fact lies back at least if the memory alone can hold it, wherever segments begin."""
        return self.segment_len + self.mem_len


class Mode(NamedTuple):
    """One way to remember."""

    label: str
    memory: bool = True
    window: Literal["none", "short", "document"] = "short"  # of the longest training documents
    options: Mapping[str, Any] = {}


def _by_content(routing: str, chunk: int) -> dict[str, Any]:
    return {"memory_routing": routing, "routing_chunk": chunk}


MODES = {
    "none": Mode("no memory", memory=False, window="none"),
    "xl": Mode("XL memory", memory=False),
    "random": Mode("random rows", options={"memory_routing": "random"}),
    "learned": Mode("learned routing"),
    "content64": Mode("routing by chunks of 64", options=_by_content("content", 64)),
    "both": Mode("learned and by token", options=_by_content("both", 1)),
    "content1": Mode("routing by token", options=_by_content("content", 1)),
    "everything": Mode("attention to all rows", options={"num_tokens_kv": 1.0}),
    "full": Mode("full attention, no memory", memory=False, window="document"),
    "memorizing": Mode("MemorizingTransformer"),
}
PEER = "memorizing"  # runs where its package was installed


class Trained(NamedTuple):
    """A model, and how its training went."""

    model: RoutedTransformerXL | MemorizingPeer
    steps: int
    updates: int
    tokens: int
    seconds: float
    accuracy: float  # of single symbols told beyond the window, in the last tenth of the updates


def build_model(mode: str, settings: Settings) -> RoutedTransformerXL | MemorizingPeer:
    """An untrained model.

    Those of this library start where they find what they need, so that they have to learn the reading alone.
    The peer starts as its package makes it.
    """
    torch.manual_seed(settings.seed)
    if mode != PEER:
        return build_routed(mode, settings).to(settings.device)
    assert settings.peer is not None
    peer = MemorizingPeer(
        settings.peer,
        num_tokens=len(SYMBOLS),
        dim=settings.dim,
        depth=settings.depth,
        heads=settings.heads,
        dim_head=settings.dim_head,
        ff_mult=6,  # keys and values have one head: so it is as large as the others
        memorizing_layers=(settings.memory_layer,),
        num_retrieved_memories=settings.rows,
        xl_max_memories=settings.mem_len,
    )
    return peer.to(settings.device)


def build_routed(mode: str, settings: Settings) -> RoutedTransformerXL:
    """An untrained model of this library.

    It starts where it finds what it needs, so that it has to learn the reading alone. The heads below the
    memory look 0, 1, ... tokens back, so sharply that the tokens there do not matter: a row tells what stood
    before it, keys that end alike differ, and rows of the same text are the same whatever stood before that.
    So the cosines can weigh much, and tell a fact from one whose key is all but the same; and of several rows
    of the same text the newer one weighs more. How much more is not trained, so that it holds for ages beyond
    those of the training.
    """
    windows = {"none": 0, "short": settings.mem_len, "document": settings.training_len}
    model = RoutedTransformerXL(
        **{
            "vocab_size": len(SYMBOLS),
            "dim": settings.dim,
            "depth": settings.depth,
            "heads": settings.heads,
            "dim_head": settings.dim_head,
            "mem_len": windows[MODES[mode].window],
            "memory_layers": (settings.memory_layer,),
            "num_tokens_kv": settings.rows,
            "num_content_tokens_kv": settings.rows,
            "kv_routing_tokens": 1,
            "segment_len": settings.segment_len,
            "memory_grad_segments": settings.memory_grad_segments,
            "mems_grad": settings.memory_grad_segments > 0,
            **MODES[mode].options,
        }
    )
    with torch.no_grad():
        for number, block in enumerate(model.typed_blocks(), start=1):
            if number < settings.memory_layer:
                block.attention.q_bias.mul_(SHARPNESS)
                block.attention.k_bias.mul_(SHARPNESS)
            for memory in block.memories():
                assert isinstance(memory, (RoutedMemoryAttention, TokenMemoryAttention))
                assert memory.null_logit is not None
                assert memory.log_scale is not None
                memory.memory_gate.fill_(GATE)
                memory.null_logit.fill_(NULL_LOGIT)
                memory.log_scale.fill_(math.log(COSINE_SCALE))
                ages = torch.arange(float(memory.age_bias.num_embeddings))
                memory.age_bias.weight.copy_(-AGE_SLOPE * ages[:, None])
                memory.age_bias.requires_grad_(False)
    return model


def train(mode: str, settings: Settings) -> Trained:
    """Train a model on documents that grow from few segments to the training length.

    Each batch has a length and a number of pairs drawn at random, the same for all modes. An update follows
    each segment that asks for facts beyond window and segment, or each few segments, where rows of the memory
    are to carry gradient. What is asked for nearer facts is not trained: the memory cannot know them, and
    what it would learn from them is to be vague.
    """
    model = build_model(mode, settings).train()
    optimizer = optimizer_for(model)
    drawn = torch.Generator().manual_seed(settings.seed)
    began = time.perf_counter()
    step = updates = tokens = 0
    done = 0.0
    hits: list[Tensor] = []
    while done < 1:
        longest = round((settings.training_len / settings.segment_len) ** min(1.0, done / GROWTH))
        documents = draw_documents(max(FEWEST_SEGMENTS, longest), step, settings, drawn)
        distances = documents.questions.distances.to(settings.device)
        predicted: list[Tensor] = []
        targets: list[Tensor] = []
        for number, (logits, piece) in enumerate(read(model, mode, [documents], settings), start=1):
            asked = piece.asked >= 0
            asked &= distances.gather(1, piece.asked.clamp(min=0)) >= settings.nearest
            if asked.any():
                predicted.append(logits[asked].float())
                targets.append(piece.targets[asked])
            # Later segments may read with gradient what earlier ones have written.
            ended = number * settings.segment_len == documents.length
            if not predicted or (number % (1 + settings.memory_grad_segments) and not ended):
                continue
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * learning_rate(updates, done, settings)
            hits.append(improve(model, optimizer, torch.cat(predicted), torch.cat(targets)))
            updates += 1
            predicted, targets = [], []
        step += 1
        tokens += documents.streams * documents.length
        done = max(step / settings.steps, (time.perf_counter() - began) / 60 / settings.minutes)
    last = torch.cat(hits[-max(1, len(hits) // 10) :])
    return Trained(
        model.eval(), step, updates, tokens, time.perf_counter() - began, last.float().mean().item()
    )


def improve(model: nn.Module, optimizer: torch.optim.Optimizer, predicted: Tensor, targets: Tensor) -> Tensor:
    """One update by symbols that were asked for, logits and targets [a]; which were right, bool [a]."""
    F.cross_entropy(predicted, targets).backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return predicted.argmax(-1) == targets


def draw_documents(longest: int, step: int, settings: Settings, drawn: torch.Generator) -> Documents:
    """The documents of one step, of at most so many segments."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=drawn))

    length = draw(FEWEST_SEGMENTS, longest) * settings.segment_len
    overwritten = draw(0, 1) == 1
    room = length // slot_width(settings.value_len) // (2 + overwritten)
    return training_documents(
        length,
        streams=settings.streams,
        pairs=draw(1, min(room, MOST_PAIRS)),
        overwritten=overwritten,
        value_len=settings.value_len,
        gap=settings.gap,
        seed=settings.seed * 10**6 + step,
    )


def optimizer_for(model: nn.Module) -> torch.optim.AdamW:
    """AdamW, with a higher learning rate for the numbers that are far larger than other weights."""
    groups: list[dict[str, Any]] = [{"params": [], "rate": rate} for rate in (1.0, FAST_RATE)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[any(part in name for part in FAST)]["params"].append(parameter)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)


def learning_rate(updates: int, done: float, settings: Settings) -> float:
    """Linear warm-up, and a cosine over the share of the training that is done."""
    cosine = (1 + math.cos(math.pi * done)) / 2
    warm = min(1.0, (updates + 1) / WARM_UP)
    return settings.learning_rate * warm * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine)


def read(
    model: RoutedTransformerXL | MemorizingPeer, mode: str, documents: Sequence[Documents], settings: Settings
) -> Iterator[tuple[Tensor, Piece]]:
    """Read documents of one length side by side: the logits of each segment, and the segment."""
    streams = sum(each.streams for each in documents)
    if isinstance(model, MemorizingPeer):
        read_segment = model.reader(streams)
    else:
        read_segment = reader(model, mode, streams, settings)
    length = documents[0].length
    for start in range(0, length, settings.segment_len):
        stop = min(start + settings.segment_len, length)
        pieces = [each.piece(start, stop) for each in documents]
        piece = Piece(*(torch.cat(parts).to(settings.device) for parts in zip(*pieces, strict=True)))
        yield read_segment(piece.tokens), piece


def reader(
    model: RoutedTransformerXL, mode: str, streams: int, settings: Settings
) -> Callable[[Tensor], Tensor]:
    """What reads new documents, a segment of tokens after the other, and gives the logits."""
    memory = None
    if MODES[mode].memory:
        dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
        memory = model.create_memory(streams=streams, dtype=dtype)
    state = model.initial_state(streams=streams, memory=memory)

    def read_segment(tokens: Tensor) -> Tensor:
        nonlocal state
        logits: Tensor
        logits, state = model(tokens, state)
        return logits

    return read_segment


@torch.no_grad()
def ask(
    model: RoutedTransformerXL | MemorizingPeer, mode: str, documents: Sequence[Documents], settings: Settings
) -> list[Tensor]:
    """Which questions of each of the documents are answered right in all symbols, bool [b, q] each."""
    wrong = [torch.zeros(each.questions.announced.shape, dtype=torch.bool) for each in documents]
    sizes = [each.streams for each in documents]
    for logits, piece in read(model, mode, documents, settings):
        if not (piece.asked >= 0).any():
            continue
        missed = (logits.argmax(-1) != piece.targets) & (piece.asked >= 0)
        by_documents = (torch.split(t.cpu(), sizes) for t in (missed, piece.asked))
        for each, missing, asked in zip(wrong, *by_documents, strict=True):
            each[missing.nonzero()[:, 0], asked[missing]] = True
    return [~each for each in wrong]
