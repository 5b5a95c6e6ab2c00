"""Let unmodified code train through the fused ops: exchange what others' losses do, for the whole process."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import operator
import threading
from collections.abc import Callable
from types import CodeType, FunctionType, TracebackType
from typing import Any

import torch.nn.functional
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fused_sce._checks import _OTHERS, LOGITS
from fused_sce._torch_private import let_compiler_inline

__all__ = ["patch_torch", "unpatch_torch"]


# The code of these becomes that of the functions that they are named after, so their parameters are those functions',
# in the same order; the defaults stay theirs. It runs with the globals of their modules: of these it uses at most those
# that the functions' own code uses, and imports the rest.
# The first two ask overrides as torch's functions do. Code that is being compiled asks at the op instead: here it would
# ask without end.


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size_average: bool | None,
    reduce: bool | None,
    reduction: str,
    pos_weight: Tensor | None,
) -> Tensor:
    """What `torch.nn.functional.binary_cross_entropy_with_logits` does while patched."""
    import fused_sce

    if has_torch_function_variadic(input, target, weight, pos_weight) and not torch.compiler.is_compiling():
        overridden: Tensor = handle_torch_function(
            binary_cross_entropy_with_logits,
            (input, target, weight, pos_weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            pos_weight=pos_weight,
        )
        return overridden
    return fused_sce.functional.binary_cross_entropy_with_logits(
        input, target, weight, size_average, reduce, reduction, pos_weight
    )


def multilabel_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size_average: bool | None,
    reduce: bool | None,
    reduction: str,
) -> Tensor:
    """What `torch.nn.functional.multilabel_soft_margin_loss` does while patched."""
    import fused_sce

    if has_torch_function_variadic(input, target, weight) and not torch.compiler.is_compiling():
        overridden: Tensor = handle_torch_function(
            multilabel_soft_margin_loss,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
        )
        return overridden
    return fused_sce.functional.multilabel_soft_margin_loss(input, target, weight, size_average, reduce, reduction)


# The functions of other packages take more than the fused ones do. They keep their own code for such calls.


def sigmoid_focal_loss(inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: str) -> Tensor:
    """What `torchvision.ops.sigmoid_focal_loss` does while patched."""
    from fused_sce import _patch, functional

    if _patch.takes_focal(inputs, targets, alpha, gamma, reduction):
        return functional.sigmoid_focal_loss(inputs, targets, alpha, gamma, reduction)
    return _patch.theirs["sigmoid_focal_loss"](inputs, targets, alpha, gamma, reduction)


def asymmetric_loss_forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """What `timm.loss.AsymmetricLossMultiLabel.forward` does while patched."""
    from fused_sce import _patch, functional

    if not _patch.takes_asymmetric(self, x, y):
        return _patch.theirs["asymmetric_loss_forward"](self, x, y)
    is_batchmean = self.reduction == "batchmean"
    # Divided by the kernel where it can be: then backward need not make the gradient anew.
    of_batch = "sum_classes" if x.dim() == 2 else "sum"
    # The loss has the target's dtype, so timm's float32. Half-precision logits need no copy for that.
    loss = functional.asymmetric_loss(
        x if x.is_floating_point() and x.itemsize == 2 else x.float(),
        y.float(),
        gamma_neg=self.gamma_neg,
        gamma_pos=self.gamma_pos,
        clip=self.clip,
        weight=self.weight,
        pos_weight=self.pos_weight,
        reduction=of_batch if is_batchmean else self.reduction,
        label_smoothing=self.smoothing,
        smoothing_prior=0.5,
    )
    return loss / x.shape[0] if is_batchmean and x.dim() != 2 else loss


def takes_focal(input: Tensor, target: Tensor, alpha: float, gamma: float, reduction: str) -> bool:
    """Whether the fused focal loss is torchvision's for these arguments.

    The others are errors, for which torchvision has its own words, or beyond us: a negative gamma, or tensors in the
    place of numbers.
    """
    return (
        reduction in ("none", "mean", "sum")
        and _is_number(alpha)
        and (0.0 <= alpha <= 1.0 or alpha == -1.0)
        and _is_number(gamma)
        and 0.0 <= gamma < math.inf
        and _are_alike(input, target)
        and input.dtype in LOGITS
        and target.dtype in _OTHERS
    )


def takes_asymmetric(module: Any, input: Tensor, target: Tensor) -> bool:
    """Whether the fused asymmetric loss is timm's for these arguments.

    It is not where timm leaves the factor `m^g` out of the gradient, nor where somebody cuts the loss off by a larger
    eps than timm's default, which cuts what float32 rounds away.
    """
    return (
        not module.disable_torch_grad_focal_loss
        and module.eps <= 1e-8
        and module.reduction in ("batchmean", "sum", "mean", "none")
        and all(_is_number(gamma) and 0.0 <= gamma < math.inf for gamma in (module.gamma_neg, module.gamma_pos))
        and (module.clip is None or (_is_number(module.clip) and 0.0 <= module.clip < 1.0))
        and _is_number(module.smoothing)
        and 0.0 <= module.smoothing <= 1.0
        and _are_alike(input, target)
        and not (input.is_complex() or target.is_complex())
        and all(_keeps_shape_and_dtype(factor, input) for factor in (module.weight, module.pos_weight))
    )


def _is_number(value: object) -> bool:
    return isinstance(value, float | int | torch.SymFloat)


def _are_alike(input: object, target: object) -> bool:
    """Whether both are dense tensors of the same shape; a proxy of torch.fx is none."""
    return (
        isinstance(input, Tensor)
        and isinstance(target, Tensor)
        and not (input.is_nested or target.is_nested)  # before the shapes, which those may not have
        and input.layout == target.layout == torch.strided
        and input.shape == target.shape
    )


def _keeps_shape_and_dtype(factor: Tensor | None, input: Tensor) -> bool:
    """Whether a float32 loss keeps its dtype and the input's shape where a factor multiplies it."""
    if factor is None:
        return True
    missing = input.dim() - factor.dim()
    return (
        factor.dtype in _OTHERS
        and factor.dtype != torch.float64
        and missing >= 0
        and all(own in (1, size) for own, size in zip(factor.shape, input.shape[missing:], strict=True))
    )


# Torch's functions themselves, whatever stands under their names later. Those of other packages join them.
_FUSED: dict[FunctionType, CodeType] = {
    getattr(torch.nn.functional, ours.__name__): ours.__code__
    for ours in (binary_cross_entropy_with_logits, multilabel_soft_margin_loss)
}
_PACKAGES: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "torchvision.ops.focal_loss": ("sigmoid_focal_loss", sigmoid_focal_loss),
    "timm.loss.asymmetric_loss": ("AsymmetricLossMultiLabel.forward", asymmetric_loss_forward),
}
"""The functions of other packages: module, name there, ours."""
_ASYMMETRIC_OPTIONS = (
    *("self", "gamma_neg", "gamma_pos", "clip", "eps", "disable_torch_grad_focal_loss"),
    *("smoothing", "reduction", "weight", "pos_weight"),
)
"""The arguments of timm's class, which are its attributes. Another version's forward may do more, or less."""

_originals: dict[FunctionType, CodeType] = {}  # the functions' own code while it is exchanged
theirs: dict[str, Callable[..., Tensor]] = {}
"""Functions with the original code, by our names. They stay: a thread may still run our code after the patch."""
_lock = threading.Lock()


@functools.cache
def _find(module_name: str) -> None:
    """Import a module of another package and add its function to `_FUSED`, if there is one that we know.

    Once for a process: to import a broken package again takes time, and does not mend it.
    """
    name, ours = _PACKAGES[module_name]
    try:
        function = operator.attrgetter(name)(importlib.import_module(module_name))
    except Exception:  # it is not installed, or for another torch, or another version without the function
        return
    if _is_known(function, ours.__code__, module_name):
        _FUSED[function] = ours.__code__


def _module_of(function: object) -> str | None:
    """The module whose globals a function has."""
    name: str | None = getattr(function, "__globals__", {}).get("__name__")
    return name


def _is_known(function: Any, code: CodeType, module_name: str) -> bool:
    """Whether a function is one of its module's, and can run our code."""
    if _module_of(function) != module_name or inspect.getargs(function.__code__) != inspect.getargs(code):
        return False
    if code is asymmetric_loss_forward.__code__:
        options = inspect.signature(function.__globals__["AsymmetricLossMultiLabel"].__init__).parameters
        return tuple(options) == _ASYMMETRIC_OPTIONS
    return True


def _known() -> dict[FunctionType, CodeType]:
    """The functions whose code can be exchanged now.

    Raises:
        RuntimeError: One of torch's is none of them.
    """
    known = {}
    for function, code in _FUSED.items():
        module_name = _module_of(function)
        if module_name in _PACKAGES:
            if _is_known(function, code, module_name):
                known[function] = code
        elif _is_known(function, code, "torch.nn.functional"):
            known[function] = code
        else:
            raise RuntimeError(
                f"patch_torch(): torch.nn.functional.{code.co_name} is not the function that fused_sce knows, with the "
                f"arguments {', '.join(inspect.getargs(code).args)}, but {function}: torch {torch.__version__} has "
                "changed it, or somebody replaced it before fused_sce was imported"
            )
    return known


def _let_compiler_inline_torchs(inline: bool) -> None:
    """The functions of other packages are inlined anyway."""
    names = [function.__name__ for function in _FUSED if _module_of(function) == "torch.nn.functional"]
    let_compiler_inline(names, inline)


def _patch() -> None:
    if _originals:
        return
    known = _known()
    # Before the code is exchanged, so that no other thread's compilation takes the fused function for a node.
    _let_compiler_inline_torchs(True)
    for function, code in known.items():
        # TorchScript compiles the source of what `__wrapped__` points to, which is the original.
        original = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
        functools.update_wrapper(original, function)
        del original.__wrapped__  # type: ignore[attr-defined]
        function.__wrapped__ = original  # type: ignore[attr-defined]
        theirs[code.co_name] = original
        _originals[function] = function.__code__
        function.__code__ = code


def _unpatch() -> None:
    for function in _originals:
        current = function.__code__
        if current is not _FUSED[function]:
            raise RuntimeError(
                f"unpatch_torch(): the code of {function.__module__}.{function.__qualname__} was exchanged again after "
                f"patch_torch(), for that of {current.co_filename}, line {current.co_firstlineno}: undo that first"
            )
    for function, code in _originals.items():
        function.__code__ = code
        del function.__wrapped__  # type: ignore[attr-defined]
    _let_compiler_inline_torchs(False)
    _originals.clear()


class _Patch:
    """What `patch_torch` returns."""

    def __init__(self) -> None:
        self.calls = 0  # of patch_torch() that belong to no block
        self.blocks = 0  # `with` blocks that have not ended

    def __enter__(self) -> None:
        with _lock:
            _patch()
            self.calls = max(self.calls - 1, 0)
            self.blocks += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _lock:
            self.blocks -= 1
            if self.blocks or self.calls or not _originals:
                return
            try:
                _unpatch()
            except RuntimeError:
                if error is None:  # else the user's own matters more
                    raise


_context = _Patch()


def patch_torch() -> _Patch:
    """Make the losses of torch, torchvision and timm the fused ones, from now on and in every thread.

    `binary_cross_entropy_with_logits` and `multilabel_soft_margin_loss` of `torch.nn.functional` do what those of
    `fused_sce.functional` do, and with them `torch.nn.BCEWithLogitsLoss`, `torch.nn.MultiLabelSoftMarginLoss` and all
    code that calls one of the four: Hugging Face models, timm's `BinaryCrossEntropy`, Keras on torch.

    Where these packages are installed, `torchvision.ops.sigmoid_focal_loss` does what the fused one does, and
    `timm.loss.AsymmetricLossMultiLabel` what the fused `asymmetric_loss` does, in float32 as before. Calls that the
    fused ones do not take keep the packages' own code: with a negative gamma, for example, and with timm's
    `disable_torch_grad_focal_loss` or an `eps` above its default. The first call imports both packages, which may take
    seconds. A package that cannot be imported, and a function with other arguments or options than those known, as in
    older versions of timm, are left alone.

    The functions stay the same objects: whoever imported one by name, at any time, follows, and modules that keep one
    can be pickled. A spawned process starts without the patch.

    Compiled code is compiled again, but not that of a function or model which calls timm's class, nor with torch 2.11
    that of a module which has a function for an attribute: there call `torch.compiler.reset()` after the patch.
    TorchScript goes on compiling torch's losses, and a program that was exported before keeps them.

    To be undone by `unpatch_torch()`, or at the end of a `with` block:

        with fused_sce.patch_torch():
            trainer.train()

    The patch is in place when the call returns, before the block. If it was so already, the call changes nothing.

    Returns:
        A context manager, the same one each time. Its block can be entered again, which patches again. If blocks
        overlap, in one another or in several threads, the last to end undoes the patch, unless it was in place before
        the first. The end of a block may raise what `unpatch_torch` raises, but never in place of an exception that
        ends it.

    Raises:
        RuntimeError: Torch's functions are not those that fused_sce knows.
    """
    for module_name in _PACKAGES:
        _find(module_name)  # without the lock: a module may call this function while it is imported
    with _lock:
        _patch()
        _context.calls += 1
    return _context


def unpatch_torch() -> None:
    """Put the original losses back, also inside a `with` block of `patch_torch`.

    Raises:
        RuntimeError: They are in place, or somebody has exchanged the code of one of the functions after `patch_torch`;
            then nothing is changed.
    """
    with _lock:
        if not _originals:
            raise RuntimeError("unpatch_torch(): torch is not patched; patch_torch() was not called, or undone already")
        _unpatch()
        _context.calls = 0
