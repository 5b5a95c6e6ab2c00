"""The loss in plain torch: what the kernels compute, written to be read.

`sigmoid_cross_entropy` takes the arguments of the op of that name. It is differentiable to any order and works under
`torch.func` transforms and forward-mode AD; the fused losses fall back to it there. Tests and benchmarks compare with
it. It is right in both tails too (each sigmoid is evaluated by itself, never as a difference from 1), but takes a
dozen kernels and as many temporaries.

`gradients` are the derivatives written out, right for infinite arguments too, where automatic differentiation of the
loss adds up terms and gives inf - inf.

Shapes: input and target (any shape, the same for both; other formats of targets: `dense_target`); weight, pos_weight,
mask, label_alpha and prior broadcast to it; count has one element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def result_dtype(input: Tensor, target: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype of the loss: the target's if it is floating point, as torch's BCEWithLogitsLoss, else the input's."""
    return dtype or (target.dtype if target.is_floating_point() else input.dtype)


def sigmoid_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    count: Tensor | None = None,
    mask: Tensor | None = None,
    label_alpha: Tensor | None = None,
    prior: Tensor | None = None,
    columns: Tensor | None = None,
    rows: Tensor | None = None,
    reduction: str = "none",
    dtype: torch.dtype | None = None,
    divisor: int = 1,
    label_smoothing: float = 0.0,
    smoothing_prior: float = 0.5,
    ignore_value: float | None = None,
    gamma_pos: float = 0.0,
    gamma_neg: float = 0.0,
    clip: float = 0.0,
    alpha: float | None = None,
    target_threshold: float | None = None,
    check_target: bool = False,
    target_format: str = "dense",
) -> Tensor:
    """The loss `weight alpha m^g (pos_weight t softplus(-x) - (1 - t) log(1 - q))`, where `softplus(x) = log(1 + e^x)`.

    `q = max(sigmoid(x) - clip, 0)`, `m = t sigmoid(-x) + (1 - t) q`, `g = gamma_pos t + gamma_neg (1 - t)`,
    `alpha = a t + (1 - a) (1 - t)`. Without gammas, clip and alpha it is the sigmoid cross-entropy.
    A factor of 0 leaves out what it multiplies, infinities and NaN included, also from derivatives.

    Args:
        input: logits, any floating dtype.
        target: any real dtype, usually in [0, 1].
        weight: factor of each element's loss.
        pos_weight: factor of the positive term.
        count: int64; divides the loss as well. 0 divides as 1.
        mask: bool; where it is false, an element does not count: its loss and gradients are 0.
        label_alpha: a, instead of `alpha`.
        prior: p, instead of `smoothing_prior`.
        columns: see `dense_target`.
        rows: see `dense_target`.
        reduction: "none", "rows" (sum over the last dimension) or "sum" (over all).
        dtype: of the result; default `result_dtype(input, target)`.
        divisor: divides the loss.
        label_smoothing: s in [0, 1].
        smoothing_prior: p in [0, 1]; the target t becomes `(1 - s) t + s p`.
        ignore_value: where the target equals it, or is NaN as it is, an element does not count.
        gamma_pos: not negative, as `gamma_neg`.
        gamma_neg: both make easy elements weigh less.
        clip: in [0, 1).
        alpha: a; None: the factor alpha is 1.
        target_threshold: after the smoothing the target becomes 1 where it is larger, else 0.
        check_target: not looked at here.
        target_format: see `dense_target`.

    Returns:
        A tensor of shape `input.shape`, `input.shape[:-1]` or ().
    """
    dtype = result_dtype(input, target, dtype)
    target, ignore_value = dense_target(input, target, columns, rows, target_format, ignore_value)
    x, t = _computable(input, target, label_smoothing, smoothing_prior if prior is None else prior, target_threshold)
    counts = counted(target, mask, ignore_value)
    w, p = _weight(weight, counts, x), _factor(pos_weight, x)
    focus = _focus(gamma_pos, gamma_neg, clip, alpha, label_alpha, x)
    loss = _without_weight(*_parts(x, t, w, p), focus)
    if w is not None:
        loss = _product(w, loss)
    # Not summed in float32, where the sum overflows before the mean.
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    if reduction == "rows":
        loss = loss.sum(-1, dtype=wide)
    elif reduction == "sum":
        loss = loss.sum(dtype=wide)
    return _divided(loss, divisor, count).to(dtype)


def gradients(
    wanted: Sequence[bool],
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    count: Tensor | None,
    mask: Tensor | None,
    label_alpha: Tensor | None,
    prior: Tensor | None,
    columns: Tensor | None,
    rows: Tensor | None,
    reduction: str,
    dtype: torch.dtype | None,
    divisor: int,
    label_smoothing: float = 0.0,
    smoothing_prior: float = 0.5,
    ignore_value: float | None = None,
    gamma_pos: float = 0.0,
    gamma_neg: float = 0.0,
    clip: float = 0.0,
    alpha: float | None = None,
    target_threshold: float | None = None,
    check_target: bool = False,
    target_format: str = "dense",
) -> tuple[Tensor | None, ...]:
    """The gradients by input, target, weight, pos_weight and label_alpha, as far as they are wanted.

    They are differentiable, for second derivatives. What a factor of 0 leaves out adds nothing to any of them.
    `grad_output` is the gradient of the loss, as it broadcasts to the input's shape; the arguments after it are those
    of `sigmoid_cross_entropy`.
    """
    target, ignore_value = dense_target(input, target, columns, rows, target_format, ignore_value)
    x, t = _computable(input, target, label_smoothing, smoothing_prior if prior is None else prior, target_threshold)
    counts = counted(target, mask, ignore_value)
    w, p = _weight(weight, counts, x), _factor(pos_weight, x)
    upstream = grad_output.to(x.dtype)
    if counts is not None:
        upstream = torch.where(counts, upstream, 0)
    of_loss = _divided(upstream if w is None else _product_of_factors(upstream, w), divisor, count)
    focus = _focus(gamma_pos, gamma_neg, clip, alpha, label_alpha, x)
    by_input = by_target = by_weight = by_pos_weight = by_alpha = None
    if wanted[2]:
        assert weight is not None
        assert w is not None
        by_w = _left_out(_without_weight(*_parts(x, t, None, p), focus), w == 0)
        by_weight = _summed_to(_product(_divided(upstream, divisor, count), by_w), weight)
    given = x
    x, t, is_negative, slope, other = _parts(x, t, w, p)
    size, log1p_e = _size_and_log1p(x)
    smaller = torch.exp(-size) / (1 + torch.exp(-size))
    # What multiplies pos_weight t and 1 - t, 0 where that left out the logit.
    is_left_out = torch.isfinite(x) & ~torch.isfinite(given)
    positive_part = torch.where(is_negative, size + log1p_e, log1p_e).masked_fill(is_left_out, 0)
    negative_part = torch.where(is_negative, log1p_e, size + log1p_e).masked_fill(is_left_out, 0)
    by_size = slope - smaller if other is None else _product(slope, 1 - smaller) - _product(other, smaller)
    by_x = torch.where(is_negative, -by_size, by_size)
    if p is None:
        by_t = _left_out(-x, (slope == 0) & ~torch.isnan(x))
    else:
        by_t = _left_out(_product(p, positive_part), t == 0) - _left_out(negative_part, t == 1)
    by_p = None if p is None else _left_out(_product(t, positive_part), p == 0)
    if focus is not None:
        parts = _FocalParts(focus, x, t, is_negative, slope, other)
        if clip:
            by_t = _left_out(positive_part if p is None else _product(p, positive_part), t == 0)
            by_t = by_t - _left_out(parts.of_negative.masked_fill(is_left_out, 0), t == 1)
        by_x, by_t = parts.by_x(by_x), parts.by_t(by_t)
        by_p = None if by_p is None else _product_of_factors(parts.factor, by_p)
        if wanted[4]:
            assert label_alpha is not None
            by_a = _product(2 * t - 1, _product_of_factors(parts.modulating, parts.loss))
            by_alpha = _summed_to(_product(of_loss, by_a), label_alpha)
    if wanted[0]:
        by_input = _product(of_loss, by_x).to(input.dtype)
    if wanted[1]:
        kept = 1 - label_smoothing if target_threshold is None else 0.0
        by_target = (_product(of_loss, kept * by_t) if kept else torch.zeros_like(by_t)).to(target.dtype)
    if wanted[3]:
        assert pos_weight is not None
        assert by_p is not None
        by_pos_weight = _summed_to(_product(of_loss, by_p), pos_weight)
    return by_input, by_target, by_weight, by_pos_weight, by_alpha


def dense_target(
    input: Tensor,
    target: Tensor,
    columns: Tensor | None,
    rows: Tensor | None,
    target_format: str,
    ignore_value: float | None = None,
) -> tuple[Tensor, float | None]:
    """The targets of all logits, and the value of those that do not count.

    Args:
        input: logits, (..., C).
        target: as `target_format` says. Its values are not checked.
        columns: of "csr": the column of each value.
        rows: of "csr": where each row begins among these, and the end.
        target_format: "dense"; "class_index": (...,) indices of the only positive of each row; "packed": (..., ceil(C /
            8)) bytes of eight labels, the first in the lowest bit; "index_list": (..., K) indices of positives, padded
            with -1; "csr": the values of a sparse matrix, row by row.
        ignore_value: of "class_index" an index: then the rows that have it become NaN.
    """
    if target_format == "dense":
        return target, ignore_value
    classes = input.shape[-1]
    if target_format == "class_index":
        index = target.unsqueeze(-1).long()
        labels = index == torch.arange(classes, device=input.device)
        if ignore_value is None:
            return labels, None
        return torch.where(index == ignore_value, math.nan, labels.to(input.dtype)), math.nan
    if target_format == "packed":
        bits = target.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=input.device) & 1
        return bits.flatten(-2)[..., :classes].bool(), ignore_value
    if target_format == "index_list":
        padded = torch.zeros(*input.shape[:-1], classes + 1, dtype=torch.bool, device=input.device)
        index = torch.where(target < 0, classes, target.long())
        return padded.scatter(-1, index, True)[..., :classes], ignore_value
    assert columns is not None
    assert rows is not None
    row = torch.arange(len(rows) - 1, device=input.device)
    place = torch.repeat_interleave(row, rows.diff(), output_size=len(target))  # known, so a GPU need not be waited for
    dense = torch.zeros(input.shape, dtype=target.dtype, device=input.device)
    return dense.index_put((place, columns.long()), target), ignore_value


def _computable(
    input: Tensor, target: Tensor, smoothing: float, prior: float | Tensor, threshold: float | None
) -> tuple[Tensor, Tensor]:
    """Logits and changed target in the dtype computed in: float64 if one of them is, else float32."""
    dtype = torch.float64 if torch.float64 in (input.dtype, target.dtype) else torch.float32
    t = target.to(dtype)
    if smoothing == 1:
        t = _left_out(t, torch.ones_like(t, dtype=torch.bool))
    if smoothing:
        t = (1 - smoothing) * t + smoothing * (prior.to(dtype) if isinstance(prior, Tensor) else prior)
    if threshold is not None:
        t = torch.where(torch.isnan(t), t, (t > threshold).to(dtype))
    return input.to(dtype), t


def counted(target: Tensor, mask: Tensor | None, ignore_value: float | None) -> Tensor | None:
    """Which elements count, as a bool tensor that broadcasts to the target's shape; None: all do."""
    if ignore_value is None:
        return mask
    # As the kernels compare: an integer of a narrow type would make 255 of -1.
    is_ignored = torch.isnan(target) if math.isnan(ignore_value) else target == 1.0 * ignore_value
    return ~is_ignored if mask is None else ~is_ignored & mask


def number_counted(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    columns: Tensor | None,
    rows: Tensor | None,
    target_format: str,
    ignore_value: float | None,
) -> Tensor:
    """How many elements count, without a dense copy of the target where it can be; arguments as in `dense_target`."""
    if ignore_value is not None and target_format == "class_index":
        kept = (target.long() != ignore_value).unsqueeze(-1)
        counts = kept if mask is None else kept & mask
    elif ignore_value is not None and (target_format in ("dense", "csr") or ignore_value in (0, 1)):
        target, ignore_value = dense_target(input, target, columns, rows, target_format, ignore_value)
        counts = counted(target, mask, ignore_value)  # type: ignore[assignment]
    else:
        counts = input.new_ones((), dtype=torch.bool) if mask is None else mask
    # The mask may have fewer dimensions than the logits, or sizes of 1.
    repeats = input.numel() // max(counts.numel(), 1)
    return counts.sum() * repeats if counts.numel() else counts.expand(input.shape).sum()


def _weight(weight: Tensor | None, counts: Tensor | None, x: Tensor) -> Tensor | None:
    """The weight, 0 for what does not count: a factor of 0 leaves that out."""
    w = _factor(weight, x)
    if counts is None:
        return w
    return torch.where(counts, x.new_ones(()) if w is None else w, 0)


def _factor(factor: Tensor | None, x: Tensor) -> Tensor | None:
    return None if factor is None else factor.to(x.dtype)


def _divided(value: Tensor, divisor: int, count: Tensor | None) -> Tensor:
    value = value / divisor
    return value if count is None else value / count.reshape(()).clamp(min=1)


def _summed_to(gradient: Tensor, factor: Tensor) -> Tensor:
    """The gradient of a factor that was broadcast."""
    return gradient.sum_to_size(factor.shape).to(factor.dtype)


def _left_out(value: Tensor, condition: Tensor) -> Tensor:
    """The value, 0 where the condition holds and the value is infinite or NaN: it would spoil a product with 0.

    Finite values stay, because derivatives by the other factor need them.
    """
    return torch.where(condition & ~torch.isfinite(value), torch.zeros_like(value), value)


def _product(factor: Tensor, value: Tensor) -> Tensor:
    """`factor * value`, and 0 where the factor is 0, whatever the value is."""
    return factor * _left_out(value, factor == 0)


def _product_of_factors(a: Tensor, b: Tensor) -> Tensor:
    """`a * b`, and 0 where one of them is 0."""
    return _left_out(a, b == 0) * _left_out(b, a == 0)


def _parts(
    x: Tensor, t: Tensor, weight: Tensor | None, pos_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Logits and targets without what is left out, whether x < 0, and what multiplies both terms of the loss.

    The factor of `softplus(|x|)` is 1 - t for x >= 0 and pos_weight t for x < 0, that of `softplus(-|x|)` the other
    one; without pos_weight it is None: both then add up to 1.
    """
    if weight is not None:
        x, t = _left_out(x, weight == 0), _left_out(t, weight == 0)
    is_negative = x < 0
    if pos_weight is None:
        return x, t, is_negative, torch.where(is_negative, t, 1 - t), None
    positive = _product_of_factors(pos_weight, t)
    if weight is not None:
        positive = _left_out(positive, weight == 0)
    slope = torch.where(is_negative, positive, 1 - t)
    other = torch.where(is_negative, 1 - t, positive)
    return _left_out(x, (slope == 0) & (other == 0)), t, is_negative, slope, other


def _without_weight(
    x: Tensor, t: Tensor, is_negative: Tensor, slope: Tensor, other: Tensor | None, focus: _Focus | None
) -> Tensor:
    """The loss of each element from its parts, without weight."""
    if focus is None:
        return _cross_entropy(x, slope, other)
    parts = _FocalParts(focus, x, t, is_negative, slope, other)
    return _product_of_factors(parts.factor, parts.loss)


def _cross_entropy(x: Tensor, slope: Tensor, other: Tensor | None) -> Tensor:
    size, log1p_e = _size_and_log1p(x)
    if other is None:
        return _product(slope, size) + log1p_e
    return _product(slope, size + log1p_e) + _product(other, log1p_e)


def _size_and_log1p(x: Tensor) -> tuple[Tensor, Tensor]:
    """|x|, whose derivative at 0 is 1 where torch.abs has 0, and `log1p(exp(-|x|)) = softplus(-|x|)`."""
    size = torch.where(x < 0, -x, x)
    return size, torch.log1p(torch.exp(-size))


class _Focus(NamedTuple):
    """The options of the focal and the asymmetric loss."""

    gamma_pos: float
    gamma_neg: float
    clip: float
    alpha: Tensor | float | None


def _focus(
    gamma_pos: float, gamma_neg: float, clip: float, alpha: float | None, label_alpha: Tensor | None, x: Tensor
) -> _Focus | None:
    """The options; None: they change nothing."""
    given = alpha if label_alpha is None else label_alpha.to(x.dtype)
    if not (gamma_pos or gamma_neg or clip or given is not None):
        return None
    return _Focus(gamma_pos, gamma_neg, clip, given)


class _FocalParts:
    """What both losses are made of; notation of `sigmoid_cross_entropy`, and c is its last factor.

    `loss` is c, `modulating` m^g and `factor` alpha m^g.
    """

    def __init__(
        self, focus: _Focus, x: Tensor, t: Tensor, is_negative: Tensor, slope: Tensor, other: Tensor | None
    ) -> None:
        self.focus, self.t = focus, t
        clip = focus.clip
        size, log1p_e = _size_and_log1p(x)
        e = torch.exp(-size)
        smaller, larger = e / (1 + e), 1 / (1 + e)
        self.rest = rest = torch.where(is_negative, larger, smaller)  # sigmoid(-x)
        probability = torch.where(is_negative, smaller, larger)
        softplus = torch.where(is_negative, log1p_e, size + log1p_e)
        softplus_of_minus = torch.where(is_negative, size + log1p_e, log1p_e)
        self.both = smaller * larger
        self.q, self.is_clipped = probability, torch.zeros_like(is_negative)
        log_q = -softplus_of_minus
        self.loss = _cross_entropy(x, slope, other)
        self.of_negative = softplus
        if clip:
            self.is_clipped = probability <= clip
            self.q = torch.where(self.is_clipped, 0, probability - clip)
            is_small = self.q <= 0.5
            self.of_negative = -torch.where(
                is_small, torch.log1p(-torch.where(is_small, self.q, 0)), torch.log(rest + clip)
            )
            log_q = torch.log(torch.where(self.is_clipped, 1, self.q))
            positive = t if other is None else torch.where(is_negative, slope, other)
            self.loss = _product(positive, softplus_of_minus) + _product(1 - t, self.of_negative)
            self.positive = positive
        self.base = t * rest + (1 - t) * self.q
        # m^g and m' / m by m, or by their logarithms where m has lost its precision or is 0.
        tiny = torch.finfo(x.dtype).smallest_normal
        self.is_normal = is_normal = (self.base >= tiny) | torch.isnan(self.base)
        self.base_or_1 = base = torch.where(is_normal, self.base, 1)
        is_zero = self.base == 0
        # Of a soft target without precision autograd sees nothing: the derivative of its logarithm may overflow.
        soft_base = torch.where(is_zero | (t == 0) | (t == 1), 1, self.base).detach()
        log_base = torch.where(t == 1, -softplus, torch.where(t == 0, log_q, torch.log(soft_base)))
        self.log_base = torch.where(is_normal, torch.log(base), log_base)
        difference = focus.gamma_pos - focus.gamma_neg
        self.gamma = gamma = focus.gamma_neg + difference * t if difference else torch.full_like(t, focus.gamma_neg)
        by_logarithm = torch.exp(_product(gamma, self.log_base))
        if clip:
            by_logarithm = torch.where(self.is_clipped & is_zero & (gamma != 0), 0, by_logarithm)
        self.modulating = torch.where(is_normal, base**gamma, by_logarithm)
        # A quotient of at most 1, by which autograd finds the derivative by t; where q is 0, m = t sigmoid(-x).
        slope = (1 - 2 * t) * self.both
        at_label = torch.where(t == 1, -probability, torch.where(t == 0, rest, slope / soft_base))
        quotient = torch.where(is_normal, slope / base, at_label)
        self.rate = gamma * torch.where(self.is_clipped, torch.where(t == 0, 0, -probability), quotient)
        alpha = focus.alpha
        self.factor = self.modulating
        if alpha is not None:
            self.factor = _product_of_factors(alpha * t + (1 - alpha) * (1 - t), self.modulating)

    def by_x(self, of_loss: Tensor) -> Tensor:
        """The derivative by x from that of c, unless there is a clip."""
        if self.focus.clip:
            negative_slope = torch.where(self.is_clipped, 0, self.both / (self.rest + self.focus.clip))
            of_loss = _product(1 - self.t, negative_slope) - _product(self.positive, self.rest)
        return _product_of_factors(self.factor, of_loss + _product_of_factors(self.rate, self.loss))

    def by_t(self, of_loss: Tensor) -> Tensor:
        """The derivative by t from that of c."""
        focus, alpha = self.focus, self.focus.alpha
        # c / m before anything else: both may be subnormal.
        by_power = self.gamma * (self.rest - self.q) * (self.loss / torch.where(self.base == 0, 1, self.base))
        if focus.gamma_pos != focus.gamma_neg:
            by_gamma = (focus.gamma_pos - focus.gamma_neg) * self.log_base
            by_power = by_power + _product_of_factors(by_gamma, self.loss)
        by_t = _product_of_factors(self.factor, of_loss + by_power)
        if alpha is None:
            return by_t
        return by_t + _product_of_factors((2 * alpha - 1) * self.modulating, self.loss)
