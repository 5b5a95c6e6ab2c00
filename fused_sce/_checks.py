"""What every loss asks of its arguments, with the errors that people expect.

The compiled core checks too, but has one type of exception. So these checks explain its failures; they come first only
where a call is not plain eager: under tracing, transforms or autocast, and for the reference.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from fused_sce import _sharding, reference
from fused_sce._torch_private import (
    allows_implicit_replication,
    assert_async,
    has_memory,
    is_tracing,
    mkldnn,
    unwrapped,
    without_transforms,
)

# What the kernels read (DType in csrc/dtypes.h).
LOGITS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_OTHERS = (*LOGITS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


# The factors of a loss, and what else broadcasts to the logits, with the dtypes of each.
_FACTORS = {"weight": _OTHERS, "pos_weight": _OTHERS, "mask": (torch.bool,), "label_alpha": LOGITS, "prior": LOGITS}

TARGET_FORMATS = ("dense", "class_index", "packed", "index_list")
"""Of our own losses; a sparse target has its own."""

PUBLIC_NAMES = {"label_alpha": "alpha", "prior": "smoothing_prior"}
"""What users call these tensors of the op."""


def check_tensors(
    tensors: Mapping[str, Any], target_format: str = "dense", public_names: Mapping[str, str] = PUBLIC_NAMES
) -> None:
    """Check the tensors of a loss against each other; their names are those of the op.

    Raises:
        TypeError: An argument is no dense tensor, or has a dtype that the kernels do not read.
        ValueError: `target` has another shape than `input`.
        RuntimeError: A factor or the mask does not broadcast to `input`'s shape, or a tensor is on another device, or
            only some are DTensors, or they are on different meshes.
    """
    input, target = tensors["input"], tensors["target"]
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor of logits, got {type(input).__name__}")
    if not isinstance(target, Tensor):
        cures = {
            "ndarray": ": pass torch.from_numpy(target)",
            "csr_matrix": ": pass torch.sparse_csr_tensor(m.indptr, m.indices, m.data, m.shape) of the matrix m",
            "list": ": pass torch.tensor(target)",
        }
        if target_format == "index_list":
            padded = "pad_sequence(list(map(torch.tensor, target)), batch_first=True, padding_value=-1)"
            cures["list"] = f": pass torch.nn.utils.rnn.{padded}"
        name = type(target).__name__
        raise TypeError(f"target must be a tensor, got {name}{cures.get(name.replace('_array', '_matrix'), '')}")
    check_dense("input", input)
    if target_format != "dense" and any(_sharding.dtensor_of(tensor) is not None for tensor in (input, target)):
        raise RuntimeError("targets in other formats do not work with DTensors: pass a dense one, of input's shape")
    factors = {public_names.get(name, name): (tensors.get(name), dtypes) for name, dtypes in _FACTORS.items()}
    for name, tensor in (("target", target), *((name, tensor) for name, (tensor, _) in factors.items())):
        check_dense(name, tensor)
        check_mesh(name, tensor, input)  # before the shapes: a rank's own part has another one than the whole
    changed_places = target.is_floating_point() and not input.is_floating_point()
    check_dtype("input", input, LOGITS, ": did input and target change places?" if changed_places else "")
    if target_format != "dense":
        check_format(input, target, target_format)
    elif target.shape != input.shape:
        raise ValueError(
            f"Target size ({target.shape}) must be the same as input size ({input.shape})" + shape_hint(input, target)
        )
    check_dtype("target", target)
    check_device("target", target, input)
    for name, (factor, dtypes) in factors.items():
        if factor is not None:
            is_mask = name == "alpha" and isinstance(factor, Tensor) and factor.dtype is torch.bool
            check_factor(name, factor, input, dtypes, ": a mask is passed as mask=" if is_mask else "")


def check_format(input: Tensor, target: Tensor, target_format: str) -> None:
    """Check the shape and the dtype of a target that is not dense."""
    if target_format == "csr":
        return  # checked where the sparse tensor is taken apart
    if input.dim() == 0:
        raise ValueError(f"target_format={target_format!r} needs logits of shape (..., C), but input is a scalar")
    *rest, classes = input.shape
    is_index = not (target.is_floating_point() or target.dtype is torch.bool)
    last = {
        "class_index": [],
        "packed": [(classes + 7) // 8],
        "index_list": list(target.shape[-1:]) or [0],
    }
    if target_format not in last:
        return  # unknown, which is an error of its own
    if list(target.shape) != rest + last[target_format]:  # no words before: under torch.compile sizes have none
        words = {
            "class_index": "one index for each row of logits",
            "packed": "eight labels in a byte",
            "index_list": "with any number of indices for each row of logits",
        }
        shape = str(tuple(rest + last[target_format]))
        if target_format == "index_list" and target.dim() != input.dim():
            shape = f"({', '.join(map(str, [*rest, 'K']))})"
        raise ValueError(
            f"target_format={target_format!r} needs a target of shape {shape}, "
            f"{words[target_format]}, for logits of shape {tuple(input.shape)}, whose last dimension is that of the "
            f"labels, got {tuple(target.shape)}"
        )
    if target_format == "packed" and target.dtype is not torch.uint8:
        raise TypeError(f"target must have dtype uint8 for target_format='packed', got {target.dtype}")
    if not is_index:
        raise TypeError(f"target must have an integer dtype for target_format={target_format!r}, got {target.dtype}")


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...] = _OTHERS, hint: str = "") -> None:
    """Check that the kernels read a tensor's dtype."""
    if tensor.dtype not in allowed:
        *most, last = (str(dtype).removeprefix("torch.") for dtype in allowed)
        names = f"{', '.join(most)} or {last}" if most else last
        raise TypeError(f"{name} must have dtype {names}, got {tensor.dtype}{hint}")


def check_targets(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Check that each target which counts is a label or an index; with `check_target` that it is in [0, 1].

    The kernels do so as they read it; this is for where they do not, and to say which one is wrong. Values that cannot
    be read now, those of traced programs for example, are not checked, nor those with a mask under vmap. On a GPU a
    failed assertion of the device does not come to here.

    Args:
        tensors: by the names of the op.
        options: the same.

    Raises:
        ValueError: It is not.
    """
    input, target, mask = tensors["input"], tensors["target"], tensors.get("mask")
    target_format, ignore_value = options.get("target_format", "dense"), options.get("ignore_value")
    shapes = target.shape, None if mask is None else mask.shape
    target, mask = unwrapped(target), None if mask is None else unwrapped(mask)
    if mask is not None and (target.shape, mask.shape) != shapes:
        return  # vmap's dimensions stand anywhere: which element of the mask belongs to which target?
    if is_tracing() or not has_memory(target) or target.is_meta:
        return
    if target_format in ("class_index", "packed", "index_list"):
        check_indices(input, target, target_format, ignore_value)
        return
    if target_format == "csr":
        columns, rows = tensors["columns"].long(), tensors["rows"].long()
        check_csr(input, columns, rows)
        row = torch.repeat_interleave(rows.diff(), output_size=len(columns))
        mask = None if mask is None else mask.expand(input.shape)[row, columns]
    if target.dtype is torch.bool:
        return
    is_soft = target.is_floating_point()
    if is_soft and not options.get("check_target", False):
        return
    wrong = ~((target >= 0) & (target <= 1)) if is_soft else (target != 0) & (target != 1)
    counted = reference.counted(target, mask, ignore_value)
    if counted is not None:
        wrong &= counted
    place = first_wrong(wrong, "a target must be in [0, 1]" if is_soft else "an integer target must be 0 or 1")
    if place is None:
        return
    value = target[place].item()
    if target_format == "csr":
        place = int(row[place]), int(columns[place])
    cure = (
        'for class indices use torch.nn.functional.one_hot, or target_format="class_index" of SigmoidCrossEntropyLoss'
    )
    if value == 255:
        cure = "target > 0 makes labels of a mask of 0 and 255"
    elif value < 0:
        cure = f"ignore_value={value} of SigmoidCrossEntropyLoss leaves it out, target > 0 makes a negative of it"
    must = (
        "must be in [0, 1] with check_target=True"
        if is_soft
        else f"an integer target must be 0 or 1 everywhere: {cure}"
    )
    raise ValueError(f"target[{', '.join(map(str, place))}] is {value}, but {'it ' if is_soft else ''}{must}")


def first_wrong(wrong: Tensor, words: str) -> tuple[int, ...] | None:
    """Where the first element is True; on a GPU an assertion of the device instead, without waiting for it."""
    if wrong.is_cuda:
        assert_async(~wrong.any(), words)
        return None
    places = wrong.nonzero()
    return tuple(int(index) for index in places[0]) if len(places) else None


def check_indices(input: Tensor, target: Tensor, target_format: str, ignore_value: float | None) -> None:
    """Check the values of a target that is not dense."""
    classes = input.shape[-1]
    if target_format == "packed":
        if classes % 8 and target.numel():
            place = first_wrong(target[..., -1] >> classes % 8 != 0, "the bits behind the last label must be 0")
            if place is not None:
                at = ", ".join(map(str, [*place, target.shape[-1] - 1]))
                raise ValueError(
                    f"target[{at}] has bits behind the last of {classes} labels: they must be 0. "
                    'numpy.packbits needs bitorder="little"'
                )
        return
    is_list, target = target_format == "index_list", target.long()
    wrong = (target < (-1 if is_list else 0)) | (target >= classes)
    if not is_list and ignore_value is not None:
        wrong &= target != ignore_value
    place = first_wrong(wrong, "an index of a target is out of range")
    if place is not None:
        value = target[place].item()
        padding = ", or -1 for none" if is_list else f": ignore_value={value} leaves it out" if value < 0 else ""
        raise ValueError(
            f"target[{', '.join(map(str, place))}] is {value}, but an index must be in [0, {classes - 1}]{padding}"
        )
    if is_list and target.shape[-1] > 1:
        ordered, order = torch.sort(target, dim=-1, stable=True)
        again = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        place = first_wrong(again, "an index of a target stands twice in its row")
        if place is not None:
            *row, k = place
            at = ", ".join(map(str, [*row, order[(*row, k + 1)].item()]))
            value = ordered[place].item()
            cure = ": pad rows with -1, and pass labels of 0 and 1 as a dense target" if value in (0, 1) else ""
            raise ValueError(f"target[{at}] is {value}, which its row has already{cure}")


def check_csr(input: Tensor, columns: Tensor, rows: Tensor) -> None:
    """Check the indices of a sparse target."""
    classes = input.shape[-1]
    columns, rows = columns.long(), rows.long()
    wrong = rows.diff() < 0
    wrong[:1] |= (rows[0] != 0) | (rows[-1] != len(columns))
    if first_wrong(wrong, "the row indices of a sparse target are wrong") is not None:
        raise ValueError(f"target.crow_indices() must ascend from 0 to {len(columns)}, the number of values")
    place = first_wrong((columns < 0) | (columns >= classes), "a column of a sparse target is out of range")
    if place is not None:
        raise ValueError(
            f"target.col_indices()[{place[0]}] is {columns[place].item()}, but a column must be in [0, {classes - 1}]"
        )
    begins = torch.zeros(len(columns) + 1, dtype=torch.bool, device=columns.device)
    begins[rows] = True
    place = first_wrong((columns.diff() <= 0) & ~begins[1:-1], "the columns of a sparse target do not ascend")
    if place is not None:
        before, after = columns[place[0]].item(), columns[place[0] + 1].item()
        raise ValueError(
            f"target.col_indices()[{place[0] + 1}] is {after} after {before}, but the columns of a row must ascend, "
            "each once: scipy's matrix.sum_duplicates() sorts them in place, and adds up values that stand twice"
        )


def parts_of_sparse(target: Tensor, input: Tensor, target_format: str) -> tuple[Tensor, Tensor, Tensor]:
    """Values, columns and rows of a sparse target.

    Raises:
        TypeError: It has another layout than CSR, or a dense target was announced in another format.
        ValueError: It has another shape than `input`, or `target_format` is not "dense".
        RuntimeError: It requires a gradient.
    """
    if target.layout in (mkldnn, torch.jagged):
        check_dense("target", target)
    if target.layout is not torch.sparse_csr:
        raise TypeError(
            f"target must be a dense tensor or a sparse one of layout CSR, got layout {target.layout}: pass "
            "target.to_sparse_csr()"
        )
    if target_format != "dense":
        raise ValueError(f'a sparse target needs no target_format, got "{target_format}"')
    if target.shape != input.shape:
        raise ValueError(f"Target size ({target.shape}) must be the same as input size ({input.shape})")
    if target.dim() != 2:
        raise ValueError(f"a sparse target must have two dimensions, got shape {tuple(target.shape)}")
    if target.requires_grad:
        raise RuntimeError("a sparse target has no gradient: pass target.detach(), or target.to_dense()")
    with without_transforms():  # they have no rules for these
        return target.values(), target.col_indices(), target.crow_indices()


def check_dense(name: str, tensor: Tensor | None) -> None:
    """Check that a tensor is neither nested nor sparse; before its shape, which a nested one may not have."""
    if not isinstance(tensor, Tensor):
        return
    if tensor.is_nested:
        is_index = name == "target" and not tensor.is_floating_point() and tensor.dtype is not torch.bool
        cure = "torch.nested.to_padded_tensor(target, -1)" if is_index else f"torch.cat({name}.unbind())"
        raise TypeError(f"{name} must be a dense tensor, got a nested one: pass {cure}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}: pass {name}.to_dense()")


def shape_hint(input: Tensor, target: Tensor) -> str:
    """What the shapes look like a mistake of, as the end of an error message."""
    if target.numel() == input.numel():
        return (
            f". Both have {input.numel()} elements: reshape the one whose dimensions are wrong, "
            "for example logits.squeeze(-1)"
        )
    is_index = not target.is_floating_point() and target.dtype is not torch.bool
    if is_index and input.dim() == 2 and target.shape in (input.shape[:1], (*input.shape[:1], 1)):
        return (
            f". A target of {input.shape[0]} class indices met {input.shape[0]} rows of {input.shape[1]} logits: "
            "a multi-label target holds one 0 or 1 for each logit. For class indices use "
            f'torch.nn.functional.one_hot(target, {input.shape[1]}), target_format="class_index" of '
            "SigmoidCrossEntropyLoss, or torch.nn.CrossEntropyLoss if each sample has exactly one class"
        )
    return ""


def expect_tensor(name: str, value: object) -> Tensor:
    """The value, which must be a tensor; the error says what makes one of it."""
    if isinstance(value, Tensor):
        return value
    kind = type(value).__name__
    makers = {"float": "tensor", "int": "tensor", "list": "tensor", "ndarray": "from_numpy"}
    cure = f": pass torch.{makers[kind]}({name})" if kind in makers else ""
    raise TypeError(f"{name} must be a tensor, got {kind}{cure}")


def check_factor(name: str, factor: Tensor, input: Tensor, dtypes: tuple[torch.dtype, ...], hint: str) -> None:
    """Check that `weight`, `pos_weight`, `mask` or `alpha` broadcasts to `input`'s shape."""
    expect_tensor(name, factor)
    check_dtype(name, factor, dtypes, hint)
    missing = input.dim() - factor.dim()
    fits = missing >= 0 and all(
        own in (1, of_input) for own, of_input in zip(factor.shape, input.shape[max(missing, 0) :], strict=False)
    )
    if not fits:
        raise RuntimeError(
            f"{name} of shape {tuple(factor.shape)} does not broadcast to the logits' shape {tuple(input.shape)}"
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
        hint = '. timm\'s "batchmean" is "sum_classes" here' if reduction == "batchmean" else ""
        raise ValueError(
            f"{reduction} is not a valid value for reduction: it must be one of {', '.join(allowed)}{hint}"
        )


def positive(name: str, value: object) -> int:
    """`value` as an int of at least 1.

    Raises:
        TypeError: It is no whole number.
        ValueError: It is less.
    """
    if not isinstance(value, SupportsIndex) or isinstance(value, bool):
        counted = f"; give their number, {len(value)}" if isinstance(value, (list, tuple, set, dict)) else ""
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}{counted}")
    number = operator.index(value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number
