"""Targets in every format, and what is done to them: threshold, prior of each label, checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fused_sce
from fused_sce import functional as F
from fused_sce import reference

FORMATS = ["class_index", "packed", "index_list", "csr"]
REDUCTIONS = ["mean", "sum", "none", "sum_classes"]
LOSSES: dict[str, Callable[..., Tensor]] = {
    "plain": F.sigmoid_cross_entropy,
    "focal": lambda x, t, **options: F.sigmoid_focal_loss(x, t, 0.3, 1.5, **{"reduction": "mean"} | options),
    "asymmetric": F.asymmetric_loss,
}


def random_labels(shape: tuple[int, ...], target_format: str, device: str) -> Tensor:
    """Dense labels that the format can express."""
    if target_format == "class_index":
        index = torch.randint(0, shape[-1], shape[:-1], device=device)
        return torch.nn.functional.one_hot(index, shape[-1]).bool()
    return torch.rand(shape, device=device) < 0.2


def in_format(labels: Tensor, target_format: str, dtype: torch.dtype = torch.int64) -> Tensor:
    if target_format == "class_index":
        return labels.int().argmax(-1).to(dtype)
    if target_format == "packed":
        packed = np.packbits(labels.cpu().numpy(), -1, "little")
        return torch.from_numpy(packed).to(labels.device)
    if target_format == "index_list":
        length = int(labels.sum(-1).max()) + 2
        index = torch.full((*labels.shape[:-1], length), -1, dtype=dtype, device=labels.device)
        for place in np.ndindex(*labels.shape[:-1]):
            positives = labels[place].nonzero().flatten()
            index[place][torch.randperm(length)[: len(positives)]] = positives.to(dtype)  # in any order
        return index
    return labels.to(torch.float32).to_sparse_csr()


def options_of(target_format: str) -> dict[str, Any]:
    return {} if target_format == "csr" else {"target_format": target_format}


@pytest.mark.parametrize("target_format", FORMATS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(5, 7), (33, 65), (3, 1000), (2, 9605), (1, 8), (64, 16)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_same_bits_as_of_dense_labels(
    device: str, target_format: str, loss: str, shape: tuple[int, ...], reduction: str
) -> None:
    labels = random_labels(shape, target_format, device)
    target = in_format(labels, target_format)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = (torch.randn(shape, device=device) * 5).to(dtype).requires_grad_()
        given = target.to(dtype) if target_format == "csr" else target
        ours = LOSSES[loss](x, given, reduction=reduction, **options_of(target_format))
        dense = labels.to(dtype) if target_format == "csr" else labels
        expected = LOSSES[loss](x, dense, reduction=reduction)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
        upstream = torch.randn_like(ours)
        gradients = [torch.autograd.grad(each, x, upstream)[0] for each in (ours, expected)]
        torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("target_format", ["class_index", "packed", "index_list"])
@pytest.mark.parametrize("shape", [(7,), (2, 3, 11), (2, 0, 5), (0, 4), (3, 2, 2, 17)])
def test_other_numbers_of_dimensions(device: str, target_format: str, shape: tuple[int, ...]) -> None:
    labels = random_labels(shape, target_format, device)
    if labels.numel():
        target = in_format(labels, target_format)
    else:
        last = {"class_index": (), "packed": (1,), "index_list": (3,)}[target_format]
        target = torch.zeros((*shape[:-1], *last), dtype=torch.uint8, device=device)
    x = torch.randn(shape, device=device, requires_grad=True)
    ours = F.sigmoid_cross_entropy(x, target, target_format=target_format, reduction="none")
    torch.testing.assert_close(ours, F.sigmoid_cross_entropy(x, labels, reduction="none"), rtol=0, atol=0)


@pytest.mark.parametrize("target_format", FORMATS)
@pytest.mark.parametrize("layout", ["transposed", "stepped", "channels_last"])
def test_layouts(device: str, target_format: str, layout: str) -> None:
    if layout == "channels_last" and target_format == "csr":
        pytest.skip("a sparse target has two dimensions")
    shape = (2, 6, 5, 9) if layout == "channels_last" else (12, 9)
    x = torch.randn(shape, device=device)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.t().contiguous().t()
    else:
        x = torch.stack([x, x], -1)[..., 0]
    x.requires_grad_()
    labels = random_labels(shape, target_format, device)
    target = in_format(labels, target_format)
    if target_format != "csr":
        target = torch.stack([target, target])[0] if target.dim() == 1 else target.mT.contiguous().mT
    options: dict[str, Any] = {"weight": torch.rand(9, device=device), "pos_weight": torch.rand(9, device=device)}
    for reduction in REDUCTIONS:
        ours = F.sigmoid_cross_entropy(x, target, reduction=reduction, **options, **options_of(target_format))
        expected = F.sigmoid_cross_entropy(x, labels, reduction=reduction, **options)
        torch.testing.assert_close(ours, expected)
        gradients = [torch.autograd.grad(each.sum(), x)[0] for each in (ours, expected)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("target_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_dtypes_of_indices(device: str, target_format: str, dtype: torch.dtype) -> None:
    labels = random_labels((9, 70), target_format, device)
    x = torch.randn(9, 70, device=device)
    target = in_format(
        labels, target_format, dtype if target_format != "index_list" or dtype != torch.uint8 else torch.int8
    )
    if target_format == "csr":
        if dtype not in (torch.int32, torch.int64):
            return
        target = torch.sparse_csr_tensor(
            target.crow_indices().to(dtype), target.col_indices().to(dtype), target.values(), target.shape
        )
    ours = F.sigmoid_cross_entropy(x, target, **options_of(target_format))
    torch.testing.assert_close(ours, F.sigmoid_cross_entropy(x, labels), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.uint8, torch.int64])
def test_sparse_values_are_soft_labels(device: str, dtype: torch.dtype) -> None:
    labels = torch.rand(17, 29, device=device) < 0.2
    values = torch.rand(17, 29, device=device).to(dtype) if dtype.is_floating_point else torch.ones(17, 29).to(dtype)
    dense = torch.where(labels, values.to(device), torch.zeros((), dtype=dtype, device=device))
    target = dense.to_sparse_csr()
    x = torch.randn(17, 29, device=device, requires_grad=True)
    for loss in LOSSES.values():
        ours, expected = loss(x, target), loss(x, dense)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
        gradients = [torch.autograd.grad(each, x)[0] for each in (ours, expected)]
        torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_scipys_matrices() -> None:
    scipy = pytest.importorskip("scipy.sparse")
    matrix = scipy.random(20, 50, 0.1, "csr", np.float32, 0)
    target = torch.sparse_csr_tensor(matrix.indptr, matrix.indices, matrix.data, matrix.shape)
    x = torch.randn(20, 50)
    dense = torch.from_numpy(matrix.toarray())
    torch.testing.assert_close(F.sigmoid_cross_entropy(x, target), F.sigmoid_cross_entropy(x, dense), rtol=0, atol=0)


@pytest.mark.parametrize("target_format", FORMATS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_mask_smoothing_and_gradients_of_factors(device: str, target_format: str, reduction: str) -> None:
    labels = random_labels((6, 11), target_format, device)
    target = in_format(labels, target_format)
    x = torch.randn(6, 11, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.rand(11, dtype=torch.float64, device=device, requires_grad=True)
    options: dict[str, Any] = {
        "weight": weight, "mask": torch.rand(6, 11, device=device) < 0.7, "label_smoothing": 0.1, "reduction": reduction
    }  # fmt: skip
    ours = F.sigmoid_cross_entropy(x, target, **options, **options_of(target_format))
    expected = F.sigmoid_cross_entropy(x, labels, **options)
    torch.testing.assert_close(ours, expected.to(ours.dtype))
    gradients = [torch.autograd.grad(each.sum(), (x, weight), create_graph=True) for each in (ours, expected)]
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-8)
    second_order = [torch.autograd.grad(each[0].sum(), x)[0] for each in gradients]
    torch.testing.assert_close(*second_order, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("value", [-100, -1, 0, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_class_indices(device: str, value: int, reduction: str) -> None:
    index = torch.randint(0, 7, (20,), device=device)
    index[::3] = value
    x = torch.randn(20, 7, device=device)
    x[::3, ::2] = math.nan
    x[index == value] = math.inf
    counts = index != value
    leaf = x.requires_grad_()
    loss = F.sigmoid_cross_entropy(leaf, index, target_format="class_index", ignore_value=value, reduction=reduction)
    dense = torch.nn.functional.one_hot(index[counts], 7)
    expected = F.sigmoid_cross_entropy(x[counts], dense, reduction=reduction)
    if reduction == "none":
        assert (loss[~counts] == 0).all()
        loss = loss[counts]
    if reduction == "sum_classes":
        expected = expected * counts.sum() / 20
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert (gradient[~counts] == 0).all()
    assert gradient.isfinite().all()


def test_ignored_values_of_sparse_targets(device: str) -> None:
    dense = torch.zeros(5, 9, device=device)
    dense[0, 3], dense[1, 2], dense[1, 8], dense[4, 0] = 1.0, -1.0, 0.5, -1.0
    x = torch.randn(5, 9, device=device)
    ours = F.sigmoid_cross_entropy(x, dense.to_sparse_csr(), ignore_value=-1)
    torch.testing.assert_close(ours, F.sigmoid_cross_entropy(x, dense, ignore_value=-1), rtol=0, atol=0)


def wrong_targets() -> list[tuple[str, Tensor, str]]:
    packed = torch.zeros(4, 2, dtype=torch.uint8)
    packed[2, 1] = 1 << 2
    csr = torch.eye(4, 10).to_sparse_csr()
    rows, values = csr.crow_indices(), csr.values()

    def sparse(rows: Tensor, columns: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(rows, columns, values[: len(columns)], (4, 10), check_invariants=False)

    two = torch.tensor([0, 2, 4, 4, 4])
    return [
        ("class_index", torch.tensor([0, 9, 10, 1]), r"target\[2\] is 10, but an index must be in \[0, 9\]"),
        ("class_index", torch.tensor([0, -1, 3, 1]), r"target\[1\] is -1, but an index must be in \[0, 9\]"),
        ("packed", packed, r"target\[2, 1\] has bits behind the last of 10 labels"),
        ("index_list", torch.tensor([[0, 1], [2, -1], [3, 12], [-1, -1]]), r"target\[2, 1\] is 12.*or -1 for none"),
        ("index_list", torch.tensor([[0, 1], [-2, -1], [3, 4], [-1, -1]]), r"target\[1, 0\] is -2"),
        ("index_list", torch.tensor([[0, 1], [2, -1], [3, -(2**63)], [-1, -1]]), r"target\[2, 1\] is -9223"),
        ("index_list", torch.tensor([[0, 1], [2, -1], [3, 3], [-1, -1]]), r"target\[2, 1\] is 3, which its row has"),
        ("csr", sparse(rows, torch.tensor([0, 1, 2, 10])), r"target.col_indices\(\)\[3\] is 10"),
        ("csr", sparse(rows, torch.tensor([0, -1, 2, 3])), r"target.col_indices\(\)\[1\] is -1"),
        ("csr", sparse(two, torch.tensor([0, 1, 2, 2])), r"target.col_indices\(\)\[3\] is 2 after 2.*sum_duplicates"),
        ("csr", sparse(two, torch.tensor([5, 1, 2, 3])), r"target.col_indices\(\)\[1\] is 1 after 5"),
        *(
            ("csr", sparse(torch.tensor(wrong), torch.arange(4)), "crow_indices.. must ascend from 0 to 4")
            for wrong in ([0, 3, 2, 4, 4], [0, 1, 2, 3, 3], [1, 1, 2, 3, 4], [0, 1, 2, 3, 900], [0, -5, 2, 3, 4])
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(("target_format", "target", "words"), wrong_targets())
@pytest.mark.parametrize("loss", LOSSES)
def test_wrong_indices_name_the_first(target_format: str, target: Tensor, words: str, loss: str) -> None:
    x = torch.randn(4, 10)
    for requires_grad in (False, True):
        for reduction in REDUCTIONS:
            with pytest.raises(ValueError, match=words):
                LOSSES[loss](x.requires_grad_(requires_grad), target, reduction=reduction, **options_of(target_format))
    x = torch.randn(4, 10, requires_grad=True) * 1
    before = x.clone()
    with pytest.raises(ValueError, match=words):
        LOSSES[loss](x, target, inplace=True, **options_of(target_format))
    assert torch.equal(x, before)  # nothing half done
    with pytest.raises(ValueError, match=words):
        torch.func.grad(lambda x: LOSSES[loss](x, target, **options_of(target_format)))(torch.randn(4, 10))
    if target_format != "csr":
        with pytest.raises(ValueError, match="target"):
            torch.vmap(lambda x, t: LOSSES[loss](x, t, **options_of(target_format)))(torch.randn(4, 10), target)


@pytest.mark.parametrize(
    ("target", "options", "error", "words"),
    [
        (torch.zeros(4, dtype=torch.long), {"target_format": "index"}, ValueError, "index is not a valid value for"),
        (torch.zeros(4, 1, dtype=torch.long), {"target_format": "class_index"}, ValueError, r"shape \(4,\), one index"),
        (torch.zeros(4), {"target_format": "class_index"}, TypeError, "an integer dtype for target_format='class_in"),
        (torch.zeros(4, 3, dtype=torch.uint8), {"target_format": "packed"}, ValueError, r"shape \(4, 2\), eight"),
        (torch.zeros(4, 2, dtype=torch.int8), {"target_format": "packed"}, TypeError, "dtype uint8"),
        (torch.zeros(3, 2, dtype=torch.long), {"target_format": "index_list"}, ValueError, "any number of"),
        (torch.eye(4, 9).to_sparse_csr(), {}, ValueError, "Target size"),
        (torch.eye(4, 10).to_sparse_csr(), {"target_format": "packed"}, ValueError, "needs no target_format"),
        (torch.eye(4, 10).to_sparse_csc(), {}, TypeError, "target.to_sparse_csr"),
        (torch.eye(4, 10).to_sparse(), {}, TypeError, "target.to_sparse_csr"),
        (torch.eye(4, 10).to_sparse_csr().requires_grad_(), {}, RuntimeError, "a sparse target has no gradient"),
        (torch.rand(4, 10), {"target_format": "csr"}, ValueError, "csr is not a valid value for target_format"),
        (torch.rand(4, 10), {"check_target": "no"}, TypeError, "check_target must be True or False, got str"),
        (torch.rand(4, 10), {"target_threshold": "a"}, TypeError, "target_threshold must be a number or None"),
        (torch.rand(4, 10), {"target_threshold": math.nan}, ValueError, "target_threshold must not be NaN"),
        (torch.rand(4, 10), {"smoothing_prior": torch.rand(9), "label_smoothing": 0.1}, RuntimeError, "prior of"),
        (torch.rand(4, 10), {"smoothing_prior": torch.rand(10, requires_grad=True)}, RuntimeError, "has no gradient"),
    ],
)  # fmt: skip
def test_errors(target: Tensor, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        F.sigmoid_cross_entropy(torch.randn(4, 10), target, **options)


@pytest.mark.parametrize("target_format", FORMATS)
def test_modules_and_programs(device: str, target_format: str) -> None:
    labels = random_labels((6, 11), target_format, device)
    target = in_format(labels, target_format)
    x = torch.randn(6, 11, device=device, requires_grad=True)
    for module in (fused_sce.SigmoidCrossEntropyLoss, fused_sce.SigmoidFocalLoss, fused_sce.AsymmetricLoss):
        loss = module(**options_of(target_format))
        torch.testing.assert_close(loss(x, target), module()(x, labels), rtol=0, atol=0)
        in_place = module(**options_of(target_format), inplace=True)
        (gradient,) = torch.autograd.grad(in_place(x * 1, target), x)
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(x, target), x)[0])
    if target_format == "csr":
        return  # torch.compile and vmap do not take sparse tensors
    assert f"target_format={target_format!r}" in repr(loss)

    def step(x: Tensor, target: Tensor) -> Tensor:
        return F.sigmoid_cross_entropy(x * 2, target, target_format=target_format)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 4):
        torch.testing.assert_close(compiled(x[:rows], target[:rows]), step(x[:rows], target[:rows]))
        gradients = [torch.autograd.grad(each(x[:rows], target[:rows]), x)[0] for each in (compiled, step)]
        torch.testing.assert_close(*gradients)
    batched = torch.vmap(step)(torch.stack([x, -x]), torch.stack([target, target]))
    torch.testing.assert_close(batched, torch.stack([step(x, target), step(-x, target)]))
    torch.testing.assert_close(
        torch.func.grad(step)(x.detach(), target), torch.autograd.grad(step(x, target), x)[0], rtol=1e-5, atol=1e-7
    )


def test_no_dense_copy_of_a_sparse_target() -> None:
    """The only memory of the logits' size is the gradient."""
    from torch.profiler import ProfilerActivity, profile

    x = torch.randn(256, 4096, requires_grad=True)
    target = (torch.rand(256, 4096) < 1e-3).float().to_sparse_csr()
    F.sigmoid_cross_entropy(x, target).backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        x.grad = None
        F.sigmoid_cross_entropy(x, target).backward()
    large = [event for event in record.events() if event.self_cpu_memory_usage >= x.numel() // 8]
    assert sum(event.self_cpu_memory_usage for event in large) <= x.numel() * 4 + 4096, large


@pytest.mark.parametrize(
    ("target", "value"),
    [(torch.tensor([[0, 1, 255]], dtype=torch.uint8), -1), (torch.tensor([[0, 1, -1]], dtype=torch.int8), 255)],
)
def test_ignore_values_that_the_dtype_cannot_hold(target: Tensor, value: int) -> None:
    x = torch.randn(1, 3)
    for loss in (
        F.sigmoid_cross_entropy,
        lambda x, t, **o: torch.func.grad(lambda x: F.sigmoid_cross_entropy(x, t, **o))(x),
    ):
        with pytest.raises(ValueError, match=r"target\[0, 2\] is"):
            loss(x, target, ignore_value=value)
    index = torch.tensor([255], dtype=torch.uint8)
    for options in ({}, {"ignore_value": -1}, {"ignore_value": math.inf}, {"ignore_value": 1e30}):
        with pytest.raises(ValueError, match=r"target\[0\] is 255"):
            F.sigmoid_cross_entropy(x, index, target_format="class_index", **options)


@pytest.mark.parametrize("mask_shape", [None, (), (11,), (6, 1), (6, 11)])
@pytest.mark.parametrize("target_format", ["dense", *FORMATS])
@pytest.mark.parametrize("value", [None, -1, 0, 1, 3, math.nan])
def test_how_many_count(
    device: str, mask_shape: tuple[int, ...] | None, target_format: str, value: float | None
) -> None:
    labels = random_labels((6, 11), target_format, device)
    target = labels.float() if target_format == "dense" else in_format(labels, target_format)
    mask = None if mask_shape is None else torch.rand(mask_shape, device=device) < 0.6
    parts = (
        (target.values(), target.col_indices(), target.crow_indices())
        if target_format == "csr"
        else (target, None, None)
    )
    x = torch.randn(6, 11, device=device)
    number = reference.number_counted(x, parts[0], mask, *parts[1:], target_format, value)
    dense, changed = reference.dense_target(x, *parts, target_format, value)
    counts = reference.counted(dense, mask, changed)
    expected = 66 if counts is None else int(counts.expand(6, 11).sum())
    assert int(number) == expected
    if value is not None or mask is not None:
        options = options_of(target_format) if target_format != "dense" else {}
        loss = F.sigmoid_cross_entropy(x, target, mask=mask, ignore_value=value, **options)
        total = F.sigmoid_cross_entropy(x, target, mask=mask, ignore_value=value, reduction="sum", **options)
        torch.testing.assert_close(loss, total / max(expected, 1))


def test_modules_check_tensors_of_options() -> None:
    for wrong in (torch.tensor([0.5, 1.5]), torch.tensor([-0.1]), torch.tensor([math.nan])):
        with pytest.raises(ValueError, match=r"smoothing_prior must be in \[0, 1\] everywhere, got"):
            fused_sce.AsymmetricLoss(smoothing_prior=wrong)
        with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\] everywhere, got"):
            fused_sce.SigmoidFocalLoss(wrong)


# What is done to targets.


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("s", [0.0, 0.3])
def test_threshold(device: str, loss: str, dtype: torch.dtype, s: float) -> None:
    x = torch.randn(31, 17, device=device, dtype=dtype, requires_grad=True)
    t = torch.rand(31, 17, device=device, dtype=dtype)
    t[0, 0], t[0, 1] = 0.25, math.nan
    ours = LOSSES[loss](x, t, target_threshold=0.25, label_smoothing=s, reduction="none")
    smoothed = (1 - s) * t + s * 0.5
    labels = torch.where(t.isnan(), t, (smoothed > 0.25).to(dtype))
    torch.testing.assert_close(ours, LOSSES[loss](x, labels, reduction="none"), rtol=0, atol=0, equal_nan=True)
    t = t.nan_to_num().requires_grad_()
    total = LOSSES[loss](x, t, target_threshold=0.25)
    (gradient,) = torch.autograd.grad(total, t)
    assert (gradient == 0).all()


def test_threshold_and_class_indices_of_timm(device: str) -> None:
    losses = pytest.importorskip("timm.loss")
    x = torch.randn(8, 10, device=device)
    soft, index = torch.rand(8, 10, device=device), torch.randint(0, 10, (8,), device=device)
    for threshold in (None, 0.2):
        for sum_classes in (False, True):
            theirs = losses.BinaryCrossEntropy(smoothing=0.1, target_threshold=threshold, sum_classes=sum_classes)
            options: dict[str, Any] = {
                "target_threshold": threshold, "reduction": "sum_classes" if sum_classes else "mean"
            }  # fmt: skip
            torch.testing.assert_close(F.sigmoid_cross_entropy(x, soft, **options), theirs(x, soft))
            ours = F.sigmoid_cross_entropy(
                x, index, target_format="class_index", label_smoothing=0.1, smoothing_prior=1 / 10, **options
            )
            torch.testing.assert_close(ours, theirs(x, index))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(11,), (7, 1), (7, 11), ()])
def test_prior_of_each_label(device: str, loss: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(7, 11, dtype=torch.float64, device=device, requires_grad=True)
    t = (torch.rand(7, 11, dtype=torch.float64, device=device) < 0.3).double()
    prior = torch.rand(shape, dtype=torch.float64, device=device)
    smoothed = 0.8 * t + 0.2 * prior
    ours = LOSSES[loss](x, t, label_smoothing=0.2, smoothing_prior=prior)
    torch.testing.assert_close(ours, LOSSES[loss](x, smoothed))
    gradients = [torch.autograd.grad(each, x)[0] for each in (ours, LOSSES[loss](x, smoothed))]
    torch.testing.assert_close(*gradients)
    unused = LOSSES[loss](x, t, smoothing_prior=prior)
    torch.testing.assert_close(unused, LOSSES[loss](x, t), rtol=0, atol=0)
    module = fused_sce.SigmoidCrossEntropyLoss(label_smoothing=0.2, smoothing_prior=prior)
    torch.testing.assert_close(module(x, t), F.sigmoid_cross_entropy(x, smoothed))
    assert "smoothing_prior" in module.state_dict()
    torch.testing.assert_close(
        torch.func.grad(lambda x: LOSSES[loss](x, t, label_smoothing=0.2, smoothing_prior=prior))(x.detach()),
        gradients[0],
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("value", [1.0001, -1e-9, math.nan, math.inf, -1.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_check_target(loss: str, value: float, reduction: str) -> None:
    x, t = torch.randn(40, 50, requires_grad=True), torch.rand(40, 50)
    t[0, 0], t[0, 1] = 0.0, 1.0
    good = LOSSES[loss](x, t, check_target=True, reduction=reduction)
    torch.testing.assert_close(good, LOSSES[loss](x, t, reduction=reduction), rtol=0, atol=0)
    t[31, 7] = value
    with pytest.raises(ValueError, match=r"target\[31, 7\] is .*, but it must be in \[0, 1\] with check_target=True"):
        LOSSES[loss](x, t, check_target=True, reduction=reduction)
    with pytest.raises(ValueError, match=r"target\[31, 7\] is .*"):
        torch.func.grad(lambda x: LOSSES[loss](x, t, check_target=True))(x.detach())
    LOSSES[loss](x, t, reduction=reduction)  # not asked
    LOSSES[loss](x, t, check_target=True, ignore_value=value, reduction=reduction)  # does not count
    mask = torch.ones(40, 50, dtype=torch.bool)
    mask[31, 7] = False
    LOSSES[loss](x, t, check_target=True, mask=mask, reduction=reduction)


def test_reference_takes_every_format() -> None:
    for target_format in ("class_index", "packed", "index_list"):
        labels = random_labels((4, 13), target_format, "cpu")
        dense, _ = reference.dense_target(
            torch.randn(4, 13), in_format(labels, target_format), None, None, target_format
        )
        assert torch.equal(dense, labels)
