"""RoutedTransformerXL: reads documents of any length segment by segment, with a routed long-term memory.

It has: causal attention over [XL window, segment] (Dai et al., arXiv 1901.02860) with rotary positions, gated
cross-attention to the rows that a router picks out of everything read before, on request light and heavy
branches of attention and feedforward with the heavy ones for routed tokens (CoLT5, arXiv 2303.09752),
per-stream document ends, and generation over cached keys and values. It has not: any state of its own. What
has been read lives in the `TransformerXLState` that goes in and comes out.

Shapes: b streams, n tokens in a segment, w = mem_len rows of the XL window, d dim, r routing tokens, k rows
routed, L = depth blocks, l memory layers, v tokens in a routing window.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xlroute.attached import AttachedRows, AttachedSegment, MemoryRows, attach, still_attached
from xlroute.beside import normed
from xlroute.blocks import (
    Block,
    BlockRun,
    MemoryBranch,
    RoutedRows,
    SegmentView,
    UnreadRows,
    open_branches,
)
from xlroute.causal_routing import QueryRouting, check_query_routing
from xlroute.content_routing import FoundCandidates
from xlroute.cross_attention import ConditionalRoutedCrossAttention
from xlroute.memory import Eviction, FingerprintError, MemoryStore, ReadOnlyError, S3Path
from xlroute.memory.at_hand import RowsAtHand
from xlroute.memory.kept_values import begin_comparison
from xlroute.memory.to_device import to_device
from xlroute.open_segment import OpenSegment
from xlroute.position import age_place
from xlroute.router import PickedRows
from xlroute.sampling import SamplingOptions, sample
from xlroute.state import TransformerXLState, load_state
from xlroute.token_check import begin_check
from xlroute.token_memory import TokenRows

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CONFIG_VERSION = 1
MemoryRouting = Literal["learned", "content", "both", "random"]
ROUTING_EPS = 0.5  # temperature of the choice of rows and tokens, in scores whose spread is about 1


class Routing(NamedTuple):
    """Which rows one memory layer chose to read for a segment.

    Rows that were routed by content have a dimension more, [b, g, r, k]: of chunks or, in chunks of 1, of
    tokens; for those beyond a stream's length they mean nothing.
    """

    layer: int  # the block, counted from 1
    indices: Tensor  # int64 [b, r, k], rows held by the memory, 0 the oldest; -1 for none
    positions: Tensor  # int64 [b, r, k], rows that entered the memory before them; -1 for none
    mask: Tensor  # bool [b, r, k], False for none
    gates: Tensor  # [b, r, k]
    gate_sum: Tensor  # [b, r], the sum of all gates over the number of chosen rows
    gradient_share: Tensor  # [b, r], the share of chosen rows that carry gradient to the router
    score_ages: Tensor  # int64 [b, r, k], rows that came since these were scored for a shortlist; -1 for none


class OpenMemory(NamedTuple):
    """The memory of a block as a segment finds it."""

    rows: MemoryRows
    newer: Tensor  # int64 [b], rows between those and the segment, which are in the XL window
    at_hand: RowsAtHand | None  # the rows by tensors alone, where blocks can read them by themselves
    known: Mapping[MemoryBranch, Any]  # what branches know of their rows, whatever is being read
    with_stats: bool  # whether what was routed is to be told


class SegmentRead(NamedTuple):
    """What blocks make of a segment."""

    logits: Tensor  # [b, n, vocab_size]
    entering: Tensor  # states that enter each block, [L, b, n, d], without gradient
    attached: dict[int, Tensor]  # by block, those that keep their graph, [b, n, d]
    scores: Tensor  # by which tokens were routed, [L, b, n, 2], or empty
    routings: tuple[Routing, ...]  # which rows were chosen, if that is to be told


class RoutedTransformerXL(nn.Module):
    """A Transformer-XL with a routed long-term memory.

    What is read of the memory is chosen by content: each token reads the rows whose keys are most like its
    own, a learned projection of the state. Or chunks of c tokens, counted from the segment's start, share
    their rows (`routing_chunk`): r routing tokens choose them, which are computed without a look ahead, from
    the states that enter the block in the chunk before. For the first chunk these lie in the XL window, as
    far as it holds them. All chunks' routing tokens score the memory in one read. Or learned routing tokens
    choose, which keep what is salient whatever is asked for (`memory_routing`).

    Tokens may be routed too: as queries of the memory (`num_tokens_q`), of self-attention, or to the heavy
    feedforward. None of it looks ahead. A segment is cut into routing windows of v tokens, of which the last
    may be shorter. In each a router has a number of places; a token takes one, first come first served, if
    its score reaches the level of the v tokens before the window, those of earlier segments among them (for
    self-attention, as far as the XL window holds them). Where there are fewer, the level is that of those,
    and where there are none, as at the start of a document, no token is routed. Level and gates are those of
    `ConditionalRoutedAutoregressiveAttention`; for memory queries and feedforward, no gradient goes through
    the scores of earlier segments.

    Args:
        vocab_size: number of tokens.
        dim: d, width of the states and of the memory rows.
        depth: L, number of blocks.
        heads: attention heads.
        dim_head: width of a head, even.
        mem_len: w, states of each block that are kept and attended to, densely or by `routed_self_attention`;
            0 for none.
        memory_layers: blocks, counted from 1, that attend to the long-term memory; store layer i holds the
            states that enter block `memory_layers[i]`.
        num_tokens_kv: k, rows that each routing token chooses; of learned routing.
        num_tokens_q: queries that attend to them in each routing window; a float in (0, 1] is a share of it.
            None: every query does, without a router for them, as by content.
        kv_routing_tokens: r; the heads are shared out over the sets of rows.
        segment_len: tokens in a segment, where `generate` cuts.
        ff_mult: width of the feedforward over `dim`, of its heavy branch if it has two.
        dropout: of attention weights and of each branch's output.
        tie_embeddings: the output projection is the embedding, transposed.
        gradient_checkpointing: recompute each block in the backward instead of keeping its activations.
        router_kwargs: further arguments of `CoordinateDescentRouter`; JSON values. `eps` is 0.5 unless given:
            a wide edge of the choice, so that many rows tell the router where better ones are.
        routed_self_attention: light attention of all tokens to the near ones, and heavy attention of routed
            tokens to routed rows of XL window and segment, as in `ConditionalRoutedAutoregressiveAttention`.
        routed_feedforward: a light feedforward for all tokens, and a heavy one for routed tokens, as in
            `ConditionalRoutedFeedForward`.
        routing_window: v, see above; None for a quarter of `segment_len`.
        query_routing: "threshold", see above; or "window", the best tokens of each window. That looks ahead:
            such a model warns of it in training, once, and does not generate.
        light_window_size: tokens before itself that a token sees in the light attention, as far as XL window
            and segment hold them; None for v. With fewer, a token late in its routing window sees nothing
            of what lies between its light window and that window's start.
        light_heads: heads of the light attention; None for half of `heads`.
        heavy_heads: heads of the heavy attention, divisible by `num_routed_kv`; None for the other half.
        num_heavy_attn_tokens_q: places for queries of the heavy attention in a routing window; or a share.
        num_heavy_attn_tokens_kv: rows that each routing token picks as its keys and values; a float is a
            share of v.
        num_routed_kv: routing tokens of those.
        light_ff_mult: width of the light feedforward over `dim`.
        num_heavy_ff_tokens: places for tokens of the heavy feedforward in a routing window; or a share.
        memory_grad_segments: G. Rows of the memory that the last G segments have computed carry gradient, so
            that the layers below learn what to write: truncated back-propagation through the memory. A
            backward ends it, and so do `state.detach` and a call under no_grad; rows are then as older ones.
            They wait in the XL window first: where G segments hold no more than w tokens, nothing changes. 0
            for none.
        mems_grad: attention to what the last G segments have left in the XL window, of all blocks, carries
            gradient too.
        memory_routing: how memory rows are chosen: "learned", "content", "both" side by side with half of the
            heads each, or "random", learned routing's negative control, drawn by PyTorch's own generator in
            training and evaluation.
        routing_chunk: c, see above; of routing by content.
        num_content_tokens_kv: k of that: rows that each of the r routing tokens of a chunk chooses, or a
            token in each of r sets. `num_tokens_kv` is that of the others.
        routing_key_dim: width of the keys for c = 1.
        routing_shortlist: where gradient is recorded, and weights so change from step to step, choose the k
            rows out of a shortlist of so many x k, at least 2. It is taken by the scores that rows got when
            they were first looked at, right after they came, by the weights of then; or for c = 1 by the keys
            that they got then. The shortlist alone is scored again, with gradient. None scores all rows by
            the weights of now, as is done without gradient in any case: weights stay, and so do scores.
            Routing by chunks of c > 1 has no shortlist; random routing needs no scores.

    Raises:
        ValueError: for arguments out of range.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        dim: int = 512,
        depth: int = 8,
        heads: int = 8,
        dim_head: int = 64,
        mem_len: int = 512,
        memory_layers: Sequence[int] = (4, 6),
        num_tokens_kv: int = 1024,
        num_tokens_q: int | float | None = None,
        kv_routing_tokens: int = 1,
        segment_len: int = 512,
        *,
        ff_mult: int = 4,
        dropout: float = 0.0,
        tie_embeddings: bool = True,
        gradient_checkpointing: bool = False,
        router_kwargs: Mapping[str, Any] | None = None,
        routed_self_attention: bool = False,
        routed_feedforward: bool = False,
        routing_window: int | None = None,
        query_routing: QueryRouting = "threshold",
        light_window_size: int | None = None,
        light_heads: int | None = None,
        heavy_heads: int | None = None,
        num_heavy_attn_tokens_q: int | float = 1 / 8,
        num_heavy_attn_tokens_kv: int | float = 1.0,
        num_routed_kv: int = 1,
        light_ff_mult: float = 0.5,
        num_heavy_ff_tokens: int | float = 1 / 8,
        memory_grad_segments: int = 0,
        mems_grad: bool = False,
        memory_routing: MemoryRouting = "content",
        routing_chunk: int = 1,
        num_content_tokens_kv: int = 8,
        routing_key_dim: int = 64,
        routing_shortlist: float | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("vocab_size", vocab_size, 1),
            ("dim", dim, 1),
            ("depth", depth, 1),
            ("heads", heads, 1),
            ("dim_head", dim_head, 2),
            ("mem_len", mem_len, 0),
            ("kv_routing_tokens", kv_routing_tokens, 1),
            ("segment_len", segment_len, 1),
            ("ff_mult", ff_mult, 1),
            ("routing_window", routing_window, 1),
            ("light_window_size", light_window_size, 1),
            ("light_heads", light_heads, 1),
            ("heavy_heads", heavy_heads, 1),
            ("memory_grad_segments", memory_grad_segments, 0),
            ("routing_chunk", routing_chunk, 1),
            ("num_content_tokens_kv", num_content_tokens_kv, 1),
            ("routing_key_dim", routing_key_dim, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if dim_head % 2:
            raise ValueError(
                f"dim_head: expected an even number (rotary positions turn pairs), got {dim_head}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected at least 0 and less than 1, got {dropout}")
        if mems_grad and not memory_grad_segments:
            raise ValueError("mems_grad: expected False with memory_grad_segments=0, got True")
        check_query_routing(query_routing)
        routings = get_args(MemoryRouting)
        if memory_routing not in routings:
            raise ValueError(f"memory_routing: expected one of {routings}, got {memory_routing!r}")
        by_content = memory_routing in ("content", "both")
        if by_content and num_tokens_q is not None:
            raise ValueError(
                f"num_tokens_q: expected None with memory_routing={memory_routing!r}, got {num_tokens_q}"
            )
        if memory_routing == "both" and heads % (2 * kv_routing_tokens):
            raise ValueError(
                f"heads: expected a multiple of {2 * kv_routing_tokens} with memory_routing='both', two "
                f"branches of kv_routing_tokens={kv_routing_tokens} sets each, got {heads}"
            )
        if routing_shortlist is not None:
            if not 2 <= routing_shortlist < math.inf:
                raise ValueError(
                    "routing_shortlist: expected None or at least 2, since gates of all rows that there are "
                    f"to choose from have no gradient, got {routing_shortlist}"
                )
            if by_content and routing_chunk > 1:
                raise ValueError(
                    "routing_shortlist: expected None with routing_chunk > 1, whose routing tokens the text "
                    f"makes anew, got {routing_shortlist}"
                )
            if (router_kwargs or {}).get("route_block_size") is not None:
                raise ValueError(
                    "routing_shortlist: expected None with route_block_size, which cuts up all rows, got "
                    f"{routing_shortlist}"
                )
        memory_layers = tuple(memory_layers)
        if memory_layers != tuple(sorted(set(memory_layers))) or not all(
            1 <= i <= depth for i in memory_layers
        ):
            raise ValueError(
                f"memory_layers: expected increasing block numbers from 1 to {depth}, got {memory_layers}"
            )
        self.config: dict[str, Any] = {
            "vocab_size": vocab_size,
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "dim_head": dim_head,
            "mem_len": mem_len,
            "memory_layers": list(memory_layers),
            "num_tokens_kv": num_tokens_kv,
            "num_tokens_q": num_tokens_q,
            "kv_routing_tokens": kv_routing_tokens,
            "segment_len": segment_len,
            "ff_mult": ff_mult,
            "dropout": dropout,
            "tie_embeddings": tie_embeddings,
            "gradient_checkpointing": gradient_checkpointing,
            "router_kwargs": dict(router_kwargs or {}),
            "routed_self_attention": routed_self_attention,
            "routed_feedforward": routed_feedforward,
            "routing_window": routing_window,
            "query_routing": query_routing,
            "light_window_size": light_window_size,
            "light_heads": light_heads,
            "heavy_heads": heavy_heads,
            "num_heavy_attn_tokens_q": num_heavy_attn_tokens_q,
            "num_heavy_attn_tokens_kv": num_heavy_attn_tokens_kv,
            "num_routed_kv": num_routed_kv,
            "light_ff_mult": light_ff_mult,
            "num_heavy_ff_tokens": num_heavy_ff_tokens,
            "memory_grad_segments": memory_grad_segments,
            "mems_grad": mems_grad,
            "memory_routing": memory_routing,
            "routing_chunk": routing_chunk,
            "num_content_tokens_kv": num_content_tokens_kv,
            "routing_key_dim": routing_key_dim,
            "routing_shortlist": routing_shortlist,
        }
        self.vocab_size = vocab_size
        self.dim = dim
        self.depth = depth
        self.mem_len = mem_len
        self.memory_layers = memory_layers
        self.segment_len = segment_len
        self.gradient_checkpointing = gradient_checkpointing
        self.memory_grad_segments = memory_grad_segments
        self.mems_grad = mems_grad
        self.routing_chunk = routing_chunk if by_content else None

        self.query_routing = query_routing
        self.routing_window = max(segment_len // 4, 1) if routing_window is None else routing_window
        self.routes_by_scores = routed_feedforward or (num_tokens_q is not None and bool(memory_layers))

        router_options = {"eps": ROUTING_EPS, **(router_kwargs or {})}
        # Windows are small, and a chunk looks for few rows: blocks are for the memory of a whole segment.
        window_options = {name: value for name, value in router_options.items() if name != "route_block_size"}
        memory_options = chunk_options = token_options = None
        if memory_routing != "content":
            memory_options = {
                "num_tokens_q": num_tokens_q,
                "num_tokens_kv": num_tokens_kv,
                "kv_routing_tokens": kv_routing_tokens,
                "router_kwargs": router_options,
                "random_route": memory_routing == "random",
                "routing_shortlist": routing_shortlist,
            }
        if by_content and routing_chunk == 1:
            token_options = {
                "num_tokens_kv": num_content_tokens_kv,
                "sets": kv_routing_tokens,
                "router_kwargs": window_options,
                "key_dim": routing_key_dim,
                "routing_shortlist": routing_shortlist,
            }
        elif by_content:
            chunk_options = {
                "num_tokens_kv": num_content_tokens_kv,
                "kv_routing_tokens": kv_routing_tokens,
                "router_kwargs": window_options,
                "routing_chunk": routing_chunk,
            }
        half = max(heads // 2, 1)
        attention_options: dict[str, Any] = {"heads": heads, "light_window_size": None, "heavy_options": None}
        if routed_self_attention:
            attention_options = {
                "heads": half if light_heads is None else light_heads,
                "light_window_size": self.routing_window if light_window_size is None else light_window_size,
                "heavy_options": {
                    "num_heavy_tokens_q": num_heavy_attn_tokens_q,
                    "num_heavy_tokens_kv": num_heavy_attn_tokens_kv,
                    "num_routed_kv": num_routed_kv,
                    "heavy_heads": max(heads - half, 1) if heavy_heads is None else heavy_heads,
                    "router_kwargs": window_options,
                },
            }
        feedforward_options = {
            "num_heavy_tokens": num_heavy_ff_tokens,
            "light_ff_mult": light_ff_mult,
            "router_kwargs": window_options,
        }
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(
            Block(
                dim,
                dim_head=dim_head,
                dropout=dropout,
                ff_mult=ff_mult,
                memory_heads=heads // 2 if memory_routing == "both" else heads,
                memory_options=memory_options if number in memory_layers else None,
                chunk_options=chunk_options if number in memory_layers else None,
                token_options=token_options if number in memory_layers else None,
                routing_window=self.routing_window,
                query_routing=query_routing,
                feedforward_options=feedforward_options if routed_feedforward else None,
                **attention_options,
            )
            for number in range(1, depth + 1)
        )
        self.block_run = BlockRun()
        self.compiled_together = False
        self.norm = nn.RMSNorm(dim)
        self.to_logits = nn.Linear(dim, vocab_size, bias=False)
        if tie_embeddings:
            self.to_logits.weight = self.embedding.weight
        self.dropout = nn.Dropout(dropout)
        self._initialise()

    def _initialise(self) -> None:
        """All weights start here.

        Projections keep the scale of what they are given; those that join the residual stream share its
        scale among the branches. The memory branch adds nothing at first: its last projection is zero, so
        that it is learned before it disturbs, and its gate lets 10% through, so that gradient reaches what
        lies behind. Nor does anything that is looked at in place of rows, or given to tokens not routed.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ConditionalRoutedCrossAttention):
                nn.init.zeros_(module.null_value)
                if module.null_q_token is not None:
                    nn.init.zeros_(module.null_q_token)
        nn.init.normal_(self.embedding.weight, std=self.dim**-0.5)
        for block in self.typed_blocks():
            for branch in block.last_projections():
                branch.weight.data *= (2 * self.depth) ** -0.5
            block.attention.look_back()
            for memory in block.memories():
                nn.init.zeros_(memory.to_out.weight)
                nn.init.zeros_(memory.age_bias.weight)
                nn.init.constant_(memory.memory_gate, 0.1)

    # ---- State ----

    def create_memory(
        self,
        path: str | os.PathLike[str] | S3Path | None = None,
        *,
        streams: int,
        capacity: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        capacity_bytes: int | None = None,
        eviction: Eviction = "oldest",
        keep_every: int | None = None,
    ) -> MemoryStore:
        """A new memory store that fits this model: see `MemoryStore.create`.

        The model reads what followed the rows that it chooses. Where eviction takes rows from between others,
        a row whose follower has left gives nothing to read. Scores by content are those of a moment, and
        count for nothing there: with them alone, "lowest_score" lets the oldest rows leave.

        Args:
            path: where it is persisted; None for one in memory alone.
            streams: b.
            capacity: rows kept of each stream; None for all.
            dtype: of the rows; None for that of the weights.
            device: where rows are kept while hot; None for that of the weights.
            capacity_bytes: bytes of rows kept of all layers and streams together; None for no bound.
            eviction: which rows leave first: "oldest", "lowest_score" or "every_nth".
            keep_every: with "every_nth", n.
        """
        weight = self.embedding.weight
        return MemoryStore.create(
            path,
            layers=len(self.memory_layers),
            streams=streams,
            dim=self.dim,
            dtype=weight.dtype if dtype is None else dtype,
            device=weight.device if device is None else device,
            capacity=capacity,
            fingerprint=self.fingerprint(),
            capacity_bytes=capacity_bytes,
            eviction=eviction,
            keep_every=keep_every,
        )

    def initial_state(self, *, streams: int, memory: MemoryStore | None = None) -> TransformerXLState:
        """The state before the first token of `streams` documents.

        Args:
            streams: b.
            memory: a store of the model's memory layers, `streams` and `dim`; None for XL memory alone. If
                it holds rows, reading goes on after them, with an empty XL window.

        Raises:
            ValueError: if the memory does not fit the model.
            FingerprintError: if it holds rows that other weights wrote.
        """
        if streams < 1:
            raise ValueError(f"streams: expected at least 1, got {streams}")
        weight = self.embedding.weight
        positions = torch.zeros(streams, dtype=torch.int64, device="cpu")
        if memory is not None:
            self._check_memory(memory, streams)
            layer = memory.layer(0)
            positions = layer.positions(layer.lengths - 1) + 1  # rows appended
        return TransformerXLState(
            window=weight.new_zeros(self.depth, streams, self.mem_len, self.dim),
            window_lengths=torch.zeros(streams, dtype=torch.int64, device="cpu"),
            positions=positions,
            open=weight.new_zeros(self.depth, streams, 0, self.dim),
            scores=self.no_scores(streams, weight.device),
            memory=memory,
            model=self,
        )

    def load_state(
        self,
        folder: str | os.PathLike[str],
        mode: Literal["r", "r+"] = "r",
        *,
        device: torch.device | str | None = None,
        allow_other_weights: bool = False,
        device_bytes: int | None = None,
        host_bytes: int | None = None,
    ) -> TransformerXLState:
        """Open a state that `state.save` wrote.

        Args:
            folder: where it was saved.
            mode: "r" opens exactly the commit that the state names, for anyone to share, and keeps new rows
                in memory; "r+" takes the writer's lock of the store and rolls it back to that commit.
            device: where the state goes; None for that of the weights.
            allow_other_weights: open a state, and a memory, that other weights wrote.
            device_bytes: memory that rows may take on the device, as for `MemoryStore.open`.
            host_bytes: memory that they may take on the host besides, as there.

        Raises:
            FingerprintError: if other weights wrote it.
            MemoryStoreError: if there is no state, or it or its memory is damaged, locked or of a newer
            format. ValueError: if the state does not fit the model.
        """
        return load_state(
            self,
            folder,
            mode=mode,
            device=device,
            allow_other_weights=allow_other_weights,
            device_bytes=device_bytes,
            host_bytes=host_bytes,
        )

    def fingerprint(self) -> str:
        """A hash of all weights, 32 hexadecimal digits: equal if and only if the weights are, bit for bit."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            # Reinterpreting a zero-dimensional tensor as bytes is refused, so all are flattened.
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:32]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the weights as safetensors and the arguments as config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        if self.config["tie_embeddings"]:
            del weights["to_logits.weight"]
        config = {"model": type(self).__name__, "config_version": CONFIG_VERSION, **self.config}
        temporary = [folder / f"{name}.tmp" for name in (WEIGHTS_FILE, CONFIG_FILE)]
        save_file(weights, temporary[0], metadata={"fingerprint": self.fingerprint()})
        temporary[1].write_text(json.dumps(config, indent=2) + "\n")
        os.replace(temporary[0], folder / WEIGHTS_FILE)
        os.replace(temporary[1], folder / CONFIG_FILE)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, device: torch.device | str = "cpu"
    ) -> RoutedTransformerXL:
        """The model that `save_pretrained` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if the config is not one of this model, of a newer version, or not that of the
            weights.
        """
        folder = Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder / name}: there is no saved model")
        try:
            config = json.loads((folder / CONFIG_FILE).read_text())
            model_name, version = config.pop("model", None), config.pop("config_version", None)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{folder / CONFIG_FILE}: the file is damaged ({error})") from error
        if (model_name, version) != (cls.__name__, CONFIG_VERSION):
            raise ValueError(
                f"{folder / CONFIG_FILE}: expected model {cls.__name__} with config version "
                f"{CONFIG_VERSION}, got {model_name} with {version}"
            )
        try:
            with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
                fingerprint = (file.metadata() or {}).get("fingerprint")
            weights = load_file(folder / WEIGHTS_FILE)
        except SafetensorError as error:
            raise ValueError(f"{folder / WEIGHTS_FILE}: the file is damaged ({error})") from error
        model = cls(**config)
        if config["tie_embeddings"]:
            weights["to_logits.weight"] = weights["embedding.weight"]
        odd = sorted(model.state_dict().keys() ^ weights.keys())
        if odd:
            raise ValueError(
                f"{folder / CONFIG_FILE}: expected the options of the weights in {WEIGHTS_FILE}, got others: "
                f"{odd[0]} is in one of them alone"
            )
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(weights[name].dtype)
        # Copied, not assigned: the file's tensors lie at odd addresses, and the bits of a matrix product can
        # depend on that.
        model.load_state_dict(weights)
        if model.fingerprint() != fingerprint:
            raise ValueError(
                f"{folder / WEIGHTS_FILE}: expected weights with fingerprint {fingerprint}, as the file "
                f"says, got {model.fingerprint()}: it is damaged"
            )
        return model.to(device).eval()

    # ---- Reading ----

    @overload
    def forward(
        self,
        tokens: Tensor,
        state: TransformerXLState,
        lengths: Tensor | None = None,
        ends: Tensor | None = None,
        *,
        return_routing: Literal[False] = False,
    ) -> tuple[Tensor, TransformerXLState]: ...

    @overload
    def forward(
        self,
        tokens: Tensor,
        state: TransformerXLState,
        lengths: Tensor | None = None,
        ends: Tensor | None = None,
        *,
        return_routing: Literal[True],
    ) -> tuple[Tensor, TransformerXLState, tuple[Routing, ...]]: ...

    def forward(
        self,
        tokens: Tensor,
        state: TransformerXLState,
        lengths: Tensor | None = None,
        ends: Tensor | None = None,
        *,
        return_routing: bool = False,
    ) -> tuple[Tensor, TransformerXLState] | tuple[Tensor, TransformerXLState, tuple[Routing, ...]]:
        """Read one segment of each stream.

        At its end, states that leave the XL window enter the memory, and streams whose document ends are
        cleared. A segment that `generate` left open ends before this one is read, and stays ended should the
        call fail after that.

        Args:
            tokens: int64 [b, n]; n need not be `segment_len`.
            state: consumed by the call.
            lengths: int64 [b], how many tokens of each stream count, the first ones; None for all. The logits
                behind them mean nothing.
            ends: bool [b], the document of the stream ends with this segment; None for nowhere.
            return_routing: return also which rows each memory layer chose.

        Returns:
            logits [b, n, vocab_size], of the token after each one; the next state; and with `return_routing`
            one `Routing` for each memory layer, or two for `memory_routing="both"`, the learned one first;
            none if the state has no memory.

        Raises:
            ValueError, TypeError: for arguments that do not fit, or a consumed state; nothing was read then.
            If it was for tokens that do not exist, the memory may have scored rows, as the next call would,
            and random numbers were drawn, where there is dropout or rows are chosen at random.
            MemoryStoreError: if the memory cannot be read or written.
        """
        lengths, ends, check_tokens = self._check_segment(tokens, state, lengths, ends)
        if state.open.shape[2]:
            check_tokens()  # a call that is refused does not end it
            self.end_open_segment(state)
        memories, as_assumed = self.begin_to_open(state, with_stats=return_routing)
        if return_routing or not self._blocks_read(memories):
            if not as_assumed():
                memories = self.open_memories(state, with_stats=return_routing)
            check_tokens()
            read = self._read(tokens, state, memories, report=return_routing)
        else:
            # Nothing changes while blocks read by themselves, so that the host waits for the GPU only then.
            there = tokens.clamp(0, self.vocab_size - 1)
            read = self._read(there, state, memories)
            holds = as_assumed()
            check_tokens()
            if not holds:
                read = self._read(there, state, self.open_memories(state))
        logits, entering, attached, scores, routings = read
        still = still_attached(state.attached)
        self._shift(state, entering, lengths, ends)
        state.scores = _slices(
            torch.cat((state.scores, scores), dim=2), lengths, state.scores.shape[2]
        ).masked_fill(to_device(ends, logits.device)[:, None, None], -math.inf)
        state.positions = torch.where(ends, 0, state.positions + lengths)
        state.attached = ()
        if attached:
            segment = AttachedSegment(attached, lengths.clone())  # which may be the caller's
            state.attached = (*still, segment)[-self.memory_grad_segments :]
        state = state.hand_over()
        return (logits, state, routings) if return_routing else (logits, state)

    def _blocks_read(self, memories: Sequence[OpenMemory | None]) -> bool:
        """Whether all blocks read the memory by themselves."""
        return not self._recomputes and all(each is None or each.at_hand is not None for each in memories)

    @property
    def _recomputes(self) -> bool:
        """Whether blocks are computed anew for backward; rows may have moved by then."""
        return self.gradient_checkpointing and torch.is_grad_enabled()

    def _read(
        self,
        tokens: Tensor,
        state: TransformerXLState,
        memories: Sequence[OpenMemory | None],
        *,
        report: bool = False,
    ) -> SegmentRead:
        """What all blocks make of tokens [b, n], which exist; the state stays as it is.

        Args:
            tokens: of a segment.
            state: what was read before.
            memories: what `open_memories` gives for it.
            report: which rows were chosen.
        """
        mask, view = self.window_view(state, tokens.shape[1])
        nothing = torch.zeros(len(tokens), dtype=torch.int64, device="cpu")
        near = AttachedRows(
            still_attached(state.attached) if self.mems_grad else (), nothing, most=self.mem_len
        )
        keeps = self.memory_grad_segments > 0 and torch.is_grad_enabled()
        unread = not (self._recomputes or report)
        together = unread and not keeps and self.compiled_together
        attached: dict[int, Tensor] = {}
        entering, scores, routings = [], [], []
        x = self.dropout(self.embedding(tokens))
        for run in self._runs(memories) if together else [range(i, i + 1) for i in range(self.depth)]:
            i, memory = run.start, memories[run.start]
            if keeps and (memory is not None or self.mems_grad):
                x = attached[i] = attach(x)
            entering.append(x.detach())
            window = near.in_window(state.window[i], i)
            if memory is not None and (memory.at_hand is None or not unread):
                routed = [
                    self.route(i, j, memory, x, window, mask)
                    for j in range(len(self.typed_blocks()[i].memories()))
                ]
                rows: list[list[Any]] = [[each for each, _ in routed]]
                routings += [routing for _, routing in routed if routing is not None]
            else:
                # In a run, only branches of its first block look at what they are given.
                rows = [self._unread(number, memories[number], x, window, mask) for number in run]
                if together:
                    blocks, windows = self.typed_blocks()[i : run.stop], state.window[i : run.stop]
                    before = state.scores[i : run.stop]
                    x, others, new = self.block_run(blocks, x, windows, mask, view, rows, before)
                    entering += others
                    scores += new
                    continue
            block, inputs = self.typed_blocks()[i], (x, window, mask, view, rows[0], state.scores[i])
            if self._recomputes:
                x, block_scores = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, block_scores = block(*inputs)
            scores.append(block_scores)
        logits = self.to_logits(normed(self.norm, x))
        return SegmentRead(logits, torch.stack(entering), attached, torch.stack(scores), tuple(routings))

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        length: int,
        state: TransformerXLState,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        segment_len: int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, TransformerXLState]:
        """Read a prompt, then sample new tokens one by one, in evaluation mode.

        Prompt and new tokens are cut at multiples of `segment_len`; the last segment stays open in the state,
        and the next call of `generate` goes on in it. The last new token has not been read: begin the next
        prompt with it.

        Args:
            prompt: int64 [b, n], n >= 1.
            length: new tokens for each stream, at least 1.
            state: consumed by the call. If the call is interrupted, the state holds what was read so far.
            temperature: the logits are divided by it; 0 takes the likeliest token.
            top_k: draw from the k likeliest tokens only.
            top_p: draw from the smallest set of likeliest tokens whose probability is at least this.
            segment_len: None for that of the model.
            generator: source of randomness, on the model's device; None for PyTorch's own.

        Returns:
            The new tokens, int64 [b, length], and the next state.

        Raises:
            ValueError, TypeError: for arguments that do not fit, or a consumed state.
        """
        _, _, check_tokens = self._check_segment(prompt, state, None, None)
        check_tokens()
        if self.query_routing != "threshold":
            raise ValueError(
                "query_routing: expected 'threshold' in a model that generates, since the other looks ahead, "
                f"got {self.query_routing!r}"
            )
        segment_len = self.segment_len if segment_len is None else segment_len
        for name, value in (("length", length), ("segment_len", segment_len)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value}")
        options = SamplingOptions(temperature, top_k, top_p)
        training = [module for module in self.modules() if module.training]
        segment = OpenSegment(self, state, segment_len)
        tokens = prompt
        new: list[Tensor] = []
        self.eval()
        try:
            while len(new) < length:
                logits = segment.read(tokens)
                tokens = sample(logits[:, -1], options, generator=generator)[:, None]
                new.append(tokens)
        finally:
            segment.leave()
            for module in training:
                module.training = True
        return torch.cat(new, dim=1), state.detach()

    def compile_blocks(self, *, together: bool = False, **options: Any) -> None:
        """Compile the blocks in place, each as one, or several.

        Blocks that are compiled together take the host less time for each segment: those that follow each
        other, up to the next that chooses rows of the memory by what is being read. It takes longer to
        compile, as often as there are blocks, not kinds of blocks. With `return_routing`,
        `memory_grad_segments` in training, gradient checkpointing, or a memory on disk, blocks are read one
        by one, and then they are not compiled.

        Args:
            together: several as one.
            **options: of `torch.compile`.
        """
        self.compiled_together = together
        for module in [self.block_run] if together else self.blocks:
            module.compile(**options)

    def typed_blocks(self) -> list[Block]:
        """The blocks, with their type."""
        return list(self.blocks)  # type: ignore[arg-type]

    def no_scores(self, streams: int, device: torch.device) -> Tensor:
        """The scores of a state that has read nothing, [L, b, 2 v, 2]; empty if none are needed."""
        shape = (2 * self.routing_window, 2) if self.routes_by_scores else (0, 0)
        dtype = torch.promote_types(self.embedding.weight.dtype, torch.float32)
        return torch.full((self.depth, streams, *shape), -math.inf, dtype=dtype, device=device)

    def window_mask(self, state: TransformerXLState) -> Tensor:
        """Which places of the XL window are in use, bool [b, w]; they are the last ones."""
        places = torch.arange(self.mem_len, device=state.window.device)
        return places >= self.mem_len - to_device(state.window_lengths, places.device)[:, None]

    def segment_view(self, mask: Tensor, tokens: int) -> SegmentView | None:
        """How all blocks see tokens behind rows of a mask [b, w]; None if they see those nearby alone."""
        attention = self.typed_blocks()[0].attention
        if attention.window_size is not None:
            return None
        return SegmentView.of(mask, tokens, attention.q_bias.shape[-1], self._logits_dtype(mask.device))

    def window_view(self, state: TransformerXLState, tokens: int) -> tuple[Tensor, SegmentView | None]:
        """The `window_mask` of a state, and the `segment_view` of tokens behind it."""

        def made() -> tuple[Tensor, SegmentView | None]:
            mask = self.window_mask(state)
            return mask, self.segment_view(mask, tokens)

        # A model of other heads may read on from a state.
        attention = self.typed_blocks()[0].attention
        near, dim_head = attention.window_size is not None, attention.q_bias.shape[-1]
        return state.kept_view((tokens, near, dim_head, self._logits_dtype(state.window.device)), made)

    def _logits_dtype(self, device: torch.device) -> torch.dtype:
        dtype = self.typed_blocks()[0].attention.to_q.weight.dtype
        if torch.is_autocast_enabled(device.type) and dtype != torch.float64:  # which it leaves as it is
            return torch.get_autocast_dtype(device.type)
        return dtype

    def open_memories(
        self, state: TransformerXLState, *, with_stats: bool = False
    ) -> list[OpenMemory | None]:
        """What the memory of a state holds for each block; None for a block that reads no memory.

        Args:
            state: its memory keeps scores and keys of its rows for the next call; nothing else changes.
            with_stats: `route` is to tell which rows it has chosen.
        """
        while True:  # twice at most: what is kept is forgotten where it is of other weights
            memories, as_assumed = self.begin_to_open(state, with_stats=with_stats)
            if as_assumed():
                return memories

    def begin_to_open(
        self, state: TransformerXLState, *, with_stats: bool = False
    ) -> tuple[list[OpenMemory | None], Callable[[], bool]]:
        """As `open_memories`, without waiting for a GPU to learn whether kept scores are of these weights.

        Returns:
            What the memory holds if they are; and what waits, and tells whether they are, see
            `begin_comparison`. If that is not called, the next call computes them anew.
        """
        opened: list[OpenMemory | None] = [None] * self.depth
        if state.memory is None:
            return opened, lambda: True
        newer = state.window_lengths
        behind = AttachedRows(still_attached(state.attached), newer)
        held = {number - 1: state.memory.layer(layer) for layer, number in enumerate(self.memory_layers)}
        rows = {i: behind.in_memory(layer, i) for i, layer in held.items()}
        at_hand = {
            i: layer.at_hand(newer) if rows[i] is layer and layer.device == state.window.device else None
            for i, layer in held.items()
        }
        branches = [(branch, i) for i in held for branch in self.typed_blocks()[i].memories()]
        kept = [branch.kept_scoring(held[i]) for branch, i in branches]
        as_assumed = begin_comparison([each for each in kept if each is not None])
        known = open_branches([(branch, rows[i]) for branch, i in branches], with_stats=with_stats)
        for i in held:
            opened[i] = OpenMemory(rows[i], newer, at_hand[i], known, with_stats)
        return opened, as_assumed

    def _runs(self, memories: Sequence[OpenMemory | None]) -> list[range]:
        """Blocks that can be read as one: up to the next that has to see what enters it.

        Those that do not read the memory by themselves are alone.
        """
        begins = {0, self.depth}
        for i, (block, memory) in enumerate(zip(self.typed_blocks(), memories, strict=True)):
            if memory is None:
                continue
            if memory.at_hand is None:
                begins |= {i, i + 1}
            elif any(branch.by_text for branch in block.memories()):
                begins.add(i)
        return [range(*each) for each in itertools.pairwise(sorted(begins))]

    def _unread(
        self, i: int, memory: OpenMemory | None, x: Tensor, before: Tensor, before_mask: Tensor
    ) -> list[UnreadRows]:
        """What the branches of block i have found, see `find`; none without a memory."""
        if memory is None:
            return []
        assert memory.at_hand is not None
        branches = range(len(self.typed_blocks()[i].memories()))
        return [UnreadRows(memory.at_hand, self.find(i, j, memory, x, before, before_mask)) for j in branches]

    def find(
        self, i: int, j: int, memory: OpenMemory, x: Tensor, before: Tensor, before_mask: Tensor
    ) -> PickedRows | FoundCandidates:
        """What branch j of block i finds in its memory, see `route`; the block has to read it by itself."""
        branch = self.typed_blocks()[i].memories()[j]
        found: PickedRows | FoundCandidates
        found = branch.find(memory.rows, memory.known[branch], x, before, before_mask, with_stats=False)
        return found

    def route(
        self,
        i: int,
        j: int,
        memory: OpenMemory,
        x: Tensor,
        before: Tensor,
        before_mask: Tensor,
    ) -> tuple[RoutedRows | TokenRows, Routing | None]:
        """The rows that branch j of block i reads of its memory, and which they are if that is to be told.

        Args:
            i: the block, counted from 0.
            j: which of its `memories`.
            memory: what the memory holds for it.
            x: states [b, n, d] that enter the block for tokens of a segment, from the start of a chunk.
            before: states [b, t, d] of the tokens before them, of which the last are looked at.
            before_mask: which of them there are, bool [b, t].
        """
        rows, newer, with_stats = memory.rows, memory.newer, memory.with_stats
        branch = self.typed_blocks()[i].memories()[j]
        found = branch.find(rows, memory.known[branch], x, before, before_mask, with_stats=with_stats)
        routed, stats = branch.choose(rows, found, x, with_stats=with_stats)
        rows.count_routed(routed.indices)
        indices, report = routed.indices, None
        newer = to_device(newer, indices.device).view(-1, *[1] * (indices.ndim - 1))
        read = branch.rows(rows, routed, age_place(rows.ages(indices) + newer).to(x.device))
        if stats is not None:
            positions = rows.positions(indices)
            gates, aged = routed.scores.detach(), branch.score_ages(rows, indices)
            report = Routing(i + 1, indices, positions, positions >= 0, gates, *stats, aged)
        return read, report

    @torch.no_grad()
    def end_open_segment(self, state: TransformerXLState) -> None:
        """Move the tokens of an open segment to the XL window and the memory, in place."""
        length = state.open.shape[2]
        if length:
            self._shift(
                state,
                state.open,
                torch.full((state.streams,), length),
                torch.zeros(state.streams, dtype=torch.bool),
            )
            state.open = state.open[:, :, :0]
            state.attached = ()

    @torch.no_grad()
    def _shift(self, state: TransformerXLState, states: Tensor, lengths: Tensor, ends: Tensor) -> None:
        """Move states [L, b, n, d] of a segment into the XL window, and what leaves that into the memory."""
        used = state.window_lengths + lengths
        kept = used.clamp(max=self.mem_len).masked_fill(ends, 0)
        if state.memory is not None:
            leaving = (used - kept).masked_fill(ends, 0)
            if leaving.any():
                windows = self._of_memory_layers(state.window)
                first, count = self.mem_len - state.window_lengths, int(leaving.max())
                if (first == first[0]).all() and first[0] + count <= self.mem_len:
                    rows = windows[:, :, int(first[0]) : int(first[0]) + count]
                else:
                    both = torch.cat((windows, self._of_memory_layers(states)), dim=2)
                    rows = _slices(both, first, count)
                state.memory.append(rows, lengths=leaving)
            if ends.any():
                state.memory.reset(ends)
            state.note_memory()
        n = states.shape[2]
        if n >= self.mem_len and (lengths == n).all():
            state.window = states[:, :, n - self.mem_len :].to(state.window.dtype).contiguous()
        else:
            state.window = _slices(torch.cat((state.window, states), dim=2), lengths, self.mem_len)
        state.window_lengths = kept
        if (kept < self.mem_len).any():
            state.window = state.window.masked_fill(~self.window_mask(state)[:, :, None], 0)

    def _of_memory_layers(self, states: Tensor) -> Tensor:
        """Those of states [L, ...] that enter blocks with a memory, [l, ...]; a view if evenly spaced."""
        blocks = [number - 1 for number in self.memory_layers]
        step = blocks[1] - blocks[0] if len(blocks) > 1 else 1
        if [*range(blocks[0], blocks[-1] + 1, step)] == blocks:
            return states[blocks[0] : blocks[-1] + 1 : step]
        # A list as an index would have the host wait for a GPU.
        return torch.stack([states[i] for i in blocks])

    # ---- Checks ----

    def _check_segment(
        self, tokens: Tensor, state: TransformerXLState, lengths: Tensor | None, ends: Tensor | None
    ) -> tuple[Tensor, Tensor, Callable[[], None]]:
        """Checked lengths and ends, on the CPU, and what waits for the numbers of tokens and checks them."""
        if not isinstance(state, TransformerXLState):
            raise TypeError(f"state: expected a TransformerXLState, got {type(state).__name__}")
        state.check()
        b = state.streams
        if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"tokens: expected int64 [b, n], got {getattr(tokens, 'dtype', type(tokens).__name__)}"
            )
        if tokens.ndim != 2 or tokens.shape[0] != b or tokens.shape[1] < 1:
            raise ValueError(f"tokens: expected [{b}, n] with n at least 1, got {tuple(tokens.shape)}")
        if tokens.device != state.window.device:
            raise ValueError(
                f"tokens: expected them on {state.window.device}, as the state, got {tokens.device}"
            )
        check_tokens = begin_check(tokens, self.vocab_size)
        n = tokens.shape[1]
        lengths = torch.full((b,), n, device="cpu") if lengths is None else torch.as_tensor(lengths).cpu()
        if lengths.shape != (b,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise ValueError(f"lengths: expected integers [{b}], got {lengths.dtype} {tuple(lengths.shape)}")
        if lengths.min() < 0 or lengths.max() > n:
            raise ValueError(f"lengths: expected 0 to {n}, got {lengths.tolist()}")
        ends = torch.zeros(b, dtype=torch.bool, device="cpu") if ends is None else torch.as_tensor(ends).cpu()
        if ends.shape != (b,) or ends.dtype != torch.bool:
            raise ValueError(f"ends: expected bool [{b}], got {ends.dtype} {tuple(ends.shape)}")
        return lengths.to(torch.int64), ends, check_tokens

    def check_memory_shape(self, memory: MemoryStore, streams: int) -> None:
        """Raise ValueError if a memory does not fit the model, TypeError if it is none."""
        if not isinstance(memory, MemoryStore):
            raise TypeError(f"memory: expected a MemoryStore, got {type(memory).__name__}")
        if not self.memory_layers:
            raise ValueError("memory: expected None for a model without memory_layers, got a store")
        for name, expected in (("layers", len(self.memory_layers)), ("streams", streams), ("dim", self.dim)):
            if getattr(memory, name) != expected:
                raise ValueError(f"memory: expected {name}={expected}, got {name}={getattr(memory, name)}")

    def _check_memory(self, memory: MemoryStore, streams: int) -> None:
        self.check_memory_shape(memory, streams)
        if memory.mode == "r":
            raise ReadOnlyError(
                "memory: expected one that can be written, got mode='r' (memory.fork() can be)"
            )
        fingerprint = self.fingerprint()
        if not memory.lengths.any():
            memory.fingerprint = fingerprint
        elif memory.fingerprint not in (None, fingerprint):
            raise FingerprintError(
                f"memory: expected rows of these weights ({fingerprint}), got rows that other weights "
                f"wrote ({memory.fingerprint}); set memory.fingerprint = None to use them all the same"
            )


def _slices(t: Tensor, start: Tensor, length: int) -> Tensor:
    """`length` places of t [L, b, n, d] from start [b] on; places past the end repeat the last one."""
    places = (to_device(start, t.device)[:, None] + torch.arange(length, device=t.device)).clamp(
        max=t.shape[2] - 1
    )
    return t[:, torch.arange(t.shape[1], device=t.device)[:, None], places]
