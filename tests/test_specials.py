"""Infinities, NaN, zeros and subnormals in every argument, and targets that are no probabilities."""

from __future__ import annotations

import itertools
import math
import signal
import subprocess
import sys
from typing import Any, NamedTuple

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

import fused_sce
from fused_sce import _autograd, reference

F = fused_sce.functional
INF, NAN = math.inf, math.nan

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]


def specials(dtype: torch.dtype) -> list[float]:
    info = torch.finfo(dtype)
    return [0.0, -0.0, 1.0, 0.5, INF, -INF, NAN, info.max / 2, info.smallest_normal / 8]


def product(factor: Array, value: Array) -> Array:
    """`factor * value`, and 0 where the factor is 0."""
    return np.where(factor == 0, 0, factor * value)


def product_of_factors(a: Array, b: Array) -> Array:
    return np.where((a == 0) | (b == 0), 0, a * b)


def left_out(condition: Array, value: Array) -> Array:
    """The value, 0 where a factor of 0 leaves out an infinity or NaN."""
    return np.where(condition & ~np.isfinite(value), 0, value)


def expected(
    x: Array, t: Array, weight: Array | None, pos_weight: Array | None, upstream: Array
) -> tuple[Array, dict[str, Array], Array]:
    """Loss, gradients and the size of the loss's terms, in the dtype of the arguments, which decides what overflows."""
    size = np.abs(x)
    log = np.log1p(np.exp(-size))
    smaller = np.exp(-size) / (1 + np.exp(-size))
    is_negative = np.signbit(x)
    of_positive, of_negative = np.where(is_negative, size + log, log), np.where(is_negative, log, size + log)
    gradients = {}
    if pos_weight is None:
        slope = np.where(is_negative, t, 1 - t)
        loss, gradient = product(slope, size) + log, slope - smaller
        terms = np.abs(loss)
        gradients["target"] = np.where(np.isinf(x) & (slope == 0), 0, -x)
    else:
        positive = product_of_factors(pos_weight, t)
        slope, other = np.where(is_negative, positive, 1 - t), np.where(is_negative, 1 - t, positive)
        loss = product(slope, size + log) + product(other, log)
        terms = np.abs(product(slope, size + log)) + np.abs(product(other, log))
        gradient = product(slope, 1 - smaller) - product(other, smaller)
        gradients["target"] = left_out(t == 0, product(pos_weight, of_positive)) - left_out(t == 1, of_negative)
        gradients["pos_weight"] = left_out(pos_weight == 0, product(t, of_positive))
        # Only the sum of the terms is known, to a rounding: times an infinite weight anything.
        terms = np.where(np.abs(loss) <= 4 * np.finfo(loss.dtype).eps * terms, np.inf, terms)
    gradients["input"] = np.where(is_negative, -gradient, gradient)
    factor = upstream if weight is None else product_of_factors(weight, upstream)
    gradients = {name: product(factor, each) for name, each in gradients.items()}
    if weight is not None:
        gradients["weight"] = product(upstream, left_out(weight == 0, loss))
        loss, terms = product(weight, loss), product(np.abs(weight), terms)
    return loss, gradients, terms


class ExactFocal(NamedTuple):
    """What `focal` gives."""

    loss: Array
    gradient: Array
    loss_terms: Array  # the sums of the sizes of their terms but for the power
    gradient_terms: Array
    power: Array
    bound: Array  # of both, in ULP: see csrc/formulas/focal.h


def exact_focal(x: Array, t: Array, focus: tuple[float, float, float], pos_weight: Any = 1.0) -> ExactFocal:
    """Focal or asymmetric loss (`gamma_pos`, `gamma_neg`, `clip`) and gradient, in the dtype of x."""
    gamma_pos, gamma_neg, clip = (np.asarray(value, x.dtype) for value in focus)
    size = np.abs(x)
    log, smaller = np.log1p(np.exp(-size)), np.exp(-size) / (1 + np.exp(-size))
    larger = 1 / (1 + np.exp(-size))
    p, s = np.where(x < 0, smaller, larger), np.where(x < 0, larger, smaller)
    q = np.where(p <= clip, 0, p - clip) if clip else p
    of_positive = np.where(x < 0, size + log, log)
    softplus = np.where(x < 0, log, size + log)
    of_negative = np.where(q < 0.5, -np.log1p(-q), -np.log(s + clip)) if clip else softplus
    slope = np.where(q == 0, 0, p * s / (s + clip)) if clip else p
    positive, negative = product_of_factors(np.asarray(pos_weight, x.dtype), t), 1 - t
    c = product(positive, of_positive) + product(negative, of_negative)
    c_terms = product(np.abs(positive), of_positive) + product(np.abs(negative), of_negative)
    m = t * s + negative * q
    g = gamma_neg + t * (gamma_pos - gamma_neg)
    # log(m) without the logarithm of a rounded probability
    log_q = np.log(np.where(q == 0, 1, q)) if clip else -of_positive
    log_m = np.where(t == 1, -softplus, np.where(t == 0, log_q, np.log(np.where(m == 0, 1, m))))
    power = np.where((m == 0) & (g > 0) & (t != 1) & bool(clip), 0, np.exp(product(g, log_m)))
    lower = np.where(m == 0, 1, m)
    rates = [np.where(np.isinf(x), 0, g * part * p * s / lower) for part in (t, np.where(q == 0, 0, negative))]
    by_rate = [product_of_factors(rate, c) for rate in rates]
    gradient = product(negative, slope) - product(positive, s) - by_rate[0] + by_rate[1]
    terms = product(np.abs(negative), slope) + product(np.abs(positive), s)
    terms = terms + sum(product_of_factors(np.abs(rate), c_terms) for rate in rates)
    condition = np.where(clip > 0, (1 + g) * np.where(q == 0, 1, p / np.where(q == 0, 1, q)), g)
    of_soft = 8 + 4 * np.maximum(condition, g) + 2 * g * np.abs(np.log(lower))
    bound = np.where((t == 0) | (t == 1), 4 + 2 * np.where(t == 1, g, condition), of_soft)
    return ExactFocal(product_of_factors(power, c), product_of_factors(power, gradient), c_terms, terms, power, bound)


def assert_agrees(ours: Tensor, right: Array, arguments: dict[str, Tensor], terms: Array | None = None) -> None:
    """Infinities and NaN at the same places, the rest close: how close is for others to test."""
    info = torch.finfo(ours.dtype)
    close = torch.isclose(
        ours, torch.from_numpy(right), rtol=16 * info.eps, atol=4 * info.smallest_normal * info.eps, equal_nan=True
    )
    if terms is not None:  # which may cancel
        bound = 4 * info.eps * torch.from_numpy(terms)
        close |= ((ours - torch.from_numpy(right)).abs() <= bound) | (bound == INF)
    wrong = {name: tensor[~close][:5].tolist() for name, tensor in arguments.items()}
    assert close.all(), (ours[~close][:5], right[~close.numpy()][:5], wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pos_weighted", [False, True])
def test_kernel_and_reference_agree_on_every_combination(
    dtype: torch.dtype, weighted: bool, pos_weighted: bool
) -> None:
    names = ["input", "target", *["weight"] * weighted, *["pos_weight"] * pos_weighted, "upstream"]
    columns = zip(*itertools.product(specials(dtype), repeat=len(names)), strict=True)
    arguments = {name: torch.tensor(column, dtype=dtype) for name, column in zip(names, columns, strict=True)}
    with np.errstate(all="ignore"):
        given = {"weight": None, "pos_weight": None} | {name: tensor.numpy() for name, tensor in arguments.items()}
        loss, gradients, terms = expected(
            *(given[name] for name in ("input", "target", "weight", "pos_weight", "upstream"))
        )
    x, t, upstream = arguments["input"].clone().requires_grad_(), arguments["target"], arguments["upstream"]
    factors = {name: arguments[name] for name in ("weight", "pos_weight") if name in arguments}

    ours = F.sigmoid_cross_entropy(x, t, **factors, reduction="none")
    assert_agrees(ours.detach(), loss, arguments, terms)
    assert_agrees(torch.autograd.grad(ours, x, upstream, retain_graph=True)[0], gradients["input"], arguments)
    plain = reference.sigmoid_cross_entropy(x, t, **factors)
    assert_agrees(plain.detach(), loss, arguments, terms)
    # One upstream value for each call is a factor of the whole gradient.
    for value in specials(dtype):
        chosen = torch.tensor(value, dtype=dtype)
        (by_factor,) = torch.autograd.grad(ours.sum(), x, chosen, retain_graph=True)
        everywhere = torch.full_like(upstream, value)
        (by_element,) = torch.autograd.grad(ours, x, everywhere, retain_graph=True)
        assert_agrees(by_factor, by_element.numpy(), arguments)

    # Gradients of all arguments at once, by the kernel and by the reference.
    leaves = {name: arguments[name].clone().requires_grad_() for name in names[:-1]}
    x, t = leaves["input"], leaves["target"]
    factors = {name: leaves[name] for name in factors}
    ours = F.sigmoid_cross_entropy(x, t, **factors, reduction="none")
    assert_agrees(ours.detach(), loss, arguments, terms)
    for create_graph in (False, True):
        found = torch.autograd.grad(ours, list(leaves.values()), upstream, retain_graph=True, create_graph=create_graph)
        for name, gradient in zip(leaves, found, strict=True):
            cancelling = terms if name == "weight" else None
            assert_agrees(gradient.detach(), gradients[name], arguments, cancelling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_a_constant_target_are_0(dtype: torch.dtype) -> None:
    x = torch.tensor([INF, -INF, NAN, 3.0, 0.0], dtype=dtype)
    t = torch.tensor([0.5, INF, 1.0, NAN, 0.0], dtype=dtype, requires_grad=True)
    loss = F.sigmoid_cross_entropy(x, t, label_smoothing=1.0, reduction="none")
    (gradient,) = torch.autograd.grad(loss, t, torch.ones_like(loss))
    assert (gradient == 0).all()


def test_automatic_differentiation_of_the_reference_agrees() -> None:
    # Under torch.func. It adds up terms, which infinite factors make inf - inf: compared for finite ones.
    values = [value for value in specials(torch.float64) if abs(value) < 1e300]
    columns = zip(*itertools.product(values, repeat=4), strict=True)
    tensors = [torch.tensor(column, dtype=torch.float64) for column in columns]

    def loss(x: Tensor, t: Tensor, weight: Tensor, pos_weight: Tensor) -> Tensor:
        return F.sigmoid_cross_entropy(x, t, weight=weight, pos_weight=pos_weight, reduction="sum")

    by_func = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*tensors)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    for one, other in zip(by_func, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reduction", ["mean", "sum", "sum_classes"])
def test_reductions_leave_out_what_has_weight_0(device: str, reduction: str) -> None:
    x, t = torch.randn(6, 7, device=device), torch.rand(6, 7, device=device)
    weight = torch.ones(6, 7, device=device)
    clean = F.sigmoid_cross_entropy(x[:, 1:], t[:, 1:], reduction="sum")
    weight[:, 0] = 0
    x[:, 0] = torch.tensor([NAN, INF, -INF, 3e38, -3e38, 1.0])
    t[:, 0] = torch.tensor([1.0, 0.0, 1.0, NAN, INF, -INF])
    x.requires_grad_()
    pos_weight = torch.tensor([4.0, 1, 1, 1, 1, 1, 1], device=device)
    loss = F.sigmoid_cross_entropy(x, t, weight=weight, pos_weight=pos_weight, reduction=reduction)
    divisor = {"mean": 42, "sum": 1, "sum_classes": 6}[reduction]
    torch.testing.assert_close(loss, clean / divisor)
    (gradient,) = torch.autograd.grad(loss, x)
    assert (gradient[:, 0] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_upstream_factor_of_0_leaves_out_nan(device: str, dtype: torch.dtype, inplace: bool) -> None:
    x = torch.tensor([[NAN, 1.0, INF]], device=device, dtype=dtype, requires_grad=True)
    loss = F.sigmoid_cross_entropy(x * 1, torch.ones_like(x), reduction="sum", inplace=inplace)
    (gradient,) = torch.autograd.grad(loss, x, torch.zeros_like(loss))
    assert (gradient == 0).all()


@pytest.mark.parametrize("factor", [INF, -INF, NAN])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_of_0_leaves_out_infinite_factors(
    device: str, dtype: torch.dtype, inplace: bool, factor: float
) -> None:
    x = torch.zeros(3, device=device, dtype=dtype, requires_grad=True)
    weight = torch.tensor([0.0, 1.0, 0.0], device=device, dtype=dtype)
    loss = F.sigmoid_cross_entropy(x * 1, torch.ones_like(x), weight=weight, reduction="sum", inplace=inplace)
    (gradient,) = torch.autograd.grad(loss, x, torch.full_like(loss, factor))
    torch.testing.assert_close(gradient, gradient.new_tensor([0.0, -factor, 0.0]), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("x", "t", "loss", "gradient"),
    [
        (-INF, -3.0, -INF, 3.0), (INF, 3.0, -INF, -2.0), (INF, -3.0, INF, 4.0), (-INF, 3.0, INF, -3.0),
        (3e38, 3.0, -INF, -2.0), (-3e38, -3.0, -INF, 3.0), (2.0, 3.0, 2.0 - 6 + math.log1p(math.exp(-2)), None),
        (INF, INF, -INF, -INF), (-INF, INF, INF, -INF), (1.0, -INF, INF, INF),
    ],
)  # fmt: skip
def test_targets_outside_0_and_1(
    device: str, dtype: torch.dtype, x: float, t: float, loss: float, gradient: float | None
) -> None:
    if dtype is torch.float64 and abs(x) == 3e38:
        x *= 1e270 / 2
    logits = torch.full((17,), x, device=device, dtype=dtype, requires_grad=True)
    target = torch.full((17,), t, device=device, dtype=dtype)
    ours = F.sigmoid_cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(ours.detach(), torch.full_like(ours, loss))
    if gradient is None:
        gradient = 1 - t - math.exp(-x) / (1 + math.exp(-x))
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), logits)[0], torch.full_like(ours, gradient))
    torch.testing.assert_close(reference.sigmoid_cross_entropy(logits, target).detach(), torch.full_like(ours, loss))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_factor_that_becomes_0_when_divided_is_not_0(dtype: torch.dtype) -> None:
    tiny = torch.tensor(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, dtype=dtype)
    for sign in (1, -1):
        x = torch.tensor([NAN, 5.0, -5.0, 0.0], dtype=dtype, requires_grad=True)
        loss = F.sigmoid_cross_entropy(x, torch.tensor([0.0, 0, 1, 1], dtype=dtype))
        (gradient,) = torch.autograd.grad(loss, x, sign * tiny)
        assert gradient[0].isnan()
        assert (gradient[1:].abs() <= tiny).all()


# Integer targets


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("reduction", ["mean", "none", "sum_classes"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_an_integer_target_must_be_0_or_1(dtype: torch.dtype, reduction: str, layout: str) -> None:
    target = torch.randint(0, 2, (700, 11), dtype=dtype)
    if layout == "transposed":
        target = target.t().contiguous().t()
    elif layout == "expanded":
        target = target[:, :1].expand(700, 11)
    x = torch.randn(700, 11, requires_grad=True)
    F.sigmoid_cross_entropy(x, target, reduction=reduction)
    bad = 3 if dtype is torch.uint8 else -2
    place = (600, 0) if layout == "expanded" else (600, 5)
    target[place] = bad
    with pytest.raises(ValueError, match=rf"target\[{place[0]}, {place[1]}\] is {bad}, but an integer target must be"):
        F.sigmoid_cross_entropy(x, target, reduction=reduction)
    with pytest.raises(ValueError, match="integer target must be 0 or 1"):
        F.multilabel_soft_margin_loss(x, target, reduction="none")


def test_what_is_said_of_masks_and_classes() -> None:
    x = torch.randn(2, 3)
    for value, cure in ((255, "target > 0"), (7, "one_hot")):
        with pytest.raises(ValueError, match=cure):
            F.binary_cross_entropy_with_logits(x, torch.tensor([[0, 1, 1], [0, value, 1]]))
    # every byte but 0 is true
    mask = torch.tensor([[0, 1, 255], [2, 0, 0]], dtype=torch.uint8)
    assert F.binary_cross_entropy_with_logits(x, mask.view(torch.bool)).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # overwritten by forward, by backward
def test_logits_survive_a_target_that_is_refused(dtype: torch.dtype) -> None:
    x = torch.randn(9000, dtype=dtype, requires_grad=True)
    logits = x * 1
    target = torch.ones(9000, dtype=torch.uint8)
    target[8999] = 2
    with pytest.raises(ValueError, match=r"target\[8999\] is 2"):
        F.sigmoid_cross_entropy(logits, target, inplace=True)
    assert torch.equal(logits, x)


def test_all_ways_refuse_an_integer_target_that_is_no_label() -> None:
    x, target = torch.randn(3, 4, requires_grad=True), torch.full((3, 4), 255, dtype=torch.uint8)
    weight = torch.rand(4, requires_grad=True)  # by the reference
    ways: list[Any] = [
        lambda: F.sigmoid_cross_entropy(x, target, weight=weight),
        lambda: torch.func.grad(F.sigmoid_cross_entropy)(x, target),
        lambda: torch.ops.fused_sce.sigmoid_cross_entropy(x, target),
    ]
    for way in ways:
        with pytest.raises(ValueError, match=r"target\[0, 0\] is 255"):
            way()
    with pytest.raises(RuntimeError, match="integer target must be 0 or 1"):
        torch.compile(F.sigmoid_cross_entropy, backend="aot_eager")(x, target)


# Upstream factors


def exact_gradient(x: float, t: float) -> mpmath.mpf:
    return 1 / (1 + mpmath.exp(-mpmath.mpf(x))) - t if t == 0 else -1 / (1 + mpmath.exp(mpmath.mpf(x)))


@pytest.mark.parametrize(
    ("dtype", "target_dtype"), [(torch.bfloat16, torch.uint8), (torch.float32, torch.float64)], ids=str
)
@pytest.mark.parametrize("factor", [0.1, 3.0, 1.0, 0.25, -2.0, 2.0**-125])  # some products are exact
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_factor_comes_before_the_rounding(
    device: str, dtype: torch.dtype, target_dtype: torch.dtype, factor: float, reduction: str
) -> None:
    x = torch.randn(50, 60, device=device, dtype=dtype).mul(4).requires_grad_()
    t = torch.randint(0, 2, (50, 60), device=device).to(target_dtype)
    loss = F.sigmoid_cross_entropy(x, t, reduction=reduction)
    upstream = torch.tensor(factor, device=device, dtype=loss.dtype)
    passes = [torch.autograd.grad(loss, x, upstream, retain_graph=True)[0] for _ in range(3)]
    assert torch.equal(passes[0], passes[1])
    assert torch.equal(passes[1], passes[2])
    wide = x.detach().double().cpu()
    right = torch.where(t.cpu() == 1, -torch.sigmoid(-wide), torch.sigmoid(wide)) * upstream.double().cpu()
    right = right / (x.numel() if reduction == "mean" else 1)
    info = torch.finfo(dtype)
    step = info.eps * torch.exp2(torch.floor(torch.log2(right.abs()))).clamp(min=info.smallest_normal)
    error = ((passes[0].double().cpu() - right).abs() / step).max().item()
    assert error <= (0.502 if device == "cpu" else 0.511), error


@pytest.mark.parametrize("way", ["mean", "weight", "row", "compiled"])
def test_a_large_factor_saves_small_gradients(device: str, way: str) -> None:
    # Divided by the number of elements first, sigmoid(-95) is subnormal in float32, and would be off by 1 %.
    x = torch.full((1000,), -95.0, device=device, requires_grad=True)
    t = torch.zeros(1000, device=device)
    exact = torch.full_like(x, float(exact_gradient(-95.0, 0.0) / 1000 * 65536))
    if way == "mean":
        (F.sigmoid_cross_entropy(x, t) * 65536).backward()
    elif way == "weight":
        F.sigmoid_cross_entropy(x, t, weight=torch.full_like(t, 65536.0)).backward()
    elif way == "row":
        (F.multilabel_soft_margin_loss(x[None], t[None], reduction="none") * 65536).sum().backward()
    else:
        torch.compile(lambda x: F.sigmoid_cross_entropy(x, t) * 65536, backend="aot_eager")(x).backward()
    # sigmoid(-95) itself is 3,900 subnormal steps
    torch.testing.assert_close(x.grad, exact, rtol=1 / 7800, atol=0)


def test_a_second_derivative_frees_the_gradient_of_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    made: list[weakref.ref[Tensor]] = []
    forward, gradients = _autograd._forward, reference.gradients

    def recording_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        loss, gradient = forward(*arguments)
        made.append(weakref.ref(gradient.untyped_storage()))
        return loss, gradient

    def checking_gradients(*arguments: Any) -> Any:
        assert made
        assert made[0]() is None
        return gradients(*arguments)

    monkeypatch.setattr(_autograd, "_forward", recording_forward)
    monkeypatch.setattr(reference, "gradients", checking_gradients)
    x = torch.randn(5, 6, requires_grad=True)
    torch.autograd.grad(F.sigmoid_cross_entropy(x, torch.rand(5, 6)), x, create_graph=True)


# Sums


@pytest.mark.parametrize("columns", [131072, 131072 + 7, 5000])
@pytest.mark.parametrize("value", [0.3, -2.7])
def test_a_long_row_of_equal_losses(device: str, columns: int, value: float) -> None:
    x = torch.full((2, columns), value, dtype=torch.float64, device=device)
    loss = F.multilabel_soft_margin_loss(x, torch.ones_like(x), reduction="none")
    exact = float(mpmath.log1p(mpmath.exp(-mpmath.mpf(value))))
    assert ((loss - exact).abs() / exact).max() <= 4 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0), (2, 0, 4), (0,)])
def test_losses_of_nothing_are_torchs(device: str, reduction: str, shape: tuple[int, ...]) -> None:
    x, t = torch.randn(shape, device=device), torch.rand(shape, device=device)
    ours = F.multilabel_soft_margin_loss(x, t, reduction=reduction)
    theirs = torch.nn.functional.multilabel_soft_margin_loss(x, t, reduction=reduction)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    ours = F.binary_cross_entropy_with_logits(x, t, reduction=reduction)
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(x, t, reduction=reduction)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_a_sum_of_any_length_needs_little_memory() -> None:
    # It would take hours: that it is still adding after a while shows that no array of 2^32 partial sums was asked for.
    code = (
        "import torch, fused_sce, resource, signal\n"
        "resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))\n"
        "torch.set_num_threads(1)\n"
        "x = torch.zeros(1).expand(2**44)\n"
        "fused_sce.functional.sigmoid_cross_entropy(x[:9], x[:9])\n"
        "signal.setitimer(signal.ITIMER_VIRTUAL, 2)\n"  # seconds of its own: then the process ends by SIGVTALRM
        "fused_sce.functional.sigmoid_cross_entropy(x, x)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == -signal.SIGVTALRM, run.stderr
