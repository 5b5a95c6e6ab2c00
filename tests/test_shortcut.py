"""The short way from Python to the ops: the same results as the long way, and taken only where nobody would miss it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import fused_sce
from fused_sce import functional as F
from fused_sce._extension import _C

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def usual(
    input: object = None,
    target: object = None,
    weight: object = None,
    pos_weight: object = None,
    reduction: object = "mean",
    soft_margin: bool = False,
) -> Tensor | None:
    """The shortcut on defaults that it takes."""
    input = torch.randn(5, 7) if input is None else input
    target = torch.rand(5, 7) if target is None else target
    loss: Tensor | None = _C.usual_loss(input, target, weight, pos_weight, reduction, soft_margin)  # type: ignore[arg-type]
    return loss


@contextlib.contextmanager
def only(way: str, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Only one of the ways: the other one raises, or is not offered."""
    with monkeypatch.context() as patch:
        if way == "long":
            patch.setattr(_C, "usual_loss", lambda *_: None)
        else:
            patch.setattr(F, "check_tensors", lambda *_: pytest.fail("this call took the long way"))
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target_dtype", [None, torch.bool, torch.int64, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_both_ways_give_the_same_bits(
    device: str,
    dtype: torch.dtype,
    target_dtype: torch.dtype | None,
    reduction: str,
    weighted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(6, 9, device=device, dtype=dtype).requires_grad_()
    t = (torch.rand(6, 9, device=device) < 0.5).to(target_dtype or dtype)
    factor = torch.rand(9, device=device) + 0.5 if weighted else None
    both = []
    for way in ("short", "long"):
        with only(way, monkeypatch):
            loss = F.binary_cross_entropy_with_logits(x, t, factor, reduction=reduction, pos_weight=factor)
        both.append((loss, *torch.autograd.grad(loss, x)))
    (short, short_gradient), (long, long_gradient) = both
    assert short.dtype == long.dtype
    assert torch.equal(short, long)
    assert torch.equal(short_gradient, long_gradient)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_soft_margin_both_ways(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, t, weight = torch.randn(6, 9), torch.rand(6, 9), torch.rand(9)
    losses = []
    for way in ("short", "long"):
        with only(way, monkeypatch):
            losses.append(fused_sce.MultiLabelSoftMarginLoss(weight, reduction=reduction)(x, t))
    assert torch.equal(*losses)
    torch.testing.assert_close(losses[0], nn.MultiLabelSoftMarginLoss(weight, reduction=reduction)(x, t))


class Subclass(Tensor):
    """Any subclass: it may override what a call means."""


LEFT_ALONE: dict[str, Callable[[], Tensor | None]] = {
    "no tensor": lambda: usual([1.0]),
    "target no tensor": lambda: usual(target=1.0),
    "subclass": lambda: usual(torch.randn(5, 7).as_subclass(Subclass)),
    "target subclass": lambda: usual(target=torch.randn(5, 7).as_subclass(Subclass)),
    "integer logits": lambda: usual(torch.ones(5, 7, dtype=torch.int64)),
    "complex target": lambda: usual(target=torch.ones(5, 7, dtype=torch.complex64)),
    "shapes differ": lambda: usual(target=torch.rand(7, 5)),
    "devices differ": lambda: usual(target=torch.rand(5, 7, device="meta")),
    "no kernels": lambda: usual(torch.randn(5, 7, device="meta"), torch.rand(5, 7, device="meta")),
    "sparse": lambda: usual(torch.randn(5, 7).to_sparse()),
    "weight does not broadcast": lambda: usual(weight=torch.rand(5)),
    "weight wants a gradient": lambda: usual(weight=torch.rand(7).requires_grad_()),
    "pos_weight wants a gradient": lambda: usual(pos_weight=torch.rand(7).requires_grad_()),
    "pos_weight complex": lambda: usual(pos_weight=torch.ones(7, dtype=torch.complex64)),
    "no reduction": lambda: usual(reduction="none"),
    "unknown reduction": lambda: usual(reduction="average"),
    "reduction no string": lambda: usual(reduction=1),
    "soft margin of a scalar": lambda: usual(torch.tensor(1.0), torch.tensor(1.0), soft_margin=True),
    "soft margin of mixed dtypes": lambda: usual(target=torch.ones(5, 7, dtype=torch.bool), soft_margin=True),
}


@pytest.mark.parametrize("call", LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
def test_what_is_not_plain_takes_the_long_way(call: Callable[[], Tensor | None]) -> None:
    assert usual() is not None
    assert call() is None


def test_whoever_listens_hears_the_call() -> None:
    seen = []

    class Listener(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x, t = torch.randn(5, 7), torch.rand(5, 7)
    with Listener():
        loss = F.binary_cross_entropy_with_logits(x, t)
    assert seen == [F.binary_cross_entropy_with_logits]
    assert torch.equal(loss, F.binary_cross_entropy_with_logits(x, t))

    traced = torch.jit.trace(lambda x, t: F.binary_cross_entropy_with_logits(x, t), (x, t), check_trace=False)  # type: ignore[no-untyped-call]
    assert "fused_sce::sigmoid_cross_entropy_sum" in str(traced.inlined_graph)
    assert torch.equal(traced(2 * x, t), F.binary_cross_entropy_with_logits(2 * x, t))

    with forward_ad.dual_level():
        assert usual(forward_ad.make_dual(x, torch.ones_like(x)), t) is None
    torch.func.vmap(lambda x, t: pytest.fail("taken") if usual(x, t) is not None else x)(
        torch.randn(3, 5, 7), t.expand(3, 5, 7)
    )


def test_wrong_number_of_arguments() -> None:
    with pytest.raises(TypeError, match="usual_loss takes 6 arguments, got 1"):
        _C.usual_loss(torch.randn(2))  # type: ignore[call-arg]
