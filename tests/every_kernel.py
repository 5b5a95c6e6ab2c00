"""Run every CUDA kernel once on little data: what `make gpu-check` runs under compute-sanitizer.

Data is made on the CPU and copied, results are copied back: so the only kernels of any number are ours. torch's caching
allocator is switched off, so that each tensor is an allocation whose ends the sanitizer knows.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read when torch first allocates

import torch

import fused_sce  # noqa: F401  registers the ops

ops = torch.ops.fused_sce

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TARGETS = (*FLOATS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# One element; a block with a ragged end; several blocks, so that the last to finish adds up.
SHAPES = ((1, 1), (3, 5), (37, 1003))
LAYOUTS = ("contiguous", "per class", "strided")
FOCUSES = ({"gamma_pos": 1.0, "gamma_neg": 4.0, "clip": 0.05}, {"gamma_pos": 2.5, "gamma_neg": 2.5, "alpha": 0.25})


def on_gpu(shape: tuple[int, ...], dtype: torch.dtype, shift: int) -> torch.Tensor:
    """Numbers in [0, 2) that begin `shift` elements behind an aligned address."""
    count = 1
    for size in shape:
        count *= size
    values = (torch.rand(count + shift) * 2).to(dtype).cuda()
    return values[shift:].view(shape)


def run(
    shape: tuple[int, int], dtype: torch.dtype, target_dtype: torch.dtype, layout: str, shift: int, **options: Any
) -> None:
    """Every op on one combination."""
    x = on_gpu(shape, dtype, shift)
    t = on_gpu(shape, target_dtype, shift)
    if options:
        t = t.clamp(max=1)  # the powers of a focal loss need targets in [0, 1]
    weight = pos_weight = None
    if layout == "per class":
        weight, pos_weight = on_gpu(shape[1:], torch.float32, 0), on_gpu(shape[1:], dtype, 0)
    elif layout == "strided":
        x = on_gpu((shape[1], shape[0]), dtype, shift).t()
        weight, pos_weight = on_gpu((shape[0], 1), torch.float32, 0), on_gpu(shape, dtype, 0)
    results = [ops.sigmoid_cross_entropy(x, t, weight, pos_weight, **options)]
    for count in (None, torch.tensor([5]).cuda()):
        tensors = (x, t, weight, pos_weight, count)
        for reduction in ("rows", "sum"):
            results.append(ops.sigmoid_cross_entropy(*tensors, reduction=reduction, divisor=7, **options))
        total, gradient = ops._sigmoid_cross_entropy_forward(*tensors, reduction="sum", divisor=7, **options)
        if gradient.is_cuda:
            ops._scale_(gradient, torch.tensor(0.5).cuda())
        results += [total, gradient]
        for upstream in (on_gpu((), torch.float32, 0), on_gpu(shape, dtype, 0)):
            results.append(ops._sigmoid_cross_entropy_backward(upstream, *tensors, divisor=7, **options))
    if x.is_contiguous():
        in_place = x.clone()
        tensors = (in_place, t, weight, pos_weight)
        results.append(ops._sigmoid_cross_entropy_forward_out(*tensors, reduction="sum", gradient=in_place, **options))
        results.append(in_place)
    for result in results:
        assert not result.cpu().isnan().any()


def run_format(shape: tuple[int, int], dtype: torch.dtype, target_format: str) -> None:
    """The public op on targets that are given row by row."""
    rows, columns = shape
    x = on_gpu(shape, dtype, 0)
    first = torch.zeros(rows, dtype=torch.long)
    others: dict[str, Any] = {}
    target = {
        "class_index": first + columns - 1,
        "packed": torch.ones(rows, (columns + 7) // 8, dtype=torch.uint8),
        "index_list": torch.stack([first, first - 1], -1),
        "csr": torch.rand(rows),
    }[target_format].cuda()
    if target_format == "csr":
        others = {"columns": first.cuda(), "rows": torch.arange(rows + 1).cuda()}
    for reduction in ("none", "rows", "sum"):
        for focus in ({}, FOCUSES[0]):
            loss = ops.sigmoid_cross_entropy(
                x, target, reduction=reduction, target_format=target_format, check_target=True, **others, **focus
            )
            assert not loss.cpu().isnan().any()


def main() -> None:
    """Every combination; alignment alternates."""
    count = 0
    for shape, dtype, target_dtype, layout in itertools.product(SHAPES, FLOATS, TARGETS, LAYOUTS):
        run(shape, dtype, target_dtype, layout, shift=count % 2)
        count += 1
    for shape, dtype, layout, focus in itertools.product(SHAPES, FLOATS, LAYOUTS, FOCUSES):
        run(shape, dtype, torch.float32, layout, count % 2, **focus)
        count += 1
    for shape, dtype, target_format in itertools.product(
        SHAPES, FLOATS, ("class_index", "packed", "index_list", "csr")
    ):
        run_format(shape, dtype, target_format)
        count += 1
    torch.cuda.synchronize()
    print(f"{count} combinations")


if __name__ == "__main__":
    main()
