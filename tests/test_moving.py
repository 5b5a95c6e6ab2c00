"""Values in docs/moving.md that no other file tests."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_family import assert_same, data, library
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fused_sce
from fused_sce import functional as F

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # by Keras

TOLERANCE = 1e-6  # in float32


def theirs(module: str, name: str, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Another library's loss of logits and targets, in this order."""
    of: Any = functools.reduce(getattr, name.split("."), library(module))
    if module in ("torchvision", "kornia"):
        return functools.partial(of, **options)
    loss = of(**options)
    return (lambda x, t: loss(t, x)) if module == "keras" else loss


SMP_BCE = "segmentation_models_pytorch", "losses.SoftBCEWithLogitsLoss"
SMP_FOCAL = "segmentation_models_pytorch", "losses.FocalLoss"
KORNIA = "kornia", "losses.binary_focal_loss_with_logits"
TORCHVISION = "torchvision", "ops.sigmoid_focal_loss"
KERAS, KERAS_FOCAL = (("keras", f"losses.Binary{name}") for name in ("Crossentropy", "FocalCrossentropy"))


@pytest.mark.parametrize(
    ("name", "options", "is_fused"),
    [
        (SMP_BCE, {}, True),
        (SMP_FOCAL, {"mode": "multilabel"}, True),
        (KERAS, {"from_logits": True}, True),
        (KERAS, {}, False),
        (KERAS_FOCAL, {"from_logits": True}, False),
        (KORNIA, {}, False),
    ],
)
def test_what_the_patch_makes_fused(name: tuple[str, str], options: dict[str, Any], is_fused: bool) -> None:
    loss, of = theirs(*name, **options), data(torch.float32)
    takes_logits = name not in (KERAS, KERAS_FOCAL) or options.get("from_logits")

    def of_model() -> Tensor:
        return of.x * 1 if takes_logits else of.x.sigmoid()

    with fused_sce.patch_torch(), profile(activities=[ProfilerActivity.CPU]) as seen:
        patched = loss(of_model(), of.t)
    assert any("fused_sce" in event.key for event in seen.key_averages()) == is_fused
    assert_same(patched, loss(of_model(), of.t), of.x, TOLERANCE)


def test_smps_focal_loss_of_labels() -> None:
    of = data(torch.float32)
    summed = theirs(*SMP_FOCAL, mode="multilabel", alpha=0.25, reduction="sum")(of.x, of.t)
    assert_same(F.sigmoid_focal_loss(of.x, of.t, reduction="sum") / 6, summed, of.x, TOLERANCE)
    weighted = theirs(*SMP_FOCAL, mode="multilabel", alpha=0.25, class_weights=of.weight.tolist())(of.x, of.t)
    ours = F.sigmoid_focal_loss(of.x, of.t, weight=of.weight / of.weight.mean(), reduction="mean")
    assert_same(ours, weighted, of.x, TOLERANCE)
    with pytest.raises(IndexError):
        theirs(*SMP_FOCAL, mode="multilabel", ignore_index=-1)(of.x, of.with_ignored)


def test_kerass_weights_of_samples() -> None:
    of = data(torch.float32)
    w = torch.rand(16) + 0.5
    cross_entropy = library("keras").losses.BinaryCrossentropy
    weighted = cross_entropy(from_logits=True)(of.t, of.x, sample_weight=w)
    assert_same(F.sigmoid_cross_entropy(of.x, of.t, weight=w.unsqueeze(-1)), weighted, of.x, TOLERANCE)
    weighted = cross_entropy(from_logits=True, reduction="mean_with_sample_weight")(of.t, of.x, sample_weight=w)
    ours = F.sigmoid_cross_entropy(of.x, of.t, weight=(w / w.mean()).unsqueeze(-1))
    assert_same(ours, weighted, of.x, TOLERANCE)
    each = theirs(*KERAS, from_logits=True, reduction=None)(of.x, of.t)
    assert_same(F.multilabel_soft_margin_loss(of.x, of.t, reduction="none"), each, of.x, TOLERANCE)


@pytest.mark.parametrize(
    ("loss", "target", "value"),
    [
        (lambda x, t: nn.BCELoss()(x.sigmoid(), t), 0.0, 100.0),
        (lambda x, t: theirs(*KERAS)(x.sigmoid(), t), 1.0, -math.log(1e-7)),
        (lambda x, t: theirs("timm", "loss.AsymmetricLossMultiLabel")(x, t), 1.0, -math.log(1e-8)),
    ],
    ids=["sigmoid and BCELoss", "Keras", "timm"],
)
def test_clamped_probabilities(loss: Callable[[Tensor, Tensor], Tensor], target: float, value: float) -> None:
    """A loss that is constant where the model is wrong and confident; ours grows there."""
    for size in (18.5, 30.0):
        x = torch.full((1, 1), size if target == 0 else -size, requires_grad=True)
        t = torch.full((1, 1), target)
        constant = loss(x, t)
        assert constant.item() == pytest.approx(value)
        assert torch.autograd.grad(constant, x)[0].abs().item() < 2e-7  # what is left in timm's is that of its factor
        ours = F.sigmoid_cross_entropy(x, t)
        assert ours.item() == pytest.approx(size)
        assert torch.autograd.grad(ours, x)[0].abs().item() == pytest.approx(1)


def test_infinite_logits() -> None:
    x, t = torch.full((1, 1), math.inf), torch.ones(1, 1)
    for loss in (
        nn.BCEWithLogitsLoss(),
        nn.MultiLabelSoftMarginLoss(),
        theirs(*TORCHVISION),
        theirs(*KORNIA),
        theirs(*SMP_BCE),
        theirs(*SMP_FOCAL, mode="binary"),
        theirs(*KERAS, from_logits=True),
    ):
        assert loss(x, t).isnan().all()
    for ours in (F.sigmoid_cross_entropy, F.multilabel_soft_margin_loss, F.sigmoid_focal_loss, F.asymmetric_loss):
        assert ours(x, t).item() == 0
    ignored = torch.full((1, 1), -100.0)
    for loss in (theirs(*SMP_BCE), theirs(*KORNIA)):
        assert loss(x, ignored).isnan().all()
    for ours in (F.sigmoid_cross_entropy, F.sigmoid_focal_loss):
        assert ours(x, ignored, ignore_value=-100).item() == 0
