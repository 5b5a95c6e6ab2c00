"""SigLIP's loss: the values of open_clip's formula, without the memory of the logits of all pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory import peak_bytes
from test_linear import check_close
from torch import Tensor

from fused_sce import functional as F

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def of_all_pairs(images: Tensor, texts: Tensor, scale: Any, bias: Any = None) -> Tensor:
    """`-logsigmoid(labels * logits).sum() / N`, where labels are 1 for pairs that belong together, else -1."""
    logits = scale * images @ texts.T
    logits = logits if bias is None else logits + bias
    labels = 2 * torch.eye(len(images), device=images.device, dtype=images.dtype) - 1
    return -torch.nn.functional.logsigmoid(labels * logits).sum() / len(images)


def features(rows: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    pair = (torch.nn.functional.normalize(torch.randn(rows, 6, device=device), dim=1) for _ in range(2))
    return tuple(each.to(dtype).requires_grad_() for each in pair)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 8, 45])
@pytest.mark.parametrize("shape", [None, (), (1,)])
def test_values_and_gradients(device: str, dtype: torch.dtype, rows: int, shape: tuple[int, ...] | None) -> None:
    images, texts = features(rows, dtype, device)
    scale: Any = 10.0
    bias: Any = -10.0
    leaves = [images, texts]
    if shape is not None:  # float32, as the parameters of a model under autocast
        scale = torch.full(shape, scale, device=device, requires_grad=True)
        bias = torch.full(shape, bias, device=device, requires_grad=True)
        leaves += [scale, bias]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = of_all_pairs(*exact, *([scale, bias] if shape is None else []))
    right = torch.autograd.grad(expected, exact)
    for chunk in (8, 16, 2**20):
        loss = F.sigmoid_contrastive_loss(images, texts, scale, bias, chunk_bytes=rows * chunk * dtype.itemsize)
        assert (loss.shape, loss.dtype) == ((), dtype)
        # the scaled features are rounded, and so are logits of size 10
        tolerance = (1e-12, 16 * torch.finfo(dtype).eps)[dtype is not torch.float64]
        check_close(loss, expected.detach(), tolerance)
        gradients = torch.autograd.grad(loss, leaves)
        for leaf, ours, exactly in zip(leaves, gradients, right, strict=True):
            assert ours.dtype == leaf.dtype
            check_close(ours, exactly, max(tolerance, torch.finfo(leaf.dtype).eps))


def test_without_a_bias() -> None:
    images, texts = features(9, torch.float64)
    torch.testing.assert_close(F.sigmoid_contrastive_loss(images, texts, 3), of_all_pairs(images, texts, 3))
    assert F.sigmoid_contrastive_loss(images[:0], texts[:0], 3).isnan()  # as the mean of nothing


def test_autocast() -> None:
    images, texts = features(20, torch.float32)
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    leaves = (images, texts, scale, bias)
    expected = of_all_pairs(*leaves)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.sigmoid_contrastive_loss(*leaves)
    assert loss.dtype == torch.float32
    check_close(loss, expected, 0.01)
    for leaf, ours, right in zip(
        leaves, torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert ours.dtype == leaf.dtype
        check_close(ours, right, 0.05)


def test_gradcheck_and_transforms() -> None:
    images, texts = features(5, torch.float64)
    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (2.0, -1.0))
    assert torch.autograd.gradcheck(F.sigmoid_contrastive_loss, (images, texts, scale, bias))
    leaves = [leaf.detach() for leaf in (images, texts, scale, bias)]
    ours, expected = (
        torch.func.grad(loss, (0, 1, 2, 3))(*leaves) for loss in (F.sigmoid_contrastive_loss, of_all_pairs)
    )
    torch.testing.assert_close(ours, expected)


def test_compiled() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(F.sigmoid_contrastive_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    for rows in (5, 12):
        leaves = (*features(rows, torch.float32), scale, bias)
        loss, expected = compiled(*leaves), F.sigmoid_contrastive_loss(*leaves)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))


def test_memory_is_the_gradients_and_one_chunk() -> None:
    images, texts = features(1024, torch.float32)
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    chunk = 1024 * 16 * 4
    # Scaled pictures and their gradient, that of the pictures, of the texts, and a row of indices for each chunk.
    others = 6 * images.nbytes + 16 * 1024 * 8
    call = (images, texts, scale, bias)
    assert (
        peak_bytes(lambda: torch.autograd.grad(F.sigmoid_contrastive_loss(*call, chunk_bytes=chunk), call))
        < chunk + others
    )
    assert peak_bytes(lambda: of_all_pairs(*call)) > 1024 * 1024 * 4


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"image_features": [1.0]}, TypeError, "^image_features must be a tensor, got list"),
        ({"text_features": None}, TypeError, "^text_features must be a tensor, got NoneType"),
        (
            {"text_features": torch.randn(4, 3)},
            ValueError,
            r"^image_features and text_features .* and \(4, 3\)",
        ),
        (
            {"text_features": torch.randn(3, 5)},
            ValueError,
            r"the same shape \(N, D\), got \(4, 5\) and \(3, 5",
        ),
        ({"image_features": torch.randn(4)}, ValueError, r"same shape \(N, D\), got \(4,\) and \(4, 5\)"),
        ({"image_features": torch.ones(4, 5).long()}, TypeError, "^image_features must have dtype float32, .*int64"),
        (
            {"text_features": torch.ones(4, 5).double()},
            TypeError,
            "^image_features and text_features must have one dtype outside of autocast",
        ),
        ({"text_features": torch.ones(4, 5, device="meta")}, RuntimeError, "text_features is on meta"),
        ({"logit_scale": "a"}, TypeError, "^logit_scale must be a number, a tensor or None, got str"),
        ({"logit_scale": torch.ones(2)}, ValueError, r"^logit_scale must be one number, .* shape \(2,\)"),
        ({"logit_bias": "a"}, TypeError, "^logit_bias must be a number, a tensor or None, got str"),
        ({"logit_bias": torch.ones(2)}, ValueError, r"^logit_bias must be one number, .* shape \(2,\)"),
        ({"chunk_bytes": 8}, ValueError, "^chunk_bytes must hold the logits of one label, 16 bytes for 4 rows"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"image_features": torch.randn(4, 5), "text_features": torch.randn(4, 5), "logit_scale": 10.0}
    with pytest.raises(error, match=words):
        F.sigmoid_contrastive_loss(**{**arguments, **changes})


def test_no_second_derivative() -> None:
    images, texts = features(5, torch.float32)
    with pytest.raises(RuntimeError, match=r"has no second derivative \(create_graph=True\)"):
        torch.autograd.grad(F.sigmoid_contrastive_loss(images, texts, 10.0), images, create_graph=True)
