"""A Hugging Face ResNet for several labels under Trainer, as its users write it, through the fused loss.

    python examples/patched_huggingface.py

`problem_type="multi_label_classification"` makes the model compute `torch.nn.BCEWithLogitsLoss` itself, inside of its
forward pass, where no user can put another loss. `fused_sce.patch_torch()` can.
"""

from __future__ import annotations

import tempfile

from patched_training import BATCH, LABELS, pictures, run
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments


def train(steps: int) -> list[float]:
    """The loss of each step of a small ResNet."""
    config = ResNetConfig(  # type: ignore[call-arg]  # it passes what it does not name on to its base
        embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1], layer_type="basic", num_labels=LABELS
    )
    config.problem_type = "multi_label_classification"
    images, labels = pictures(BATCH * 8)
    data = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
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
        )
        trainer = Trainer(ResNetForImageClassification(config), arguments, train_dataset=data)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    run(train, __doc__)
