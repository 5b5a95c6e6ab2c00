"""How can a PyTorch ResNet head be modified from a sigmoid to a softmax activation?

    python examples/recipes/sigmoid_to_softmax_head.py

Three things change together: the number of outputs, the activation, and the loss.

    head      outputs                  probabilities                   loss, on logits
    sigmoid   one per label, >= 1      independent, sum to anything    sigmoid cross-entropy
    softmax   one per class, >= 2      sum to one                      torch.nn.CrossEntropyLoss

The activation belongs neither into the model nor before the loss: both losses read logits and
apply it themselves, stably. The head applies it where a person asks for probabilities.

The program trains one ResNet-18 with a sigmoid head (four attributes of a digit that do not exclude
one another), then with a softmax head (the ten digits), then with a sigmoid head again; the backbone
is kept each time. It also shows why a softmax over one output is useless, and how a sigmoid head
with a single output becomes a softmax head with two, and back, without any training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import digits
import torch
from recipe_tools import ends, fit, in_chunks, resnet_options
from torch import Tensor, nn
from torchvision import models

import fused_sce


@dataclass(frozen=True)
class Stage:
    """One head, trained: `losses` per step; `probabilities` (N, outputs) and the score on tests.

    `accuracy` is the share of right labels (sigmoid) or of right pictures (softmax), `guess` the
    accuracy of always answering what is most frequent.
    """

    task: str
    losses: list[float]
    probabilities: Tensor
    accuracy: float
    guess: float


def train_with_head(model: models.ResNet, task: str, *, steps: int, seed: int, device: str) -> Stage:
    """Give `model` a new head for `task`, "multilabel" or "multiclass", train it, and test it."""
    train, test = digits.load_scans(seed)
    loss_function: nn.Module
    if task == "multilabel":
        num_outputs = len(digits.ATTRIBUTES)
        # bool targets: the fused loss reads them as they are, torch's own would refuse them.
        targets, truth = digits.attributes(train.digits), digits.attributes(test.digits)
        loss_function = fused_sce.SigmoidCrossEntropyLoss()
    else:
        num_outputs = 10
        targets, truth = train.digits, test.digits
        loss_function = nn.CrossEntropyLoss()

    fused_sce.replace_head(model, num_outputs, task=task)
    model.to(device)
    losses = fit(model, loss_function, digits.images(train.grey), targets, steps=steps, seed=seed)

    model.eval()
    probabilities = in_chunks(lambda pictures: predict_proba(model, pictures), digits.images(test.grey), device)
    if task == "multilabel":
        right = (probabilities > 0.5) == truth
        share = truth.float().mean(dim=0)
        guess = torch.maximum(share, 1 - share).mean()
    else:
        right = probabilities.argmax(dim=1) == truth
        guess = truth.bincount().max() / len(truth)
    return Stage(task, losses, probabilities, float(right.float().mean()), float(guess))


def predict_proba(model: models.ResNet, pictures: Tensor) -> Tensor:
    """Probabilities (N, outputs) for pictures (N, 3, height, width), whatever head the model has.

    The head knows its activation, so that this code stays the same when the head changes.
    """
    backbone = nn.Sequential(*list(model.children())[:-1], nn.Flatten())
    probabilities: Tensor = model.fc.predict_proba(backbone(pictures))
    return probabilities


def softmax_over_one_output(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What a softmax makes of one output per picture: probabilities and gradient, both (N, 1).

    Every probability is exp(x) / exp(x) = 1, so that the loss is log 1 = 0 and its gradient is 0:
    nothing is predicted, and nothing can be learnt.
    """
    logits = logits.detach().clone().requires_grad_()
    loss = nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
    (gradient,) = torch.autograd.grad(loss, logits)
    return logits.detach().softmax(dim=1), gradient


def softmax_from_sigmoid(head: nn.Linear) -> fused_sce.MultiClassHead:
    """The two-class softmax head ("no", "yes") that gives the probabilities of a sigmoid head.

    softmax(0, x) = (1 - sigmoid(x), sigmoid(x)), so that a zero row for "no" is all it takes.
    """
    if head.out_features != 1:
        raise ValueError(f"a head with one output is needed, got {head.out_features}")
    new = fused_sce.MultiClassHead(head.in_features, 2, init="zeros").to(head.weight.device)
    with torch.no_grad():
        new.weight[1] = head.weight[0]
        new.bias[0] = 0.0
        new.bias[1] = 0.0 if head.bias is None else head.bias[0]
    return new


def sigmoid_from_softmax(head: nn.Linear) -> fused_sce.MultiLabelHead:
    """The sigmoid head with one output that gives a two-class softmax head's second probability.

    softmax(a, b)[1] = sigmoid(b - a): only the difference of the two rows matters.
    """
    if head.out_features != 2:
        raise ValueError(f"a head with two outputs is needed, got {head.out_features}")
    new = fused_sce.MultiLabelHead(head.in_features, 1, init="zeros").to(head.weight.device)
    with torch.no_grad():
        new.weight[0] = head.weight[1] - head.weight[0]
        new.bias[0] = 0.0 if head.bias is None else head.bias[1] - head.bias[0]
    return new


def main(argv: Sequence[str] | None = None) -> list[Stage]:
    """Run the recipe; returns the three heads in the order in which they were trained."""
    options = resnet_options(__doc__, argv, steps=30)
    model = models.resnet18(weights=models.ResNet18_Weights.DEFAULT if options.pretrained else None)

    print(f"{'head':11} {'loss':>14}   {'sum of probabilities':>20}   accuracy (guessing)")
    stages = []
    for task in ("multilabel", "multiclass", "multilabel"):
        stage = train_with_head(model, task, steps=options.steps, seed=options.seed, device=options.device)
        stages.append(stage)
        first, last = ends(stage.losses)
        sums = stage.probabilities.sum(dim=1)
        print(
            f"{task:11} {first:5.3f} -> {last:5.3f}   {sums.min():8.4f} to {sums.max():8.4f}   "
            f"{stage.accuracy:8.3f} ({stage.guess:.3f})"
        )

    logits = torch.tensor([[-3.0], [0.0], [5.0]])
    probabilities, gradient = softmax_over_one_output(logits)
    print("\nA softmax over one output, for the logits", logits.flatten().tolist())
    print("  probabilities:", probabilities.flatten().tolist(), "whatever the picture")
    print("  gradient:     ", gradient.abs().flatten().tolist(), "so that it never learns")

    with torch.no_grad():
        features = torch.randn(4, model.fc.in_features)
        sigmoid_head = fused_sce.MultiLabelHead(model.fc.in_features, 1)
        softmax_head = softmax_from_sigmoid(sigmoid_head)
        yes = sigmoid_head.predict_proba(features)[:, 0]
        no_yes = softmax_head.predict_proba(features)
        again = sigmoid_from_softmax(softmax_head).predict_proba(features)[:, 0]
    print("\nOne sigmoid output as a softmax over two, and back, without training")
    print("  sigmoid:      ", [round(p, 6) for p in yes.tolist()])
    print("  softmax:      ", [[round(p, 6) for p in row] for row in no_yes.tolist()])
    print("  sigmoid again:", [round(p, 6) for p in again.tolist()])
    return stages


if __name__ == "__main__":
    main()
