"""Distances in units in the last place, and exact values of the loss."""

from __future__ import annotations

import mpmath
import torch
from torch import Tensor

MANTISSA = {torch.float64: 53, torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}
SMALLEST_NORMAL_EXPONENT = {
    torch.float64: -1021,
    torch.float32: -125,
    torch.bfloat16: -125,
    torch.float16: -13,
}


def ulp_distance(got: Tensor, exact: Tensor) -> Tensor:
    """|got - exact| in ULPs of `exact` (float64) in `got`'s dtype; below its normal range in subnormal steps.

    0 where both are NaN or the same infinity, inf where only one is.
    """
    dtype = got.dtype
    got = got.double()
    _, exponent = torch.frexp(exact)
    exponent = exponent.clamp(min=SMALLEST_NORMAL_EXPONENT[dtype]) - MANTISSA[dtype]
    distance = torch.ldexp((got - exact).abs(), -exponent.double())
    same = (got == exact) | (got.isnan() & exact.isnan())
    distance = torch.where(same, torch.zeros_like(distance), distance)
    # An exact value past the largest number rounds to inf.
    overflow = got.isinf() & (exact.abs() > torch.finfo(dtype).max)
    distance = torch.where(overflow & (got.sign() == exact.sign()), torch.zeros_like(distance), distance)
    return torch.nan_to_num(distance, nan=torch.inf)


def exact_binary(x: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient for t = 0 or 1 in float64: good to far below one ULP of narrower logits."""
    x = x.double()
    e = torch.exp(-x.abs())
    wrong = -x if target else x  # the logit of the wrong answer
    loss = wrong.clamp(min=0) + torch.log1p(e)
    gradient = torch.where(wrong >= 0, 1 / (1 + e), e / (1 + e)) * (-1 if target else 1)
    return loss, gradient


def exact_terms(x: float, t: float, pos_weight: float = 1.0) -> tuple[mpmath.mpf, ...]:
    """Exact loss, its two terms, gradient, its two terms, by mpmath."""
    with mpmath.workdps(60):
        x, t, pos_weight = mpmath.mpf(x), mpmath.mpf(t), mpmath.mpf(pos_weight)
        softplus = mpmath.log1p(mpmath.exp(-abs(x))) + max(x, 0)
        softminus = mpmath.log1p(mpmath.exp(-abs(x))) + max(-x, 0)
        sigmoid = 1 / (1 + mpmath.exp(-x))
        opposite = 1 / (1 + mpmath.exp(x))
        loss_terms = ((1 - t) * softplus, pos_weight * t * softminus)
        gradient_terms = ((1 - t) * sigmoid, pos_weight * t * opposite)
        return (
            loss_terms[0] + loss_terms[1],
            *loss_terms,
            gradient_terms[0] - gradient_terms[1],
            *gradient_terms,
        )
