"""The rows of a layer at one moment: what happens to the store later does not change them."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from xlroute.kernels import row_scores
from xlroute.memory import MemoryLayer, MemoryStore


@pytest.fixture(params=["memory", "disk", "reopened"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> MemoryStore:
    """A store of 2 layers, 3 streams that hold 6, 0 and 3 rows of width 4."""
    path = None if request.param == "memory" else tmp_path / "store"
    store = MemoryStore.create(path, layers=2, streams=3, dim=4, capacity=8, chunk_bytes=64, keep_commits=1)
    store.append(torch.randn(2, 3, 6, 4), [6, 0, 3])
    if request.param == "reopened":
        store.commit()
        store.close()
        store = MemoryStore.open(tmp_path / "store", mode="r+")
    return store


def move_on(store: MemoryStore) -> None:
    """Appends, evicts, resets, and on disk deletes the files of old rows."""
    for step in range(6):
        store.append(torch.randn(2, 3, 5, 4))
        if step == 2:
            store.reset([0])
        if store.path is not None:
            store.commit()


def test_a_layer_says_what_it_holds(store: MemoryStore) -> None:
    layer = store.layer(1)
    rows, mask = store.rows(1)
    assert isinstance(layer, MemoryLayer)
    assert layer.shape == (3, 6, 4)
    assert layer.lengths.tolist() == [6, 0, 3]
    assert torch.equal(layer.mask, mask)
    assert (layer.dtype, layer.device) == (torch.float32, torch.device("cpu"))
    for stream, view in enumerate(layer.views()):
        assert torch.equal(view, rows[stream, : layer.lengths[stream]])


def test_a_layer_does_not_change(store: MemoryStore) -> None:
    indices = torch.tensor([[5, 0, -1], [-1, -1, -1], [2, 1, 0]])
    layer, unread = store.layer(0), store.layer(0)
    rows = layer.gather(indices)
    positions = layer.positions(indices)
    copies = [view.clone() for view in store.fork().layer(0).views()]
    move_on(store)
    for kept in (layer, unread):
        assert kept.shape == (3, 6, 4)
        assert torch.equal(kept.gather(indices), rows)
        assert torch.equal(kept.positions(indices), positions)
        for view, copy in zip(kept.views(), copies, strict=True):
            assert torch.equal(view, copy)


def test_picked_rows_that_were_never_loaded_outlive_their_commit(store: MemoryStore) -> None:
    indices = torch.tensor([[5, 0, -1], [-1, -1, -1], [2, 1, 0]])
    layer = store.layer(0)
    rows = layer.gather(indices)
    move_on(store)
    assert torch.equal(layer.gather(indices), rows)


def test_nobody_picked_gives_no_rows(store: MemoryStore) -> None:
    assert store.gather(0, torch.zeros(3, 0, dtype=torch.int64)).shape == (3, 0, 4)
    assert store.gather(1, torch.zeros(3, 2, 0, dtype=torch.int64)).shape == (3, 2, 0, 4)


@pytest.mark.parametrize("normalize", ["rms", "l2", None])
@pytest.mark.parametrize("shape", [(2, 4), (3, 2, 4)], ids=["shared", "per_stream"])
def test_scores_are_those_of_each_stream_alone(
    store: MemoryStore, normalize: Literal["rms", "l2"] | None, shape: tuple[int, ...]
) -> None:
    tokens = torch.randn(shape)
    layer = store.layer(0)
    scores = layer.scores(tokens, normalize=normalize, scale=0.5)
    assert scores.shape == (3, 2, 6)
    for stream, view in enumerate(layer.views()):
        expected = row_scores(view, tokens.expand(3, 2, 4)[stream], normalize=normalize, scale=0.5)
        assert torch.equal(scores[stream, :, : view.shape[0]], expected)
    assert not scores.masked_select(~layer.mask[:, None]).any()


@pytest.mark.parametrize("shape", [(4,), (2, 5), (2, 2, 4), (3, 3, 2, 4)], ids=str)
def test_scores_refuse_tokens_of_another_shape(store: MemoryStore, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"tokens: expected shape \[r, 4\] or \[3, r, 4\], got"):
        store.layer(0).scores(torch.randn(shape), normalize=None, scale=1.0)


def test_backward_over_earlier_segments_runs_after_the_store_has_moved_on(store: MemoryStore) -> None:
    first, second = (torch.randn(3, 2, 4, requires_grad=True) for _ in range(2))

    def loss(tokens: Tensor) -> Tensor:
        return store.layer(0).scores(tokens, normalize="rms", scale=1.0).square().sum()

    early = loss(first)
    [at_once] = torch.autograd.grad(early, first, retain_graph=True)
    store.append(torch.randn(2, 3, 1, 4))
    late = loss(second)
    [late_at_once] = torch.autograd.grad(late, second, retain_graph=True)
    move_on(store)
    (early + late).backward()
    assert first.grad is not None
    assert second.grad is not None
    assert torch.equal(first.grad, at_once)
    assert torch.equal(second.grad, late_at_once)


def test_views_survive_writes_into_the_same_buffer() -> None:
    store = MemoryStore.create(layers=1, streams=1, dim=4)
    store.append(torch.randn(1, 1, 8, 4))
    [view] = store.layer(0).views()
    tokens = torch.randn(4, requires_grad=True)
    scores = view @ tokens
    store.append(torch.randn(1, 1, 2, 4))
    [grown] = store.layer(0).views()
    assert grown.data_ptr() == view.data_ptr()
    scores.sum().backward()
    assert tokens.grad is not None
    assert torch.equal(tokens.grad, torch.autograd.grad((view @ tokens).sum(), tokens)[0])


def test_rows_appended_in_inference_mode_can_be_scored_in_training() -> None:
    with torch.inference_mode():
        store = MemoryStore.create(layers=1, streams=1, dim=4)
        store.append(torch.randn(1, 1, 3, 4))
    tokens = torch.randn(2, 4, requires_grad=True)
    store.layer(0).scores(tokens, normalize=None, scale=1.0).sum().backward()
    assert tokens.grad is not None
    assert torch.allclose(tokens.grad[0], store.rows(0)[0][0].sum(0), atol=1e-6)
