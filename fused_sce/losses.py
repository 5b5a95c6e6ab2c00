"""The losses as modules, with the constructors and attributes of torch's."""

# Without `from __future__ import annotations`: the signatures are those of torch's modules.
from typing import Any

from torch import Tensor, nn

from fused_sce import functional
from fused_sce._checks import check_reduction, expect_tensor, positive
from fused_sce._linear import CHUNK_BYTES
from fused_sce._torch_private import factor_of, refuse_torchscript

__all__ = [
    "AsymmetricLoss",
    "BCEWithLogitsLoss",
    "LinearSigmoidCrossEntropyLoss",
    "MultiLabelSoftMarginLoss",
    "SigmoidCrossEntropyLoss",
    "SigmoidFocalLoss",
]


class _KeepsParameters(nn.Module):
    """Keeps a parameter that is given for a buffer a parameter: `module.to` puts copies in the place of buffers."""

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if isinstance(tensor, nn.Parameter):
            self.register_parameter(name, tensor)
        else:
            super().register_buffer(name, tensor, persistent)


@refuse_torchscript
class BCEWithLogitsLoss(_KeepsParameters, nn.BCEWithLogitsLoss):
    """Drop-in for `torch.nn.BCEWithLogitsLoss`: fused, right in both tails.

    A subclass of torch's module: `isinstance` checks, `repr`, state dicts and pickles go on working.

    `weight` and `pos_weight` are buffers, or parameters if they are given as such. All arguments, shapes and errors are
    those of `fused_sce.functional.binary_cross_entropy_with_logits`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits `input` for `target`."""
        return functional.binary_cross_entropy_with_logits(
            input,
            target,
            factor_of(self, "weight"),
            reduction=self.reduction,
            pos_weight=factor_of(self, "pos_weight"),
        )


@refuse_torchscript
class MultiLabelSoftMarginLoss(_KeepsParameters, nn.MultiLabelSoftMarginLoss):
    """Drop-in for `torch.nn.MultiLabelSoftMarginLoss`: fused, where torch's takes 21 passes over memory.

    `weight` is a buffer, or a parameter if it is given as such. All arguments, shapes and errors are those of
    `fused_sce.functional.multilabel_soft_margin_loss`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits `input` for `target`."""
        weight = factor_of(self, "weight")
        return functional.multilabel_soft_margin_loss(input, target, weight, reduction=self.reduction)


def _set(module: nn.Module, name: str, value: Any) -> None:
    """Keep an option: as a buffer if it is a tensor, one value for each label.

    Raises:
        ValueError: It is a tensor on the CPU with a value outside of [0, 1].
    """
    if not isinstance(value, Tensor):
        setattr(module, name, value)
        return
    if value.is_cpu and not bool(((value >= 0) & (value <= 1)).all()):
        wrong = value[~((value >= 0) & (value <= 1))].flatten()[0].item()
        raise ValueError(f"{name} must be in [0, 1] everywhere, got {wrong}")
    module.register_buffer(name, value)


def _shown(value: object) -> object:
    """A value in the repr of a module."""
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else value


class _SigmoidLoss(_KeepsParameters):
    """What our own losses have in common: factors, the reduction and the options of the target."""

    _factors: tuple[str, ...] = ("weight", "pos_weight")
    _reductions: tuple[str, ...] = functional.REDUCTIONS
    weight: Tensor | None
    pos_weight: Tensor | None
    # Defaults for pickles of a version without these options.
    label_smoothing = 0.0
    smoothing_prior: float | Tensor
    target_threshold: float | None = None
    ignore_value: float | None = None
    target_format = "dense"
    check_target = False
    inplace = False

    def __init__(
        self,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        reduction: str,
        of_target: functional.OfTarget,
        inplace: bool,
    ) -> None:
        super().__init__()
        check_reduction(reduction, self._reductions)
        functional.check_target_options(of_target)
        for name, factor in zip(self._factors, (weight, pos_weight), strict=True):
            if factor is not None:
                expect_tensor(name, factor)
            self.register_buffer(name, factor)
        self.reduction = reduction
        for name, value in of_target._asdict().items():
            _set(self, name, value)
        self.inplace = inplace

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if not hasattr(self, "smoothing_prior"):  # A default of the class would hide a buffer.
            self.smoothing_prior = 0.5

    def _options(self) -> dict[str, Any]:
        return {  # name by name: a loop takes 1 us more
            "weight": factor_of(self, "weight"),
            "pos_weight": factor_of(self, "pos_weight"),
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            "smoothing_prior": self.smoothing_prior,
            "target_threshold": self.target_threshold,
            "ignore_value": self.ignore_value,
            "target_format": self.target_format,
            "check_target": self.check_target,
            "inplace": self.inplace,
        }

    def extra_repr(self) -> str:
        """The arguments shown in the module's repr."""
        shown = f"reduction={self.reduction!r}"
        if self.label_smoothing:
            shown += f", label_smoothing={self.label_smoothing}, smoothing_prior={_shown(self.smoothing_prior)}"
        for name in ("target_threshold", "ignore_value"):
            if getattr(self, name) is not None:
                shown += f", {name}={getattr(self, name)}"
        if self.target_format != "dense":
            shown += f", target_format={self.target_format!r}"
        return shown + ", check_target=True" * self.check_target + ", inplace=True" * self.inplace


@refuse_torchscript
class SigmoidCrossEntropyLoss(_SigmoidLoss):
    """Sigmoid cross-entropy with all options of the kernels.

    `weight`, `pos_weight` and `smoothing_prior`, if it is a tensor, are buffers, the first two parameters if they are
    given as such. All arguments, shapes and errors of a call are those of `fused_sce.functional.sigmoid_cross_entropy`.

    Raises:
        TypeError: `weight` or `pos_weight` is no tensor.
        ValueError: `reduction` or `target_format` is unknown, or `label_smoothing` or `smoothing_prior`, a number or a
            tensor, is not in [0, 1].
    """

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        smoothing_prior: float | Tensor = 0.5,
        target_threshold: float | None = None,
        ignore_value: float | None = None,
        target_format: str = "dense",
        check_target: bool = False,
        inplace: bool = False,
    ) -> None:
        of_target = functional.OfTarget(
            label_smoothing, smoothing_prior, target_threshold, ignore_value, target_format, check_target
        )
        super().__init__(weight, pos_weight, reduction, of_target, inplace)

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of logits `input` for `target`, of the elements for which `mask` is True."""
        return functional.sigmoid_cross_entropy(input, target, mask=mask, **self._options())


@refuse_torchscript
class SigmoidFocalLoss(_SigmoidLoss):
    """Focal loss: `torchvision.ops.sigmoid_focal_loss` as a module, fused and right in both tails.

    `alpha`, if it is a tensor, `weight` and `pos_weight` are buffers, or parameters if they are given as such. All
    arguments, shapes and errors of a call are those of `fused_sce.functional.sigmoid_focal_loss`, with the reduction
    "mean" by default.

    Raises:
        TypeError: `weight` or `pos_weight` is no tensor, `alpha` neither a number nor a tensor, or `gamma` no number.
        ValueError: `reduction` or `target_format` is unknown, or a number, also in a tensor, is out of its range.
    """

    alpha: float | Tensor | None

    def __init__(
        self,
        alpha: float | Tensor | None = 0.25,
        gamma: float = 2.0,
        reduction: str = "mean",
        *,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        smoothing_prior: float | Tensor = 0.5,
        target_threshold: float | None = None,
        ignore_value: float | None = None,
        target_format: str = "dense",
        check_target: bool = False,
        inplace: bool = False,
    ) -> None:
        of_target = functional.OfTarget(
            label_smoothing, smoothing_prior, target_threshold, ignore_value, target_format, check_target
        )
        super().__init__(weight, pos_weight, reduction, of_target, inplace)
        functional.check_gammas(gamma=gamma)
        functional.check_alpha(alpha)
        _set(self, "alpha", alpha)
        self.gamma = gamma

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of logits `input` for `target`, of the elements for which `mask` is True."""
        return functional.sigmoid_focal_loss(input, target, self.alpha, self.gamma, mask=mask, **self._options())

    def extra_repr(self) -> str:
        """The arguments shown in the module's repr."""
        return f"alpha={_shown(self.alpha)}, gamma={self.gamma}, {super().extra_repr()}"


@refuse_torchscript
class AsymmetricLoss(_SigmoidLoss):
    """Asymmetric loss: timm's `AsymmetricLossMultiLabel`, fused and right in both tails.

    `weight` and `pos_weight` are buffers, or parameters if they are given as such. All arguments, shapes and errors of
    a call are those of `fused_sce.functional.asymmetric_loss`.

    Raises:
        TypeError: `weight` or `pos_weight` is no tensor, or an option no number.
        ValueError: `reduction` or `target_format` is unknown, or a number, also in a tensor, is out of its range.
    """

    def __init__(
        self,
        *,
        gamma_neg: float = 4.0,
        gamma_pos: float = 1.0,
        clip: float | None = 0.05,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        smoothing_prior: float | Tensor = 0.5,
        target_threshold: float | None = None,
        ignore_value: float | None = None,
        target_format: str = "dense",
        check_target: bool = False,
        inplace: bool = False,
    ) -> None:
        of_target = functional.OfTarget(
            label_smoothing, smoothing_prior, target_threshold, ignore_value, target_format, check_target
        )
        super().__init__(weight, pos_weight, reduction, of_target, inplace)
        functional.check_gammas(gamma_neg=gamma_neg, gamma_pos=gamma_pos)
        functional.check_clip(clip)
        self.gamma_neg = gamma_neg
        self.gamma_pos = gamma_pos
        self.clip = clip

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of logits `input` for `target`, of the elements for which `mask` is True."""
        return functional.asymmetric_loss(
            input,
            target,
            gamma_neg=self.gamma_neg,
            gamma_pos=self.gamma_pos,
            clip=self.clip,
            mask=mask,
            **self._options(),
        )

    def extra_repr(self) -> str:
        """The arguments shown in the module's repr."""
        return f"gamma_neg={self.gamma_neg}, gamma_pos={self.gamma_pos}, clip={self.clip}, {super().extra_repr()}"


@refuse_torchscript
class LinearSigmoidCrossEntropyLoss(_SigmoidLoss):
    """A linear layer and its loss in one, without the memory of the logits, for many thousands of labels.

    The layer is given in each call. `alpha` and `smoothing_prior`, if they are tensors, `loss_weight` and `pos_weight`
    are buffers. All arguments, shapes and errors of a call are those of
    `fused_sce.functional.linear_sigmoid_cross_entropy`.

    Raises:
        TypeError: `loss_weight` or `pos_weight` is no tensor, or an option no number.
        ValueError: `reduction` or `target_format` is unknown, or a number, also in a tensor, is out of its range.
    """

    _factors = ("loss_weight", "pos_weight")
    _reductions = functional.SCALAR_REDUCTIONS
    loss_weight: Tensor | None

    def __init__(
        self,
        *,
        loss_weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        reduction: str = "mean",
        gamma_neg: float = 0.0,
        gamma_pos: float = 0.0,
        clip: float | None = 0.0,
        alpha: float | Tensor | None = None,
        label_smoothing: float = 0.0,
        smoothing_prior: float | Tensor = 0.5,
        target_threshold: float | None = None,
        ignore_value: float | None = None,
        target_format: str = "dense",
        check_target: bool = False,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        of_target = functional.OfTarget(
            label_smoothing, smoothing_prior, target_threshold, ignore_value, target_format, check_target
        )
        super().__init__(loss_weight, pos_weight, reduction, of_target, inplace=False)
        functional.check_gammas(gamma_neg=gamma_neg, gamma_pos=gamma_pos)
        functional.check_clip(clip)
        functional.check_alpha(alpha)
        _set(self, "alpha", alpha)
        self.gamma_neg = gamma_neg
        self.gamma_pos = gamma_pos
        self.clip = clip
        self.chunk_bytes = positive("chunk_bytes", chunk_bytes)

    def _options(self) -> dict[str, Any]:
        of_loss = "reduction", "gamma_neg", "gamma_pos", "clip", "alpha", "chunk_bytes"
        names = (*self._factors, *of_loss, *functional.OfTarget._fields)
        return {name: getattr(self, name) for name in names}

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        *,
        logit_scale: float | Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of features `input` (..., D) and a layer of `weight` (C, D) and `bias` (C,) for `target`."""
        return functional.linear_sigmoid_cross_entropy(
            input, weight, target, bias, logit_scale=logit_scale, mask=mask, **self._options()
        )

    def extra_repr(self) -> str:
        """The arguments shown in the module's repr."""
        shown = super().extra_repr()
        for name in ("gamma_neg", "gamma_pos", "clip", "alpha"):
            value = getattr(self, name)
            if isinstance(value, Tensor) or value:
                shown += f", {name}={_shown(value)}"
        return f"{shown}, chunk_bytes={self.chunk_bytes}"
