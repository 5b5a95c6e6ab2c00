"""inplace=True: the gradient overwrites the logits, nobody is deceived, and no memory is taken."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from test_autograd import allocations
from torch import Tensor, nn

import fused_sce
from fused_sce import functional as F

REDUCTIONS = ("mean", "sum", "sum_classes", "none")


def loss_of(logits: Tensor, target: Tensor, reduction: str, inplace: bool, **options: Tensor) -> Tensor:
    return F.sigmoid_cross_entropy(logits, target, reduction=reduction, inplace=inplace, **options)


@pytest.mark.parametrize("factor", [1.0, 0.75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target_dtype", [None, torch.bool, torch.float64])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_same_bits_in_the_memory_of_the_logits(
    device: str, dtype: torch.dtype, target_dtype: torch.dtype | None, reduction: str, weighted: bool, factor: float
) -> None:
    x = (torch.randn(37, 131, device=device) * 9).to(dtype)
    x[0, :6] = torch.tensor([torch.inf, -torch.inf, torch.nan, 104.0, -104.0, 17.0])
    t = (torch.rand(37, 131, device=device) < 0.5).to(target_dtype or dtype)
    options = {"weight": torch.rand(131, device=device), "pos_weight": torch.rand(37, 1, device=device)}
    options = options if weighted else {}
    results = []
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        logits = leaf * 1
        address = logits.data_ptr()
        logits.register_hook(lambda gradient, a=address, i=inplace: check_address(gradient, a, i))
        value = loss_of(logits, t, reduction, inplace, **options)
        value.backward(torch.full_like(value, factor))
        results.append((value.detach(), leaf.grad))
    # The gradient of a sum lies in the logits' memory, rounded to their dtype, when a factor other than 1 comes.
    rounded_twice = factor != 1 and reduction != "none" and dtype is not torch.float16
    info = torch.finfo(dtype)
    bounds = (
        {"rtol": 3 * info.eps, "atol": info.smallest_normal * info.eps} if rounded_twice else {"rtol": 0, "atol": 0}
    )
    # On a GPU a sum over 16-bit logits that is not finite takes another loop; NaN equals NaN here.
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(results[1][1], results[0][1], **bounds, equal_nan=True)


def check_address(gradient: Tensor, address: int, inplace: bool) -> None:
    assert (gradient.data_ptr() == address) == inplace


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_training_is_the_same(reduction: str) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    twin = copy.deepcopy(model)
    features, target = torch.randn(9, 8), torch.rand(9, 5)
    for each, inplace in ((model, False), (twin, True)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            criterion = fused_sce.SigmoidCrossEntropyLoss(reduction=reduction, inplace=inplace)
            criterion(each(features), target).sum().backward()
            optimizer.step()
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_memory_beyond_the_inputs(dtype: torch.dtype, reduction: str) -> None:
    leaf = torch.randn(256, 1000, dtype=dtype).requires_grad_()
    logits = leaf.clone()  # whose backward pass takes no memory
    t = torch.rand(256, 1000) < 0.5
    upstream = torch.ones(256, 1000, dtype=dtype) if reduction == "none" else torch.ones((), dtype=dtype)
    result = logits.nbytes if reduction == "none" else 0

    def step() -> None:
        torch.autograd.grad(loss_of(logits, t, reduction, inplace=True), leaf, upstream)

    assert [size for size in allocations(step) if size > 4096] == [result] * bool(result)


@pytest.mark.parametrize("use", [torch.exp, torch.relu, lambda x: x * x, torch.sigmoid])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_whoever_saved_the_logits_fails_loudly(use: Callable[[Tensor], Tensor], reduction: str) -> None:
    logits = use(torch.randn(4, 5, requires_grad=True))  # exp, relu and sigmoid save their results
    other = (logits * logits).sum()
    value = loss_of(logits, torch.rand(4, 5), reduction, inplace=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward((value, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "use",
    [
        lambda z, t: loss_of(z, t, "mean", inplace=True),  # mixup: two losses of the same logits
        lambda z, t: loss_of(z, t, "sum", inplace=False),
        lambda z, t: (z**2).mean(),
        lambda z, t: z.sum(),
    ],
)
def test_a_use_after_the_loss_fails_loudly(dtype: torch.dtype, use: Callable[[Tensor, Tensor], Tensor]) -> None:
    logits, t = torch.randn(4, 5, dtype=dtype).requires_grad_() * 1, torch.rand(4, 5)
    value = loss_of(logits, t, "mean", inplace=True)
    other = use(logits, t)
    with pytest.raises(RuntimeError, match="used after a loss with inplace=True had overwritten them"):
        (value + other).backward()


def test_one_backward_pass_without_a_graph() -> None:
    leaf, t = torch.randn(4, 5).requires_grad_(), torch.rand(4, 5)
    value = loss_of(leaf * 1, t, "mean", inplace=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, leaf, create_graph=True)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="allows one backward pass"):
        value.backward()

    logits = torch.randn(4, 5).requires_grad_() * 1
    value = loss_of(logits, t, "none", inplace=True).sum()
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="allows one backward pass"):
        value.backward()


def test_batched_gradients_are_refused() -> None:
    leaf = torch.randn(4, 5).requires_grad_()
    value = loss_of(leaf * 1, torch.rand(4, 5), "mean", inplace=True)
    with pytest.raises(RuntimeError, match="inplace=True has no batched gradients"):
        torch.autograd.grad(value, leaf, torch.ones(3), is_grads_batched=True)


@pytest.mark.parametrize("change", [lambda z: z.detach().sigmoid_(), lambda z: z.detach().view(-1)[:2].zero_()])
def test_changing_the_gradient_in_the_logits_fails_loudly(change: Callable[[Tensor], Tensor]) -> None:
    logits = torch.randn(4, 5).requires_grad_() * 1
    value = loss_of(logits, torch.rand(4, 5), "mean", inplace=True)
    change(logits)
    with pytest.raises(RuntimeError, match="logits were changed after a loss with inplace=True"):
        value.backward()


def test_logits_that_retain_their_gradient_are_not_overwritten() -> None:
    leaf, t = torch.randn(4, 5, requires_grad=True), torch.rand(4, 5)
    logits = leaf * 1
    logits.retain_grad()
    loss_of(logits, t, "mean", inplace=True).backward()
    (expected,) = torch.autograd.grad(loss_of(leaf, t, "mean", inplace=False), leaf)
    assert torch.equal(logits, leaf)
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hooks_of_saved_tensors(dtype: torch.dtype, reduction: str) -> None:
    # under hooks autograd does not look at versions
    leaf, t = torch.randn(4, 5, dtype=dtype, requires_grad=True), torch.rand(4, 5)
    (expected,) = torch.autograd.grad(loss_of(leaf, t, reduction, inplace=False).sum(), leaf)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        value = loss_of(leaf * 1, t, reduction, inplace=True).sum()
    assert torch.equal(torch.autograd.grad(value, leaf, retain_graph=True)[0], expected)
    with pytest.raises(RuntimeError, match="allows one backward pass"):
        torch.autograd.grad(value, leaf)

    def step(leaf: Tensor) -> Tensor:
        return loss_of(leaf * 1, t, reduction, inplace=True).sum()

    recomputed = torch.utils.checkpoint.checkpoint(step, leaf, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(recomputed, leaf)[0], expected)


def test_the_version_tells_that_the_logits_changed() -> None:
    for reduction, after_forward in (("mean", 1), ("none", 0)):
        logits = torch.randn(4, 5).requires_grad_() * 1
        value = loss_of(logits, torch.rand(4, 5), reduction, inplace=True).sum()
        assert logits._version == after_forward
        value.backward()
        assert logits._version == 1


def test_an_upstream_gradient_in_the_logits_is_refused() -> None:
    for upstream in (lambda z: z[:, :1].expand(6, 6), lambda z: z.t()):
        logits = torch.randn(6, 6).requires_grad_() * 1
        value = loss_of(logits, torch.rand(6, 6), "none", inplace=True)
        with pytest.raises(RuntimeError, match="overlaps the memory of an argument"):
            value.backward(upstream(logits.detach()))


def test_what_cannot_be_overwritten() -> None:
    leaf, t = torch.randn(4, 5, requires_grad=True), torch.rand(4, 5)
    before = leaf.detach().clone()
    for logits in (leaf, leaf.view(5, 4), leaf[1:3]):
        with pytest.raises(RuntimeError, match="would overwrite a leaf tensor that requires grad"):
            loss_of(logits, torch.rand(logits.shape), "mean", inplace=True)
    with pytest.raises(RuntimeError, match="no gradient by target"):
        loss_of(leaf * 1, t.clone().requires_grad_(), "mean", inplace=True)
    for name in ("weight", "pos_weight"):
        with pytest.raises(RuntimeError, match=f"no gradient by {name}"):
            F.sigmoid_cross_entropy(leaf * 1, t, **{name: torch.rand(5, requires_grad=True)}, inplace=True)
    assert torch.equal(leaf, before)


@pytest.mark.parametrize(
    "layout",
    [lambda x: x.t(), lambda x: x[:, ::2], lambda x: x[:1].expand(4, 6), lambda x: x.detach(), lambda x: x.view(6, 4)],
    ids=["transposed", "strided", "expanded", "no gradient", "view"],
)
def test_the_ordinary_way_leaves_the_logits_alone(layout: Callable[[Tensor], Tensor]) -> None:
    leaf = torch.randn(4, 6, requires_grad=True)
    logits = layout(leaf * 1)
    before = logits.detach().clone()
    t = torch.rand(logits.shape)
    value, expected = (loss_of(logits, t, "mean", inplace) for inplace in (True, False))
    assert torch.equal(value, expected)
    if value.requires_grad:
        ours, theirs = (torch.autograd.grad(each, leaf, retain_graph=True)[0] for each in (value, expected))
        assert torch.equal(ours, theirs)
    assert torch.equal(logits, before)


def test_programs_and_transforms_take_the_ordinary_way() -> None:
    x, t = torch.randn(4, 5), torch.rand(4, 5)

    def step(x: Tensor, t: Tensor, inplace: bool = True) -> Tensor:
        return loss_of(x * 2, t, "mean", inplace)

    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(step(leaf, t, False), leaf)[0]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf, t), leaf)[0], expected)
    torch.testing.assert_close(torch.func.grad(step)(x, t), expected)
    torch.testing.assert_close(
        torch.func.vmap(step)(torch.stack([x, x]), torch.stack([t, t])), step(x, t, False).expand(2)
    )


def test_module_shows_it() -> None:
    assert repr(fused_sce.SigmoidCrossEntropyLoss()) == "SigmoidCrossEntropyLoss(reduction='mean')"
    shown = repr(fused_sce.SigmoidCrossEntropyLoss(reduction="sum", inplace=True))
    assert shown == "SigmoidCrossEntropyLoss(reduction='sum', inplace=True)"
