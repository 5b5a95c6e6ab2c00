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
from test_specials import expected, product
from torch import Tensor

import fused_sce

F = fused_sce.functional

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
REDUCTIONS = {
    "binary_cross_entropy_with_logits": ["mean", "sum", "none"],
    "multilabel_soft_margin_loss": ["mean", "sum", "none"],
    "sigmoid_cross_entropy": ["mean", "sum", "none", "sum_classes"],
}
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
    t = random_values(rng, shape, target_dtype, "target", extreme)
    if target_dtype == dtype and rng.random() < 0.03:
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
    if function == "sigmoid_cross_entropy":
        if rng.random() < 0.4:
            options["label_smoothing"] = float(rng.choice([0.1, 0.37, 1.0]))
            options["smoothing_prior"] = float(rng.choice([0.5, 0.0, 1.0, 0.03]))
        inplace = bool(rng.random() < 0.2)
    if not inplace and t is not x:
        for name in ("target", "weight", "pos_weight"):
            tensor = tensors.get(name)
            if tensor is not None and tensor.is_floating_point() and rng.random() < 0.15:
                wanted.append(name)
    backward = "once" if inplace else str(rng.choice(["once", "twice", "create_graph"], p=[0.3, 0.5, 0.2]))
    return Case(function, tensors, options, wanted, backward, not extreme, inplace)


def wide(tensor: Tensor, shape: torch.Size) -> Array:
    return np.broadcast_to(tensor.detach().double().numpy(), shape).astype(Wide)


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
        smoothing = options.get("label_smoothing", 0.0)
        if smoothing:
            kept, added = self.T(1 - smoothing), self.T(smoothing * options["smoothing_prior"])
            # rounded, because the formula gets that
            self.t = (added + (0 if kept == 0 else Wide(kept) * self.t)).astype(self.T).astype(Wide) * np.ones(x.shape)
        self.w, self.p = (
            None if tensors.get(name) is None else wide(tensors[name].to(self.dtype), x.shape)  # type: ignore[union-attr]
            for name in ("weight", "pos_weight")
        )
        self.by_reference = "weight" in case.wanted or "pos_weight" in case.wanted
        self.divisor = {"mean": x.numel(), "sum": 1, "none": 1, "sum_classes": int(np.prod(x.shape[:-1]))}[
            options["reduction"]
        ]
        if case.function == "multilabel_soft_margin_loss" and options["reduction"] != "mean":
            self.divisor = x.shape[-1]

    def elements(self, upstream: Array) -> dict[str, tuple[Array, Array, Array]]:
        """Loss and gradient of each element: the value, that in the dtype computed in, and the bound."""
        T, eps, tiny = self.T, torch.finfo(self.dtype).eps, smallest(self.dtype)
        narrow = [None if a is None else a.astype(T) for a in (self.x, self.t, self.w, self.p, upstream)]
        same = expected(*narrow)[:2]  # type: ignore[arg-type]
        exact = expected(self.x, self.t, self.w, self.p, upstream)
        size = np.abs(self.x)
        log, smaller = np.log1p(np.exp(-size)), np.exp(-size) / (1 + np.exp(-size))
        factor = np.ones((), Wide) if self.p is None else self.p
        positive = np.abs(np.where((factor == 0) | (self.t == 0), 0, factor * self.t))
        negative = np.abs(1 - self.t)
        is_negative = np.signbit(self.x)
        finite_size = np.where(np.isfinite(size), size, 0)
        slope, other = np.where(is_negative, positive, negative), np.where(is_negative, negative, positive)
        w = np.ones((), Wide) if self.w is None else np.abs(self.w)
        u = np.abs(upstream)
        wu = np.where((w == 0) | (u == 0), 0, w * u)
        p = np.where((self.t == 0) | (w == 0) | (self.p is None), 0, 1 if self.p is None else np.abs(self.p))
        # Both terms, of which the other one is 0 for a target of 0 or 1.
        is_plain = self.p is None and not self.by_reference
        ulps = np.where(((self.t == 0) | (self.t == 1)) & is_plain, 2, 24 if self.by_reference else 4)
        # a subnormal exp(-|x|) or factor, as often as it is multiplied
        steps = tiny * (2 + 2 * p) * (1 + positive + negative)
        loss_terms = product(slope, size + log) + product(other, log)
        gradient_terms = product(slope, 1 - smaller) + product(other, smaller)
        loss_bound = (ulps + 1) * eps * product(w, loss_terms) + steps * (1 + w)
        gradient_bound = (ulps + 4) * eps * product(wu, gradient_terms) + steps * (1 + w) * (1 + u)
        if self.p is not None:
            loss_bound = loss_bound + tiny * product(
                w, np.where(np.isfinite(size), size, 0)
            )  # subnormal pos_weight * target
        if self.case.options.get("label_smoothing") and (self.by_reference or self.case.backward == "create_graph"):
            # plain torch rounds the smoothed target twice
            loss_bound = loss_bound + eps * w * (1 + p) * (finite_size + 1)
            gradient_bound = gradient_bound + eps * wu * (1 + p)
        # weight * upstream may overflow before it is divided
        overflows = np.isinf((wu * self.divisor).astype(T)) & np.isfinite(exact[1])
        gradient_bound = np.where(overflows, np.inf, gradient_bound)
        loss_bound, gradient_bound = np.where(w == 0, 0, loss_bound), np.where(wu == 0, 0, gradient_bound)
        return {"loss": (exact[0], same[0], loss_bound), "gradient": (exact[1], same[1], gradient_bound)}


def check(case: Case, what: str, got: Tensor, exact: Array, same: Array, bound: Array) -> float:
    """Compare a result; the worst error over its bound."""
    info = torch.finfo(got.dtype)
    ours = got.detach().double().numpy().astype(Wide)
    exact, same, bound = (np.broadcast_to(np.asarray(a, dtype=Wide), ours.shape) for a in (exact, same, bound))
    bound = bound + 0.51 * info.eps * np.abs(exact) + 0.51 * smallest(got.dtype)
    error = np.abs(ours - exact)
    good = (error <= bound) | (bound == np.inf)
    odd = ~np.isfinite(same)
    good = np.where(odd, (ours == same) | (np.isnan(ours) & np.isnan(same)), good)
    # a product of factors that underflows is a factor of 0
    good |= ~np.isfinite(exact) & (same == 0) & (ours == 0)
    if what == "gradient" and ("weight" in case.wanted or "pos_weight" in case.wanted) and not case.moderate:
        # Automatic differentiation of the reference adds up terms, which overflow and make inf - inf or 0 * inf.
        good |= ~np.isfinite(ours) | ~np.isfinite(exact)
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
    u = wide(spread.to(oracle.dtype), logits.shape)
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
    exact, same, bound = right["gradient"]
    if case.backward == "create_graph":
        bound = bound * 6  # by plain torch operations
    rounded_twice = case.inplace and loss.dim() == 0
    if not (rounded_twice and float(upstream) != 1):
        worst[f"{logits.dtype} gradient"] = check(case, "gradient", gradients[0], exact, same, bound)
    if case.moderate:
        check_other_gradients(case, oracle, u, gradients)
    if case.backward == "twice":
        again = torch.autograd.grad(loss, list(leaves.values()), upstream)
        for name, first, second in zip(leaves, gradients, again, strict=True):
            if not torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0)):
                case.errors.append(f"a second backward pass gives another gradient of {name}")
    if case.moderate and case.backward == "create_graph" and gradients[0].requires_grad:
        check_second_derivative(case, oracle, u, gradients[0], leaves["input"])
    for name, tensor in before.items():
        kept = tensors[name]
        assert kept is not None
        if not torch.equal(tensor.nan_to_num(7.0), kept.detach().nan_to_num(7.0)):
            case.errors.append(f"{name} was overwritten")
    if not case.inplace and logits.numel():
        dense = torch._prims_common.is_non_overlapping_and_dense_or_false(logits)
        for what, tensor in (("gradient", gradients[0]), ("loss", loss)):
            if dense and not oracle.by_reference and case.backward != "create_graph" and tensor.shape == logits.shape:
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
    if case.function == "multilabel_soft_margin_loss":
        dtype = torch.promote_types(x.dtype, t.dtype)
        return torch.promote_types(dtype, weight.dtype) if weight is not None and weight.dim() else dtype
    return t.dtype if t.is_floating_point() else x.dtype


def check_other_gradients(case: Case, oracle: Oracle, upstream: Array, gradients: tuple[Tensor, ...]) -> None:
    """Those of target, weight and pos_weight, to a few units of the sum of what is added up."""
    x, t = oracle.x, oracle.t
    w, p = (Wide(1) if factor is None else factor for factor in (oracle.w, oracle.p))
    size = np.abs(x)
    of_positive, of_negative = np.log1p(np.exp(-size)) + np.maximum(-x, 0), np.log1p(np.exp(-size)) + np.maximum(x, 0)
    derivatives = {
        "target": w * (1 - case.options.get("label_smoothing", 0.0)) * (p * of_positive - of_negative),
        "weight": (1 - t) * of_negative + p * t * of_positive,
        "pos_weight": w * t * of_positive,
    }
    terms = {"target": w * (p * of_positive + of_negative)}
    for name, gradient in zip(case.wanted, gradients, strict=True):
        if name == "input":
            continue
        each = upstream * derivatives[name] / Wide(oracle.divisor)
        size_of = np.abs(upstream) * np.abs(terms.get(name, derivatives[name])) / Wide(oracle.divisor)
        exact, bound = (unbroadcast(values * np.ones(oracle.shape), gradient.shape) for values in (each, size_of))
        eps = torch.finfo(oracle.dtype).eps
        step = smallest(oracle.dtype) * 64 * max(each.size, 1)
        check(case, f"gradient of {name}", gradient, exact, exact, (32 + each.size / 8) * eps * bound + step)


def check_second_derivative(case: Case, oracle: Oracle, upstream: Array, gradient: Tensor, x: Tensor) -> None:
    (second,) = torch.autograd.grad(gradient.sum(), x)
    size = np.abs(oracle.x)
    e = np.exp(-size)
    w, p = (Wide(1) if factor is None else factor for factor in (oracle.w, oracle.p))
    exact = upstream * w * (1 - oracle.t + p * oracle.t) * e / (1 + e) ** 2 / Wide(oracle.divisor)
    terms = np.abs(upstream * w) * (1 + (1 + p) * np.abs(oracle.t)) * e / (1 + e) ** 2 / Wide(oracle.divisor)
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
            [case.function, case.options["reduction"], f"input {x.dtype}", f"target {t.dtype}", case.backward]
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
