"""A timm ResNet with timm's own BinaryCrossEntropy, as its users write it, through the fused loss.

    python examples/patched_timm.py

timm's loss smooths labels, sums over classes and calls `torch.nn.functional.binary_cross_entropy_with_logits`, which
`fused_sce.patch_torch()` replaces.
"""

from __future__ import annotations

import timm
import torch
from patched_training import BATCH, LABELS, pictures, run
from timm.loss.binary_cross_entropy import BinaryCrossEntropy


def train(steps: int) -> list[float]:
    """The loss of each step; the same batch each time."""
    model = timm.create_model("test_resnet", pretrained=False, num_classes=LABELS)
    criterion = BinaryCrossEntropy(smoothing=0.1, sum_classes=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = pictures(BATCH)
    losses = []
    for _ in range(steps):
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    run(train, __doc__)
