"""A Lightning module with `torch.nn.MultiLabelSoftMarginLoss`, as its users write it, through the fused loss.

Run `python examples/patched_lightning.py`.
"""

from __future__ import annotations

import logging
import warnings

import lightning
import torch
from patched_training import BATCH, LABELS, pictures, run
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet


class Classifier(lightning.LightningModule):
    """A small ResNet with one logistic output per label."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=LABELS)
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
    trainer = lightning.Trainer(max_steps=steps, accelerator="cpu", barebones=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(module, loader)
    return module.losses


if __name__ == "__main__":
    run(train, __doc__)
