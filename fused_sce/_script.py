"""The losses for TorchScript: calls of the ops, which check their tensors themselves.

`torch.jit.script` compiles these in place of `fused_sce.functional`'s, and `torch.jit.trace` records them compiled: in
what it records of Python the divisor is a constant, the one of the example's shape.

TorchScript cannot ask whether autocast is on for the CPU (torch 2.15 crashes): that is left to the ops here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.jit import script_if_tracing


def sigmoid_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str
) -> Tensor:
    """`fused_sce.functional.sigmoid_cross_entropy`."""
    divisor = 1
    if reduction == "mean":
        divisor = input.numel()
    elif reduction == "sum_classes":
        for size in input.shape[:-1]:
            divisor *= size
    elif reduction not in ["sum", "none"]:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    loss: Tensor = (
        torch.ops.fused_sce.sigmoid_cross_entropy(input, target, weight, pos_weight)
        if reduction == "none"
        else torch.ops.fused_sce.sigmoid_cross_entropy_sum(input, target, weight, pos_weight, divisor)
    )
    return loss


def binary_cross_entropy_with_logits(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str
) -> Tensor:
    """`fused_sce.functional.binary_cross_entropy_with_logits`."""
    if reduction == "sum_classes":
        raise ValueError(f"{reduction} is not a valid value for reduction")
    return sigmoid_cross_entropy(input, target, weight, pos_weight, reduction)


def multilabel_soft_margin_loss(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """`fused_sce.functional.multilabel_soft_margin_loss`."""
    if reduction not in ["mean", "sum", "none"]:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    promoted = torch.promote_types(input.dtype, target.dtype)
    if weight is not None and weight.dim() > 0:
        promoted = torch.promote_types(promoted, weight.dtype)
    # Only where the op would choose another: what is left to it, it leaves to autocast.
    dtype: torch.dtype | None = None
    if promoted != (target.dtype if target.is_floating_point() else input.dtype):
        dtype = promoted
    divisor = input.numel() if reduction == "mean" else input.size(-1)
    loss: Tensor = (
        torch.ops.fused_sce.sigmoid_cross_entropy_rows(input, target, weight, None, divisor, dtype)
        if reduction == "none"
        else torch.ops.fused_sce.sigmoid_cross_entropy_sum(input, target, weight, None, divisor, dtype)
    )
    return loss


traced_sigmoid_cross_entropy: Callable[..., Tensor] = script_if_tracing(sigmoid_cross_entropy)
traced_multilabel_soft_margin_loss: Callable[..., Tensor] = script_if_tracing(multilabel_soft_margin_loss)
