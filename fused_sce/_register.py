"""Fake kernels, autograd, autocast and vmap rules: what the stable ABI cannot register."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_sce import _autograd, _checks, _sharding, reference
from fused_sce._torch_private import (
    after_autocast,
    after_autograd,
    is_any_autocast_enabled,
    is_dense,
    is_differentiating,
    is_forward_mode,
)

_NAME = "fused_sce::sigmoid_cross_entropy"
_op = torch.ops.fused_sce.sigmoid_cross_entropy.default


# Fakes: shape and dtype of what an op returns, for torch.compile, torch.export and meta tensors. Forward with its
# gradient and the ops that write into given memory have none: only plain tensors with memory come to them.


@torch.library.register_fake(_NAME)
def _fake_loss(
    input: Tensor, target: Tensor, *rest: Any, reduction: str = "none", dtype: torch.dtype | None = None, **_: object
) -> Tensor:
    _checks.check_tensors(input, target, *(*rest, None, None)[:2])
    _checks.check_reduction(reduction, ("none", "rows", "sum"))
    dtype = reference.result_dtype(input, target, dtype)
    if reduction == "none":
        return _in_layout_of(input, dtype)
    return input.new_empty(input.shape[:-1] if reduction == "rows" else (), dtype=dtype)


@torch.library.register_fake("fused_sce::_sigmoid_cross_entropy_backward")
def _fake_backward(grad_output: Tensor, input: Tensor, *rest: object) -> Tensor:
    return _in_layout_of(input, input.dtype)


def _in_layout_of(input: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor that lies in memory as the input does, row-major if that has gaps or overlaps."""
    if is_dense(input):
        return torch.empty_like(input, dtype=dtype)
    return input.new_empty(input.shape, dtype=dtype)


# Autograd of the op itself. The functions of fused_sce.functional do not come this way, but compiled and exported
# programs do.

_library = torch.library.Library("fused_sce", "IMPL")


def _autograd_kernel(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Tensor:
    tensors: Any = (*args, *_autograd.NO_TENSORS)[:7]
    input, target, weight, pos_weight, _, mask, alpha = tensors
    options = tuple(kwargs.get(argument.name, argument.default_value) for argument in _op._schema.arguments[7:])
    if type(input) is not Tensor or type(target) is not Tensor:
        _sharding.register_for(input, target)
    try:
        if is_differentiating() or is_forward_mode():
            return reference.sigmoid_cross_entropy(*tensors, *options)
        if _autograd.needs_graph(tensors):
            return _autograd.loss(tensors, options)
        value: Tensor = _op.redispatch(keyset & after_autograd, *tensors, **kwargs)
        return value
    except Exception:
        _checks.check_tensors(input, target, weight, pos_weight, mask, alpha)
        _checks.check_labels(target, mask, kwargs.get("ignore_value"))
        raise


_library.impl("sigmoid_cross_entropy", _autograd_kernel, "Autograd", with_keyset=True)


# Autocast reads the logits in their own dtype, where torch first copies them to float32, and gives a float32 loss
# (float64 for a float64 target, as torch).


def autocast_dtype(input: Tensor, target: Tensor) -> torch.dtype | None:
    """The dtype of the loss where autocast decides it; None: elsewhere."""
    device = input.device.type
    if not (
        is_any_autocast_enabled() and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    ):
        return None
    return torch.float64 if target.dtype == torch.float64 else torch.float32


def _register_autocast(key: str) -> None:
    below = after_autocast(key)

    def kernel(keyset: torch._C.DispatchKeySet, input: Tensor, target: Tensor, *rest: Any, **options: Any) -> Tensor:
        if options.get("dtype") is None:
            options["dtype"] = autocast_dtype(input, target)
        value: Tensor = _op.redispatch(keyset & below, input, target, *rest, **options)
        return value

    _library.impl("sigmoid_cross_entropy", kernel, key, with_keyset=True)


for _key in ("AutocastCPU", "AutocastCUDA"):
    _register_autocast(_key)


# vmap: one call of the kernel for the whole batch.


@torch.library.register_vmap(_NAME)
def _vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor | None, **options: Any) -> tuple[Tensor, int]:
    # The batch dimension first, of size 1 where all samples share a tensor.
    batched = [
        None if tensor is None else tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims, strict=False)
    ]
    *arguments, count, mask, alpha = (*batched, *_autograd.NO_TENSORS)[:7]
    arguments += [mask, alpha]
    assert arguments[0] is not None
    sample = arguments[0].shape[1:]
    is_sum = options.get("reduction") == "sum"
    if is_sum:
        options["reduction"] = "rows"  # a sample is a row of the batch
    for place, tensor in enumerate(arguments):
        if tensor is None:
            continue
        missing = (1,) * (len(sample) + 1 - tensor.dim())
        aligned = tensor.reshape(len(tensor), *missing, *tensor.shape[1:])
        if place < 2:
            aligned = aligned.expand(info.batch_size, *aligned.shape[1:])
        arguments[place] = aligned.expand(-1, *sample).reshape(len(aligned), -1) if is_sum else aligned
    *arguments, mask, alpha = arguments
    loss: Tensor = _op(*arguments, None, mask, alpha, **options)
    if count is not None:
        loss = loss / count.reshape(-1, *(1,) * (loss.dim() - 1)).clamp(min=1)
    return loss, 0
