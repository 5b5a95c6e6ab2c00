"""From a loss function's call to the op: dispatch, checks, autocast, the count; and errors that explain themselves."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fused_sce import _autograd, _library, _sharding, reference
from fused_sce._checks import PUBLIC_NAMES, TARGET_FORMATS, check_targets, check_tensors, parts_of_sparse
from fused_sce._register import autocast_dtype
from fused_sce._torch_private import (
    base_of,
    is_differentiating,
    is_exporting_to_onnx,
    is_forward_mode,
    is_plain_eager,
    is_tracing,
    is_transforming,
    refuse_torchscript,
)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

Call = tuple[_autograd.Tensors, _autograd.Options, bool]
"""What a loss asks of the op: tensors, options and whether in place. A count of `COUNTED` is still to be made."""

COUNTED: Any = object()
"""In the place of `count`: the number of elements that count."""


def loss_function(describe: Callable[Arguments, Call]) -> Callable[Arguments, Tensor]:
    """Make a loss of a function that describes its call of the op.

    It gets what torch's own functions have: `__torch_function__`, and errors that explain themselves.
    """
    signature = inspect.signature(describe).replace(return_annotation="Tensor")

    @functools.wraps(describe)
    def loss(*args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return call_traced(*describe(*args, **kwargs))
        tensors = (*args, *kwargs.values())
        if has_torch_function(tensors):
            overridden: Tensor = handle_torch_function(loss, tensors, *args, **kwargs)
            return overridden
        try:
            return call(*describe(*args, **kwargs))
        except Exception:
            _explain(signature, *args, **kwargs)
            raise

    loss.__signature__ = signature  # type: ignore[attr-defined]
    return refuse_torchscript(loss)


def overridable(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Give a function what torch's own have: `__torch_function__`, and a reason why it cannot be scripted."""

    @functools.wraps(function)
    def public(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        tensors = (*args, *kwargs.values())
        if not torch.compiler.is_compiling() and has_torch_function(tensors):
            overridden: Result = handle_torch_function(public, tensors, *args, **kwargs)
            return overridden
        return function(*args, **kwargs)

    return refuse_torchscript(public)


def _explain(signature: inspect.Signature, *args: Any, **kwargs: Any) -> None:
    """Raise the error that says what is wrong with the arguments of a failed call, if that is what made it fail."""
    try:
        arguments = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return  # what the call itself raised names the function
    input, target = (arguments.pop(name) for name in list(arguments)[:2])
    tensors = {"input": input, "target": target, **arguments}
    for name, public in PUBLIC_NAMES.items():
        tensors[name] = arguments[public] if isinstance(arguments.get(public), Tensor) else None
    target_format = arguments.get("target_format", "dense")
    try:
        takes_sparse = "target_format" in signature.parameters and isinstance(input, Tensor)
        if takes_sparse and isinstance(target, Tensor) and target.layout is not torch.strided:
            tensors["target"], tensors["columns"], tensors["rows"] = parts_of_sparse(target, input, target_format)
            target_format = "csr"
        elif target_format not in TARGET_FORMATS:
            return  # unknown, which the call has said
        check_tensors(tensors, target_format)
        check_targets(tensors, {**arguments, "target_format": target_format})
    except Exception as explanation:
        raise explanation from None


def option(options: _autograd.Options, name: str, default: Any) -> Any:
    """An option of a call, which may be too short to have it."""
    place = _autograd.OPTIONS.index(name)
    return options[place] if place < len(options) else default


def with_count(tensors: _autograd.Tensors, options: _autograd.Options, by_kernel: bool) -> _autograd.Tensors:
    """The tensors with the count that they ask for."""
    input, target, _, _, count, mask, _, _, columns, rows = tensors
    if count is not COUNTED:
        return tensors
    if by_kernel:
        asked = (input, target, None, None, None, mask, None, None, columns, rows)
        count = _autograd.count(asked, options)
    else:
        target_format, ignore_value = option(options, "target_format", "dense"), option(options, "ignore_value", None)
        count = reference.number_counted(input, target.detach(), mask, columns, rows, target_format, ignore_value)
    return *tensors[:4], count, *tensors[5:]


def call(tensors: _autograd.Tensors, options: _autograd.Options, inplace: bool) -> Tensor:
    """Dispatch a call. `is_usual` holds in ordinary training, where each microsecond counts."""
    input, target = tensors[:2]
    is_usual = (
        type(input) is Tensor
        and type(target) is Tensor
        and (input.is_cpu or (_library.has_cuda_kernels and input.is_cuda))
        and is_plain_eager()
    )
    if not is_usual:
        _sharding.register()  # they may be DTensors
        check_call(tensors, options)
        options = with_autocast(tensors, options)
    if tensors[4] is not None:
        tensors = with_count(tensors, options, is_usual and input.is_cpu)
    if not is_usual:
        # A trace would keep the divisor of its example.
        by_reference = is_tracing() or is_differentiating() or needs_reference(input)
        if by_reference or is_transforming():
            check_targets(named(tensors), dict(zip(_autograd.OPTIONS, options, strict=False)))
        if by_reference:
            return reference.sigmoid_cross_entropy(*tensors, *options)
        if is_transforming():  # by vmap alone
            return _autograd.call_op(*_dense(tensors, options))
    if inplace:
        inplace = _can_overwrite(tensors)
    return _autograd.loss(tensors, options, inplace)


def call_traced(tensors: _autograd.Tensors, options: _autograd.Options, _: bool) -> Tensor:
    """The op as one node of a graph, or the reference."""
    check_call(tensors, options)
    options = with_autocast(tensors, options)
    tensors = with_count(tensors, options, by_kernel=False)
    if is_transforming() or needs_reference(tensors[0]):
        return reference.sigmoid_cross_entropy(*tensors, *options)
    return _autograd.call_op(tensors, options)


def named(tensors: _autograd.Tensors) -> dict[str, Any]:
    return dict(zip(_autograd.TENSORS, tensors, strict=True))


def check_call(tensors: _autograd.Tensors, options: _autograd.Options) -> None:
    check_tensors(named(tensors), option(options, "target_format", "dense"))


def _dense(tensors: _autograd.Tensors, options: _autograd.Options) -> tuple[_autograd.Tensors, _autograd.Options]:
    """The call with a dense target."""
    names = dict(zip(_autograd.OPTIONS, options, strict=False))
    if names.get("target_format", "dense") == "dense":
        return tensors, options
    input, target, *others, columns, rows = tensors
    target, ignore_value = reference.dense_target(
        input, target, columns, rows, names["target_format"], names["ignore_value"]
    )
    names |= {"ignore_value": ignore_value, "target_format": "dense"}
    return (input, target, *others, None, None), tuple(names.values())


def with_autocast(tensors: _autograd.Tensors, options: _autograd.Options) -> _autograd.Options:
    """The options with the dtype of the loss where autocast decides it."""
    reduction, dtype, *rest = options
    return reduction, dtype or autocast_dtype(*tensors[:2]), *rest


def needs_reference(input: Tensor) -> bool:
    """Whether only the plain torch functions can do it: ours have no forward-mode AD, and ONNX does not know them."""
    if is_forward_mode() or is_exporting_to_onnx():
        return True
    if input.device.type in _KERNEL_DEVICES:
        return False
    _warn_without_kernels(input.device.type)
    return True


# meta: shapes only, through the fake kernels
_KERNEL_DEVICES = ("cpu", "meta", "cuda") if _library.has_cuda_kernels else ("cpu", "meta")


@functools.cache
def _warn_without_kernels(device_type: str) -> None:
    """Say once for each device type what it means that there are none."""
    reason = _library.why_no_cuda_kernels() if device_type == "cuda" else "there are kernels for CPU and CUDA only"
    warnings.warn(
        f"fused_sce computes losses on {device_type} tensors with plain torch operations, right but not fused: "
        f"{reason}",
        stacklevel=2,
    )


def _can_overwrite(tensors: _autograd.Tensors) -> bool:
    """Whether the gradient can lie in the memory of the logits.

    Raises:
        RuntimeError: They are parameters, whose values must survive, or needed for another gradient.
    """
    logits = tensors[0]
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return False
    viewed = base_of(logits)
    base = logits if viewed is None else viewed
    if base.is_leaf and base.requires_grad:
        raise RuntimeError(
            "inplace=True would overwrite a leaf tensor that requires grad, or a view of one, with its gradient: pass "
            "the output of a layer, or use inplace=False"
        )
    for name, tensor in list(named(tensors).items())[1:]:
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"inplace=True has no gradient by {PUBLIC_NAMES.get(name, name)}: it overwrites the logits, which that "
                "needs. Use inplace=False"
            )
    if type(logits) is not Tensor or logits.is_meta or logits.is_neg() or logits.retains_grad:
        return False
    # autograd cannot record that a view is overwritten by a function with two outputs
    return viewed is None and logits.is_contiguous()
