"""What every loss asks of its arguments, with the errors that people expect.

The compiled core checks too, but has one type of exception. So these checks explain its failures; they come first only
where a call is not plain eager: under tracing, transforms or autocast, and for the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_sce import _sharding, reference
from fused_sce._torch_private import allows_implicit_replication, has_memory, is_tracing, unwrapped

# What the kernels read (DType in csrc/dtypes.h).
_LOGITS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_OTHERS = (*_LOGITS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_tensors(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    mask: Tensor | None = None,
    alpha: Tensor | None = None,
) -> None:
    """Check the tensors of a loss against each other.

    Raises:
        TypeError: An argument is no dense tensor, or has a dtype that the kernels do not read.
        ValueError: `target` has another shape than `input`.
        RuntimeError: `weight`, `pos_weight`, `mask` or `alpha` does not broadcast to `input`'s shape, or a tensor is on
            another device, or only some are DTensors, or they are on different meshes.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor of logits, got {type(input).__name__}")
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    check_dense("input", input)
    factors = {"weight": weight, "pos_weight": pos_weight, "alpha": alpha}
    for name, tensor in (("target", target), *factors.items(), ("mask", mask)):
        check_dense(name, tensor)
        check_mesh(name, tensor, input)  # before the shapes: a rank's own part has another one than the whole
    changed_places = target.is_floating_point() and not input.is_floating_point()
    check_dtype("input", input, _LOGITS, ": did input and target change places?" if changed_places else "")
    if target.shape != input.shape:
        raise ValueError(
            f"Target size ({target.shape}) must be the same as input size ({input.shape})" + shape_hint(input, target)
        )
    check_dtype("target", target)
    check_device("target", target, input)
    for name, factor in factors.items():
        if factor is not None:
            check_factor(name, factor, input)
    if mask is not None:
        check_factor("mask", mask, input, (torch.bool,))


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...] = _OTHERS, hint: str = "") -> None:
    """Check that the kernels read a tensor's dtype."""
    if tensor.dtype not in allowed:
        *most, last = (str(dtype).removeprefix("torch.") for dtype in allowed)
        names = f"{', '.join(most)} or {last}" if most else last
        raise TypeError(f"{name} must have dtype {names}, got {tensor.dtype}{hint}")


def check_labels(target: Tensor, mask: Tensor | None = None, ignore_value: float | None = None) -> None:
    """Check that a target of an integer dtype holds 0 and 1 alone, where it counts.

    The kernels do so as they read it; this is for where they do not, and to say which one is wrong. Values that cannot
    be read now, those of traced programs for example, are not checked, nor those with a mask under vmap. On a GPU a
    failed assertion of the device does not come to here.

    Raises:
        ValueError: It does not.
    """
    shapes = target.shape, None if mask is None else mask.shape
    target, mask = unwrapped(target), None if mask is None else unwrapped(mask)
    if mask is not None and (target.shape, mask.shape) != shapes:
        return  # vmap's dimensions stand anywhere: which element of the mask belongs to which target?
    if target.is_floating_point() or target.dtype is torch.bool:
        return
    if is_tracing() or not has_memory(target) or target.is_meta:
        return
    wrong = (target != 0) & (target != 1)
    counted = reference.counted(target, mask, ignore_value)
    if counted is not None:
        wrong &= counted
    if target.is_cuda:
        torch._assert_async(~wrong.any(), "an integer target must be 0 or 1")
    elif wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        value = int(target[place])
        cures = {
            255: "target > 0 makes labels of a mask of 0 and 255",
            -1: "target > 0 takes -1 for a negative, ignore_value=-1 leaves it out",
        }
        cure = cures.get(value, "for class indices use torch.nn.functional.one_hot")
        raise ValueError(
            f"target[{', '.join(map(str, place))}] is {value}, but an integer target must be 0 or 1 everywhere: {cure}"
        )


def check_dense(name: str, tensor: Tensor | None) -> None:
    """Check that a tensor is neither nested nor sparse; before its shape, which a nested one may not have."""
    if not isinstance(tensor, Tensor):
        return
    if tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one: pass torch.cat({name}.unbind())")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}: pass {name}.to_dense()")


def shape_hint(input: Tensor, target: Tensor) -> str:
    """What the shapes look like a mistake of, as the end of an error message."""
    class_indices = (
        input.dim() == 2 and target.shape in (input.shape[:1], (*input.shape[:1], 1)) and not target.is_floating_point()
    )
    if class_indices:
        return (
            f". A target of {input.shape[0]} class indices met {input.shape[0]} rows of {input.shape[1]} logits: "
            "a multi-label target holds one 0 or 1 for each logit. For class indices use "
            f"torch.nn.functional.one_hot(target, {input.shape[1]}), or torch.nn.CrossEntropyLoss if each sample has "
            "exactly one class"
        )
    if target.numel() == input.numel():
        return (
            f". Both have {input.numel()} elements: reshape the one whose dimensions are wrong, "
            "for example logits.squeeze(-1)"
        )
    return ""


def check_factor(name: str, factor: Tensor, input: Tensor, dtypes: tuple[torch.dtype, ...] = _OTHERS) -> None:
    """Check that `weight`, `pos_weight`, `mask` or `alpha` broadcasts to `input`'s shape."""
    if not isinstance(factor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(factor).__name__}")
    check_dtype(name, factor, dtypes)
    missing = input.dim() - factor.dim()
    fits = missing >= 0 and all(
        own in (1, of_input) for own, of_input in zip(factor.shape, input.shape[max(missing, 0) :], strict=False)
    )
    if not fits:
        raise RuntimeError(
            f"{name} of shape {tuple(factor.shape)} does not broadcast to input's shape {tuple(input.shape)}"
            + view_hint(name, factor, input)
        )
    check_device(name, factor, input)


def view_hint(name: str, factor: Tensor, input: Tensor) -> str:
    """The view of a factor that broadcasts, if its values fit one dimension of the logits alone: an error's end.

    With -1 rather than the size, which may be that of a batch.
    """
    fitting = [dim for dim, size in enumerate(input.shape) if size == factor.numel()]
    if len(fitting) != 1 or factor.numel() not in factor.shape:
        is_usual = name == "pos_weight" and input.dim() == 2
        return f": it usually has one value for each label, shape {tuple(input.shape[1:])}" if is_usual else ""
    shape = ", ".join(["-1", *["1"] * (input.dim() - fitting[0] - 1)])
    return f": to apply its {factor.numel()} values along dimension {fitting[0]} pass {name}.view({shape})"


def check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    """Check that a tensor lies where the logits do; a scalar tensor may stay on the CPU, as elsewhere in torch."""
    if tensor.device != input.device and not (tensor.dim() == 0 and tensor.device.type == "cpu"):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but input is on {input.device} and {name} is on "
            f"{tensor.device}"
        )


def check_mesh(name: str, tensor: Tensor | None, input: Tensor) -> None:
    """Check that a tensor is a DTensor if the logits are one, over the same mesh; a scalar tensor need not be one."""
    if not isinstance(tensor, Tensor):
        return
    logits, other = _sharding.dtensor_of(input), _sharding.dtensor_of(tensor)
    if logits is not None and other is not None:
        if other.device_mesh != logits.device_mesh:
            raise RuntimeError(
                f"{name} and input are DTensors on different meshes, {other.device_mesh} and {logits.device_mesh}: "
                f"make both on one, for example with torch.distributed.tensor.distribute_tensor({name}.full_tensor(), "
                "input.device_mesh, input.placements)"
            )
    elif logits is not None:
        if tensor.numel() == 1 and name != "target":
            return
        if allows_implicit_replication(logits):
            return
        # A factor has dimensions of its own: replicated, distribute_tensor's default, it fits every placement.
        whole, part = ("input.placements",) * 2 if name == "target" else ("", "its placements")
        arguments = ", ".join(filter(None, (name, "input.device_mesh", whole)))
        raise RuntimeError(
            f"input is a DTensor placed {logits.placements}, but {name} is a plain tensor of shape "
            f"{tuple(tensor.shape)}. If each rank has the whole of it, pass "
            f"torch.distributed.tensor.distribute_tensor({arguments}); if each has its own part, "
            f"torch.distributed.tensor.DTensor.from_local({name}, input.device_mesh, {part})"
        )
    elif other is not None:
        raise RuntimeError(
            f"{name} is a DTensor placed {other.placements}, but input is a plain tensor. If the model's output is "
            "meant to be sharded, keep it a DTensor (use_local_output=False in ColwiseParallel and its like); if not, "
            f"pass {name}.full_tensor()"
        )


def check_reduction(reduction: str, allowed: tuple[str, ...] = ("mean", "sum", "none")) -> None:
    """Check a reduction's name.

    Raises:
        ValueError: It is not one of `allowed`.
    """
    if reduction not in allowed:
        raise ValueError(f"{reduction} is not a valid value for reduction: it must be one of {', '.join(allowed)}")
