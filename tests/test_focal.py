"""The focal and the asymmetric loss: what others compute, derivatives, and every option on every route."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

import fused_sce
from fused_sce import functional as F
from fused_sce import reference

ops = torch.ops.fused_sce
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none", "sum_classes"]
Loss = Callable[..., Tensor]

# gamma_pos, gamma_neg, clip, alpha
FOCUSES: list[tuple[float, float, float, float | None]] = [
    (2, 2, 0.0, 0.25), (2.5, 2.5, 0.0, None), (1, 4, 0.05, None), (0, 4, 0.05, None), (0.5, 0.5, 0.0, 0.7),
    (0, 0, 0.2, None), (0.7, 3.5, 0.1, None), (0, 0, 0.0, 0.3), (5, 7, 0.0, None), (1, 0.5, 0.3, None),
]  # fmt: skip


def as_focus(focus: tuple[float, float, float, float | None]) -> dict[str, Any]:
    """The options of the op."""
    return dict(zip(("gamma_pos", "gamma_neg", "clip", "alpha"), focus, strict=True))


def loss_of(focus: tuple[float, float, float, float | None]) -> Loss:
    """A loss with these options: the public one where there is one."""
    gamma_pos, gamma_neg, clip, alpha = focus
    if gamma_pos == gamma_neg and not clip:
        return lambda x, t, **options: F.sigmoid_focal_loss(x, t, alpha, gamma_pos, **{"reduction": "mean"} | options)
    assert alpha is None
    return lambda x, t, **options: F.asymmetric_loss(
        x, t, gamma_pos=gamma_pos, gamma_neg=gamma_neg, clip=clip, **options
    )


def plain(x: Tensor, t: Tensor, focus: tuple[float, float, float, float | None]) -> Tensor:
    """The loss as the papers write it, for float64 and moderate logits."""
    gamma_pos, gamma_neg, clip, alpha = focus
    p = torch.sigmoid(x)
    q = (p - clip).clamp(min=0)
    cross_entropy = -(t * torch.log(p) + (1 - t) * torch.log(1 - q))
    off = (t * (1 - p) + (1 - t) * q).clamp(min=1e-300)  # the derivative of 0^0.5 is infinite
    balance = 1 if alpha is None else alpha * t + (1 - alpha) * (1 - t)
    return balance * off ** (gamma_pos * t + gamma_neg * (1 - t)) * cross_entropy


def targets(kind: str, shape: tuple[int, ...], device: str) -> Tensor:
    t = torch.rand(shape, dtype=torch.float64, device=device)
    return {"labels": (t < 0.3).double(), "soft": t, "mixed": torch.where(t < 0.5, (t < 0.2).double(), t)}[kind]


@pytest.mark.parametrize("focus", FOCUSES)
@pytest.mark.parametrize("kind", ["labels", "soft", "mixed"])
def test_values_and_gradients(device: str, focus: tuple[float, float, float, float | None], kind: str) -> None:
    x = (torch.randn(33, 65, dtype=torch.float64, device=device) * 3).requires_grad_()
    t = targets(kind, (33, 65), device)
    expected = plain(x, t, focus)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    for ours in (
        loss_of(focus)(x, t, reduction="none"),
        reference.sigmoid_cross_entropy(x, t, **as_focus(focus)),
        ops.sigmoid_cross_entropy(x, t, **as_focus(focus)),
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13)
        (of_ours,) = torch.autograd.grad(ours.sum(), x)
        torch.testing.assert_close(of_ours, gradient, rtol=1e-10, atol=1e-13)
    total = loss_of(focus)(x, t, reduction="sum_classes")
    torch.testing.assert_close(total, expected.sum(-1).mean())
    (of_total,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(of_total, gradient / 33, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_focus_is_the_plain_loss_bit_for_bit(device: str, dtype: torch.dtype, reduction: str) -> None:
    x = (torch.randn(70, 33, device=device) * 10).to(dtype).requires_grad_()
    t = torch.rand(70, 33, device=device).to(dtype)
    t[::2] = (t[::2] < 0.5).to(dtype)
    expected = F.sigmoid_cross_entropy(x, t, reduction=reduction)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    for ours in (
        F.sigmoid_focal_loss(x, t, -1, 0, reduction),
        F.sigmoid_focal_loss(x, t, None, 0.0, reduction),
        F.asymmetric_loss(x, t, gamma_neg=0, gamma_pos=0, clip=0, reduction=reduction),
        F.asymmetric_loss(x, t, gamma_neg=0, gamma_pos=0, clip=None, reduction=reduction),
    ):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
        torch.testing.assert_close(torch.autograd.grad(ours.sum(), x)[0], gradient, rtol=0, atol=0)


def test_labels_have_the_same_bits_beside_soft_targets(device: str) -> None:
    for focus in FOCUSES:
        x = torch.randn(512, device=device).mul(5).requires_grad_()
        t = targets("labels", (512,), device).float()
        mixed = t.clone()
        mixed[::3] = 0.4
        results = [loss_of(focus)(x, each, reduction="none") for each in (t, mixed)]
        gradients = [torch.autograd.grad(each.sum(), x)[0] for each in results]
        for first, second in (results, gradients):
            torch.testing.assert_close(first[1::3], second[1::3], rtol=0, atol=0)
            torch.testing.assert_close(first[2::3], second[2::3], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", [None, torch.bool, torch.uint8, torch.int64, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided", "odd"])
def test_dtypes_and_layouts(device: str, dtype: torch.dtype, target_dtype: torch.dtype | None, layout: str) -> None:
    shape = (31, 17) if layout == "odd" else (64, 32)
    x = (torch.randn(shape, device=device) * 4).to(dtype)
    t = (torch.rand(shape, device=device) < 0.3).to(target_dtype or dtype)
    if layout == "strided":
        x, t = x.t(), t.t()
    for focus in FOCUSES:
        leaf = x.detach().requires_grad_()
        loss = loss_of(focus)(leaf, t, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        twin = x.detach().double().requires_grad_()
        expected = loss_of(focus)(twin, t.double(), reduction="none")
        (of_expected,) = torch.autograd.grad(expected.sum(), twin)
        is_focal = focus[0] == focus[1] and not focus[2]
        wanted = torch.promote_types(dtype, t.dtype) if is_focal else t.dtype if t.is_floating_point() else dtype
        assert loss.dtype == wanted
        assert gradient.dtype == dtype
        assert loss.stride() == x.stride()
        tolerance = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 8e-3, torch.float16: 1e-3}
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance[loss.dtype], atol=1e-7)
        torch.testing.assert_close(gradient.double(), of_expected, rtol=tolerance[dtype], atol=1e-7)


@pytest.mark.parametrize("focus", FOCUSES)
@pytest.mark.parametrize("kind", ["labels", "soft"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives_of_first_and_second_order(
    device: str, focus: tuple[float, float, float, float | None], kind: str, reduction: str
) -> None:
    x = torch.randn(2, 3, dtype=torch.float64, device=device).mul(2)
    if focus[2]:  # the clip has a corner
        p = torch.sigmoid(x)
        x = torch.where((p - focus[2]).abs() < 1e-3, x + 0.1, x)
    x = x.requires_grad_()
    t = targets(kind, (2, 3), device).requires_grad_(kind == "soft")
    weight = torch.rand(3, dtype=torch.float64, device=device).add(0.5).requires_grad_()
    pos_weight = torch.rand(2, 1, dtype=torch.float64, device=device).add(0.5).requires_grad_()

    def loss(x: Tensor, t: Tensor, weight: Tensor, pos_weight: Tensor) -> Tensor:
        return loss_of(focus)(x, t, weight=weight, pos_weight=pos_weight, label_smoothing=0.0, reduction=reduction)

    assert torch.autograd.gradcheck(loss, (x, t, weight, pos_weight))
    assert torch.autograd.gradgradcheck(loss, (x, t, weight, pos_weight))


def test_gradient_of_alpha(device: str) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True)
    t = torch.rand(3, 4, dtype=torch.float64, device=device)
    alpha = torch.rand(4, dtype=torch.float64, device=device, requires_grad=True)

    def loss(x: Tensor, alpha: Tensor) -> Tensor:
        return F.sigmoid_focal_loss(x, t, alpha, 1.5)

    assert torch.autograd.gradcheck(loss, (x, alpha))
    assert torch.autograd.gradgradcheck(loss, (x, alpha))
    expected = torch.stack([F.sigmoid_focal_loss(x[:, n], t[:, n], float(alpha[n]), 1.5) for n in range(4)], -1)
    torch.testing.assert_close(loss(x, alpha), expected)
    for value in (0.0, 1.0):  # leaves out a label, whatever its logit is
        logits = torch.tensor([math.nan, math.inf, -math.inf, 1.0], device=device, requires_grad=True)
        for form in (value, torch.full((4,), value, device=device)):
            t = torch.full((4,), 1 - value, device=device)
            ours = F.sigmoid_focal_loss(logits, t, form)
            assert (ours == 0).all()
            assert (torch.autograd.grad(ours.sum(), logits)[0] == 0).all()


TAILS = [-1e4, -200.0, -104.0, -100.0, -88.0, -60.0, -40.0, -18.5, -17.0, 0.0, 17.0, 18.5, 40.0, 88.0, 104.0, 1e4]


@pytest.mark.parametrize("focus", FOCUSES)
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_both_tails(device: str, focus: tuple[float, float, float, float | None], target: float) -> None:
    x = torch.tensor(TAILS, device=device, requires_grad=True)
    loss = loss_of(focus)(x, torch.full_like(x, target), reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    gamma_pos, gamma_neg, clip, alpha = focus
    gamma = gamma_pos if target else gamma_neg
    balance = 1.0 if alpha is None else float(torch.tensor(alpha if target else 1 - alpha))
    for n, logit in enumerate(TAILS):
        with mpmath.workprec(3000):
            p, rest = 1 / (1 + mpmath.exp(-mpmath.mpf(logit))), 1 / (1 + mpmath.exp(mpmath.mpf(logit)))
            c = float(torch.tensor(clip))
            q = p - c if p > c else mpmath.mpf(0)
            m = rest if target else q
            entropy = -mpmath.log(p) if target else -mpmath.log(rest + c) if q else mpmath.mpf(0)
            slope = -rest if target else p * rest / (rest + c) if q else mpmath.mpf(0)
            rate = (-p if target else p * rest / q) if m else mpmath.mpf(0)
            power = balance * (m**gamma if m or gamma else mpmath.mpf(1))
            exact = float(power * entropy), float(power * (slope + gamma * rate * entropy))
        bound = (4 + 2 * (1 + gamma) * (float(p / q) if c and not target and q else 1)) * 2.0**-23
        for ours, value in zip((loss[n].item(), gradient[n].item()), exact, strict=True):
            step = 2.0**-149 * (1 + gamma) / (clip or 1)
            assert abs(ours - value) <= abs(value) * bound + step, (logit, ours, value)


@pytest.mark.parametrize("focus", FOCUSES)
@pytest.mark.parametrize("target", [0.0, 1.0, 1e-40, 1e-44, 0.25])
def test_other_derivatives_in_the_tails(focus: tuple[float, float, float, float | None], target: float) -> None:
    logits = [*TAILS, 90.0, -90.0, 100.0, -100.0, 103.0, -103.0, -2.95, 0.1]
    results = []
    for dtype in (torch.float32, torch.float64):
        x, t = torch.tensor(logits, dtype=dtype, requires_grad=True), torch.full((len(logits),), target)
        t = t.to(dtype).requires_grad_()  # the same number
        options = {**as_focus(focus), "clip": float(torch.tensor(focus[2]))}
        loss = ops.sigmoid_cross_entropy(x, t, **options)
        by_kernel, by_target = torch.autograd.grad(loss.sum(), (x, t), retain_graph=True)
        (by_reference,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(by_reference.sum(), x)
        results.append([each.detach().double() for each in (loss, by_kernel, by_reference, second, by_target)])
    # The derivative by the target has a quotient by m, which may have few bits.
    bits = torch.tensor([2.0**-149 / max(math.exp(-abs(x)), 2.0**-149) for x in logits])
    for name, ours, exact in zip(("loss", "kernel", "reference", "second", "target"), *results, strict=True):
        assert ours.isfinite().all() or 0 < target < 1e-38, (name, ours)
        if 0 < target < 1e-38 and name in ("second", "target"):
            continue  # a soft target of no precision
        tolerance = 1e-4 + 2 * bits if name == "target" else 1e-4 if name == "second" else 3e-5
        scale = exact.abs().clamp(min=2.0**-126)
        assert ((ours - exact).abs() <= tolerance * scale + 1e-38 / (focus[2] or 1)).all(), (name, ours, exact)


torchvision = pytest.importorskip("torchvision")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.25, 0.0, 1.0, -1])
@pytest.mark.parametrize("gamma", [0, 1, 2, 2.5, 5])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_parity_with_torchvision(dtype: torch.dtype, alpha: float, gamma: float, soft: bool, reduction: str) -> None:
    x = torch.linspace(-3, 3, 301, dtype=dtype).requires_grad_()
    t = torch.rand(301, dtype=dtype) if soft else (torch.rand(301) < 0.3).to(dtype)
    ours = F.sigmoid_focal_loss(x, t, alpha, gamma, reduction)
    theirs = torchvision.ops.sigmoid_focal_loss(x, t, alpha, gamma, reduction)
    # In float32 theirs loses up to 20 ULP by 1 - p_t.
    close = {"rtol": 1e-12, "atol": 1e-14} if dtype is torch.float64 else {"rtol": 1e-6, "atol": 3e-7}
    torch.testing.assert_close(ours, theirs, **close)  # type: ignore[arg-type]
    gradients = [torch.autograd.grad(loss.sum(), x)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, **close)  # type: ignore[arg-type]


def timm_loss(gammas: tuple[float, float, float], **options: Any) -> torch.nn.Module:
    losses = pytest.importorskip("timm.loss")
    module: torch.nn.Module = losses.AsymmetricLossMultiLabel(*gammas, eps=1e-30, **options)
    return module


@pytest.mark.parametrize("gammas", [(4, 1, 0.05), (4, 0, 0.05), (2, 2, 0), (0, 0, 0.1), (3.5, 0.7, 0.2)])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_parity_with_timm(gammas: tuple[float, float, float], soft: bool, reduction: str, weighted: bool) -> None:
    x = torch.linspace(-3, 3, 320).reshape(32, 10).requires_grad_()
    t = torch.rand(32, 10) if soft else (torch.rand(32, 10) < 0.3).float()
    factors: dict[str, Any] = {"weight": torch.rand(10), "pos_weight": torch.rand(10) * 3} if weighted else {}
    theirs = timm_loss(gammas, smoothing=0.1 if weighted else 0.0, reduction=reduction, **factors)(x, t)
    ours = fused_sce.AsymmetricLoss(
        gamma_neg=gammas[0],
        gamma_pos=gammas[1],
        clip=gammas[2],
        label_smoothing=0.1 if weighted else 0.0,
        reduction={"batchmean": "sum_classes"}.get(reduction, reduction),
        **factors,
    )(x, t)
    # Theirs computes in float32 with 1 - sigmoid(x) and 1 - p_t, each with an error of 2^-24.
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6)
    gradients = [torch.autograd.grad(loss.sum(), x)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", ["labels", "soft"])
@pytest.mark.parametrize("focus", FOCUSES)
def test_what_counts_and_factors(device: str, focus: tuple[float, float, float, float | None], kind: str) -> None:
    x = torch.randn(20, 11, device=device).mul(3)
    t = targets(kind, (20, 11), device).float()
    counts = torch.rand(20, 11, device=device) < 0.7
    poison = torch.tensor([math.nan, math.inf, -math.inf, 3e38], device=device)
    x[~counts] = poison[torch.arange(int((~counts).sum())) % 4]
    for options in (
        {"ignore_value": -1.0},
        {"mask": counts, "weight": torch.rand(11, device=device), "pos_weight": torch.rand(20, 1, device=device)},
    ):
        given = torch.where(counts, t, -1.0 if "mask" not in options else math.nan)
        kept = {name: value.expand(20, 11)[counts] for name, value in options.items() if "weight" in name}  # type: ignore[union-attr]
        for reduction in REDUCTIONS:
            leaf, alone = x.clone().requires_grad_(), x[counts].requires_grad_()
            loss = loss_of(focus)(leaf, given, reduction=reduction, **options)
            each = loss_of(focus)(alone, t[counts], reduction="none", **kept)
            divisor = {"mean": int(counts.sum()), "sum_classes": 20}.get(reduction, 1)
            if reduction == "none":
                assert (loss[~counts] == 0).all()
                torch.testing.assert_close(loss[counts], each, rtol=0, atol=0)
            else:
                torch.testing.assert_close(loss, each.double().sum().div(divisor).float())
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            (of_alone,) = torch.autograd.grad(each.sum(), alone)
            assert (gradient[~counts] == 0).all()
            torch.testing.assert_close(gradient[counts], of_alone / divisor)


@pytest.mark.parametrize("focus", FOCUSES)
@pytest.mark.parametrize("s", [0.1, 1.0])
def test_label_smoothing(device: str, focus: tuple[float, float, float, float | None], s: float) -> None:
    x = torch.randn(9, 7, dtype=torch.float64, device=device)
    t = targets("labels", (9, 7), device)
    ours = loss_of(focus)(x, t, label_smoothing=s, smoothing_prior=0.25)
    torch.testing.assert_close(ours, loss_of(focus)(x, (1 - s) * t + s * 0.25))


def test_op_and_programs(device: str) -> None:
    x = torch.randn(6, 9, device=device, requires_grad=True)
    t, alpha = torch.rand(6, 9, device=device), torch.rand(9, device=device)
    for focus in FOCUSES[:4]:
        options = {"reduction": "sum", "divisor": 9, **as_focus(focus)}
        torch.library.opcheck(ops.sigmoid_cross_entropy.default, (x, t), options)

    def step(x: Tensor, t: Tensor) -> Tensor:
        return F.sigmoid_focal_loss(x * 2, t, alpha, 1.5, "mean") + F.asymmetric_loss(x, t)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 3):
        ours, expected = compiled(x[:rows], t[:rows]), step(x[:rows], t[:rows])
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(expected, x))
    batched = torch.vmap(step)(torch.stack([x, -x]), torch.stack([t, t]))
    torch.testing.assert_close(batched, torch.stack([step(x, t), step(-x, t)]))
    torch.testing.assert_close(
        torch.func.grad(lambda x: step(x, t))(x.detach()), torch.autograd.grad(step(x, t), x)[0], rtol=1e-4, atol=1e-6
    )
    tangent = torch.randn_like(x)
    _, derivative = torch.func.jvp(lambda x: step(x, t), (x.detach(),), (tangent,))
    torch.testing.assert_close(
        derivative, (torch.autograd.grad(step(x, t), x)[0] * tangent).sum(), rtol=1e-4, atol=1e-6
    )

    class Model(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return step(x, t)

    program = torch.export.export(Model(), (x, t)).module()
    torch.testing.assert_close(program(x, t), step(x, t))


@pytest.mark.parametrize("upstream", [1.0, 0.3, 0.25, 0.0])
def test_in_place_and_upstream_factors(device: str, upstream: float) -> None:
    x, t = torch.randn(6, 9, device=device), torch.rand(6, 9, device=device)
    for module in (fused_sce.SigmoidFocalLoss, fused_sce.AsymmetricLoss):
        gradients = []
        for inplace in (False, True):
            leaf = x.clone().requires_grad_()
            (module(inplace=inplace)(leaf * 1, t) * upstream).backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=0)


def test_autocast(device: str) -> None:
    x = torch.randn(6, 9, device=device, dtype=torch.bfloat16)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = F.sigmoid_focal_loss(x, torch.rand(6, 9, device=device).bfloat16())
    assert loss.dtype == torch.float32


def test_modules() -> None:
    alpha = torch.rand(4)
    losses = [
        fused_sce.SigmoidFocalLoss(alpha, gamma=1.5, reduction="sum", pos_weight=torch.rand(4), ignore_value=-1),
        fused_sce.SigmoidFocalLoss(0.3),
        fused_sce.AsymmetricLoss(gamma_neg=3, clip=0.1, weight=torch.rand(4), label_smoothing=0.1),
    ]
    assert set(losses[0].state_dict()) == {"alpha", "pos_weight"}
    assert repr(losses[1]) == "SigmoidFocalLoss(alpha=0.3, gamma=2.0, reduction='mean')"
    assert repr(losses[2]).startswith("AsymmetricLoss(gamma_neg=3, gamma_pos=1.0, clip=0.1, reduction='mean', label_")
    x, t, mask = torch.randn(5, 4), torch.randint(0, 2, (5, 4)), torch.rand(5, 4) < 0.5
    for loss in losses:
        again = pickle.loads(pickle.dumps(loss))
        torch.testing.assert_close(again(x, t, mask), loss(x, t, mask), rtol=0, atol=0)
    torch.testing.assert_close(losses[1](x, t), F.sigmoid_focal_loss(x, t, 0.3, reduction="mean"))
    torch.testing.assert_close(
        losses[0].double()(x.double(), t),
        F.sigmoid_focal_loss(x.double(), t, alpha.double(), 1.5, "sum", pos_weight=losses[0].pos_weight),
    )


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, t: F.sigmoid_focal_loss(x, t, 1.5), ValueError, "alpha must be in"),
        (lambda x, t: F.sigmoid_focal_loss(x, t, "a"), TypeError, "alpha must be a number, a tensor or None, got str"),
        (lambda x, t: F.sigmoid_focal_loss(x, t, gamma=-1), ValueError, "gamma must be at least 0 and at most"),
        (lambda x, t: F.sigmoid_focal_loss(x, t, gamma=math.nan), ValueError, "gamma must be at least 0"),
        (lambda x, t: F.sigmoid_focal_loss(x, t, gamma=None), TypeError, "gamma must be a number, got NoneType"),
        (lambda x, t: F.sigmoid_focal_loss(x, t, t < 0.5), TypeError, "a mask is passed as mask="),
        (lambda x, t: F.asymmetric_loss(x, t, reduction="batchmean"), ValueError, 'timm.s "batchmean" is "sum_c'),
        (lambda x, t: F.sigmoid_focal_loss(x, t, torch.rand(5)), RuntimeError, "alpha of shape .5,. does not broad"),
        (lambda x, t: F.sigmoid_focal_loss(x, t, reduction="avg"), ValueError, "avg is not a valid value"),
        (lambda x, t: F.sigmoid_focal_loss(x, t[:2]), ValueError, "Target size"),
        (lambda x, t: F.sigmoid_focal_loss(x, t.long() + 2), ValueError, "an integer target must be 0 or 1"),
        (lambda x, t: F.sigmoid_focal_loss(x, t, gamma=1e300), ValueError, "gamma must be at least 0 and at most 1e"),
        (lambda x, t: F.asymmetric_loss(x, t, clip=1.0), ValueError, r"clip must be in \[0, 1\), got 1.0"),
        (lambda x, t: F.asymmetric_loss(x, t, clip="a"), TypeError, "clip must be a number or None"),
        (lambda x, t: F.asymmetric_loss(x, t, gamma_neg=math.inf), ValueError, "gamma_neg must be at least 0"),
        (lambda x, t: fused_sce.SigmoidFocalLoss(alpha=7), ValueError, "alpha must be in"),
        (lambda x, t: fused_sce.AsymmetricLoss(gamma_pos=-1), ValueError, "gamma_pos must be at least 0"),
    ],
)  # fmt: skip
def test_errors(call: Callable[[Tensor, Tensor], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(torch.randn(3, 4), torch.rand(3, 4))


def test_names_of_torchvisions_arguments() -> None:
    x, t = torch.randn(3, 4), torch.rand(3, 4)
    ours = F.sigmoid_focal_loss(inputs=x, targets=t, alpha=0.25, gamma=2, reduction="sum")
    torch.testing.assert_close(ours, F.sigmoid_focal_loss(x, t, 0.25, 2, "sum"))
