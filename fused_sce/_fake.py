"""What each op returns, without computing it: shapes and dtypes for torch.compile, export and meta tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_sce.reference import result_dtype


@torch.library.register_fake("fused_sce::sigmoid_cross_entropy")
def _elementwise(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return input.new_empty(input.shape, dtype=dtype or result_dtype(input, target))


@torch.library.register_fake("fused_sce::sigmoid_cross_entropy_rows")
def _rows(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    divisor: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return input.new_empty(input.shape[:-1], dtype=dtype or result_dtype(input, target))


@torch.library.register_fake("fused_sce::sigmoid_cross_entropy_sum")
def _sum(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    divisor: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return input.new_empty((), dtype=dtype or result_dtype(input, target))


@torch.library.register_fake("fused_sce::_sigmoid_cross_entropy_sum_with_gradient")
def _sum_with_gradient(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    divisor: int,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    loss = input.new_empty((), dtype=dtype or result_dtype(input, target))
    return loss, input.new_empty(input.shape)


@torch.library.register_fake("fused_sce::_sigmoid_cross_entropy_sum_with_gradient_out")
def _sum_with_gradient_out(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    divisor: int,
    *,
    loss: Tensor,
    gradient: Tensor,
) -> None:
    return None


@torch.library.register_fake("fused_sce::_sigmoid_cross_entropy_backward")
def _backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    divisor: int,
) -> Tensor:
    return input.new_empty(input.shape)


@torch.library.register_fake("fused_sce::_scale_")
def _scale(self: Tensor, factor: Tensor) -> None:
    return None
