"""Other libraries' losses of this family, wherever they are right; and the exact values of ours, where they are not."""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compare_family
import plot_family
import pytest
import torch
from plot_family import VARIANTS, Variant
from torch import Tensor

from fused_sce import functional as F

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # by Keras

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
DTYPES = [torch.float32, torch.float64]


def library(module: str) -> Any:
    """A library, or the test is skipped."""
    found = plot_family.library(module)
    if found is None:
        pytest.skip(f"{module} is not installed, or computes with another backend than torch")
    return found


@dataclass
class Data:
    """A batch; the logits are moderate, so that no library clamps or loses anything."""

    x: Tensor
    t: Tensor
    weight: Tensor
    pos_weight: Tensor
    elements: int = 96

    @property
    def soft(self) -> Tensor:
        """Targets between 0 and 1."""
        return (self.t * 0.6 + 0.2 * torch.sigmoid(self.x.detach())).to(self.x.dtype)

    @property
    def with_ignored(self) -> Tensor:
        """Targets of which some are -1."""
        return torch.where(torch.arange(self.elements).reshape(16, 6) % 5 == 0, -1.0, self.t)


def data(dtype: torch.dtype, limit: float = 6.0) -> Data:
    x = torch.linspace(-limit, limit, 96, dtype=dtype)[torch.randperm(96)].reshape(16, 6).requires_grad_()
    t = (torch.rand(16, 6) < 0.4).to(dtype)
    return Data(x, t, torch.rand(6, dtype=dtype) + 0.5, torch.rand(6, dtype=dtype) * 3 + 0.2)


def assert_same(ours: Tensor, theirs: Tensor, x: Tensor, tolerance: float) -> None:
    """Losses and gradients are equal to a relative `tolerance`, of the largest value where terms cancel."""
    pairs = [(ours, theirs)]
    probe = torch.linspace(0.5, 1.5, ours.numel(), dtype=ours.dtype).reshape(ours.shape)
    pairs.append(tuple(torch.autograd.grad((loss * probe).sum(), x)[0] for loss in (ours, theirs)))  # type: ignore[arg-type]
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * other.abs().max().item())


REDUCTIONS = ["none", "mean", "sum"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestTorchvision:
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("alpha", [0.25, 0.8, 1.0, -1])
    @pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.3])
    @pytest.mark.parametrize("soft", [False, True])
    def test_focal(self, dtype: torch.dtype, reduction: str, alpha: float, gamma: float, soft: bool) -> None:
        focal = library("torchvision").ops.sigmoid_focal_loss
        of = data(dtype)
        t = of.soft if soft else of.t
        assert_same(
            F.sigmoid_focal_loss(of.x, t, alpha, gamma, reduction),
            focal(of.x, t, alpha, gamma, reduction),
            of.x,
            TOLERANCE[dtype],
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestTimm:
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("reduction", [*REDUCTIONS, "sum_classes"])
    def test_dense_targets(self, dtype: torch.dtype, reduction: str, smoothing: float, weighted: bool) -> None:
        timm = library("timm")
        of = data(dtype)
        factors = {"weight": of.weight, "pos_weight": of.pos_weight} if weighted else {}
        by_class = reduction == "sum_classes"
        theirs = timm.loss.BinaryCrossEntropy(
            smoothing=smoothing,
            smooth_dense=True,
            sum_classes=by_class,
            reduction="mean" if by_class else reduction,
            **factors,
        )
        ours = F.sigmoid_cross_entropy(of.x, of.t, label_smoothing=smoothing, reduction=reduction, **factors)
        assert_same(ours, theirs(of.x, of.t), of.x, TOLERANCE[dtype])

    def test_soft_targets_are_not_smoothed_by_default(self, dtype: torch.dtype) -> None:
        timm = library("timm")
        of = data(dtype)
        theirs = timm.loss.BinaryCrossEntropy(smoothing=0.1)(of.x, of.soft)
        assert_same(F.sigmoid_cross_entropy(of.x, of.soft), theirs, of.x, TOLERANCE[dtype])

    def test_class_indices_are_one_hot_targets_with_the_prior_1_by_c(self, dtype: torch.dtype) -> None:
        timm = library("timm")
        of = data(dtype)
        index = torch.arange(16) % 6
        ours = F.sigmoid_cross_entropy(
            of.x, torch.nn.functional.one_hot(index, 6), label_smoothing=0.1, smoothing_prior=1 / 6
        )
        assert_same(ours, timm.loss.BinaryCrossEntropy(smoothing=0.1)(of.x, index), of.x, TOLERANCE[dtype])

    @pytest.mark.parametrize("reduction", [*REDUCTIONS, "batchmean"])
    @pytest.mark.parametrize("gammas", [(4, 1, 0.05), (4, 1, None), (2.5, 0.5, 0.1), (0, 0, 0.2)])
    @pytest.mark.parametrize("soft", [False, True])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_asymmetric(
        self, dtype: torch.dtype, reduction: str, gammas: tuple[float, float, float | None], soft: bool, weighted: bool
    ) -> None:
        timm = library("timm")
        of = data(dtype, limit=3.0)  # theirs takes the logarithm of a rounded 1 - p
        t = of.soft if soft else of.t
        factors = {"weight": of.weight, "pos_weight": of.pos_weight} if weighted else {}
        smoothing = 0.2 if weighted else 0.0
        theirs = timm.loss.AsymmetricLossMultiLabel(*gammas, smoothing=smoothing, reduction=reduction, **factors)
        ours = F.asymmetric_loss(
            of.x,
            t,
            gamma_neg=gammas[0],
            gamma_pos=gammas[1],
            clip=gammas[2],
            label_smoothing=smoothing,
            reduction={"batchmean": "sum_classes"}.get(reduction, reduction),
            **factors,
        )
        # Theirs computes in float32 always.
        assert_same(ours, theirs(of.x, t).to(dtype), of.x, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestKornia:
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("alpha", [0.25, None])
    @pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_labels(
        self, dtype: torch.dtype, reduction: str, gamma: float, alpha: float | None, weighted: bool
    ) -> None:
        focal = library("kornia").losses.binary_focal_loss_with_logits
        of = data(dtype)
        factors = {"weight": of.weight, "pos_weight": of.pos_weight} if weighted else {}
        assert_same(
            F.sigmoid_focal_loss(of.x, of.t, alpha, gamma, reduction, **factors),
            focal(of.x, of.t, alpha, gamma, reduction, **factors),
            of.x,
            TOLERANCE[dtype],
        )

    def test_ignored_targets_count_in_the_mean(self, dtype: torch.dtype) -> None:
        focal = library("kornia").losses.binary_focal_loss_with_logits
        of = data(dtype)
        t = of.with_ignored
        for reduction in ("none", "sum"):
            ours = F.sigmoid_focal_loss(of.x, t, reduction=reduction, ignore_value=-1)
            assert_same(ours, focal(of.x, t, reduction=reduction, ignore_index=-1), of.x, TOLERANCE[dtype])
        ours = F.sigmoid_focal_loss(of.x, t, reduction="sum", ignore_value=-1) / of.elements
        assert_same(ours, focal(of.x, t, reduction="mean", ignore_index=-1), of.x, TOLERANCE[dtype])

    def test_factors_of_pictures_belong_to_the_second_dimension(self, dtype: torch.dtype) -> None:
        focal = library("kornia").losses.binary_focal_loss_with_logits
        of = data(dtype)
        x, t = of.x.reshape(4, 6, 4), of.t.reshape(4, 6, 4)
        ours = F.sigmoid_focal_loss(x, t, weight=of.weight.reshape(6, 1), pos_weight=of.pos_weight.reshape(6, 1))
        assert_same(ours, focal(x, t, weight=of.weight, pos_weight=of.pos_weight), of.x, TOLERANCE[dtype])

    def test_soft_targets_weight_the_losses_of_both_labels(self, dtype: torch.dtype) -> None:
        focal = library("kornia").losses.binary_focal_loss_with_logits
        of = data(dtype)
        t = of.soft
        ours = F.sigmoid_focal_loss(of.x, torch.ones_like(t), weight=t) + F.sigmoid_focal_loss(
            of.x, torch.zeros_like(t), weight=1 - t
        )
        assert_same(ours, focal(of.x, t), of.x, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestSegmentationModels:
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("smooth_factor", [None, 0.05, 0.2])
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("soft", [False, True])
    def test_soft_cross_entropy(
        self, dtype: torch.dtype, reduction: str, smooth_factor: float | None, weighted: bool, soft: bool
    ) -> None:
        smp = library("segmentation_models_pytorch")
        of = data(dtype)
        t = of.soft if soft else of.t
        factors = {"weight": of.weight, "pos_weight": of.pos_weight} if weighted else {}
        theirs = smp.losses.SoftBCEWithLogitsLoss(smooth_factor=smooth_factor, reduction=reduction, **factors)
        ours = F.sigmoid_cross_entropy(
            of.x, t, label_smoothing=2 * (smooth_factor or 0.0), reduction=reduction, **factors
        )
        assert_same(ours, theirs(of.x, t), of.x, TOLERANCE[dtype])

    def test_ignored_targets_count_in_the_mean(self, dtype: torch.dtype) -> None:
        smp = library("segmentation_models_pytorch")
        of = data(dtype)
        t = of.with_ignored
        for reduction in REDUCTIONS:
            theirs = smp.losses.SoftBCEWithLogitsLoss(ignore_index=-1, smooth_factor=0.1, reduction=reduction)
            ours = F.sigmoid_cross_entropy(
                of.x,
                t,
                label_smoothing=0.2,
                ignore_value=-1,
                reduction="none" if reduction == "none" else "sum",
            )
            ours = ours / of.elements if reduction == "mean" else ours
            assert_same(ours, theirs(of.x, t), of.x, TOLERANCE[dtype])

    @pytest.mark.parametrize("alpha", [0.25, None])
    @pytest.mark.parametrize("gamma", [0.5, 2.0])
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_focal(self, dtype: torch.dtype, reduction: str, gamma: float, alpha: float | None) -> None:
        smp = library("segmentation_models_pytorch")
        of = data(dtype)
        theirs = smp.losses.FocalLoss("binary", alpha=alpha, gamma=gamma, reduction=reduction)(of.x, of.t)
        ours = F.sigmoid_focal_loss(of.x, of.t, alpha, gamma, reduction)
        assert_same(ours.flatten() if reduction == "none" else ours, theirs, of.x, TOLERANCE[dtype])

    def test_focal_averages_over_what_counts(self, dtype: torch.dtype) -> None:
        smp = library("segmentation_models_pytorch")
        of = data(dtype)
        t = of.with_ignored
        theirs = smp.losses.FocalLoss("binary", alpha=0.25, ignore_index=-1)(of.x, t)
        ours = F.sigmoid_focal_loss(of.x, t, reduction="mean", ignore_value=-1)
        assert_same(ours, theirs, of.x, TOLERANCE[dtype])

    def test_focal_of_labels_is_the_mean_over_labels(self, dtype: torch.dtype) -> None:
        smp = library("segmentation_models_pytorch")
        of = data(dtype)
        theirs = smp.losses.FocalLoss("multilabel", alpha=0.25)(of.x, of.t)
        assert_same(F.sigmoid_focal_loss(of.x, of.t, reduction="mean"), theirs, of.x, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestKeras:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", None])
    @pytest.mark.parametrize("soft", [False, True])
    def test_cross_entropy(self, dtype: torch.dtype, reduction: str | None, smoothing: float, soft: bool) -> None:
        keras = library("keras")
        of = data(dtype)
        t = of.soft if soft else of.t
        loss = keras.losses.BinaryCrossentropy(
            from_logits=True, label_smoothing=smoothing, reduction=reduction, dtype=str(dtype).removeprefix("torch.")
        )
        ours = F.sigmoid_cross_entropy(of.x, t, label_smoothing=smoothing, reduction="none")
        # Keras averages float64 losses in float32.
        assert_same(_reduced_as_keras(ours, reduction), loss(t, of.x).to(dtype), of.x, TOLERANCE[torch.float32])

    def test_cross_entropy_of_each_element(self, dtype: torch.dtype) -> None:
        keras = library("keras")
        of = data(dtype)
        theirs = keras.ops.binary_crossentropy(of.soft, of.x, from_logits=True)
        assert_same(F.sigmoid_cross_entropy(of.x, of.soft, reduction="none"), theirs, of.x, TOLERANCE[dtype])

    @pytest.mark.parametrize("balanced", [False, True])
    @pytest.mark.parametrize("gamma", [0.5, 2.0])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", None])
    def test_focal(
        self, dtype: torch.dtype, reduction: str | None, smoothing: float, gamma: float, balanced: bool
    ) -> None:
        keras = library("keras")
        of = data(dtype)
        loss = keras.losses.BinaryFocalCrossentropy(
            apply_class_balancing=balanced,
            alpha=0.3,
            gamma=gamma,
            from_logits=True,
            label_smoothing=smoothing,
            reduction=reduction,
            dtype=str(dtype).removeprefix("torch."),
        )
        ours = F.sigmoid_focal_loss(of.x, of.t, 0.3 if balanced else None, gamma, label_smoothing=smoothing)
        assert_same(_reduced_as_keras(ours, reduction), loss(of.t, of.x).to(dtype), of.x, TOLERANCE[torch.float32])


def _reduced_as_keras(losses: Tensor, reduction: str | None) -> Tensor:
    """Keras averages over labels before everything else."""
    per_sample = losses.mean(-1)
    return per_sample if reduction is None else per_sample.sum() if reduction == "sum" else per_sample.mean()


@pytest.mark.parametrize("target", [0.0, 1.0])
@pytest.mark.parametrize("module", plot_family.LIBRARIES)
def test_the_exact_losses_are_what_the_library_computes(module: str, target: float) -> None:
    library(module)
    x = torch.linspace(-3, 3, 31)
    for (variant, name), loss in plot_family.others(module).items():
        exact = torch.tensor([variant.exact(logit, target) for logit in x.tolist()], dtype=torch.float64).unbind(1)
        got, gradient = plot_family.with_gradient(loss, x, target)
        for value, true, terms in ((got, exact[0], exact[1]), (gradient, exact[2], exact[3])):
            assert ((value - true).abs() <= 3e-6 * terms + 1e-7).all(), (variant, name)


LOGITS = [-104.0, -88.0, -40.0, -18.5, 18.5, 40.0, 88.0, 104.0]


def _ulp(value: float) -> float:
    """Of a float32; none where that is subnormal."""
    return 2.0 ** (math.frexp(value)[1] - 24) if value >= 2.0**-126 else 0.0


@pytest.mark.parametrize("target", [0.0, 1.0])
@pytest.mark.parametrize("logit", LOGITS)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_ours_is_exact_in_both_tails(variant: Variant, logit: float, target: float) -> None:
    exact = variant.exact(logit, target)
    got = plot_family.with_gradient(variant.ours, torch.tensor([logit]), target)
    # Where the clip divides what is subnormal, csrc/formulas/focal.h allows (1 + gamma) / clip steps.
    steps = (1 + max(variant.gamma_neg, variant.gamma_pos)) / (variant.clip or 1.0) * variant.pos_weight
    for value, true, terms in zip(got, exact[::2], exact[1::2], strict=True):
        assert abs(value.item() - true) <= 20 * _ulp(terms) + steps * 2.0**-149


def test_plot_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plot_family.main(["--points", "53", "--output", str(tmp_path)]) == 0
    written = (tmp_path / "losses_table.md").read_text()
    assert written in capsys.readouterr().out
    ours = [line.split("|") for line in written.splitlines() if "fused_sce**" in line]
    assert len(ours) == len(VARIANTS)
    for row in ours:
        # At most the last one before 0: a few subnormal steps (csrc/formulas/focal.h).
        assert {cell.strip() for cell in row[4:6] + row[7:9]} <= {"0 / 0", "1 / 0", "0 / 1"}
    # the same count finds what torch is known to lose (pytorch#195529)
    (torchs,) = (line for line in written.splitlines() if line.startswith("| cross-entropy | torch `BCE"))
    assert torchs.split("|")[4].strip() != "0 / 0"
    assert 20_000 < (tmp_path / "losses.png").stat().st_size < 200_000
    with pytest.raises(SystemExit):
        plot_family.main(["--points", "1"])


def test_libraries_may_be_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there: Callable[[str], Any] = functools.partial({"torch": torch}.get)
    monkeypatch.setattr(plot_family, "library", there)
    assert plot_family.main(["--points", "3", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name in ("torchvision", "timm", "kornia", "smp", "Keras"):
        assert f"{name} is left out" in printed
    assert "torchvision `" not in (tmp_path / "losses_table.md").read_text()


def test_compare_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert compare_family.main(["--shape", "4x6", "--seconds", "0", "--output", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "compare_family.json").read_text())
    printed = capsys.readouterr().out
    assert written["figures"][0]["ratio_to_plain"] == 1
    for figure in written["figures"]:
        assert figure["name"] in printed
        assert figure["seconds"] > 0
        assert (figure["ratio_to_plain"] is None) == (figure["twin"] is not None)
        assert figure["repetitions"] >= compare_family.MIN_ROUNDS
