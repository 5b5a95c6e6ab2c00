"""Drop-in: the same values, gradients, shapes and dtypes as torch's losses."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import fused_sce
from fused_sce import functional as F

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]
# scalars, vectors, a small head, one past and one short of the kernels' block of 512, more rows than a chunk of 4096
# holds, images, and sizes of 1 and 0 among the dimensions
SHAPES = [(), (1,), (7,), (64, 80), (3, 511), (2, 513), (1000, 5), (2, 3, 17, 9), (4, 1, 6), (0, 5), (5, 0)]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """What torch's own result may be off by: a few ULPs, in 16 bits of every intermediate result."""
    return {
        torch.float64: {"rtol": 1e-12, "atol": 1e-13},
        torch.float32: {"rtol": 3e-6, "atol": 3e-6},
        torch.bfloat16: {"rtol": 4e-2, "atol": 4e-2},
        torch.float16: {"rtol": 6e-3, "atol": 6e-3},
    }[dtype]


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    upstream = torch.linspace(0.5, 2.0, max(loss.numel(), 1))[: loss.numel()]
    return torch.autograd.grad(loss, inputs, upstream.view(loss.shape).to(loss))


def assert_same(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_bce_with_logits(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, reduction: str, weighted: bool
) -> None:
    x = (torch.randn(shape, dtype=dtype) * 3).to(device).requires_grad_()
    t = torch.rand(shape, dtype=dtype).to(device).requires_grad_()
    labels = shape[-1:]
    weight = torch.rand(shape, dtype=dtype).to(device) if weighted else None
    pos_weight = torch.rand(labels, dtype=dtype).to(device) + 1 if weighted else None
    ours = F.binary_cross_entropy_with_logits(x, t, weight, reduction=reduction, pos_weight=pos_weight)
    theirs = torch_functional.binary_cross_entropy_with_logits(x, t, weight, reduction=reduction, pos_weight=pos_weight)
    if reduction == "sum" and dtype in (torch.bfloat16, torch.float16):
        # torch adds 16-bit terms, each rounded: hold both against a sum in float64
        exact = torch_functional.binary_cross_entropy_with_logits(
            x.double(),
            t.double(),
            None if weight is None else weight.double(),
            reduction=reduction,
            pos_weight=None if pos_weight is None else pos_weight.double(),
        )
        assert_same(ours, exact.to(dtype), dtype)
    else:
        assert_same(ours, theirs, dtype)
    for mine, other in zip(gradients(ours, x, t), gradients(theirs, x, t), strict=True):
        assert mine.dtype == other.dtype
        assert_same(mine, other, dtype)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_multilabel_soft_margin(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, reduction: str, weighted: bool
) -> None:
    x = (torch.randn(shape, dtype=dtype) * 3).to(device).requires_grad_()
    t = torch.rand(shape, dtype=dtype).to(device).requires_grad_()
    weight = torch.rand(shape[-1:], dtype=dtype).to(device) if weighted else None
    ours = F.multilabel_soft_margin_loss(x, t, weight, reduction=reduction)
    theirs = torch_functional.multilabel_soft_margin_loss(x, t, weight, reduction=reduction)
    assert_same(ours, theirs, dtype)
    for mine, other in zip(gradients(ours, x, t), gradients(theirs, x, t), strict=True):
        assert_same(mine, other, dtype)


@pytest.mark.parametrize(("input_dtype", "target_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_mixed_dtypes_give_torchs_dtypes(device: str, input_dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    x = torch.randn(6, 9, dtype=input_dtype, device=device, requires_grad=True)
    t = torch.rand(6, 9, dtype=target_dtype, device=device)
    coarsest = min((input_dtype, target_dtype), key=lambda dtype: -torch.finfo(dtype).eps)
    for mine, theirs in (
        (F.binary_cross_entropy_with_logits, torch_functional.binary_cross_entropy_with_logits),
        (F.multilabel_soft_margin_loss, torch_functional.multilabel_soft_margin_loss),
    ):
        for reduction in REDUCTIONS:
            ours = mine(x, t, reduction=reduction)
            other = theirs(x, t, reduction=reduction)
            assert ours.dtype == other.dtype
            assert_same(ours, other, coarsest)
            (gradient,), (other_gradient,) = gradients(ours, x), gradients(other, x)
            assert gradient.dtype == input_dtype
            assert_same(gradient, other_gradient, coarsest)


@pytest.mark.parametrize(
    "target_dtype",
    [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bool_and_integer_targets(device: str, target_dtype: torch.dtype, dtype: torch.dtype, reduction: str) -> None:
    x = torch.randn(33, 65, dtype=dtype, device=device, requires_grad=True)
    t = torch.randint(0, 2, (33, 65), device=device)
    ours = F.binary_cross_entropy_with_logits(x, t.to(target_dtype), reduction=reduction)
    floating = F.binary_cross_entropy_with_logits(x, t.to(dtype), reduction=reduction)
    assert ours.dtype == dtype
    assert torch.equal(ours, floating)
    assert torch.equal(gradients(ours, x)[0], gradients(floating, x)[0])
    rows = F.multilabel_soft_margin_loss(x, t.to(target_dtype), reduction=reduction)
    assert rows.dtype == dtype


def layouts() -> dict[str, Tensor]:
    """Tensors of shape (4, 6, 10) in all kinds of memory."""
    return {
        "contiguous": torch.randn(4, 6, 10),
        "transposed": torch.randn(10, 6, 4).transpose(0, 2),
        "sliced": torch.randn(4, 6, 23)[..., 3:13],
        "stepped": torch.randn(8, 12, 20)[::2, ::2, ::2],
        "flipped in memory": torch.randn(6, 4, 10).permute(1, 0, 2),
        "expanded": torch.randn(4, 1, 10).expand(4, 6, 10),
        "unaligned": torch.randn(241)[1:].view(4, 6, 10),
    }


@pytest.mark.parametrize("input_layout", list(layouts()))
@pytest.mark.parametrize("target_layout", list(layouts()))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_memory_layout(device: str, input_layout: str, target_layout: str, reduction: str) -> None:
    x = layouts()[input_layout].to(device)
    t = layouts()[target_layout].to(device).abs()
    weight = torch.rand(6, 1, device=device)
    pos_weight = torch.rand(4, 1, 10, device=device)
    leaf = x.detach().requires_grad_()
    ours = F.binary_cross_entropy_with_logits(leaf, t, weight, reduction=reduction, pos_weight=pos_weight)
    plain = x.clone(memory_format=torch.contiguous_format).requires_grad_()
    packed = F.binary_cross_entropy_with_logits(
        plain,
        t.contiguous(),
        weight.expand(4, 6, 10).contiguous(),
        reduction=reduction,
        pos_weight=pos_weight.expand(4, 6, 10).contiguous(),
    )
    assert torch.equal(ours, packed)
    assert torch.equal(gradients(ours, leaf)[0], gradients(packed, plain)[0])


@pytest.mark.parametrize(
    "shape", [(), (1,), (10,), (6, 10), (6, 1), (4, 1, 10), (4, 1, 1), (1, 6, 10), (4, 6, 10)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_weights_broadcast_as_torchs(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, 10, device=device, requires_grad=True)
    t = torch.rand(4, 6, 10, device=device)
    weight = (torch.rand(shape) * 4).to(dtype).to(device)
    pos_weight = (torch.rand(shape) * 4).to(dtype).to(device)
    exact_pos_weight = pos_weight.float()  # torch would round (pos_weight - 1) t + 1 to bfloat16
    for reduction in REDUCTIONS:
        ours = F.binary_cross_entropy_with_logits(x, t, weight, reduction=reduction, pos_weight=pos_weight)
        theirs = torch_functional.binary_cross_entropy_with_logits(
            x, t, weight, reduction=reduction, pos_weight=exact_pos_weight
        )
        assert_same(ours, theirs, torch.float32)
        assert_same(gradients(ours, x)[0], gradients(theirs, x)[0], torch.float32)


def test_more_dimensions_than_the_kernels_have(device: str) -> None:
    # permuted so that no two of the eight can be merged
    shape = (2, 3, 2, 3, 2, 3, 2, 3)
    order = (1, 3, 5, 7, 0, 2, 4, 6)
    x = torch.randn([shape[i] for i in order], device=device).permute(*[order.index(i) for i in range(8)])
    t = torch.rand(shape, device=device)
    assert x.shape == t.shape
    assert_same(
        F.binary_cross_entropy_with_logits(x, t, reduction="none"),
        torch_functional.binary_cross_entropy_with_logits(x, t, reduction="none"),
        torch.float32,
    )


def test_scalar_weight_may_stay_on_the_cpu(device: str) -> None:
    x = torch.randn(5, 3, device=device)
    t = torch.rand(5, 3, device=device)
    got = F.binary_cross_entropy_with_logits(x, t, pos_weight=torch.tensor(2.0))
    want = torch_functional.binary_cross_entropy_with_logits(x, t, pos_weight=torch.tensor(2.0))
    assert_same(got, want, torch.float32)


def test_sum_classes_is_the_sum_per_sample_averaged(device: str) -> None:
    x = torch.randn(5, 7, 11, device=device, requires_grad=True)
    t = torch.rand(5, 7, 11, device=device)
    ours = fused_sce.SigmoidCrossEntropyLoss(reduction="sum_classes")(x, t)
    theirs = torch_functional.binary_cross_entropy_with_logits(x, t, reduction="none").sum(-1).mean()
    assert_same(ours, theirs, torch.float32)
    assert_same(gradients(ours, x)[0], gradients(theirs, x)[0], torch.float32)


@pytest.mark.parametrize("reduction", ["none", "rows", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_is_the_same_function(device: str, reduction: str, dtype: torch.dtype) -> None:
    x = (torch.randn(17, 130, dtype=dtype) * 20).to(device).requires_grad_()
    t = torch.rand(17, 130, dtype=dtype).to(device).requires_grad_()
    weight, pos_weight = torch.rand(130, device=device), torch.rand(17, 1, device=device)
    arguments = (x, t, weight, pos_weight)
    options = {} if reduction == "none" else {"count": torch.tensor([3], device=device), "divisor": 7}
    ours = torch.ops.fused_sce.sigmoid_cross_entropy(*arguments, reduction=reduction, **options)
    plain = fused_sce.reference.sigmoid_cross_entropy(*arguments, reduction=reduction, **options)
    assert_same(ours, plain, dtype)
    for mine, other in zip(gradients(ours, x, t), gradients(plain, x, t), strict=True):
        assert_same(mine, other, dtype)
