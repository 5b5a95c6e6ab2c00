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


def arguments(op: str, device: str, dtype: torch.dtype, weighted: bool) -> tuple[Any, ...]:
    x = torch.randn(6, 9, device=device, dtype=dtype)
    t = torch.rand(6, 9, device=device, dtype=dtype)
    weight = torch.rand(9, device=device, dtype=dtype) if weighted else None
    pos_weight = torch.rand(6, 1, device=device, dtype=dtype) if weighted else None
    if op == "_scale_":
        return x, torch.tensor(3.0, device=device)
    if op == "_sigmoid_cross_entropy_backward":
        return torch.rand((), device=device, dtype=dtype), x, t, weight, pos_weight, 54
    if op == "_sigmoid_cross_entropy_sum_with_gradient":
        return x, t, weight, pos_weight, 54, None
    leaf = x.requires_grad_()
    if op == "sigmoid_cross_entropy":
        return leaf, t, weight, pos_weight
    return leaf, t, weight, pos_weight, 9


@pytest.mark.parametrize(
    "op",
    [
        "sigmoid_cross_entropy",
        "sigmoid_cross_entropy_rows",
        "sigmoid_cross_entropy_sum",
        "_sigmoid_cross_entropy_sum_with_gradient",
        "_sigmoid_cross_entropy_backward",
        "_scale_",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(device: str, op: str, dtype: torch.dtype, weighted: bool) -> None:
    args = arguments(op, device, dtype, weighted)
    torch.library.opcheck(getattr(ops, op).default, args)
    # opcheck passes an op without any autograd, so:
    if not op.startswith("_"):
        out = getattr(ops, op)(*args)
        (gradient,) = torch.autograd.grad(out.float().sum(), args[0])
        assert gradient.abs().min() > 0


def test_opcheck_of_the_op_that_allocates_nothing(device: str) -> None:
    args = arguments("_sigmoid_cross_entropy_sum_with_gradient", device, torch.float32, weighted=True)
    results = {"loss": torch.empty((), device=device), "gradient": torch.empty(6, 9, device=device)}
    op = ops._sigmoid_cross_entropy_sum_with_gradient_out.default
    torch.library.opcheck(op, args[:-1], results)
    op(*args[:-1], **results)
    loss, gradient = ops._sigmoid_cross_entropy_sum_with_gradient(*args)
    assert torch.equal(results["loss"], loss)
    assert torch.equal(results["gradient"], gradient)


@pytest.mark.parametrize(
    ("results", "error", "message"),
    [
        ({"loss": torch.empty(2)}, ValueError, r"loss must have one element, got shape \[2\]"),
        ({"loss": torch.empty((), dtype=torch.int64)}, TypeError, "loss must be floating point, got Long"),
        ({"gradient": torch.empty(9, 6)}, ValueError, r"of input's shape \[6, 9\], got shape \[9, 6\]"),
        ({"gradient": torch.empty(9, 6).t()}, ValueError, r"contiguous .*strides \[1, 6\]"),
        ({"gradient": torch.empty(6, 9).double()}, TypeError, "input's dtype Float, got Double"),
    ],
)
def test_results_that_do_not_fit(results: dict[str, Tensor], error: type[Exception], message: str) -> None:
    args = arguments("_sigmoid_cross_entropy_sum_with_gradient", "cpu", torch.float32, weighted=False)[:-1]
    fitting = {"loss": torch.empty(()), "gradient": torch.empty(6, 9)}
    with pytest.raises(error, match=message):
        ops._sigmoid_cross_entropy_sum_with_gradient_out(*args, **fitting | results)


def test_results_may_not_lie_in_the_inputs() -> None:
    x, t, *rest, _ = arguments("_sigmoid_cross_entropy_sum_with_gradient", "cpu", torch.float32, weighted=False)
    for inside in (x, t):
        with pytest.raises(RuntimeError, match="refer to a single memory location"):
            ops._sigmoid_cross_entropy_sum_with_gradient_out(x, t, *rest, loss=torch.empty(()), gradient=inside)


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


def test_direct_call_refuses_a_weight_that_wants_a_gradient() -> None:
    x, weight = torch.randn(3, requires_grad=True), torch.rand(3, requires_grad=True)
    for input in (x, x.detach()):
        with pytest.raises(RuntimeError, match="no gradient by weight"):
            ops.sigmoid_cross_entropy_sum(input, x.detach(), weight)


def test_direct_call_is_checked_too() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="must be the same as input size"):
        ops.sigmoid_cross_entropy_sum(x, torch.rand(3, 5))
    with pytest.raises(RuntimeError, match=r"weight of shape \[3\] does not broadcast"):
        ops.sigmoid_cross_entropy_sum(x, torch.rand(3, 4), torch.rand(3))
    with pytest.raises(TypeError, match="input must be floating point"):
        ops.sigmoid_cross_entropy_sum(x.long(), torch.rand(3, 4))
    with pytest.raises(TypeError, match="target has dtype ComplexFloat"):
        ops.sigmoid_cross_entropy_sum(x, torch.rand(3, 4).to(torch.complex64))


def test_device_without_kernels_says_so_and_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    # as on a CUDA tensor with a CPU-only build: here the CPU plays the device without kernels
    monkeypatch.setattr(F, "_KERNEL_DEVICES", ())
    monkeypatch.setattr(F._C, "usual_loss", lambda *_: None)  # in such a build it knows of no kernels either
    F._lacks_kernels.cache_clear()
    x, t = torch.randn(3, 4), torch.rand(3, 4)
    with pytest.warns(UserWarning, match="right but not fused"):
        loss = fused_sce.BCEWithLogitsLoss()(x, t)
    torch.testing.assert_close(loss, torch.nn.BCEWithLogitsLoss()(x, t))
    F._lacks_kernels.cache_clear()


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
