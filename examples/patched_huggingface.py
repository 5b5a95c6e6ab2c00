"""A Hugging Face ResNet for several labels under Trainer, as its users write it, through the fused loss.

    python examples/patched_huggingface.py

`problem_type="multi_label_classification"` makes the model compute `torch.nn.BCEWithLogitsLoss` itself, inside of its
forward pass, where no user can put another loss. `fused_sce.patch_torch()` can.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

from patched_training import LABELS, Training, pictures, run
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

BATCH = 16


class Pictures(Dataset[dict[str, Tensor]]):
    """Items as the model's arguments name them."""

    def __init__(self, count: int) -> None:
        self.pixels, self.labels = pictures(count)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


class Losses(TrainerCallback):
    """Keeps what Trainer logs."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by Trainer."""
        logs = kwargs["logs"]
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def train(steps: int) -> list[float]:
    """The loss of each step of a small ResNet."""
    config = ResNetConfig(  # type: ignore[call-arg]  # it passes what it does not name on to its base
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        num_labels=LABELS,
        problem_type="multi_label_classification",
    )
    losses = Losses()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        model = ResNetForImageClassification(config)
        Trainer(model, arguments, train_dataset=Pictures(BATCH * 8), callbacks=[losses]).train()
    return losses.losses


def main(arguments: list[str] | None = None) -> tuple[Training, Training]:
    """Train with torch's loss and with the fused one."""
    return run(train, arguments, (__doc__ or "").split("\n")[0])


if __name__ == "__main__":
    main(sys.argv[1:])
