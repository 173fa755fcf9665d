"""The routed layer on a GPU: the reference's results, in half precision, compiled, and in CUDA graphs."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xlroute import ConditionalRoutedCrossAttention
from xlroute.memory import MemoryStore

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # Said once a process by whatever test comes first.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]

DIM, QUERIES, ROWS = 64, 100, 9000


def build(
    use_triton: bool | None = None, num_tokens_q: int | None = 40, **options: bool
) -> ConditionalRoutedCrossAttention:
    torch.manual_seed(0)
    return ConditionalRoutedCrossAttention(
        DIM,
        num_tokens_q=num_tokens_q,
        num_tokens_kv=50,
        kv_routing_tokens=2,
        heads=4,
        dim_head=32,
        use_triton=use_triton,
        **options,
    ).cuda()


def inputs(b: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(b, QUERIES, DIM, device="cuda"), torch.randn(b, ROWS, DIM, device="cuda")


def gradients(module: ConditionalRoutedCrossAttention, x: Tensor, context: Tensor) -> list[Tensor]:
    out = module(x, context)
    # One that a CUDA graph draws no other of.
    cotangent = torch.linspace(-2, 2, out.numel(), device="cuda").sin().view_as(out).to(out)
    return [out, *torch.autograd.grad(out, [*module.parameters()], cotangent)]


@pytest.mark.parametrize("num_tokens_q", [None, 40])
def test_triton_equals_the_reference(num_tokens_q: int | None) -> None:
    x, context = inputs()
    plain, ours = build(False, num_tokens_q), build(True, num_tokens_q)
    exact = gradients(plain.double(), x.double(), context.double())
    expected = gradients(build(False, num_tokens_q), x, context)
    for given, reference, truth in zip(gradients(ours, x, context), expected, exact, strict=True):
        allowed = 2 * (reference.double() - truth).norm() + 1e-6 * truth.norm()
        assert (given.double() - truth).norm() <= allowed


def test_queries_on_a_stream_of_their_own_change_nothing() -> None:
    module = build()
    for _ in range(5):
        x, context = inputs()
        with torch.no_grad():
            beside = module(x, context)
        assert torch.equal(beside, module(x, context))


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "share_qk": True}], ids=["plain", "cosine"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast(dtype: torch.dtype, options: dict[str, bool]) -> None:
    x, context = inputs()
    # What half precision holds exactly, so that all of them choose the same rows.
    x, context = x.to(dtype).float(), context.to(dtype).float()
    module = build(**options).to(dtype).float()
    expected = gradients(module, x, context)
    half = copy.deepcopy(module).to(dtype)
    with torch.autocast("cuda", dtype=dtype):
        cast = gradients(module, x, context)
    for given in (gradients(half, x.to(dtype), context.to(dtype)), cast):
        for ours, reference in zip(given, expected, strict=True):
            assert (ours.float() - reference).norm() <= 40 * torch.finfo(dtype).eps * reference.norm()
    with torch.no_grad(), torch.autocast("cuda", dtype=dtype):
        without_grad = module(x, context)
    # One rounding apart at most, and of what was added up, which may be more than what is left of it.
    assert (without_grad - cast[0]).norm() <= torch.finfo(dtype).eps * cast[0].norm()


def test_it_compiles_to_one_graph() -> None:
    x, context = inputs()
    module = build()
    compiled = torch.compile(module, fullgraph=True)
    for given, expected in zip(gradients(compiled, x, context), gradients(module, x, context), strict=True):
        assert (given - expected).norm() <= 1e-4 * expected.norm()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, context), module(x, context))


def replayed(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A CUDA graph of a call; each call of the result replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@torch.no_grad()
def test_a_cuda_graph_of_the_forward() -> None:
    x, context = inputs()
    module = build()
    replay = replayed(lambda: module(x, context))
    for _ in range(3):
        x.normal_()
        context.normal_()
        assert torch.equal(replay(), module(x, context))


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning")
def test_a_cuda_graph_of_a_training_step() -> None:
    x, context = inputs()
    module = build()
    replay = replayed(lambda: torch.cat([each.flatten() for each in gradients(module, x, context)]))
    for _ in range(2):
        x.normal_()
        context.normal_()
        expected = torch.cat([each.flatten() for each in gradients(module, x, context)])
        torch.testing.assert_close(replay(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_cuda_graph_over_stored_scores() -> None:
    x, context = inputs(1)
    module = build()
    store = MemoryStore.create(layers=1, streams=1, dim=DIM, device="cuda")
    store.append(context[None])
    rows = store.layer(0)
    replay = replayed(lambda: module(x, rows))
    for _ in range(2):
        x.normal_()
        expected = module(x, context)
        assert torch.equal(module(x, rows), expected)
        assert torch.equal(replay(), expected)
    # Another row would have other scores; in a graph it is seen that the tokens are others.
    others = build()
    with torch.no_grad():
        assert others.kv_router.routing_token is not None
        others.kv_router.routing_token.add_(1)
    graph = torch.cuda.CUDAGraph()
    others(x, context)
    with torch.cuda.graph(graph):
        out = others(x, rows)
    graph.replay()
    assert torch.equal(out, others(x, context))
    assert torch.equal(module(x, rows), module(x, context))


@torch.no_grad()
def test_stored_scores_of_streams_that_grow() -> None:
    module = build(num_tokens_q=None)
    store = MemoryStore.create(layers=1, streams=2, dim=DIM, device="cuda", capacity=700)
    for step in range(4):
        store.append(torch.randn(1, 2, 300, DIM), [300, 300 - 90 * step])
        x = torch.randn(2, QUERIES, DIM, device="cuda")
        rows, mask = store.rows(0)
        torch.testing.assert_close(module(x, store.layer(0)), module(x, rows, context_mask=mask))
