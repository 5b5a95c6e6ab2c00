"""Draw the losses and their gradients, and compare each with other libraries' on every 0.1 of the logit in ±104.

    python benchmarks/plot_family.py

For t = 0 and t = 1 in float32, against exact values (mpmath):

* the largest relative error of loss and gradient. It is relative to the sum of the sizes of the terms, which differs
  from the value where terms cancel, and to at least the smallest normal number. Where some are NaN, how many;
* how many are lost: returned as 0, infinity or NaN though the true value is a nonzero finite float32;
* how many are off by more than 0.1 %, the lost ones included.

Writes `losses.png` (computed by fused_sce) and `losses_table.md`, which it prints too. Libraries that are not installed
are left out.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import mpmath
import torch
from torch import Tensor

import fused_sce
from fused_sce import functional as F

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Loss = Callable[[Tensor, Tensor], Tensor]

LIMIT = 104.0  # beyond it every loss and gradient that vanishes is 0 in float32
POINTS = 2081
OFF = 1e-3
SMALLEST_NORMAL = 2.0**-126
LIBRARIES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "kornia": "kornia",
    "segmentation_models_pytorch": "smp",
    "keras": "Keras",
}
"""Modules and the names that they have here."""


@functools.cache
def library(module: str) -> Any:
    """A library, or None where it is not installed. Keras computes with torch."""
    if module == "keras":
        os.environ["KERAS_BACKEND"] = "torch"  # read once, when Keras is first imported
    try:
        found: Any = importlib.import_module(module)
        if module in ("timm", "segmentation_models_pytorch", "kornia"):
            importlib.import_module(f"{module}.{'loss' if module == 'timm' else 'losses'}")
    except ImportError:
        return None
    return None if module == "keras" and found.config.backend() != "torch" else found


class Exact(NamedTuple):
    """Loss and gradient, and for each the sum of the sizes of its terms."""

    loss: float
    loss_terms: float
    gradient: float
    gradient_terms: float


@dataclass(frozen=True)
class Variant:
    """A loss of the family by its options, with the symbols of csrc/formulas/focal.h."""

    name: str
    gamma_pos: float = 0.0
    gamma_neg: float = 0.0
    clip: float = 0.0
    alpha: float | None = None
    pos_weight: float = 1.0
    label_smoothing: float = 0.0

    def ours(self, x: Tensor, t: Tensor) -> Tensor:
        """The loss of each element by fused_sce."""
        if self.gamma_pos != self.gamma_neg or self.clip:
            return F.asymmetric_loss(
                x, t, gamma_neg=self.gamma_neg, gamma_pos=self.gamma_pos, clip=self.clip, reduction="none"
            )
        if self.gamma_pos:
            return F.sigmoid_focal_loss(x, t, self.alpha, self.gamma_pos)
        pos_weight = None if self.pos_weight == 1.0 else torch.tensor(self.pos_weight, dtype=x.dtype)
        return F.sigmoid_cross_entropy(
            x, t, pos_weight=pos_weight, label_smoothing=self.label_smoothing, reduction="none"
        )

    def exact(self, logit: float, target: float) -> Exact:
        """The true values; options and the smoothed target are rounded to float32, as they are in it."""
        t = mpmath.mpf(_rounded((1 - self.label_smoothing) * target + self.label_smoothing / 2))
        clip, x = mpmath.mpf(_rounded(self.clip)), mpmath.mpf(logit)
        with mpmath.workprec(700):
            p, rest = 1 / (1 + mpmath.exp(-x)), 1 / (1 + mpmath.exp(x))
            q, survives = (p - clip, rest + clip) if p > clip else (mpmath.mpf(0), mpmath.mpf(1))
            slope = p * rest if q else mpmath.mpf(0)  # of q
            positive, negative = -self.pos_weight * t * mpmath.log(p), -(1 - t) * mpmath.log(survives)
            by_positive, by_negative = -self.pos_weight * t * rest, (1 - t) * slope / survives
            off = t * rest + (1 - t) * q
            gamma = self.gamma_pos * t + self.gamma_neg * (1 - t)
            alpha = 1 if self.alpha is None else self.alpha * t + (1 - self.alpha) * (1 - t)
            factor = alpha * (off**gamma if gamma else 1)
            rate = gamma * ((1 - t) * slope - t * p * rest) / off if off else mpmath.mpf(0)
            loss, of_factor = positive + negative, rate * (positive + negative)
            return Exact(
                float(factor * loss),
                float(factor * loss),
                float(factor * (by_positive + by_negative + of_factor)),
                float(factor * (abs(by_positive) + abs(by_negative) + abs(of_factor))),
            )


def _rounded(value: float) -> float:
    """The float32 next to a number."""
    return torch.tensor(value, dtype=torch.float32).item()


CROSS_ENTROPY = Variant("cross-entropy")
FOCAL = Variant("focal, gamma 2, alpha 0.25", 2.0, 2.0, alpha=0.25)
FOCAL_HALF = Variant("focal, gamma 0.5", 0.5, 0.5)
ASYMMETRIC = Variant("asymmetric, gammas 4 and 1, clip 0.05", 1.0, 4.0, 0.05)
ASYMMETRIC_UNCLIPPED = Variant("asymmetric, gammas 4 and 1, no clip", 1.0, 4.0)
SMOOTHED = Variant("label smoothing 0.1", label_smoothing=0.1)
POS_WEIGHT = Variant("pos_weight 3", pos_weight=3.0)
VARIANTS = (CROSS_ENTROPY, FOCAL, FOCAL_HALF, ASYMMETRIC, ASYMMETRIC_UNCLIPPED, SMOOTHED, POS_WEIGHT)


def _by_column(loss: Callable[..., Tensor]) -> Loss:
    """An element-wise loss of one that wants samples of labels."""
    return lambda x, t: loss(x[:, None], t[:, None]).flatten()


def _by_keras(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """An element-wise loss of one of Keras, which averages over the last dimension and takes targets first."""
    return lambda x, t: loss(t[:, None], x[:, None])


def _of_torch(_: Any) -> dict[tuple[Variant, str], Loss]:
    tripled = torch.nn.BCEWithLogitsLoss(reduction="none", pos_weight=torch.tensor(3.0))
    return {
        (CROSS_ENTROPY, "BCEWithLogitsLoss"): torch.nn.BCEWithLogitsLoss(reduction="none"),
        (CROSS_ENTROPY, "MultiLabelSoftMarginLoss"): _by_column(torch.nn.MultiLabelSoftMarginLoss(reduction="none")),
        (POS_WEIGHT, "BCEWithLogitsLoss"): tripled,
    }


def _of_torchvision(torchvision: Any) -> dict[tuple[Variant, str], Loss]:
    focal = torchvision.ops.sigmoid_focal_loss
    return {
        (FOCAL, "sigmoid_focal_loss"): focal,
        (FOCAL_HALF, "sigmoid_focal_loss"): functools.partial(focal, alpha=-1, gamma=0.5),
    }


def _of_timm(timm: Any) -> dict[tuple[Variant, str], Loss]:
    entropy = functools.partial(timm.loss.BinaryCrossEntropy, reduction="none")
    asymmetric = functools.partial(timm.loss.AsymmetricLossMultiLabel, reduction="none")
    return {
        (CROSS_ENTROPY, "BinaryCrossEntropy"): entropy(smoothing=0.0),
        (ASYMMETRIC, "AsymmetricLossMultiLabel"): asymmetric(),
        (ASYMMETRIC_UNCLIPPED, "AsymmetricLossMultiLabel"): asymmetric(clip=None),
        (SMOOTHED, "BinaryCrossEntropy"): entropy(smoothing=0.1, smooth_dense=True),
        (POS_WEIGHT, "BinaryCrossEntropy"): entropy(smoothing=0.0, pos_weight=3.0),
    }


def _of_kornia(kornia: Any) -> dict[tuple[Variant, str], Loss]:
    name, focal = "binary_focal_loss_with_logits", kornia.losses.binary_focal_loss_with_logits
    plain = functools.partial(focal, alpha=None, gamma=0.0)
    return {
        (CROSS_ENTROPY, name): _by_column(plain),
        (FOCAL, name): _by_column(focal),
        (FOCAL_HALF, name): _by_column(functools.partial(focal, alpha=None, gamma=0.5)),
        (POS_WEIGHT, name): _by_column(functools.partial(plain, pos_weight=torch.tensor([3.0]))),
    }


def _of_smp(smp: Any) -> dict[tuple[Variant, str], Loss]:
    soft = functools.partial(smp.losses.SoftBCEWithLogitsLoss, reduction="none")
    focal = functools.partial(smp.losses.FocalLoss, mode="binary", reduction="none")
    return {
        (CROSS_ENTROPY, "SoftBCEWithLogitsLoss"): soft(),
        (FOCAL, "FocalLoss"): focal(alpha=0.25),
        (FOCAL_HALF, "FocalLoss"): focal(gamma=0.5),
        (SMOOTHED, "SoftBCEWithLogitsLoss"): soft(smooth_factor=0.05),
        (POS_WEIGHT, "SoftBCEWithLogitsLoss"): soft(pos_weight=torch.tensor(3.0)),
    }


def _of_keras(keras: Any) -> dict[tuple[Variant, str], Loss]:
    entropy = functools.partial(keras.losses.BinaryCrossentropy, from_logits=True, reduction=None)
    focal = functools.partial(keras.losses.BinaryFocalCrossentropy, from_logits=True, reduction=None)
    return {
        (CROSS_ENTROPY, "BinaryCrossentropy"): _by_keras(entropy()),
        (FOCAL, "BinaryFocalCrossentropy"): _by_keras(focal(apply_class_balancing=True)),
        (FOCAL_HALF, "BinaryFocalCrossentropy"): _by_keras(focal(gamma=0.5)),
        (SMOOTHED, "BinaryCrossentropy"): _by_keras(entropy(label_smoothing=0.1)),
    }


def others(module: str) -> dict[tuple[Variant, str], Loss]:
    """Element-wise losses of a library that is installed, by variant and name."""
    makers: dict[str, Callable[[Any], dict[tuple[Variant, str], Loss]]] = {
        "torch": _of_torch,
        "torchvision": _of_torchvision,
        "timm": _of_timm,
        "kornia": _of_kornia,
        "segmentation_models_pytorch": _of_smp,
        "keras": _of_keras,
    }
    return makers[module](library(module))


def with_gradient(loss: Loss, x: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """Losses and gradients by the logits for one target."""
    leaf = x.clone().requires_grad_()
    losses = loss(leaf, torch.full_like(x, target))
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient


@dataclass
class Errors:
    """What one loss does: counts for t = 0 and t = 1."""

    worst: float = 0.0
    nan: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()
    off: tuple[int, ...] = ()

    def add(self, got: Tensor, exact: Tensor, terms: Tensor) -> None:
        """Count the values for one target."""
        true = exact.float()
        is_finite = true.isfinite()
        lost = (true != 0) & is_finite & ((got == 0) | ~got.isfinite())
        error = (got.double() - exact).abs() / terms.clamp(min=SMALLEST_NORMAL)
        error = error.nan_to_num(nan=math.inf, posinf=math.inf)
        self.worst = max(self.worst, error[is_finite].max().item())
        self.nan += (int(got.isnan().sum()),)
        self.lost += (int(lost.sum()),)
        self.off += (int((lost | (is_finite & (error > OFF))).sum()),)


@dataclass
class Row:
    """One loss of one library."""

    variant: str
    name: str
    loss: Errors
    gradient: Errors

    def __str__(self) -> str:
        """A row of the table."""
        cells = [self.variant, self.name]
        for errors in (self.loss, self.gradient):
            worst = f"NaN: {_counts(errors.nan)}" if any(errors.nan) else f"{errors.worst:.1e}".replace("e-0", "e-")
            cells += [worst.replace("e+00", "").replace("e+0", "e"), _counts(errors.lost), _counts(errors.off)]
        return f"| {' | '.join(cells)} |"


def _counts(counts: tuple[int, ...]) -> str:
    return " / ".join(map(str, counts))


def rows(points: int) -> Iterator[Row]:
    """Every loss of every library that is there, each variant's after ours."""
    x = torch.linspace(-LIMIT, LIMIT, points, dtype=torch.float64).float()
    found = {module: others(module) for module in LIBRARIES if library(module) is not None}
    for variant in VARIANTS:
        exact = [
            torch.tensor([variant.exact(logit, target) for logit in x.tolist()], dtype=torch.float64).unbind(1)
            for target in (0.0, 1.0)
        ]
        losses: dict[str, Loss] = {"**fused_sce**": variant.ours}
        for module, by_variant in found.items():
            for (other, name), loss in by_variant.items():
                if other is variant:
                    losses[f"{LIBRARIES[module]} `{name}`"] = loss
        for name, loss in losses.items():
            row = Row(variant.name, name, Errors(), Errors())
            for target, (loss_value, loss_terms, gradient_value, gradient_terms) in enumerate(exact):
                got, gradient = with_gradient(loss, x, float(target))
                row.loss.add(got, loss_value, loss_terms)
                row.gradient.add(gradient, gradient_value, gradient_terms)
            yield row


def table(points: int) -> str:
    """The comparison as Markdown."""
    versions = [
        f"{name} {library(module).__version__}" for module, name in LIBRARIES.items() if library(module) is not None
    ]
    lines = [
        f"float32, {points} logits from -{LIMIT:g} to {LIMIT:g}; counts are for t = 0 / t = 1. fused_sce "
        f"{fused_sce.__version__}, {', '.join(versions)}.",
        "",
        "| loss | of | loss: largest relative error | lost | off by 0.1 % | gradient: largest relative error | lost | "
        "off by 0.1 % |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *map(str, rows(points)),
    ]
    return "\n".join(lines) + "\n"


COLOURS = ("black", "#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#009e73", "#cc79a7")
STYLES = ("-", "-", "--", "-", "--", "-.", ":")


def plot(path: Path) -> None:
    """Draw loss and gradient over the logit, of negatives and positives."""
    x = torch.linspace(-8, 8, 801)
    picture, panels = plt.subplots(2, 2, figsize=(10, 7), sharex=True, sharey="row", layout="constrained")
    for column, target in enumerate((0.0, 1.0)):
        for variant, colour, style in zip(VARIANTS, COLOURS, STYLES, strict=True):
            for panel, values in zip(panels[:, column], with_gradient(variant.ours, x, target), strict=True):
                panel.plot(x, values, style, color=colour, label=variant.name, linewidth=1.8)
        panels[0, column].set_title("positive, t = 1" if target else "negative, t = 0")
        panels[1, column].set_xlabel("logit x")
    panels[0, 0].set_ylabel("loss")
    panels[0, 0].set_ylim(-0.2, 8)
    panels[1, 0].set_ylabel("gradient by x")
    panels[1, 0].set_ylim(-3.2, 1.7)
    for panel in panels.flat:
        panel.grid(alpha=0.3)
        panel.set_xlim(-8, 8)
    picture.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=10)
    picture.savefig(path, dpi=110)
    plt.close(picture)


def main(arguments: list[str] | None = None) -> int:
    """Draw, compare and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder for the picture and the table")
    parser.add_argument("--points", type=int, default=POINTS, help="number of logits, in equal steps")
    options = parser.parse_args(arguments)
    if options.points < 2:
        parser.error(f"--points must be at least 2, got {options.points}")
    options.output.mkdir(parents=True, exist_ok=True)

    for module, name in LIBRARIES.items():
        if library(module) is None:
            print(f"{name} is left out: it is not installed, or computes with another backend than torch")
    plot(options.output / "losses.png")
    text = table(options.points)
    print(text)
    (options.output / "losses_table.md").write_text(text)
    print(f"written: {options.output}/losses.png, losses_table.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
