"""Does changing the FC layer affect a PyTorch ResNet model's functionality?

    python examples/recipes/new_fc_layer.py

It changes what comes out, and nothing else: all other layers keep their weights. The number of outputs, dropout and the
initialisation are arguments of `fused_sce.replace_head`. The program trains several new layers on the same ResNet-18.

Three habits that do harm, and what they cost, measured:

* a softmax or sigmoid inside the model, under a loss that applies it again. The loss then cannot fall below a floor,
  however sure and right the model is. The models here return logits, as torchvision's ResNet does;
* dropout behind the last layer: a logit of 0 does not mean "no". Dropout belongs in front of it, on the features;
* an optimizer made before the layer was replaced. It goes on training the old one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import digits
import torch
from recipe_tools import backbone, fit, parse_options, predict, progress
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

import fused_sce

# By name: arguments of `replace_head`, the loss, and its targets as a function of the digits (N,) int64.
LAYERS: dict[str, tuple[dict[str, Any], nn.Module, Callable[[Tensor], Tensor]]] = {
    "10 classes": ({"num_classes": 10, "task": "multiclass"}, nn.CrossEntropyLoss(), lambda digit: digit),
    "1 logistic output": ({"num_classes": 1}, fused_sce.BCEWithLogitsLoss(), lambda digit: digit[:, None] % 2 == 0),
    "4 logistic outputs, dropout 0.5, Xavier": (
        {"num_classes": 4, "dropout": 0.5, "init": "xavier_uniform"},
        fused_sce.MultiLabelSoftMarginLoss(),
        digits.attributes,
    ),
}


@torch.no_grad()
def first_losses(features: Tensor, targets: Tensor) -> dict[str, float]:
    """The loss of logistic outputs (N, C) on features (N, F) before any training, by initialisation.

    Zeros give log 2 = 0.693, the loss of "I do not know"; what random weights add has to be unlearnt first.
    """
    losses = {}
    for init in ("kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform", "zeros", "default"):
        head = fused_sce.MultiLabelHead(features.shape[1], targets.shape[1], init=init)
        losses[init] = float(fused_sce.functional.sigmoid_cross_entropy(head(features), targets))
    return losses


def floors() -> dict[str, float]:
    """The lowest losses possible where the model applies an activation and the loss applies it again.

    The best output is the target itself, 1 and 0. A second softmax makes e / (e + n - 1) of the 1, for n classes; a
    second sigmoid 0.73, and 0.5 of a 0.
    """
    lowest = {}
    for num_classes in (3, 10, 1000):
        best = torch.eye(num_classes)
        lowest[f"softmax, {num_classes} classes"] = float(F.cross_entropy(best, best))
    for target in (0, 1):
        best = torch.tensor([[float(target)]])
        lowest[f"sigmoid, target {target}"] = float(fused_sce.functional.sigmoid_cross_entropy(best, best))
    return lowest


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
    options = parse_options(__doc__, argv, steps=16)
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
    first = first_losses(features, digits.attributes(test.digits))
    for what, table in (
        ("The first loss of four logistic outputs on the features of the ten-class model, by initialisation", first),
        ("An activation inside the model under a loss that applies it again; lowest loss possible", floors()),
        ("Dropout of 0.5 on the ten-class model; loss on tests", dropout_cost(ten.fc.cpu(), features, test.digits)),
    ):
        print(f"\n{what}:")
        for case, loss in table.items():
            print(f"  {case:22} {loss:.3f}")

    print("\nOne step of an optimizer made")
    few, few_digits = images[:64].to(options.device), train.digits[:64].to(options.device)
    for when, optimizer_first in (("before", True), ("after", False)):
        moved = head_moves(model, few, few_digits, optimizer_first=optimizer_first)
        print(f"  {when} the layer was replaced: the new layer {'changed' if moved else 'did NOT change'}")
    return curves


if __name__ == "__main__":
    main()
