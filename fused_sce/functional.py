"""The losses as functions: defaults, checks, reduction and divisor; the work is done by `torch.ops.fused_sce`.

Notation of the docstrings: x logit, t target, N samples, C labels; `softplus(x) = max(x, 0) + log1p(exp(-|x|))`. The
loss of one element is `(1 - t) softplus(x) + pos_weight t softplus(-x)`, its gradient `(1 - t) sigmoid(x) - pos_weight
t sigmoid(-x)`, both within 2 units in the last place (ULP) in float32 for t = 0 and t = 1, for every logit.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._jit_internal import is_scripting
from torch.autograd import forward_ad
from torch.jit._trace import is_tracing
from torch.nn import _reduction
from torch.overrides import handle_torch_function, has_torch_function

from fused_sce import _script, reference
from fused_sce._checks import check_reduction, check_tensors
from fused_sce._extension import _C

__all__ = [
    "binary_cross_entropy_with_logits",
    "multilabel_soft_margin_loss",
    "sigmoid_cross_entropy",
]

_ops = torch.ops.fused_sce


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Sigmoid cross-entropy: `torch.nn.functional.binary_cross_entropy_with_logits`, in one pass.

    Args:
        input: logits, any shape, float32, float64, bfloat16 or float16.
        target: same shape; any floating dtype, bool or integer; usually in [0, 1], not checked.
        weight: factor of each element's loss; broadcasts to the input's shape.
        size_average: deprecated, see torch.
        reduce: deprecated, see torch.
        reduction: "mean" over all elements, "sum", or "none".
        pos_weight: factor of the positive term; broadcasts to the input's shape, usually one value per label.

    Returns:
        The loss: a scalar, or of the input's shape for "none". Its dtype is the target's if that is floating point,
        else the input's; under autocast float32.

    Raises:
        TypeError: `input` is not floating point, another argument is complex, or one is no dense tensor.
        ValueError: `target`'s shape differs from `input`'s, or `reduction` is unknown.
        RuntimeError: `weight` or `pos_weight` does not broadcast, or tensors are on different devices.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if is_scripting():
        return _script.binary_cross_entropy_with_logits(input, target, weight, pos_weight, reduction)
    if not torch.compiler.is_compiling():
        loss: Tensor | None = _C.usual_loss(input, target, weight, pos_weight, reduction, False)
        if loss is not None:
            return loss
        if has_torch_function((input, target, weight, pos_weight)):
            options = {"weight": weight, "reduction": reduction, "pos_weight": pos_weight}
            return _overridden(binary_cross_entropy_with_logits, input, target, options)
    check_reduction(reduction)
    check_tensors(input, target, weight, pos_weight)
    return _reduced(input, target, weight, pos_weight, reduction)


def sigmoid_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Sigmoid cross-entropy with everything the kernels can do.

    Args:
        input: logits, any shape, float32, float64, bfloat16 or float16.
        target: same shape; any floating dtype, bool or integer; usually in [0, 1], not checked.
        weight: factor of each element's loss; broadcasts to the input's shape. 0 leaves an element out of the sum.
        pos_weight: factor of the positive term; broadcasts to the input's shape, usually one value per label.
        reduction: "mean" over all elements, "sum", "none", or "sum_classes": the sum over the last dimension, averaged
            over the others, as timm's `BinaryCrossEntropy(sum_classes=True)`.

    Returns:
        The loss: a scalar, or of the input's shape for "none". Its dtype is the target's if that is floating point,
        else the input's; under autocast float32.

    Raises:
        TypeError: `input` is not floating point, another argument is complex, or one is no dense tensor.
        ValueError: `target`'s shape differs from `input`'s, `reduction` is unknown, or "sum_classes" met a scalar.
        RuntimeError: `weight` or `pos_weight` does not broadcast, or tensors are on different devices.
    """
    if not torch.compiler.is_compiling():
        loss: Tensor | None = _C.usual_loss(input, target, weight, pos_weight, reduction, False)
        if loss is not None:
            return loss
        if has_torch_function((input, target, weight, pos_weight)):
            options = {"weight": weight, "pos_weight": pos_weight, "reduction": reduction}
            return _overridden(sigmoid_cross_entropy, input, target, options)
    check_reduction(reduction, ("mean", "sum", "none", "sum_classes"))
    check_tensors(input, target, weight, pos_weight)
    if reduction == "sum_classes" and input.dim() == 0:
        raise ValueError('reduction="sum_classes" sums over the last dimension, but input is a scalar')
    return _reduced(input, target, weight, pos_weight, reduction)


def multilabel_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Sigmoid cross-entropy averaged over labels: `torch.nn.functional.multilabel_soft_margin_loss`, in one pass.

    Args:
        input: logits of shape (N, C) or (..., C), float32, float64, bfloat16 or float16.
        target: same shape; any floating dtype, bool or integer; usually in [0, 1], not checked.
        weight: factor of each label's loss, shape (C,); anything that broadcasts to the input's shape is taken.
        size_average: deprecated, see torch.
        reduce: deprecated, see torch.
        reduction: "mean" over samples, "sum" over samples, or "none".

    Returns:
        The loss: a scalar, or of shape (N,) (`input.shape[:-1]`) for "none": one value per sample. Its dtype is that to
        which torch promotes input, target and weight; under autocast float32.

    Raises:
        TypeError: `input` is not floating point, another argument is complex, or one is no dense tensor.
        ValueError: `target`'s shape differs from `input`'s, or `reduction` is unknown.
        IndexError: `input` has no dimension.
        RuntimeError: `weight` does not broadcast, or tensors are on different devices.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if is_scripting():
        return _script.multilabel_soft_margin_loss(input, target, weight, reduction)
    if not torch.compiler.is_compiling():
        loss: Tensor | None = _C.usual_loss(input, target, weight, None, reduction, True)
        if loss is not None:
            return loss
        if has_torch_function((input, target, weight)):
            options = {"weight": weight, "reduction": reduction}
            return _overridden(multilabel_soft_margin_loss, input, target, options)
    check_reduction(reduction)
    check_tensors(input, target, weight, None)
    if input.dim() == 0:
        raise IndexError("input must have a last dimension, the labels, but it is a scalar")
    if is_tracing() and not _needs_reference(input, weight, None):
        return _script.traced_multilabel_soft_margin_loss(input, target, weight, reduction)

    dtype: torch.dtype | None = None
    mixed = input.dtype != target.dtype or (weight is not None and weight.dtype != input.dtype)
    if mixed and not torch.is_autocast_enabled(input.device.type):
        dtype = torch.promote_types(input.dtype, target.dtype)
        if weight is not None and weight.dim() > 0:
            dtype = torch.promote_types(dtype, weight.dtype)
    labels = input.size(-1)
    if reduction == "none":
        return _rows(input, target, weight, None, labels, dtype)
    divisor = labels if reduction == "sum" else input.numel()
    return _sum(input, target, weight, None, divisor, dtype)


def _overridden(function: Callable[..., Tensor], input: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
    """What the `__torch_function__` of an argument or a mode makes of a call: `torch.fx` puts it into its graph."""
    tensors = (input, target, options["weight"], options.get("pos_weight"))
    loss: Tensor = handle_torch_function(function, tensors, input, target, **options)
    return loss


def _reduced(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """The loss of checked arguments with one of the reductions of `sigmoid_cross_entropy`."""
    if is_tracing() and not _needs_reference(input, weight, pos_weight):
        return _script.traced_sigmoid_cross_entropy(input, target, weight, pos_weight, reduction)
    if reduction == "none":
        return _elementwise(input, target, weight, pos_weight)
    if reduction == "mean":
        divisor = input.numel()
    elif reduction == "sum":
        divisor = 1
    else:
        divisor = math.prod(input.shape[:-1])  # unlike Size.numel() symbolic where the sizes are
    return _sum(input, target, weight, pos_weight, divisor)


def _elementwise(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
) -> Tensor:
    if _needs_reference(input, weight, pos_weight):
        dtype = _autocast_dtype(input, target)
        return reference.sigmoid_cross_entropy(input, target, weight, pos_weight, dtype)
    loss: Tensor = _ops.sigmoid_cross_entropy(input, target, weight, pos_weight)
    return loss


def _rows(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    divisor: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if _needs_reference(input, weight, pos_weight):
        dtype = dtype or _autocast_dtype(input, target)
        return reference.sigmoid_cross_entropy_rows(input, target, weight, pos_weight, divisor, dtype)
    loss: Tensor = _ops.sigmoid_cross_entropy_rows(input, target, weight, pos_weight, divisor, dtype)
    return loss


def _sum(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    divisor: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if _needs_reference(input, weight, pos_weight):
        dtype = dtype or _autocast_dtype(input, target)
        return reference.sigmoid_cross_entropy_sum(input, target, weight, pos_weight, divisor, dtype)
    loss: Tensor = _ops.sigmoid_cross_entropy_sum(input, target, weight, pos_weight, divisor, dtype)
    return loss


def _needs_reference(input: Tensor, weight: Tensor | None, pos_weight: Tensor | None) -> bool:
    """Whether only the plain torch functions can do it.

    A C++ autograd Function raises under `torch.func` transforms and forward-mode AD; the kernels have no gradient by
    weight or pos_weight; there are kernels for CPU and CUDA only; and ONNX knows torch's operators, not ours.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    by_weight = weight is not None and weight.requires_grad
    by_pos_weight = pos_weight is not None and pos_weight.requires_grad
    # A trace is checked by one without gradients, which must be the same.
    if (by_weight or by_pos_weight) and (torch.is_grad_enabled() or is_tracing()):
        return True
    if torch.onnx.is_in_onnx_export():
        return True
    return input.device.type not in _KERNEL_DEVICES and _lacks_kernels(input.device.type)


# meta: shapes only, through the fake kernels
_KERNEL_DEVICES = ("cpu", "meta", "cuda") if _C.cuda_version else ("cpu", "meta")


@functools.cache
def _lacks_kernels(device_type: str) -> bool:
    """True; says once for each device type what that means."""
    reason = (
        "it was built without CUDA; `python -m fused_sce` shows the build"
        if device_type == "cuda"
        else "there are kernels for CPU and CUDA only"
    )
    warnings.warn(
        f"fused_sce computes losses on {device_type} tensors with plain torch operations, right but not fused: "
        f"{reason}",
        stacklevel=2,
    )
    return True


def _autocast_dtype(input: Tensor, target: Tensor) -> torch.dtype | None:
    """The result's dtype where autocast decides it, as the ops' own autocast rule has it."""
    if not torch.is_autocast_enabled(input.device.type):
        return None
    return torch.float64 if target.dtype == torch.float64 else torch.float32
