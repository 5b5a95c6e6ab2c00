"""Let unmodified code train through the fused ops: exchange what torch's two functions do, for the whole process."""

from __future__ import annotations

import functools
import inspect
import threading
from types import CodeType, FunctionType, TracebackType

import torch.nn.functional
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fused_sce._torch_private import let_compiler_inline

__all__ = ["patch_torch", "unpatch_torch"]


# The code of these two becomes that of torch's functions of the same names, so their parameters are torch's, in torch's
# order; the defaults stay torch's. It runs with the globals of torch.nn.functional: of these it uses those that torch's
# own code uses, and the function's name is torch's function there.
# They ask overrides as torch's functions do. Code that is being compiled asks at the op instead: here it would ask
# without end.


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


# Torch's functions themselves, whatever stands under their names later.
_FUSED: dict[FunctionType, CodeType] = {
    getattr(torch.nn.functional, ours.__name__): ours.__code__
    for ours in (binary_cross_entropy_with_logits, multilabel_soft_margin_loss)
}
_originals: dict[FunctionType, CodeType] = {}  # torch's code while it is exchanged
_lock = threading.Lock()


def _patch() -> None:
    if _originals:
        return
    for function, code in _FUSED.items():
        known = inspect.getargs(code)
        is_torchs = getattr(function, "__globals__", None) is vars(torch.nn.functional)
        if not is_torchs or inspect.getargs(function.__code__) != known:
            raise RuntimeError(
                f"patch_torch(): torch.nn.functional.{code.co_name} is not the function that fused_sce knows, with the "
                f"arguments {', '.join(known.args)}, but {function}: torch {torch.__version__} has changed it, or "
                "somebody replaced it before fused_sce was imported"
            )
    # Before the code is exchanged, so that no other thread's compilation takes the fused function for a node.
    let_compiler_inline([code.co_name for code in _FUSED.values()], True)
    for function, code in _FUSED.items():
        # TorchScript compiles the source of what `__wrapped__` points to, which is torch's.
        original = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
        functools.update_wrapper(original, function)
        del original.__wrapped__  # type: ignore[attr-defined]
        function.__wrapped__ = original  # type: ignore[attr-defined]
        _originals[function] = function.__code__
        function.__code__ = code


def _unpatch() -> None:
    for function, code in _FUSED.items():
        current = function.__code__
        if current is not code:
            raise RuntimeError(
                f"unpatch_torch(): the code of torch.nn.functional.{code.co_name} was exchanged again after "
                f"patch_torch(), for that of {current.co_filename}, line {current.co_firstlineno}: undo that first"
            )
    for function, code in _originals.items():
        function.__code__ = code
        del function.__wrapped__  # type: ignore[attr-defined]
    let_compiler_inline([code.co_name for code in _FUSED.values()], False)
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
    """Make `torch.nn.functional`'s losses the fused ones, from now on and in every thread.

    `binary_cross_entropy_with_logits` and `multilabel_soft_margin_loss` do what those of `fused_sce.functional` do, and
    with them `torch.nn.BCEWithLogitsLoss`, `torch.nn.MultiLabelSoftMarginLoss` and all code that calls one of the four:
    Hugging Face models, timm's losses, Keras on torch. The functions stay the same objects: whoever imported one by
    name, at any time, follows, and modules that keep one can be pickled. A spawned process starts without the patch.

    Compiled code is compiled again (with torch 2.11 not that of a module which has the function for an attribute).
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
    with _lock:
        _patch()
        _context.calls += 1
    return _context


def unpatch_torch() -> None:
    """Put torch's own losses back, also inside a `with` block of `patch_torch`.

    Raises:
        RuntimeError: They are in place, or somebody has exchanged the code of torch's functions after `patch_torch`;
            then nothing is changed.
    """
    with _lock:
        if not _originals:
            raise RuntimeError("unpatch_torch(): torch is not patched; patch_torch() was not called, or undone already")
        _unpatch()
        _context.calls = 0
