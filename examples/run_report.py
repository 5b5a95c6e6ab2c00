"""What a training run leaves behind: metrics as JSON, and pictures of them.

metrics.json           the configuration, every epoch, every label; no times, so that two runs
                       with the same seed write the same bytes
timing.json            seconds of each epoch
curves.png             loss and mean average precision over the epochs
precision_recall.png   precision over recall, one curve per label
predictions.png        test pictures with their true and predicted labels
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into files: a training machine has no screen

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from sklearn.metrics import (
    average_precision_score,
    precision_recall_curve,
    precision_recall_fscore_support,
)
from torch import Tensor
from torch.utils.data import Dataset

# A logit above 0 is a probability above one half: the label is predicted.
THRESHOLD = 0.0
# Pictures shown in predictions.png, and the labels whose names fit above one of them.
GRID_ROWS, GRID_COLUMNS = 4, 8
MAX_LABELS_IN_TITLE = 5
# More curves than this cannot be told apart by colour, so that a legend would not help.
MAX_LABELS_IN_LEGEND = 20
DOTS_PER_INCH = 110


@dataclass(frozen=True)
class Evaluation:
    """A model on N test pictures with L labels.

    `loss` is the mean over the known labels, in nats. `logits` (N, L) float32; `targets` (N, L)
    and `known` (N, L) float32, 0 or 1.
    """

    loss: float
    logits: Tensor
    targets: Tensor
    known: Tensor


@dataclass(frozen=True)
class EpochRecord:
    """One line of the table; `learning_rate` is the epoch's last, losses are in nats per label."""

    epoch: int
    learning_rate: float
    train_loss: float
    test_loss: float
    mean_average_precision: float
    seconds: float


@dataclass(frozen=True)
class LabelMetrics:
    """How well one label is told, over the `known` test pictures whose value for it is known.

    Where none of them has the label, its average precision and recall are undefined: None.
    """

    label: str
    known: int
    positives: int
    average_precision: float | None
    precision: float | None
    recall: float | None
    f1: float | None


def _known_of_label(evaluation: Evaluation, label: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """Truth and logit of the test pictures for which `label` is known, (K,) each."""
    known = evaluation.known[:, label].bool()
    truth = evaluation.targets[known, label].bool().numpy()
    return truth, evaluation.logits[known, label].numpy()


def label_metrics(evaluation: Evaluation, labels: Sequence[str]) -> list[LabelMetrics]:
    """The metrics of every label, each over the pictures for which it is known."""
    metrics = []
    for index, label in enumerate(labels):
        truth, logits = _known_of_label(evaluation, index)
        if not truth.any():
            metrics.append(LabelMetrics(label, len(truth), 0, None, None, None, None))
            continue
        # Logits, not probabilities: these round to 1, and equal scores would lose their order.
        average_precision = float(average_precision_score(truth, logits))
        precision, recall, f1, _ = precision_recall_fscore_support(
            truth, logits > THRESHOLD, average="binary", zero_division=0.0
        )
        metrics.append(
            LabelMetrics(
                label,
                len(truth),
                int(truth.sum()),
                average_precision,
                float(precision),
                float(recall),
                float(f1),
            )
        )
    return metrics


def mean_average_precision(metrics: Sequence[LabelMetrics]) -> float:
    """The mean over the labels that have an average precision; NaN if none has."""
    defined = [m.average_precision for m in metrics if m.average_precision is not None]
    return float(np.mean(defined)) if defined else math.nan


def label_table(metrics: Sequence[LabelMetrics]) -> str:
    """The metrics as lines of text, one per label."""
    width = max(len("label"), *(len(m.label) for m in metrics))
    lines = [f"{'label':<{width}}  known  positive     AP  precision  recall     F1"]
    for m in metrics:
        average_precision, precision, recall, f1 = (
            "-" if value is None else f"{value:.3f}" for value in (m.average_precision, m.precision, m.recall, m.f1)
        )
        lines.append(
            f"{m.label:<{width}}  {m.known:>5}  {m.positives:>8}  {average_precision:>5}"
            f"  {precision:>9}  {recall:>6}  {f1:>5}"
        )
    return "\n".join(lines)


def write_report(
    output: Path,
    *,
    configuration: Mapping[str, Any],
    weights_sha256: str,
    history: Sequence[EpochRecord],
    evaluation: Evaluation,
    labels: Sequence[str],
    pictures: Dataset[tuple[Tensor, Tensor, Tensor]],
) -> list[LabelMetrics]:
    """Write every file of the report into `output` and return the metrics of every label."""
    metrics = label_metrics(evaluation, labels)
    epochs = [asdict(record) for record in history]
    seconds = [epoch.pop("seconds") for epoch in epochs]
    _write_json(
        output / "metrics.json",
        {
            "mean_average_precision": mean_average_precision(metrics),
            "test_loss": evaluation.loss,
            "labels": [asdict(m) for m in metrics],
            "epochs": epochs,
            "configuration": dict(configuration),
            "weights_sha256": weights_sha256,
        },
    )
    _write_json(output / "timing.json", {"seconds": sum(seconds), "seconds_per_epoch": seconds})
    _draw_curves(output / "curves.png", history)
    _draw_precision_recall(output / "precision_recall.png", evaluation, metrics)
    _draw_predictions(output / "predictions.png", evaluation, labels, pictures)
    return metrics


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    # NaN is not JSON: better to fail here than in whoever reads the file.
    file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _draw_curves(file: Path, history: Sequence[EpochRecord]) -> None:
    epochs = [record.epoch for record in history]
    figure, (losses, precisions) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    losses.plot(epochs, [record.train_loss for record in history], marker="o", label="train")
    losses.plot(epochs, [record.test_loss for record in history], marker="o", label="test")
    losses.set(xlabel="epoch", ylabel="loss (nats per label)", title="Sigmoid cross-entropy")
    losses.set_ylim(bottom=0)
    losses.legend()
    precisions.plot(epochs, [record.mean_average_precision for record in history], marker="o", color="C1")
    precisions.set(xlabel="epoch", ylabel="mAP", title="Mean average precision, test")
    precisions.set_ylim(0, 1.02)
    for axes in (losses, precisions):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(file, dpi=DOTS_PER_INCH)
    plt.close(figure)


def _draw_precision_recall(file: Path, evaluation: Evaluation, metrics: Sequence[LabelMetrics]) -> None:
    figure, axes = plt.subplots(figsize=(7, 5.5), layout="constrained")
    # tab10's colours are easier to tell apart than tab20's, which come in pairs.
    colours = plt.get_cmap("tab10" if len(metrics) <= plt.get_cmap("tab10").N else "tab20")
    for index, m in enumerate(metrics):
        if m.average_precision is None:
            continue
        precision, recall, _ = precision_recall_curve(*_known_of_label(evaluation, index))
        axes.step(
            recall,
            precision,
            where="post",
            color=colours(index % colours.N),
            label=f"{m.label}: {m.average_precision:.3f}",
        )
    if len(metrics) <= MAX_LABELS_IN_LEGEND:
        axes.legend(title="average precision", loc="lower left", ncols=2)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.01))
    axes.set_title(f"Precision and recall per label, mAP {mean_average_precision(metrics):.4f}")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=DOTS_PER_INCH)
    plt.close(figure)


def _draw_predictions(
    file: Path,
    evaluation: Evaluation,
    labels: Sequence[str],
    pictures: Dataset[tuple[Tensor, Tensor, Tensor]],
) -> None:
    shown = min(GRID_ROWS * GRID_COLUMNS, len(evaluation.logits))
    rows = math.ceil(shown / GRID_COLUMNS)
    figure, grid = plt.subplots(
        rows,
        GRID_COLUMNS,
        figsize=(1.7 * GRID_COLUMNS, 2.1 * rows),
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat:
        axes.axis("off")
    for index, axes in zip(range(shown), grid.flat, strict=False):
        picture, targets, known = pictures[index]
        is_known = known.bool()
        truth = targets.bool() & is_known
        predicted = evaluation.logits[index] > THRESHOLD
        right = bool((predicted == truth)[is_known].all())
        # Grey pictures have one channel; imshow wants them with none.
        axes.imshow(picture.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
        unknown = "" if is_known.all() else f" ({int((~is_known).sum())} unknown)"
        axes.set_title(
            f"true {_names(truth, labels)}{unknown}\nsaid {_names(predicted & is_known, labels)}",
            color="black" if right else "red",
            fontsize=8,
        )
    figure.suptitle("Test pictures: true and predicted labels, mistakes in red")
    figure.savefig(file, dpi=DOTS_PER_INCH)
    plt.close(figure)


def _names(chosen: Tensor, labels: Sequence[str]) -> str:
    names = [label for label, is_chosen in zip(labels, chosen.tolist(), strict=True) if is_chosen]
    more = ["…"] if len(names) > MAX_LABELS_IN_TITLE else []
    return " ".join(names[:MAX_LABELS_IN_TITLE] + more) or "none"
