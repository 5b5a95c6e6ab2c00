"""Fine-tuning a ResNet-50 for several labels, with a sigmoid cross-entropy that is fused and stable.

    python examples/recipes/finetune_resnet50.py

Where does the sigmoid go, into `forward` or at a higher level? During training, nowhere: the model returns logits, and
`fused_sce.MultiLabelSoftMarginLoss` computes max(x, 0) - x t + log1p(exp(-|x|)), correct for every float. A sigmoid in
`forward` rounds to exactly 1 from a logit of 17 on (float32): the gradient is 0 however wrong the answer was. torch's
own BCEWithLogitsLoss still loses that of labels that are right. `predict_proba` applies the sigmoid for people.

The program prints how many gradients each way of writing the loss loses, lets each unlearn a confident mistake,
fine-tunes the whole model on four attributes of digits, then freezes it and trains a new classifier for ten digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import digits
import torch
from recipe_tools import LEARNING_RATE, backbone, fit, parse_options, predict, progress
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

import fused_sce


class ResNet50(nn.Module):
    """ResNet-50 as `features`, frozen or not, and a new `classifier`.

    Images (N, 3, height, width) float32 -> logits (N, num_classes). `weights` are torchvision's, by name, or None.
    """

    def __init__(self, num_classes: int, *, freeze: bool = False, weights: str | None = None) -> None:
        super().__init__()
        # Every residual block starts as the identity (Goyal et al., 2017): without pretrained weights it learns faster.
        self.features = backbone(models.resnet50(weights=weights, zero_init_residual=True))
        self.new_classifier(num_classes)
        self.freeze(freeze)

    def new_classifier(self, num_classes: int) -> None:
        """Put a fresh classifier, kaiming_normal_ weights and zero bias, on the features."""
        device = next(self.features.parameters()).device
        self.classifier = fused_sce.MultiLabelHead(2048, num_classes, init="kaiming_normal").to(device)

    def freeze(self, frozen: bool = True) -> None:
        """Train the classifier alone, or everything again."""
        self.frozen = frozen
        self.features.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> ResNet50:
        """As `nn.Module.train`, but frozen features stay in evaluation mode."""
        super().train(mode)
        # In training mode a forward pass moves batch normalisation's running statistics, whatever `requires_grad` says.
        self.features.train(mode and not self.frozen)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        logits: Tensor = self.classifier(self.features(images))
        return logits

    def predict_proba(self, images: Tensor) -> Tensor:
        """Probabilities (N, num_classes), each by itself."""
        return self.classifier.predict_proba(self.features(images))


Loss = Callable[..., Tensor]  # takes logits and float targets (N, C) and a reduction
LOSSES: dict[str, Loss] = {
    "sigmoid, then BCELoss": lambda x, t, reduction: F.binary_cross_entropy(x.sigmoid(), t, reduction=reduction),
    "torch BCEWithLogitsLoss": F.binary_cross_entropy_with_logits,
    "torch MultiLabelSoftMarginLoss": F.multilabel_soft_margin_loss,
    "fused MultiLabelSoftMarginLoss": fused_sce.functional.multilabel_soft_margin_loss,
}


def lost(loss_function: Loss, count: int = 20_001) -> tuple[int, int]:
    """How many gradients are 0 and how many losses off by over 1 %, for `count` float32 logits under each target.

    The logits go from -80 to 80: no exact gradient there is 0, the smallest is exp(-80), about 2e-35.
    """
    # Columns: the loss of a row is then the loss of one logit, for every one of the functions.
    logits = torch.linspace(-80, 80, count).repeat(2).unsqueeze(1).requires_grad_()
    targets = torch.tensor([0.0, 1.0]).repeat_interleave(count).unsqueeze(1)
    losses = loss_function(logits, targets, reduction="none").view_as(logits)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    exact = -F.logsigmoid((2 * targets - 1) * logits.detach().double())
    wrong = (losses.detach() - exact).abs() > 0.01 * exact
    return int((gradient == 0).sum()), int(wrong.sum())


def unlearn(loss_function: Loss) -> int | None:
    """How many gradient steps of size 1 turn a logit of 20, a confident mistake, negative; None if 100 do not."""
    logit = torch.full((1, 1), 20.0, requires_grad=True)
    for step in range(100):
        if logit < 0:
            return step
        (gradient,) = torch.autograd.grad(loss_function(logit, torch.zeros(1, 1), reduction="mean"), logit)
        logit = (logit - gradient).detach().requires_grad_()
    return None


def main(argv: Sequence[str] | None = None) -> list[tuple[list[float], float]]:
    """Run the recipe; returns the losses and the average precision on tests of both trainings."""
    options = parse_options(__doc__, argv, steps=20)

    print("Logits from -80 to 80 with targets 0 and 1, 40002 in all; a mistake at a logit of 20:")
    for name, loss_function in LOSSES.items():
        (gradients, losses), steps = lost(loss_function), unlearn(loss_function)
        mistake = f"unlearnt in {steps} steps" if steps else "still there after 100 steps"
        print(f"  {name:30} {gradients:5} gradients are 0, {losses:5} losses wrong; {mistake}")

    train, test = digits.load_scans(options.seed)
    images, test_images = digits.images(train.grey), digits.images(test.grey)
    model = ResNet50(len(digits.ATTRIBUTES), weights=options.weights).to(options.device)
    criterion = fused_sce.MultiLabelSoftMarginLoss()
    results = []

    def train_and_test(targets: Callable[[Tensor], Tensor], rate: float) -> None:
        losses = fit(model, criterion, images, targets(train.digits), steps=options.steps, learning_rate=rate)
        # Over all thresholds, not the share of right labels: where nine of ten are 0, answering 0 is 90 % right.
        precision = float(average_precision_score(targets(test.digits), predict(model, test_images)))
        results.append((losses, precision))
        print(f"  {progress(losses)}, average precision on tests {precision:.3f}")

    print("\nTraining everything, four attributes:")
    train_and_test(digits.attributes, LEARNING_RATE)
    print("Training a new classifier on frozen features, ten digits:")
    model.new_classifier(10)
    model.freeze()
    # A linear layer on fixed features takes far larger steps than the network that made them.
    train_and_test(lambda digit: F.one_hot(digit, 10), 10 * LEARNING_RATE)
    return results


if __name__ == "__main__":
    main()
