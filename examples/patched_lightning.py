"""A Lightning module with `torch.nn.MultiLabelSoftMarginLoss`, as its users write it, through the fused loss.

python examples/patched_lightning.py
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings

import lightning
import torch
import torchvision
from patched_training import LABELS, Training, pictures, run
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCH = 16


class Classifier(lightning.LightningModule):
    """A ResNet-18 with one logistic output per label."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torchvision.models.resnet18(weights=None, num_classes=LABELS)
        self.criterion = nn.MultiLabelSoftMarginLoss()
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        loss: Tensor = self.criterion(self.model(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(steps: int) -> list[float]:
    """The loss of each step."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Classifier()
    loader = DataLoader(TensorDataset(*pictures(BATCH * 8)), batch_size=BATCH)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        ).fit(module, loader)
    return module.losses


def main(arguments: list[str] | None = None) -> tuple[Training, Training]:
    """Train with torch's loss and with the fused one."""
    return run(train, arguments, (__doc__ or "").split("\n")[0])


if __name__ == "__main__":
    main(sys.argv[1:])
