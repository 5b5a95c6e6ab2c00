"""The losses as functions: defaults, checks, reduction and divisor; the work is done by `torch.ops.fused_sce`.

Notation of the docstrings: x logit, t target, N samples, C labels; `softplus(x) = max(x, 0) + log1p(exp(-|x|))`. The
loss of one element is `(1 - t) softplus(x) + pos_weight t softplus(-x)`, its gradient `(1 - t) sigmoid(x) - pos_weight
t sigmoid(-x)`, both within 2 units in the last place (ULP) in float32 for t = 0 and t = 1, for every logit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fused_sce import _autograd, _linear
from fused_sce._calls import COUNTED, Call, loss_function, overridable
from fused_sce._checks import TARGET_FORMATS, check_device, check_reduction, parts_of_sparse
from fused_sce._register import autocast_dtype
from fused_sce._torch_private import legacy_reduction

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "asymmetric_loss",
    "binary_cross_entropy_with_logits",
    "linear_sigmoid_cross_entropy",
    "linear_topk",
    "multilabel_soft_margin_loss",
    "sigmoid_contrastive_loss",
    "sigmoid_cross_entropy",
    "sigmoid_focal_loss",
]

REDUCTIONS = ("mean", "sum", "none", "sum_classes")
"""Of the losses that are not torch's."""

SCALAR_REDUCTIONS = ("mean", "sum", "sum_classes")
"""Of these the ones that give a scalar."""

_NO_FOCUS = (0.0, 0.0, 0.0, None)
"""`gamma_pos`, `gamma_neg`, `clip` and `alpha` of the plain loss."""

_LAST_DEFAULTS = (*_NO_FOCUS, None, False, "dense")
"""The options from these on, of a call that does without them."""

_LARGEST_GAMMA = 1e30
"""Finite in float32, and so is its product with the logarithm of the smallest float32."""


@loss_function
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Call:
    """Sigmoid cross-entropy: `torch.nn.functional.binary_cross_entropy_with_logits`, fused.

    Arguments, result and errors are those of `sigmoid_cross_entropy`, with the reductions "mean", "sum" and "none".
    `size_average` and `reduce` are deprecated, see torch.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    check_reduction(reduction)
    return _tensors(input, target, weight, pos_weight), _reduced(input, reduction), False


@loss_function
def sigmoid_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    smoothing_prior: float | Tensor = 0.5,
    target_threshold: float | None = None,
    ignore_value: float | None = None,
    target_format: str = "dense",
    check_target: bool = False,
    inplace: bool = False,
) -> Call:
    """Sigmoid cross-entropy with all options of the kernels.

    Args:
        input: logits, any shape, float32, float64, bfloat16 or float16.
        target: same shape; of these dtypes, bool, uint8 or a signed integer; usually in [0, 1],
            which is checked for integers alone.
        weight: factor of each element's loss; broadcasts to the input's shape.
        pos_weight: factor of the positive term; broadcasts to the input's shape, usually one value per label. A factor
            of 0, this or another one, leaves out what it multiplies, even infinities and NaN, from loss and gradients.
        mask: bool; where it is False, an element does not count: its loss and gradients are 0, whatever its logit,
            target and weights are, infinities and NaN included. Broadcasts to the input's shape.
        reduction: "mean" over all elements that count (0 if `mask` or `ignore_value` leaves none, NaN of an empty
            input), "sum", "none", or "sum_classes": the sum over the last dimension, averaged over all of the others,
            as timm's `BinaryCrossEntropy(sum_classes=True)`.
        label_smoothing: s in [0, 1]: the target t becomes `(1 - s) t + s p`, rounded to the dtype computed in.
        smoothing_prior: p in [0, 1]. 0.5 is Keras's smoothing, 1 / C timm's. A tensor, the frequency of each label for
            example, broadcasts to the input's shape; its values are not checked.
        target_threshold: after the smoothing the target becomes 1 where it is larger, else 0, as timm's. NaN stays NaN.
        ignore_value: where the target equals it, or is NaN as it is, an element does not count. Usually -1, -100 or
            NaN. For class indices it is an index: rows that have it do not count. For other formats it is a label.
        target_format: "dense"; "class_index": `target` of shape (...,) holds the index of the only positive of each row
            of logits (..., C), as timm's `BinaryCrossEntropy` takes it; "packed": (..., ceil(C / 8)) uint8, eight
            labels in a byte, the first in the lowest bit, as `numpy.packbits(labels, -1, "little")` makes it;
            "index_list": (..., K) indices of the positives of each row, padded with -1. A sparse CSR tensor (N, C) is
            taken as it is: its values are the targets, 0 where it has none. Indices that are out of range, or twice in
            a row, are errors, also where `mask` is False.
        check_target: a soft target outside of [0, 1] that counts is an error. Integer targets are always checked. What
            cannot be read is not checked: values in a transform of `torch.func` that is compiled.
        inplace: the gradient overwrites the memory of the logits, which saves memory of their size. Read them (for
            metrics, say) before the loss: afterwards they hold the gradient. A backward pass through another use of
            them, before or after the loss, `backward` for a second time, `create_graph=True` and a gradient by another
            argument are errors. Views, logits that are not contiguous or retain their gradient, tensor subclasses and
            DTensors, compiled programs and transforms of `torch.func` are treated as with False.

    Returns:
        The loss: a scalar, or of the input's shape for "none". Its dtype is the target's if that is floating point,
        else the input's; under autocast float32, or float64 for a float64 target.

    Raises:
        TypeError: An argument is no dense tensor, or has another dtype than these; `weight` and `pos_weight` may have
            those of `target`. `mask` is not of dtype bool, or `ignore_value` no number.
        ValueError: `target`'s shape differs from `input`'s, an integer `target` that counts is not 0 or 1, an index is
            wrong, a target is not in [0, 1] with `check_target` (on a GPU these are failed assertions of the device),
            `reduction` or `target_format` is unknown, "sum_classes" met a scalar, or `label_smoothing` or
            `smoothing_prior` is not in [0, 1].
        RuntimeError: `weight`, `pos_weight` or `mask` does not broadcast, tensors are on different devices, or
            `inplace` would overwrite a leaf that requires grad.
    """
    tensors = _tensors(input, target, weight, pos_weight, mask)
    of_target = OfTarget(label_smoothing, smoothing_prior, target_threshold, ignore_value, target_format, check_target)
    return _described(tensors, reduction, of_target, _NO_FOCUS, inplace)


@loss_function
def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float | Tensor | None = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    smoothing_prior: float | Tensor = 0.5,
    target_threshold: float | None = None,
    ignore_value: float | None = None,
    target_format: str = "dense",
    check_target: bool = False,
    inplace: bool = False,
) -> Call:
    """Focal loss: `torchvision.ops.sigmoid_focal_loss`, fused and right in both tails.

    The loss of an element is `alpha_t (1 - p_t)^gamma` times its sigmoid cross-entropy, where `1 - p_t = t sigmoid(-x)
    + (1 - t) sigmoid(x)` and `alpha_t = alpha t + (1 - alpha) (1 - t)` (T. Lin et al., Focal Loss for Dense Object
    Detection, 2017). `gamma` = 0 without alpha is `sigmoid_cross_entropy`, bit for bit.

    Args:
        inputs: logits, any shape, float32, float64, bfloat16 or float16.
        targets: same shape, in [0, 1]; of these dtypes, bool, uint8 or a signed integer.
        alpha: in [0, 1]; -1 or None: without alpha_t. A tensor broadcasts to the shape of `inputs`, usually one value
            per label, and may require a gradient; its values are not checked.
        gamma: at least 0; an integer up to 7 is the fastest.
        reduction: "none", "mean", "sum" or "sum_classes".
        weight: as in `sigmoid_cross_entropy`, and so are the following.
        pos_weight: factor of the positive term.
        mask: bool; where it is False, an element does not count.
        label_smoothing: in [0, 1].
        smoothing_prior: in [0, 1].
        target_threshold: makes labels of soft targets.
        ignore_value: a target that does not count.
        target_format: "dense", "class_index", "packed" or "index_list".
        check_target: soft targets outside of [0, 1] are errors.
        inplace: the gradient overwrites the memory of the logits.

    Returns:
        The loss: a scalar, or of the shape of `inputs` for "none". Its dtype is that to which torch promotes inputs and
        targets; under autocast float32, or float64 for float64 targets.

    Raises:
        TypeError, ValueError, RuntimeError: As in `sigmoid_cross_entropy`, and for `alpha` and `gamma`.
    """
    check_gammas(gamma=gamma)
    label_alpha = alpha if isinstance(alpha, Tensor) else None
    tensors = _tensors(inputs, targets, weight, pos_weight, mask, label_alpha)
    of_target = OfTarget(label_smoothing, smoothing_prior, target_threshold, ignore_value, target_format, check_target)
    return _described(tensors, reduction, of_target, (gamma, gamma, 0.0, check_alpha(alpha)), inplace, promotes=True)


@loss_function
def asymmetric_loss(
    input: Tensor,
    target: Tensor,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float | None = 0.05,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    smoothing_prior: float | Tensor = 0.5,
    target_threshold: float | None = None,
    ignore_value: float | None = None,
    target_format: str = "dense",
    check_target: bool = False,
    inplace: bool = False,
) -> Call:
    """Asymmetric loss: timm's `AsymmetricLossMultiLabel`, fused and right in both tails.

    With `q = max(sigmoid(x) - clip, 0)` the loss of an element is `m^g (pos_weight t softplus(-x) - (1 - t) log(1 -
    q))`, where `m = t sigmoid(-x) + (1 - t) q` and `g = gamma_pos t + gamma_neg (1 - t)` (E. Ben-Baruch et al.,
    Asymmetric Loss for Multi-Label Classification, 2020). With gammas and clip of 0 it is `sigmoid_cross_entropy`, bit
    for bit.

    Args:
        input: logits, any shape, float32, float64, bfloat16 or float16.
        target: same shape, in [0, 1]; of these dtypes, bool, uint8 or a signed integer.
        gamma_neg: of negatives, at least 0; integers up to 7 are the fastest.
        gamma_pos: of positives.
        clip: in [0, 1): a negative with at most this probability has a loss of 0. None is 0.
        reduction: "none", "mean", "sum" or "sum_classes", which is timm's default, "batchmean".
        weight: as in `sigmoid_cross_entropy`, and so are the following.
        pos_weight: factor of the positive term.
        mask: bool; where it is False, an element does not count.
        label_smoothing: in [0, 1].
        smoothing_prior: in [0, 1].
        target_threshold: makes labels of soft targets.
        ignore_value: a target that does not count.
        target_format: "dense", "class_index", "packed" or "index_list".
        check_target: soft targets outside of [0, 1] are errors.
        inplace: the gradient overwrites the memory of the logits.

    Returns:
        As `sigmoid_cross_entropy`.

    Raises:
        TypeError, ValueError, RuntimeError: As in `sigmoid_cross_entropy`, and for `gamma_neg`, `gamma_pos` and `clip`.
    """
    check_gammas(gamma_neg=gamma_neg, gamma_pos=gamma_pos)
    tensors = _tensors(input, target, weight, pos_weight, mask)
    of_target = OfTarget(label_smoothing, smoothing_prior, target_threshold, ignore_value, target_format, check_target)
    return _described(tensors, reduction, of_target, (gamma_pos, gamma_neg, check_clip(clip), None), inplace)


@overridable
def linear_sigmoid_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float | Tensor | None = None,
    loss_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    mask: Tensor | None = None,
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
    chunk_bytes: int = _linear.CHUNK_BYTES,
) -> Tensor:
    """A linear layer and its sigmoid cross-entropy in one, without the memory of the logits.

    The loss of the logits `logit_scale * (input @ weight.T) + bias`, chunk by chunk of the labels. Forward makes the
    gradients too, so that training takes one chunk of logits and the gradients, whatever the number of labels C, and no
    longer than the layer and the loss by themselves. In float16 backward makes them, and the logits again: divided by
    a large batch they would underflow in forward.

    Args:
        input: features (..., D), float32, float64, bfloat16 or float16.
        weight: (C, D), of the same dtype, or of any under autocast.
        target: of the logits' shape (..., C), or as `target_format` says, or a sparse CSR tensor (N, C). On a GPU a
            sparse tensor makes the host wait, once for each chunk.
        bias: (C,)
        logit_scale: a number, or a tensor with one.
        loss_weight: `weight` of `sigmoid_cross_entropy`: factor of each element's loss.
        pos_weight: as in `sigmoid_cross_entropy`, as are the following; they broadcast to the logits' shape. One
            that has some but not all of more than two dimensions is copied for each row.
        mask: bool; where it is False, an element does not count.
        reduction: "mean", "sum" or "sum_classes".
        gamma_neg: as in `asymmetric_loss`; equal to `gamma_pos` for the focal loss.
        gamma_pos: the same.
        clip: the same.
        alpha: as in `sigmoid_focal_loss`.
        label_smoothing: in [0, 1].
        smoothing_prior: in [0, 1].
        target_threshold: makes labels of soft targets.
        ignore_value: a target that does not count.
        target_format: "dense", "class_index", "packed" or "index_list".
        check_target: soft targets outside of [0, 1] are errors.
        chunk_bytes: how much memory the logits of a chunk may take; 64 MiB by default.

    Returns:
        The loss, a scalar, of the dtype that `sigmoid_cross_entropy` gives it. It is differentiable in `input`,
        `weight`, `bias` and `logit_scale`, once. The gradient by `input` is added up in float32 for 16-bit types. In
        transforms of `torch.func`, forward-mode AD and exports to ONNX the logits are made after all.

    Raises:
        TypeError, ValueError, RuntimeError: As in `sigmoid_cross_entropy`, and for features, devices and dtypes that do
            not fit, `chunk_bytes` that does not hold the logits of one label, a target or a factor that requires a
            gradient, and a second derivative.
    """
    check_gammas(gamma_neg=gamma_neg, gamma_pos=gamma_pos)
    focus = gamma_pos, gamma_neg, check_clip(clip), check_alpha(alpha)
    of_target = OfTarget(label_smoothing, smoothing_prior, target_threshold, ignore_value, target_format, check_target)
    label_alpha = alpha if isinstance(alpha, Tensor) else None

    def describe(logits: Tensor) -> Call:
        _linear.check_shape(logits, target, target_format)
        tensors = _tensors(logits, target, loss_weight, pos_weight, mask, label_alpha)
        return _described(tensors, reduction, of_target, focus, inplace=False)

    check_reduction(reduction, SCALAR_REDUCTIONS)
    return _linear.loss(_linear.Layer(input, weight, bias), logit_scale, chunk_bytes, describe)


@overridable
def linear_topk(
    input: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    logit_scale: float | Tensor | None = None,
    chunk_bytes: int = _linear.CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """The k most probable labels of a linear layer, without the memory of the logits: `torch.topk` of these.

    Args:
        input: features (..., D), as are the others in `linear_sigmoid_cross_entropy`.
        weight: (C, D)
        k: at least 1, at most C.
        bias: (C,)
        logit_scale: a number, or a tensor with one.
        chunk_bytes: how much memory the logits of a chunk of labels may take; 64 MiB by default.

    Returns:
        `values`, the k largest logits of each row (..., k), the largest first, and `indices`, their labels. They have
        no gradient. Of equal logits any may come first, as in `torch.topk`.

    Raises:
        TypeError, ValueError, RuntimeError: As in `linear_sigmoid_cross_entropy`, and for `k`.
    """
    return _linear.topk(_linear.Layer(input, weight, bias), k, logit_scale, chunk_bytes)


@overridable
def sigmoid_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    group: ProcessGroup | None = None,
    chunk_bytes: int = _linear.CHUNK_BYTES,
) -> Tensor:
    """The loss of SigLIP, without the memory of the logits of all pairs: open_clip's `SigLipLoss`.

    Each picture is compared with each text; only the text of its own row belongs to it. The loss is the sigmoid
    cross-entropy of the logits `logit_scale * image_features @ text_features.T + logit_bias`, summed over the texts
    and averaged over the pictures (X. Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023).

    Args:
        image_features: (N, D), normalised as a rule.
        text_features: (N, D)
        logit_scale: a number, or a tensor with one: the factor itself, not its logarithm.
        logit_bias: the same.
        group: `torch.distributed.group.WORLD`, or another one whose ranks have pictures and texts of their own. The
            pictures of each rank are compared with the texts of all, which go round a ring of the ranks: memory does
            not grow with their number. All must call this together, with as many texts and, in backward, the same
            upstream factor.
        chunk_bytes: how much memory the logits of a chunk of texts may take; 64 MiB by default.

    Returns:
        The loss, a scalar, differentiable in all four, once. With `group` it is that of this rank's pictures, and the
        gradient by its texts is that of the sum over the ranks; as open_clip's, to be averaged by
        `DistributedDataParallel`.

    Raises:
        ValueError: The shapes differ, or the ranks have different ones (on a GPU a failed assertion of the device).
        TypeError, ValueError, RuntimeError: As in `linear_sigmoid_cross_entropy`.
    """
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        _linear.check_part(name, features, image_features, "image_features")
    if image_features.dim() != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            "image_features and text_features must have the same shape (N, D), got "
            f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
    bias = None
    if logit_scale is None:
        raise TypeError("logit_scale must be a number or a tensor, got NoneType")
    if logit_bias is not None:
        if not isinstance(logit_bias, Tensor | float | int):
            raise TypeError(f"logit_bias must be a number, a tensor or None, got {type(logit_bias).__name__}")
        if not isinstance(logit_bias, Tensor):
            logit_bias = text_features.new_full((), logit_bias)  # on a GPU without waiting for it
        if logit_bias.numel() != 1:
            raise ValueError(f"logit_bias must be one number, got a tensor of shape {tuple(logit_bias.shape)}")
        check_device("logit_bias", logit_bias.reshape(()), text_features)
        bias = logit_bias.to(text_features.device, text_features.dtype)
        bias = bias.reshape(()).expand(len(text_features))
    own = torch.arange(len(text_features), device=text_features.device)
    of_target = OfTarget(0.0, 0.5, None, None, "class_index", False)

    def describe(logits: Tensor) -> Call:
        return _described(_tensors(logits, own), "sum_classes", of_target, _NO_FOCUS, inplace=False)

    layer = _linear.Layer(image_features, text_features, bias)
    return _linear.loss(layer, logit_scale, chunk_bytes, describe, group)


class OfTarget(NamedTuple):
    """The options that say what a target means."""

    label_smoothing: float
    smoothing_prior: float | Tensor
    target_threshold: float | None
    ignore_value: float | None
    target_format: str
    check_target: bool


def _tensors(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    mask: Tensor | None = None,
    label_alpha: Tensor | None = None,
) -> _autograd.Tensors:
    """The tensors of the op."""
    return input, target, weight, pos_weight, None, mask, label_alpha, None, None, None


def _described(
    tensors: _autograd.Tensors,
    reduction: str,
    of_target: OfTarget,
    focus: tuple[Any, ...],
    inplace: bool,
    promotes: bool = False,
) -> Call:
    """The call of a loss of ours; `focus` are the options `gamma_pos`, `gamma_neg`, `clip` and `alpha`.

    `promotes`: the dtype of the loss is that to which torch promotes input and target.
    """
    input, target, weight, pos_weight, count, mask, label_alpha, prior, columns, rows = tensors
    check_reduction(reduction, REDUCTIONS)
    check_target_options(of_target)
    smoothing, smoothing_prior, threshold, ignore_value, target_format, check_target = of_target
    if isinstance(smoothing_prior, Tensor):
        prior, smoothing_prior = smoothing_prior, 0.5
    if target.layout is not torch.strided:
        target, columns, rows = parts_of_sparse(target, input, target_format)
        target_format = "csr"
    added_up, dtype, divisor = _reduced(input, reduction)
    if promotes and input.dtype != target.dtype and autocast_dtype(input, target) is None:
        dtype = torch.promote_types(input.dtype, target.dtype)
    if reduction == "mean" and (mask is not None or ignore_value is not None):
        count, divisor = COUNTED, 1
    options = (added_up, dtype, divisor, smoothing, smoothing_prior, ignore_value)
    last = (*focus, threshold, check_target, target_format)
    if last != _LAST_DEFAULTS:
        options = (*options, *last)
    return (input, target, weight, pos_weight, count, mask, label_alpha, prior, columns, rows), options, inplace


@loss_function
def multilabel_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Call:
    """Sigmoid cross-entropy averaged over labels: `torch.nn.functional.multilabel_soft_margin_loss`, fused.

    Arguments and errors are those of `sigmoid_cross_entropy`, but for logits of shape (N, C) or (..., C), a factor
    `weight` of each label, usually of shape (C,), and the reductions "mean" and "sum" over samples and "none".
    `size_average` and `reduce` are deprecated, see torch.

    Returns:
        The loss: a scalar, or of shape (N,) (`input.shape[:-1]`) for "none": one value per sample. Its dtype is that to
        which torch promotes input, target and weight; under autocast float32, or float64 for a float64 target.

    Raises:
        IndexError: `input` has no dimension.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    check_reduction(reduction)
    if input.dim() == 0:
        raise IndexError("input must have a last dimension, the labels, but it is a scalar")
    dtype: torch.dtype | None = None
    mixed = input.dtype != target.dtype or (weight is not None and weight.dtype != input.dtype)
    if mixed and autocast_dtype(input, target) is None:
        dtype = torch.promote_types(input.dtype, target.dtype)
        if weight is not None and weight.dim() > 0:
            dtype = torch.promote_types(dtype, weight.dtype)
    divisor = input.numel() if reduction == "mean" else input.size(-1)
    if divisor == 0 and reduction == "sum" and input.shape[:-1].numel() == 0:
        divisor = 1  # the sum of no samples is 0, as torch's, not 0 / 0
    options = ("rows" if reduction == "none" else "sum", dtype, divisor)
    return _tensors(input, target, weight), options, False


def check_target_options(options: OfTarget) -> None:
    """Check the options that say what a target means.

    Raises:
        TypeError: One is no number, or no string.
        ValueError: One has a value that it cannot have.
        RuntimeError: `smoothing_prior` requires a gradient.
    """
    smoothing, prior, threshold, ignore_value, target_format, check_target = options
    if isinstance(prior, Tensor) and prior.requires_grad:
        raise RuntimeError("smoothing_prior has no gradient: pass smoothing_prior.detach()")
    fractions: dict[str, Any] = {
        "label_smoothing": smoothing,
        "smoothing_prior": 0.5 if isinstance(prior, Tensor) else prior,
    }
    for name, value in fractions.items():
        if not isinstance(value, float | int | torch.SymFloat):
            kinds = "a number or a tensor" if name == "smoothing_prior" else "a number"
            raise TypeError(f"{name} must be {kinds}, got {type(value).__name__}")
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    for name, number in (("ignore_value", ignore_value), ("target_threshold", threshold)):
        if number is not None and not isinstance(number, float | int | torch.SymFloat):
            raise TypeError(f"{name} must be a number or None, got {type(number).__name__}")
    if not isinstance(check_target, bool):
        raise TypeError(f"check_target must be True or False, got {type(check_target).__name__}")
    if threshold is not None and math.isnan(threshold):
        raise ValueError("target_threshold must not be NaN")
    if target_format not in TARGET_FORMATS:
        raise ValueError(
            f"{target_format} is not a valid value for target_format: it must be one of {', '.join(TARGET_FORMATS)}"
        )


def check_gammas(**gammas: float) -> None:
    """Check the exponents of a focal or asymmetric loss.

    Raises:
        TypeError: One of them is no number.
        ValueError: One of them is negative, NaN or too large.
    """
    for name, value in gammas.items():
        if not isinstance(value, float | int | torch.SymFloat):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not 0.0 <= value <= _LARGEST_GAMMA:
            raise ValueError(f"{name} must be at least 0 and at most {_LARGEST_GAMMA}, got {value}")


def check_clip(clip: float | None) -> float:
    """Check that option of `asymmetric_loss`, and give its number.

    Raises:
        TypeError: It is no number.
        ValueError: It is not in [0, 1).
    """
    if clip is None:
        return 0.0
    if not isinstance(clip, float | int | torch.SymFloat):
        raise TypeError(f"clip must be a number or None, got {type(clip).__name__}")
    if not 0.0 <= clip < 1.0:
        raise ValueError(f"clip must be in [0, 1), got {clip}")
    return clip


def check_alpha(alpha: float | Tensor | None) -> float | None:
    """Check that argument of `sigmoid_focal_loss`, and give the op's option.

    Raises:
        TypeError: It is neither a number nor a tensor.
        ValueError: It is a number, but neither in [0, 1] nor -1.
    """
    if alpha is None or isinstance(alpha, Tensor):
        return None
    if not isinstance(alpha, float | int | torch.SymFloat):
        raise TypeError(f"alpha must be a number, a tensor or None, got {type(alpha).__name__}")
    if not 0.0 <= alpha <= 1.0 and alpha != -1.0:
        raise ValueError(f"alpha must be in [0, 1], or -1 for none, got {alpha}")
    return None if alpha == -1.0 else alpha


def _reduced(input: Tensor, reduction: str) -> _autograd.Options:
    """The op's first options for a reduction: what it adds up, the default dtype, and what divides the sum."""
    if reduction == "mean":
        return "sum", None, input.numel()
    if reduction == "sum_classes":
        if input.dim() == 0:
            raise ValueError('reduction="sum_classes" sums over the last dimension, but input is a scalar')
        return "sum", None, math.prod(input.shape[:-1])  # unlike Size.numel() symbolic where the sizes are
    return reduction, None, 1
