"""A fuzzer of the losses: random cases of everything at once, against an oracle of its own.

    python tests/fuzz.py --cases 100000 --seed 0 --processes 2

Case n follows from the number n alone: shape, dtypes, memory layouts, values, options, which gradients are wanted and
how. The oracle is the formula in long double. Where the dtype computed in overflows, or makes NaN of inf * 0, it is the
formula in numpy in that dtype. Bounds are those of csrc/formulas/loss.h: 2 ULP, or 4 ULP of the sum of both terms, then
1 ULP for each factor and half a unit of the result's dtype.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from test_specials import exact_focal, expected, left_out, product, product_of_factors
from torch import Tensor

import fused_sce
from fused_sce import reference

F = fused_sce.functional

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
REDUCTIONS = {
    "binary_cross_entropy_with_logits": ["mean", "sum", "none"],
    "multilabel_soft_margin_loss": ["mean", "sum", "none"],
    "sigmoid_cross_entropy": ["mean", "sum", "none", "sum_classes"],
    "sigmoid_focal_loss": ["mean", "sum", "none", "sum_classes"],
    "asymmetric_loss": ["mean", "sum", "none", "sum_classes"],
}
TORCHS = ["binary_cross_entropy_with_logits", "multilabel_soft_margin_loss"]
FOCAL = ["sigmoid_focal_loss", "asymmetric_loss"]
GAMMAS = [0.0, 1.0, 2.0, 4.0, 7.0, 0.5, 2.5, 11.0]
SPECIALS = [
    0.0,
    -0.0,
    1.0,
    0.5,
    np.inf,
    -np.inf,
    np.nan,
    3e38,
    -3e38,
    1e-40,
    -1e-44,
    17.0,
    -17.0,
    88.0,
    -88.0,
    104.0,
    -104.0,
]
FACTORS = [1.0, 1.0, 0.0, 0.3, 2.0**17, 1e-9, 65536.0, -1.5, 0.25, np.inf]

Array = Any
Wide = np.longdouble


@dataclass
class Case:
    """The arguments of one call, and what is done with its result."""

    function: str
    tensors: dict[str, Tensor | None]
    options: dict[str, Any]
    wanted: list[str]
    backward: str  # "once", "twice" or "create_graph"
    moderate: bool  # no extreme values
    inplace: bool = False
    target_format: str = "dense"
    errors: list[str] = field(default_factory=list)


def lay_out(rng: np.random.Generator, values: Tensor) -> Tensor:
    """The values in memory of a random layout; "expanded" repeats some of them."""
    kind = rng.choice(["contiguous", "permuted", "stepped", "unaligned", "expanded"], p=[0.4, 0.2, 0.15, 0.15, 0.1])
    if kind == "permuted":
        order = [int(dim) for dim in rng.permutation(values.dim())]
        return values.permute(order).contiguous().permute([order.index(dim) for dim in range(values.dim())])
    if kind == "stepped" and values.dim():
        dim = int(rng.integers(values.dim()))
        return torch.repeat_interleave(values, 2, dim)[(slice(None),) * dim + (slice(None, None, 2),)]
    if kind == "unaligned":
        return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)
    if kind == "expanded" and values.dim() and values.numel():
        dim = int(rng.integers(values.dim()))
        return values.narrow(dim, 0, 1).expand(values.shape)
    return values


def random_values(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype, kind: str, extreme: bool
) -> Tensor:
    if kind == "target":
        soft = dtype.is_floating_point and rng.random() < 0.5
        values = rng.random(shape) if soft else (rng.random(shape) < 0.4).astype(float)
        if extreme and dtype.is_floating_point and rng.random() < 0.3:
            values = values * 6 - 3
    elif kind == "logits":
        values = rng.normal(0, rng.choice([0.5, 4, 30]), shape)
    else:
        values = rng.random(shape) * rng.choice([1, 3]) + 0.05
    if extreme and (dtype.is_floating_point):
        chosen = rng.random(shape) < 0.2
        values = np.where(chosen, rng.choice(SPECIALS, shape), values)
    return lay_out(rng, torch.tensor(values, dtype=torch.float64).to(dtype))


def make_case(number: int) -> Case:
    rng = np.random.default_rng(number)
    extreme = bool(rng.random() < 0.4)
    function = str(rng.choice(list(REDUCTIONS)))
    dims = int(rng.integers(1 if function == "multilabel_soft_margin_loss" else 0, 7))
    shape = tuple(int(size) for size in rng.integers(1, {0: 2, 1: 70, 2: 12, 3: 6}.get(dims, 4), dims))
    if dims and rng.random() < 0.05:
        shape = (int(rng.integers(4000, 9300)), *shape[1:2])
    if dims and rng.random() < 0.04:
        shape = (*shape[:-1], 0)
    dtype = FLOATS[rng.integers(4)]
    target_dtype = [*FLOATS, *INTEGERS][rng.integers(10)] if rng.random() < 0.7 else dtype
    x = random_values(rng, shape, dtype, "logits", extreme)
    t = random_values(rng, shape, target_dtype, "target", extreme and function not in FOCAL)
    if target_dtype == dtype and function not in FOCAL and rng.random() < 0.03:
        t = x  # in the same memory

    def factor() -> Tensor | None:
        if rng.random() < 0.5:
            return None
        own = [size if rng.random() < 0.6 else 1 for size in shape][int(rng.integers(len(shape) + 1)) :]
        return random_values(rng, tuple(own), FLOATS[rng.integers(4)], "factor", extreme)

    tensors = {"input": x, "target": t, "weight": factor()}
    if function != "multilabel_soft_margin_loss":
        tensors["pos_weight"] = factor()
    reduction = str(rng.choice(REDUCTIONS[function]))
    options: dict[str, Any] = {"reduction": "mean" if reduction == "sum_classes" and not shape else reduction}
    wanted, inplace = ["input"], False
    if function == "sigmoid_focal_loss":
        options["gamma"] = float(rng.choice(GAMMAS))
        if rng.random() < 0.7:
            options["alpha"] = [-1, None, 0.25, 0.9, 0.0, 1.0][rng.integers(6)]
        else:
            own = [size if rng.random() < 0.6 else 1 for size in shape][int(rng.integers(len(shape) + 1)) :]
            tensors["alpha"] = random_values(rng, tuple(own), FLOATS[rng.integers(4)], "target", False)
    if function == "asymmetric_loss":
        options["gamma_pos"], options["gamma_neg"] = (float(gamma) for gamma in rng.choice(GAMMAS, 2))
        options["clip"] = [0.0, None, 0.05, 0.3, 0.9][rng.integers(5)]
    if function not in TORCHS:
        if rng.random() < 0.4:
            options["label_smoothing"] = float(rng.choice([0.1, 0.37, 1.0]))
            options["smoothing_prior"] = float(rng.choice([0.5, 0.0, 1.0, 0.03]))
            if rng.random() < 0.2:
                del options["smoothing_prior"]
                tensors["prior"] = random_values(rng, shape[-1:], FLOATS[rng.integers(4)], "target", False)
        if rng.random() < 0.15:
            options["target_threshold"] = float(rng.choice([0.2, 0.5, -1.0]))
        inplace = bool(rng.random() < 0.2)
        if rng.random() < 0.25:
            value = float(rng.choice([-1.0, np.nan, 1.0, 0.3]))
            options["ignore_value"] = value
            if target_dtype.is_floating_point or target_dtype is torch.int64:
                ignored = torch.from_numpy(np.asarray(rng.random(shape) < 0.3))
                if t is not x and (target_dtype.is_floating_point or value == -1):
                    t = tensors["target"] = torch.where(ignored, value, t.contiguous()).to(target_dtype)
        if rng.random() < 0.2:
            own = [size if rng.random() < 0.6 else 1 for size in shape][int(rng.integers(len(shape) + 1)) :]
            tensors["mask"] = torch.from_numpy(np.asarray(rng.random(own) < 0.7))
    target_format = "dense"
    if function not in TORCHS and shape and t is not x and rng.random() < 0.3:
        allowed = ["packed", "index_list", "class_index"] if not target_dtype.is_floating_point else ["csr"]
        chosen = str(rng.choice(allowed))
        value = options.get("ignore_value")
        if chosen == "csr" and dims == 2 and not t.isnan().any():
            target_format = chosen
        elif chosen != "csr" and value is None and shape[-1] and set(t.unique().tolist()) <= {0, 1}:
            target_format = chosen
            if chosen == "class_index":
                index = torch.from_numpy(np.asarray(rng.integers(0, shape[-1], shape[:-1])))
                t = tensors["target"] = torch.nn.functional.one_hot(index, shape[-1]).to(target_dtype)
    if not inplace and t is not x:
        for name in ("target", "weight", "pos_weight"):
            if name == "target" and target_format != "dense":
                continue
            tensor = tensors.get(name)
            # the other gradients of focal losses are those of the reference
            is_checked = function not in FOCAL
            if is_checked and tensor is not None and tensor.is_floating_point() and rng.random() < 0.15:
                wanted.append(name)
    backward = "once" if inplace else str(rng.choice(["once", "twice", "create_graph"], p=[0.3, 0.5, 0.2]))
    return Case(function, tensors, options, wanted, backward, not extreme, inplace, target_format)


def in_format(target: Tensor, target_format: str) -> Tensor:
    """Labels, or for "csr" any target, as the loss gets them."""
    if target_format == "csr":
        return target.contiguous().to_sparse_csr()
    if target_format == "packed":
        return torch.from_numpy(np.packbits(target.numpy().astype(bool), -1, "little"))
    if target_format == "class_index":
        return target.int().argmax(-1)
    order = torch.sort(target.int(), dim=-1, descending=True, stable=True)
    return torch.where(order.values > 0, order.indices, -1)


def wide(tensor: Tensor, shape: torch.Size) -> Array:
    return np.broadcast_to(tensor.detach().double().numpy(), shape).astype(Wide)


def counted(case: Case) -> Array | None:
    """Which elements count."""
    mask, value, target = case.tensors.get("mask"), case.options.get("ignore_value"), case.tensors["target"]
    assert target is not None
    if mask is None and value is None:
        return None
    counts = np.broadcast_to(np.ones((), bool) if mask is None else mask.numpy(), target.shape)
    if value is None:
        return counts
    t = target.detach().double().numpy()
    if target.is_floating_point():
        value = float(torch.tensor(value, dtype=torch.float64).to(target.dtype))
    return counts & ~(np.isnan(t) if np.isnan(value) else t == value)


def smallest(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


class Oracle:
    """What is right for a case, and how far off a result may be."""

    def __init__(self, case: Case) -> None:
        tensors, options = case.tensors, case.options
        x, t = tensors["input"], tensors["target"]
        assert x is not None
        assert t is not None
        self.case, self.shape = case, x.shape
        self.dtype = torch.float64 if torch.float64 in (x.dtype, t.dtype) else torch.float32
        self.T = NUMPY[self.dtype]
        self.x, self.t = wide(x, x.shape), wide(t, x.shape)
        self.is_uncertain = np.zeros(x.shape, bool)  # the target
        smoothing, prior = options.get("label_smoothing", 0.0), tensors.get("prior")
        if smoothing:
            kept, added = self.T(1 - smoothing), self.T(smoothing * options.get("smoothing_prior", 0.5))
            if prior is not None:
                added = (self.T(smoothing) * wide(prior.to(self.dtype), x.shape).astype(self.T)).astype(self.T)
            exact = added + (0 if kept == 0 else Wide(kept) * self.t) + np.zeros(x.shape, Wide)
            self.t = exact.astype(self.T).astype(Wide)  # rounded, because the formula gets that
            # Near the middle of two numbers long double may round to the other one, which matters where 1 - t is small.
            half = np.abs(np.abs(exact - self.t) / np.spacing(np.abs(self.t).astype(self.T)) - 0.5)
            self.is_uncertain = half < (2.0**-7 if self.T is np.float64 else 0)
        if "target_threshold" in options:
            is_larger = self.t > self.T(options["target_threshold"])
            self.t = np.where(np.isnan(self.t), self.t, is_larger.astype(Wide))
        self.w, self.p = (
            None if tensors.get(name) is None else wide(tensors[name].to(self.dtype), x.shape)  # type: ignore[union-attr]
            for name in ("weight", "pos_weight")
        )
        counts = counted(case)
        if counts is not None:
            self.w = np.where(counts, 1 if self.w is None else self.w, 0)
        self.counts = np.ones(x.shape, bool) if counts is None else counts
        number = x.numel() if counts is None else max(int(counts.sum()), 1)
        self.divisor = {"mean": number, "sum": 1, "none": 1, "sum_classes": int(np.prod(x.shape[:-1]))}[
            options["reduction"]
        ]
        if case.function == "multilabel_soft_margin_loss" and options["reduction"] != "mean":
            self.divisor = x.shape[-1]

    def focal(self, upstream: Array) -> dict[str, tuple[Array, Array, Array]]:
        """As `elements`, for the losses of focal.h."""
        case, options = self.case, self.case.options
        T, eps, tiny = self.T, torch.finfo(self.dtype).eps, smallest(self.dtype)
        gamma_pos, gamma_neg = (options.get(name, options.get("gamma")) for name in ("gamma_pos", "gamma_neg"))
        clip = options.get("clip") or 0.0
        rounded = tuple(Wide(T(value)) for value in (gamma_pos, gamma_neg, clip))
        right = exact_focal(self.x, self.t, rounded, 1.0 if self.p is None else self.p)
        alpha, label_alpha = options.get("alpha"), case.tensors.get("alpha")
        balance = np.ones((), Wide)
        if label_alpha is not None or (alpha is not None and alpha != -1):
            a = wide(label_alpha.to(self.dtype), self.shape) if label_alpha is not None else Wide(T(alpha))
            balance = a * self.t + (1 - a) * (1 - self.t)
        w = np.ones((), Wide) if self.w is None else self.w
        factor = product_of_factors(w, balance)
        wu = product_of_factors(factor, upstream)
        loss, gradient = product(factor, right.loss), product(wu, right.gradient)
        given = {name: None if tensor is None else tensor.detach() for name, tensor in case.tensors.items()}
        x, t, mask = given["input"], given["target"], given.get("mask")
        assert x is not None
        factors = given.get("weight"), given.get("pos_weight"), None, mask, given.get("alpha"), given.get("prior")
        narrow = x.to(self.dtype), t, *factors, None, None
        smoothing = options.get("label_smoothing", 0.0), options.get("smoothing_prior", 0.5)
        focus = gamma_pos, gamma_neg, clip, None if alpha == -1 else alpha
        options_of_op = (
            "none",
            self.dtype,
            1,
            *smoothing,
            options.get("ignore_value"),
            *focus,
            options.get("target_threshold"),
        )
        same = reference.sigmoid_cross_entropy(*narrow, *options_of_op).double().numpy()  # type: ignore[arg-type]
        up = torch.from_numpy(np.broadcast_to(upstream, self.shape).astype(T))
        (of_input, *_) = reference.gradients((True, *(False,) * 4), up, *narrow, *options_of_op)  # type: ignore[arg-type]
        assert of_input is not None
        steps = tiny * ((1 + max(gamma_pos, gamma_neg)) / (clip or 1) * (1 + np.abs(1.0 if self.p is None else self.p)))
        p = np.ones((), Wide) if self.p is None else np.abs(self.p)
        is_odd = ~np.isfinite(p)  # an infinite factor of what is 0, or as small as a rounding
        size, is_created = np.nan_to_num(np.abs(self.x), posinf=0), case.backward == "create_graph"
        bounds = []
        for terms, by, u in (
            (right.loss_terms, np.abs(factor), 0),
            (right.gradient_terms, np.abs(wu), np.abs(upstream)),
        ):
            bound = product(by, (right.bound + 6) * eps * product(right.power, terms) + steps + tiny * (terms + size))
            if options.get("label_smoothing") and is_created:  # plain torch rounds the smoothed target twice
                bound = bound + eps * product(by, right.power * (1 + p))
            bound = np.nan_to_num(bound + 4 * tiny * (1 + by) * (1 + u) * (1 + p), nan=np.inf)
            bounds.append(np.where(by == 0, 0, np.where(is_odd, np.inf, bound)))
        self.overflows = np.isinf((product_of_factors(w, upstream) * self.divisor).astype(T))
        unknown = np.where(np.isfinite(gradient), self.overflows, (wu != 0) & (np.abs(wu) < 8 * tiny))
        unknown = unknown | (np.isinf(wu) & (np.abs(right.gradient) < 64 * tiny)) | self.is_uncertain
        bounds[0] = np.where(self.is_uncertain, np.inf, bounds[0])
        return {
            "loss": (np.where(bounds[0] == np.inf, 0, loss), same, bounds[0]),
            "input": (gradient, of_input.double().numpy(), np.where(unknown, np.inf, bounds[1])),
        }

    def elements(self, upstream: Array) -> dict[str, tuple[Array, Array, Array]]:
        """The loss and the gradient by input of each element: the value, that in the dtype computed in, and the bound.

        Also the derivatives by the other arguments, to a few units of the sum of what is added up.
        """
        if self.case.function in FOCAL:
            return self.focal(upstream)
        T, eps, tiny = self.T, torch.finfo(self.dtype).eps, smallest(self.dtype)
        narrow = [None if a is None else a.astype(T) for a in (self.x, self.t, self.w, self.p, upstream)]
        loss_in_dtype, in_dtype, _ = expected(*narrow)  # type: ignore[arg-type]
        loss, exact, _ = expected(self.x, self.t, self.w, self.p, upstream)
        size = np.abs(self.x)
        log, smaller = np.log1p(np.exp(-size)), np.exp(-size) / (1 + np.exp(-size))
        factor = np.ones((), Wide) if self.p is None else self.p
        positive = np.abs(product_of_factors(factor, self.t))
        negative = np.abs(1 - self.t)
        is_negative = np.signbit(self.x)
        slope, other = np.where(is_negative, positive, negative), np.where(is_negative, negative, positive)
        w = np.ones((), Wide) if self.w is None else np.abs(self.w)
        u = np.abs(upstream)
        wu = product_of_factors(w, u)
        p = np.where((self.t == 0) | (w == 0) | (self.p is None), 0, 1 if self.p is None else np.abs(self.p))
        # Both terms, of which the other one is 0 for a target of 0 or 1.
        ulps = np.where(((self.t == 0) | (self.t == 1)) & (self.p is None), 2, 4)
        # a subnormal exp(-|x|) or factor, as often as it is multiplied
        steps = tiny * (2 + 2 * p) * (1 + positive + negative)
        loss_terms = product(slope, size + log) + product(other, log)
        gradient_terms = product(slope, 1 - smaller) + product(other, smaller)
        loss_bound = (ulps + 1) * eps * product(w, loss_terms) + steps * (1 + w)
        gradient_bound = (ulps + 4) * eps * product(wu, gradient_terms) + steps * (1 + w) * (1 + u)
        if self.p is not None:
            # a subnormal pos_weight * target
            loss_bound = loss_bound + tiny * product(w, np.where(np.isfinite(size), size, 0))
        if self.case.options.get("label_smoothing") and self.case.backward == "create_graph":
            # plain torch rounds the smoothed target twice
            gradient_bound = gradient_bound + eps * wu * (1 + p)
        # weight * upstream may overflow before it is divided
        self.overflows = np.isinf((wu * self.divisor).astype(T))
        # or become 0, which would leave out an infinity
        vanishes = (wu != 0) & (wu < 8 * tiny)
        unknown = np.where(np.isfinite(exact["input"]), self.overflows, vanishes)
        loss_bound, gradient_bound = np.where(w == 0, 0, loss_bound), np.where(wu == 0, 0, gradient_bound)
        gradient_bound = np.where(unknown, np.inf, gradient_bound)
        of_positive, of_negative = np.where(is_negative, size + log, log), np.where(is_negative, log, size + log)
        by_t = left_out(self.t == 0, product(np.abs(factor), of_positive)) + left_out(self.t == 1, of_negative)
        by_p = left_out(factor == 0, product(np.abs(self.t), of_positive))
        by_w = left_out(w == 0, loss_terms)
        of_others = (("target", wu, by_t), ("weight", u, by_w), ("pos_weight", wu, by_p))
        lost = np.nan_to_num(steps + tiny * (np.abs(self.t) + size), posinf=0)  # by subnormal products
        others = {}
        for name, factor_of, terms in of_others:
            if name not in exact:
                continue
            error = product(factor_of, 32 * eps * terms + lost) + tiny * (64 + 2 * terms)
            error = np.where(self.overflows & np.isfinite(exact[name]), np.inf, np.where(factor_of == 0, 0, error))
            # terms that overflow, and are then left out, are not those of the formula
            is_right = np.isfinite(terms.astype(T)) & np.isfinite(positive.astype(T))
            others[name] = (
                np.where(is_right, exact[name], in_dtype[name]),
                in_dtype[name],
                np.nan_to_num(error, posinf=np.inf),
            )
        return {
            "loss": (loss, loss_in_dtype, loss_bound),
            "input": (exact["input"], in_dtype["input"], gradient_bound),
            **others,
        }


def check(case: Case, what: str, got: Tensor, exact: Array, same: Array, bound: Array) -> float:
    """Compare a result; the worst error over its bound."""
    info = torch.finfo(got.dtype)
    ours = got.detach().double().numpy().astype(Wide)
    exact, same, bound = (np.broadcast_to(np.asarray(a, dtype=Wide), ours.shape) for a in (exact, same, bound))
    is_unknown = bound == np.inf
    bound = bound + 0.51 * info.eps * np.abs(exact) + 0.51 * smallest(got.dtype)
    error = np.abs(ours - exact)
    odd = ~np.isfinite(same)
    good = np.where(np.isfinite(exact), error <= bound, False) | is_unknown
    good |= odd & ((ours == same) | (np.isnan(ours) & np.isnan(same)))
    # a product of factors that underflows is a factor of 0
    good |= ~np.isfinite(exact) & (same == 0) & (ours == 0)
    # at the end of the range of the dtype computed in or of the result
    overflows = (np.abs(exact) + bound >= info.max * (1 - info.eps)) | (odd & (np.abs(exact) > 1e38) & np.isinf(same))
    good |= overflows & ((ours == np.copysign(Wide(np.inf), exact)) | (error <= bound))
    if not good.all():
        place = tuple(int(index[0]) for index in np.nonzero(~good)) if ours.shape else ()
        case.errors.append(
            f"{what}{list(place)} is {float(ours[place])!r}, right {float(exact[place])!r} within "
            f"{float(bound[place]):.3g} (computed in the dtype: {float(same[place])!r})"
        )
    ratio = np.where(good & ~odd & np.isfinite(error), error / bound, 0)
    return float(ratio.max(initial=0.0))


def reduced(oracle: Oracle, exact: Array, same: Array, bound: Array) -> tuple[Array, Array, Array]:
    """The loss of elements, added up and divided as the case wants it."""
    case, divisor = oracle.case, Wide(oracle.divisor)
    reduction = case.options["reduction"]
    by_rows = case.function == "multilabel_soft_margin_loss"
    if reduction == "none" and not by_rows:
        return exact, same, bound
    axis = -1 if reduction == "none" else None
    if by_rows and reduction == "sum" and oracle.shape[:-1].numel() == 0:
        divisor = Wide(1)
    wide_eps = 64 * np.finfo(np.float64).eps
    total = bound.sum(axis) + wide_eps * np.abs(exact).sum(axis)
    in_float64 = same.astype(np.float64).sum(axis) / np.float64(divisor)
    return exact.sum(axis) / divisor, in_float64, total / divisor


def unbroadcast(values: Array, shape: torch.Size) -> Array:
    values = values.sum(tuple(range(values.ndim - len(shape))))
    return values.sum(tuple(dim for dim, size in enumerate(shape) if size == 1), keepdims=True)


def run(number: int) -> tuple[Case, dict[str, float]]:
    """Run a case; its errors are in it, and the worst ones over their bounds are returned."""
    case = make_case(number)
    rng = np.random.default_rng((number, 1))
    tensors = case.tensors
    leaves = {name: tensors[name].detach().requires_grad_() for name in case.wanted}  # type: ignore[union-attr]
    before = {name: tensor.detach().clone() for name, tensor in tensors.items() if tensor is not None}
    arguments = {**tensors, **leaves}
    logits = arguments.pop("input")
    target = arguments.pop("target")
    assert logits is not None
    given = logits * 1 if case.inplace else logits
    options = {**case.options, "inplace": True} if case.inplace else case.options
    if case.target_format != "dense":
        target = in_format(target, case.target_format)  # type: ignore[arg-type]
        if case.target_format != "csr":
            options = {**options, "target_format": case.target_format}
    if "prior" in arguments:
        arguments["smoothing_prior"] = arguments.pop("prior")
    loss = getattr(F, case.function)(given, target, **arguments, **options)

    worst: dict[str, float] = {}
    oracle = Oracle(case)
    # the upstream gradient
    if loss.dim() == 0:
        upstream = torch.tensor(rng.choice(FACTORS if not case.moderate else FACTORS[:-1])).to(loss.dtype)
    else:
        values = np.where(rng.random(loss.shape) < 0.1, 0, rng.normal(0, 3, loss.shape))
        upstream = lay_out(rng, torch.tensor(values, dtype=loss.dtype))
    rows = (
        case.function == "multilabel_soft_margin_loss"
        and loss.dim() == logits.dim() - 1
        and case.options["reduction"] == "none"
    )
    spread = upstream.unsqueeze(-1) if rows else upstream
    u = np.where(oracle.counts, wide(spread.to(oracle.dtype), logits.shape), 0)
    case.moderate = case.moderate and bool(np.isfinite(u).all())
    right = oracle.elements(u / Wide(oracle.divisor))
    exact, same, bound = reduced(oracle, *right["loss"])
    worst[f"{loss.dtype} loss"] = check(case, "loss", loss, exact, same, bound)
    expected_dtype = result_dtype(case)
    if loss.dtype != expected_dtype:
        case.errors.append(f"loss has dtype {loss.dtype}, not {expected_dtype}")

    keep = case.backward != "once"
    gradients = torch.autograd.grad(
        loss, list(leaves.values()), upstream, retain_graph=keep, create_graph=case.backward == "create_graph"
    )
    exact, same, bound = right["input"]
    if case.backward == "create_graph":
        bound = bound * 6  # by plain torch operations
    if case.inplace and loss.dim() == 0 and float(upstream) != 1:
        check_rounded_twice(case, oracle, upstream, gradients[0], exact, same, bound)
    else:
        worst[f"{logits.dtype} gradient"] = check(case, "gradient", gradients[0], exact, same, bound)
    check_other_gradients(case, oracle, right, gradients)
    if case.backward == "twice":
        again = torch.autograd.grad(loss, list(leaves.values()), upstream)
        for name, first, second in zip(leaves, gradients, again, strict=True):
            known = torch.ones((), dtype=torch.bool)
            if name == "input":  # weight * upstream may overflow before it meets a small gradient
                known = torch.from_numpy(np.asarray(~oracle.overflows))
            if (known & (first.nan_to_num(7.0) != second.nan_to_num(7.0))).any():
                case.errors.append(f"a second backward pass gives another gradient of {name}")
    if case.function not in FOCAL and case.moderate and case.backward == "create_graph" and gradients[0].requires_grad:
        check_second_derivative(case, oracle, u, gradients[0], leaves["input"])
    for name, tensor in before.items():
        kept = tensors[name]
        assert kept is not None
        if not torch.equal(tensor.nan_to_num(7.0), kept.detach().nan_to_num(7.0)):
            case.errors.append(f"{name} was overwritten")
    if not case.inplace and logits.numel() and case.target_format == "dense":
        dense = torch._prims_common.is_non_overlapping_and_dense_or_false(logits)
        for what, tensor in (("gradient", gradients[0]), ("loss", loss)):
            if dense and case.backward != "create_graph" and tensor.shape == logits.shape:
                sizes = [size for size in logits.shape if size != 1]
                strides = [
                    [s for s, n in zip(each.stride(), logits.shape, strict=True) if n != 1] for each in (tensor, logits)
                ]
                if sizes and strides[0] != strides[1]:
                    case.errors.append(f"{what} has strides {tensor.stride()}, the logits {logits.stride()}")
    return case, worst


def result_dtype(case: Case) -> torch.dtype:
    x, t, weight = (case.tensors[name] for name in ("input", "target", "weight"))
    assert x is not None
    assert t is not None
    if case.function == "sigmoid_focal_loss":
        return torch.promote_types(x.dtype, t.dtype)
    if case.function == "multilabel_soft_margin_loss":
        dtype = torch.promote_types(x.dtype, t.dtype)
        return torch.promote_types(dtype, weight.dtype) if weight is not None and weight.dim() else dtype
    return t.dtype if t.is_floating_point() else x.dtype


def check_rounded_twice(
    case: Case, oracle: Oracle, upstream: Tensor, got: Tensor, exact: Array, same: Array, bound: Array
) -> None:
    """A gradient that has overwritten the logits before the upstream factor came."""
    if not upstream.isfinite():  # only what was left out is known
        if oracle.w is not None and (got[torch.from_numpy(np.asarray(oracle.w == 0))] != 0).any():
            case.errors.append("a weight of 0 does not leave out an infinite upstream factor")
        return
    factor, info = Wide(float(upstream)), torch.finfo(got.dtype)
    if factor == 0:
        exact = same = np.zeros_like(exact)
    if oracle.w is not None:  # a weight that is too small for any number when it is divided is a factor of 0
        has_vanished = (np.abs(oracle.w) / oracle.divisor < 8 * smallest(oracle.dtype)) & ~np.isfinite(exact)
        bound = np.where(has_vanished & (got.detach().double().numpy() == 0), np.inf, bound)
    # and what rounds the factor to float32
    lost = (0.51 * info.eps + 2.0**-24) * np.abs(exact) + 1.51 * smallest(got.dtype) * np.abs(factor)
    bound = np.where(np.abs(exact) > info.max * np.abs(factor), np.inf, bound + np.nan_to_num(lost, posinf=np.inf))
    check(case, "overwritten gradient", got, exact, same, np.where((exact == 0) & (bound != np.inf), 0, bound))


def check_other_gradients(
    case: Case, oracle: Oracle, right: dict[str, tuple[Array, Array, Array]], gradients: tuple[Tensor, ...]
) -> None:
    """Those of target, weight and pos_weight, added up where these were broadcast."""
    for name, gradient in zip(case.wanted, gradients, strict=True):
        if name == "input":
            continue
        kept = 1 - case.options.get("label_smoothing", 0.0) if name == "target" else 1.0
        if name == "target" and "target_threshold" in case.options:
            kept = 0.0
        values = [product(np.asarray(kept), values) for values in right[name]]
        is_loose = oracle.overflows | ~np.isfinite(values[2].astype(oracle.T))
        exact, same, bound, may_overflow = (unbroadcast(each, gradient.shape) for each in (*values, is_loose))
        count = oracle.x.size // max(exact.size, 1)
        bound = bound * (1 + count / 256)
        if count > 1:  # where an infinity is added up, the order decides what overflows
            bound = np.where(may_overflow > 0, np.inf, bound)
        check(case, f"gradient of {name}", gradient, exact, same, bound)


def check_second_derivative(case: Case, oracle: Oracle, upstream: Array, gradient: Tensor, x: Tensor) -> None:
    (second,) = torch.autograd.grad(gradient.sum(), x)
    size = np.abs(oracle.x)
    e = np.exp(-size)
    w, p = (Wide(1) if factor is None else factor for factor in (oracle.w, oracle.p))
    factor = product_of_factors(upstream, w) / Wide(oracle.divisor)
    exact = product(factor, (1 - oracle.t + p * oracle.t) * e / (1 + e) ** 2)
    terms = product(np.abs(factor), (1 + (1 + p) * np.abs(oracle.t)) * e / (1 + e) ** 2)
    bound = 64 * torch.finfo(oracle.dtype).eps * terms + 64 * smallest(oracle.dtype) * (1 + np.abs(upstream * w * p))
    check(case, "second derivative", second, exact, exact, bound)


def run_many(numbers: range) -> tuple[Counter[str], dict[str, float], list[str]]:
    """Counts of what was covered, the worst errors over their bounds, and failures."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    worst: dict[str, float] = {}
    failures = []
    for number in numbers:
        with np.errstate(all="ignore"):
            try:
                case, errors = run(number)
            except Exception as error:
                failures.append(f"case {number}: {type(error).__name__}: {error}")
                continue
        x, t = case.tensors["input"], case.tensors["target"]
        assert x is not None
        assert t is not None
        counts.update(
            [
                case.function,
                case.options["reduction"],
                case.target_format,
                case.target_format,
                f"input {x.dtype}",
                f"target {t.dtype}",
                case.backward,
            ]
        )
        counts.update(["moderate" if case.moderate else "extreme", *(f"by {name}" for name in case.wanted)])
        counts.update(["inplace"] * case.inplace + ["empty"] * (x.numel() == 0) + ["strided"] * (not x.is_contiguous()))
        for name, error in errors.items():
            worst[name] = max(worst.get(name, 0.0), error)
        failures += [f"case {number}: {case.function} {case.options}: {error}" for error in case.errors]
    return counts, worst, failures


def main() -> int:
    """Run cases and report; 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    begin = time.monotonic()
    last = options.seed + options.cases
    parts = [range(first, min(first + 500, last)) for first in range(options.seed, last, 500)]
    counts: Counter[str] = Counter()
    worst: dict[str, float] = {}
    failures: list[str] = []
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for part_counts, part_worst, part_failures in pool.imap_unordered(run_many, parts):
            counts += part_counts
            worst = {name: max(worst.get(name, 0.0), part_worst.get(name, 0.0)) for name in {*worst, *part_worst}}
            failures += part_failures
    for name, count in sorted(counts.items()):
        print(f"{count:8} {name}")
    for name, error in sorted(worst.items()):
        print(f"{error:8.3f} of the bound: {name}")
    for failure in failures[:50]:
        print(failure, file=sys.stderr)
    print(f"cases {options.seed} to {last - 1}: {len(failures)} failures, {time.monotonic() - begin:.0f} s")
    if failures:
        print("again: python tests/fuzz.py --cases 1 --seed NUMBER", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
