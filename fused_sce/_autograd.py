"""The loss and its gradient: autograd Functions over the ops."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_sce import _library as _library  # registers the ops
from fused_sce import reference
from fused_sce._torch_private import (
    below_autograd,
    direct_call,
    has_memory,
    is_batched,
    is_transforming,
    schema_of,
    version_of,
)

_ops = torch.ops.fused_sce
_loss = _ops.sigmoid_cross_entropy.default
_forward = direct_call(_ops._sigmoid_cross_entropy_forward.default)
forward_out = _ops._sigmoid_cross_entropy_forward_out.default
_backward = _ops._sigmoid_cross_entropy_backward.default
backward_out = _ops._sigmoid_cross_entropy_backward_out.default
_scale_ = direct_call(_ops._scale_.default)
_count = direct_call(_ops._count.default)

Tensors = tuple[Any, ...]
"""The first arguments of the ops, as `TENSORS` names them: two tensors, and others that may be None."""

Options = tuple[Any, ...]
"""The other arguments in the order of the schema: reduction, dtype, divisor, ... The last ones may be missing."""

TENSORS = [argument.name for argument in schema_of(_loss).arguments if not argument.kwarg_only]
OPTIONS = [argument.name for argument in schema_of(_loss).arguments if argument.kwarg_only]
"""Their names."""


def all_tensors(**given: Tensor | None) -> Tensors:
    """The tensors of a call by their names."""
    return tuple(given.get(name) for name in TENSORS)


def loss(tensors: Tensors, options: Options, inplace: bool = False) -> Tensor:
    """The loss by the kernels, recorded by autograd where a gradient is wanted."""
    if not needs_graph(tensors):
        return _without_graph(tensors, options)
    input, target, weight, pos_weight, _, _, alpha, *_ = tensors
    value: Tensor
    if inplace:
        value = SigmoidCrossEntropyInPlace.apply(input, target, tensors[2:], options)[0]
    elif _requires_gradient(weight) or _requires_gradient(pos_weight) or _requires_gradient(alpha):
        value = SigmoidCrossEntropy.apply(input, target, tensors[2:], options, weight, pos_weight, alpha)
    else:
        value = SigmoidCrossEntropy.apply(input, target, tensors[2:], options)
    return value


def count(tensors: Tensors, options: Options) -> Tensor:
    """How many elements count, by the kernel for CPU tensors."""
    with below_autograd():
        value: Tensor = _count(*tensors, *options)
    return value


def call_op(tensors: Tensors, options: Options) -> Tensor:
    """The public op, as programs record it."""
    value: Tensor = _loss(*tensors, **dict(zip(OPTIONS, options, strict=False)))
    return value


def needs_graph(tensors: Tensors) -> bool:
    """Whether autograd records the call."""
    input, target, weight, pos_weight, _, _, alpha, *_ = tensors
    return torch.is_grad_enabled() and bool(
        input.requires_grad
        or target.requires_grad
        or _requires_gradient(weight)
        or _requires_gradient(pos_weight)
        or _requires_gradient(alpha)
    )


def _requires_gradient(factor: Tensor | None) -> bool:
    return factor is not None and factor.requires_grad


def _without_graph(tensors: Tensors, options: Options) -> Tensor:
    with below_autograd():
        return call_op(tensors, options)


def _makes_gradient(ctx: Any, input: Tensor, options: Options) -> bool:
    """Whether forward makes the gradient: input and target are at hand, so it costs one write more.

    Not in float16: divided by a large batch it underflows there, before a GradScaler's factor could save it. Not in a
    program: backward could not tell whether it has to be made anew.
    """
    by_input: bool = ctx.needs_input_grad[0]
    return (
        by_input
        and options[0] == "sum"
        and input.dtype is not torch.float16
        and has_memory(input)
        and not input.is_meta
    )


class SigmoidCrossEntropy(torch.autograd.Function):
    """The loss, differentiable in input, target, weight, pos_weight and label_alpha.

    With `ctx` in forward: a Function with `setup_context`, which `torch.func` asks for, takes twice the time (one row
    of 8 logits, forward and backward, torch 2.14: 97 us against 45). For the same reason it has few arguments: weight,
    pos_weight and label_alpha come by themselves, which lets autograd see them, only where one of them requires a
    gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, factors: tuple[Any, ...], options: Options, *_: Tensor | None
    ) -> Tensor:
        """The loss."""
        ctx.save_for_backward(input, target, *factors)
        ctx.options = options
        value: Tensor
        if _makes_gradient(ctx, input, options):
            value, ctx.gradient = _forward(input, target, *factors, *options)
        else:
            value, ctx.gradient = _without_graph((input, target, *factors), options), None
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the tensors."""
        made, ctx.gradient = ctx.gradient, None
        tensors, options = ctx.saved_tensors, ctx.options
        by_input, by_target, _, _, *by_factors = ctx.needs_input_grad
        if options[0] == "rows":
            grad_output = grad_output.unsqueeze(-1)  # broadcasts to the logits
        of_input = None
        by_kernel = by_input and not torch.is_grad_enabled() and not is_transforming()
        if by_kernel and made is not None and has_memory(grad_output):
            of_input = _finished(made, grad_output, tensors, options)
        elif by_kernel:
            of_input = _backward(grad_output, *tensors, *options)
        made = None  # gives its memory back
        if by_kernel and not (by_target or by_factors):
            return of_input, None, None, None
        wanted = (by_input and not by_kernel, by_target, *(by_factors or (False, False, False)))
        others = reference.gradients(wanted, grad_output, *tensors, *options)
        return of_input if by_kernel else others[0], others[1], None, None, *others[2 : 2 + len(by_factors)]


class SigmoidCrossEntropyInPlace(torch.autograd.Function):
    """The loss, differentiable in input, whose memory the gradient overwrites.

    In forward if the gradient is made there, else in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, factors: tuple[Any, ...], options: Options
    ) -> tuple[Tensor, ...]:
        """The loss, and the overwritten logits: whoever uses these from now on sends a gradient to that output."""
        ctx.options = options
        ctx.gradient, ctx.is_spent = None, False
        ctx.version = version_of(input) + 1  # which mark_dirty adds
        ctx.set_materialize_grads(False)
        if not _makes_gradient(ctx, input, options):
            ctx.save_for_backward(input, target, *factors)
            return (_without_graph((input, target, *factors), options),)
        value: Tensor = forward_out(input, target, *factors, *options, gradient=input)
        ctx.gradient = input.detach()  # not saved: autograd would refuse to give back what has changed
        ctx.mark_dirty(input)
        return value, input

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *of_logits: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient by input, once."""
        if of_logits and of_logits[0] is not None:
            raise RuntimeError(
                "The logits were used after a loss with inplace=True had overwritten them with their gradient. Use "
                "inplace=False"
            )
        if grad_output is None:
            return None, None, None, None
        if torch.is_grad_enabled():
            raise RuntimeError(
                "inplace=True has no second derivative (create_graph=True): the gradient overwrites the logits. "
                "Use inplace=False"
            )
        if is_batched(grad_output):
            raise RuntimeError("inplace=True has no batched gradients (is_grads_batched=True). Use inplace=False")
        if ctx.is_spent:
            raise RuntimeError(
                "inplace=True allows one backward pass: the gradient overwrote the logits and was given away. "
                "Use inplace=False"
            )
        tensors = ctx.saved_tensors  # once: a checkpoint recomputes them for one reading
        ctx.is_spent = True
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is not None:
            if version_of(gradient) != ctx.version:
                raise RuntimeError(
                    "The logits were changed after a loss with inplace=True had overwritten them with their gradient, "
                    "by an operation in place, perhaps on an alias (detach()). Use inplace=False"
                )
            return scaled(gradient, grad_output), None, None, None
        gradient = tensors[0].detach()
        backward_out(grad_output, *tensors, *ctx.options, gradient=gradient)
        torch.autograd.graph.increment_version(gradient)
        return gradient, None, None, None


def _finished(gradient: Tensor, factor: Tensor, tensors: Tensors, options: Options) -> Tensor:
    """The gradient for an upstream factor, in the memory of that for a factor of 1, the usual one.

    For another factor it is computed anew unless a product is exact: scaled, it would be rounded twice, and 0 or
    subnormal where the product is neither. On a GPU the kernel reads the factor, because the host would have to wait.
    """
    if not (gradient.is_cpu and factor.item() == 1.0):
        backward_out(factor, *tensors, *options, gradient=gradient, is_made=True)
    return gradient


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """The gradient that overwrote its logits times an upstream factor, in place."""
    if gradient.is_cuda:
        _scale_(gradient, factor)
        torch.autograd.graph.increment_version(gradient)
        return gradient
    value = factor.item()
    if value == 0.0:
        return gradient.zero_()  # whatever it was
    if not math.isfinite(value):
        return gradient.copy_(torch.where(gradient == 0, 0, gradient * factor))  # a weight of 0 may have left it out
    return gradient if value == 1.0 else gradient.mul_(factor)
