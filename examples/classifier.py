"""A torchvision model with one independent logistic output per label, and how Lightning trains and tests it."""

from __future__ import annotations

import argparse
import contextlib
import copy
import difflib
import functools
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torchvision
from label_file import UNKNOWN
from pictures import WHITE, WHITES
from run_checkpoint import CheckpointError
from run_report import TABLE_ROW, EpochRecord, Evaluation, best_thresholds, label_metrics, mean_average_precision
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fused_sce

WEIGHT_DECAY = 0.05
# Statistics of ImageNet's pixels, red, green and blue: pretrained weights expect them taken out.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


class UsageError(Exception):
    """The options, or what they name, cannot be used; the message names the option."""


def number(kind: type[int] | type[float], low: float, high: float = math.inf) -> Callable[[str], float]:
    """A parser of option values that takes numbers of `kind` of at least `low` and below `high`."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= kind(text) < high:
                return kind(text)
        limits = f"of at least {low}" + (f" and below {high}" if high < math.inf else "")
        raise argparse.ArgumentTypeError(f"must be a {'whole ' * (kind is int)}number {limits}, got {text!r}")

    return parse


def check_arch(arch: str) -> None:
    """Raise UsageError if torchvision has no such classifier."""
    known_archs = torchvision.models.list_models(module=torchvision.models)
    if arch not in known_archs:
        near = difflib.get_close_matches(arch, known_archs)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"--arch: torchvision has no classifier {arch!r}{hint}")


def open_device(name: str) -> torch.device:
    """The device `name`; raises UsageError if it is neither the CPU nor a GPU that is there."""
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise UsageError(f"--device {name!r} cannot be used: must be cpu, cuda, cuda:1, …")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def environment(device: torch.device) -> dict[str, Any]:
    """What may change between two runs of the same configuration at the price of some bits."""
    return {"device": device.type, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}


# Each loss takes logits (B, L) float32, targets (B, L) int8 (1, 0 or UNKNOWN) and pos_weight (L,) or None. It returns
# the sum over the known labels: a mean by torch would count an unknown one as perfectly predicted.


def naive_loss(logits: Tensor, targets: Tensor, pos_weight: Tensor | None) -> Tensor:
    """A sigmoid, then `torch.nn.BCELoss`: no gradient is left once the sigmoid rounds to 0 or 1."""
    weight = (targets != UNKNOWN).to(logits)
    if pos_weight is not None:
        weight = weight * torch.where(targets == 1, pos_weight, 1.0)
    return F.binary_cross_entropy(logits.sigmoid(), targets.clamp(min=0).to(logits), weight, reduction="sum")


def torch_loss(logits: Tensor, targets: Tensor, pos_weight: Tensor | None) -> Tensor:
    """`torch.nn.BCEWithLogitsLoss`: the gradient of a label that is set is 0 from logit 17 on."""
    known, truth = (targets != UNKNOWN).to(logits), targets.clamp(min=0).to(logits)
    return F.binary_cross_entropy_with_logits(logits, truth, known, reduction="sum", pos_weight=pos_weight)


# fused_sce's take loss and gradient in one pass, right for every logit; their options are the defaults.
OURS: dict[str, Any] = {"ignore_value": UNKNOWN, "reduction": "sum"}
LOSSES: dict[str, Callable[..., Tensor]] = {
    "fused": functools.partial(fused_sce.functional.sigmoid_cross_entropy, **OURS),
    "naive": naive_loss,
    "torch": torch_loss,
    "focal": functools.partial(fused_sce.functional.sigmoid_focal_loss, **OURS),
    "asymmetric": functools.partial(fused_sce.functional.asymmetric_loss, **OURS),
}


def build_model(configuration: Mapping[str, Any], label_count: int, *, initial: bool) -> nn.Module:
    """A torchvision model whose head gives one logit per label; not `initial`: it gets the weights of a checkpoint.

    Raises:
        UsageError: Its weights cannot be had, or it cannot take the pictures.
    """
    arch, image_size, pretrained = (configuration[f"--{name}"] for name in ("arch", "image-size", "pretrained"))
    try:
        weights = "DEFAULT" if pretrained and initial else None
        model: nn.Module = torchvision.models.get_model(arch, weights=weights)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"--pretrained: no weights for {arch}: {error}") from error
    if hasattr(model, "aux_logits"):
        # GoogLeNet and Inception: batch norm has made their auxiliary heads unnecessary, and what their pretrained
        # weights expect of the input depends on this attribute.
        heads = {"aux1", "aux2", "AuxLogits"} & dict(model.named_children()).keys()
        for name, value in {"aux_logits": False, "transform_input": pretrained, **dict.fromkeys(heads)}.items():
            setattr(model, name, value)
    try:
        model = fused_sce.replace_head(model, label_count)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UsageError(f"--arch {arch}: {error}") from error
    try:  # a copy on two pictures: many have a minimal size, some only one size
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copy.deepcopy(model).train()(torch.zeros(2, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UsageError(f"--arch {arch} cannot take pictures of --image-size {image_size}: {error}") from error
    # The layout in which convolutions are fastest, those of a ResNet-18 on 48x48 pixels on a CPU by up to 1.4 times.
    return model.to(memory_format=torch.channels_last)


class Classifier(lightning.LightningModule):
    """The model in training; a batch is pictures (B, 1 or 3, S, S) uint8 and targets (B, L) int8: 1, 0 or UNKNOWN.

    `evaluation` is the last one, `history` has every epoch, `thresholds` (L,) are the logits at and above which a label
    is predicted. After every epoch a checkpoint goes to `checkpoint_file`.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    pos_weight: Tensor | None

    def __init__(
        self,
        configuration: Mapping[str, Any],
        labels: Sequence[str],
        *,
        initial: bool = True,
        pos_weight: Tensor | None = None,
        checkpoint_file: Path = Path("checkpoint.pt"),
    ) -> None:
        super().__init__()
        torch.manual_seed(configuration["--seed"])
        self.model = build_model(configuration, len(labels), initial=initial)
        self.configuration, self.labels, self.checkpoint_file = configuration, labels, checkpoint_file
        for name, value in {"pixel_mean": PIXEL_MEAN, "pixel_std": PIXEL_STD}.items():
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)
        self.register_buffer("pos_weight", pos_weight, persistent=False)
        self.thresholds = torch.zeros(len(labels))
        self.history: list[EpochRecord] = []
        self.evaluation: Evaluation | None = None
        self._train_sums = torch.zeros(2, dtype=torch.float64)
        self.bar = tqdm(disable=True)

    @classmethod
    def trained(cls, checkpoint: Mapping[str, Any], file: Path, **further: Any) -> Classifier:
        """The classifier of a checkpoint; CheckpointError if its parts do not fit."""
        try:
            configuration = checkpoint["configuration"]
            if configuration[WHITE] not in WHITES:
                raise ValueError(f"{WHITE} must be one of {WHITES}, got {configuration[WHITE]}")
            classifier = cls(configuration, checkpoint["labels"], initial=False, **further)
            classifier.load_state_dict(checkpoint["state_dict"])
            classifier.on_load_checkpoint(checkpoint)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, UsageError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise CheckpointError(f"{file}: its parts do not fit together: {reason}") from error
        return classifier

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures to logits (B, L)."""
        pixels = pictures.float().div_(255).expand(-1, 3, -1, -1)
        pixels = (pixels - self.pixel_mean) / self.pixel_std
        logits: Tensor = self.model(pixels.contiguous(memory_format=torch.channels_last))
        return logits

    def loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The sum of the loss over the known labels, and their number, (2,)."""
        loss = LOSSES[self.configuration["--loss"]](logits, targets, pos_weight=self.pos_weight)
        return torch.stack([loss, (targets != UNKNOWN).sum().to(loss)])

    def configure_optimizers(self) -> Any:
        """AdamW; its learning rate rises and falls once, with torch's share of warm-up."""
        rate = self.configuration["--learning-rate"]
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        """Begin the sums of the epoch, its random numbers and its progress bar."""
        # Dropout's are a function of seed and epoch: a resumed run draws those of one that was not interrupted.
        words = np.random.SeedSequence([self.configuration["--seed"], self.current_epoch]).generate_state(1)
        torch.manual_seed(int(words[0]))
        self._start = time.perf_counter()
        # In float64 and on the device: exact enough to compare runs, and no step waits for it.
        self._train_sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        batches = int(self.trainer.num_training_batches + sum(self.trainer.num_val_batches))
        self.bar = tqdm(desc=f"epoch {self.current_epoch + 1}", total=batches, unit="batch", leave=False, disable=None)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The mean loss over the known labels of a batch; 0 if there are none."""
        pictures, targets = batch
        sums = self.loss_of(self(pictures), targets)
        self._train_sums += sums.detach()
        self.bar.update()
        return sums[0] / sums[1].clamp(min=1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the learning rate of the step: the scheduler moves on before the epoch ends."""
        self._learning_rate = optimizer.param_groups[0]["lr"]

    def on_validation_epoch_start(self) -> None:
        """Begin an evaluation."""
        self._validation_sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._batches: list[tuple[Tensor, Tensor]] = []

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Keep the logits of a batch, and add its loss."""
        pictures, targets = batch
        logits = self(pictures)
        self._validation_sums += self.loss_of(logits, targets)
        self.bar.update()
        self._batches.append((logits.cpu(), targets.cpu()))

    def on_validation_epoch_end(self) -> None:
        """Put the batches together."""
        logits, targets = (torch.cat(parts) for parts in zip(*self._batches, strict=True))
        self.evaluation = Evaluation(float(self._validation_sums[0] / self._validation_sums[1]), logits, targets)

    def check_loss(self, name: str, loss: float) -> None:
        """Stop the run where a loss is not finite; the last checkpoint stays as it is."""
        if not math.isfinite(loss):
            raise SystemExit(
                f"the {name} loss is no longer finite in epoch {self.current_epoch + 1}: {loss}; try a smaller "
                f"--learning-rate than {self.configuration['--learning-rate']:g}"
            )

    def on_train_epoch_end(self) -> None:
        """Record the epoch, of which the validation is part, save it and print its row."""
        self.bar.close()
        assert self.evaluation is not None
        train_loss = float(self._train_sums[0] / self._train_sums[1])
        self.check_loss("train", train_loss)
        self.check_loss("validation", self.evaluation.loss)
        metrics = label_metrics(self.evaluation, self.labels, torch.zeros(len(self.labels)))
        record = EpochRecord(
            epoch=self.current_epoch + 1,
            learning_rate=self._learning_rate,
            train_loss=train_loss,
            validation_loss=self.evaluation.loss,
            mean_average_precision=mean_average_precision(metrics),
            seconds=time.perf_counter() - self._start,
        )
        self.history.append(record)
        self.thresholds = best_thresholds(self.evaluation)
        self.trainer.save_checkpoint(self.checkpoint_file)
        print(TABLE_ROW.format(**asdict(record)), flush=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `predict` needs, and the history."""
        checkpoint |= {
            "configuration": dict(self.configuration),
            "environment": environment(self.device),
            "labels": list(self.labels),
            "thresholds": self.thresholds,
            "history": [asdict(record) for record in self.history],
        }

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Take them back."""
        self.thresholds = checkpoint["thresholds"].reshape(len(self.labels))
        self.history = [EpochRecord(**record) for record in checkpoint["history"]]

    def weights_sha256(self) -> str:
        """One number for all weights and buffers: equal only if every bit of them is."""
        values = (value.cpu().numpy().tobytes() for value in self.model.state_dict().values())
        return hashlib.sha256(b"".join(values)).hexdigest()
