"""What benchmarks/routing.py and the processes of its peers measure: sizes, temperatures, inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPS_INIT, EPS, EPS_DECAY = 4.0, 0.03, 0.7  # the temperatures of coordinate descent
EPS_SOFT_TOPK = 0.1


@dataclass(frozen=True)
class Sizes:
    """How large the work is."""

    descent_shape: tuple[int, int] = (16, 131_072)
    descent_k: int = 1024
    descent_iters: int = 20
    topk_shape: tuple[int, int] = (2, 1_048_576)
    topk_k: int = 1024
    gradient_shape: tuple[int, int] = (16, 512)
    gradient_k: int = 64
    gradient_iters: int = 50
    memories: int = 1_048_576
    dim: int = 512
    stored: tuple[int, int] = (1_048_576, 16_777_216)  # memories whose scores are stored
    heads: int = 8
    dim_head: int = 64
    queries: int = 1024
    num_tokens_q: int = 512
    num_tokens_kv: int = 1024
    kv_routing_tokens: int = 2
    routing_tokens: tuple[int, ...] = (2, 32)  # of the scores alone
    route_block_size: int = 131_072  # colt5-attention takes no longer row
    sweep: tuple[int, ...] = tuple(2**i for i in range(12, 28))
    copy_bytes: int = 1 << 30


# To see that everything runs, on a CPU too; the times mean nothing.
TINY = Sizes(
    descent_shape=(2, 500),
    descent_k=8,
    topk_shape=(2, 700),
    topk_k=10,
    gradient_shape=(2, 64),
    gradient_k=8,
    memories=512,
    dim=32,
    stored=(512, 1024),
    heads=4,
    dim_head=8,
    queries=16,
    num_tokens_q=8,
    num_tokens_kv=16,
    routing_tokens=(2, 3),
    route_block_size=256,
    sweep=(256, 1024),
    copy_bytes=1 << 20,
)


def normal(*shape: int, device: torch.device, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal random numbers, drawn on the device, where a billion of them take no time."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def gradient_inputs(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scores and a cotangent for the gradient's error: the same numbers in every process, on every device."""
    generator = torch.Generator().manual_seed(0)
    s, cotangent = (torch.randn(sizes.gradient_shape, generator=generator).to(device) for _ in range(2))
    return s, cotangent
