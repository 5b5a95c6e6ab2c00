"""A timm ResNet with timm's own BinaryCrossEntropy, as its users write it, through the fused loss.

    python examples/patched_timm.py

timm's loss smooths labels, sums over classes and calls `torch.nn.functional.binary_cross_entropy_with_logits`, which
`fused_sce.patch_torch()` replaces.
"""

from __future__ import annotations

import sys

import timm
import torch
from patched_training import LABELS, Training, pictures, run
from timm.loss.binary_cross_entropy import BinaryCrossEntropy

BATCH = 16


def train(steps: int) -> list[float]:
    """The loss of each step."""
    model = timm.create_model("resnet10t", pretrained=False, num_classes=LABELS)
    criterion = BinaryCrossEntropy(smoothing=0.1, sum_classes=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = pictures(BATCH * 8)
    losses = []
    for step in range(steps):
        batch = torch.arange(step * BATCH, (step + 1) * BATCH) % len(images)
        loss = criterion(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(arguments: list[str] | None = None) -> tuple[Training, Training]:
    """Train with torch's loss and with the fused one."""
    return run(train, arguments, (__doc__ or "").split("\n")[0])


if __name__ == "__main__":
    main(sys.argv[1:])
