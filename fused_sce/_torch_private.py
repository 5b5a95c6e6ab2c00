"""Every private name of torch that this package uses, so that a new torch breaks one file.

Each is named with what it is for; the public way is taken wherever there is one (torch 2.11 to 2.15).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch._C import _after_autograd_keyset as after_autograd
from torch._C import _AutoDispatchBelowAutograd as below_autograd
from torch._C import _is_any_autocast_enabled as is_any_autocast_enabled
from torch._C import _is_tracing as is_tracing  # by torch.jit.trace
from torch._C._functorch import TransformType, get_interpreter_stack, get_unwrapped, is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.nn._reduction import legacy_get_string as legacy_reduction

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Loss = TypeVar("Loss", bound=Any)

__all__ = [
    "after_autocast",
    "after_autograd",
    "allows_implicit_replication",
    "below_autograd",
    "decide_by_options",
    "direct_call",
    "is_any_autocast_enabled",
    "is_differentiating",
    "is_exporting_to_onnx",
    "is_forward_mode",
    "is_plain_eager",
    "is_tracing",
    "is_transforming",
    "legacy_reduction",
    "refuse_torchscript",
    "unwrapped",
]


def after_autocast(key: str) -> torch._C.DispatchKeySet:
    """The dispatch keys that come after an autocast key."""
    return torch._C._dispatch_keyset_full_after(getattr(torch._C.DispatchKey, key))


def direct_call(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The function that an op calls, without the Python frame around it (0.25 us)."""
    call: Callable[..., Any] = op._op
    return call


is_transforming = torch._C._are_functorch_transforms_active
"""Whether the call is inside a transform of `torch.func`."""


def is_forward_mode() -> bool:
    """Whether forward-mode AD is on."""
    return forward_ad._current_level >= 0


def is_differentiating() -> bool:
    """Whether the call is inside a transform of `torch.func` other than vmap: grad, vjp, jvp, ..."""
    return is_transforming() and any(level.key() != TransformType.Vmap for level in get_interpreter_stack() or ())


def is_plain_eager() -> bool:
    """Whether no transform, trace, autocast, forward-mode AD or export looks at the call."""
    return not (
        is_transforming()
        or is_tracing()
        or is_any_autocast_enabled()
        or forward_ad._current_level >= 0
        or is_exporting_to_onnx()
    )


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor inside the wrappers of `torch.func`'s transforms."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
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

    By default it looks at the DTensors alone, and takes a call with `weight` for one with `pos_weight` (torch 2.11).
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    options = [argument.name for argument in op._schema.arguments if argument.kwarg_only]
    schema_info = RuntimeSchemaInfo(static_argnum=0, static_kwargkey=options, needs_pytree=True)
    DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[op] = schema_info


def allows_implicit_replication(tensor: DTensor) -> bool:
    """Whether DTensor takes plain tensors for replicated ones now."""
    return bool(tensor._op_dispatcher._allow_implicit_replication)
