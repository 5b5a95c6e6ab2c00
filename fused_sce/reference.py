"""The loss in plain torch: what the kernels compute, written to be read.

`sigmoid_cross_entropy` takes the arguments of the op of that name. It is differentiable to any order and works under
`torch.func` transforms and forward-mode AD; the fused losses fall back to it there. Tests and benchmarks compare with
it. It is right in both tails too (each sigmoid is evaluated by itself, never as a difference from 1), but takes a
dozen kernels and as many temporaries.

Shapes: input and target (any shape, the same for both); weight and pos_weight broadcast to it; count has one element.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus


def result_dtype(input: Tensor, target: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype of the loss: the target's if it is floating point, as torch's BCEWithLogitsLoss, else the input's."""
    return dtype or (target.dtype if target.is_floating_point() else input.dtype)


def sigmoid_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    count: Tensor | None = None,
    reduction: str = "none",
    dtype: torch.dtype | None = None,
    divisor: int = 1,
    label_smoothing: float = 0.0,
    smoothing_prior: float = 0.5,
) -> Tensor:
    """The loss `weight * ((1 - t) softplus(x) + pos_weight t softplus(-x))`, with `softplus(x) = log1p(exp(x))`.

    Unlike the textbook form `max(x, 0) - x t + log1p(exp(-|x|))` its derivative by automatic differentiation,
    `(1 - t) sigmoid(x) - t sigmoid(-x)`, keeps both tails.

    Args:
        input: logits, any floating dtype.
        target: any real dtype, usually in [0, 1].
        weight: factor of each element's loss.
        pos_weight: factor of the positive term.
        count: int64; divides the loss as well. 0 divides as 1.
        reduction: "none", "rows" (sum over the last dimension) or "sum" (over all).
        dtype: of the result; default `result_dtype(input, target)`.
        divisor: divides the loss.
        label_smoothing: s in [0, 1].
        smoothing_prior: p in [0, 1]; the target t becomes `(1 - s) t + s p`.

    Returns:
        A tensor of shape `input.shape`, `input.shape[:-1]` or ().
    """
    x, t = _computable(input, target, label_smoothing, smoothing_prior)
    negative = _softplus(x)
    positive = _softplus(-x)
    if pos_weight is not None:
        positive = pos_weight.to(x.dtype) * positive
    # Where a factor is 0 its term is 0 even at an infinite logit. Both selections: of the value, and of what enters the
    # product, whose derivative would otherwise be 0 * inf.
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    negative_term = (1 - t) * torch.where((t == 1) & torch.isinf(negative), zero, negative)
    positive_term = t * torch.where((t == 0) & torch.isinf(positive), zero, positive)
    loss = negative_term + positive_term
    if weight is not None:
        loss = loss * weight.to(x.dtype)
    if reduction == "rows":
        loss = loss.sum(-1)
    elif reduction == "sum":
        loss = loss.sum()
    return _divided(loss, divisor, count).to(result_dtype(input, target, dtype))


def gradients(
    wanted: Sequence[bool],
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    count: Tensor | None,
    reduction: str,
    dtype: torch.dtype | None,
    divisor: int,
    label_smoothing: float = 0.0,
    smoothing_prior: float = 0.5,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by input and target, as far as they are wanted; differentiable, for second derivatives.

    `grad_output` is the gradient of the loss, as it broadcasts to the input's shape. By the target it is
    `(1 - s) (pos_weight softplus(-x) - softplus(x))`. The other arguments are those of `sigmoid_cross_entropy`.
    """
    x, t = _computable(input, target, label_smoothing, smoothing_prior)
    p = None if pos_weight is None else pos_weight.to(x.dtype)
    upstream = grad_output.to(x.dtype)
    if weight is not None:
        upstream = upstream * weight.to(x.dtype)
    upstream = _divided(upstream, divisor, count)
    by_input = by_target = None
    if wanted[0]:
        of_x, of_minus_x = _sigmoids(x)
        by_input = (upstream * ((1 - t) * of_x - (t if p is None else p * t) * of_minus_x)).to(input.dtype)
    if wanted[1]:
        derivative = -x if p is None else p * _softplus(-x) - _softplus(x)
        by_target = (upstream * (1 - label_smoothing) * derivative).to(target.dtype)
    return by_input, by_target


def _computable(input: Tensor, target: Tensor, smoothing: float, prior: float) -> tuple[Tensor, Tensor]:
    """Logits and smoothed target in the dtype computed in: float64 if one of them is, else float32."""
    dtype = torch.float64 if torch.float64 in (input.dtype, target.dtype) else torch.float32
    t = target.to(dtype)
    return input.to(dtype), (1 - smoothing) * t + smoothing * prior if smoothing else t


def _divided(value: Tensor, divisor: int, count: Tensor | None) -> Tensor:
    value = value / divisor
    return value if count is None else value / count.reshape(()).clamp(min=1)


def _softplus(x: Tensor) -> Tensor:
    # In two halves, so that torch's is asked for negative arguments alone, where its first and second derivative keep
    # their precision. Not logsigmoid: as a DTensor that has no gradient (torch 2.15).
    return torch.where(x > 0, x + softplus(-x), softplus(x))


def _sigmoids(x: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid(x) and sigmoid(-x) from exp(-|x|): right in both tails, and so are their derivatives.

    torch.sigmoid's derivative is y (1 - y), 0 from y = 1 on. Not by abs, whose derivative at 0 is 0.
    """
    is_positive = x > 0
    e = torch.exp(torch.where(is_positive, -x, x))
    larger = 1 / (1 + e)
    smaller = e * larger
    return torch.where(is_positive, larger, smaller), torch.where(is_positive, smaller, larger)
