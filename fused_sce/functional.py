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
    "binary_cross_entropy_with_logits",
    "multilabel_soft_margin_loss",
    "sigmoid_cross_entropy",
]

Arguments = ParamSpec("Arguments")

Call = tuple[_autograd.Tensors, _autograd.Options, bool]
"""What a loss asks of the op: tensors, options and whether in place. A count of `_COUNTED` is still to be made."""


def _loss_function(describe: Callable[Arguments, Call]) -> Callable[Arguments, Tensor]:
    """Make a loss of a function that describes its call of the op.

    It gets what torch's own functions have: `__torch_function__`, and errors that explain themselves.
    """
    signature = inspect.signature(describe).replace(return_annotation="Tensor")

    @functools.wraps(describe)
    def loss(input: Any, target: Any, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return _call_traced(*describe(input, target, *args, **kwargs))
        tensors = (input, target, *args, *kwargs.values())
        if has_torch_function(tensors):
            overridden: Tensor = handle_torch_function(loss, tensors, input, target, *args, **kwargs)
            return overridden
        try:
            return _call(*describe(input, target, *args, **kwargs))
        except Exception:
            _explain(signature, input, target, *args, **kwargs)
            raise

    loss.__signature__ = signature  # type: ignore[attr-defined]
    return refuse_torchscript(loss)  # type: ignore[return-value]


def _explain(signature: inspect.Signature, *args: Any, **kwargs: Any) -> None:
    """Raise the error that says what is wrong with the arguments of a failed call, if that is what made it fail."""
    try:
        arguments = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return  # what the call itself raised names the function
    try:
        check_tensors(*(arguments.get(name) for name in ("input", "target", "weight", "pos_weight", "mask")))  # type: ignore[arg-type]
        check_labels(arguments["target"], arguments.get("mask"), arguments.get("ignore_value"))
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
    return (input, target, weight, pos_weight, None, None), _reduced(input, reduction), False


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
    check_reduction(reduction, ("mean", "sum", "none", "sum_classes"))
    check_smoothing(label_smoothing, smoothing_prior)
    check_ignore_value(ignore_value)
    rows, dtype, divisor = _reduced(input, reduction)
    count = None
    if reduction == "mean" and (mask is not None or ignore_value is not None):
        count, divisor = _COUNTED, 1
    options = (rows, dtype, divisor, label_smoothing, smoothing_prior, ignore_value)
    return (input, target, weight, pos_weight, count, mask), options, inplace


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
    return (input, target, weight, None, None, None), options, False


def check_ignore_value(ignore_value: float | None) -> None:
    """Check that option of `sigmoid_cross_entropy`.

    Raises:
        TypeError: It is no number.
    """
    if ignore_value is not None and not isinstance(ignore_value, float | int | torch.SymFloat):
        raise TypeError(f"ignore_value must be a number or None, got {type(ignore_value).__name__}")


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
    input, target, weight, pos_weight, count, mask = tensors
    if count is not _COUNTED:
        return tensors
    if by_kernel:
        count = _autograd.count((input, target, None, None, None, mask), options)
    else:
        counted = reference.counted(target.detach(), mask, options[_IGNORE_VALUE])
        assert counted is not None
        count = counted.expand(input.shape).sum()
    return input, target, weight, pos_weight, count, mask


def _call(tensors: _autograd.Tensors, options: _autograd.Options, inplace: bool) -> Tensor:
    """Dispatch a call. `is_usual` holds in ordinary training, where each microsecond counts."""
    input, target, weight, pos_weight, count, mask = tensors
    is_usual = (
        type(input) is Tensor
        and type(target) is Tensor
        and (input.is_cpu or (_library.has_cuda_kernels and input.is_cuda))
        and is_plain_eager()
    )
    if not is_usual:
        _sharding.register()  # they may be DTensors
        check_tensors(input, target, weight, pos_weight, mask)
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
        inplace = _can_overwrite(*tensors[:4])
    return _autograd.loss(tensors, options, inplace)


def _call_traced(tensors: _autograd.Tensors, options: _autograd.Options, _: bool) -> Tensor:
    """The op as one node of a graph, or the reference."""
    check_tensors(*tensors[:4], tensors[5])
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


def _can_overwrite(logits: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None) -> bool:
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
    for name, tensor in (("target", target), ("weight", weight), ("pos_weight", pos_weight)):
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"inplace=True has no gradient by {name}: it overwrites the logits, which that needs. Use inplace=False"
            )
    if type(logits) is not Tensor or logits.is_meta or logits.is_neg() or logits.retains_grad:
        return False
    # autograd cannot record that a view is overwritten by a function with two outputs
    return logits._base is None and logits.is_contiguous()
