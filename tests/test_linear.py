"""A linear layer and its loss in one: the values of the loss of its logits, without their memory."""

from __future__ import annotations

import copy
import math
import pickle
import random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from memory import peak_bytes
from test_targets import in_format, random_labels, wrong_targets
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fused_sce
from fused_sce import _linear, reference
from fused_sce import functional as F

linear = torch.nn.functional.linear
fused = F.linear_sigmoid_cross_entropy
CURE = "call sigmoid_cross_entropy with the logits of torch.nn.functional.linear"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORMATS = ["dense", "class_index", "packed", "index_list", "csr"]


class Case(NamedTuple):
    """A call, and what it means."""

    layer: dict[str, Any]
    """input, weight, bias, logit_scale"""
    target: Tensor
    labels: Tensor
    """What the target says of each logit, in float64."""
    counts: Tensor
    """Whether it counts."""
    options: dict[str, Any]


def strided(rng: random.Random, tensor: Tensor) -> Tensor:
    """The same values, in a row or not."""
    way = rng.choice(["contiguous", "stepped", "transposed"])
    if way == "stepped":
        return torch.stack([tensor, tensor], -1)[..., 0]
    return tensor.mT.contiguous().mT if way == "transposed" and tensor.dim() > 1 else tensor


def part_of(rng: random.Random, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that broadcasts to another."""
    return tuple(size if rng.random() < 0.6 else 1 for size in shape[rng.randint(0, len(shape)) :])


def make_target(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A target, its labels, what counts; and its options."""
    kinds = ["bool", "int", "float", "packed", "index_list"] + ["class_index"] * (shape[-1] > 0)
    kind = rng.choice(kinds + ["csr"] * (len(shape) == 2))
    labels = random_labels(shape, kind, "cpu").double()
    some = torch.rand(shape) < 0.2
    options: dict[str, Any] = {"target_format": kind} if kind in FORMATS and kind != "csr" else {}
    ignore = rng.random() < 0.4
    value: float | None = None
    if kind in ("bool", "packed", "index_list"):
        value = rng.choice([0, 1])
    elif kind in ("int", "float", "csr"):
        value = rng.choice([-1, math.nan]) if kind == "float" else -1
        if kind != "int":
            labels = torch.where(labels > 0, torch.rand(shape), 0).double()
        labels = torch.where(some, value, labels) if ignore else labels
    if kind in ("packed", "index_list") and math.prod(shape[:-1]) == 0:
        last = (shape[-1] + 7) // 8 if kind == "packed" else 3
        target = torch.zeros((*shape[:-1], last), dtype=torch.uint8 if kind == "packed" else torch.int64)
    elif kind in ("packed", "index_list", "class_index"):
        target = in_format(labels.bool(), kind, rng.choice([torch.int32, torch.int64]))
    else:
        dtypes = {"bool": [torch.bool], "int": [torch.int8, torch.int64]}.get(kind, [dtype, torch.float32])
        target = labels.to(rng.choice(dtypes))
        labels = target.double()
        target = target.to_sparse_csr() if kind == "csr" else target
    is_ignored = labels.isnan() if value is None or math.isnan(value) else labels == value
    if kind == "class_index":
        value = rng.choice([-100, -1, 0])
        target[torch.rand(target.shape) < 0.3] = value if ignore else 0
        labels = torch.nn.functional.one_hot(target.long().clamp(min=0), shape[-1]).double()
        is_ignored = (target == value).unsqueeze(-1).expand(shape)
    if ignore:
        options["ignore_value"] = value
    return target, labels.nan_to_num(), ~is_ignored if ignore else torch.ones_like(is_ignored), options  # type: ignore[return-value]


def make_case(number: int) -> Case:
    """Whatever shapes, target and options go together."""
    rng = random.Random(number)
    torch.manual_seed(number)
    dtype = rng.choice([torch.float64, torch.float64, torch.float32])
    leading = rng.choice([(), (1,), (5,), (5,), (12,), (12,), (2, 3), (2, 1, 4), (0,), (2, 0)])
    rows, features = math.prod(leading), rng.choice([0, 1, 4, 4, 7, 7])
    shape = (*leading, rng.choice([0, 1, 3, 8, 13, 16, 24, 41, 41]))
    target, labels, counts, options = make_target(rng, shape, dtype)

    def factor(chance: float, dtype: torch.dtype = torch.float64) -> Tensor | None:
        return (
            torch.rand(part_of(rng, shape), dtype=rng.choice([dtype, torch.float32])) if rng.random() < chance else None
        )

    mask = torch.rand(part_of(rng, shape)) < 0.7 if rng.random() < 0.4 else None
    alpha, prior = factor(0.2, dtype), factor(0.3, dtype)
    options |= {
        "reduction": rng.choice(["mean", "sum", "sum_classes"]),
        "loss_weight": factor(0.4),
        "pos_weight": factor(0.4),
        "mask": mask,
        "alpha": rng.choice([None, None, -1, 0.3]) if alpha is None else alpha,
        "gamma_neg": rng.choice([0.0, 0, 1.5, 4]),
        "gamma_pos": rng.choice([0.0, 0, 0.5, 1]),
        "clip": rng.choice([0.0, None, 0.05, 0.3]),
        "label_smoothing": rng.choice([0.0, 0.0, 0.1, 1.0]),
        "smoothing_prior": rng.choice([0.5, 0.1]) if prior is None else prior,
        "target_threshold": rng.choice([None, None, None, 0.3]),
        "check_target": rng.random() < 0.5,
        "chunk_bytes": max(1, rows * dtype.itemsize * rng.choice([8, 16, 19, 2**20])),
    }
    options["loss_weight"] = None if options["loss_weight"] is None else options["loss_weight"].round(decimals=1)
    scale = rng.choice([None, 0.7, 2, torch.tensor(0.7), torch.tensor([1.5], dtype=dtype)])
    layer = {
        "input": strided(rng, torch.randn((*leading, features), dtype=dtype)),
        "weight": strided(rng, torch.randn((shape[-1], features), dtype=dtype)),
        "bias": strided(rng, torch.randn(shape[-1], dtype=dtype)) if rng.random() < 0.6 else None,
        "logit_scale": scale,
    }
    for name, tensor in layer.items():
        if isinstance(tensor, Tensor) and (name == "weight" or rng.random() < 0.8):
            layer[name] = tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    if options.get("target_format") != "class_index" and target.layout is torch.strided:
        target = strided(rng, target)
    return Case(layer, target, labels, counts if mask is None else counts & mask, options)


def unfused(case: Case, upstream: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the logits in float64, and the gradients by the parts of the layer."""
    leaves = {
        name: tensor.detach().double().requires_grad_() if isinstance(tensor, Tensor) else tensor
        for name, tensor in case.layer.items()
    }
    scale = 1 if leaves["logit_scale"] is None else leaves["logit_scale"]
    logits = linear(leaves["input"], leaves["weight"]) * scale
    logits = logits if leaves["bias"] is None else logits + leaves["bias"]
    o = case.options
    alpha, prior = (o[name] if isinstance(o[name], Tensor) else None for name in ("alpha", "smoothing_prior"))
    divisor, count = (
        {"mean": logits.numel(), "sum": 1, "sum_classes": math.prod(logits.shape[:-1])}[o["reduction"]],
        None,
    )
    if o["reduction"] == "mean" and (o["mask"] is not None or "ignore_value" in o):
        divisor, count = 1, case.counts.sum()
    tensors = (
        logits, case.labels, o["loss_weight"], o["pos_weight"], count, case.counts, alpha, prior, None, None
    )  # fmt: skip
    options = {
        "reduction": "sum",
        "dtype": torch.float64,
        "divisor": divisor,
        "smoothing_prior": o["smoothing_prior"] if prior is None else 0.5,
        "clip": o["clip"] or 0.0,
        "alpha": o["alpha"] if alpha is None and o["alpha"] != -1 else None,
        **{name: o[name] for name in ("gamma_neg", "gamma_pos", "label_smoothing", "target_threshold")},
    }
    loss = reference.sigmoid_cross_entropy(*tensors, **options)
    by_logits, *_ = reference.gradients((True, *[False] * 4), torch.tensor(upstream).double(), *tensors, **options)
    parts = [name for name, part in leaves.items() if isinstance(part, Tensor)]
    gradients = torch.autograd.grad(logits, [leaves[name] for name in parts], by_logits)
    return loss, dict(zip(parts, gradients, strict=True))


def check_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare with the largest value, beside which sums of both signs are rounded."""
    assert got.shape == expected.shape
    scale = expected.nan_to_num().abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=tolerance * scale + 1e-30, equal_nan=True)


@pytest.mark.parametrize("number", range(300))
def test_any_call_is_the_loss_of_the_logits(number: int) -> None:
    case = make_case(number)
    upstream = random.Random(number).choice([1.0, 2.0, -0.375])
    loss = fused(**case.layer, target=case.target, **case.options)
    expected, right = unfused(case, upstream)
    dtype = case.layer["input"].dtype
    assert loss.dtype == (case.target.dtype if case.target.is_floating_point() else dtype)
    check_close(loss, expected, 1e-12 if dtype == loss.dtype == torch.float64 else 1e-6)
    leaves = {name: part for name, part in case.layer.items() if isinstance(part, Tensor) and part.requires_grad}
    gradients = torch.autograd.grad(loss, list(leaves.values()), torch.tensor(upstream, dtype=loss.dtype))
    for (name, part), gradient in zip(leaves.items(), gradients, strict=True):
        assert gradient.dtype == part.dtype
        check_close(gradient, right[name], 1e-12 if dtype == part.dtype == torch.float64 else 2e-6)


def layer_and_target(
    dtype: torch.dtype = torch.float32,
    target_format: str = "dense",
    rows: int = 12,
    labels: int = 41,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Input, weight and bias that require a gradient, the target and the labels it says."""
    x = torch.randn(rows, 5, device=device).to(dtype).requires_grad_()
    w = torch.randn(labels, 5, device=device).to(dtype).requires_grad_()
    b = torch.randn(labels, device=device).to(dtype).requires_grad_()
    positive = random_labels((rows, labels), target_format, device)
    dense = positive.float() if target_format in ("dense", "csr") else positive
    return x, w, b, dense if target_format == "dense" else in_format(positive, target_format), dense


def options_of(target_format: str, **options: Any) -> dict[str, Any]:
    return options if target_format in ("dense", "csr") else {**options, "target_format": target_format}


@pytest.mark.parametrize("target_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(device: str, dtype: torch.dtype, target_format: str) -> None:
    x, w, b, t, dense = layer_and_target(dtype, target_format, device=device)
    loss = fused(x, w, t, b, chunk_bytes=12 * 8 * dtype.itemsize, **options_of(target_format))
    expected = F.sigmoid_cross_entropy(linear(x, w, b), dense)
    assert loss.dtype == expected.dtype
    eps = torch.finfo(dtype).eps
    check_close(loss, expected, 2 * eps)
    gradients = torch.autograd.grad(loss, (x, w, b))
    for gradient, right in zip(gradients, torch.autograd.grad(expected, (x, w, b)), strict=True):
        assert gradient.dtype == dtype
        check_close(gradient, right, 4 * eps)
    again = fused(x, w, t, b, chunk_bytes=12 * 8 * dtype.itemsize, **options_of(target_format))
    assert torch.equal(again, loss)
    for first, second in zip(gradients, torch.autograd.grad(again, (x, w, b)), strict=True):
        assert torch.equal(first, second)  # the same bits in each run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "sum_classes"])
def test_extreme_logits(dtype: torch.dtype, reduction: str) -> None:
    # A feature of each label makes the logits; infinities meet a single feature, as 0 * inf is NaN.
    values = torch.tensor([17, -17, 88, -88, 104, -104, 6e4, -6e4, math.inf, -math.inf, math.nan, 0, 30, -30, 1, -1, 9])
    finite = values.nan_to_num(2, 5, -5)
    one_hot = torch.eye(17), torch.diag(finite)
    of_one_feature = torch.ones(17, 1), values.view(-1, 1)
    for x, w in (one_hot, of_one_feature):
        x, w = (part.to(dtype).requires_grad_() for part in (x, w))
        for t in (torch.zeros(17, 17), torch.ones(17, 17), torch.eye(17), torch.rand(17, 17)):
            weight = torch.where(values.isfinite(), 1.0, 0.0)  # which leaves out the others
            for options in ({}, {"loss_weight": weight}):
                loss = fused(x, w, t, reduction=reduction, chunk_bytes=17 * 8 * dtype.itemsize, **options)
                named = {"weight": weight} if options else {}
                expected = F.sigmoid_cross_entropy(linear(x, w), t, reduction=reduction, **named)
                torch.testing.assert_close(loss, expected, equal_nan=True)
                assert not options or loss.isfinite()
                for ours, right in zip(
                    torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x, w)), strict=True
                ):
                    torch.testing.assert_close(ours, right, equal_nan=True)


def test_sixteen_bits_add_up_in_float32() -> None:
    # Each chunk of 8 labels adds 4. Beside 1024 that is half a unit in the last place of bfloat16: it would be lost.
    x, w = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True), torch.ones(4096, 1, dtype=torch.bfloat16)
    fused(x, w, torch.zeros(1, 4096), reduction="sum", chunk_bytes=16).backward()
    assert x.grad is not None
    assert x.grad.item() == 2048


def test_float16_gradients_survive_a_large_divisor() -> None:
    # 1e-6 / 4096 is below float16's smallest number.
    x, w = torch.ones(64, 1, dtype=torch.float16), torch.full((64, 1), -13.8, dtype=torch.float16)
    leaves = [part.requires_grad_() for part in (x, w, torch.zeros(64, dtype=torch.float16))]
    (fused(leaves[0], leaves[1], torch.zeros(64, 64), leaves[2]) * 2.0**22).backward()
    slope = torch.sigmoid(w.detach().double()[0]).item() / 4096 * 2**22
    for leaf, right in zip(leaves, (slope * 64 * w[0].item(), slope * 64, slope * 64), strict=True):
        torch.testing.assert_close(leaf.grad, torch.full_like(leaf, right))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.float64, torch.bool])
def test_autocast(device: str, dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    x, w, b, t, _ = layer_and_target(device=device)
    scale = torch.tensor(1.25, device=device, requires_grad=True)
    t = t.to(target_dtype)
    with torch.autocast(device, dtype):
        loss = fused(x, w, t, b, logit_scale=scale, chunk_bytes=12 * 16 * 2)
        expected = F.sigmoid_cross_entropy(linear(x * scale, w, b), t)
        values, _ = F.linear_topk(x, w, 3, b, chunk_bytes=12 * 16 * 2)
        assert values.dtype == linear(x, w, b).dtype
    assert loss.dtype == expected.dtype
    torch.testing.assert_close(loss, expected)
    leaves = (x, w, b, scale)
    for ours, right in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert ours.dtype == torch.float32
        check_close(ours, right, 4 * torch.finfo(dtype).eps)
    half = [part.detach().to(dtype) for part in (x, w, b)]
    with torch.autocast(device, dtype):
        mixed = fused(half[0], w, t, half[2])
        check_close(mixed, F.sigmoid_cross_entropy(linear(half[0], w, half[2]), t), 1e-6)


# Autograd


def test_gradcheck() -> None:
    x, w, b, t, _ = layer_and_target(torch.float64, rows=3, labels=10)
    scale, t = torch.tensor(0.8, dtype=torch.float64, requires_grad=True), t.double()

    def loss(x: Tensor, w: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return fused(x, w, t, b, logit_scale=scale, gamma_neg=2.0, clip=0.05, chunk_bytes=3 * 8 * 8)

    assert torch.autograd.gradcheck(loss, (x, w, b, scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_upstream_factors_and_second_passes(dtype: torch.dtype) -> None:
    x, w, b, t, _ = layer_and_target(dtype)

    def gradients(factor: float, **options: Any) -> tuple[Tensor, ...]:
        loss = fused(x, w, t, b, reduction="sum", chunk_bytes=12 * 8 * dtype.itemsize)
        first = torch.autograd.grad(loss, (x, w, b), torch.tensor(factor, dtype=loss.dtype), **options)
        if not options:
            return first
        # The gradients of the first pass were given away.
        for gradient in first:
            gradient.fill_(math.nan)
        (by_weight,) = torch.autograd.grad(loss, w, torch.tensor(factor, dtype=loss.dtype), retain_graph=True)
        return torch.autograd.grad(loss, x)[0], by_weight

    once = gradients(1.0)
    for gradient, right in zip(gradients(2.0), once, strict=True):
        check_close(gradient, 2 * right, 2 * torch.finfo(dtype).eps)
    for gradient in gradients(0.0):
        assert (gradient == 0).all()
    for factor in (math.inf, math.nan):
        for gradient, right in zip(gradients(factor), once, strict=True):
            assert not gradient[right != 0].isfinite().any()
    by_input, by_weight = gradients(3.0, retain_graph=True)
    check_close(by_input, once[0], 2 * torch.finfo(dtype).eps)
    check_close(by_weight, 3 * once[1], 4 * torch.finfo(dtype).eps)


def test_what_has_no_rule_says_so() -> None:
    x, w, b, t, _ = layer_and_target()
    loss = fused(x, w, t, b)
    with pytest.raises(RuntimeError, match=r"has no second derivative \(create_graph=True\): make the logits"):
        torch.autograd.grad(loss, w, create_graph=True)
    with pytest.raises(RuntimeError, match=r"has no batched gradients \(is_grads_batched=True\): make the logits"):
        torch.autograd.grad(loss, w, torch.ones(3), is_grads_batched=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    with torch.no_grad():
        assert not fused(x, w, t, b).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(fused(x, w, t, b), loss.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_changes_before_backward(dtype: torch.dtype) -> None:
    x, w, b, t, _ = layer_and_target(dtype)
    right = torch.autograd.grad(fused(x, w, t, b), (x, w, b))
    loss = fused(x, w, t, b)
    with torch.no_grad():
        w.mul_(3)
    if dtype is not torch.float16:  # forward made the gradients, of the weight it met
        for ours, expected in zip(torch.autograd.grad(loss, (x, w, b), retain_graph=True), right, strict=True):
            assert torch.equal(ours, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(dtype: torch.dtype, use_reentrant: bool) -> None:
    x, w, b, t, _ = layer_and_target(dtype)
    right = torch.autograd.grad(fused(x * 2, w, t, b), (x, w, b))
    loss = checkpoint(lambda x, w, b: fused(x * 2, w, t, b), x, w, b, use_reentrant=use_reentrant)
    loss.backward()
    for leaf, expected in zip((x, w, b), right, strict=True):
        assert torch.equal(leaf.grad, expected)


def test_transforms() -> None:
    x, w, b, t, _ = layer_and_target(torch.float64)
    x, w, b = (part.detach() for part in (x, w, b))

    def loss(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return fused(x, w, t, b, chunk_bytes=12 * 8 * 8)

    def of_logits(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return F.sigmoid_cross_entropy(linear(x, w, b), t)

    for transform in (
        lambda loss: torch.func.grad(loss, 1)(x, w, t),
        lambda loss: torch.func.hessian(loss, 0)(x[:2], w, t[:2]),
        lambda loss: torch.vmap(loss, (0, None, 0))(x, w, t),
        lambda loss: torch.vmap(torch.func.grad(loss), (0, None, 0))(x, w, t),
        lambda loss: torch.func.jvp(lambda w: loss(x, w, t), (w,), (w.sin(),)),
    ):
        torch.testing.assert_close(transform(loss), transform(of_logits))
    with pytest.raises(ValueError, match=r"target\[0\] is 41"):
        torch.func.grad(lambda w: fused(x, w, torch.full((12,), 41), target_format="class_index"))(w)


# Programs


def test_compile_once_for_all_batch_sizes() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    _, w, b, _, _ = layer_and_target()
    scale = torch.tensor(1.5, requires_grad=True)

    def step(x: Tensor, t: Tensor) -> Tensor:
        return fused(x, w, t, b, logit_scale=scale, mask=t > 0.1, chunk_bytes=64 * 8 * 4) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    compilations = None
    for rows in (6, 3, 64):
        x, t = torch.randn(rows, 5, requires_grad=True), torch.rand(rows, 41)
        loss, expected = compiled(x, t), step(x, t)
        torch.testing.assert_close(loss, expected)
        leaves = (x, w, b, scale)
        torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))
        compilations = compilations or counter.frame_count
    assert counter.frame_count == compilations


@pytest.mark.parametrize(
    ("dtype", "target_format"),
    [(torch.bfloat16, "packed"), (torch.bfloat16, "class_index"), (torch.float16, "index_list")],
)
def test_compiled_formats_and_dtypes(dtype: torch.dtype, target_format: str) -> None:
    torch._dynamo.reset()
    x, w, b, t, _ = layer_and_target(dtype, target_format)
    ignore = {"ignore_value": 3} if target_format == "class_index" else {}

    def step(x: Tensor, w: Tensor) -> Tensor:
        chunk_bytes = 12 * 8 * 2
        loss = fused(x, w, t, b, reduction="sum", chunk_bytes=chunk_bytes, **ignore, **options_of(target_format))
        return loss * 0.1  # which must not be rounded before the product

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss, expected = compiled(x, w), step(x, w)
    assert torch.equal(loss, expected)
    for ours, right in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x, w)), strict=True):
        assert torch.equal(ours, right)


@pytest.mark.parametrize(
    ("dtype", "grad_mode", "strict"),
    [(torch.float32, False, False), (torch.float16, True, False), (torch.float32, True, True)],
)
def test_export(dtype: torch.dtype, grad_mode: bool, strict: bool) -> None:
    torch._dynamo.reset()
    loss = fused_sce.LinearSigmoidCrossEntropyLoss(chunk_bytes=64 * 8 * 4)
    head = fused_sce.MultiLabelHead(5, 41, fused_loss=loss, dtype=dtype)
    rows = torch.export.Dim("rows", max=64)
    inputs = torch.randn(6, 5, dtype=dtype), torch.rand(6, 41)
    shapes = {"input": {0: rows}, "target": {0: rows}}
    with torch.set_grad_enabled(grad_mode):
        program = torch.export.export(head, inputs, dynamic_shapes=shapes, strict=strict)
    targets = [str(node.target) for node in program.graph_module.modules() for node in node.graph.nodes]
    assert sum("_linear_sigmoid_cross_entropy" in target for target in targets) == 1, targets
    trained = program.module()
    for number in (6, 2, 64):
        x, t = torch.randn(number, 5, dtype=dtype), torch.rand(number, 41)
        ours, expected = trained(x, t), head(x, t)
        torch.testing.assert_close(ours, expected)
        # the program trains, whatever the mode that it was made in
        gradients = torch.autograd.grad(ours, list(trained.parameters()))
        for gradient, right in zip(gradients, torch.autograd.grad(expected, (head.weight, head.bias)), strict=True):
            torch.testing.assert_close(gradient, right)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(trained(x, t), list(trained.parameters()), create_graph=True)


@pytest.mark.parametrize("target_format", FORMATS)
def test_the_op_keeps_its_promises(target_format: str) -> None:
    op = torch.ops.fused_sce._linear_sigmoid_cross_entropy.default
    calls: list[tuple[Any, ...]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is op:
                calls.append(tuple(arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args))
            return function(*args, **kwargs or {})

    for dtype in (torch.float32, torch.float16):  # the gradients of this one are made in backward
        x, w, b, t, _ = layer_and_target(dtype, target_format)
        with Recorder():
            fused(x, w, t, b, chunk_bytes=12 * 16 * 4, **options_of(target_format)).backward()
    assert len(calls) == 3
    for args in calls:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


# Memory


@pytest.mark.parametrize(
    ("dtype", "target_format"),
    [*((torch.float32, each) for each in FORMATS), (torch.bfloat16, "dense"), (torch.float16, "index_list")],
)
@pytest.mark.parametrize("labels", [1024, 4096])
def test_memory_is_the_gradients_and_one_chunk(dtype: torch.dtype, target_format: str, labels: int) -> None:
    rows, features, chunk = 64, 16, 64 * 256 * dtype.itemsize
    _, _, b, t, _ = layer_and_target(dtype, target_format, rows, labels)
    x = torch.randn(rows, features, dtype=dtype, requires_grad=True)
    w = torch.randn(labels, features, dtype=dtype, requires_grad=True)
    mask = torch.rand(rows, labels) < 0.9
    options = options_of(target_format, loss_weight=torch.rand(labels), mask=mask, chunk_bytes=chunk)
    # Indices are looked at for each chunk, those of a sparse target too.
    indices = t.values().numel() if target_format == "csr" else t.numel() if "index" in target_format else 0

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(fused(x, w, t, b, **options), (x, w, b))

    step()
    small = 4 * x.numel() * 4 + 32 * indices + 4096
    assert peak_bytes(step) <= (w.numel() + b.numel()) * dtype.itemsize + chunk + small
    with torch.no_grad():
        assert peak_bytes(lambda: fused(x, w, t, b, **options)) <= chunk + 32 * indices + 4096
        k = 6 * rows * 10 * (dtype.itemsize + 8)  # the best of two chunks, one by one, together, and of both
        assert peak_bytes(lambda: F.linear_topk(x, w, 10, b, chunk_bytes=chunk)) <= chunk + k + 4096


def test_memory_under_autocast() -> None:
    # Of few rows the copies of a chunk's weights, and of their gradient, are larger than its logits.
    x, w = torch.randn(8, 64, requires_grad=True), torch.randn(4096, 64, requires_grad=True)
    t, chunk = torch.rand(8, 4096) < 0.1, 32768

    @torch.autocast("cpu", torch.bfloat16)
    def loss() -> Tensor:
        return fused(x, w, t, chunk_bytes=chunk)

    loss().backward()
    assert peak_bytes(lambda: torch.autograd.grad(loss(), (x, w))) <= w.nbytes + 2 * chunk + 8 * x.nbytes
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert peak_bytes(lambda: F.linear_topk(x, w, 3, chunk_bytes=chunk)) <= 2 * chunk + 8 * x.nbytes


def test_no_copies_of_a_factor_for_each_row() -> None:
    x, w = torch.randn(8, 8, 4, requires_grad=True), torch.randn(1024, 4)
    t = torch.randint(0, 1024, (8, 8))
    factors = {
        "loss_weight": torch.rand(1, 1024),
        "pos_weight": torch.rand(1, 1, 1024),
        "mask": torch.rand(8, 1, 1) < 0.5,
    }

    def loss() -> Tensor:
        return fused(x, w, t, target_format="class_index", chunk_bytes=64 * 8 * 4, **factors)

    assert peak_bytes(loss) < 32768
    flat = {**factors, "pos_weight": factors["pos_weight"][0], "mask": factors["mask"].expand(8, 8, 1).reshape(64, 1)}
    expected = fused(x.reshape(64, 4), w, t.flatten(), target_format="class_index", **flat)
    torch.testing.assert_close(loss(), expected)


def test_a_tenth_of_the_memory() -> None:
    x = torch.randn(1024, 256).requires_grad_()
    w = torch.empty(131072, 256).uniform_(-0.1, 0.1).requires_grad_()
    t = torch.zeros(1024, 131072, dtype=torch.uint8)
    t[:, ::1000] = 1
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ours = peak_bytes(lambda: fused(x, w, t).backward())
        # torch's peak is in forward already
        theirs = peak_bytes(lambda: torch.nn.functional.binary_cross_entropy_with_logits(linear(x, w), t.float()))
    finally:
        torch.set_num_threads(threads)
    assert ours <= w.nbytes + 4 * x.nbytes + 64 * 2**20
    assert ours < theirs / 10, f"{ours / 2**20:.0f} MiB, {theirs / 2**20:.0f} MiB"


# The largest logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 8, 20, 41])
def test_topk(device: str, dtype: torch.dtype, k: int) -> None:
    x, w, b, _, _ = layer_and_target(dtype, rows=12, device=device)
    x = x.view(2, 6, 5)
    logits = linear(x, w, b)
    for labels in (8, 16, 48):
        values, indices = F.linear_topk(x, w, k, b, chunk_bytes=12 * labels * dtype.itemsize)
        assert not values.requires_grad
        assert (values.dtype, indices.dtype) == (dtype, torch.int64)
        torch.testing.assert_close(values, logits.topk(k).values)
        torch.testing.assert_close(values, logits.gather(-1, indices))
        assert (indices.sort().values.diff() > 0).all()
    scaled = F.linear_topk(x[0, 0], w, k, logit_scale=torch.tensor([-2.0], device=device))
    torch.testing.assert_close(scaled.values, linear(-2 * x[0, 0], w).topk(k).values)


def test_topk_of_odd_logits() -> None:
    ones = torch.ones(3, 1)
    values, indices = F.linear_topk(ones, torch.ones(30, 1), 20, chunk_bytes=3 * 8 * 4)
    assert (values == 1).all()
    assert all(len(set(row.tolist())) == 20 for row in indices)  # ties: each label once
    w = torch.tensor([[1.0], [math.nan], [-math.inf]] + [[0.0]] * 7 + [[math.inf]])
    values, indices = F.linear_topk(ones, w, 11, chunk_bytes=3 * 8 * 4)
    torch.testing.assert_close(values, linear(ones, w).topk(11).values, equal_nan=True)
    assert indices[:, [0, 1, 2, -1]].tolist() == [[1, 10, 0, 2]] * 3
    for shape in ((0, 1), (2, 0, 1)):
        assert F.linear_topk(torch.ones(shape), w, 2).values.shape == (*shape[:-1], 2)
    torch.testing.assert_close(F.linear_topk(torch.ones(3, 0), torch.ones(9, 0), 2).values, torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("k", "error", "words"),
    [
        (0, ValueError, "k must be at least 1, got 0"),
        (42, ValueError, "k must be at most the number of labels, 41, got 42"),
        (2.0, TypeError, "k must be an int, got float"),
        (True, TypeError, "k must be an int, got bool"),
    ],
)
def test_wrong_k(k: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        F.linear_topk(torch.randn(3, 5), torch.randn(41, 5), k)
    with pytest.raises(error, match=words):
        fused_sce.MultiLabelHead(5, 41).predict(torch.randn(3, 5), k)


# Modules


def test_module() -> None:
    x, w, b, t, _ = layer_and_target()
    options: dict[str, Any] = {
        "loss_weight": torch.rand(41), "pos_weight": torch.rand(41), "reduction": "sum_classes", "gamma_neg": 2.0,
        "gamma_pos": 0.5, "clip": 0.1, "alpha": torch.rand(41), "label_smoothing": 0.1,
        "smoothing_prior": torch.rand(41), "target_threshold": 0.4, "ignore_value": 0.25, "check_target": True,
        "chunk_bytes": 12 * 8 * 4,
    }  # fmt: skip
    module = fused_sce.LinearSigmoidCrossEntropyLoss(**options)
    assert set(module.state_dict()) == {"loss_weight", "pos_weight", "alpha", "smoothing_prior"}
    call = {"logit_scale": torch.tensor(2.0), "mask": torch.rand(12, 41) < 0.5}
    expected = fused(x, w, t, b, **call, **options)
    other = fused_sce.LinearSigmoidCrossEntropyLoss(
        **{name: torch.zeros_like(option) if isinstance(option, Tensor) else option for name, option in options.items()}
    )
    other.load_state_dict(module.state_dict())
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        assert torch.equal(each(x, w, t, b, **call), expected)
        assert repr(each) == (
            "LinearSigmoidCrossEntropyLoss(reduction='sum_classes', label_smoothing=0.1, smoothing_prior=tensor of "
            "shape (41,), target_threshold=0.4, ignore_value=0.25, check_target=True, gamma_neg=2.0, gamma_pos=0.5, "
            "clip=0.1, alpha=tensor of shape (41,), chunk_bytes=384)"
        )
    index = fused_sce.LinearSigmoidCrossEntropyLoss(target_format="class_index")
    t = torch.randint(0, 41, (12,))
    assert torch.equal(index(x, w, t), fused(x, w, t, target_format="class_index"))
    assert repr(index).endswith("(reduction='mean', target_format='class_index', chunk_bytes=67108864)")


def test_head() -> None:
    x, _, _, t, _ = layer_and_target()
    plain = fused_sce.MultiLabelHead(5, 41)
    head = fused_sce.MultiLabelHead(5, 41, fused_loss=True)
    head.load_state_dict(plain.state_dict())
    assert torch.equal(head(x), plain(x))
    mask = torch.rand(12, 1) < 0.5
    assert torch.equal(head(x, t, mask), fused(x, head.weight, t, head.bias, mask=mask))
    options = {"reduction": "sum", "pos_weight": torch.rand(41)}
    of_loss = fused_sce.MultiLabelHead(5, 41, bias=False, fused_loss=fused_sce.LinearSigmoidCrossEntropyLoss(**options))
    assert set(of_loss.state_dict()) == {"weight", "fused_loss.pos_weight"}
    for each in (of_loss, copy.deepcopy(of_loss), pickle.loads(pickle.dumps(of_loss))):
        assert torch.equal(each(x, t), fused(x, each.weight, t, **options))
    values, indices = head.predict(x, 4)
    expected = head(x).topk(4)
    torch.testing.assert_close(values, expected.values.detach())
    assert torch.equal(indices, expected.indices)
    for arguments in ((t,), (None, mask)):
        with pytest.raises(TypeError, match=r"returns logits and takes no target: make it with fused_loss=True"):
            plain(x, *arguments)
    with pytest.raises(TypeError, match="target must be a tensor, got NoneType"):
        head(x, mask=mask)
    with pytest.raises(TypeError, match="fused_loss must be True, False or a LinearSigmoidCrossEntropyLoss, got str"):
        fused_sce.MultiLabelHead(5, 41, fused_loss="yes")  # type: ignore[arg-type]
    dropped = fused_sce.MultiLabelHead(5, 41, dropout=0.5, fused_loss=True)
    with torch.no_grad():
        dropped.weight.zero_()[:, 0] = 1
    ones = torch.ones(64, 5)
    values = {round(dropped(ones[:1], torch.zeros(1, 41)).item(), 4) for _ in range(20)}
    assert values == {round(math.log(2), 4), round(math.log1p(math.exp(2)), 4)}


# Errors

X, W, T, B = torch.randn(4, 5), torch.randn(10, 5), torch.rand(4, 10), torch.randn(10)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"input": [1.0]}, TypeError, "^input must be a tensor, got list"),
        ({"weight": None}, TypeError, "^weight must be a tensor, got NoneType"),
        ({"bias": 0.0}, TypeError, "^bias must be a tensor, got float"),
        ({"target": T.numpy()}, TypeError, r"^target must be a tensor, got ndarray: pass torch.from_numpy\(target\)"),
        ({"input": X.long()}, TypeError, "^input must have dtype float32, .*, got torch.int64"),
        ({"weight": W.to_sparse()}, TypeError, r"^weight must be a dense tensor, .*weight.to_dense\(\)"),
        ({"weight": W.double()}, TypeError, "^input and weight must have one dtype .*float32 and torch.float64"),
        ({"bias": B.half()}, TypeError, "^input and bias must have one dtype .*float32 and torch.float16"),
        ({"input": X[:, :3]}, ValueError, r"^input .* same number of features D, got \(4, 3\) and \(10, 5"),
        ({"input": X[0, 0]}, ValueError, r"^input must have shape .* got \(\) and \(10, 5\)"),
        ({"weight": W[0]}, ValueError, r"^input must have shape .* got \(4, 5\) and \(5,\)"),
        ({"bias": B[:3]}, ValueError, r"^bias must have shape \(10,\), one value for each row of weight, got \(3,\)"),
        ({"target": T[:, :5]}, ValueError, r"^target must have the logits' shape \(4, 10\), a value .*, got \(4, 5\)"),
        ({"target": T[:, :5].to_sparse_csr()}, ValueError, r"^target must have the logits' shape \(4, 10\)"),
        ({"target": torch.arange(4)}, ValueError, r"shape \(4, 10\).* got \(4,\): for label indices pass target_f"),
        ({"target": T[:3], "target_format": "class_index"}, ValueError, r"needs a target of shape \(4,\)"),
        ({"target": T.to_sparse()}, TypeError, "target.to_sparse_csr"),
        ({"target": 2 * T, "check_target": True}, ValueError, r"^target\[\d, \d\] is 1.*check_target=True"),
        ({"target": (T * 9).int()}, ValueError, r"^target\[0, \d\] is .* an integer target must be 0 or 1"),
        ({"loss_weight": T[:, 0]}, RuntimeError, r"^loss_weight of shape \(4,\) .* pass loss_weight.view\(-1, 1\)"),
        ({"pos_weight": T[:, :3]}, RuntimeError, "^pos_weight of shape"),
        ({"mask": T}, TypeError, "^mask must have dtype bool, got torch.float32"),
        ({"reduction": "none"}, ValueError, "^none is not a valid value for reduction: .* mean, sum, sum_classes"),
        ({"target_format": "coo"}, ValueError, "^coo is not a valid value for target_format"),
        ({"gamma_neg": -1.0}, ValueError, "^gamma_neg must be at least 0"),
        ({"clip": 1.0}, ValueError, "^clip must be in"),
        ({"alpha": 2.0}, ValueError, "^alpha must be in"),
        ({"label_smoothing": 2.0}, ValueError, "^label_smoothing must be in"),
        ({"logit_scale": "10"}, TypeError, "^logit_scale must be a number, a tensor or None, got str"),
        ({"logit_scale": B[:2]}, ValueError, r"^logit_scale must be one number, got a tensor of shape \(2,\)"),
        ({"logit_scale": torch.tensor(1j)}, TypeError, "^logit_scale must have dtype .* got torch.complex64"),
        ({"chunk_bytes": 15}, ValueError, "^chunk_bytes must hold the logits of one label, 16 bytes for .*, got 15"),
        ({"chunk_bytes": 1e6}, TypeError, "^chunk_bytes must be an int, got float"),
        ({"chunk_bytes": True}, TypeError, "^chunk_bytes must be an int, got bool"),
        ({"chunk_bytes": 0}, ValueError, "^chunk_bytes must be at least 1, got 0"),
        ({"target": T.clone().requires_grad_()}, RuntimeError, f"no gradient by target: pass target.detach.*{CURE}"),
        ({"loss_weight": T.clone().requires_grad_()}, RuntimeError, "no gradient by loss_weight: pass loss_weight.det"),
        ({"alpha": T.clone().requires_grad_()}, RuntimeError, r"no gradient by alpha: pass alpha.detach\(\)"),
        ({"smoothing_prior": T.clone().requires_grad_()}, RuntimeError, "smoothing_prior has no gradient"),
        *(
            ({name: tensor.to("meta")}, RuntimeError, f"input is on cpu and {name} is on meta")
            for name, tensor in {"weight": W, "bias": B, "target": T, "loss_weight": T, "logit_scale": B[0]}.items()
        ),
    ],
)  # fmt: skip
def test_errors_name_the_argument(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"input": X, "weight": W, "target": T, "bias": B}
    with pytest.raises(error, match=words):
        fused(**{**arguments, **changes})


@pytest.mark.parametrize(("target_format", "target", "words"), wrong_targets())
def test_wrong_indices_name_the_first(target_format: str, target: Tensor, words: str) -> None:
    x, w = X.clone().requires_grad_(), W.clone()
    options = options_of(target_format, chunk_bytes=4 * 8 * 4)
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            fused(x, w, target, **options)
        w.requires_grad_()
    assert torch.equal(w, W)
    if target_format == "csr":
        return
    with pytest.raises(ValueError, match=words) as flat:
        fused(x, w, target, **options)
    with pytest.raises(ValueError, match=r"^target") as error:
        fused(x.view(2, 2, 5), w, target.view(2, 2, *target.shape[1:]), **options)
    row = int(str(flat.value)[len("target[")])  # of four, here two by two
    assert str(error.value) == str(flat.value).replace(f"target[{row}", f"target[{row // 2}, {row % 2}", 1)


def test_module_checks_its_options() -> None:
    for options, error, words in (
        ({"chunk_bytes": "all"}, TypeError, "chunk_bytes must be an int, got str"),
        ({"chunk_bytes": -1}, ValueError, "chunk_bytes must be at least 1, got -1"),
        ({"reduction": "none"}, ValueError, "none is not a valid value"),
        ({"alpha": torch.tensor([2.0])}, ValueError, "alpha must be in"),
        ({"loss_weight": 2.0}, TypeError, "loss_weight must be a tensor, got float"),
    ):
        with pytest.raises(error, match=words):
            fused_sce.LinearSigmoidCrossEntropyLoss(**options)  # type: ignore[arg-type]


def test_overridden_and_traced() -> None:
    class Subclass(Tensor):
        """Any subclass that does not say otherwise: results are of it."""

    x, w, b, t, _ = layer_and_target()
    x = x.detach().as_subclass(Subclass)  # type: ignore[no-untyped-call]
    assert type(fused(x, w, t, b)) is Subclass
    assert type(F.linear_topk(x, w, 3, b).values) is Subclass  # type: ignore[attr-defined]
    assert type(F.sigmoid_contrastive_loss(x, w[: len(x)], 2.0)) is Subclass
    head = fused_sce.MultiLabelHead(4, 9, fused_loss=True)
    x, t = torch.randn(3, 4), torch.rand(3, 9)
    traced = torch.fx.symbolic_trace(head, concrete_args={"mask": None})
    assert torch.equal(traced(x, t), head(x, t))


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize(
    ("target_format", "options"),
    [
        ("dense", {"ignore_value": 1}),
        ("class_index", {"ignore_value": 3, "mask": torch.arange(8192) % 3 > 0}),
        ("packed", {"ignore_value": 1}),
        ("index_list", {"ignore_value": 0}),
        ("csr", {"ignore_value": 1}),
    ],
)
def test_counting_takes_chunks(
    target_format: str, options: dict[str, Any], by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_count = _linear.with_count  # without the kernel: as on a GPU
    monkeypatch.setattr(_linear, "with_count", lambda *args, **_: with_count(*args, by_kernel=by_kernel))
    labels = random_labels((256, 8192), target_format, "cpu")
    x, w = torch.randn(256, 4), torch.randn(8192, 4)
    t = labels if target_format == "dense" else in_format(labels, target_format)
    options = {**options, **({} if target_format in ("dense", "csr") else {"target_format": target_format})}
    expected = F.sigmoid_cross_entropy(torch.nn.functional.linear(x, w), t, **options)
    torch.testing.assert_close(fused(x, w, t, **options), expected)
    chunk = 256 * 64 * 4
    # Of each index, whose number does not grow with the logits.
    of_indices = {"index_list": 32 * t.numel(), "csr": 20 * int(labels.sum())}.get(target_format, 0)
    assert peak_bytes(lambda: fused(x, w, t, chunk_bytes=chunk, **options)) <= 4 * chunk + of_indices + 4 * x.nbytes


def test_a_head_alone_is_traced() -> None:
    head, x = fused_sce.MultiLabelHead(4, 9), torch.randn(3, 4)
    assert torch.equal(torch.fx.symbolic_trace(head)(x), head(x))


def test_backward_on_meta() -> None:
    x, w = torch.ones(3, 4, device="meta", requires_grad=True), torch.ones(9, 4, device="meta")
    fused(x, w, torch.ones(3, 9, device="meta")).backward()
    assert x.grad is not None
    assert x.grad.shape == (3, 4)


def test_few_labels_of_many_rows() -> None:
    x, w = torch.randn(100, 4), torch.randn(3, 4)
    t = torch.randint(0, 2, (100, 3))
    expected = F.sigmoid_cross_entropy(torch.nn.functional.linear(x, w), t)
    for chunk_bytes in (400, 800, 1000):  # one or two labels
        torch.testing.assert_close(fused(x, w, t, chunk_bytes=chunk_bytes), expected)
        assert torch.equal(F.linear_topk(x, w, 2, chunk_bytes=chunk_bytes).indices, (x @ w.T).topk(2).indices)  # type: ignore[attr-defined]


def test_topk_under_autocast_casts_any_dtype() -> None:
    x, w = torch.randn(5, 4), torch.randn(9, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        values, _ = F.linear_topk(x, w, 3)
    assert values.dtype is torch.bfloat16


def test_integers_of_numpy() -> None:
    x, w = torch.randn(5, 4), torch.randn(9, 4)
    values, _ = F.linear_topk(x, w, np.int64(3), chunk_bytes=np.int64(2**20))
    assert values.shape == (5, 3)
