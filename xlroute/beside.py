"""Modules beside others that read the same tokens, whose gradients the norm of the module adds up.

A module begins with a norm. Where Triton runs, the backward of the norm can take along the gradients of those
who read the tokens besides, as a residual does: see `xlroute.kernels.norm_beside`. So such a module has a
method `beside`, which is given what `forward` is given, and returns the tokens for another to read, and what
`forward` returns. On a CPU, the tokens that it returns are those that it was given.
"""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from xlroute.backend import pick_backend
from xlroute.kernels import norm_beside

M = TypeVar("M", bound=nn.Module)


def is_plain(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether to call the module is to run the `forward` of its kind, and nothing else.

    That is to say that it has no hooks, nor have all modules; that it was not compiled by itself; and that
    nothing stands in its place. Only then may others do its work.
    """
    watched = (
        _has_any_global_hook()  # type: ignore[no-untyped-call]
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    # Some libraries put another `forward` on a module itself; `Module.compile` leaves what is called instead.
    replaced = "forward" in module.__dict__ or module._compiled_call_impl is not None
    return type(module) is kind and not watched and not replaced


def call_beside(module: nn.Module, kind: type[nn.Module], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Tokens x for another to read, and what a module of this kind gives for them."""
    if is_plain(module, kind):
        return module.beside(x, *args, **kwargs)  # type: ignore[operator]
    return x, module(x, *args, **kwargs)


def call_with_residual(
    module: nn.Module, kind: type[nn.Module], x: Tensor, *, return_stats: bool, **options: Any
) -> tuple[Tensor, Any]:
    """Tokens x with what a module of this kind gives for them added, and its statistics, or None.

    The module's own `with_residual` adds them where it writes its output anyway.
    """
    if is_plain(module, kind):
        out = module.with_residual(x, return_stats=return_stats, **options)  # type: ignore[operator]
        return out if return_stats else (out, None)
    out = module(x, return_stats=return_stats, **options)
    out, stats = out if return_stats else (out, None)
    return out + x, stats


def normed_beside(
    norm: nn.Module, x: Tensor, use_triton: bool | None = None, *, readers: int = 1
) -> tuple[Tensor, ...]:
    """Tokens x [..., d] as often as others read them, and last what a norm of PyTorch's gives for them."""
    if not (is_plain(norm, nn.RMSNorm) or is_plain(norm, nn.LayerNorm)) or norm.weight is None:
        return (*[x] * readers, norm(x))
    assert isinstance(norm, nn.RMSNorm | nn.LayerNorm)
    return norm_beside(
        x,
        norm.weight,
        norm.bias if isinstance(norm, nn.LayerNorm) else None,
        norm="layer" if isinstance(norm, nn.LayerNorm) else "rms",
        eps=norm.eps,
        readers=readers,
        backend=pick_backend(use_triton, x.device),
    )


def normed(norm: nn.Module, x: Tensor, use_triton: bool | None = None) -> Tensor:
    """What a norm of PyTorch's gives for tokens x [..., d]."""
    return normed_beside(norm, x, use_triton, readers=0)[0]
