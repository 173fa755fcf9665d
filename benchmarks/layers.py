"""How fast the routed layers are: one table, beside colt5-attention and a dense equivalent, in one run.

    python benchmarks/layers.py                     on a GPU
    python benchmarks/layers.py --tiny              on a CPU, to see that it runs: its times mean nothing

colt5-attention is measured if it can be imported: it comes with `pip install xlroute[test]`, or

    pip install --no-deps --target peer-0.11.2 -r benchmarks/requirements-peers-0.11.2.txt
    PYTHONPATH=peer-0.11.2 python benchmarks/layers.py

It writes layers.csv to --out, with everything that was measured and how. No speed is printed of a result that
was not checked first; where a check is red, the error stands in its place, and the exit code is 1. Where
colt5-attention fails, the table says so, and the exit code stays 0.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measurement import Check, Measurement, close, earned, finite, measure
from routing import describe
from routing_report import OURS, REFERENCE, Work, failures, table, write_csv
from routing_settings import Sizes, normal
from timing import on_one_stream
from torch import Tensor, nn

from xlroute import ConditionalRoutedAutoregressiveAttention

DENSE, PEER = "dense", "colt5 0.11.2"
NOTES = """\
Milliseconds where no unit is given, medians; every result was checked before it was timed.
memory: the most GPU memory held beyond what was held before the call, its result included.
reference: the same layer with use_triton=False. dense: causal scaled_dot_product_attention of all tokens,
with its norm and projections. colt5: colt5-attention, with Triton on a GPU; in bfloat16 it fails."""

Gradients = dict[str, Tensor | None]
Trained = tuple[Tensor, Gradients]  # an output, and the gradients of the input and of every parameter


@dataclass(frozen=True)
class LayerSizes:
    """How large the work is; by default, the example of colt5-attention."""

    streams: int = 2
    tokens: int = 8192
    dim: int = 512
    heads: int = 8
    dim_head: int = 64
    window: int = 128
    num_heavy_tokens_q: int = 32
    num_heavy_tokens_kv: int = 1024
    num_routed_kv: int = 2


TINY = LayerSizes(
    tokens=50,
    dim=16,
    heads=2,
    dim_head=8,
    window=8,
    num_heavy_tokens_q=3,
    num_heavy_tokens_kv=12,
)
REACH = {
    torch.float32: ("2.5 ms", "7 ms", "1 GiB"),
    torch.bfloat16: ("0.8 ms", "2.2 ms", "0.5 GiB"),
}


class DenseSelfAttention(nn.Module):
    """Causal attention of every token to all before it, fused by PyTorch."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within x [b, n, d]: [b, n, d]."""
        qkv = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (each.transpose(1, 2) for each in qkv.unbind(2))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.to_out(out.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


def autoregressive(sizes: LayerSizes, device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    """The autoregressive layer: forward, forward and backward, and the memory that they take."""
    x, cotangent = (
        normal(sizes.streams, sizes.tokens, sizes.dim, device=device, seed=seed, dtype=dtype)
        for seed in (1, 2)
    )
    ours, reference = (_routed(sizes, use_triton).to(device, dtype) for use_triton in (None, False))
    torch.manual_seed(0)
    dense = DenseSelfAttention(sizes.dim, sizes.heads, sizes.dim_head).to(device, dtype)
    layers: list[tuple[str, nn.Module]] = [(OURS, ours), (REFERENCE, reference), (DENSE, dense)]
    peer = _peer(sizes, device.type == "cuda")
    if peer is not None:
        layers.append((PEER, peer.to(device, dtype)))

    expected = train(reference, x, cotangent)
    exact = train(_routed(sizes, False).to(device, dtype).double(), x.double(), cotangent.double())
    exact_dense = run(dense.double(), x.double())
    dense.to(dtype)

    def verify(subject: str, out: Tensor) -> list[Check]:
        if subject == DENSE:
            return [close("output", out, exact_dense)]
        if subject == PEER:
            return [finite("output", out)]
        return [earned("output", out, expected[0], exact[0])]

    def verify_trained(subject: str, trained: Trained) -> list[Check]:
        checks = verify(subject, trained[0])
        if subject in (DENSE, PEER):
            return checks + [finite(name, each) for name, each in trained[1].items() if each is not None]
        return [*checks, _worst_gradient(trained[1], expected[1], exact[1])]

    def measured(
        call: Callable[..., Any], verify: Callable[..., list[Check]], *rest: Tensor
    ) -> list[Measurement]:
        return [
            measure(
                subject,
                partial(partial, call, layer, x, *rest),
                partial(verify, subject),
                device,
                graph=False if subject == PEER else None,  # it waits for the device
            )
            for subject, layer in layers
        ]

    shape = f"{sizes.streams} x {sizes.tokens:,} x {sizes.dim}"
    name = f"autoregressive, {shape}, {str(dtype).removeprefix('torch.')}"
    forward, both, memory = REACH[dtype]
    yield Work(f"{name}, forward", f"{name}, forward", forward, measurements=measured(run, verify))
    work = Work(
        f"{name}, both",
        f"{name}, forward + backward",
        both,
        measurements=measured(train, verify_trained, cotangent),
    )
    yield work
    yield Work(
        f"{name}, memory",
        f"{name}, extra GPU memory",
        memory,
        quantity="MiB",
        measurements=list(work.measurements),
    )


def _routed(sizes: LayerSizes, use_triton: bool | None) -> ConditionalRoutedAutoregressiveAttention:
    torch.manual_seed(0)
    layer = ConditionalRoutedAutoregressiveAttention(sizes.dim, use_triton=use_triton, **_arguments(sizes))
    # The output of tokens that are not routed is large, and no error would be seen beside it.
    assert layer.heavy_attn.null_q_token is not None
    nn.init.zeros_(layer.heavy_attn.null_q_token)
    return layer


def _peer(sizes: LayerSizes, use_triton: bool) -> nn.Module | None:
    """The layer of colt5-attention; None if that cannot be imported."""
    try:
        package: Any = importlib.import_module("colt5_attention")
    except ImportError:
        return None
    torch.manual_seed(0)
    layer: nn.Module = package.ConditionalRoutedAutoregressiveAttention(
        sizes.dim, use_triton=use_triton, use_flash_attn=True, **_arguments(sizes)
    )
    return layer


def _arguments(sizes: LayerSizes) -> dict[str, Any]:
    return {
        "num_heavy_tokens_q": sizes.num_heavy_tokens_q,
        "num_heavy_tokens_kv": sizes.num_heavy_tokens_kv,
        "num_routed_kv": sizes.num_routed_kv,
        "light_dim_head": sizes.dim_head,
        "light_heads": sizes.heads,
        "light_window_size": sizes.window,
        "heavy_dim_head": sizes.dim_head,
        "heavy_heads": sizes.heads,
    }


@torch.no_grad()
def run(layer: nn.Module, x: Tensor) -> Tensor:
    """The output, without a graph."""
    return layer(x)  # type: ignore[no-any-return]


def train(layer: nn.Module, x: Tensor, cotangent: Tensor) -> Trained:
    """The output, and the gradients of the input and of every parameter; None for those that get none."""
    x = x.detach().requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    out = layer(x)
    gradients = torch.autograd.grad(out, (x, *parameters), cotangent, allow_unused=True)
    return out.detach(), dict(zip(("input", *names), gradients, strict=True))


def _worst_gradient(given: Gradients, reference: Gradients, exact: Gradients) -> Check:
    """The check of the tensor whose gradient is the furthest off, against what its tolerance is."""
    checks = []
    for name, expected in exact.items():
        mine, other = given[name], reference[name]
        if mine is None or other is None or expected is None:
            return Check(f"no gradient to {name}", float("inf"), 0.0, "float64")
        checks.append(earned(f"gradient to {name}", mine, other, expected))
    return max(checks, key=lambda check: (not check.passed, check.error / check.tolerance))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder of the CSV")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU takes")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a GPU, found none")
    if device.type == "cpu" and not options.tiny:
        parser.error("--tiny: expected on a CPU, where the full sizes would take hours")

    options.out.mkdir(parents=True, exist_ok=True)
    sizes = TINY if options.tiny else LayerSizes()
    works: list[Work] = []
    with on_one_stream(device):
        machine = describe(device, Sizes(copy_bytes=1 << 20) if options.tiny else Sizes())
        for dtype in (torch.float32, torch.bfloat16):
            works += autoregressive(sizes, device, dtype)
    print(table(works, machine, (REFERENCE, DENSE, PEER), NOTES))
    write_csv(options.out / "layers.csv", works, [], machine)
    wrong = failures(works, [])
    if wrong:
        print("\n" + "\n".join(wrong))
    return int(any(each.failure for work in works for each in work.measurements if each.subject != PEER))


if __name__ == "__main__":
    sys.exit(main())
