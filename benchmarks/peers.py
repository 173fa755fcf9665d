"""Measures one release of colt5-attention, in a process of its own, and prints JSON.

    pip install --no-deps --target peer-0.11.2 -r benchmarks/requirements-peers-0.11.2.txt
    PYTHONPATH=peer-0.11.2 python benchmarks/peers.py 0.11.2

Its releases share one import name, so no process can hold two of them; benchmarks/routing.py starts one for
each. Release 0.7.2 is the last whose cross-attention runs; 0.11.2 brings the decay of the temperature. Both
take float32 alone.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from measurement import Check, Measurement, close, finite, measure
from routing_settings import EPS, EPS_DECAY, EPS_INIT, TINY, Sizes, gradient_inputs, normal
from timing import on_one_stream
from torch import Tensor

CHECKPOINT_SEGMENTS = 4  # as its own router has it
LAYER_ITERS, LAYER_EPS = 50, 1.0  # likewise


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("version", choices=RELEASES)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu")
    )
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU takes")
    options = parser.parse_args(arguments)
    found = importlib.metadata.version("colt5-attention")
    if found != options.version:
        print(f"error: expected colt5-attention {options.version}, found {found}", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    with on_one_stream(device):
        results = RELEASES[options.version](TINY if options.tiny else Sizes(), device)
    print(json.dumps({key: each.to_json() for key, each in results.items()}))
    return 0


def release_0_7_2(sizes: Sizes, device: torch.device) -> dict[str, Measurement]:
    """Its routed cross-attention: forward, and forward with backward to every parameter."""
    subject = "colt5 0.7.2"
    package: Any = importlib.import_module("colt5_attention")
    torch.manual_seed(0)
    block = min(sizes.route_block_size, sizes.memories)
    layer = package.ConditionalRoutedCrossAttention(
        dim=sizes.dim,
        dim_head=sizes.dim_head,
        heads=sizes.heads,
        num_tokens_q=sizes.num_tokens_q,
        num_tokens_kv=sizes.num_tokens_kv,
        kv_routing_tokens=sizes.kv_routing_tokens,
        use_triton=device.type == "cuda",
        route_block_size=block,
    ).to(device)
    context = normal(1, sizes.memories, sizes.dim, device=device, seed=7)
    x, cotangent = (normal(1, sizes.queries, sizes.dim, device=device, seed=seed) for seed in (8, 9))
    names, parameters = zip(*layer.named_parameters(), strict=True)

    @torch.no_grad()
    def gates_check() -> Check:
        """The gates of one block of memories against float64; which of tied gates it chooses is open."""
        router = layer.kv_router
        s = router.routing_token @ context[0, :block].mT
        k = torch.tensor([router.fetch_k_ratio * sizes.num_tokens_kv * block / sizes.memories], device=device)
        options = {"n_iters": LAYER_ITERS, "eps": LAYER_EPS}
        exact = package.coor_descent(s.double(), k=k.double(), **options)
        return close("gates", router.coor_descent(s, k=k, mask=None, **options), exact)

    @torch.no_grad()
    def forward() -> Tensor:
        return layer(x, context=context)  # type: ignore[no-any-return]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x, context=context), parameters, cotangent)

    def verify_gradients(gradients: tuple[Tensor, ...]) -> list[Check]:
        return [
            gates_check(),
            *(finite(f"gradient to {name}", each) for name, each in zip(names, gradients, strict=True)),
        ]

    return {
        "layer forward": measure(
            subject, lambda: forward, lambda out: [gates_check(), finite("output", out)], device, graph=False
        ),
        "layer forward + backward": measure(subject, lambda: both, verify_gradients, device, graph=False),
    }


def release_0_11_2(sizes: Sizes, device: torch.device) -> dict[str, Measurement]:
    """Its Triton coordinate descent, forward and backward, and the error of its gradient."""
    subject = "colt5 0.11.2"
    package: Any = importlib.import_module("colt5_attention")
    on_gpu = device.type == "cuda"
    plain: Callable[..., Tensor] = package.coor_descent
    temperatures = {"eps": EPS, "eps_init": EPS_INIT, "eps_decay": EPS_DECAY}

    def gates(s: Tensor, k: int, n_iters: int) -> Tensor:
        if not on_gpu:
            return plain(s, k=k, n_iters=n_iters, **temperatures)
        op = importlib.import_module("colt5_attention.triton_coor_descent").triton_coor_descent
        budget = torch.full(s.shape[:1], float(k), device=device)
        segments = CHECKPOINT_SEGMENTS
        return op(s, k=budget, n_iters=n_iters, checkpoint_segments=segments, **temperatures)  # type: ignore[no-any-return]

    def backward(s: Tensor, cotangent: Tensor, k: int, n_iters: int) -> Callable[[], Tensor]:
        s = s.detach().requires_grad_()
        out = gates(s, k, n_iters)
        return lambda: torch.autograd.grad(out, s, cotangent, retain_graph=True)[0]

    def exact(s: Tensor, cotangent: Tensor, k: int, n_iters: int) -> tuple[Tensor, Tensor]:
        """Gates and their gradient, by its own plain formula in float64."""
        s = s.double().requires_grad_()
        out = plain(s, k=k, n_iters=n_iters, **temperatures)
        return out.detach(), torch.autograd.grad(out, s, cotangent.double())[0]

    s, cotangent = (normal(*sizes.descent_shape, device=device, seed=seed) for seed in (1, 2))
    settings = (sizes.descent_k, sizes.descent_iters)
    exact_gates, exact_gradient = exact(s, cotangent, *settings)
    small, small_cotangent = gradient_inputs(sizes, device)
    small_settings = (sizes.gradient_k, sizes.gradient_iters)
    _, exact_small = exact(small, small_cotangent, *small_settings)
    return {
        "descent forward": measure(
            subject,
            lambda: lambda: gates(s, *settings),
            lambda out: [close("gates", out, exact_gates)],
            device,
            graph=False,
            cold=True,
        ),
        "descent backward": measure(
            subject,
            lambda: backward(s, cotangent, *settings),
            lambda out: [close("gradient", out, exact_gradient)],
            device,
            graph=False,
            cold=True,
        ),
        "gradient error": measure(
            subject,
            lambda: backward(small, small_cotangent, *small_settings),
            lambda out: [close("gradient", out, exact_small, "float64 autograd")],
            device,
            graph=False,
        ),
    }


RELEASES = {"0.7.2": release_0_7_2, "0.11.2": release_0_11_2}

if __name__ == "__main__":
    sys.exit(main())
