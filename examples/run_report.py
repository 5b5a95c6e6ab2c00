"""What a training run leaves behind: metrics as JSON, and three pictures of them.

Times are in timing.json, so that two runs with the same seed write the same bytes into metrics.json.
"""

from __future__ import annotations

import io
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")  # draws into files: a training machine has no screen

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from label_file import UNKNOWN
from matplotlib.figure import Figure
from run_checkpoint import write_atomically
from sklearn.metrics import average_precision_score, precision_recall_curve
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from classifier import Classifier

REPORT = ("metrics.json", "timing.json", "curves.png", "precision_recall.png", "predictions.png")
# On the emoji of `make demo-emoji`, tuned thresholds of every label give a micro F1 of 0.06 on the test pictures and 28
# labels a picture: rare labels that are badly ranked are predicted on nearly everything. This least F1 of those that
# are tuned gives 0.21 and 1.8.
MIN_F1 = 0.3
# Pictures shown in predictions.png, and the characters that fit above one of them.
GRID_ROWS, GRID_COLUMNS = 4, 8
TITLE_WIDTH = 21
# More curves than this cannot be told apart by colour, and more rows not be taken in.
MAX_LABELS_SHOWN = 20
NAME_WIDTH = 30  # of a label, in tables and legends
DOTS_PER_INCH = 110


@dataclass(frozen=True)
class Evaluation:
    """A model on N pictures with L labels.

    `loss` is the mean over the known labels; `logits` (N, L) float32; `targets` (N, L) int8, 1, 0 or UNKNOWN.
    """

    loss: float
    logits: Tensor
    targets: Tensor

    def of_label(self, label: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
        """Truth and logit of the pictures for which `label` is known, (K,) each."""
        known = self.targets[:, label] != UNKNOWN
        return (self.targets[known, label] == 1).numpy(), self.logits[known, label].numpy()


@dataclass(frozen=True)
class EpochRecord:
    """One line of the table; `learning_rate` is of the epoch's last step, losses are means over the known labels."""

    epoch: int
    learning_rate: float
    train_loss: float
    validation_loss: float
    mean_average_precision: float
    seconds: float


TABLE_HEADER = "epoch  learning rate  train loss  validation loss     mAP  seconds"
TABLE_ROW = (
    "{epoch:>5}  {learning_rate:>13.2e}  {train_loss:>10.4f}  {validation_loss:>15.4f}"
    "  {mean_average_precision:>6.4f}  {seconds:>7.1f}"
)


@dataclass(frozen=True)
class LabelMetrics:
    """How well one label is predicted, over the `known` pictures whose value for it is known.

    It is predicted where its probability reaches `threshold`. Where no picture has the label, its average precision and
    recall are undefined: None.
    """

    label: str
    known: int
    positives: int
    threshold: float
    average_precision: float | None = None
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None


def label_metrics(evaluation: Evaluation, labels: Sequence[str], thresholds: Tensor) -> list[LabelMetrics]:
    """The metrics of every label; `thresholds` (L,) are logits."""
    metrics = []
    for index, (label, threshold) in enumerate(zip(labels, thresholds, strict=True)):
        truth, logits = evaluation.of_label(index)
        scores: list[float] = []
        if truth.any():
            predicted = logits >= threshold.numpy()
            # By hand: scikit-learn takes 3 ms a label.
            right, said, true = (int(which.sum()) for which in (truth & predicted, predicted, truth))
            # Logits, not probabilities: these round to 1, and equal scores would lose their order.
            scores = [float(average_precision_score(truth, logits))]
            scores += [right / max(said, 1), right / true, 2 * right / (said + true)]
        metrics.append(LabelMetrics(label, len(truth), int(truth.sum()), float(threshold.sigmoid()), *scores))
    return metrics


def mean_average_precision(metrics: Sequence[LabelMetrics]) -> float:
    """The mean over the labels that have an average precision; NaN if none has."""
    defined = [m.average_precision for m in metrics if m.average_precision is not None]
    return float(np.mean(defined)) if defined else math.nan


def base_rate(metrics: Sequence[LabelMetrics]) -> float:
    """The mean average precision of a random order: the mean share of positives, over the same labels."""
    return float(np.mean([m.positives / m.known for m in metrics if m.positives]))


def best_thresholds(evaluation: Evaluation) -> Tensor:
    """The logits at and above which predicting each label gives its highest F1, (L,); 0 where that is below MIN_F1."""
    thresholds = torch.zeros(evaluation.logits.shape[1])
    for index in range(len(thresholds)):
        truth, logits = evaluation.of_label(index)
        if truth.any():
            precision, recall, candidates = precision_recall_curve(truth, logits)
            # The curve's last point predicts nothing and has no candidate.
            f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
            best = f1[:-1].argmax()
            # Half way to the next lower logit, so that rounding does not decide.
            lower = np.append(candidates[0] - 1, candidates)
            if f1[best] >= MIN_F1:
                thresholds[index] = float(lower[best] + candidates[best]) / 2
    return thresholds


def shown(text: str, width: int = NAME_WIDTH) -> str:
    """`text` on one line of at most `width` characters."""
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[: width + 1])
    return line if len(line) <= width else line[: width - 1] + "…"


def label_table(metrics: Sequence[LabelMetrics]) -> str:
    """The metrics as lines of text, one per label; of many labels the most frequent ones."""
    table = pd.DataFrame([asdict(m) | {"label": shown(m.label)} for m in metrics])
    if len(table) > MAX_LABELS_SHOWN:
        table = table.nlargest(MAX_LABELS_SHOWN, "positives")
    scores = {name: table[name].astype(float) for name in ("average_precision", "precision", "recall", "f1")}
    table = table.assign(**scores).rename(columns={"average_precision": "AP"})
    lines = [table.to_string(index=False, na_rep="-", float_format="{:.3f}".format)]
    if len(table) < len(metrics):
        lines.append(f"and {len(metrics) - len(table)} more: see metrics.json")
    return "\n".join(lines)


def write_report(
    output: Path, classifier: Classifier, pictures: Dataset[tuple[Tensor, Tensor]], *, tuned: bool
) -> list[LabelMetrics]:
    """Write the report on the last evaluation, which was of `pictures`, into `output`; return the metrics.

    Labels are predicted by the `tuned` thresholds, or by a probability of one half. Raises OSError where the
    numbers cannot be written; a picture that cannot be drawn is a warning.
    """
    evaluation, history = classifier.evaluation, classifier.history
    assert evaluation is not None
    classifier.check_loss("test", evaluation.loss)
    thresholds = classifier.thresholds if tuned else torch.zeros(len(classifier.labels))
    metrics = label_metrics(evaluation, classifier.labels, thresholds)
    epochs = [asdict(record) for record in history]
    seconds = [epoch.pop("seconds") for epoch in epochs]
    results = {
        "mean_average_precision": mean_average_precision(metrics),
        "base_rate": base_rate(metrics),
        "test_loss": evaluation.loss,
        "labels": [asdict(m) for m in metrics],
        "epochs": epochs,
        "configuration": classifier.configuration,
        "weights_sha256": classifier.weights_sha256(),
    }
    timing = {"seconds": sum(seconds), "seconds_per_epoch": seconds}
    for name, content in {"metrics.json": results, "timing.json": timing}.items():
        # NaN is not JSON: better to fail here than in whoever reads the file.
        write_atomically(output / name, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
    _draw(output / "curves.png", lambda: _curves(history, classifier.configuration["--loss"]))
    _draw(output / "precision_recall.png", lambda: _precision_recall(evaluation, metrics))
    _draw(output / "predictions.png", lambda: _predictions(evaluation, classifier.labels, thresholds, pictures))
    return metrics


def _draw(file: Path, drawing: Callable[[], Figure]) -> None:
    """Write what `drawing` makes; names of labels are plain text there, and may have letters that the font lacks."""
    content = io.BytesIO()
    try:
        with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            drawing().savefig(content, dpi=DOTS_PER_INCH)
        write_atomically(file, content.getvalue())
    except Exception as error:  # the numbers are safe, and another picture may still succeed
        print(f"warning: {file} was not drawn: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        plt.close("all")


def _curves(history: Sequence[EpochRecord], loss: str) -> Figure:
    epochs = [record.epoch for record in history]
    figure, (losses, precisions) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    losses.plot(epochs, [record.train_loss for record in history], marker="o", label="train")
    losses.plot(epochs, [record.validation_loss for record in history], marker="o", label="validation")
    losses.set(xlabel="epoch", ylabel="loss per known label", title=f"Loss ({loss})")
    losses.set_ylim(bottom=0)
    losses.legend()
    precisions.plot(epochs, [record.mean_average_precision for record in history], marker="o", color="C1")
    precisions.set(xlabel="epoch", ylabel="mAP", title="Mean average precision, validation")
    precisions.set_ylim(0, 1.02)
    for axes in (losses, precisions):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _precision_recall(evaluation: Evaluation, metrics: Sequence[LabelMetrics]) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    # tab10's colours are easier to tell apart than tab20's, which come in pairs.
    colours = plt.get_cmap("tab10" if len(metrics) <= plt.get_cmap("tab10").N else "tab20")
    for index, m in enumerate(metrics):
        if m.average_precision is not None:
            precision, recall, _ = precision_recall_curve(*evaluation.of_label(index))
            # A legend leaves out what begins with "_": the number comes first.
            name = f"{m.average_precision:.3f} {shown(m.label)}"
            axes.step(recall, precision, where="post", color=colours(index % colours.N), label=name)
    if len(metrics) <= MAX_LABELS_SHOWN:
        figure.legend(title="average precision", loc="outside right upper", fontsize=8)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.01))
    axes.set_title(f"Precision and recall per label, mAP {mean_average_precision(metrics):.4f}")
    axes.grid(alpha=0.3)
    return figure


def _predictions(
    evaluation: Evaluation, labels: Sequence[str], thresholds: Tensor, pictures: Dataset[tuple[Tensor, Tensor]]
) -> Figure:
    count = min(GRID_ROWS * GRID_COLUMNS, len(evaluation.logits))
    rows = math.ceil(count / GRID_COLUMNS)
    size = (1.7 * GRID_COLUMNS, 2.1 * rows + 0.5)
    figure, grid = plt.subplots(rows, GRID_COLUMNS, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat:
        axes.axis("off")
    # All over the part: its beginning may be of one kind.
    for index, axes in zip(np.linspace(0, len(evaluation.logits) - 1, count, dtype=int), grid.flat, strict=False):
        picture, targets = pictures[index]
        logits = evaluation.logits[index]
        known, truth = targets != UNKNOWN, targets == 1
        predicted = (logits >= thresholds) & known
        # The likeliest first, so that they fit.
        order = logits.argsort(descending=True, stable=True).tolist()
        true, said = (", ".join(labels[label] for label in order if which[label]) for which in (truth, predicted))
        # Grey pictures have one channel; imshow wants them with none.
        axes.imshow(picture.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
        lines = [f"true {shown(true, TITLE_WIDTH) or 'none'}", f"said {shown(said, TITLE_WIDTH) or 'none'}"]
        if not known.all():
            lines.append(f"({int((~known).sum())} unknown)")
        axes.set_title("\n".join(lines), color="black" if predicted.equal(truth) else "red", fontsize=8)
    figure.suptitle("True and predicted labels, mistakes in red")
    return figure
