"""How the ops work on `torch.distributed.tensor.DTensor`: which placements of the arguments give which of the result.

The logits stay where they are and each rank computes its own shard of them; what is placed otherwise is moved to them.
A sum over sharded logits is `Partial("sum")`: its divisor is made of global sizes, so it is exact on uneven shards,
where an average of the ranks' means is not.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_sce import _autograd
from fused_sce._torch_private import decide_by_options, is_transforming, unwrapped

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

    from fused_sce._torch_private import DTensorSpec, OpOverload

    # Over one mesh dimension: the placements of the results and of the arguments, None for one that is no tensor.
    Strategy = tuple[Sequence[Placement], Sequence[Placement | None]]

dtensor_class: type[DTensor] | None = None
"""The class, None until `register` finds it imported: until then no tensor is one."""


def dtensor_of(tensor: Tensor) -> DTensor | None:
    """The DTensor that a tensor is, or wraps inside a transform of `torch.func`; None: neither."""
    if dtensor_class is None:
        return None
    if is_transforming():
        if torch.compiler.is_compiling():
            return None  # Dynamo does not trace what looks inside.
        tensor = unwrapped(tensor)
    return tensor if isinstance(tensor, dtensor_class) else None


def register() -> None:
    """Register the strategies if `torch.distributed.tensor` is imported.

    Importing it would add a second to `import fused_sce`, and few need it. So this is called when a tensor subclass
    comes along.
    """
    if "torch.distributed.tensor" in sys.modules:
        _register()


def register_for(*tensors: Tensor) -> None:
    """Register the strategies if one of the tensors is a DTensor.

    The op asks for no more. A compiler calls it with subclasses of its own, and must not find `dtensor_class` changed
    when it traces the same code again.
    """
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and any(isinstance(tensor, distributed.DTensor) for tensor in tensors):
        _register()


@functools.cache
def _register() -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental import register_sharding

    ops = torch.ops.fused_sce
    strategies: tuple[tuple[OpOverload, Callable[..., list[Strategy]]], ...] = (
        (ops.sigmoid_cross_entropy.default, _loss),
        (ops._sigmoid_cross_entropy_backward.default, _backward),
    )
    for op, strategy in strategies:
        register_sharding(op)(strategy)
        decide_by_options(op)

    global dtensor_class
    dtensor_class = DTensor


def _loss(input: DTensorSpec, *rest: Any, reduction: str = "none", **_: object) -> list[Strategy]:
    return [
        ([_reduced(placement, input, reduction)], _arguments(placement, input, *rest))
        for placement in _placements(input)
    ]


def _backward(grad_output: DTensorSpec, input: DTensorSpec, *rest: Any) -> list[Strategy]:
    return [
        ([placement], [*beside(placement, input, grad_output), *_arguments(placement, input, *rest)])
        for placement in _placements(input)
    ]


def _arguments(placement: Placement, input: DTensorSpec, *rest: Any) -> list[Placement | None]:
    """The placements of all arguments for this one of the logits. The count of one element broadcasts as a weight."""
    others = len(_autograd.TENSORS) - 1
    tensors, options = rest[:others], rest[others:]
    return [placement, *beside(placement, input, *tensors), *[None] * len(options)]


def _reduced(placement: Placement, input: DTensorSpec, reduction: str) -> Placement:
    """The placement of the loss."""
    from torch.distributed.tensor import Partial

    adds_up = reduction == "sum" or (reduction == "rows" and placement.is_shard(input.ndim - 1))
    return Partial() if adds_up and placement.is_shard() else placement


def _placements(logits: DTensorSpec) -> list[Placement]:
    """The placements that the logits may have over one mesh dimension, the preferred ones first.

    Only those that they have: then they never move, unless another one fits the other tensors better over a second
    mesh dimension. All, if they have one that the formula cannot take: it is not linear, so `Partial` is reduced first.
    """
    from torch.distributed.tensor import Replicate, Shard

    # Of strategies that cost the same DTensor takes the first. Sharding a replicated tensor costs nothing, but would
    # shard the gradient as well; and targets are more often sharded by batch than by class where logits are not.
    usual: list[Placement] = [Replicate(), *(Shard(dim) for dim in reversed(range(logits.ndim)))]
    ranks: Counter[Placement] = Counter()  # over how many each one divides the logits
    for size, placement in zip(logits.mesh.shape, logits.placements, strict=True):
        ranks[placement] = size * (ranks[placement] or 1)
    # DTensor makes no strategy of a shard that is surely empty on some rank.
    possible = all(
        placement in usual and not (isinstance(placement, Shard) and logits.shape[placement.dim] < count)
        for placement, count in ranks.items()
    )
    return [placement for placement in usual if placement in ranks] if possible else usual


def beside(placement: Placement, logits: DTensorSpec, *tensors: DTensorSpec | None) -> list[Placement | None]:
    """The placement of each tensor, which broadcasts to the logits, that goes with this one of theirs."""
    from torch.distributed.tensor import Replicate, Shard

    beside: list[Placement | None] = []
    for tensor in tensors:
        if tensor is None:
            beside.append(None)
            continue
        dim = placement.dim - (logits.ndim - tensor.ndim) if isinstance(placement, Shard) else -1
        beside.append(Shard(dim) if dim >= 0 and tensor.shape[dim] != 1 else Replicate())
    return beside
