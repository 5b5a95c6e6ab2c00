"""Run every CUDA kernel once on little data: what `make gpu-check` runs under compute-sanitizer.

Data is made on the CPU and copied, results are copied back: so the only kernels of any number are ours. torch's caching
allocator is switched off, so that each tensor is an allocation whose ends the sanitizer knows.
"""

from __future__ import annotations

import itertools
import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read when torch first allocates

import torch

import fused_sce  # noqa: F401  registers the ops

ops = torch.ops.fused_sce

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TARGETS = (*FLOATS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# One element; a block with a ragged end; several blocks, so that the last to finish adds up.
SHAPES = ((1, 1), (3, 5), (37, 1003))


def on_gpu(shape: tuple[int, ...], dtype: torch.dtype, shift: int) -> torch.Tensor:
    """Numbers in [0, 2) that begin `shift` elements behind an aligned address."""
    count = 1
    for size in shape:
        count *= size
    values = (torch.rand(count + shift) * 2).to(dtype).cuda()
    return values[shift:].view(shape)


def run(shape: tuple[int, int], dtype: torch.dtype, target_dtype: torch.dtype, layout: str, shift: int) -> None:
    """Every op on one combination."""
    x = on_gpu(shape, dtype, shift)
    t = on_gpu(shape, target_dtype, shift)
    weight = pos_weight = None
    if layout == "per class":
        weight, pos_weight = on_gpu(shape[1:], torch.float32, 0), on_gpu(shape[1:], dtype, 0)
    elif layout == "strided":
        x = on_gpu((shape[1], shape[0]), dtype, shift).t()
        weight, pos_weight = on_gpu((shape[0], 1), torch.float32, 0), on_gpu(shape, dtype, 0)
    results = [ops.sigmoid_cross_entropy(x, t, weight, pos_weight)]
    for count in (None, torch.tensor([5]).cuda()):
        tensors = (x, t, weight, pos_weight, count)
        for reduction in ("rows", "sum"):
            results.append(ops.sigmoid_cross_entropy(*tensors, reduction=reduction, divisor=7))
        total, gradient = ops._sigmoid_cross_entropy_forward(*tensors, reduction="sum", divisor=7)
        if gradient.is_cuda:
            ops._scale_(gradient, torch.tensor(0.5).cuda())
        results += [total, gradient]
        for upstream in (on_gpu((), torch.float32, 0), on_gpu(shape, dtype, 0)):
            results.append(ops._sigmoid_cross_entropy_backward(upstream, *tensors, divisor=7))
    if x.is_contiguous():
        in_place = x.clone()
        tensors = (in_place, t, weight, pos_weight)
        results.append(ops._sigmoid_cross_entropy_forward_out(*tensors, reduction="sum", gradient=in_place))
        results.append(in_place)
    for result in results:
        assert not result.cpu().isnan().any()


def main() -> None:
    """Every combination; alignment alternates."""
    count = 0
    for shape, dtype, target_dtype, layout in itertools.product(
        SHAPES, FLOATS, TARGETS, ("contiguous", "per class", "strided")
    ):
        run(shape, dtype, target_dtype, layout, shift=count % 2)
        count += 1
    torch.cuda.synchronize()
    print(f"{count} combinations")


if __name__ == "__main__":
    main()
