"""The dispatcher ops: registration, compilation, autocast, meta tensors, subclasses and modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fused_sce
from fused_sce import functional as F

ops = torch.ops.fused_sce


def tensors(device: str, dtype: torch.dtype, weighted: bool) -> tuple[Tensor | None, ...]:
    """Input, target, weight, pos_weight, count, mask, label_alpha, prior, columns and rows."""
    x = torch.randn(6, 9, device=device, dtype=dtype)
    t = torch.rand(6, 9, device=device, dtype=dtype)
    if not weighted:
        return x, t, *[None] * 8
    weight = torch.rand(9, device=device, dtype=dtype)
    pos_weight = torch.rand(6, 1, device=device, dtype=dtype)
    alpha, prior = torch.rand(2, 9, device=device, dtype=dtype)
    mask = torch.arange(9, device=device) != 3
    return x, t, weight, pos_weight, torch.tensor([5], device=device), mask, alpha, prior, None, None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "rows", "sum"])
def test_opcheck(device: str, dtype: torch.dtype, weighted: bool, reduction: str) -> None:
    x, *rest = tensors(device, dtype, weighted)
    assert x is not None
    leaf = x.requires_grad_()
    options = {"reduction": reduction, "divisor": 9}
    if reduction == "none":
        rest[3], options = None, {}  # no count
    torch.library.opcheck(ops.sigmoid_cross_entropy.default, (leaf, *rest), options)
    # opcheck passes an op without any autograd, so:
    loss = ops.sigmoid_cross_entropy(leaf, *rest, **options)
    (gradient,) = torch.autograd.grad(loss.float().sum(), leaf)
    assert (gradient.abs() > 0).sum() == (6 * 8 if weighted else 6 * 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck_of_private_ops(device: str, dtype: torch.dtype, weighted: bool) -> None:
    arguments = (*tensors(device, dtype, weighted), "sum", torch.float32, 9)
    # without a fake kernel, because only tensors with memory come to it
    checks = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(ops._sigmoid_cross_entropy_forward.default, arguments, test_utils=checks)
    upstream = torch.rand((), device=device, dtype=dtype)
    torch.library.opcheck(ops._sigmoid_cross_entropy_backward.default, (upstream, *arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_place", [False, True])
def test_gradient_in_given_memory(device: str, dtype: torch.dtype, in_place: bool) -> None:
    x, *rest = tensors(device, dtype, weighted=True)
    assert x is not None
    arguments = (*rest, "sum", torch.float32, 9)
    expected, expected_gradient = ops._sigmoid_cross_entropy_forward(x, *arguments)
    input = x.clone()
    gradient = input if in_place else torch.empty_like(x)
    assert torch.equal(ops._sigmoid_cross_entropy_forward_out(input, *arguments, gradient=gradient), expected)
    assert torch.equal(gradient, expected_gradient)

    upstream = torch.rand(6, 9, device=device, dtype=dtype)
    expected_gradient = ops._sigmoid_cross_entropy_backward(upstream, x, *arguments)
    input = x.clone()
    gradient = input if in_place else torch.empty_like(x)
    ops._sigmoid_cross_entropy_backward_out(upstream, input, *arguments, gradient=gradient)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (torch.empty(9, 6), r"of input's shape \[6, 9\] .*, got shape \[9, 6\]"),
        (torch.empty(6, 18)[:, ::2], r"without gaps in memory, got shape \[6, 9\] and strides \[18, 2\]"),
        (torch.empty(6, 9).double(), "input's dtype Float, got Double"),
    ],
)
def test_memory_that_does_not_fit(gradient: Tensor, message: str) -> None:
    arguments = (*tensors("cpu", torch.float32, weighted=False), "sum")
    with pytest.raises(RuntimeError, match=message):
        ops._sigmoid_cross_entropy_forward_out(*arguments, gradient=gradient)


def test_a_gradient_may_have_another_layout() -> None:
    x, t, *_ = tensors("cpu", torch.float32, weighted=False)
    gradient = torch.empty(9, 6).t()
    ops._sigmoid_cross_entropy_forward_out(x, t, reduction="sum", gradient=gradient)
    upstream = torch.tensor(3.0)
    expected = ops._sigmoid_cross_entropy_backward(upstream, x, t, reduction="sum")
    ops._sigmoid_cross_entropy_backward_out(upstream, x, t, reduction="sum", gradient=gradient, is_made=True)
    assert torch.equal(gradient, expected)


def test_a_gradient_that_is_made_needs_its_logits_and_one_factor() -> None:
    x, t, *_ = tensors("cpu", torch.float32, weighted=False)
    for upstream, gradient in ((torch.tensor(2.0), x), (torch.rand(6, 9), torch.empty_like(x))):
        with pytest.raises(RuntimeError, match="is_made needs a gradient apart from input, and one grad_output"):
            ops._sigmoid_cross_entropy_backward_out(upstream, x, t, gradient=gradient, is_made=True)


def test_a_failed_call_keeps_no_tensor() -> None:
    x, t, *_ = tensors("cpu", torch.float32, weighted=False)
    gradient = torch.empty_like(x)
    before = torch._C._storage_Use_Count(gradient.untyped_storage()._cdata)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="the sum alone"):
            ops._sigmoid_cross_entropy_forward_out(x, t, reduction="none", gradient=gradient)
    assert torch._C._storage_Use_Count(gradient.untyped_storage()._cdata) == before


def test_gradient_may_not_overlap_the_arguments() -> None:
    buffer = torch.zeros(200)
    x = buffer[:54].view(6, 9)
    for overlapping in (buffer[1:55].view(6, 9), buffer[53:107].view(6, 9)):
        with pytest.raises(RuntimeError, match="overlaps the memory of an argument"):
            ops._sigmoid_cross_entropy_forward_out(x, torch.rand(6, 9), reduction="sum", gradient=overlapping)
    for place in (1, 2, 3):
        arguments: list[Tensor | None] = [torch.randn(6, 9), torch.rand(6, 9), None, None]
        arguments[place] = x if place == 1 else buffer[50:59]
        with pytest.raises(RuntimeError, match="overlaps the memory of an argument"):
            ops._sigmoid_cross_entropy_forward_out(*arguments, reduction="sum", gradient=x)


def test_upstream_may_not_lie_in_the_gradient() -> None:
    buffer = torch.rand(60)
    gradient = buffer[:54].view(6, 9)
    for upstream in (gradient, buffer[1:55].view(6, 9), buffer[3]):
        with pytest.raises(RuntimeError, match="overlaps the memory of an argument"):
            ops._sigmoid_cross_entropy_backward_out(upstream, torch.randn(6, 9), torch.rand(6, 9), gradient=gradient)


def test_results_and_counts_without_memory_are_noticed() -> None:
    x, t = torch.randn(6, 9), torch.rand(6, 9)
    gradient, count = torch.empty(6, 9), torch.tensor([3])
    for tensor in (gradient, count):
        tensor.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="gradient has no memory"):
        ops._sigmoid_cross_entropy_forward_out(x, t, reduction="sum", gradient=gradient)
    with pytest.raises(RuntimeError, match="count has no memory"):
        ops.sigmoid_cross_entropy(x, t, None, None, count, reduction="sum")


@pytest.mark.parametrize("count", [0, 1, 5, 2**40])
@pytest.mark.parametrize("reduction", ["rows", "sum"])
def test_count_divides(device: str, count: int, reduction: str) -> None:
    x, t, weight, *_ = tensors(device, torch.float64, weighted=True)
    on_device = torch.tensor(count, device=device)
    assert x is not None
    leaf = x.requires_grad_()
    loss = ops.sigmoid_cross_entropy(leaf, t, weight, None, on_device, reduction=reduction, divisor=3)
    expected = ops.sigmoid_cross_entropy(leaf, t, weight, reduction=reduction, divisor=3) / max(count, 1)
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    upstream = torch.rand_like(loss)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaf, upstream), torch.autograd.grad(expected, leaf, upstream), rtol=1e-14, atol=0
    )


def test_a_count_that_is_none() -> None:
    x, t = torch.randn(2, 3), torch.rand(2, 3)
    for count in (torch.tensor([1, 2]), torch.tensor(1.0)):
        with pytest.raises(RuntimeError, match="count must be one int64 element"):
            ops.sigmoid_cross_entropy(x, t, None, None, count, reduction="sum")
    with pytest.raises(RuntimeError, match="reduction none has neither divisor nor count"):
        ops.sigmoid_cross_entropy(x, t, divisor=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32])
@pytest.mark.gpu
def test_scale_reads_a_factor_of_any_type(dtype: torch.dtype) -> None:
    # 1065353216 has the bits of the float 1.0
    for factor in (1, 3, 1065353216):
        values = torch.randn(1001, device="cuda")
        expected = values * torch.tensor(factor, device="cuda").to(dtype).float()
        ops._scale_(values, torch.tensor(factor, device="cuda").to(dtype))
        assert torch.equal(values, expected)
    with pytest.raises(RuntimeError, match="factor lies in the memory of self"):
        ops._scale_(values, values[3])
    with pytest.raises(RuntimeError, match="self"):
        ops._scale_(values.to(torch.int8), values[3])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sum_classes"])
def test_whole_graph_compiles(reduction: str) -> None:
    pos_weight = torch.rand(80)

    def step(x: Tensor, t: Tensor) -> Tensor:
        return F.sigmoid_cross_entropy(x * 2, t, pos_weight=pos_weight, reduction=reduction)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5, 8):
        x = torch.randn(rows, 80, requires_grad=True)
        t = torch.rand(rows, 80)
        eager, traced = step(x, t), compiled(x, t)
        torch.testing.assert_close(traced, eager)
        upstream = torch.full_like(eager, 1.5)
        torch.testing.assert_close(torch.autograd.grad(traced, x, upstream), torch.autograd.grad(eager, x, upstream))


def test_batch_size_does_not_recompile() -> None:
    compiles = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal compiles
        compiles += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(F.binary_cross_entropy_with_logits, backend=backend, dynamic=True)
    for rows in (3, 5, 8, 13):
        compiled(torch.randn(rows, 80), torch.rand(rows, 80))
    assert compiles == 1


@pytest.mark.parametrize("loss", [F.binary_cross_entropy_with_logits, F.multilabel_soft_margin_loss])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiled_autograd_traces_through(loss: Callable[..., Tensor], reduction: str) -> None:
    torch._dynamo.reset()
    weight = torch.rand(7)
    for rows in (4, 9, 5):
        x = torch.randn(rows, 7, requires_grad=True)
        t = torch.rand(rows, 7, requires_grad=True)
        expected = torch.autograd.grad(loss(x, t, weight, reduction=reduction).sum() * 3, (x, t))
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            (loss(x, t, weight, reduction=reduction).sum() * 3).backward()
        torch.testing.assert_close((x.grad, t.grad), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_reads_the_logits_as_they_are(device: str, dtype: torch.dtype) -> None:
    x = torch.randn(8, 10, device=device, dtype=dtype, requires_grad=True)
    t = torch.randint(0, 2, (8, 10), device=device)
    with torch.autocast(device, dtype=dtype):
        for loss in (
            F.binary_cross_entropy_with_logits(x, t.float()),
            F.binary_cross_entropy_with_logits(x, t.to(dtype), reduction="none"),
            F.binary_cross_entropy_with_logits(x, t.bool()),
            F.multilabel_soft_margin_loss(x, t.to(dtype)),
            F.multilabel_soft_margin_loss(x, t, reduction="none"),
        ):
            assert loss.dtype == torch.float32
            (gradient,) = torch.autograd.grad(loss.sum(), x)
            assert gradient.dtype == dtype
        assert F.binary_cross_entropy_with_logits(x, t.double()).dtype == torch.float64
    exact = F.binary_cross_entropy_with_logits(x.float(), t.float())
    with torch.autocast(device, dtype=dtype):
        loss = F.binary_cross_entropy_with_logits(x, t)
    # On a GPU sums over 16-bit logits have a formula of their own (gpu16.h), good to 2^-20 + |x| 2^-23; rounding to 16
    # bits would be seen at 2^-12.
    torch.testing.assert_close(loss, exact, rtol=2.0**-19 if device == "cuda" else 0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_with_autocast_and_grad_scaler(device: str, dtype: torch.dtype) -> None:
    data = torch.randn(256, 64, device=device)
    wanted = (data @ torch.randn(64, 40, device=device) > 4).float()

    def train(criterion: torch.nn.Module) -> list[float]:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 40)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            with torch.autocast(device, dtype=dtype):
                loss = criterion(model(data), wanted)
            assert loss.dtype == torch.float32
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        return losses

    ours, theirs = train(fused_sce.BCEWithLogitsLoss()), train(torch.nn.BCEWithLogitsLoss())
    assert ours[-1] < 0.3 * ours[0]
    assert ours == pytest.approx(theirs, rel=0.05, abs=2e-3)


def test_autocast_through_the_reference() -> None:
    x, t = torch.randn(3, 4, dtype=torch.bfloat16), torch.rand(3, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        batched = torch.func.vmap(F.binary_cross_entropy_with_logits)(x, t)
    assert batched.dtype == torch.float32


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_meta_tensors(reduction: str) -> None:
    x = torch.empty(4, 5, device="meta", requires_grad=True)
    t = torch.empty(4, 5, device="meta", dtype=torch.bool)
    loss = F.binary_cross_entropy_with_logits(x, t, reduction=reduction)
    assert loss.is_meta
    assert loss.shape == ((4, 5) if reduction == "none" else ())
    loss.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (4, 5)


def test_meta_tensors_of_mixed_dtypes_and_under_autocast() -> None:
    x, t = torch.empty(4, 5, device="meta"), torch.empty(4, 5, device="meta", dtype=torch.bool)
    assert F.multilabel_soft_margin_loss(x, t).is_meta
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.binary_cross_entropy_with_logits(x, t).is_meta
    with pytest.raises(ValueError, match="it must be one of none, rows, sum"):
        ops.sigmoid_cross_entropy(x, t, reduction="mean")


def test_a_misspelt_option_is_named() -> None:
    with pytest.raises(TypeError, match=r"binary_cross_entropy_with_logits.* 'reductin'"):
        F.binary_cross_entropy_with_logits(torch.randn(3), torch.rand(3), reductin="sum")


@pytest.mark.parametrize("wanted", ["weight", "pos_weight"])
def test_direct_call_has_gradients_of_weights(wanted: str) -> None:
    x, t = torch.randn(5, 3), torch.rand(5, 3)
    factors = {"weight": torch.rand(3), "pos_weight": torch.rand(3)}
    factors[wanted].requires_grad_()
    loss = ops.sigmoid_cross_entropy(x, t, *factors.values(), reduction="sum")
    plain = (
        factors["weight"]
        * (
            -(1 - t) * torch.nn.functional.logsigmoid(-x)
            - factors["pos_weight"] * t * torch.nn.functional.logsigmoid(x)
        )
    ).sum()
    torch.testing.assert_close(*(torch.autograd.grad(each, factors[wanted])[0] for each in (loss, plain)))


def test_direct_call_is_checked_too() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="must be the same as input size"):
        ops.sigmoid_cross_entropy(x, torch.rand(3, 5))
    with pytest.raises(RuntimeError, match=r"weight of shape .3.* does not broadcast"):
        ops.sigmoid_cross_entropy(x, torch.rand(3, 4), torch.rand(3))
    with pytest.raises(
        TypeError, match=r"input must have dtype float32, float64, bfloat16 or float16, got torch.int64"
    ):
        ops.sigmoid_cross_entropy(x.long(), torch.rand(3, 4))
    with pytest.raises(TypeError, match=r"target must have dtype .* got torch.complex64"):
        ops.sigmoid_cross_entropy(x, torch.rand(3, 4).to(torch.complex64))
    with pytest.raises(RuntimeError, match="reduction must be none, rows or sum, got mean"):
        ops.sigmoid_cross_entropy(x, x, reduction="mean")
    with pytest.raises(RuntimeError, match="the gradient is made with the sum alone, got reduction none"):
        ops._sigmoid_cross_entropy_forward(x, x)
    with pytest.raises(RuntimeError, match="dtype must be float32, float64, bfloat16 or float16, got Long"):
        ops.sigmoid_cross_entropy(x, x, dtype=torch.int64)


@pytest.mark.parametrize("name", ["input", "target", "weight", "pos_weight"])
@pytest.mark.parametrize("copied", ["", "converted", "across"])
def test_memory_given_back_is_noticed(name: str, copied: str) -> None:
    # as FSDP does between uses
    tensors = {key: torch.rand(30, 40) for key in ("input", "target", "weight", "pos_weight")}
    if copied == "converted":
        tensors[name] = tensors[name].bfloat16()
    elif copied == "across":
        tensors[name] = torch.rand(40, 30).t()
    tensors[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{name} has no memory"):
        F.sigmoid_cross_entropy(**tensors)


def test_device_without_kernels_says_so_and_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    # as on a CUDA tensor with a CPU-only build: here the meta device plays the device without kernels
    monkeypatch.setattr(fused_sce._calls, "_KERNEL_DEVICES", ("cpu",))
    fused_sce._calls._warn_without_kernels.cache_clear()
    x, t = torch.randn(3, 4, device="meta"), torch.rand(3, 4, device="meta")
    with pytest.warns(UserWarning, match="right but not fused"):
        loss = fused_sce.BCEWithLogitsLoss()(x, t)
    assert loss.shape == ()
    fused_sce._calls._warn_without_kernels.cache_clear()


LOSSES = [F.binary_cross_entropy_with_logits, F.multilabel_soft_margin_loss, F.sigmoid_cross_entropy]


class Subclass(Tensor):
    """Any subclass that does not say otherwise: results are of it."""


@pytest.mark.parametrize("loss", LOSSES)
def test_subclasses_are_asked(loss: Callable[..., Tensor]) -> None:
    x, t, weight = torch.randn(4, 7), torch.rand(4, 7), torch.rand(7)
    for place in range(3):
        tensors = [x, t, weight]
        tensors[place] = tensors[place].as_subclass(Subclass)
        for reduction in ("mean", "none"):
            value = loss(tensors[0], tensors[1], weight=tensors[2], reduction=reduction)
            assert type(value) is Subclass
            assert torch.equal(value.as_subclass(Tensor), loss(x, t, weight=weight, reduction=reduction))
    # "eager": for what comes after, torch 2.11 cannot take a subclass, whatever the op.
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert type(compiled(x.as_subclass(Subclass), t)) is Subclass


@pytest.mark.parametrize("loss", LOSSES)
def test_modes_see_the_call_as_it_was_made(loss: Callable[..., Tensor]) -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append((function, args, kwargs))
            return function(*args, **(kwargs or {}))

    x, t, weight = torch.randn(4, 7), torch.rand(4, 7), torch.rand(7)
    seen: list[Any] = []
    with Mode():
        value = loss(x, t, weight=weight, reduction="sum")
    assert torch.equal(value, loss(x, t, weight=weight, reduction="sum"))
    assert len(seen) == 1
    function, args, kwargs = seen[0]
    assert function is loss
    assert args[0] is x
    assert args[1] is t
    assert kwargs["weight"] is weight
    assert kwargs["reduction"] == "sum"
