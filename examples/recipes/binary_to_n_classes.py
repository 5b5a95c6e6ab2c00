"""How can a PyTorch binary transfer learning model be extended to handle multiple image classes?

    python examples/recipes/binary_to_n_classes.py

A binary ResNet-18 has one logistic output ("is it a three?"). To tell n classes apart (three, five, eight) there are
two ways, and the data decides which one is right:

* each picture shows exactly one of them: n outputs under a softmax, `torch.nn.CrossEntropyLoss`;
* a picture shows any number of them, none included: n logistic outputs, the fused sigmoid cross-entropy. The output
  that the binary model has is one of these already, and is kept.

Both losses read logits, and the model returns logits. Accuracy says too little about n classes, so the program prints
precision, recall and F1 of each, and the confusion matrix (softmax) or one for each label (logistic outputs).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import digits
import torch
from recipe_tools import fit, parse_options, predict, progress
from sklearn.metrics import classification_report, confusion_matrix, multilabel_confusion_matrix
from torch import Tensor, nn
from torchvision import models

import fused_sce

CLASSES = {"three": 3, "five": 5, "eight": 8}
OTHER = 0  # pictures of two digits are composed of the classes and of this one, so that some show no class
TRAIN_PAIRS, TEST_PAIRS = 1000, 300

Data = tuple[Tensor, Tensor]  # images (N, 3, size, size), and targets: (N,) class indices or (N, n) bool
Result = tuple[list[float], Tensor, Tensor]  # the loss of each step; truth and answers on tests


def to_labels(binary: models.ResNet, num_classes: int) -> models.ResNet:
    """A copy of the binary model with `num_classes` logistic outputs, the first of them its own."""
    model: models.ResNet = fused_sce.replace_head(copy.deepcopy(binary), num_classes, task="multilabel")
    with torch.no_grad():
        model.fc.weight[0] = binary.fc.weight[0]
        model.fc.bias[0] = binary.fc.bias[0]
    return model


def one_class(scans: digits.Scans) -> Data:
    """Pictures of one of `CLASSES` each, and which one (N,) int64."""
    scans = scans.only(list(CLASSES.values()))
    shown = digits.shown(scans.digits.unsqueeze(1), list(CLASSES.values()))
    return digits.images(scans.grey), shown.long().argmax(dim=1)


def any_classes(scans: digits.Scans, count: int, seed: int) -> Data:
    """`count` pictures of two digits, and which of `CLASSES` they show (count, n) bool."""
    grey, pair = digits.pairs(scans.only([*CLASSES.values(), OTHER]), count, seed)
    return digits.images(grey), digits.shown(pair, list(CLASSES.values()))


def report(truth: Tensor, answers: Tensor, names: Sequence[str]) -> str:
    """Precision, recall, F1 and confusion of each name, as text, from (N,) class indices or (N, n) bool."""
    indices = range(len(names))  # given, so that a class that never occurs is listed too
    # A class that was never answered has no precision; 0 is printed.
    text: str = classification_report(truth, answers, labels=indices, target_names=names, zero_division=0.0)
    if truth.ndim == 1:
        text += "\nconfusion (row: true class, column: answer)"
        rows = confusion_matrix(truth, answers, labels=indices)
    else:
        text += "\nconfusion     right no  false yes   false no  right yes"
        rows = multilabel_confusion_matrix(truth, answers).reshape(-1, 4)
    for name, counts in zip(names, rows, strict=True):
        text += f"\n{name:>11}" + "".join(f"{number:11}" for number in counts)
    return text + "\n"


def train_and_test(model: nn.Module, loss: nn.Module, train: Data, test: Data, names: list[str], steps: int) -> Result:
    """Train on one pair of images and targets, and print how the model does on the other."""
    losses = fit(model, loss, *train, steps=steps)
    logits = predict(model, test[0])
    # The largest logit has the largest probability, and a logit above 0 a probability above 0.5.
    answers = logits.argmax(dim=1) if test[1].ndim == 1 else logits > 0
    # One output answers one question: two classes, no and yes.
    truth, answers = test[1].squeeze(-1), answers.squeeze(-1)
    print(f"{progress(losses)}\n{report(truth, answers, names)}")
    return losses, truth, answers


def main(argv: Sequence[str] | None = None) -> tuple[Result, Result, Result]:
    """Run the recipe; returns the results of the binary model, the softmax and the logistic outputs."""
    options = parse_options(__doc__, argv, steps=23)
    scans, test_scans = digits.load_scans(options.seed)
    single, test_single = one_class(scans), one_class(test_scans)

    print('Binary model, "is it a three?":', end=" ")
    binary = fused_sce.replace_head(models.resnet18(weights=options.weights), 1).to(options.device)
    threes, test_threes = ((images, classes[:, None] == 0) for images, classes in (single, test_single))
    loss: nn.Module = fused_sce.BCEWithLogitsLoss()
    yes_or_no = train_and_test(binary, loss, threes, test_threes, ["other", "three"], options.steps)

    print("Softmax over three classes, one of them on each picture:", end=" ")
    # All outputs are new: the old one says "three or not", where a softmax weighs the three against the five.
    model = fused_sce.replace_head(copy.deepcopy(binary), len(CLASSES), task="multiclass")
    softmax = train_and_test(model, nn.CrossEntropyLoss(), single, test_single, list(CLASSES), options.steps)

    print("Three logistic outputs, two digits on each picture:", end=" ")
    model = to_labels(binary, len(CLASSES))
    pairs = any_classes(scans, TRAIN_PAIRS, options.seed)
    test_pairs = any_classes(test_scans, TEST_PAIRS, options.seed)
    loss = fused_sce.MultiLabelSoftMarginLoss()
    labels = train_and_test(model, loss, pairs, test_pairs, list(CLASSES), options.steps)
    return yes_or_no, softmax, labels


if __name__ == "__main__":
    main()
