"""The table, the CSV and the picture of examples/vit.py."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor

from xlroute import CoordinateDescentRouter, RouterOutput
from xlroute.vit import ConditionalRoutedViT

mpl.use("Agg")  # before pyplot: it must not look for a screen
import matplotlib.pyplot as plt

ROUTERS = {"q_router": "queries", "kv_router": "keys and values", "router": "feedforward"}


@dataclass(frozen=True)
class Result:
    """What is known of one model; multiply-adds are for one image, CPU seconds for all of training."""

    model: str
    seed: int
    steps: int
    test_images: int
    test_errors: int
    training_images: int
    training_errors: int
    parameters: int
    multiply_adds: int
    cpu_seconds: float


def table(results: list[Result]) -> str:
    """The results as text, one line for each model."""
    lines = [
        (
            "model",
            "test accuracy",
            "errors",
            "training accuracy",
            "parameters",
            "multiply-adds",
            "CPU seconds",
        )
    ]
    lines += [
        (
            each.model,
            f"{1 - each.test_errors / each.test_images:.2%}",
            f"{each.test_errors} of {each.test_images}",
            f"{1 - each.training_errors / each.training_images:.2%}",
            f"{each.parameters:,}",
            f"{each.multiply_adds:,}",
            f"{each.cpu_seconds:.0f}",
        )
        for each in results
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:]])


def write_csv(path: Path, results: list[Result]) -> None:
    """One line for each model."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(results[0])))
        writer.writeheader()
        writer.writerows(asdict(each) for each in results)


@torch.no_grad()
def routed_shares(vit: ConditionalRoutedViT, images: Tensor) -> dict[str, Tensor]:
    """In which share of the layers each patch was routed, float32 [b, p, q], for each kind of routing."""
    chosen: dict[str, list[Tensor]] = defaultdict(list)

    def noted(kind: str) -> Callable[..., None]:
        def note(router: CoordinateDescentRouter, arguments: object, out: RouterOutput) -> None:
            chosen[kind].append(out.indices.flatten(1))

        return note

    hooks = [
        module.register_forward_hook(noted(ROUTERS[name.split(".")[-1]]))
        for name, module in vit.named_modules()
        if isinstance(module, CoordinateDescentRouter)
    ]
    try:
        _, features = vit(images, return_features=True)
    finally:
        for hook in hooks:
            hook.remove()
    b, p, q, _ = features.shape
    shares = {}
    for kind, layers in chosen.items():
        counts = torch.zeros(b, p * q)
        for indices in layers:
            counts.scatter_add_(1, indices, torch.ones(indices.shape))
        shares[kind] = (counts / len(layers)).view(b, p, q)
    return shares


def draw_routed(path: Path, vit: ConditionalRoutedViT, images: Tensor, drawn: int) -> None:
    """The first images, below each the patches that were routed, and at the end the mean over all images."""
    shares = routed_shares(vit, images)
    figure, axes = plt.subplots(
        1 + len(shares), drawn + 1, figsize=(1.2 * drawn + 2.4, 5.4), layout="constrained"
    )
    for column in range(drawn + 1):
        image = (images[column, 0] if column < drawn else images[:, 0].mean(0)).numpy()
        axes[0, column].imshow(image, cmap="gray")
        for row, (kind, share) in enumerate(shares.items(), start=1):
            patches = (share[column] if column < drawn else share.mean(0)).numpy()
            axes[row, column].imshow(image, cmap="gray", extent=(0, 1, 0, 1))
            drawing = axes[row, column].imshow(
                patches, cmap="inferno", alpha=0.65, vmin=0, vmax=1, extent=(0, 1, 0, 1)
            )
            axes[row, 0].set_ylabel(kind)
    axes[0, 0].set_ylabel("image")
    axes[0, drawn].set_title(f"mean of {len(images)}", fontsize="medium")
    for each in axes.flat:
        each.set(xticks=[], yticks=[])
    figure.colorbar(drawing, ax=axes, label="share of the layers that routed the patch", shrink=0.7)
    figure.suptitle("Which patches of test images take the heavy branches")
    figure.savefig(path, dpi=110)
    plt.close(figure)
