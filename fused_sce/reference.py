"""The losses in plain torch: what the kernels compute, written to be read.

Every function is differentiable to any order and works under `torch.func` transforms and forward-mode AD; the fused
ones fall back to these there. Tests and benchmarks compare against them. They are right in both tails too (each sigmoid
is evaluated by itself, never as a difference from 1), but take a dozen kernels and as many temporaries.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def result_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    """The dtype of the loss: the target's if it is floating point, as torch's BCEWithLogitsLoss, else the input's."""
    return target.dtype if target.is_floating_point() else input.dtype


def computing_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    """The dtype computed in: float64 if input or target is, else float32."""
    return torch.float64 if torch.float64 in (input.dtype, target.dtype) else torch.float32


def _softplus(x: Tensor) -> Tensor:
    # In two halves, so that torch's is asked for negative arguments alone, where its first and second derivative keep
    # their precision. Not logsigmoid: as a DTensor that has no gradient (torch 2.15).
    return torch.where(x > 0, x + softplus(-x), softplus(x))


def sigmoid_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The loss of each element.

    `weight * ((1 - t) softplus(x) + pos_weight t softplus(-x))`, with `softplus(x) = log1p(exp(x))`. Unlike the
    textbook form `max(x, 0) - x t + log1p(exp(-|x|))` its derivative by automatic differentiation,
    `(1 - t) sigmoid(x) - t sigmoid(-x)`, keeps both tails.

    Args:
        input: logits of any shape, any floating dtype.
        target: same shape, any real dtype, usually in [0, 1].
        weight: factor of each element's loss, broadcasts to the input's shape.
        pos_weight: factor of the positive term, broadcasts to the input's shape.
        dtype: of the result; default `result_dtype(input, target)`.

    Returns:
        A tensor of the input's shape.
    """
    computing = computing_dtype(input, target)
    x = input.to(computing)
    t = target.to(computing)
    negative = _softplus(x)
    positive = _softplus(-x)
    if pos_weight is not None:
        positive = pos_weight.to(computing) * positive
    # Where a factor is 0 its term is 0 even at an infinite logit. Both selections: of the value, and of what enters the
    # product, whose derivative would otherwise be 0 * inf.
    zero = torch.zeros((), dtype=computing, device=x.device)
    negative_term = (1 - t) * torch.where((t == 1) & torch.isinf(negative), zero, negative)
    positive_term = t * torch.where((t == 0) & torch.isinf(positive), zero, positive)
    loss = negative_term + positive_term
    if weight is not None:
        loss = loss * weight.to(computing)
    return loss.to(dtype or result_dtype(input, target))


def sigmoid_cross_entropy_rows(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    divisor: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The losses summed over the last dimension, divided by `divisor`: shape `input.shape[:-1]`."""
    computing = computing_dtype(input, target)
    loss = sigmoid_cross_entropy(input, target, weight, pos_weight, computing)
    return (loss.sum(-1) / divisor).to(dtype or result_dtype(input, target))


def sigmoid_cross_entropy_sum(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    divisor: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The sum of all losses, divided by `divisor`: a scalar."""
    computing = computing_dtype(input, target)
    loss = sigmoid_cross_entropy(input, target, weight, pos_weight, computing)
    return (loss.sum() / divisor).to(dtype or result_dtype(input, target))
