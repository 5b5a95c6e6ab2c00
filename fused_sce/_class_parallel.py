"""The linear layer and its loss where DTensors divide the labels, or the batch, among processes.

Each rank computes the chunks of its own labels. Between the ranks go the gradient by the input, once, and the loss, a
scalar. Where the same dimension of the mesh divides the batch, the features of the other ranks are gathered first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.nn import functional as F

from fused_sce import _autograd, _linear
from fused_sce._calls import Call
from fused_sce._sharding import beside
from fused_sce._torch_private import place_of_shard

Placements = list[Placement]


def loss(layer: _linear.Layer, dtype: torch.dtype, chunk_bytes: int, describe: Callable[[Tensor], Call]) -> Tensor:
    """The loss of a layer whose weight is a DTensor: a DTensor if the input is one, else a plain tensor.

    A plain argument is the whole, the same on every rank.

    Raises:
        RuntimeError: Placements do not go together.
        ValueError: The shards are not those of a tensor of this shape.
    """
    weight, bias = _checked(layer)
    mesh, of_weight = weight.device_mesh, list(weight.placements)
    is_sharded_input = isinstance(layer.input, DTensor)
    input = _on_mesh("input", layer.input, mesh)
    of_input = _placements_of(input, of_weight)
    by_batch, by_label = ([own.is_shard() for own in placements] for placements in (of_input, of_weight))
    layer = _linear.Layer(
        input.redistribute(placements=of_input).to_local(grad_placements=_with_sums(of_input, by_label)),
        weight.to_local(grad_placements=_with_sums(of_weight, by_batch)),
        None if bias is None else bias.to_local(grad_placements=_with_sums(of_weight, by_batch)),
    )
    tensors, options, _ = describe(_linear.stand_in(_plain(input), dtype, len(weight)))
    _linear.check_loss(tuple(_plain(tensor) for tensor in tensors), options)
    options = _linear.with_dtype(tensors, options)
    of_logits = [Shard(input.ndim - 1) if is_label else own for is_label, own in zip(by_label, of_input, strict=True)]
    (own_labels, _), (begin, _) = place_of_shard(weight)
    if own_labels != len(layer.weight):
        raise ValueError(
            f"the shards of weight do not cover its {len(weight)} labels: this rank's has {len(layer.weight)} of them, "
            f"not {own_labels}, as torch.distributed.tensor.distribute_tensor makes them"
        )
    span = begin, begin + len(layer.weight), len(weight)
    own_logits = _linear.stand_in(layer.input, dtype, len(layer.weight))
    tensors, options = _own(mesh, tensors, options, of_logits, span, own_logits)

    added_up = [labels or batch for labels, batch in zip(by_label, by_batch, strict=True)]
    of_sum = _with_sums([Replicate()] * mesh.ndim, added_up)
    tensors = _linear.counted(layer, chunk_bytes, tensors, options)
    if tensors[4] is not None:
        count = DTensor.from_local(tensors[4], mesh, of_sum).full_tensor()
        tensors = *tensors[:4], count, *tensors[5:]
    value = DTensor.from_local(_linear.computed(layer, chunk_bytes, tensors, options), mesh, of_sum)
    if is_sharded_input:
        return value.redistribute(placements=[Replicate()] * mesh.ndim)
    return value.full_tensor()


def topk(layer: _linear.Layer, k: int, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row and their labels (..., k): DTensors if the input is one, else plain tensors."""
    weight, bias = _checked(layer)
    mesh, of_weight = weight.device_mesh, list(weight.placements)
    input = _on_mesh("input", layer.input.detach(), mesh)
    of_input = _placements_of(input, of_weight)
    rows = input.redistribute(placements=of_input).to_local()
    own = _linear.Layer(rows, weight.to_local(), None if bias is None else bias.to_local())
    values, labels = _linear.best(own, k, chunk_bytes)
    last, missing = input.ndim - 1, (0, k - values.shape[-1])  # so many of each rank, also where it has fewer labels
    labels = F.pad(labels + place_of_shard(weight)[1][0], missing, value=-1)
    of_parts = [Shard(last) if by.is_shard() else own for own, by in zip(of_input, of_weight, strict=True)]
    ranks = math.prod(size for size, by in zip(mesh.shape, of_weight, strict=True) if by.is_shard())

    def whole(part: Tensor, placements: Placements, columns: int) -> DTensor:
        like = torch.empty(*input.shape[:-1], columns, device="meta")  # also for shards of different sizes
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())

    values, labels = (
        whole(part, of_parts, ranks * k).redistribute(placements=of_input).to_local()
        for part in (F.pad(values, missing), labels)
    )
    values, order = values.masked_fill(labels < 0, -math.inf).sort(dim=-1, descending=True, stable=True)
    labels = labels.gather(-1, order)
    order = (labels < 0).int().sort(dim=-1, stable=True).indices[..., :k]  # what is missing is last
    values, labels = values.gather(-1, order), labels.gather(-1, order)
    if isinstance(layer.input, DTensor):
        values, labels = (whole(part, of_input, k) for part in (values, labels))
    return values, labels


def _placements_of(input: DTensor, of_weight: Placements) -> Placements:
    """Those that the input takes: where the labels are divided each rank needs the features of all rows.

    Raises:
        RuntimeError: It is sharded by feature, or has parts that are still to be added up.
    """
    placements = [
        own if by.is_replicate() else Replicate() for own, by in zip(input.placements, of_weight, strict=True)
    ]
    if any(not own.is_replicate() and not (isinstance(own, Shard) and own.dim < input.ndim - 1) for own in placements):
        raise RuntimeError(f"input must be sharded by batch or replicated, got {tuple(input.placements)}")
    return placements


def _checked(layer: _linear.Layer) -> tuple[DTensor, DTensor | None]:
    """Weight and bias."""
    weight, bias = layer.weight, layer.bias
    if not isinstance(weight, DTensor):
        raise RuntimeError("weight must be a DTensor, as input or bias is: make all of them DTensors on one mesh")
    if any(not (own.is_replicate() or own.is_shard(0)) for own in weight.placements):
        raise RuntimeError(f"weight must be sharded by label, Shard(0), or replicated, got {weight.placements}")
    if bias is None:
        return weight, None
    if not isinstance(bias, DTensor) or bias.placements != weight.placements:
        got = bias.placements if isinstance(bias, DTensor) else "a plain tensor"
        raise RuntimeError(f"bias must be a DTensor with weight's placements {weight.placements}, got {got}")
    return weight, bias


def _with_sums(placements: Placements, added_up: list[bool]) -> Placements:
    """These placements, `Partial` where the ranks' values are still to be added up."""
    return [Partial() if adds else own for own, adds in zip(placements, added_up, strict=True)]


def _on_mesh(name: str, tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """A tensor as a DTensor on the mesh."""
    if not isinstance(tensor, DTensor):
        return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if tensor.device_mesh != mesh:
        raise RuntimeError(f"{name} and weight must be on one mesh, got {tensor.device_mesh} and {mesh}")
    return tensor


def _plain(tensor: Any) -> Any:
    """A plain tensor of a DTensor's shape and dtype, in the memory of one element."""
    if not isinstance(tensor, DTensor):
        return tensor
    element = tensor.to_local().detach().new_empty(())
    return element.requires_grad_(tensor.requires_grad).expand(tensor.shape)


def _own(
    mesh: DeviceMesh,
    tensors: _autograd.Tensors,
    options: _autograd.Options,
    of_logits: Placements,
    span: tuple[int, int, int],
    own_logits: Tensor,
) -> tuple[_autograd.Tensors, _autograd.Options]:
    """The call of the loss of this rank's rows and labels; `span`: where these begin and end, and the number of all."""
    logits: Any
    target: Any
    logits, target, weight, pos_weight, count, mask, alpha, prior, columns, rows = tensors
    last = logits.ndim - 1

    def without_labels(placements: Placements) -> Placements:
        return [
            Replicate() if of_logit.is_shard(last) else own for own, of_logit in zip(placements, of_logits, strict=True)
        ]

    def part_of(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or (tensor.numel() == 1 and not isinstance(tensor, DTensor)):
            return tensor
        whole: Any = _on_mesh(name, tensor, mesh)
        wanted: Any = [beside(placement, logits, whole)[0] for placement in of_logits]
        is_own = all(
            have == want
            for have, want, placement in zip(whole.placements, wanted, of_logits, strict=True)
            if placement.is_shard(last)
        )
        if not is_own:  # the labels as a view: redistribute would copy them
            wanted = without_labels(wanted)
        part: Tensor = whole.redistribute(placements=wanted).to_local()
        return part if is_own or part.shape[-1] == 1 else part[..., slice(*span[:2])]

    factors = part_of("loss_weight", weight), part_of("pos_weight", pos_weight), count, part_of("mask", mask)
    others = part_of("alpha", alpha), part_of("smoothing_prior", prior), columns, rows
    of_target = dict(zip(_autograd.OPTIONS, options, strict=False))
    if of_target.get("target_format", "dense") == "dense":
        return (own_logits, part_of("target", target), *factors, *others), options
    of_rows = without_labels(of_logits)
    if columns is None:
        target = _on_mesh("target", target, mesh).redistribute(placements=of_rows).to_local()
    elif any(placement.is_shard() for placement in of_rows):
        raise RuntimeError("a sparse target does not work with an input sharded by batch: pass an index_list")
    own_logits, target, weight, pos_weight, count, mask, *rest = _linear.flattened(
        (own_logits, target, *factors, *others)
    )
    of_all_labels = target, *[None] * 6, columns, rows
    _linear.check_indices_of(_linear.stand_in(own_logits, own_logits.dtype, span[2]), of_all_labels, of_target)
    (target, *_, counted, _, _, columns, rows), options = _linear.part(of_all_labels, of_target, *span)
    if counted is not None:
        mask = counted if mask is None else mask & counted
    return (own_logits, target, weight, pos_weight, count, mask, *rest[:2], columns, rows), options
