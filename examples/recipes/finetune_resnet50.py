"""Fine-tuning a ResNet-50 for several labels, with a sigmoid cross-entropy that is fused and stable.

    python examples/recipes/finetune_resnet50.py

The class: every layer but the last as `features`, a new `classifier` behind it, the features frozen
or not. Where does the sigmoid go, into `forward` or at a higher level? During training, nowhere: the
model returns logits, and `fused_sce.MultiLabelSoftMarginLoss` computes

    loss(x, t) = max(x, 0) - x t + log1p(exp(-|x|))

in one pass, correct for every float. A sigmoid in `forward` rounds to exactly 1 from a logit of 17
on (float32), and what the loss needed to know is gone: the gradient is 0 however wrong the answer
was. `predict_proba` applies the sigmoid for people.

When the question was first asked, torch's MultiLabelSoftMarginLoss was computed that way. It has
since become stable, though it still takes some twenty passes over memory instead of one, and
BCEWithLogitsLoss still loses the gradient of every label that is right beyond a logit of 17.

The program prints how many gradients each way of writing the loss loses and its time, lets each
unlearn a confident mistake, then fine-tunes the whole model on four attributes of digits, and at
last freezes those features and trains a new classifier on them for the ten digits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import digits
import torch
from recipe_tools import LEARNING_RATE, ends, fit, in_chunks, resnet_options
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

import fused_sce

# A linear layer on fixed features takes far larger steps than the network that made them.
CLASSIFIER_LEARNING_RATE = 3e-3


class ResNet50(nn.Module):
    """ResNet-50 with a new classifier: images (N, 3, height, width) -> logits (N, num_classes).

    Against `fused_sce.replace_head` on torchvision's model this renames the parameters
    ("features.0.weight" for "conv1.weight"), but has the features at hand as a module.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        freeze: bool = False,
        weights: models.ResNet50_Weights | None = None,
    ) -> None:
        super().__init__()
        # Without pretrained weights, every residual block starts as the identity (Goyal et al.,
        # 2017): 30 steps on digits then take the loss to a third, against two thirds otherwise.
        original = models.resnet50(weights=weights, zero_init_residual=True)
        self.features = nn.Sequential(*list(original.children())[:-1])
        self.num_features: int = original.fc.in_features
        self.new_classifier(num_classes)
        self.freeze(freeze)

    def new_classifier(self, num_classes: int) -> None:
        """Put a fresh classifier, kaiming_normal_ weights and zero bias, on the features."""
        device = next(self.features.parameters()).device
        self.classifier = fused_sce.MultiLabelHead(self.num_features, num_classes, init="kaiming_normal").to(device)

    def freeze(self, frozen: bool = True) -> None:
        """Train the classifier alone, or everything again.

        Batch normalisation changes in two ways while it trains: by its gradient, which
        `requires_grad` stops, and by its running statistics, which it does not: every forward pass
        in training mode moves them. Frozen features therefore stay in evaluation mode, see `train`.
        """
        self.frozen = frozen
        for parameter in self.features.parameters():
            parameter.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> ResNet50:
        """As `nn.Module.train`, but frozen features stay in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.features.eval()
        return self

    def pooled(self, images: Tensor) -> Tensor:
        """Features (N, 2048) float32 for images (N, 3, height, width) float32."""
        return torch.flatten(self.features(images), start_dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) for images (N, 3, height, width) float32."""
        logits: Tensor = self.classifier(self.pooled(images))
        return logits

    def predict_proba(self, images: Tensor) -> Tensor:
        """Probabilities (N, num_classes), each by itself."""
        probabilities: Tensor = self.classifier.predict_proba(self.pooled(images))
        return probabilities


def _naive(logits: Tensor, targets: Tensor, *, reduction: str) -> Tensor:
    return F.binary_cross_entropy(torch.sigmoid(logits), targets, reduction=reduction)


# Each takes logits and float targets (N, C) and a reduction.
Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {
    "sigmoid, then BCELoss": _naive,
    "torch BCEWithLogitsLoss": F.binary_cross_entropy_with_logits,
    "torch MultiLabelSoftMarginLoss": F.multilabel_soft_margin_loss,
    "fused MultiLabelSoftMarginLoss": fused_sce.functional.multilabel_soft_margin_loss,
}


@dataclass(frozen=True)
class Lost:
    """Of `count` logits: how many gradients came out as 0, and how many losses were wrong."""

    count: int
    gradients: int
    losses: int


def lost(loss_function: Loss, *, limit: float = 80.0, count: int = 20_001) -> Lost:
    """Sweep `count` logits from -limit to limit, with target 0 and with target 1, in float32.

    No exact gradient in this range is 0, as the smallest is exp(-80), about 2e-35. A loss counts as
    wrong from a relative error of 1 % on; the same formula in float64 tells the right value.
    """
    zero_gradients, wrong_losses = 0, 0
    # A column: the loss of a row is then the loss of one logit, for every one of the functions.
    logits = torch.linspace(-limit, limit, count).unsqueeze(1).requires_grad_()
    for target in (0.0, 1.0):
        losses = loss_function(logits, torch.full_like(logits, target), reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        zero_gradients += int((gradient == 0).sum())

        x = logits.detach().double().flatten()
        exact = x.clamp(min=0) - x * target + torch.log1p(torch.exp(-x.abs()))
        error = (losses.detach().double().flatten() - exact).abs()
        wrong_losses += int((error > 0.01 * exact).sum())
    return Lost(2 * count, zero_gradients, wrong_losses)


def unlearn(loss_function: Loss, *, start: float = 20.0, most: int = 100) -> tuple[int, float]:
    """Gradient steps of size 1 on one logit, at `start`, whose target is 0: a confident mistake.

    Returns the number of steps until the logit is negative (at most `most`), and where it ended.
    """
    logit = torch.full((1, 1), start, requires_grad=True)
    optimizer = torch.optim.SGD([logit], lr=1.0)
    for step in range(most):
        if logit.item() < 0:
            return step, logit.item()
        optimizer.zero_grad()
        loss_function(logit, torch.zeros(1, 1), reduction="mean").backward()
        optimizer.step()
    return most, logit.item()


def milliseconds(loss_functions: Sequence[Loss], device: str, repeats: int = 20) -> list[float]:
    """Median time of forward and backward on 256 x 1000 logits, the functions taking turns."""
    logits = torch.randn(256, 1000, device=device, requires_grad=True)
    targets = (torch.rand(256, 1000, device=device) < 0.1).float()
    times: list[list[float]] = [[] for _ in loss_functions]
    for _ in range(repeats):
        for loss_function, taken in zip(loss_functions, times, strict=True):
            start = time.perf_counter()
            loss = loss_function(logits, targets, reduction="mean")
            float(torch.autograd.grad(loss, logits)[0][0, 0])  # waits for the device
            taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


@dataclass(frozen=True)
class Training:
    """`losses` per step, mean average precision on tests (1 is best), seconds for a step.

    Precision over all thresholds, not the share of right labels: where nine labels of ten are 0,
    answering 0 to everything is 90 % right.
    """

    losses: list[float]
    average_precision: float
    seconds_per_step: float


def train_and_test(
    model: ResNet50,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    steps: int,
    seed: int,
    device: str,
    learning_rate: float = LEARNING_RATE,
) -> Training:
    """Train what is not frozen on images (N, 3, size, size) and targets (N, num_classes) bool."""
    start = time.perf_counter()
    losses = fit(
        model,
        fused_sce.MultiLabelSoftMarginLoss(),
        *train,
        steps=steps,
        seed=seed,
        learning_rate=learning_rate,
    )
    seconds = (time.perf_counter() - start) / max(1, steps)
    model.eval()
    scores = in_chunks(model.predict_proba, test[0], device)
    precision = average_precision_score(test[1].numpy(), scores.numpy(), average="macro")
    return Training(losses, float(precision), seconds)


def main(argv: Sequence[str] | None = None) -> tuple[Training, Training]:
    """Run the recipe; returns both trainings, of everything and of a classifier alone."""
    options = resnet_options(__doc__, argv, steps=30)

    print("float32 logits from -80 to 80 with targets 0 and 1; a mistake at logit 20; 256 x 1000:")
    times = milliseconds(list(LOSSES.values()), options.device)
    for (name, loss_function), taken in zip(LOSSES.items(), times, strict=True):
        result = lost(loss_function)
        steps, end = unlearn(loss_function)
        print(
            f"  {name:30} {result.gradients:5} gradients of {result.count} are 0, "
            f"{result.losses:5} losses wrong; "
            + (f"unlearnt in {steps} steps" if end < 0 else f"still {end:.0f} after {steps} steps")
            + f"; {taken:.2f} ms"
        )

    scans, test_scans = digits.load_scans(options.seed)
    images, test_images = digits.images(scans.grey), digits.images(test_scans.grey)
    weights = models.ResNet50_Weights.DEFAULT if options.pretrained else None
    model = ResNet50(len(digits.ATTRIBUTES), weights=weights).to(options.device)

    def report(what: str, training: Training) -> None:
        first, last = ends(training.losses)
        print(
            f"  {what:43} loss {first:.3f} -> {last:.3f}, average precision on tests "
            f"{training.average_precision:.3f}, {training.seconds_per_step:.2f} s a step"
        )

    print("\nTraining:")
    everything = train_and_test(
        model,
        (images, digits.attributes(scans.digits)),
        (test_images, digits.attributes(test_scans.digits)),
        steps=options.steps,
        seed=options.seed,
        device=options.device,
    )
    report("everything, four attributes", everything)

    model.new_classifier(10)
    model.freeze()
    classifier = train_and_test(
        model,
        (images, digits.shown(scans.digits.unsqueeze(1), range(10))),
        (test_images, digits.shown(test_scans.digits.unsqueeze(1), range(10))),
        steps=options.steps,
        seed=options.seed,
        device=options.device,
        learning_rate=CLASSIFIER_LEARNING_RATE,
    )
    report("features frozen, new classifier, ten digits", classifier)
    return everything, classifier


if __name__ == "__main__":
    main()
