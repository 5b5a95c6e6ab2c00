"""Does changing the FC layer affect a PyTorch ResNet model's functionality?

    python examples/recipes/new_fc_layer.py

It changes what comes out, and nothing else: all other layers keep their weights. Each part of the
new layer is one argument of `fused_sce.replace_head`: the number of outputs, the activation (by
`task`), dropout and the initialisation. The program puts several new layers on the same ResNet-18
and trains each for some steps.

Three habits that do harm, and what they cost, measured:

* a softmax or sigmoid inside the model, under a loss that applies it again. The loss then cannot
  fall below a floor, however sure and right the model is, and its gradient is squeezed. (Under a
  loss that reads probabilities, the gradient of confident mistakes is lost: `finetune_resnet50.py`
  measures it.) The models here return logits; torchvision's ResNet has no softmax to keep either;
* dropout behind the last layer. It wipes out logits, and a logit of 0 does not mean "no": dropout
  belongs on the features, in front of the layer;
* an optimizer made before the layer was replaced. It goes on training the old one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import digits
import torch
from recipe_tools import ends, fit, in_chunks, resnet_options
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

import fused_sce


@dataclass(frozen=True)
class NewLayer:
    """A new last layer and what it is trained for.

    `loss_function` takes logits (N, num_classes) and targets, which `targets` makes of the digits
    (N,) int64.
    """

    name: str
    num_classes: int
    task: str
    loss_function: Callable[[Tensor, Tensor], Tensor]
    targets: Callable[[Tensor], Tensor]
    dropout: float = 0.0
    init: str = "kaiming_normal"


def _is_even(digit: Tensor) -> Tensor:
    return (digit % 2 == 0).unsqueeze(1)  # (N, 1), the shape of the logits


LAYERS = (
    NewLayer("10 classes", 10, "multiclass", nn.CrossEntropyLoss(), lambda digit: digit),
    NewLayer("1 logistic output", 1, "multilabel", fused_sce.BCEWithLogitsLoss(), _is_even),
    NewLayer(
        "4 logistic outputs, dropout 0.5, Xavier",
        len(digits.ATTRIBUTES),
        "multilabel",
        fused_sce.MultiLabelSoftMarginLoss(),
        digits.attributes,
        dropout=0.5,
        init="xavier_uniform",
    ),
)

INITS = ("kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform", "zeros", "default")


def with_layer(model: models.ResNet, layer: NewLayer) -> models.ResNet:
    """A copy of `model` that ends in `layer`; `model` itself, its head included, stays as it is."""
    new: models.ResNet = fused_sce.replace_head(
        copy.deepcopy(model),
        layer.num_classes,
        task=layer.task,
        dropout=layer.dropout,
        init=layer.init,
    )
    return new


def first_losses(model: models.ResNet, images: Tensor, digit: Tensor) -> dict[str, float]:
    """The loss of four logistic outputs before any training, for each initialisation.

    Zeros give log 2 = 0.693 for each output, the loss of "I do not know". What random weights add
    is noise that training first has to take back.
    """
    losses = {}
    backbone = nn.Sequential(*list(model.children())[:-1], nn.Flatten()).train()
    with torch.no_grad():
        features = backbone(images)  # (N, 512)
    for init in INITS:
        head = fused_sce.MultiLabelHead(features.shape[1], len(digits.ATTRIBUTES), init=init)
        with torch.no_grad():
            logits = head.to(features.device)(features)
            loss = fused_sce.functional.sigmoid_cross_entropy(logits, digits.attributes(digit))
        losses[init] = float(loss)
    return losses


def floor_with_softmax_inside(num_classes: int) -> float:
    """The lowest loss that CrossEntropyLoss can reach on probabilities instead of logits.

    The best possible output is 1 for the right class and 0 for the others; a second softmax turns
    that into a probability of e / (e + n - 1) only.
    """
    right = torch.tensor([0])
    return float(F.cross_entropy(F.one_hot(right, num_classes).float(), right))


def floor_with_sigmoid_inside(target: float) -> float:
    """The lowest loss that a sigmoid cross-entropy on logits can reach on probabilities.

    The second sigmoid sees 0 to 1 only, and makes 0.5 to 0.73 of it.
    """
    best = torch.tensor([[target]])
    return float(fused_sce.functional.binary_cross_entropy_with_logits(best, best))


def dropout_cost(model: models.ResNet, images: Tensor, digit: Tensor) -> tuple[float, float, float]:
    """Cross-entropy of a trained ten-class model: without dropout, on its features, on its logits.

    `images` (N, 3, height, width) float32, `digit` (N,) int64. Dropout is 0.5 in both places.
    """
    model.eval()
    backbone = nn.Sequential(*list(model.children())[:-1], nn.Flatten())
    with torch.no_grad():
        features = backbone(images)
        logits = model.fc(features)
        on_features = model.fc(F.dropout(features, 0.5))
        on_logits = F.dropout(logits, 0.5)
        return (
            float(F.cross_entropy(logits, digit)),
            float(F.cross_entropy(on_features, digit)),
            float(F.cross_entropy(on_logits, digit)),
        )


def head_moves(model: models.ResNet, images: Tensor, digit: Tensor, *, optimizer_first: bool) -> bool:
    """Whether one training step changes a new head, with an optimizer made before or after it."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fused_sce.replace_head(model, 10, task="multiclass")
    if not optimizer_first:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.fc.weight.detach().clone()
    model.train()
    F.cross_entropy(model(images), digit).backward()
    optimizer.step()
    return not torch.equal(before, model.fc.weight)


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Run the recipe; returns the losses per step of each new layer."""
    options = resnet_options(__doc__, argv, steps=25)
    train, test = digits.load_scans(options.seed)
    images, test_images = digits.images(train.grey), digits.images(test.grey)
    model = models.resnet18(weights=models.ResNet18_Weights.DEFAULT if options.pretrained else None).to(options.device)
    few, few_digits = images[:64].to(options.device), train.digits[:64].to(options.device)

    print(f"The model's own layer: {model.fc.in_features} features -> {model.fc.out_features}")
    print("A new layer (rest of the model unchanged), trained:")
    curves = {}
    trained = {}
    for layer in LAYERS:
        changed = trained[layer.name] = with_layer(model, layer).to(options.device)
        losses = curves[layer.name] = fit(
            changed,
            layer.loss_function,
            images,
            layer.targets(train.digits),
            steps=options.steps,
            seed=options.seed,
        )
        first, last = ends(losses)
        changed.eval()
        logits = in_chunks(changed, test_images, options.device)
        truth = layer.targets(test.digits)
        right = logits.argmax(dim=1) == truth if layer.task == "multiclass" else (logits > 0) == truth
        print(f"  {layer.name:40} loss {first:.3f} -> {last:.3f}, right on tests {right.float().mean():.3f}")

    print("\nThe first loss of four logistic outputs, by initialisation:")
    for init, loss in first_losses(model, few, few_digits).items():
        print(f"  {init:16} {loss:.3f}")

    print("\nAn activation inside the model under a loss that applies it again; lowest loss possible:")
    for num_classes in (3, 10, 1000):
        print(f"  softmax, {num_classes:4} classes  {floor_with_softmax_inside(num_classes):.3f}")
    for target in (0.0, 1.0):
        print(f"  sigmoid, target {target:.0f}      {floor_with_sigmoid_inside(target):.3f}")

    costs = dropout_cost(trained["10 classes"], few, few_digits)
    print("\nDropout of 0.5 on the trained ten-class model, loss on the same pictures:")
    for place, cost in zip(("nowhere", "on the features", "on the logits"), costs, strict=True):
        print(f"  {place:16} {cost:.3f}")

    print("\nOne step of an optimizer made")
    for first_made in (True, False):
        moved = head_moves(model, few, few_digits, optimizer_first=first_made)
        print(
            f"  {'before' if first_made else 'after'} the layer was replaced: "
            f"the new layer {'changed' if moved else 'did NOT change'}"
        )
    return curves


if __name__ == "__main__":
    main()
