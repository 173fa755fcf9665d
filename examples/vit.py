"""Classify handwritten digits: a routed vision transformer beside a plain one of the same size.

    python examples/vit.py

trains two vision transformers on the 8 x 8 digits that come with scikit-learn, on the same batches for the
same steps: a plain one, and `ConditionalRoutedViT`, in which 4 of an image's 16 patches take the heavy
branches of each layer. It prints a table of test accuracy, parameters, and multiply-adds for an image. It
takes under two minutes, and writes to run-vit/: results.csv, and routed.png, which shows the patches that
were routed.

Expected: 7 errors in 450 test images by the plain model, 9 by the routed one, which takes 41% of the
multiply-adds. Of seeds 0 to 2 the mean accuracies are 98.7% and 97.9%.

The data need scikit-learn: pip install -e ".[examples]"
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vit_models import DIGITS, PlainViT, multiply_adds, routed_vit
from vit_report import Result, draw_routed, table, write_csv

TEST_IMAGES = 450  # of 1,797
BATCH, LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 128, 4e-3, 0.05, 50
LABEL_SMOOTHING, LARGEST_GRADIENT = 0.1, 1.0
DRAWN = 8  # test images in the picture


@dataclass(frozen=True)
class Images:
    """Images [b, 1, 8, 8] and their digits [b]."""

    pixels: Tensor
    digits: Tensor


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("run-vit"), help="folder of what is written")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--steps", type=int, default=700, help="of each model (default: 700)")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps: expected at least 1, got {options.steps}")
    try:
        training, test = load_digits()
        options.out.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    torch.set_num_threads(1)  # where cores are shared, threads wait for each other longer than they work
    print(f"training on {len(training.digits):,} images, testing on {len(test.digits)}", flush=True)
    torch.manual_seed(options.seed)
    plain = PlainViT()
    torch.manual_seed(options.seed)
    routed = routed_vit()
    results = []
    for name, model in (("plain", plain), ("routed", routed)):
        began = time.process_time()
        train(model, training, options.steps, options.seed, name)
        result = Result(
            model=name,
            seed=options.seed,
            steps=options.steps,
            test_images=len(test.digits),
            test_errors=errors(model, test),
            training_images=len(training.digits),
            training_errors=errors(model, training),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            multiply_adds=multiply_adds(model),
            cpu_seconds=time.process_time() - began,
        )
        results.append(result)
    print(f"\n{table(results)}\n")
    write_csv(options.out / "results.csv", results)
    draw_routed(options.out / "routed.png", routed, test.pixels, DRAWN)
    print(f"wrote {options.out}/: results.csv, routed.png")
    return 0


def load_digits() -> tuple[Images, Images]:
    """The digits of scikit-learn, for training and for testing, always the same ones.

    Raises:
        ImportError: without scikit-learn.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError('scikit-learn is missing: pip install -e ".[examples]"') from error
    stored = datasets.load_digits()
    pixels = torch.tensor(stored.images, dtype=torch.float32)[:, None]
    digits = torch.tensor(stored.target)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    test, training = order[:TEST_IMAGES], order[TEST_IMAGES:]
    pixels = (pixels - pixels[training].mean()) / pixels[training].std()
    return Images(pixels[training], digits[training]), Images(pixels[test], digits[test])


def train(model: nn.Module, images: Images, steps: int, seed: int, name: str) -> None:
    """Train on random batches of images that are shifted by up to a pixel, which the seed alone decides."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(images.digits), (BATCH,), generator=generator)
        batch = shifted(images.pixels[chosen], generator)
        loss = F.cross_entropy(model(batch), images.digits[chosen], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"{name}: step {step}, loss {loss.item():.3f}", flush=True)


def shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Images [b, 1, 8, 8], each moved by -1, 0 or 1 pixels along both axes."""
    padded = F.pad(pixels[:, 0], (1, 1, 1, 1), value=pixels.min().item())
    corner = torch.randint(3, (2, len(pixels), 1), generator=generator)
    rows, columns = corner + torch.arange(DIGITS)
    images = torch.arange(len(pixels))[:, None, None]
    return padded[images, rows[:, :, None], columns[:, None, :]][:, None]


@torch.no_grad()
def errors(model: nn.Module, images: Images) -> int:
    """How many images are taken for another digit."""
    return int((model(images.pixels).argmax(-1) != images.digits).sum())


if __name__ == "__main__":
    sys.exit(main())
