"""Time every loss of the family, forward and backward, on the CPU in one interleaved run.

    python benchmarks/compare_family.py --output output/benchmarks

One call at a time: each is timed after one unmeasured call of the same loss, which leaves the caches and the allocator
as a training loop has them; the order of the losses is shuffled anew in each round. The figure is the minimum over
rounds: what the computation takes, without what else the machine did. 10 % of the labels are positive. Where elements
do not count, these are 10 % too. The ratio is to the plain loss here; that of another library's loss is to the same
loss here. Prints a table and writes `compare_family.json`. Libraries that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare_losses import forward_backward, parse_shape
from measure import MIN_ROUNDS, WARM_UP, environment
from plot_family import LIBRARIES, library
from torch import Tensor, nn

from fused_sce import functional as F

PLAIN = "plain"
TORCHS = ("torch", "torchvision", "timm", "kornia", "segmentation_models_pytorch")


@dataclass
class Figure:
    """The time of one loss."""

    name: str
    seconds: float  # minimum
    repetitions: int
    twin: str | None  # the loss here that computes the same, for a loss of another library
    ratio_to_plain: float | None
    ratio_to_twin: float | None


@dataclass
class Batch:
    """What the losses are computed of."""

    logits: Tensor
    target: Tensor
    ignored: Tensor  # the target, -1 where an element does not count
    counts: Tensor  # bool
    alpha: Tensor  # one per label
    few: Tensor  # bool, five positives in each row
    one: Tensor  # bool, one positive in each row


def batch(shape: tuple[int, int]) -> Batch:
    """Random logits and labels."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=generator) * 3).requires_grad_()
    target = (torch.rand(shape, generator=generator) < 0.1).float()
    counts = torch.rand(shape, generator=generator) >= 0.1
    alpha = torch.rand(shape[1], generator=generator)
    columns = torch.rand(shape, generator=generator).argsort(-1)
    few, one = (torch.zeros(shape, dtype=torch.bool).scatter_(1, columns[:, :count], True) for count in (5, 1))
    return Batch(logits, target, torch.where(counts, target, -1.0), counts, alpha, few, one)


def with_multi_hot(logits: Tensor, index: Tensor) -> Tensor:
    """The loss of the usual dense float targets, made of the indices of the positives."""
    return F.sigmoid_cross_entropy(logits, torch.zeros(logits.shape).scatter_(1, index, 1.0))


def indices(labels: Tensor) -> Tensor:
    """The columns of the positives, as many in each row."""
    return labels.nonzero()[:, 1].reshape(len(labels), -1)


def ours(of: Batch) -> dict[str, Callable[[], None]]:
    """The losses here, forward and backward."""

    def run(loss: Callable[..., Tensor], target: Tensor = of.target, **options: Any) -> Callable[[], None]:
        return partial(forward_backward, partial(loss, reduction="mean", **options), of.logits, target)

    plain, focal, asymmetric = F.sigmoid_cross_entropy, F.sigmoid_focal_loss, F.asymmetric_loss
    return {
        PLAIN: run(plain),
        "ignore_value": run(plain, of.ignored, ignore_value=-1),
        "mask": run(plain, mask=of.counts),
        "label_smoothing 0.1": run(plain, label_smoothing=0.1),
        "focal, gamma 2, alpha 0.25": run(focal),
        "focal, gamma 2, alpha per label": run(focal, alpha=of.alpha),
        "focal, gamma 2.5, alpha 0.25": run(focal, gamma=2.5),
        "asymmetric": run(asymmetric),
        "asymmetric, gamma_neg 2.5": run(asymmetric, gamma_neg=2.5),
        "bool targets": run(plain, of.few),
        "class_index": run(plain, indices(of.one)[:, 0], target_format="class_index"),
        "packed": run(plain, torch.from_numpy(np.packbits(of.few.numpy(), -1, "little")), target_format="packed"),
        "index_list of 5": run(plain, indices(of.few), target_format="index_list"),
        "sparse, 5 in a row": run(plain, of.few.float().to_sparse_csr()),
        "multi-hot float targets made of these": partial(forward_backward, with_multi_hot, of.logits, indices(of.few)),
    }


def theirs(of: Batch) -> dict[str, tuple[str, Callable[[], None]]]:
    """Other libraries' losses, each with the name of its twin here."""
    found: dict[str, tuple[str, Callable[[], None]]] = {}

    def add(module: str, name: str, twin: str, make: Callable[[Any], Any], target: Tensor = of.target) -> None:
        if library(module) is None:
            print(f"{LIBRARIES[module]} is left out: it is not installed")
        else:
            run = partial(forward_backward, make(library(module)), of.logits, target)
            found[f"{LIBRARIES[module]} {name}"] = twin, run

    focal = "focal, gamma 2, alpha 0.25"
    add("torch", "BCEWithLogitsLoss", PLAIN, lambda _: nn.BCEWithLogitsLoss())
    add("torchvision", "sigmoid_focal_loss", focal, lambda m: partial(m.ops.sigmoid_focal_loss, reduction="mean"))
    add("timm", "AsymmetricLossMultiLabel", "asymmetric", lambda m: m.loss.AsymmetricLossMultiLabel(reduction="mean"))
    add("kornia", "BinaryFocalLossWithLogits", focal, lambda m: m.losses.BinaryFocalLossWithLogits(0.25, 2.0, "mean"))
    add(
        "segmentation_models_pytorch",
        "SoftBCEWithLogitsLoss",
        "ignore_value",
        lambda m: m.losses.SoftBCEWithLogitsLoss(ignore_index=-1),
        of.ignored,
    )
    return found


def minima(candidates: Mapping[str, Callable[[], None]], seconds: float) -> tuple[dict[str, float], int]:
    """The least seconds of a call of each, and the number of rounds."""
    for run in candidates.values():
        for _ in range(WARM_UP):
            run()
    least = dict.fromkeys(candidates, float("inf"))
    order = list(candidates)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < MIN_ROUNDS or time.perf_counter() < end:
        random.shuffle(order)
        for name in order:
            run = candidates[name]
            run()
            start = time.perf_counter()
            run()
            least[name] = min(least[name], time.perf_counter() - start)
        rounds += 1
    return least, rounds


def compare(shape: tuple[int, int], seconds: float) -> list[Figure]:
    """Time everything."""
    of = batch(shape)
    twins: dict[str, str | None] = dict.fromkeys(ours(of))
    candidates = ours(of)
    for name, (twin, run) in theirs(of).items():
        twins[name], candidates[name] = twin, run
    least, rounds = minima(candidates, seconds)
    return [
        Figure(
            name=name,
            seconds=least[name],
            repetitions=rounds,
            twin=twin,
            ratio_to_plain=None if twin else least[name] / least[PLAIN],
            ratio_to_twin=least[name] / least[twin] if twin else None,
        )
        for name, twin in twins.items()
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"), help="folder for the JSON")
    parser.add_argument("--shape", type=parse_shape, default=(256, 1000), metavar="NxC")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=30.0, help="in all")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    facts = {
        **environment("cpu"),
        **{LIBRARIES[module]: library(module).__version__ for module in TORCHS if library(module) is not None},
        "threads": str(options.threads),
    }
    for name, value in facts.items():
        print(f"{name:14}{value}")

    figures = compare(options.shape, options.seconds)
    rows, columns = options.shape
    print(f"\n{rows} x {columns}, forward + backward, float32, the least of {figures[0].repetitions} calls")
    print(f"{'':36}{'us':>10}{'ratio':>8}  to")
    for figure in figures:
        ratio = figure.ratio_to_plain if figure.twin is None else figure.ratio_to_twin
        print(f"{figure.name:36}{figure.seconds * 1e6:10.0f}{ratio:8.2f}  {figure.twin or PLAIN}")
    results = {"environment": facts, "shape": options.shape, "figures": [asdict(figure) for figure in figures]}
    (options.output / "compare_family.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten: {options.output}/compare_family.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
