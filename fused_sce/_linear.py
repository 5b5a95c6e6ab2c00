"""A linear layer and its loss in one, by chunks of labels: the logits of all labels never exist.

Each chunk of the weight's rows gives logits; the kernel overwrites them with their gradient; matrix products of that
give the gradients by input, weight and bias. Only an upstream factor is left to backward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_sce import _autograd, _sharding, reference
from fused_sce._calls import COUNTED, Call, call, call_traced, named, needs_reference, option, with_autocast, with_count
from fused_sce._checks import (
    LOGITS,
    PUBLIC_NAMES,
    check_csr,
    check_dense,
    check_device,
    check_dtype,
    check_indices,
    check_targets,
    check_tensors,
    expect_tensor,
    positive,
)
from fused_sce._register import autocast_dtype
from fused_sce._torch_private import has_memory, is_batched, is_tracing, is_transforming, schema_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CHUNK_BYTES = 64 * 2**20
"""Of the logits of a chunk, by default."""


class Layer(NamedTuple):
    """What makes the logits."""

    input: Tensor
    """(N, D) for the op, else (..., D)."""
    weight: Tensor
    """(C, D)"""
    bias: Tensor | None
    """(C,)"""


class Chunks(NamedTuple):
    """How a layer is computed."""

    dtype: torch.dtype
    """Of the logits."""
    size: int
    """Labels of a chunk."""


def loss(
    layer: Layer,
    logit_scale: float | Tensor | None,
    chunk_bytes: int,
    describe: Callable[[Tensor], Call],
    group: ProcessGroup | None = None,
) -> Tensor:
    """The loss of the logits `logit_scale * (input @ weight.T) + bias`.

    Args:
        layer: as users give it.
        logit_scale: the same.
        chunk_bytes: how much memory the logits of a chunk may take.
        describe: makes the call of the loss of given logits.
        group: each of its ranks has weights of its own, and its rows are compared with all of them.
    """
    layer, chunk_bytes = with_scale(layer, logit_scale), positive("chunk_bytes", chunk_bytes)
    by_logits, by_label = needs_logits(layer), is_class_parallel(layer)
    if group is not None and (torch.compiler.is_compiling() or by_logits or by_label):
        raise RuntimeError(
            "group works with plain tensors on CPU and CUDA, outside of torch.compile, torch.func and forward-mode AD"
        )
    if by_logits:
        call_loss = call_traced if torch.compiler.is_compiling() else call
        return call_loss(*describe(F.linear(*layer)))
    dtype = dtype_of_logits(layer)
    if by_label:
        from fused_sce import _class_parallel  # imports DTensor, which is there now

        return _class_parallel.loss(layer, dtype, chunk_bytes, describe)
    tensors, options, _ = describe(stand_in(layer.input, dtype, layer.weight.shape[0]))
    check_loss(tensors, options)
    options = with_dtype(tensors, options)
    try:
        tensors = counted(layer, chunk_bytes, tensors, options)
        return computed(layer, chunk_bytes, tensors, options, group)
    except ValueError:
        if layer.input.dim() != 2:  # say where in the target as it was given, not in its rows
            check_targets(named(tensors), dict(zip(_autograd.OPTIONS, options, strict=False)))
        raise


def counted(
    layer: Layer, chunk_bytes: int, tensors: _autograd.Tensors, options: _autograd.Options
) -> _autograd.Tensors:
    """The tensors with the count that they ask for."""
    if tensors[4] is not COUNTED:
        return tensors
    logits, target, _, _, _, *rest = flattened(tensors)
    size = labels_of_chunk(chunk_bytes, logits, layer.weight)
    count = _count(_as_rows(layer.input), logits.shape[1], size, target, None, None, None, *rest, *options)
    return *tensors[:4], count, *tensors[5:]


def computed(
    layer: Layer,
    chunk_bytes: int,
    tensors: _autograd.Tensors,
    options: _autograd.Options,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The loss, recorded by autograd where a gradient is wanted; the first of the tensors stands for the logits."""
    logits = tensors[0]
    chunks = Chunks(logits.dtype, labels_of_chunk(chunk_bytes, logits, layer.weight))
    layer = layer._replace(input=_as_rows(layer.input))
    _, *others = flattened(tensors)
    compute: Callable[..., Any] = op
    if group is not None:
        from fused_sce import _ring

        compute = functools.partial(_ring.by_ring, group)
    value: Tensor
    wants_gradient = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in layer)
    if wants_gradient and not torch.compiler.is_exporting():  # a program that is exported has the op
        value = _LinearLoss.apply(*layer, compute, chunks, tuple(others), options)
    else:
        value = compute(None, _NOTHING, *chunks, *layer, *others, *options)[0]
    return value


def topk(layer: Layer, k: int, logit_scale: float | Tensor | None, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row and their labels, the largest first; without a gradient."""
    with torch.no_grad():
        layer = with_scale(layer, logit_scale)
        labels = len(layer.weight)
        k, chunk_bytes = positive("k", k), positive("chunk_bytes", chunk_bytes)
        if k > labels:
            raise ValueError(f"k must be at most the number of labels, {labels}, got {k}")
        if is_class_parallel(layer):
            from fused_sce import _class_parallel

            values, indices = _class_parallel.topk(layer, k, chunk_bytes)
        else:
            values, indices = best(layer, k, chunk_bytes)
        return torch.return_types.topk((values, indices))


def best(layer: Layer, k: int, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row and their labels (..., k), or of all labels if they are fewer."""
    labels, dtype = len(layer.weight), dtype_of_logits(layer)
    size = labels_of_chunk(chunk_bytes, stand_in(layer.input, dtype, labels), layer.weight)
    input = _as_rows(layer.input).to(dtype)
    found, of_found = input.new_empty(len(input), 0), input.new_empty(len(input), 0, dtype=torch.int64)
    for begin in range(0, labels, size):
        end = min(begin + size, labels)
        weight = layer.weight[begin:end].to(dtype)
        bias = None if layer.bias is None else layer.bias[begin:end].to(dtype)
        values, indices = F.linear(input, weight, bias).topk(min(k, end - begin), sorted=False)
        values, indices = torch.cat([found, values], 1), torch.cat([of_found, indices + begin], 1)
        found, places = values.topk(min(k, values.shape[1]))
        of_found = indices.gather(1, places)
    shape = *layer.input.shape[:-1], found.shape[1]
    return found.reshape(shape), of_found.reshape(shape)


# The arguments


def with_scale(layer: Layer, logit_scale: float | Tensor | None) -> Layer:
    """The layer, checked, with the scale of the logits in its input.

    Raises:
        TypeError: An argument is no dense tensor of floating point, or the dtypes differ outside of autocast.
        ValueError: A shape does not fit.
        RuntimeError: A tensor is on another device than `input`.
    """
    input, weight, bias = layer
    for name, tensor in layer._asdict().items():
        if tensor is None and name == "bias":
            continue
        check_part(name, tensor, input)
    if input.dim() < 1 or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            "input must have shape (..., D) and weight (C, D), with the same number of features D, got "
            f"{tuple(input.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must have shape {tuple(weight.shape[:1])}, one value for each row of weight, got {tuple(bias.shape)}"
        )
    if isinstance(logit_scale, Tensor):
        if logit_scale.numel() != 1:
            raise ValueError(f"logit_scale must be one number, got a tensor of shape {tuple(logit_scale.shape)}")
        check_dtype("logit_scale", logit_scale)
        logit_scale = logit_scale.reshape(())  # which does not change the dtype of the product
        check_device("logit_scale", logit_scale, input)
    elif not isinstance(logit_scale, float | int | torch.SymFloat | None):
        raise TypeError(f"logit_scale must be a number, a tensor or None, got {type(logit_scale).__name__}")
    return layer if logit_scale is None else layer._replace(input=input * logit_scale)


def check_part(name: str, tensor: object, input: Tensor, name_of_input: str = "input") -> None:
    """Check a part of a layer but for its shape; errors as in `with_scale`."""
    tensor = expect_tensor(name, tensor)
    check_dense(name, tensor)
    check_dtype(name, tensor, LOGITS)
    check_device(name, tensor, input)
    if tensor.dtype != input.dtype and autocast_dtype(input, input) is None:
        raise TypeError(
            f"{name_of_input} and {name} must have one dtype outside of autocast, got {input.dtype} and {tensor.dtype}"
        )


def needs_logits(layer: Layer) -> bool:
    """Whether only the loss of logits can do it: in transforms of `torch.func`, for forward-mode AD, ..."""
    is_traced = not torch.compiler.is_compiling() and is_tracing()
    return is_traced or is_transforming() or needs_reference(layer.input)


def dtype_of_logits(layer: Layer) -> torch.dtype:
    """The dtype of the logits, which autocast may decide."""
    input = layer.input
    if input.dtype == torch.float64 or autocast_dtype(input, input) is None:
        return input.dtype
    return torch.get_autocast_dtype(input.device.type)


def is_class_parallel(layer: Layer) -> bool:
    """Whether a part of the layer is a DTensor."""
    if not torch.compiler.is_compiling():
        _sharding.register_for(*(tensor for tensor in layer if tensor is not None))
    return any(tensor is not None and _sharding.dtensor_of(tensor) is not None for tensor in layer)


def with_dtype(tensors: _autograd.Tensors, options: _autograd.Options) -> _autograd.Options:
    """The options with the dtype of the loss."""
    reduction, dtype, *others = with_autocast(tensors, options)
    return reduction, reference.result_dtype(tensors[0], tensors[1], dtype), *others


def stand_in(input: Tensor, dtype: torch.dtype, num_labels: int) -> Tensor:
    """Of the shape and dtype of all logits, in the memory of one."""
    return input.new_empty((), dtype=dtype).expand(*input.shape[:-1], num_labels)


def check_shape(logits: Tensor, target: object, target_format: str) -> None:
    """Check a target that has a value for each logit, in words for users who do not see the logits.

    Raises:
        TypeError: It is no tensor.
        ValueError: It has another shape.
    """
    if not isinstance(target, Tensor):
        check_tensors({"input": logits, "target": target})
        return
    if target_format == "dense" and not target.is_nested and target.shape != logits.shape:
        is_index = not target.is_floating_point() and target.dtype is not torch.bool
        hint = ': for label indices pass target_format="index_list" or "class_index"' if is_index else ""
        raise ValueError(
            f"target must have the logits' shape {tuple(logits.shape)}, a value for each row of input and each row of "
            f"weight, got {tuple(target.shape)}{hint}"
        )


def check_loss(tensors: _autograd.Tensors, options: _autograd.Options) -> None:
    """Check the tensors of the loss as it does itself, in the words of this function.

    Raises:
        RuntimeError: One of them requires a gradient.
    """
    tensors_by_name = named(tensors)
    names = {**PUBLIC_NAMES, "weight": "loss_weight"}
    for name, tensor in tensors_by_name.items():
        if isinstance(tensor, Tensor) and _sharding.dtensor_of(tensor) is not None:
            name = names.get(name, name)
            raise RuntimeError(f"{name} is a DTensor, but weight is a plain tensor: make both DTensors on one mesh")
    check_tensors(tensors_by_name, option(options, "target_format", "dense"), names)
    for name, tensor in tensors_by_name.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
            name = names.get(name, name)
            raise RuntimeError(
                f"linear_sigmoid_cross_entropy has no gradient by {name}: pass {name}.detach(), or call "
                "sigmoid_cross_entropy with the logits of torch.nn.functional.linear"
            )


def labels_of_chunk(chunk_bytes: int, logits: Tensor, weight: Tensor) -> int:
    """How many labels the logits of a chunk have: a multiple of 8, the labels of a packed byte, if they are more.

    Raises:
        ValueError: `chunk_bytes` does not hold those of one.
    """
    rows = math.prod(logits.shape[:-1])
    of_label: Any = rows * logits.element_size()
    budget: Any = chunk_bytes
    if torch.compiler.is_compiling():  # at least one: a program is not bound to the number of rows of its example
        budget = torch.sym_max(budget, of_label)
    elif budget < of_label:
        raise ValueError(
            f"chunk_bytes must hold the logits of one label, {of_label} bytes for {rows} rows of {logits.dtype}, got "
            f"{chunk_bytes}"
        )
    if weight.dtype != logits.dtype:  # autocast copies the weights of a chunk and their gradient, which may be larger
        of_label = torch.sym_max(of_label, 2 * weight.shape[1] * logits.element_size())
    labels: Any = torch.sym_max(budget // torch.sym_max(of_label, 1), 1)
    size: int = torch.sym_max(labels - labels % 8, torch.sym_min(labels, 7))  # less than 8 stay what they are
    return size


def _as_rows(tensor: Tensor) -> Tensor:
    """The tensor in two dimensions: `reshape(-1, ...)` fails for a size of 0."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def flattened(tensors: _autograd.Tensors) -> _autograd.Tensors:
    """The tensors of the loss, all of whose leading dimensions become one."""
    logits, target, weight, pos_weight, count, mask, alpha, prior, columns, rows = tensors
    leading = logits.shape[:-1]
    logits = _as_rows(logits)
    if columns is None:  # a sparse target has two dimensions
        target = target.reshape(logits.shape[0], *target.shape[len(leading) :])

    def flat(factor: Tensor | None) -> Tensor | None:
        if factor is None or factor.dim() < 2 or len(leading) == 1:
            return factor
        return _as_rows(factor.expand(*leading, factor.shape[-1]))

    factors = flat(weight), flat(pos_weight), count, flat(mask), flat(alpha), flat(prior)
    return (logits, target, *factors, columns, rows)


# Autograd


class _LinearLoss(torch.autograd.Function):
    """The loss, differentiable in input, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        compute: Callable[..., Any],
        chunks: Chunks,
        tensors: tuple[Tensor | None, ...],
        options: _autograd.Options,
    ) -> Tensor:
        """The loss, and the gradients for an upstream factor of 1.

        Not these in float16: divided by a large batch they underflow, before a GradScaler's factor could save them.
        """
        ctx.save_for_backward(input, weight, bias, *tensors)
        ctx.compute, ctx.chunks, ctx.options = compute, chunks, options
        ctx.is_made = chunks.dtype is not torch.float16
        wanted = ctx.needs_input_grad[:3] if ctx.is_made else _NOTHING
        value: Tensor
        value, *ctx.gradients = compute(None, wanted, *chunks, input, weight, bias, *tensors, *options)
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients by input, weight and bias; a second time they are computed anew."""
        wanted = ctx.needs_input_grad[:3]
        if torch.compiler.is_compiling():
            is_last = False  # a program may run again
        else:
            _refuse_derivatives(grad_output)
            is_last = has_memory(grad_output) and not grad_output.is_meta
        if not ctx.is_made:
            _, *gradients = ctx.compute(grad_output, wanted, *ctx.chunks, *ctx.saved_tensors, *ctx.options)
        elif is_last:
            ctx.is_made, gradients, ctx.gradients = False, ctx.gradients, None
            gradients = [_autograd.scaled(gradient, grad_output) for gradient in gradients]
        else:
            gradients = [gradient * grad_output for gradient in ctx.gradients]
        by = (gradient if is_wanted else None for gradient, is_wanted in zip(gradients, wanted, strict=True))
        return *by, None, None, None, None


def _refuse_derivatives(grad_output: Tensor) -> None:
    """Refuse what the op has no rule for.

    Raises:
        RuntimeError: Autograd asks for a second derivative, or for batched gradients.
    """
    cure = "make the logits by torch.nn.functional.linear and call sigmoid_cross_entropy"
    if torch.is_grad_enabled():
        raise RuntimeError(f"this loss of a layer has no second derivative (create_graph=True): {cure}")
    if is_batched(grad_output):
        raise RuntimeError(f"this loss of a layer has no batched gradients (is_grads_batched=True): {cure}")


# The op


_NOTHING = (False, False, False)

_NAME = "fused_sce::_linear_sigmoid_cross_entropy"
# The tensors and options of the loss are those of its op.
_of_loss = str(schema_of(torch.ops.fused_sce._sigmoid_cross_entropy_backward.default))
_of_loss = _of_loss.split("Tensor input, ")[1].split(") ->")[0]
torch.library.define(
    _NAME,
    "(Tensor? grad_output, bool[3] wanted, ScalarType logits_dtype, SymInt chunk, "
    f"Tensor input, Tensor linear_weight, Tensor? bias, {_of_loss}) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def split(of_loss: Sequence[Any]) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """The tensors and the named options of the loss among the arguments of an op."""
    count = len(_autograd.TENSORS) - 1
    return tuple(of_loss[:count]), dict(zip(_autograd.OPTIONS, of_loss[count:], strict=False))


@torch.library.register_fake(_NAME)
def _fake(
    grad_output: Tensor | None,
    wanted: Sequence[bool],
    dtype: torch.dtype,
    chunk: int,
    *args: Any,
) -> tuple[Tensor, ...]:
    layer, (_, options) = Layer(*args[:3]), split(args[3:])
    return layer.input.new_empty((), dtype=options["dtype"]), *_empty_gradients(layer, wanted)


def _empty_gradients(layer: Layer, wanted: Sequence[bool]) -> list[Tensor]:
    return [
        part.new_empty(part.shape) if part is not None and is_wanted else layer.input.new_empty(0)
        for part, is_wanted in zip(layer, wanted, strict=True)
    ]


@torch.library.impl(_NAME, "CompositeExplicitAutograd")
def _op_by_chunks(
    grad_output: Tensor | None,
    wanted: Sequence[bool],
    dtype: torch.dtype,
    size: int,
    *args: Any,
) -> tuple[Tensor, ...]:
    """The loss, and the gradients that are wanted: for an upstream factor, which a loss of 0 comes with, or for 1."""
    layer, chunks = Layer(*args[:3]), Chunks(dtype, size)
    others, options = split(args[3:])
    with torch.autocast(layer.input.device.type, enabled=False):
        try:
            return _by_chunks(grad_output, wanted, layer, chunks, others, options)
        except RuntimeError:
            logits = stand_in(layer.input, dtype, len(layer.weight))
            check_targets(named((logits, *others)), options)
            raise


_COUNT = "fused_sce::_linear_count"
torch.library.define(
    _COUNT,
    f"(Tensor input, SymInt num_labels, SymInt chunk, {_of_loss}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake(_COUNT)
def _fake_count(input: Tensor, *_: Any) -> Tensor:
    return input.new_empty((), dtype=torch.int64)


@torch.library.impl(_COUNT, "CompositeExplicitAutograd")
def _count_by_chunks(input: Tensor, num_labels: int, size: int, *args: Any) -> Tensor:
    """How many elements count, of rows as the input's."""
    others, options = split(args)
    check_indices_of(stand_in(input, input.dtype, num_labels), others, options)
    total = input.new_zeros((), dtype=torch.int64)
    for begin in range(0, max(num_labels, 1), size):
        end = min(begin + size, num_labels)
        (target, _, _, _, *rest), of_part = part(others, options, begin, end, num_labels)
        logits = stand_in(input, input.dtype, end - begin)
        total += with_count((logits, target, None, None, COUNTED, *rest), of_part, by_kernel=input.is_cpu)[4]
    return total


_count = torch.ops.fused_sce._linear_count.default
op = torch.ops.fused_sce._linear_sigmoid_cross_entropy.default


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    end = 7 + len(_autograd.TENSORS) - 1
    ctx.chunks, ctx.options = inputs[2:4], inputs[end:]
    ctx.save_for_backward(*inputs[4:end])


def _backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients in a program that was exported, where the op stands alone."""
    _refuse_derivatives(grad_output)
    wanted = ctx.needs_input_grad[4:7]
    _, *gradients = op(grad_output, wanted, *ctx.chunks, *ctx.saved_tensors, *ctx.options)
    by = (gradient if is_wanted else None for gradient, is_wanted in zip(gradients, wanted, strict=True))
    return None, None, None, None, *by, *[None] * (len(_autograd.TENSORS) - 1 + len(ctx.options))


torch.library.register_autograd(_NAME, _backward, setup_context=_save)


def _by_chunks(
    upstream: Tensor | None,
    wanted: Sequence[bool],
    layer: Layer,
    chunks: Chunks,
    tensors: tuple[Tensor | None, ...],
    options: dict[str, Any],
) -> tuple[Tensor, ...]:
    dtype = chunks.dtype
    x, labels = layer.input.to(dtype), len(layer.weight)
    memory = x.new_empty(len(x) * min(chunks.size, labels))  # one for all chunks
    total = x.new_zeros((), dtype=torch.float64)
    _, by_weight, by_bias = gradients = _empty_gradients(layer, (False, *wanted[1:]))
    # Chunk by chunk a 16-bit type would lose what is small beside the sum.
    by_input = x.new_zeros(x.shape, dtype=torch.promote_types(dtype, torch.float32)) if wanted[0] else None
    check_indices_of(stand_in(x, dtype, labels), tensors, options)
    of_sums = {**options, "dtype": torch.float64}
    for begin in range(0, max(labels, 1), chunks.size):
        end = min(begin + chunks.size, labels)
        others, of_loss = part(tensors, of_sums, begin, end, labels)
        weight = layer.weight[begin:end].to(dtype)
        z = memory[: len(x) * (end - begin)].view(len(x), end - begin)
        if layer.bias is None:
            torch.mm(x, weight.t(), out=z)
        else:
            torch.addmm(layer.bias[begin:end].to(dtype), x, weight.t(), out=z)
        if upstream is not None:
            _autograd.backward_out(upstream, z, *others, *of_loss, gradient=z)
        elif any(wanted):
            total += _autograd.forward_out(z, *others, *of_loss, gradient=z)
        else:
            total += _autograd.call_op((z, *others), of_loss)
            continue
        if by_input is not None:
            if by_input.dtype == dtype:
                by_input.addmm_(z, weight)
            else:
                by_input += z @ weight
        if wanted[1]:
            _product(z.t(), x, out=by_weight[begin:end])
        if wanted[2]:
            torch.sum(z, 0, dtype=by_bias.dtype, out=by_bias[begin:end])
    if by_input is not None:
        gradients[0] = by_input.to(layer.input.dtype)
    return total.to(options["dtype"]), *gradients


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """A matrix product into memory of the same or another dtype."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def check_indices_of(logits: Tensor, tensors: tuple[Tensor | None, ...], options: dict[str, Any]) -> None:
    """Check the indices of a target: those out of range would be in no part."""
    target, *_, columns, rows = tensors
    assert target is not None
    target_format = options.get("target_format", "dense")
    if target_format in ("class_index", "index_list"):
        check_indices(logits, target, target_format, options.get("ignore_value"))
    elif target_format == "csr":
        assert columns is not None
        assert rows is not None
        check_csr(logits, columns, rows)


def part(
    tensors: tuple[Tensor | None, ...], options: dict[str, Any], begin: int, end: int, num_labels: int
) -> tuple[tuple[Tensor | None, ...], _autograd.Options]:
    """The tensors of the loss but for the logits, and the options, for labels [begin, end).

    Indices become lists of those in there, padded with -1, because their number is known before a GPU has counted them.
    """
    target, weight, pos_weight, count, mask, alpha, prior, columns, rows = tensors
    assert target is not None
    of_part = dict(options)
    target_format = options.get("target_format", "dense")

    def sliced(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensor.dim() == 0 or tensor.shape[-1] == 1 else tensor[..., begin:end]

    mask = sliced(mask)
    if target_format == "dense":
        target = target[:, begin:end]
    elif target_format == "packed":
        target = _packed(target, begin, end, num_labels)
    elif target_format == "csr":
        assert columns is not None
        assert rows is not None
        inside = (begin <= columns) & (columns < end)
        places = inside.nonzero().squeeze(1)  # a GPU is waited for, to know how many
        before = F.pad(inside.cumsum(0), (1, 0))
        target, columns, rows = target[places], columns[places] - begin, before[rows.long()]
    else:
        index = target.long()
        if target_format == "class_index":
            index = index.unsqueeze(-1)
            if options["ignore_value"] is not None:
                kept = index != options["ignore_value"]
                mask = kept if mask is None else kept & mask
            of_part["ignore_value"] = None
        target = torch.where((begin <= index) & (index < end), index - begin, -1)
        of_part["target_format"] = "index_list"
    others = sliced(weight), sliced(pos_weight), count, mask, sliced(alpha), sliced(prior), columns, rows
    return (target, *others), tuple(of_part.values())


def _packed(target: Tensor, begin: int, end: int, num_labels: int) -> Tensor:
    """The bytes of labels [begin, end)."""
    of_part = target[:, begin // 8 : (end + 7) // 8]
    shift = begin % 8
    if shift:
        following = F.pad(of_part[:, 1:], (0, 1))
        of_part = ((of_part >> shift) | (following << (8 - shift)))[:, : (end - begin + 7) // 8]
    if (end - begin) % 8 and end < num_labels:
        of_part = of_part.clone()
        of_part[:, -1] &= (1 << (end - begin) % 8) - 1
    return of_part
