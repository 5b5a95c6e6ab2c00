"""label_smoothing: the loss of the target (1 - s) t + s p, on every route."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_sce
from fused_sce import functional as F

ops = torch.ops.fused_sce
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SMOOTHING = [(0.1, 0.5), (0.25, 0.125), (1.0, 0.3), (1.0, 0.0), (0.1, 1.0)]


def smoothed(target: Tensor, dtype: torch.dtype, s: float, p: float) -> Tensor:
    """The target that the kernels get: one fused multiply-add in the dtype computed in."""
    computing = torch.float64 if torch.float64 in (dtype, target.dtype) else torch.float32
    scale, shift = (torch.tensor(value, dtype=computing).double() for value in (1 - s, s * p))
    exact = target.double() * scale + shift  # exact for a float32 target of 0 or 1 and factors of 24 bits
    return exact.to(computing).to(target.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", [None, torch.bool, torch.uint8, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sum_classes"])
@pytest.mark.parametrize("layout", ["contiguous", "strided", "weighted"])
def test_same_bits_as_of_a_smoothed_target(
    device: str, dtype: torch.dtype, target_dtype: torch.dtype | None, reduction: str, layout: str
) -> None:
    x = (torch.randn(130, 17, device=device) * 20).to(dtype)
    x[0, :8] = torch.tensor([0.0, -0.0, 17.0, -17.0, 88.0, -104.0, 1e-6, 3e4]).to(dtype)
    t = (torch.rand(130, 17, device=device) < 0.3).to(target_dtype or dtype)
    options: dict[str, Tensor] = {}
    if layout == "strided":
        x, t = x.t().contiguous().t(), t[:, :1].expand(130, 17)
    elif layout == "weighted":
        options = {"weight": torch.rand(17, device=device), "pos_weight": torch.rand(130, 1, device=device)}
    for s, p in SMOOTHING:
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        loss = F.sigmoid_cross_entropy(leaf, t, reduction=reduction, label_smoothing=s, smoothing_prior=p, **options)
        twin = x.clone(memory_format=torch.preserve_format).requires_grad_()
        expected = F.sigmoid_cross_entropy(twin, smoothed(t, dtype, s, p), reduction=reduction, **options)
        # A float32 target makes a float32 loss: rounded to the other one's dtype it must be the same.
        torch.testing.assert_close(loss, expected.to(loss.dtype), rtol=0, atol=0)
        upstream = torch.ones_like(loss)
        (gradient,) = torch.autograd.grad(loss, leaf, upstream)
        (expected_gradient,) = torch.autograd.grad(expected, twin, upstream.to(expected.dtype))
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=0)


def test_no_smoothing_is_the_plain_loss(device: str) -> None:
    x, t = torch.randn(33, 65, device=device, requires_grad=True), torch.rand(33, 65, device=device)
    t[0, 0] = torch.nan
    for reduction in ("mean", "none"):
        loss = F.sigmoid_cross_entropy(x, t, reduction=reduction, label_smoothing=0.0, smoothing_prior=0.2)
        plain = F.sigmoid_cross_entropy(x, t, reduction=reduction)
        torch.testing.assert_close(loss, plain, rtol=0, atol=0, equal_nan=True)


def keras(x: Tensor, t: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(x, t * 0.9 + 0.05)


def timm(x: Tensor, t: Tensor) -> Tensor:
    classes = x.size(-1)
    return torch.nn.functional.binary_cross_entropy_with_logits(x, t * 0.9 + 0.1 / classes)


@pytest.mark.parametrize(("theirs", "prior"), [(keras, 0.5), (timm, 1 / 7)])
def test_what_others_call_smoothing(theirs: Callable[[Tensor, Tensor], Tensor], prior: float) -> None:
    x, t = torch.randn(5, 7, dtype=torch.float64), (torch.rand(5, 7) < 0.3).double()
    ours = fused_sce.SigmoidCrossEntropyLoss(label_smoothing=0.1, smoothing_prior=prior)(x, t)
    torch.testing.assert_close(ours, theirs(x, t))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sum_classes"])
@pytest.mark.parametrize("weighted", [False, True])
def test_derivatives_of_first_and_second_order(device: str, reduction: str, weighted: bool) -> None:
    x = torch.randn(4, 5, dtype=torch.float64, device=device, requires_grad=True)
    t = torch.rand(4, 5, dtype=torch.float64, device=device, requires_grad=True)
    pos_weight = torch.rand(5, dtype=torch.float64, device=device) + 0.5 if weighted else None

    def loss(x: Tensor, t: Tensor) -> Tensor:
        return F.sigmoid_cross_entropy(
            x, t, pos_weight=pos_weight, reduction=reduction, label_smoothing=0.2, smoothing_prior=0.3
        )

    assert torch.autograd.gradcheck(loss, (x, t))
    assert torch.autograd.gradgradcheck(loss, (x, t))
    torch.testing.assert_close(
        torch.func.grad(lambda x: loss(x, t).sum())(x.detach()), torch.autograd.grad(loss(x, t).sum(), x)[0]
    )


def test_op_and_programs(device: str) -> None:
    x = torch.randn(6, 9, device=device, requires_grad=True)
    t = torch.rand(6, 9, device=device)
    options: dict[str, Any] = {"reduction": "sum", "divisor": 9, "label_smoothing": 0.1, "smoothing_prior": 0.25}
    torch.library.opcheck(ops.sigmoid_cross_entropy.default, (x, t), options)

    def step(x: Tensor, t: Tensor) -> Tensor:
        return F.sigmoid_cross_entropy(x * 2, t, label_smoothing=0.1, smoothing_prior=0.25)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 3):
        ours, expected = compiled(x[:rows], t[:rows]), step(x[:rows], t[:rows])
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(expected, x))
    batched = torch.vmap(step)(torch.stack([x, -x]), torch.stack([t, t]))
    torch.testing.assert_close(batched, torch.stack([step(x, t), step(-x, t)]))


def test_in_place(device: str) -> None:
    x, t = torch.randn(6, 9, device=device), torch.rand(6, 9, device=device)
    gradients = []
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        criterion = fused_sce.SigmoidCrossEntropyLoss(label_smoothing=0.1, inplace=inplace)
        criterion(leaf * 1, t).backward()
        gradients.append(leaf.grad)
    assert gradients[0] is not None
    assert torch.equal(*gradients)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
@pytest.mark.parametrize("name", ["label_smoothing", "smoothing_prior"])
def test_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], got {value}"):
        fused_sce.SigmoidCrossEntropyLoss(**{name: value})
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], got {value}"):
        F.sigmoid_cross_entropy(torch.randn(3), torch.rand(3), **{name: value})


@pytest.mark.parametrize("value", [torch.tensor(0.1), "0.1", None])
@pytest.mark.parametrize("name", ["label_smoothing", "smoothing_prior"])
def test_no_number(name: str, value: Any) -> None:
    if name == "smoothing_prior" and isinstance(value, Tensor):
        return  # one for each label
    with pytest.raises(TypeError, match=f"{name} must be a number.*, got {type(value).__name__}"):
        F.sigmoid_cross_entropy(torch.randn(3), torch.rand(3), **{name: value})


def test_modules_pickled_before_there_was_smoothing() -> None:
    old = fused_sce.SigmoidCrossEntropyLoss()
    for name in ("label_smoothing", "smoothing_prior", "inplace"):
        del old.__dict__[name]
    x, t = torch.randn(3, 4), torch.rand(3, 4)
    assert torch.equal(pickle.loads(pickle.dumps(old))(x, t), fused_sce.SigmoidCrossEntropyLoss()(x, t))


def test_module_shows_and_keeps_it() -> None:
    loss = fused_sce.SigmoidCrossEntropyLoss(label_smoothing=0.1)
    assert repr(loss) == ("SigmoidCrossEntropyLoss(reduction='mean', label_smoothing=0.1, smoothing_prior=0.5)")
