"""All of torch that is neither public nor documented and that this package uses, so that a new torch breaks one file.

`NAMES` lists it; `tests/test_torch_private.py` looks for each of them, and for private names in other files. The public
way is taken wherever there is one.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.autograd import forward_ad
from torch.nn._reduction import legacy_get_string

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec as DTensorSpec

NAMES = {
    # Dispatch
    "torch._C.DispatchKey": "the key whose kernels come after autocast's",
    "torch._C.DispatchKeySet": "what a kernel registered with_keyset=True is called with; no public name",
    "torch._C._dispatch_keyset_full_after": "the keys that come after autocast; no public way to redispatch",
    "torch._C._after_autograd_keyset": "the keys that come after autograd; no public way to redispatch",
    "torch._C._AutoDispatchBelowAutograd": "ops past autograd; torch.no_grad would still go through it",
    "torch._ops.OpOverload": "the type of torch.ops.library.op.overload; no public name",
    "torch._ops.OpOverload.redispatch": "calls the kernel of a later key; no public way",
    "torch._ops.OpOverload._op": "an op without the Python frame around it, which takes 0.25 us",
    "torch._ops.OpOverload._schema": "names, order and defaults of an op's arguments; no public way",
    # What looks at a call
    "torch._C._is_any_autocast_enabled": "torch.is_autocast_enabled asks for one device type",
    "torch._C._is_tracing": "torch.jit.is_tracing has a Python frame around it",
    "torch._C._are_functorch_transforms_active": "whether torch.func transforms the call; no public way",
    "torch._C._DisableFuncTorch": "a context past the transforms of torch.func; no public way",
    "torch._C._functorch.TransformType.Vmap": "tells vmap from the transforms that differentiate; no public way",
    "torch._C._functorch.get_interpreter_stack": "the transforms around a call; no public way",
    "torch._C._functorch.get_unwrapped": "the tensor inside a transform's wrapper; no public way",
    "torch._C._functorch.is_functorch_wrapped_tensor": "whether a tensor is such a wrapper; no public way",
    "torch._C._functorch.is_batchedtensor": "whether torch.vmap batches a tensor; no public way",
    "torch._C._functorch.is_legacy_batchedtensor": "whether is_grads_batched=True batches a tensor; no public way",
    "torch._C._has_storage": "whether a tensor has memory; what vmap batches has none of its own; no public way",
    "torch._C._len_torch_dispatch_stack": "whether a TorchDispatchMode is on; no public way",
    "torch.autograd.forward_ad._current_level": "whether forward-mode AD is on; no public way",
    # Tensors and modules
    "torch.Tensor._base": "the tensor that a view looks at; no public way",
    "torch.Tensor._version": "counts the changes in place; no public way",
    "torch._assert_async": "an assertion of the device; no public way that does not wait for the GPU",
    "torch._mkldnn": "the layout of MKL-DNN tensors; no public name",
    "torch._prims_common.is_non_overlapping_and_dense_or_false": "whether a tensor fills its memory; no public way",
    "torch.nn.Module._buffers": "a module's buffers; public look-ups pass nn.Module.__getattr__, which takes 1 us",
    "torch.nn._reduction.legacy_get_string": "what size_average and reduce mean, as torch's own losses read them",
    "torch._dynamo.OptimizedModule._orig_mod": "the child of a compiled module",
    "torch.distributed.fsdp.FullyShardedDataParallel._fsdp_wrapped_module": "the child of a module in FSDP",
    # DTensor, imported when one comes along
    "torch.distributed.tensor.DTensor._op_dispatcher": "the two names below",
    "torch.distributed.tensor.DTensor._op_dispatcher._allow_implicit_replication": "whether plain tensors count as "
    "replicated ones; there is only a context manager that switches it",
    "torch.distributed.tensor.DTensor._op_dispatcher.sharding_propagator.op_to_schema_info": "what the cache of "
    "sharding decisions looks at; register_sharding has no option for it",
    "torch.distributed.tensor._op_schema.RuntimeSchemaInfo": "an entry of op_to_schema_info",
    "torch.distributed.tensor._dtensor_spec.DTensorSpec": "the type of what register_sharding's strategies get",
    "torch.distributed.tensor._utils.compute_local_shape_and_global_offset": "where a rank's part lies; no public way",
    # torch.compile, imported by patch_torch alone
    "torch._dynamo.trace_rules.torch_non_c_binding_in_graph_functions": "what torch.compile takes for one node; "
    "torch.compiler.allow_in_graph adds to it, but nothing public takes away",
    "torch._dynamo.trace_rules.get_torch_obj_rule_map": "the cache of these rules",
    "torch._dynamo.variables.TorchInGraphFunctionVariable": "a function that is one node",
    "torch._dynamo.variables.UserFunctionVariable": "a function that is traced",
}
"""What for, and what public thing is missing or falls short."""

Loss = TypeVar("Loss", bound=Any)

DispatchKeySet = torch._C.DispatchKeySet
OpOverload = torch._ops.OpOverload

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
legacy_reduction = legacy_get_string
"""The reduction that torch's deprecated `size_average` and `reduce` mean."""
is_dense = is_non_overlapping_and_dense_or_false
"""Whether a tensor's elements fill a block of memory, each once."""
assert_async = torch._assert_async
"""An assertion of the device, for which nobody waits."""
mkldnn = torch._mkldnn  # type: ignore[attr-defined]
"""The layout of MKL-DNN tensors."""
WRAPPED = ("module", "_orig_mod", "_fsdp_wrapped_module")
"""What the only child of a wrapper is called: DataParallel's and DDP's, torch.compile's, FSDP's."""
base_of: Callable[[Tensor], Tensor | None] = operator.attrgetter("_base")
"""The tensor that a view looks at; None: it is no view."""
version_of: Callable[[Tensor], int] = operator.attrgetter("_version")
"""How often a tensor was changed in place."""


def after_autocast(key: str) -> DispatchKeySet:
    """The dispatch keys that come after an autocast key."""
    return torch._C._dispatch_keyset_full_after(getattr(torch._C.DispatchKey, key))


def direct_call(op: OpOverload) -> Callable[..., Any]:
    """The function that an op calls, without the Python frame around it."""
    call: Callable[..., Any] = op._op
    return call


def redispatch_of(op: OpOverload) -> Callable[..., Any]:
    """The function that calls the kernel of the first of some keys: keys, then the arguments of the op."""
    redispatch: Callable[..., Any] = op.redispatch
    return redispatch


def schema_of(op: OpOverload) -> torch.FunctionSchema:
    """Names, types and defaults of an op's arguments."""
    return op._schema


def factor_of(module: nn.Module, name: str) -> Tensor | None:
    """`module.weight` or its like, past nn.Module.__getattr__, which takes 1 us of the 40 of a small training step.

    A parameter in the buffer's place is found, too.
    """
    buffers = module._buffers
    factor: Tensor | None = buffers[name] if name in buffers else getattr(module, name)
    return factor


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


def decide_by_options(op: OpOverload) -> None:
    """Make DTensor's cache of sharding decisions look at all arguments and options of an op.

    By default it looks at the DTensors alone, and confuses a call with `weight` and one with `pos_weight` (torch 2.11).
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    options = [argument.name for argument in schema_of(op).arguments if argument.kwarg_only]
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
