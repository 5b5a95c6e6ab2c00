"""Fake kernels, autograd, autocast and vmap rules: what the stable ABI cannot register."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_sce import _autograd, _checks, _sharding, reference
from fused_sce._torch_private import (
    DispatchKeySet,
    after_autocast,
    after_autograd,
    is_any_autocast_enabled,
    is_dense,
    is_differentiating,
    is_forward_mode,
    redispatch_of,
    schema_of,
)

_NAME = "fused_sce::sigmoid_cross_entropy"
_op = torch.ops.fused_sce.sigmoid_cross_entropy.default
_redispatch = redispatch_of(_op)


# Fakes: shape and dtype of what an op returns, for torch.compile, torch.export and meta tensors. Forward with its
# gradient and the ops that write into given memory have none: only plain tensors with memory come to them.


@torch.library.register_fake(_NAME)
def _fake_loss(*args: Any, **options: Any) -> Tensor:
    tensors = dict(zip(_autograd.TENSORS, args, strict=False))
    target_format, reduction = options.get("target_format", "dense"), options.get("reduction", "none")
    _checks.check_tensors(tensors, target_format)
    _checks.check_reduction(reduction, ("none", "rows", "sum"))
    input = tensors["input"]
    dtype = reference.result_dtype(input, tensors["target"], options.get("dtype"))
    if reduction == "none":
        return _in_layout_of(input, dtype, target_format)
    result: Tensor = input.new_empty(input.shape[:-1] if reduction == "rows" else (), dtype=dtype)
    return result


@torch.library.register_fake("fused_sce::_sigmoid_cross_entropy_backward")
def _fake_backward(grad_output: Tensor, *args: Any) -> Tensor:
    names = dict(zip((*_autograd.TENSORS, *_autograd.OPTIONS), args, strict=False))
    return _in_layout_of(names["input"], names["input"].dtype, names.get("target_format", "dense"))


def _in_layout_of(input: Tensor, dtype: torch.dtype, target_format: str) -> Tensor:
    """A tensor that lies in memory as the input does, row-major if that has gaps or overlaps or targets have rows."""
    if is_dense(input) and target_format == "dense":
        return torch.empty_like(input, dtype=dtype)
    return input.new_empty(input.shape, dtype=dtype)


# Autograd of the op itself. The functions of fused_sce.functional do not come this way, but compiled and exported
# programs do.

_library = torch.library.Library("fused_sce", "IMPL")


def _autograd_kernel(keyset: DispatchKeySet, *args: Any, **kwargs: Any) -> Tensor:
    tensors = (*args, *[None] * (len(_autograd.TENSORS) - len(args)))
    input, target, *_ = tensors
    defaults = schema_of(_op).arguments[len(tensors) :]
    options = tuple(kwargs.get(argument.name, argument.default_value) for argument in defaults)
    if type(input) is not Tensor or type(target) is not Tensor:
        _sharding.register_for(input, target)
    try:
        if is_differentiating() or is_forward_mode():
            return reference.sigmoid_cross_entropy(*tensors, *options)
        if _autograd.needs_graph(tensors):
            return _autograd.loss(tensors, options)
        value: Tensor = _redispatch(keyset & after_autograd, *tensors, **kwargs)
        return value
    except Exception:
        named = dict(zip(_autograd.TENSORS, tensors, strict=True))
        _checks.check_tensors(named, kwargs.get("target_format", "dense"))
        _checks.check_targets(named, kwargs)
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

    def kernel(keyset: DispatchKeySet, input: Tensor, target: Tensor, *rest: Any, **options: Any) -> Tensor:
        if options.get("dtype") is None:
            options["dtype"] = autocast_dtype(input, target)
        value: Tensor = _redispatch(keyset & below, input, target, *rest, **options)
        return value

    _library.impl("sigmoid_cross_entropy", kernel, key, with_keyset=True)


for _key in ("AutocastCPU", "AutocastCUDA"):
    _register_autocast(_key)


# vmap: one call of the kernel for the whole batch.


@torch.library.register_vmap(_NAME)
def _vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor | None, **options: Any) -> tuple[Tensor, int]:
    if options.get("target_format", "dense") != "dense":
        raise NotImplementedError("vmap needs dense targets: reference.dense_target makes them")
    # The batch dimension first, of size 1 where all samples share a tensor.
    batched = [
        None if tensor is None else tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims, strict=False)
    ]
    arguments = [*batched, *[None] * (len(_autograd.TENSORS) - len(batched))]
    count, arguments[4] = arguments[4], None
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
    loss: Tensor = _op(*arguments, **options)
    if count is not None:
        loss = loss / count.reshape(-1, *(1,) * (loss.dim() - 1)).clamp(min=1)
    return loss, 0
