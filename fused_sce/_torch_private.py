"""The private functions of torch that this package calls, so that a new torch breaks one file.

Each is named with what it is for; the public way is taken wherever there is one (torch 2.11 to 2.15). Private
attributes that are as good as public, `Tensor._base` for example, stand where they are used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, _prims_common
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.nn import _reduction

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Loss = TypeVar("Loss", bound=Any)

after_autograd = torch._C._after_autograd_keyset
"""The dispatch keys that come after autograd."""
below_autograd = torch._C._AutoDispatchBelowAutograd
"""A context in which ops are called past autograd."""
is_any_autocast_enabled = torch._C._is_any_autocast_enabled
is_tracing = torch._C._is_tracing
"""Whether `torch.jit.trace` is running."""
is_transforming = torch._C._are_functorch_transforms_active
"""Whether the call is inside a transform of `torch.func`."""
without_transforms = torch._C._DisableFuncTorch
"""A context in which the transforms of `torch.func` do not see what is called."""
legacy_reduction = _reduction.legacy_get_string
"""The reduction that torch's deprecated `size_average` and `reduce` mean."""


is_dense = _prims_common.is_non_overlapping_and_dense_or_false
"""Whether a tensor's elements fill a block of memory, each once."""


def after_autocast(key: str) -> torch._C.DispatchKeySet:
    """The dispatch keys that come after an autocast key."""
    return torch._C._dispatch_keyset_full_after(getattr(torch._C.DispatchKey, key))


def direct_call(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The function that an op calls, without the Python frame around it (0.25 us)."""
    call: Callable[..., Any] = op._op
    return call


def is_forward_mode() -> bool:
    """Whether forward-mode AD is on."""
    return forward_ad._current_level >= 0


def is_differentiating() -> bool:
    """Whether the call is inside a transform of `torch.func` other than vmap: grad, vjp, jvp, ..."""
    return is_transforming() and any(
        level.key() != _functorch.TransformType.Vmap for level in _functorch.get_interpreter_stack() or ()
    )


def is_batched(tensor: Tensor) -> bool:
    """Whether vmap batches the tensor, that of `torch.func` or that of `is_grads_batched`."""
    return _functorch.is_batchedtensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read now: no subclass, not batched by vmap, not traced."""
    return (
        type(tensor) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._has_storage(tensor)
        and torch._C._len_torch_dispatch_stack() == 0
    )


def is_plain_eager() -> bool:
    """Whether no transform, trace, autocast, forward-mode AD or export looks at the call."""
    return not (
        is_transforming() or is_tracing() or is_any_autocast_enabled() or is_forward_mode() or is_exporting_to_onnx()
    )


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor inside the wrappers of `torch.func`'s transforms."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def is_exporting_to_onnx() -> bool:
    """Whether `torch.onnx.export` is running. Does not import `torch.onnx`, which takes 24 ms (torch 2.14)."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def refuse_torchscript(loss: Loss) -> Loss:
    """Make `torch.jit.script` of a function, or of a module of a class, an error that says what to do instead."""

    def refuse(*_: object) -> None:
        raise RuntimeError(
            f"{loss.__module__}.{loss.__name__} cannot be scripted. Use torch.compile to make it part of a faster "
            "program, or torch.export to save one"
        )

    loss.__prepare_scriptable__ = refuse
    return loss


def decide_by_options(op: torch._ops.OpOverload) -> None:
    """Make DTensor's cache of sharding decisions look at all arguments and options of an op.

    By default it looks at the DTensors alone, and confuses a call with `weight` and one with `pos_weight` (torch 2.11).
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    options = [argument.name for argument in op._schema.arguments if argument.kwarg_only]
    schema_info = RuntimeSchemaInfo(static_argnum=0, static_kwargkey=options, needs_pytree=True)
    DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[op] = schema_info


def place_of_shard(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of this rank's part of a DTensor, and where it begins in the whole."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)


def allows_implicit_replication(tensor: DTensor) -> bool:
    """Whether DTensor takes plain tensors for replicated ones now."""
    return bool(tensor._op_dispatcher._allow_implicit_replication)


def let_compiler_inline(names: Iterable[str], inline: bool) -> None:
    """Make `torch.compile` trace functions of `torch.nn.functional`, or take a call of one for a node, as by default.

    A node is known by its name alone, in torch's cache of compiled graphs on disk too (AOTAutogradCache, torch 2.11 to
    2.14): it would mix up processes in which the function does different things. Imports torch._dynamo, which takes
    1.3 s; any optimizer does so too.
    """
    from torch._dynamo import trace_rules
    from torch._dynamo.variables import TorchInGraphFunctionVariable, UserFunctionVariable

    rules: dict[str, Any] = trace_rules.torch_non_c_binding_in_graph_functions
    for name in names:
        rules[f"torch.nn.functional.{name}"] = UserFunctionVariable if inline else TorchInGraphFunctionVariable
    trace_rules.get_torch_obj_rule_map.cache_clear()
