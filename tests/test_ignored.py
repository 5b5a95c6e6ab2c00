"""Which elements count: `ignore_value` and `mask`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_sce
from fused_sce import functional as F
from fused_sce import reference

NAN, INF = math.nan, math.inf
REDUCTIONS = ["mean", "sum", "none", "sum_classes"]
VALUES = [-1.0, -100.0, NAN, 0.1, 255.0, INF]


def arguments(device: str, dtype: torch.dtype, value: float | None, masked: bool) -> tuple[dict[str, Any], Tensor]:
    """Tensors and options, poisoned wherever they do not count, and what counts."""
    generator = torch.Generator().manual_seed(0)
    shape = (30, 41)
    x = torch.randn(shape, generator=generator).mul(4)
    t = torch.rand(shape, generator=generator)
    weight, pos_weight = torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)
    ignored = (
        torch.rand(shape, generator=generator) < 0.3 if value is not None else torch.zeros(shape, dtype=torch.bool)
    )
    mask = torch.rand(shape, generator=generator) < 0.7 if masked else torch.ones(shape, dtype=torch.bool)
    counts = mask & ~ignored
    poison = torch.tensor([NAN, INF, -INF, 3e38, -3e38, 0.0, 7.0])
    for tensor in (x, t, weight, pos_weight):
        tensor[~counts] = poison[torch.randint(7, (int((~counts).sum()),), generator=generator)]
    found: dict[str, Any] = {"input": x, "target": t, "weight": weight, "pos_weight": pos_weight}
    found = {name: tensor.to(device, dtype) for name, tensor in found.items()}
    if value is not None:
        found["target"][ignored.to(device)] = value
    if masked:
        found["mask"] = mask.to(device)
    return found, counts.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [None, *VALUES])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("factors", [(), ("weight",), ("pos_weight",), ("weight", "pos_weight")])
def test_only_what_counts(
    device: str, dtype: torch.dtype, value: float | None, masked: bool, factors: tuple[str, ...]
) -> None:
    if value is None and not masked:
        return
    found, counts = arguments(device, dtype, value, masked)
    x, t = found["input"].requires_grad_(), found["target"]
    given = {name: found[name] for name in factors}
    options: dict[str, Any] = {"label_smoothing": 0.1} if len(factors) == 1 else {}
    kept = {name: tensor[counts] for name, tensor in given.items()}
    alone = x.detach()[counts].requires_grad_()
    each = F.sigmoid_cross_entropy(alone, t[counts], **kept, **options, reduction="none")
    (of_each,) = torch.autograd.grad(each.sum(), alone)
    for reduction in REDUCTIONS:
        loss = F.sigmoid_cross_entropy(
            x, t, **given, **options, mask=found.get("mask"), ignore_value=value, reduction=reduction
        )
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        divisor = {"mean": int(counts.sum()), "sum": 1, "none": 1, "sum_classes": 30}[reduction]
        if reduction == "none":
            assert (loss[~counts] == 0).all()
            assert torch.equal(loss[counts], each)
        else:
            torch.testing.assert_close(loss, (each.double().sum() / divisor).to(loss.dtype))
        assert (gradient[~counts] == 0).all()
        torch.testing.assert_close(gradient[counts], (of_each.double() / divisor).to(dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_integer_targets(device: str, dtype: torch.dtype, layout: str) -> None:
    value = 255 if dtype is torch.uint8 else -1
    labels = torch.randint(0, 2, (21, 34), device=device)
    ignored = torch.rand(21, 34, device=device) < (0 if dtype is torch.bool else 0.3)
    target = torch.where(ignored, value, labels).to(dtype)
    if layout == "strided":
        target = torch.stack([target, target], -1)[..., 0]
    x = torch.randn(21, 34, device=device)
    ours = F.sigmoid_cross_entropy(x, target, ignore_value=value)
    torch.testing.assert_close(ours, F.binary_cross_entropy_with_logits(x[~ignored], labels[~ignored].float()))
    # of the others only labels are right
    if device == "cpu" and dtype is not torch.bool:
        target[3, 4] = 7
        with pytest.raises(ValueError, match=r"target\[3, 4\] is 7"):
            F.sigmoid_cross_entropy(x, target, ignore_value=value)
        mask = torch.ones(21, 34, dtype=torch.bool)
        mask[3, 4] = False
        assert F.sigmoid_cross_entropy(x, target, ignore_value=value, mask=mask).isfinite()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 1), (1, 7), (5, 7)])
def test_masks_broadcast(device: str, shape: tuple[int, ...]) -> None:
    x, t = torch.randn(5, 7, device=device, requires_grad=True), torch.rand(5, 7, device=device)
    mask = torch.rand(shape, device=device) < 0.6
    everywhere = mask.expand(5, 7)
    for reduction in REDUCTIONS:
        ours = F.sigmoid_cross_entropy(x, t, mask=mask, reduction=reduction)
        plain = F.sigmoid_cross_entropy(x, t, mask=everywhere.contiguous(), reduction=reduction)
        torch.testing.assert_close(ours, plain)
    total = F.binary_cross_entropy_with_logits(x, t, everywhere.float(), reduction="sum")
    torch.testing.assert_close(F.sigmoid_cross_entropy(x, t, mask=mask), total / max(int(everywhere.sum()), 1))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_counts(device: str, reduction: str) -> None:
    x = torch.tensor([[NAN, INF, 1.0]], device=device, requires_grad=True)
    t = torch.full((1, 3), NAN, device=device)
    for options in ({"ignore_value": NAN}, {"mask": torch.zeros(3, dtype=torch.bool, device=device)}):
        loss = F.sigmoid_cross_entropy(x, t, **options, reduction=reduction)  # type: ignore[arg-type]
        assert (loss == 0).all()
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert (gradient == 0).all()


@pytest.mark.parametrize("upstream", [0.5, 0.0, 3.0, INF, NAN])
@pytest.mark.parametrize("inplace", [False, True])
def test_upstream_factors(device: str, upstream: float, inplace: bool) -> None:
    x = torch.tensor([0.0, 1.0, NAN], device=device, requires_grad=True)
    t = torch.tensor([-1.0, 1.0, -1.0], device=device)
    loss = F.sigmoid_cross_entropy(x * 1, t, ignore_value=-1, inplace=inplace)
    (gradient,) = torch.autograd.grad(loss, x, loss.new_tensor(upstream))
    assert (gradient[[0, 2]] == 0).all()
    right = -torch.sigmoid(torch.tensor(-1.0)) * upstream
    torch.testing.assert_close(gradient[1].cpu(), right, equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives(reduction: str) -> None:
    x, t = torch.randn(4, 5).double().requires_grad_(), torch.rand(4, 5).double()
    t[0, :3] = -1
    t.requires_grad_()
    weight, pos_weight = (torch.rand(5).double().requires_grad_() for _ in range(2))
    mask = torch.rand(4, 5) < 0.8

    def loss(x: Tensor, t: Tensor, weight: Tensor, pos_weight: Tensor) -> Tensor:
        kept = torch.where(t == -1, t.detach(), t)  # a step away from -1 would count
        return F.sigmoid_cross_entropy(
            x, kept, weight=weight, pos_weight=pos_weight, mask=mask, ignore_value=-1, reduction=reduction
        )

    assert torch.autograd.gradcheck(lambda x, w, p: loss(x, t.detach(), w, p), (x, weight, pos_weight))
    assert torch.autograd.gradgradcheck(lambda x, w, p: loss(x, t.detach(), w, p), (x, weight, pos_weight))
    leaves = (x, t, weight, pos_weight)
    ours = torch.autograd.grad(loss(*leaves).sum(), leaves)
    by_func = torch.func.grad(lambda *each: loss(*each).sum(), argnums=(0, 1, 2, 3))(
        *(each.detach() for each in leaves)
    )
    for one, other in zip(ours, by_func, strict=True):
        torch.testing.assert_close(one, other)
    counts = (t != -1) & mask
    assert (ours[1][~counts] == 0).all()


def test_a_poisoned_element_has_no_gradient_by_anything() -> None:
    tensors = [torch.tensor([NAN, 1.0], requires_grad=True) for _ in range(4)]
    x, t, weight, pos_weight = tensors
    mask = torch.tensor([False, True])
    for create_graph in (False, True):
        loss = F.sigmoid_cross_entropy(x, t, weight=weight, pos_weight=pos_weight, mask=mask)
        for gradient in torch.autograd.grad(loss, tensors, create_graph=create_graph):
            assert gradient[0] == 0
            assert gradient[1].isfinite()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_other_ways_agree(reduction: str) -> None:
    x, t = torch.randn(3, 4, 5), torch.rand(3, 4, 5)
    t[torch.rand(3, 4, 5) < 0.3] = -1
    mask = torch.rand(3, 4, 5) < 0.8

    def loss(x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        return F.sigmoid_cross_entropy(x, t, mask=mask, ignore_value=-1, reduction=reduction)

    leaf = x.clone().requires_grad_()
    expected = loss(leaf, t, mask)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    expected = expected.detach()
    torch._dynamo.reset()
    for backend in ("aot_eager", "inductor"):
        compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=True)
        value = compiled(leaf, t, mask)
        torch.testing.assert_close(value.detach(), expected)
        torch.testing.assert_close(torch.autograd.grad(value.sum(), leaf)[0], gradient)
    each = torch.stack([loss(*sample) for sample in zip(x, t, mask, strict=True)])
    torch.testing.assert_close(torch.vmap(loss)(x, t, mask), each)
    torch.testing.assert_close(
        torch.vmap(loss, in_dims=(0, None, None))(x, t[0], mask[0]),
        torch.stack([loss(each, t[0], mask[0]) for each in x]),
    )
    torch.testing.assert_close(torch.jit.trace(loss, (x, t, mask))(x, t, mask), expected)
    exported = torch.export.export(Wrapped(reduction), (x, t, mask)).module()
    torch.testing.assert_close(exported(x, t, mask), expected)
    torch.testing.assert_close(torch.func.jvp(lambda x: loss(x, t, mask), (x,), (x,))[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(x, t, mask), expected)


class Wrapped(torch.nn.Module):
    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.loss = fused_sce.SigmoidCrossEntropyLoss(ignore_value=-1, reduction=reduction)

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        value: Tensor = self.loss(x, t, mask)
        return value


def test_the_module() -> None:
    x, t = torch.randn(3, 4), torch.tensor([[0.0, 1, NAN, 1]] * 3)
    loss = fused_sce.SigmoidCrossEntropyLoss(ignore_value=NAN)
    mask = torch.tensor([True, False, True, True])
    assert torch.equal(loss(x, t, mask), F.sigmoid_cross_entropy(x, t, mask=mask, ignore_value=NAN))
    assert torch.equal(loss(x, t, mask=mask), loss(x, t, mask))
    assert repr(loss) == "SigmoidCrossEntropyLoss(reduction='mean', ignore_value=nan)"
    del loss.__dict__["ignore_value"]  # pickled by a version without it
    assert loss(x, t).isnan()


def test_a_mask_under_vmap_and_grad() -> None:
    x, mask = torch.randn(3, 2, 5), torch.rand(5, 3) < 0.7
    target = torch.randint(0, 2, (5, 3))
    target[~mask] = 9

    def loss(x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        return F.sigmoid_cross_entropy(x, t.expand(2, 5), mask=mask)

    found = torch.vmap(torch.func.grad(loss), in_dims=(0, 1, 1))(x, target, mask)
    for sample, t, m, gradient in zip(x, target.t(), mask.t(), found, strict=True):
        leaf = sample.clone().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(leaf, t, m), leaf)[0])


def test_a_value_that_the_target_cannot_hold_ignores_nothing() -> None:
    x = torch.randn(3)
    for target, value in (
        (torch.tensor([0, 1, 1], dtype=torch.uint8), -1),
        (torch.tensor([0, 1, 1]), 0.5),
        (torch.tensor([0, 1, 1]), NAN),
        (torch.tensor([0.0, 1, INF], dtype=torch.float16), 1e6),
    ):
        plain = F.sigmoid_cross_entropy(x, target, reduction="none")
        assert torch.equal(F.sigmoid_cross_entropy(x, target, ignore_value=value, reduction="none"), plain)


def test_what_is_refused(device: str) -> None:
    x, t = torch.randn(3, 4, device=device), torch.rand(3, 4, device=device)
    with pytest.raises(TypeError, match=r"mask must have dtype bool, got torch.uint8"):
        F.sigmoid_cross_entropy(x, t, mask=torch.ones(3, 4, dtype=torch.uint8, device=device))
    with pytest.raises(TypeError, match="mask must be a tensor, got bool"):
        F.sigmoid_cross_entropy(x, t, mask=True)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"mask of shape \(3,\) does not broadcast .* pass mask.view\(-1, 1\)"):
        F.sigmoid_cross_entropy(x, t, mask=torch.ones(3, dtype=torch.bool, device=device))
    for wrong in ("-1", torch.tensor(-1.0)):
        with pytest.raises(TypeError, match="ignore_value must be a number or None"):
            F.sigmoid_cross_entropy(x, t, ignore_value=wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="ignore_value must be a number or None"):
            fused_sce.SigmoidCrossEntropyLoss(ignore_value=wrong)  # type: ignore[arg-type]


def test_counting_takes_no_memory() -> None:
    x, t = torch.randn(256, 1000), torch.rand(256, 1000)
    with torch.profiler.profile(profile_memory=True) as profile:
        F.sigmoid_cross_entropy(x, t, ignore_value=-1, mask=t > -1)
    allocated = [event.cpu_memory_usage for event in profile.events() if event.name.startswith("fused_sce")]
    assert allocated
    assert max(allocated) < 4096


def test_reference_takes_them_too() -> None:
    x, t = torch.randn(5, 6), torch.rand(5, 6)
    t[0] = -1
    ours = F.sigmoid_cross_entropy(x, t, ignore_value=-1, reduction="sum")
    torch.testing.assert_close(reference.sigmoid_cross_entropy(x, t, reduction="sum", ignore_value=-1.0), ours)
