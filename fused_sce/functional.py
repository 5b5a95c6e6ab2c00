"""The losses as functions: defaults, checks, reduction and divisor; the work is done by `torch.ops.fused_sce`.

Notation of the docstrings: x logit, t target, N samples, C labels; `softplus(x) = max(x, 0) + log1p(exp(-|x|))`. The
loss of one element is `(1 - t) softplus(x) + pos_weight t softplus(-x)`, its gradient `(1 - t) sigmoid(x) - pos_weight
t sigmoid(-x)`, both within 2 units in the last place (ULP) in float32 for t = 0 and t = 1, for every logit.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fused_sce import _autograd, _library, _sharding, reference
from fused_sce._checks import check_labels, check_reduction, check_tensors
from fused_sce._register import autocast_dtype
from fused_sce._torch_private import (
    is_differentiating,
    is_exporting_to_onnx,
    is_forward_mode,
    is_plain_eager,
    is_tracing,
    is_transforming,
    legacy_reduction,
    refuse_torchscript,
)

__all__ = [
    "asymmetric_loss",
    "binary_cross_entropy_with_logits",
    "multilabel_soft_margin_loss",
    "sigmoid_cross_entropy",
    "sigmoid_focal_loss",
]

Arguments = ParamSpec("Arguments")

REDUCTIONS = ("mean", "sum", "none", "sum_classes")
"""Of the losses that are not torch's."""

Call = tuple[_autograd.Tensors, _autograd.Options, bool]
"""What a loss asks of the op: tensors, options and whether in place. A count of `_COUNTED` is still to be made."""


def _loss_function(describe: Callable[Arguments, Call]) -> Callable[Arguments, Tensor]:
    """Make a loss of a function that describes its call of the op.

    It gets what torch's own functions have: `__torch_function__`, and errors that explain themselves.
    """
    signature = inspect.signature(describe).replace(return_annotation="Tensor")

    @functools.wraps(describe)
    def loss(*args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return _call_traced(*describe(*args, **kwargs))
        tensors = (*args, *kwargs.values())
        if has_torch_function(tensors):
            overridden: Tensor = handle_torch_function(loss, tensors, *args, **kwargs)
            return overridden
        try:
            return _call(*describe(*args, **kwargs))
        except Exception:
            _explain(signature, *args, **kwargs)
            raise

    loss.__signature__ = signature  # type: ignore[attr-defined]
    return refuse_torchscript(loss)


def _explain(signature: inspect.Signature, *args: Any, **kwargs: Any) -> None:
    """Raise the error that says what is wrong with the arguments of a failed call, if that is what made it fail."""
    try:
        arguments = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return  # what the call itself raised names the function
    input, target = (arguments.pop(name) for name in list(arguments)[:2])
    weight, pos_weight, mask, alpha = (arguments.get(name) for name in ("weight", "pos_weight", "mask", "alpha"))
    if not isinstance(alpha, Tensor):
        alpha = None
    try:
        check_tensors(input, target, weight, pos_weight, mask, alpha)
        check_labels(target, mask, arguments.get("ignore_value"))
    except Exception as explanation:
        raise explanation from None


@_loss_function
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
    return (input, target, weight, pos_weight, None, None, None), _reduced(input, reduction), False


@_loss_function
def sigmoid_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    smoothing_prior: float = 0.5,
    ignore_value: float | None = None,
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
        reduction: "mean" over all elements that count, 0 if there is none; "sum"; "none"; or "sum_classes": the sum
            over the last dimension, averaged over the others, as timm's `BinaryCrossEntropy(sum_classes=True)`.
        label_smoothing: s in [0, 1]: the target t becomes `(1 - s) t + s p`, rounded to the dtype computed in.
        smoothing_prior: p in [0, 1]. 0.5 is Keras's smoothing, 1 / C timm's.
        ignore_value: where the target equals it, or is NaN as it is, an element does not count. Usually -1, -100 or
            NaN.
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
        ValueError: `target`'s shape differs from `input`'s, an integer `target` that counts is not 0 or 1 (on a GPU
            this is a failed assertion of the device), `reduction` is unknown, "sum_classes" met a scalar, or
            `label_smoothing` or `smoothing_prior` is not in [0, 1].
        RuntimeError: `weight`, `pos_weight` or `mask` does not broadcast, tensors are on different devices, or
            `inplace` would overwrite a leaf that requires grad.
    """
    return _described(
        (input, target, weight, pos_weight, None, mask, None),
        reduction,
        (label_smoothing, smoothing_prior, ignore_value),
        inplace,
    )


@_loss_function
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
    smoothing_prior: float = 0.5,
    ignore_value: float | None = None,
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
            per label, and may require a gradient.
        gamma: at least 0; an integer up to 7 is the fastest.
        reduction: "none", "mean", "sum" or "sum_classes".
        weight: as in `sigmoid_cross_entropy`, and so are the following.
        pos_weight: factor of the positive term.
        mask: bool; where it is False, an element does not count.
        label_smoothing: in [0, 1].
        smoothing_prior: in [0, 1].
        ignore_value: a target that does not count.
        inplace: the gradient overwrites the memory of the logits.

    Returns:
        The loss: a scalar, or of the shape of `inputs` for "none". Its dtype is that to which torch promotes inputs and
        targets; under autocast float32, or float64 for float64 targets.

    Raises:
        TypeError, ValueError, RuntimeError: As in `sigmoid_cross_entropy`, and for `alpha` and `gamma`.
    """
    check_gammas(gamma=gamma)
    label_alpha = alpha if isinstance(alpha, Tensor) else None
    return _described(
        (inputs, targets, weight, pos_weight, None, mask, label_alpha),
        reduction,
        (label_smoothing, smoothing_prior, ignore_value, gamma, gamma, 0.0, check_alpha(alpha)),
        inplace,
        promotes=True,
    )


@_loss_function
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
    smoothing_prior: float = 0.5,
    ignore_value: float | None = None,
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
        ignore_value: a target that does not count.
        inplace: the gradient overwrites the memory of the logits.

    Returns:
        As `sigmoid_cross_entropy`.

    Raises:
        TypeError, ValueError, RuntimeError: As in `sigmoid_cross_entropy`, and for `gamma_neg`, `gamma_pos` and `clip`.
    """
    check_gammas(gamma_neg=gamma_neg, gamma_pos=gamma_pos)
    return _described(
        (input, target, weight, pos_weight, None, mask, None),
        reduction,
        (label_smoothing, smoothing_prior, ignore_value, gamma_pos, gamma_neg, check_clip(clip)),
        inplace,
    )


def _described(
    tensors: _autograd.Tensors,
    reduction: str,
    options: tuple[Any, ...],
    inplace: bool,
    promotes: bool = False,
) -> Call:
    """The call of a loss of ours. `options` are the op's from `label_smoothing` on.

    `promotes`: the dtype of the loss is that to which torch promotes input and target.
    """
    input, target, weight, pos_weight, count, mask, label_alpha = tensors
    label_smoothing, smoothing_prior, ignore_value = options[:3]
    check_reduction(reduction, REDUCTIONS)
    check_smoothing(label_smoothing, smoothing_prior)
    check_ignore_value(ignore_value)
    rows, dtype, divisor = _reduced(input, reduction)
    if promotes and input.dtype != target.dtype and autocast_dtype(input, target) is None:
        dtype = torch.promote_types(input.dtype, target.dtype)
    if reduction == "mean" and (mask is not None or ignore_value is not None):
        count, divisor = _COUNTED, 1
    return (
        (input, target, weight, pos_weight, count, mask, label_alpha),
        (rows, dtype, divisor, *options),
        inplace,
    )


@_loss_function
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
    return (input, target, weight, None, None, None, None), options, False


def check_ignore_value(ignore_value: float | None) -> None:
    """Check that option of `sigmoid_cross_entropy`.

    Raises:
        TypeError: It is no number.
    """
    if ignore_value is not None and not isinstance(ignore_value, float | int | torch.SymFloat):
        raise TypeError(f"ignore_value must be a number or None, got {type(ignore_value).__name__}")


def check_gammas(**gammas: float) -> None:
    """Check the exponents of a focal or asymmetric loss.

    Raises:
        TypeError: One of them is no number.
        ValueError: One of them is negative, infinite or NaN.
    """
    for name, value in gammas.items():
        if not isinstance(value, float | int | torch.SymFloat):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")


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


def check_smoothing(label_smoothing: float, smoothing_prior: float) -> None:
    """Check both options of `sigmoid_cross_entropy`.

    Raises:
        TypeError: One of them is no number.
        ValueError: One of them is not in [0, 1].
    """
    for name, value in (("label_smoothing", label_smoothing), ("smoothing_prior", smoothing_prior)):
        if not isinstance(value, float | int | torch.SymFloat):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {value}")


def _reduced(input: Tensor, reduction: str) -> _autograd.Options:
    """The op's first options for a reduction: what it adds up, the default dtype, and what divides the sum."""
    if reduction == "mean":
        return "sum", None, input.numel()
    if reduction == "sum_classes":
        if input.dim() == 0:
            raise ValueError('reduction="sum_classes" sums over the last dimension, but input is a scalar')
        return "sum", None, math.prod(input.shape[:-1])  # unlike Size.numel() symbolic where the sizes are
    return reduction, None, 1


_COUNTED: Any = object()
"""In the place of `count`: the number of elements that count."""

_IGNORE_VALUE = _autograd.OPTIONS.index("ignore_value")
"""Its place among the options."""


def _with_count(tensors: _autograd.Tensors, options: _autograd.Options, by_kernel: bool) -> _autograd.Tensors:
    """The tensors with the count that they ask for."""
    input, target, weight, pos_weight, count, mask, label_alpha = tensors
    if count is not _COUNTED:
        return tensors
    if by_kernel:
        count = _autograd.count((input, target, None, None, None, mask, None), options)
    else:
        counted = reference.counted(target.detach(), mask, options[_IGNORE_VALUE])
        assert counted is not None
        count = counted.expand(input.shape).sum()
    return input, target, weight, pos_weight, count, mask, label_alpha


def _call(tensors: _autograd.Tensors, options: _autograd.Options, inplace: bool) -> Tensor:
    """Dispatch a call. `is_usual` holds in ordinary training, where each microsecond counts."""
    input, target, weight, pos_weight, count, mask, label_alpha = tensors
    is_usual = (
        type(input) is Tensor
        and type(target) is Tensor
        and (input.is_cpu or (_library.has_cuda_kernels and input.is_cuda))
        and is_plain_eager()
    )
    if not is_usual:
        _sharding.register()  # they may be DTensors
        check_tensors(input, target, weight, pos_weight, mask, label_alpha)
        options = _with_autocast(tensors, options)
    if count is not None:
        tensors = _with_count(tensors, options, is_usual and input.is_cpu)
    if not is_usual:
        # A trace would keep the divisor of its example.
        if is_tracing() or is_differentiating() or _needs_reference(input):
            check_labels(target, mask, options[_IGNORE_VALUE] if len(options) > _IGNORE_VALUE else None)
            return reference.sigmoid_cross_entropy(*tensors, *options)
        if is_transforming():  # by vmap alone
            return _autograd.call_op(tensors, options)
    if inplace:
        inplace = _can_overwrite(*tensors[:4], label_alpha)
    return _autograd.loss(tensors, options, inplace)


def _call_traced(tensors: _autograd.Tensors, options: _autograd.Options, _: bool) -> Tensor:
    """The op as one node of a graph, or the reference."""
    check_tensors(*tensors[:4], *tensors[5:])
    options = _with_autocast(tensors, options)
    tensors = _with_count(tensors, options, by_kernel=False)
    if is_transforming() or _needs_reference(tensors[0]):
        return reference.sigmoid_cross_entropy(*tensors, *options)
    return _autograd.call_op(tensors, options)


def _with_autocast(tensors: _autograd.Tensors, options: _autograd.Options) -> _autograd.Options:
    """The options with the dtype of the loss where autocast decides it."""
    reduction, dtype, *rest = options
    return reduction, dtype or autocast_dtype(*tensors[:2]), *rest


def _needs_reference(input: Tensor) -> bool:
    """Whether only the plain torch functions can do it: ours have no forward-mode AD, and ONNX does not know them."""
    if is_forward_mode() or is_exporting_to_onnx():
        return True
    if input.device.type in _KERNEL_DEVICES:
        return False
    _warn_without_kernels(input.device.type)
    return True


# meta: shapes only, through the fake kernels
_KERNEL_DEVICES = ("cpu", "meta", "cuda") if _library.has_cuda_kernels else ("cpu", "meta")


@functools.cache
def _warn_without_kernels(device_type: str) -> None:
    """Say once for each device type what it means that there are none."""
    reason = _library.why_no_cuda_kernels() if device_type == "cuda" else "there are kernels for CPU and CUDA only"
    warnings.warn(
        f"fused_sce computes losses on {device_type} tensors with plain torch operations, right but not fused: "
        f"{reason}",
        stacklevel=2,
    )


def _can_overwrite(
    logits: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, alpha: Tensor | None
) -> bool:
    """Whether the gradient can lie in the memory of the logits.

    Raises:
        RuntimeError: They are parameters, whose values must survive, or needed for another gradient.
    """
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return False
    base = logits if logits._base is None else logits._base
    if base.is_leaf and base.requires_grad:
        raise RuntimeError(
            "inplace=True would overwrite a leaf tensor that requires grad, or a view of one, with its gradient: pass "
            "the output of a layer, or use inplace=False"
        )
    others = {"target": target, "weight": weight, "pos_weight": pos_weight, "alpha": alpha}
    for name, tensor in others.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"inplace=True has no gradient by {name}: it overwrites the logits, which that needs. Use inplace=False"
            )
    if type(logits) is not Tensor or logits.is_meta or logits.is_neg() or logits.retains_grad:
        return False
    # autograd cannot record that a view is overwritten by a function with two outputs
    return logits._base is None and logits.is_contiguous()
