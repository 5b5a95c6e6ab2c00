"""Gradients: first and second order, every route, and what backward may not do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from memory import allocations
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fused_sce
from fused_sce import functional as F

Loss = Callable[..., Tensor]


def losses() -> dict[str, Loss]:
    """Every reduction of every loss, of (input, target)."""
    return {
        **{
            f"bce {reduction}": lambda x, t, r=reduction, **kw: F.sigmoid_cross_entropy(x, t, reduction=r, **kw)
            for reduction in ("mean", "sum", "none", "sum_classes")
        },
        **{
            f"soft margin {reduction}": lambda x, t, r=reduction, **kw: F.multilabel_soft_margin_loss(
                x, t, reduction=r, **kw
            )
            for reduction in ("mean", "sum", "none")
        },
    }


@pytest.fixture(params=list(losses()))
def loss(request: pytest.FixtureRequest) -> Loss:
    return losses()[request.param]


def sample(device: str = "cpu", dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(4, 5, dtype=dtype, device=device, requires_grad=True)
    t = torch.rand(4, 5, dtype=dtype, device=device, requires_grad=True)
    return x, t


@pytest.mark.parametrize("weights", ["none", "per label", "strided"])
def test_gradcheck_and_gradgradcheck(device: str, loss: Loss, weights: str) -> None:
    x, t = sample(device)
    options = {}
    if weights == "per label":
        options = {"weight": torch.rand(5, dtype=torch.float64, device=device)}
    elif weights == "strided":
        options = {"weight": torch.rand(5, 4, dtype=torch.float64, device=device).T}

    def function(x: Tensor, t: Tensor) -> Tensor:
        return loss(x, t, **options)

    # batched: vmap over backward, as torch.autograd.functional.jacobian(vectorize=True)
    assert torch.autograd.gradcheck(function, (x, t), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, (x, t), check_batched_grad=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_with_pos_weight(device: str, reduction: str) -> None:
    x, t = sample(device)
    pos_weight = torch.rand(4, 1, dtype=torch.float64, device=device) + 1

    def function(x: Tensor, t: Tensor) -> Tensor:
        return F.sigmoid_cross_entropy(x, t, pos_weight=pos_weight, reduction=reduction)

    assert torch.autograd.gradcheck(function, (x, t))
    assert torch.autograd.gradgradcheck(function, (x, t))


def test_gradient_by_weights(device: str) -> None:
    # torch refuses these for BCEWithLogitsLoss and has them for MultiLabelSoftMarginLoss
    x, t = sample(device)
    weight = torch.rand(5, dtype=torch.float64, device=device, requires_grad=True)
    pos_weight = torch.rand(5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, t, w, p: F.sigmoid_cross_entropy(x, t, weight=w, pos_weight=p),
        (x, t, weight, pos_weight),
    )
    assert torch.autograd.gradcheck(F.multilabel_soft_margin_loss, (x, t, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_retained_graph_gives_the_same_gradient_again(device: str, loss: Loss, dtype: torch.dtype) -> None:
    x, t = sample(device, dtype)
    value = loss(x, t)
    upstream = torch.full_like(value, 3.0)
    # 3, 1 and 3 again: neither the order nor the first backward's scaling may show
    first, plain, again = (
        torch.autograd.grad(value, x, factor, retain_graph=True)[0]
        for factor in (upstream, torch.ones_like(value), upstream)
    )
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(first, again, rtol=tolerance, atol=0)
    torch.testing.assert_close(first, 3 * plain, rtol=tolerance, atol=0)


def test_changing_a_gradient_does_not_change_the_next(device: str, loss: Loss) -> None:
    x, t = sample(device, torch.float32)
    value = loss(x, t)
    (first,) = torch.autograd.grad(value, x, torch.ones_like(value), retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(value, x, torch.ones_like(value))
    torch.testing.assert_close(second, kept, rtol=1e-6, atol=0)


def test_second_backward_without_retaining_is_an_error(loss: Loss) -> None:
    x, t = sample()
    value = loss(x, t).sum()
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_gradients_accumulate(device: str) -> None:
    x, t = sample(device, torch.float32)
    F.binary_cross_entropy_with_logits(x, t).backward()
    assert x.grad is not None
    once = x.grad.clone()
    F.binary_cross_entropy_with_logits(x, t).backward()
    torch.testing.assert_close(x.grad, 2 * once)


def test_inputs_are_left_alone(device: str, loss: Loss) -> None:
    x, t = sample(device, torch.float32)
    before = x.detach().clone(), t.detach().clone()
    loss(x, t).sum().backward()
    assert torch.equal(x, before[0])
    assert torch.equal(t, before[1])


def test_changed_input_is_noticed(loss: Loss) -> None:
    x, t = sample(dtype=torch.float32)
    logits = x * 1
    value = loss(logits, t).sum()
    logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_no_graph_where_none_is_wanted(loss: Loss) -> None:
    x, t = sample()
    assert loss(x, t).requires_grad
    assert not loss(x.detach(), t.detach()).requires_grad
    with torch.no_grad():
        assert not loss(x, t).requires_grad
    with torch.inference_mode():
        assert loss(x, t).is_inference()


def test_only_the_wanted_gradient_is_made(loss: Loss) -> None:
    x, t = sample()
    loss(x.detach(), t).sum().backward()
    assert x.grad is None
    assert t.grad is not None
    t.grad = None
    loss(x, t.detach()).sum().backward()
    assert t.grad is None


@pytest.mark.parametrize("function", [fused_sce.BCEWithLogitsLoss(), fused_sce.MultiLabelSoftMarginLoss()])
def test_memory_is_the_gradient_and_nothing_else(function: torch.nn.Module) -> None:
    x = torch.randn(256, 1000, requires_grad=True)
    t = torch.rand(256, 1000)
    size = x.numel() * x.element_size()
    large = [each for each in allocations(lambda: function(x, t).backward()) if each > 4096]
    assert large == [size]
    x.grad = None
    with torch.no_grad():
        assert [each for each in allocations(lambda: function(x, t)) if each > 4096] == []


def test_float16_gradients_survive_a_large_divisor(device: str) -> None:
    # 1e-6 / 4096 is below float16's smallest number: dividing before the scaler's factor would lose every gradient.
    x = torch.full((64, 64), -13.8, dtype=torch.float16, device=device, requires_grad=True)
    t = torch.zeros(64, 64, device=device)
    scale = 65536.0
    (F.binary_cross_entropy_with_logits(x, t) * scale).backward()
    expected = torch.sigmoid(x.detach().double()) / x.numel() * scale
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected.half(), rtol=0, atol=0)


def test_forward_mode(device: str, loss: Loss) -> None:
    x, t = sample(device)
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        value = loss(forward_ad.make_dual(x.detach(), tangent), t.detach())
        got = forward_ad.unpack_dual(value).tangent
    assert got is not None
    # the derivative along the tangent, by central differences
    step = 1e-6
    ahead, behind = loss(x + step * tangent, t), loss(x - step * tangent, t)
    torch.testing.assert_close(got, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)


def test_torch_func_transforms(device: str, loss: Loss) -> None:
    x, t = sample(device)
    x, t = x.detach(), t.detach()

    def total(x: Tensor, t: Tensor) -> Tensor:
        return loss(x, t).sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(leaf, t), leaf)
    torch.testing.assert_close(torch.func.grad(total)(x, t), expected)

    batched = torch.func.vmap(loss)(torch.stack([x, 2 * x]), torch.stack([t, t]))
    torch.testing.assert_close(batched, torch.stack([loss(x, t), loss(2 * x, t)]))

    hessian = torch.func.hessian(total)(x, t)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(lambda x: total(x, t), x))


def test_batched_backward_scales_what_forward_made(device: str, loss: Loss) -> None:
    # the first pass over the graph: gradcheck's batched pass is the second
    x, t = sample(device)
    value = loss(x, t).sum()
    upstream = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64, device=device)
    (expected,) = torch.autograd.grad(loss(x, t).sum(), x)
    (batched,) = torch.autograd.grad(value, x, upstream, is_grads_batched=True)
    torch.testing.assert_close(batched, upstream.reshape(3, 1, 1) * expected)
    value = loss(x, t).sum()
    mapped = torch.vmap(lambda factor: torch.autograd.grad(value, x, factor)[0])(upstream)
    torch.testing.assert_close(mapped, batched)
    vectorized = torch.autograd.functional.jacobian(lambda x: loss(x, t).sum(), x.detach(), vectorize=True)
    torch.testing.assert_close(vectorized, expected)


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx_of_a_training_step(device: str, loss: Loss, mode: str) -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(x, t).sum() * 3, x)[0]

    x, t = (each.detach() for each in sample(device))
    program = make_fx(step, tracing_mode=mode)(x, t)
    torch.testing.assert_close(program(2 * x, t), step(2 * x, t))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("reduction", ["none", "rows", "sum"])
def test_forward_mode_of_the_bare_op(device: str, place: int, reduction: str) -> None:
    op = torch.ops.fused_sce.sigmoid_cross_entropy
    tensors = [torch.rand(4, 5, dtype=torch.float64, device=device) for _ in range(3)]
    tangent = torch.randn_like(tensors[place])

    def function(moved: Tensor) -> Tensor:
        return op(*tensors[:place], moved, *tensors[place + 1 :], reduction=reduction)

    step = 1e-6
    expected = (function(tensors[place] + step * tangent) - function(tensors[place] - step * tangent)) / (2 * step)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(function(forward_ad.make_dual(tensors[place], tangent))).tangent
    assert got is not None
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
    if place < 2:
        _, linear = torch.func.linearize(function, tensors[place])
        torch.testing.assert_close(linear(tangent), expected, rtol=1e-6, atol=1e-8)


class FusedCalls(TorchDispatchMode):
    """Shapes of the logits of each call of the op."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "fused_sce" in str(func):
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


VMAPPED: dict[str, tuple[tuple[int | None, ...], tuple[tuple[int, ...], ...]]] = {
    "all": ((0, 0, 0, 0), ((3, 4, 5), (3, 4, 5), (3, 5), (3, 4, 1))),
    "inputs": ((0, 0, None, None), ((3, 4, 5), (3, 4, 5), (5,), (4, 1))),
    "target alone": ((None, 0, None, None), ((4, 5), (3, 4, 5), (5,), ())),
    "weight alone": ((None, None, 0, None), ((4, 5), (4, 5), (3, 4, 5), (1, 5))),
    "last dimensions": ((2, 1, 1, 0), ((4, 5, 3), (4, 3, 5), (5, 3), (3,))),
}


@pytest.mark.parametrize("case", list(VMAPPED))
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sum_classes", "soft margin none"])
def test_vmap_is_one_call_of_the_kernel(device: str, case: str, reduction: str) -> None:
    in_dims, shapes = VMAPPED[case]
    x, t, weight, pos_weight = (torch.rand(shape, dtype=torch.float64, device=device) for shape in shapes)

    def one(x: Tensor, t: Tensor, weight: Tensor, pos_weight: Tensor) -> Tensor:
        if reduction == "soft margin none":
            return F.multilabel_soft_margin_loss(x, t, weight, reduction="none")
        return F.sigmoid_cross_entropy(x, t, weight=weight, pos_weight=pos_weight, reduction=reduction)

    def sample(tensor: Tensor, dim: int | None, index: int) -> Tensor:
        return tensor if dim is None else tensor.select(dim, index)

    tensors = (x.requires_grad_(), t, weight, pos_weight)
    expected = torch.stack(
        [one(*(sample(tensor, dim, i) for tensor, dim in zip(tensors, in_dims, strict=True))) for i in range(3)]
    )
    with FusedCalls() as calls:
        batched = torch.vmap(one, in_dims=in_dims)(*tensors)
    assert len(calls.shapes) == 1
    torch.testing.assert_close(batched, expected)
    upstream = torch.rand_like(expected)
    torch.testing.assert_close(torch.autograd.grad(batched, x, upstream), torch.autograd.grad(expected, x, upstream))


def test_nested_vmap(device: str) -> None:
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64, device=device)
    t = torch.rand(3, 4, 5, dtype=torch.float64, device=device)
    batched = torch.vmap(torch.vmap(F.binary_cross_entropy_with_logits), in_dims=(0, None))(x, t)
    expected = F.sigmoid_cross_entropy(x, t.expand(2, 3, 4, 5), reduction="none").mean((-1, -2))
    torch.testing.assert_close(batched, expected)


def test_vmap_with_a_count(device: str) -> None:
    op = torch.ops.fused_sce.sigmoid_cross_entropy
    x, t = torch.rand(3, 4, 5, device=device), torch.rand(3, 4, 5, device=device)
    counts = torch.tensor([[2], [0], [7]], device=device)
    batched = torch.vmap(lambda x, t, n: op(x, t, None, None, n, reduction="sum"))(x, t, counts)
    expected = torch.stack([op(x[i], t[i], None, None, counts[i], reduction="sum") for i in range(3)])
    torch.testing.assert_close(batched, expected)


def test_vmap_of_grad_and_jvp(device: str, loss: Loss) -> None:
    x, t = sample(device)
    x, t = x.detach(), t.detach()

    def total(x: Tensor, t: Tensor) -> Tensor:
        return loss(x, t).sum()

    # the gradient of each sample by itself, as for differential privacy
    per_sample = torch.func.vmap(torch.func.grad(total))(x.unsqueeze(1), t.unsqueeze(1))
    for row in range(len(x)):
        leaf = x[row : row + 1].clone().requires_grad_()
        (expected,) = torch.autograd.grad(total(leaf, t[row : row + 1]), leaf)
        torch.testing.assert_close(per_sample[row], expected)

    tangents = torch.randn_like(x), torch.randn_like(t)
    leaves = x.clone().requires_grad_(), t.clone().requires_grad_()
    gradients = torch.autograd.grad(total(*leaves), leaves)
    value, derivative = torch.func.jvp(total, (x, t), tangents)
    torch.testing.assert_close(value, total(x, t))
    torch.testing.assert_close(
        derivative, sum((g * v).sum() for g, v in zip(gradients, tangents, strict=True)), rtol=1e-10, atol=1e-12
    )


def test_hooks_see_the_gradient_and_may_change_it(device: str, loss: Loss) -> None:
    x, t = sample(device, torch.float32)
    (expected,) = torch.autograd.grad(loss(x, t).sum(), x)
    seen: list[Tensor] = []
    logits = x * 1
    logits.register_hook(lambda gradient: seen.append(gradient.clone()))
    logits.register_hook(lambda gradient: gradient * 2)
    logits.retain_grad()
    loss(logits, t).sum().backward()
    torch.testing.assert_close(seen[0], expected)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * expected)


def test_deterministic_mode(device: str, loss: Loss) -> None:
    x, t = sample(device, torch.float32)
    (expected,) = torch.autograd.grad(loss(x, t).sum(), x)
    torch.use_deterministic_algorithms(True)
    try:
        (gradient,) = torch.autograd.grad(loss(x, t).sum(), x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(gradient, expected)


def test_saved_tensor_hooks_and_checkpointing(device: str, loss: Loss) -> None:
    x, t = sample(device)
    (expected,) = torch.autograd.grad(loss(x, t).sum(), x)
    recomputed = torch.utils.checkpoint.checkpoint(loss, x, t, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(recomputed.sum(), x)[0], expected)
    with torch.autograd.graph.save_on_cpu():
        value = loss(x, t)
    assert torch.equal(torch.autograd.grad(value.sum(), x)[0], expected)


def test_anomaly_mode(loss: Loss) -> None:
    x, t = sample()
    with torch.autograd.detect_anomaly(check_nan=True):
        loss(x, t).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("upstream", [1e-9, 2.0**17])
def test_a_narrow_weight_does_not_narrow_the_gradients(device: str, upstream: float) -> None:
    # all is computed in the computing dtype: in the weight's float16 these factors are 0 and infinite
    x, t = sample(device, torch.float32)
    weight = torch.rand(5, device=device).half()
    gradients = []
    for factor in (weight, weight.float()):
        for create_graph in (False, True):
            value = F.sigmoid_cross_entropy(x, t, weight=factor, pos_weight=factor, reduction="sum")
            grads = torch.autograd.grad(value, (x, t), torch.tensor(upstream, device=device), create_graph=create_graph)
            gradients.append([gradient.detach() for gradient in grads])
    for ours, expected in zip(gradients[:2], gradients[2:], strict=True):
        assert all(gradient.isfinite().all() and gradient.ne(0).all() for gradient in ours)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
