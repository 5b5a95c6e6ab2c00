"""Does changing the FC layer affect a PyTorch ResNet model's functionality?

    python examples/recipes/new_fc_layer.py

It changes what comes out, and nothing else: all other layers keep their weights. The number of outputs, dropout and the
initialisation are arguments of `fused_sce.replace_head`; the loss brings the activation. The program puts several new
layers on the same ResNet-18 and trains each for some steps.

Three habits that do harm, and what they cost, measured:

* a softmax or sigmoid inside the model, under a loss that applies it again. The loss then cannot fall below a floor,
  however sure and right the model is, and its gradient is squeezed. The models here return logits; torchvision's
  ResNet has no softmax to keep either;
* dropout behind the last layer. It wipes out logits, and a logit of 0 does not mean "no": dropout belongs on the
  features, in front of the layer;
* an optimizer made before the layer was replaced. It goes on training the old one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import digits
import torch
from recipe_tools import backbone, fit, predict, progress, resnet_options
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

import fused_sce


def is_even(digit: Tensor) -> Tensor:
    """(N,) int64 -> (N, 1) bool, the shape of the logits."""
    return (digit % 2 == 0).unsqueeze(1)


# By name: arguments of `replace_head`, the loss, and its targets as a function of the digits (N,) int64.
LAYERS: dict[str, tuple[dict[str, Any], nn.Module, Callable[[Tensor], Tensor]]] = {
    "10 classes": ({"num_classes": 10, "task": "multiclass"}, nn.CrossEntropyLoss(), lambda digit: digit),
    "1 logistic output": ({"num_classes": 1}, fused_sce.BCEWithLogitsLoss(), is_even),
    "4 logistic outputs, dropout 0.5, Xavier": (
        {"num_classes": 4, "dropout": 0.5, "init": "xavier_uniform"},
        fused_sce.MultiLabelSoftMarginLoss(),
        digits.attributes,
    ),
}
INITS = ("kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform", "zeros", "default")


@torch.no_grad()
def first_loss(features: Tensor, targets: Tensor, init: str) -> float:
    """The loss of logistic outputs (N, C) on features (N, F) before any training.

    Zeros give log 2 = 0.693 for each output, the loss of "I do not know". What random weights add is noise that
    training first has to take back.
    """
    head = fused_sce.MultiLabelHead(features.shape[1], targets.shape[1], init=init)
    return float(fused_sce.functional.sigmoid_cross_entropy(head(features), targets))


def floor_with_softmax_inside(num_classes: int) -> float:
    """The lowest loss that CrossEntropyLoss can reach on probabilities instead of logits.

    The best possible output is 1 for the right class and 0 for the others; a second softmax turns that into a
    probability of e / (e + n - 1) only.
    """
    right = torch.tensor([0])
    return float(F.cross_entropy(F.one_hot(right, num_classes).float(), right))


def floor_with_sigmoid_inside(target: float) -> float:
    """The same for a sigmoid cross-entropy: the second sigmoid sees 0 to 1 only, and makes 0.5 to 0.73 of it."""
    best = torch.tensor([[target]])
    return float(fused_sce.functional.binary_cross_entropy_with_logits(best, best))


@torch.no_grad()
def dropout_cost(fc: nn.Module, features: Tensor, digit: Tensor) -> dict[str, float]:
    """Cross-entropy of a trained ten-class layer on features (N, F), with dropout of 0.5 in different places."""
    return {
        "nowhere": float(F.cross_entropy(fc(features), digit)),
        "on the features": float(F.cross_entropy(fc(F.dropout(features, 0.5)), digit)),
        "on the logits": float(F.cross_entropy(F.dropout(fc(features), 0.5), digit)),
    }


def head_moves(model: models.ResNet, images: Tensor, digit: Tensor, *, optimizer_first: bool) -> bool:
    """Whether one training step changes a new head, with an optimizer made before or after it."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fused_sce.replace_head(model, 10, task="multiclass")
    if not optimizer_first:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.fc.weight.detach().clone()
    F.cross_entropy(model(images), digit).backward()
    optimizer.step()
    return not torch.equal(before, model.fc.weight)


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Run the recipe; returns the losses per step of each new layer."""
    options = resnet_options(__doc__, argv, steps=25)
    train, test = digits.load_scans(options.seed)
    images, test_images = digits.images(train.grey), digits.images(test.grey)
    model = models.resnet18(weights=options.weights).to(options.device)

    print(f"The model's own layer: {model.fc.in_features} features -> {model.fc.out_features}")
    print("A new layer (rest of the model unchanged), trained:")
    curves, trained = {}, {}
    for name, (layer, loss_function, targets) in LAYERS.items():
        new = trained[name] = fused_sce.replace_head(copy.deepcopy(model), **layer)
        losses = curves[name] = fit(new, loss_function, images, targets(train.digits), steps=options.steps)
        logits = predict(new, test_images)
        answers = logits.argmax(dim=1) if layer.get("task") == "multiclass" else logits > 0
        right = (answers == targets(test.digits)).float().mean()
        print(f"  {name:40} {progress(losses)}, right on tests {right:.3f}")

    ten = trained["10 classes"]
    features = predict(backbone(ten), test_images)
    print("\nThe first loss of four logistic outputs on the features of the ten-class model, by initialisation:")
    for init in INITS:
        print(f"  {init:16} {first_loss(features, digits.attributes(test.digits), init):.3f}")

    print("\nAn activation inside the model under a loss that applies it again; lowest loss possible:")
    for num_classes in (3, 10, 1000):
        print(f"  softmax, {num_classes:4} classes  {floor_with_softmax_inside(num_classes):.3f}")
    for target in (0.0, 1.0):
        print(f"  sigmoid, target {target:.0f}      {floor_with_sigmoid_inside(target):.3f}")

    print("\nDropout of 0.5 on the trained ten-class model, loss on the test pictures:")
    for place, cost in dropout_cost(ten.fc.cpu(), features, test.digits).items():
        print(f"  {place:16} {cost:.3f}")

    print("\nOne step of an optimizer made")
    few, few_digits = images[:64].to(options.device), train.digits[:64].to(options.device)
    for when, optimizer_first in (("before", True), ("after", False)):
        moved = head_moves(model, few, few_digits, optimizer_first=optimizer_first)
        print(f"  {when} the layer was replaced: the new layer {'changed' if moved else 'did NOT change'}")
    return curves


if __name__ == "__main__":
    main()
