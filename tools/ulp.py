"""Distances in units in the last place, and exact values of the loss.

The functions take numpy arrays and torch tensors alike: they use what both libraries call by the same name. This module
imports neither torch nor numpy.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import mpmath

Array = Any  # numpy.ndarray or torch.Tensor


class Format(NamedTuple):
    """A floating-point format."""

    mantissa: int  # bits, the implicit one included
    smallest_exponent: int  # of the smallest normal number, as frexp gives it

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return math.ldexp(2.0 - 2.0 ** (1 - self.mantissa), 2 - self.smallest_exponent)


FORMATS = {
    "float64": Format(53, -1021),
    "float32": Format(24, -125),
    "bfloat16": Format(8, -125),
    "float16": Format(11, -13),
}


def namespace(array: Array) -> Any:
    """The library that an array belongs to: numpy, torch or mpmath."""
    return sys.modules[type(array).__module__.partition(".")[0]]


def ulp_of(value: Array, dtype: str) -> Array:
    """The size of one ULP of `value` in a dtype of FORMATS; below its normal range of one subnormal step."""
    library = namespace(value)
    _, exponent = library.frexp(value)
    exponent = library.clip(exponent, FORMATS[dtype].smallest_exponent, None) - FORMATS[dtype].mantissa
    return 2.0 ** (library.ones_like(value) * exponent)


def ulp_distance(got: Array, exact: Array, dtype: str = "") -> Array:
    """|got - exact| in ULPs of `exact` in a dtype of FORMATS, by default `got`'s; `exact` is of a wider type.

    0 where both are NaN or the same infinity, inf where only one is. An exact value past the largest number rounds to
    infinity.
    """
    dtype = dtype or str(got.dtype).removeprefix("torch.")
    library = namespace(exact)
    distance = abs(got - exact) / ulp_of(exact, dtype)
    overflow = library.isinf(got) & (abs(exact) > FORMATS[dtype].largest) & ((got > 0) == (exact > 0))
    same = (got == exact) | (library.isnan(got) & library.isnan(exact)) | overflow
    return library.where(same, 0.0, library.where(library.isnan(distance), math.inf, distance))


def exact_binary(x: Array, target: float) -> tuple[Array, Array]:
    """Loss and gradient for t = 0 or 1, computed in the type of `x`: good to far below one ULP of narrower types."""
    library = namespace(x)
    e = library.exp(-abs(x))
    wrong = -x if target else x  # the logit of the wrong answer
    loss = library.clip(wrong, 0, None) + library.log1p(e)
    gradient = library.where(wrong >= 0, 1 / (1 + e), e / (1 + e)) * (-1 if target else 1)
    return loss, gradient


class Exact(NamedTuple):
    """Loss and gradient, and for each the sum of the sizes of its two terms."""

    loss: Array
    loss_terms: Array
    gradient: Array
    gradient_terms: Array


def exact_terms(x: Array, t: Array, pos_weight: Array | float = 1.0) -> Exact:
    """Loss and gradient of finite logits for any target: of Python floats by mpmath, else in the type of `x`."""
    if isinstance(x, float):
        with mpmath.workdps(60):
            return exact_terms(mpmath.mpf(x), mpmath.mpf(t), mpmath.mpf(pos_weight))
    library = namespace(x)
    e = library.exp(-abs(x))
    softplus = (x + abs(x)) / 2 + library.log1p(e)
    softminus = (abs(x) - x) / 2 + library.log1p(e)
    sigmoid = library.exp((x - abs(x)) / 2) / (1 + e)
    opposite = library.exp((-x - abs(x)) / 2) / (1 + e)
    loss = ((1 - t) * softplus, pos_weight * t * softminus)
    gradient = ((1 - t) * sigmoid, pos_weight * t * opposite)
    return Exact(loss[0] + loss[1], loss[0] + loss[1], gradient[0] - gradient[1], gradient[0] + gradient[1])
