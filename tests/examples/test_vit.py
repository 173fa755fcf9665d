"""examples/vit.py for a few steps: what it writes, and that its table counts what the models are."""

import csv
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

EXAMPLES = Path(__file__).parents[2] / "examples"
Load = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def load() -> Iterator[Load]:
    """Imports a module of the examples as the scripts do."""
    before, threads = set(sys.modules), torch.get_num_threads()
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))
    torch.set_num_threads(threads)
    for name in {path.stem for path in EXAMPLES.glob("*.py")} & (set(sys.modules) - before):
        del sys.modules[name]


def test_a_short_run(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load("vit").main(["--steps", "2", "--seed", "3", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "run" / "routed.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "run" / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["seed"], row["steps"], row["test_images"]) for row in rows] == [
        ("plain", "3", "2", "450"),
        ("routed", "3", "2", "450"),
    ]
    for row in rows:
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{row['model']} ")]
        accuracy = 1 - int(row["test_errors"]) / 450
        assert f"{accuracy:.2%}" in line
        assert f"{int(row['multiply_adds']):,}" in line
    plain, routed = (int(row["parameters"]) for row in rows)
    assert 0.98 * plain < routed < plain
    assert int(rows[1]["multiply_adds"]) < 0.5 * int(rows[0]["multiply_adds"])


def test_errors_are_counted(load: Load) -> None:
    vit = load("vit")

    class Reads(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot(pixels[:, 0, 0, 0].long(), 10)

    digits = torch.randint(10, (50,))
    pixels = digits.float()[:, None, None, None].expand(-1, 1, 8, 8).clone()
    pixels[:7] = (pixels[:7] + 1) % 10
    assert vit.errors(Reads(), vit.Images(pixels, digits)) == 7


def test_training_and_test_images_are_disjoint(load: Load) -> None:
    training, test = load("vit").load_digits()
    assert len(training.digits) + len(test.digits) == 1797
    seen = {image.numpy().tobytes() for image in training.pixels}
    assert not any(image.numpy().tobytes() in seen for image in test.pixels)


def test_images_are_shifted_by_a_pixel_at_most(load: Load) -> None:
    pixels = torch.zeros(200, 1, 8, 8)
    pixels[:, 0, 3, 5] = 1
    places = load("vit").shifted(pixels, torch.Generator().manual_seed(torch.seed())).nonzero()
    assert {(int(row), int(column)) for _, _, row, column in places} == {
        (row, column) for row in (2, 3, 4) for column in (4, 5, 6)
    }
    assert len(places) == 200


@pytest.mark.parametrize("name", ["plain", "routed"])
def test_multiply_adds_are_those_that_pytorch_counts(load: Load, name: str) -> None:
    models = load("vit_models")
    model = models.PlainViT() if name == "plain" else models.routed_vit()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        model(torch.randn(1, 1, 8, 8))
    scores = 0
    if name == "routed":  # PyTorch does not look into their op
        routers = [module for module in model.modules() if type(module).__name__ == "CoordinateDescentRouter"]
        scores = sum(models.PATCHES * router.routing_token.numel() for router in routers)
    assert 2 * (models.multiply_adds(model) - scores) == counted.get_total_flops()


def test_the_picture_shows_what_was_routed(load: Load) -> None:
    models, report = load("vit_models"), load("vit_report")
    model, images = models.routed_vit(), torch.randn(3, 1, 8, 8)
    shares = report.routed_shares(model, images)
    assert {kind: share.sum((1, 2)).tolist() for kind, share in shares.items()} == {
        "queries": [pytest.approx(4)] * 3,
        "keys and values": [pytest.approx(8)] * 3,
        "feedforward": [pytest.approx(4)] * 3,
    }
    # The first layer's queries, counted alone.
    router = model.transformer.layers[0][0].heavy_attn.q_router
    x = model.to_patch_embedding(images) + model.positions
    first = router(x.flatten(1, 2), num_tokens=4).indices
    assert (shares["queries"].flatten(1).gather(1, first) >= 1 / 3).all()


def test_without_scikit_learn_it_says_what_to_install(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert load("vit").main(["--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == 'error: scikit-learn is missing: pip install -e ".[examples]"\n'
    assert not (tmp_path / "run").exists()
