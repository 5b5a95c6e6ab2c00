"""How the ops work on `torch.distributed.tensor.DTensor`: which placements of the arguments give which of the result.

The logits stay where they are and each rank computes its own shard of them; what is placed otherwise is moved to them.
A sum over sharded logits is `Partial("sum")`: its divisor is made of global sizes, so it is exact on uneven shards,
where an average of the ranks' means is not.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections import Counter
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec
    from torch.distributed.tensor.placement_types import Placement

    # Over one mesh dimension: the placements of the results and of the arguments, None for one that is no tensor.
    Strategy = tuple[list[Placement], list[Placement | None]]

_DTENSOR_MODULE = "torch.distributed.tensor"

dtensor_class: type[DTensor] | None = None
"""The class, None until it is imported: as long as there can be no tensor of it, none need be looked for."""


def dtensor_of(tensor: Tensor) -> DTensor | None:
    """The DTensor that a tensor is, or wraps inside a transform of `torch.func`; None: neither."""
    if dtensor_class is None:
        return None
    if torch._C._are_functorch_transforms_active():
        if torch.compiler.is_compiling():
            return None  # Dynamo does not trace what looks inside.
        while is_functorch_wrapped_tensor(tensor):
            tensor = get_unwrapped(tensor)
    return tensor if isinstance(tensor, dtensor_class) else None


def register_when_imported() -> None:
    """Register the strategies, now if `torch.distributed.tensor` is imported already, else as soon as it is.

    Importing it here would add a second to the 13 ms of `import fused_sce` (torch 2.15) for everybody, and few need it.
    Its import is the one event before every use: between autograd in C++ and DTensor no code of ours is called.
    """
    if _DTENSOR_MODULE in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `torch.distributed.tensor` as the other finders do, and has its loader register the strategies."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _DTENSOR_MODULE:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Loads a module with its own loader, then registers the strategies."""

    def __init__(self, own: importlib.abc.Loader) -> None:
        self._own = own

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Those who ask the module for its source or data ask its loader.
        module.__loader__ = self._own
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        self._own.exec_module(module)
        _register()


def _register() -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    propagator = DTensor._op_dispatcher.sharding_propagator
    ops = torch.ops.fused_sce
    for op, strategies in (
        (ops.sigmoid_cross_entropy.default, _elementwise),
        (ops.sigmoid_cross_entropy_rows.default, _rows),
        (ops.sigmoid_cross_entropy_sum.default, _sum),
        (ops._sigmoid_cross_entropy_sum_with_gradient.default, _sum_with_gradient),
        (ops._sigmoid_cross_entropy_backward.default, _backward),
        (ops._scale_.default, _scale),
    ):
        register_sharding(op)(strategies)
        # DTensor remembers what it decided. Before this argument it looks at tensors alone and takes a call with weight
        # for one with pos_weight (torch 2.11); register_sharding would put it at the first integer, after both.
        propagator.op_to_schema_info[op] = RuntimeSchemaInfo(static_argnum=2, needs_pytree=True)

    global dtensor_class
    dtensor_class = DTensor


def _elementwise(
    input: DTensorSpec,
    target: DTensorSpec,
    weight: DTensorSpec | None = None,
    pos_weight: DTensorSpec | None = None,
    dtype: torch.dtype | None = None,
) -> list[Strategy]:
    return [
        ([placement], [placement, placement, *_beside(placement, input, weight, pos_weight), None])
        for placement in _placements(input)
    ]


def _rows(
    input: DTensorSpec,
    target: DTensorSpec,
    weight: DTensorSpec | None = None,
    pos_weight: DTensorSpec | None = None,
    divisor: int = 1,
    dtype: torch.dtype | None = None,
) -> list[Strategy]:
    from torch.distributed.tensor import Partial

    return [
        (
            [Partial() if placement.is_shard(input.ndim - 1) else placement],
            [placement, placement, *_beside(placement, input, weight, pos_weight), None, None],
        )
        for placement in _placements(input)
    ]


def _sum(
    input: DTensorSpec,
    target: DTensorSpec,
    weight: DTensorSpec | None = None,
    pos_weight: DTensorSpec | None = None,
    divisor: int = 1,
    dtype: torch.dtype | None = None,
) -> list[Strategy]:
    return [
        ([_total(placement)], [placement, placement, *_beside(placement, input, weight, pos_weight), None, None])
        for placement in _placements(input)
    ]


def _sum_with_gradient(
    input: DTensorSpec,
    target: DTensorSpec,
    weight: DTensorSpec | None,
    pos_weight: DTensorSpec | None,
    divisor: int,
    dtype: torch.dtype | None,
) -> list[Strategy]:
    return [
        (
            [_total(placement), placement],
            [placement, placement, *_beside(placement, input, weight, pos_weight), None, None],
        )
        for placement in _placements(input)
    ]


def _backward(
    grad_output: DTensorSpec,
    input: DTensorSpec,
    target: DTensorSpec,
    weight: DTensorSpec | None,
    pos_weight: DTensorSpec | None,
    divisor: int,
) -> list[Strategy]:
    strategies: list[Strategy] = []
    for placement in _placements(input):
        upstream, *factors = _beside(placement, input, grad_output, weight, pos_weight)
        strategies.append(([placement], [upstream, placement, placement, *factors, None]))
    return strategies


def _scale(self: DTensorSpec, factor: DTensorSpec) -> list[Strategy]:
    # In place and linear: whatever the placement, each rank scales what it has.
    from torch.distributed.tensor import Replicate

    return [([], [placement, Replicate()]) for placement in dict.fromkeys(self.placements)]


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


def _beside(placement: Placement, logits: DTensorSpec, *tensors: DTensorSpec | None) -> list[Placement | None]:
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


def _total(placement: Placement) -> Placement:
    """The placement of a sum over all logits."""
    from torch.distributed.tensor import Partial

    return Partial() if placement.is_shard() else placement
