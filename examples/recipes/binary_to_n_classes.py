"""How can a PyTorch binary transfer learning model be extended to handle multiple image classes?

    python examples/recipes/binary_to_n_classes.py

A binary ResNet-18 has one logistic output ("is it a three?"). To tell n classes apart (three, five,
eight) there are two ways, and the data decides which one is right:

* each picture shows exactly one of them: n outputs under a softmax, `torch.nn.CrossEntropyLoss`;
* a picture shows any number of them, none included: n logistic outputs, the fused sigmoid
  cross-entropy. The output that the binary model has is one of these already, and is kept.

Both losses read logits, and the model returns logits: no softmax, no sigmoid inside. Accuracy says
too little about n classes, so the program prints precision, recall and F1 of each, and the confusion
matrix (softmax) or one confusion matrix for each label (logistic outputs).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import digits
import numpy as np
import numpy.typing as npt
import torch
from recipe_tools import ends, fit, in_chunks, resnet_options
from sklearn.metrics import (
    confusion_matrix,
    multilabel_confusion_matrix,
    precision_recall_fscore_support,
)
from torch import Tensor, nn
from torchvision import models

import fused_sce

CLASSES = {"three": 3, "five": 5, "eight": 8}
# Pictures of two digits are composed of the classes and of this one, so that some show no class.
OTHER = 0
TRAIN_PAIRS, TEST_PAIRS = 1000, 300


@dataclass(frozen=True)
class ClassMetrics:
    """How well one class is told: `support` is the number of pictures that truly show it."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Result:
    """`losses` per step; `metrics` of each class; `confusion`, int64.

    `confusion` is (n, n), true class by predicted class, for a softmax; and (n, 2, 2), absent or
    present by predicted so, for logistic outputs. `truth` and `prediction` are what both are made
    of: (N,) class indices, or (N, n) of 0 and 1.
    """

    losses: list[float]
    metrics: list[ClassMetrics]
    confusion: npt.NDArray[np.int64]
    truth: npt.NDArray[np.int64]
    prediction: npt.NDArray[np.int64]


def to_softmax(binary: models.ResNet, num_classes: int) -> models.ResNet:
    """A copy of the binary model with `num_classes` outputs for a softmax, all of them new.

    The old output is of no use here: it says "three or not", where a softmax weighs the three
    against the five.
    """
    model: models.ResNet = fused_sce.replace_head(copy.deepcopy(binary), num_classes, task="multiclass")
    return model


def to_labels(binary: models.ResNet, num_classes: int) -> models.ResNet:
    """A copy of the binary model with `num_classes` logistic outputs, the first of them its own."""
    model: models.ResNet = fused_sce.replace_head(copy.deepcopy(binary), num_classes, task="multilabel")
    with torch.no_grad():
        model.fc.weight[0] = binary.fc.weight[0]
        model.fc.bias[0] = binary.fc.bias[0]
    return model


def class_metrics(
    truth: npt.NDArray[np.int64], prediction: npt.NDArray[np.int64], names: Sequence[str]
) -> tuple[list[ClassMetrics], npt.NDArray[np.int64]]:
    """Metrics of each class and the confusion, from (N,) class indices or (N, n) of 0 and 1."""
    if truth.ndim == 2 and len(names) == 1:
        # scikit-learn takes a single column for classes 0 and 1 and would report on class 0.
        truth, prediction, labels = truth.ravel(), prediction.ravel(), [1]
        matrix = multilabel_confusion_matrix
    else:
        labels = list(range(len(names)))  # named, so that a class that never occurs is kept
        matrix = confusion_matrix if truth.ndim == 1 else multilabel_confusion_matrix
    precision, recall, f1, support = precision_recall_fscore_support(
        # A class that was never predicted has no precision; it is counted as 0.
        truth,
        prediction,
        labels=labels,
        average=None,
        zero_division=0.0,
    )
    confusion: npt.NDArray[np.int64] = matrix(truth, prediction, labels=labels)
    metrics = [
        ClassMetrics(name, float(precision[i]), float(recall[i]), float(f1[i]), int(support[i]))
        for i, name in enumerate(names)
    ]
    return metrics, confusion


def train_and_test(
    model: models.ResNet,
    loss_function: nn.Module,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    names: Sequence[str],
    *,
    steps: int,
    seed: int,
    device: str,
) -> Result:
    """Train on (images, targets) and test on such a pair.

    images (N, 3, size, size) float32; targets (N,) int64 for a softmax, (N, n) bool for logistic
    outputs.
    """
    losses = fit(model.to(device), loss_function, *train, steps=steps, seed=seed)
    model.eval()
    logits = in_chunks(model, test[0], device)
    # The largest logit has the largest probability, and a logit above 0 a probability above 0.5.
    predicted = logits.argmax(dim=1) if test[1].ndim == 1 else logits > 0
    truth, prediction = test[1].long().numpy(), predicted.long().numpy()
    metrics, confusion = class_metrics(truth, prediction, names)
    return Result(losses, metrics, confusion, truth, prediction)


def print_result(title: str, result: Result) -> None:
    """The metrics of each class as a table, and the confusion below it."""
    first, last = ends(result.losses)
    print(f"{title}: loss {first:.3f} -> {last:.3f}")
    print(f"  {'':8} precision  recall     F1  support")
    for row in result.metrics:
        print(f"  {row.name:8} {row.precision:9.3f} {row.recall:7.3f} {row.f1:6.3f} {row.support:8}")
    if result.confusion.ndim == 2:
        print("  confusion (row: true class, column: predicted class)")
        for row, counts in zip(result.metrics, result.confusion.tolist(), strict=True):
            print(f"    {row.name:8}" + "".join(f"{count:6}" for count in counts))
    else:
        print("  confusion     right no  false yes   false no  right yes")
        for row, counts in zip(result.metrics, result.confusion.tolist(), strict=True):
            print(f"    {row.name:8}" + "".join(f"{n:11}" for pair in counts for n in pair))
    print()


def main(argv: Sequence[str] | None = None) -> tuple[Result, Result, Result]:
    """Run the recipe; returns the binary model's result, the softmax's, the logistic outputs'."""
    options = resnet_options(__doc__, argv, steps=40)
    scans, test_scans = digits.load_scans(options.seed)
    names, of_class = list(CLASSES), list(CLASSES.values())

    # One class per picture.
    single, test_single = scans.only(of_class), test_scans.only(of_class)
    images, test_images = digits.images(single.grey), digits.images(test_single.grey)
    one_hot = digits.shown(single.digits.unsqueeze(1), of_class)
    test_one_hot = digits.shown(test_single.digits.unsqueeze(1), of_class)

    # Any number of classes per picture.
    some = [*of_class, OTHER]
    grey, pair = digits.pairs(scans.only(some), TRAIN_PAIRS, options.seed)
    test_grey, test_pair = digits.pairs(test_scans.only(some), TEST_PAIRS, options.seed)

    binary = fused_sce.replace_head(
        models.resnet18(weights=models.ResNet18_Weights.DEFAULT if options.pretrained else None), 1
    )
    run = {"steps": options.steps, "seed": options.seed, "device": options.device}
    result = train_and_test(
        binary,
        fused_sce.BCEWithLogitsLoss(),
        (images, one_hot[:, :1]),
        (test_images, test_one_hot[:, :1]),
        names[:1],
        **run,
    )
    print_result('Binary model, "is it a three?"', result)

    softmax = train_and_test(
        to_softmax(binary, len(CLASSES)),
        nn.CrossEntropyLoss(),
        (images, one_hot.long().argmax(dim=1)),
        (test_images, test_one_hot.long().argmax(dim=1)),
        names,
        **run,
    )
    print_result("Softmax over three classes, one of them on each picture", softmax)

    labels = train_and_test(
        to_labels(binary, len(CLASSES)),
        fused_sce.MultiLabelSoftMarginLoss(),
        (digits.images(grey), digits.shown(pair, of_class)),
        (digits.images(test_grey), digits.shown(test_pair, of_class)),
        names,
        **run,
    )
    print_result("Three logistic outputs, two digits on each picture", labels)
    return result, softmax, labels


if __name__ == "__main__":
    main()
