"""What only a GPU can show: launches, graphs, streams, memory, and every float on the device itself.

The rest of the tests runs on a GPU too, where they take `device`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from launches import launches_of
from torch import Tensor, nn
from ulp import exact_binary, ulp_distance

import fused_sce
from fused_sce import functional as F

pytestmark = pytest.mark.gpu

CUDA = "cuda"


def labels(shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(0, 2, shape, device=CUDA, dtype=torch.uint8).to(dtype)


def loss_and_gradient(
    logits: Tensor, target: Tensor, reduction: str = "mean", **options: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = F.sigmoid_cross_entropy(leaf, target, reduction=reduction, **options)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    return loss.detach(), gradient


def float32_patterns(step: int, batch: int = 4_000_000) -> Iterator[Tensor]:
    """Every `step`-th float32 by its bits, in batches on the GPU; NaN and infinities included."""
    for first in range(0, 2**32, step * batch):
        patterns = np.arange(first, min(first + step * batch, 2**32), step, dtype=np.uint64)
        yield torch.from_numpy(patterns.astype(np.uint32).view(np.float32)).to(CUDA)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_every_61st_float32_within_two_ulp(target: float) -> None:
    worst = {"loss": 0.0, "gradient": 0.0, "gradient of the sum": 0.0}
    lost = count = 0
    for x in float32_patterns(61):
        count += x.numel()
        t = torch.full_like(x, target)
        loss, gradient = loss_and_gradient(x, t, "none")
        _, gradient_of_sum = loss_and_gradient(x, t, "sum")
        exact_loss, exact_gradient = exact_binary(x.double(), target)
        for name, got, exact in (
            ("loss", loss, exact_loss),
            ("gradient", gradient, exact_gradient),
            ("gradient of the sum", gradient_of_sum, exact_gradient),
        ):
            worst[name] = max(worst[name], ulp_distance(got, exact).max().item())
            lost += int(((got == 0) != (exact.float() == 0)).sum())
    assert count == -(-(2**32) // 61)
    assert max(worst.values()) <= 2, worst
    assert lost == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [0.0, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_16_bit_gradient_of_a_sum(dtype: torch.dtype, target: float, weighted: bool) -> None:
    # The bound of the formula in gpu16.h; alone (reduction="none") see test_numerics.py.
    patterns = np.arange(0, 2**16, dtype=np.uint32).astype(np.uint16).view(np.int16)
    x = torch.from_numpy(patterns).view(dtype).to(CUDA)
    options = {"pos_weight": torch.ones((), device=CUDA)} if weighted else {}
    t = torch.full_like(x, target)
    op = torch.ops.fused_sce._sigmoid_cross_entropy_forward  # autograd has another route for float16
    _, gradient = op(x, t, None, options.get("pos_weight"), reduction="sum")
    _, exact = exact_binary(x.double(), target)
    assert ulp_distance(gradient, exact).max() <= 0.51
    assert torch.equal(gradient == 0, exact.to(dtype) == 0)
    losses = torch.stack([F.sigmoid_cross_entropy(each, t[:1].float(), reduction="sum") for each in x[::251].split(1)])
    exact_losses, _ = exact_binary(x[::251].double(), target)
    finite = exact_losses.isfinite() & (exact_losses >= 2.0**-126)
    size = x[::251].double().abs().clamp(max=104)
    error = (losses.double() - exact_losses).abs() / exact_losses
    assert (error[finite] <= 2.0**-20 + size[finite] * 2.0**-23).all()
    assert torch.equal(losses.isnan(), exact_losses.isnan())
    assert torch.equal(losses.isinf(), exact_losses.isinf())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bool, torch.uint8, torch.int64])
@pytest.mark.parametrize("weights", ["none", "per class", "one", "per sample"])
@pytest.mark.parametrize("shape", [(64, 80), (257, 1003), (3, 9605), (70_001, 17)], ids=str)
def test_elements_have_the_bits_of_the_cpu(
    dtype: torch.dtype, target_dtype: torch.dtype, weights: str, shape: tuple[int, int]
) -> None:
    x = (torch.randn(shape, device=CUDA) * 9).to(dtype)
    t = labels(shape, target_dtype)
    broadcast = {"none": None, "per class": shape[1:], "one": (1,), "per sample": (shape[0], 1)}[weights]
    options = {}
    if broadcast:
        options = {name: torch.rand(broadcast, device=CUDA) + 0.5 for name in ("weight", "pos_weight")}
    on_cpu = {name: value.cpu() for name, value in options.items()}
    # 16-bit gradients have a formula of their own, within 0.51 ULP
    is_wide, info = dtype in (torch.float32, torch.float64), torch.finfo(dtype)
    bounds = {"rtol": 0, "atol": 0} if is_wide else {"rtol": info.eps, "atol": info.smallest_normal * info.eps}
    loss, gradient = loss_and_gradient(x, t, "none", **options)
    cpu_loss, cpu_gradient = loss_and_gradient(x.cpu(), t.cpu(), "none", **on_cpu)
    assert torch.equal(loss.cpu(), cpu_loss)
    by_element = gradient
    torch.testing.assert_close(gradient.cpu(), cpu_gradient, **bounds)

    mean, gradient = loss_and_gradient(x, t, "mean", **options)
    cpu_mean, cpu_gradient = loss_and_gradient(x.cpu(), t.cpu(), "mean", **on_cpu)
    torch.testing.assert_close(gradient.cpu(), cpu_gradient, **bounds)
    rtol = torch.finfo(mean.dtype).eps if is_wide else max(torch.finfo(mean.dtype).eps, 2.0**-19)
    torch.testing.assert_close(mean.cpu(), cpu_mean, rtol=rtol, atol=0)
    # the kernels of a sum and those of elements have one formula for a gradient
    _, gradient = loss_and_gradient(x, t, "sum", **options)
    assert torch.equal(gradient, by_element)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip", [(0, 1), (1, 0), (3, 3)])
def test_unaligned_starts(dtype: torch.dtype, skip: tuple[int, int]) -> None:
    count = 1_000_003
    x = torch.randn(count + 8, device=CUDA).to(dtype)[skip[0] :][:count]
    t = labels((count + 8,))[skip[1] :][:count]
    loss, gradient = loss_and_gradient(x, t)
    aligned_loss, aligned_gradient = loss_and_gradient(x.clone(), t.clone())
    assert torch.equal(loss, aligned_loss)
    assert torch.equal(gradient, aligned_gradient)


def test_infinite_logits_in_a_large_sum() -> None:
    # float groups of losses are added up again, element by element, where one of them is not finite
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(300, 1001, device=CUDA).to(dtype)
        t = labels((300, 1001), torch.bool)
        x[17, 5], t[17, 5] = torch.inf, True
        x[211, 1000], t[211, 1000] = -torch.inf, False
        loss, gradient = loss_and_gradient(x, t, "sum")
        x[17, 5], x[211, 1000] = 60000, -60000
        finite_loss, finite_gradient = loss_and_gradient(x, t, "sum")
        assert torch.equal(gradient, finite_gradient)
        torch.testing.assert_close(loss, finite_loss, rtol=2.0**-19, atol=0)
        x[17, 5] = -torch.inf
        assert loss_and_gradient(x, t, "sum")[0].item() == torch.inf


def test_more_than_two_to_the_31_elements() -> None:
    count = 2**31 + 1027
    free, _ = torch.cuda.mem_get_info()
    if free < 14 * count:
        pytest.skip(f"needs {14 * count / 2**30:.0f} GiB of free GPU memory, {free / 2**30:.0f} are")
    x = torch.empty(count, dtype=torch.bfloat16, device=CUDA).normal_()
    t = torch.empty(count, dtype=torch.uint8, device=CUDA).random_(0, 2)
    op = functools.partial(torch.ops.fused_sce._sigmoid_cross_entropy_forward, reduction="sum")
    total, gradient = op(x, t, dtype=torch.float32)
    parts = 0.0
    for begin in range(0, count, 2**28):
        part = slice(begin, begin + 2**28)
        part_total, part_gradient = op(x[part], t[part], dtype=torch.float64)
        parts += part_total.item()
        assert torch.equal(gradient[part], part_gradient)
    assert total.item() == pytest.approx(parts, rel=1e-7)

    column = t.view(-1, 1)  # strided: more than 2^31 elements through the general kernels
    by_stride, gradient_by_stride = op(x.view(-1, 1).expand(-1, 1), column, torch.ones(count, 1, device=CUDA))
    assert by_stride.item() == pytest.approx(parts, rel=2e-2)  # rounded to bfloat16
    assert torch.equal(gradient_by_stride.view(-1), gradient)
    del gradient, gradient_by_stride
    torch.cuda.empty_cache()


Step = Callable[[], None]


@pytest.mark.parametrize("shape", [(64, 80), (512, 9605)], ids=str)
def test_graph_capture_and_replay(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, device=CUDA, requires_grad=True)
    t = labels(shape)
    pos_weight = torch.rand(shape[1:], device=CUDA) + 0.5
    criterion = fused_sce.BCEWithLogitsLoss(pos_weight=pos_weight)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # torch wants a warm-up on another stream
        for _ in range(3):
            x.grad = None
            criterion(x, t).backward()
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    x.grad = None
    with torch.cuda.graph(graph):
        static_loss = criterion(x, t)
        static_loss.backward()
    for _ in range(5):
        with torch.no_grad():
            x.normal_()
            t.random_(0, 2)
        graph.replay()
        loss, gradient = loss_and_gradient(x, t, pos_weight=pos_weight)
        assert torch.equal(static_loss, loss)
        assert x.grad is not None
        assert torch.equal(x.grad, gradient)

    # beside the same sums outside of the graph, on other streams: each has a workspace of its own
    expected = static_loss.clone()
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    outside = []
    for _ in range(50):
        with torch.cuda.stream(streams[0]):
            graph.replay()
        for stream in streams[1:]:
            with torch.cuda.stream(stream), torch.no_grad():
                outside.append(criterion(x, t))
    torch.cuda.synchronize()
    assert torch.equal(static_loss, expected)
    assert all(torch.equal(each, expected) for each in outside)


def test_two_streams() -> None:
    inputs = [(torch.randn(700 + 300 * i, 1000, device=CUDA), labels((700 + 300 * i, 1000))) for i in range(2)]
    expected = [loss_and_gradient(x, t) for x, t in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for _ in range(100):
        for stream, (x, t), result in zip(streams, inputs, results, strict=True):
            with torch.cuda.stream(stream):
                result.append(loss_and_gradient(x, t))
    torch.cuda.synchronize()
    for result, (loss, gradient) in zip(results, expected, strict=True):
        for again_loss, again_gradient in result:
            assert torch.equal(again_loss, loss)
            assert torch.equal(again_gradient, gradient)


def test_each_threads_default_stream_has_a_workspace_of_its_own() -> None:
    # One handle, cudaStreamPerThread, which is another stream in each thread.
    inputs = [(torch.randn(700 + 300 * i, 1000, device=CUDA), labels((700 + 300 * i, 1000))) for i in range(2)]
    expected = [loss_and_gradient(x, t) for x, t in inputs]
    torch.cuda.synchronize()

    def run(x: Tensor, t: Tensor) -> list[tuple[Tensor, Tensor]]:
        with torch.cuda.stream(torch.cuda.ExternalStream(2)):
            return [loss_and_gradient(x, t) for _ in range(100)]

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, *zip(*inputs, strict=True)))
    torch.cuda.synchronize()
    for result, (loss, gradient) in zip(results, expected, strict=True):
        for again_loss, again_gradient in result:
            assert torch.equal(again_loss, loss)
            assert torch.equal(again_gradient, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    x = torch.randn(2048, 9605, device=CUDA).to(dtype)
    t = labels((2048, 9605))
    options = {"pos_weight": torch.rand(9605, device=CUDA)}
    first_loss, first_gradient = loss_and_gradient(x, t, **options)
    rows = F.multilabel_soft_margin_loss(x, t, reduction="none")
    for _ in range(100):
        loss, gradient = loss_and_gradient(x, t, **options)
        assert torch.equal(loss, first_loss)
        assert torch.equal(gradient, first_gradient)
        assert torch.equal(F.multilabel_soft_margin_loss(x, t, reduction="none"), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_launch_each_way(dtype: torch.dtype) -> None:
    x = torch.randn(256, 1000, device=CUDA, dtype=dtype, requires_grad=True)
    t = labels((256, 1000), dtype)
    one = torch.ones((), device=CUDA, dtype=dtype)

    def launches(criterion: nn.Module) -> float:
        return launches_of(lambda: torch.autograd.grad(criterion(x, t), x, one))

    assert launches(fused_sce.BCEWithLogitsLoss()) == 2
    assert launches(fused_sce.BCEWithLogitsLoss(pos_weight=torch.rand(1000, device=CUDA))) == 2
    assert launches(fused_sce.MultiLabelSoftMarginLoss()) == 2
    # the same count finds what torch launches
    assert launches(nn.BCEWithLogitsLoss()) > 5
    assert launches(nn.MultiLabelSoftMarginLoss()) > 10


def test_nothing_waits_for_the_gpu() -> None:
    x = torch.randn(256, 1000, device=CUDA, requires_grad=True)
    t = labels((256, 1000))
    weight = torch.rand(1000, device=CUDA)
    upstream = torch.full((), 3.0, device=CUDA)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for reduction in ("mean", "sum", "none"):
            loss = F.sigmoid_cross_entropy(x, t, weight=weight, reduction=reduction)
            torch.autograd.grad(loss, x, upstream.expand(loss.shape))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("target_format", ["dense", "packed", "index_list", "class_index"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_loss_is_that_of_the_logits_waits_for_nothing_and_takes_one_chunk(
    dtype: torch.dtype, target_format: str
) -> None:
    rows, features, count, chunk_bytes = 256, 64, 40_003, 2**20
    x, w = (torch.randn(size, features, device=CUDA, dtype=dtype) / 8 for size in (rows, count))
    b = torch.randn(count, device=CUDA, dtype=dtype)
    targets = {
        "dense": labels((rows, count)),
        "packed": labels((rows, -(-count // 8))) * 3,  # zeros behind the last label
        "index_list": torch.rand(rows, count, device=CUDA).topk(5).indices,
        "class_index": torch.randint(0, count, (rows,), device=CUDA),
    }
    options: dict[str, str] = {"target_format": target_format, "reduction": "sum_classes"}
    parts = [part.requires_grad_() for part in (x, w, b)]
    target = targets[target_format]

    def step() -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = F.linear_sigmoid_cross_entropy(x, w, target, b, chunk_bytes=chunk_bytes, **options)  # type: ignore[arg-type]
        return loss, torch.autograd.grad(loss, parts)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, gradients = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    made = sum(part.nbytes for part in parts)
    # x in float32, a product to add to it, its gradient; lists of indices; the allocator's rounding
    assert torch.cuda.max_memory_allocated() - before <= made + chunk_bytes + 4 * rows * features * 4 + 2**17

    whole = [part.detach().double().requires_grad_() for part in parts]
    logits = nn.functional.linear(*whole)
    expected = F.sigmoid_cross_entropy(logits, target, **options)  # type: ignore[arg-type]
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    for ours, exact in zip(gradients, torch.autograd.grad(expected, whole), strict=True):
        size = exact.abs().max().item()
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("loss", [fused_sce.BCEWithLogitsLoss(), fused_sce.MultiLabelSoftMarginLoss()])
def test_memory_is_the_gradient_and_nothing_else(loss: nn.Module) -> None:
    x = torch.randn(1024, 4096, device=CUDA, requires_grad=True)
    t = labels((1024, 4096))
    loss(x, t).backward()  # the stream's workspace
    x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss(x, t).backward()
    scalars = 4 * 512  # the loss and the root gradient, each in an allocation of at least 512 bytes
    assert torch.cuda.max_memory_allocated() - before <= x.numel() * x.element_size() + scalars
    x.grad = None
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        loss(x, t)
    assert torch.cuda.max_memory_allocated() - before <= scalars


def test_upstream_gradient_stays_on_the_gpu() -> None:
    x = torch.randn(333, 1001, device=CUDA, requires_grad=True)
    t = labels((333, 1001))
    _, plain = loss_and_gradient(x, t)
    for factor in (2.0, -0.5, 0.0):
        loss = F.binary_cross_entropy_with_logits(x, t)
        (scaled,) = torch.autograd.grad(loss * factor, x)
        assert torch.equal(scaled, plain * factor)


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(300, 1000, device="cuda:1")
    t = torch.randint(0, 2, (300, 1000), device="cuda:1")
    assert torch.cuda.current_device() == 0
    loss, gradient = loss_and_gradient(x, t)
    first_loss, first_gradient = loss_and_gradient(x.to("cuda:0"), t.to("cuda:0"))
    assert torch.cuda.current_device() == 0
    assert torch.equal(loss.cpu(), first_loss.cpu())
    assert torch.equal(gradient.cpu(), first_gradient.cpu())


def test_a_subclass_gets_the_same() -> None:
    class Subclass(Tensor):
        pass

    x = torch.randn(64, 80, device=CUDA)
    t = labels((64, 80))
    loss, gradient = loss_and_gradient(x, t)
    leaf = x.as_subclass(Subclass).requires_grad_()  # type: ignore[no-untyped-call]
    again = F.binary_cross_entropy_with_logits(leaf, t)
    assert torch.equal(again.as_subclass(Tensor), loss)  # type: ignore[no-untyped-call]
    (again_gradient,) = torch.autograd.grad(again, leaf, torch.ones_like(again))
    assert torch.equal(again_gradient.as_subclass(Tensor), gradient)
