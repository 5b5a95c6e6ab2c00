"""Compare the losses' numerics: worst error and lost results of each, over every STEP-th float32 logit in +-110.

    python benchmarks/compare_numerics.py

For t = 0 and t = 1: the largest error of loss and gradient in units in the last place (ULP) of the exact value, and how
many losses and gradients are lost: returned as 0 though the true value is a nonzero float32. Training stops there
silently. Prints a Markdown table and writes it as JSON too.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from compare_losses import Loss, naive
from torch import Tensor, nn

import fused_sce

sys.path.append(str(Path(__file__).parent.parent / "tools"))
from ulp import exact_binary, ulp_distance

BATCH = 2_000_000


@dataclass
class Numerics:
    """What one loss does over all logits and both targets."""

    loss: str
    logits: int
    worst_loss_ulp: float = 0.0
    worst_gradient_ulp: float = 0.0
    lost_losses: int = 0
    lost_gradients: int = 0

    def add(self, loss: Tensor, gradient: Tensor, exact_loss: Tensor, exact_gradient: Tensor) -> None:
        """Count one batch."""
        self.worst_loss_ulp = max(self.worst_loss_ulp, ulp_distance(loss, exact_loss).max().item())
        self.worst_gradient_ulp = max(self.worst_gradient_ulp, ulp_distance(gradient, exact_gradient).max().item())
        self.lost_losses += int(((loss == 0) & (exact_loss.float() != 0)).sum())
        self.lost_gradients += int(((gradient == 0) & (exact_gradient.float() != 0)).sum())


def logits(step: int) -> Tensor:
    """Every step-th float32 in [-110, 110], by bit pattern: dense near 0, as floats are."""
    positive = np.arange(0, np.float32(110).view(np.uint32) + 1, step, dtype=np.uint32).view(np.float32)
    return torch.from_numpy(np.concatenate([positive, -positive]))


def losses() -> dict[str, Loss]:
    """Element-wise losses of (logits, target)."""
    return {
        "fused_sce": lambda x, t: fused_sce.functional.sigmoid_cross_entropy(x, t, reduction="none"),
        "torch BCEWithLogitsLoss": nn.BCEWithLogitsLoss(reduction="none"),
        # one label per sample, so that its mean over labels is the element's loss
        "torch MultiLabelSoftMarginLoss": lambda x, t: nn.functional.multilabel_soft_margin_loss(
            x[:, None], t[:, None], reduction="none"
        ),
        "naive: sigmoid + BCELoss": partial(naive, reduction="none"),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"), help="folder for the JSON")
    parser.add_argument("--step", type=int, default=61, help="take every STEP-th float32")
    options = parser.parse_args(arguments)
    if options.step < 1:
        parser.error(f"--step must be at least 1, got {options.step}")
    options.output.mkdir(parents=True, exist_ok=True)

    x_all = logits(options.step)
    table = [Numerics(name, x_all.numel()) for name in losses()]
    for x in x_all.split(BATCH):
        for target in (0.0, 1.0):
            exact_loss, exact_gradient = exact_binary(x.double(), target)
            for row in table:
                leaf = x.clone().requires_grad_()
                loss = losses()[row.loss](leaf, torch.full_like(x, target))
                (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
                row.add(loss.detach(), gradient, exact_loss, exact_gradient)

    print(f"{x_all.numel():,} logits, t = 0 and t = 1, float32, torch {torch.__version__}\n")
    print("| | worst error of the loss | of the gradient | losses lost | gradients lost |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for row in table:
        print(
            f"| {row.loss} | {row.worst_loss_ulp:,.2f} ULP | {row.worst_gradient_ulp:,.2f} ULP | "
            f"{row.lost_losses:,} | {row.lost_gradients:,} |"
        )
    results = {"torch": str(torch.__version__), "rows": [asdict(row) for row in table]}
    (options.output / "compare_numerics.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
