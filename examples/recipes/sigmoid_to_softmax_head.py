"""How can a PyTorch ResNet head be modified from a sigmoid to a softmax activation?

    python examples/recipes/sigmoid_to_softmax_head.py

Three things change together: the number of outputs, the activation, and the loss.

    head      outputs                  probabilities                   loss, on logits
    sigmoid   one per label, >= 1      independent, sum to anything    sigmoid cross-entropy
    softmax   one per class, >= 2      sum to one                      torch.nn.CrossEntropyLoss

The model returns logits: both losses apply the activation themselves, stably. Apply it where a person asks for
probabilities.

The program trains one ResNet-18 with a sigmoid head (four attributes of a digit), then with a softmax head (the ten
digits), then with a sigmoid head again; the backbone is kept each time. It also shows why a softmax over one output is
useless, and how one sigmoid output becomes a softmax over two, and back, without training.
"""

from __future__ import annotations

from collections.abc import Sequence

import digits
import torch
from recipe_tools import fit, parse_options, predict, progress
from torch import Tensor, nn
from torchvision import models

import fused_sce


def predict_proba(model: nn.Module, images: Tensor, task: str) -> Tensor:
    """Probabilities (N, outputs) of a model that returns logits, for images (N, 3, height, width)."""
    logits = predict(model, images)
    return logits.sigmoid() if task == "multilabel" else logits.softmax(dim=1)


def accuracy(probabilities: Tensor, truth: Tensor) -> tuple[float, float]:
    """The share of right answers, and that of always the most frequent; `truth` (N, outputs) bool or (N,) int64."""
    answers = probabilities > 0.5 if truth.dtype == torch.bool else probabilities.argmax(dim=1)
    most_frequent = truth.long().mode(dim=0).values
    return float((answers == truth).float().mean()), float((most_frequent == truth).float().mean())


def softmax_over_one_output(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What a softmax makes of one output per picture: probabilities and gradient, both (N, 1).

    Every probability is exp(x) / exp(x) = 1, so that the loss is log 1 = 0 and its gradient is 0.
    """
    logits = logits.detach().clone().requires_grad_()
    loss = nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
    (gradient,) = torch.autograd.grad(loss, logits)
    return logits.detach().softmax(dim=1), gradient


@torch.no_grad()
def softmax_from_sigmoid(head: nn.Linear) -> fused_sce.MultiClassHead:
    """The two-class softmax head ("no", "yes") that says the same: softmax(0, x) = (1 - sigmoid(x), sigmoid(x))."""
    if head.out_features != 1:
        raise ValueError(f"a head with one output is needed, got {head.out_features}")
    new = fused_sce.MultiClassHead(head.in_features, 2, init="zeros").to(head.weight.device)
    new.weight[1] = head.weight[0]
    new.bias[1] = 0.0 if head.bias is None else head.bias[0]
    return new


@torch.no_grad()
def sigmoid_from_softmax(head: nn.Linear) -> fused_sce.MultiLabelHead:
    """The sigmoid head with one output that says the same as two classes: softmax(a, b)[1] = sigmoid(b - a)."""
    if head.out_features != 2:
        raise ValueError(f"a head with two outputs is needed, got {head.out_features}")
    new = fused_sce.MultiLabelHead(head.in_features, 1, init="zeros").to(head.weight.device)
    new.weight[0] = head.weight[1] - head.weight[0]
    new.bias[0] = 0.0 if head.bias is None else head.bias[1] - head.bias[0]
    return new


def main(argv: Sequence[str] | None = None) -> list[tuple[list[float], Tensor, float, float]]:
    """Run the recipe; returns losses, probabilities on tests and `accuracy` of each of the three trainings."""
    options = parse_options(__doc__, argv, steps=20)
    train, test = digits.load_scans(options.seed)
    images, test_images = digits.images(train.grey), digits.images(test.grey)
    model = models.resnet18(weights=options.weights).to(options.device)

    # bool targets: the fused loss reads them as they are, torch's own would refuse them.
    four, test_four = digits.attributes(train.digits), digits.attributes(test.digits)
    labels = (4, "multilabel", four, test_four, fused_sce.SigmoidCrossEntropyLoss())
    classes = (10, "multiclass", train.digits, test.digits, nn.CrossEntropyLoss())
    results = []
    for outputs, task, targets, truth, loss_function in (labels, classes, labels):
        fused_sce.replace_head(model, outputs, task=task)
        losses = fit(model, loss_function, images, targets, steps=options.steps)
        probabilities = predict_proba(model, test_images, task)
        right, guess = accuracy(probabilities, truth)
        results.append((losses, probabilities, right, guess))
        sums = probabilities.sum(dim=1)
        print(f"{task}: {progress(losses)}, right on tests {right:.3f} (guessing: {guess:.3f})")
        print(f"  probabilities of a picture sum to {sums.min():.2f} to {sums.max():.2f}")

    logits = torch.tensor([[-3.0], [0.0], [5.0]])
    probabilities, gradient = softmax_over_one_output(logits)
    print("\nA softmax over one output, for the logits", logits.flatten().tolist())
    print("  probabilities:", probabilities.flatten().tolist(), "whatever the picture")
    print("  gradient:     ", gradient.abs().flatten().tolist(), "so that it never learns")

    print("\nProbabilities of one sigmoid output, the same as a softmax over two, and back, without training")
    sigmoid = fused_sce.MultiLabelHead(512, 1)
    softmax = softmax_from_sigmoid(sigmoid)
    features = torch.randn(3, 512)
    for head in (sigmoid, softmax, sigmoid_from_softmax(softmax)):
        print("  ", [[round(p, 6) for p in row] for row in head.predict_proba(features).tolist()])
    return results


if __name__ == "__main__":
    main()
