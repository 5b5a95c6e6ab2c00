"""Results in the memory layout of the logits, as torch has it, at the speed of one flat array."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fused_sce

F = fused_sce.functional


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def permuted(x: Tensor) -> Tensor:
    return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": channels_last,
    "permuted": permuted,
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "expanded": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target_layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_layout(device: str, layout: str, target_layout: str, dtype: torch.dtype, weighted: bool) -> None:
    x = LAYOUTS[layout](torch.randn(2, 3, 4, 5, device=device, dtype=dtype)).requires_grad_()
    t = LAYOUTS[target_layout](torch.randint(0, 2, (2, 3, 4, 5), device=device, dtype=torch.int8))
    factors = {"pos_weight": torch.rand(3, 1, 1, device=device), "weight": torch.rand(5, device=device)}
    factors = factors if weighted else {}
    plain = x.detach().contiguous().requires_grad_()
    dense = layout not in ("sliced", "expanded")
    for reduction in ("none", "mean", "sum_classes"):
        ours = F.sigmoid_cross_entropy(x, t, reduction=reduction, **factors)
        expected = F.sigmoid_cross_entropy(plain, t.contiguous(), reduction=reduction, **factors)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0 if reduction == "none" else 1e-6)
        if reduction == "none" and dense:
            assert ours.stride() == x.stride()
        upstream = torch.full_like(ours, 0.75)
        (gradient,) = torch.autograd.grad(ours, x, upstream)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, plain, upstream)[0], rtol=0, atol=0)
        assert gradient.stride() == (x.stride() if dense else gradient.contiguous().stride())
    rows = F.multilabel_soft_margin_loss(x, t, reduction="none")
    torch.testing.assert_close(rows, F.multilabel_soft_margin_loss(plain, t, reduction="none"), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(rows.sum(), x)
    assert gradient.stride() == (x.stride() if dense else gradient.contiguous().stride())


def test_fakes_have_the_layout_of_results() -> None:
    x = channels_last(torch.randn(2, 3, 4, 5)).requires_grad_()
    t = torch.rand(2, 3, 4, 5)

    def step(x: Tensor) -> Tensor:
        loss: Tensor = F.sigmoid_cross_entropy(x, t, reduction="none")
        return loss

    ours, expected = torch.compile(step, backend="aot_eager", fullgraph=True)(x), step(x)
    assert ours.stride() == expected.stride() == x.stride()
    torch.library.opcheck(torch.ops.fused_sce.sigmoid_cross_entropy.default, (x, t))
    torch.library.opcheck(torch.ops.fused_sce._sigmoid_cross_entropy_backward.default, (torch.rand_like(x), x, t))


@pytest.fixture
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fastest(action: Callable[[], object]) -> float:
    """Seconds that this thread computed: what it waited for other programs does not count."""
    times = []
    for _ in range(5):
        begin = time.thread_time()
        action()
        times.append(time.thread_time() - begin)
    return min(times)


@pytest.mark.usefixtures("_one_thread")
def test_channels_last_is_as_fast_as_contiguous() -> None:
    # As strided operands they took 3 times as long; 1.5 leaves room for a busy machine.
    x, t = torch.randn(16, 80, 64, 64), torch.randint(0, 2, (16, 80, 64, 64), dtype=torch.uint8)
    flat = lambda: F.binary_cross_entropy_with_logits(x, t)  # noqa: E731
    y, u = channels_last(x), channels_last(t)
    assert fastest(lambda: F.binary_cross_entropy_with_logits(y, u)) < 1.5 * fastest(flat)


@pytest.mark.usefixtures("_one_thread")
def test_a_transposed_target_is_gathered_by_tiles() -> None:
    # Element by element it took 14 times as long.
    x, t = torch.randn(8000, 8000), torch.zeros(8000, 8000, dtype=torch.int8)
    straight = fastest(lambda: F.binary_cross_entropy_with_logits(x, t))
    assert fastest(lambda: F.binary_cross_entropy_with_logits(x, t.t())) < 5 * straight


def test_logits_that_come_back_in_another_layout() -> None:
    # as torch.autograd.graph.save_on_cpu(pin_memory=True) brings them
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    t = torch.rand(2, 3, 4, 5)
    gradients = []
    for pack in (lambda saved: saved, lambda saved: torch.empty(saved.size(), dtype=saved.dtype).copy_(saved)):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
            loss = F.sigmoid_cross_entropy(x, t)
        gradients.append(torch.autograd.grad(3 * loss, x)[0])
    assert torch.equal(*gradients)
    assert gradients[1].stride() == x.stride()
