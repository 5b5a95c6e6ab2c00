"""Let unmodified code train through the fused ops: torch's two functions replaced for the whole process."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from types import FunctionType, TracebackType
from typing import Any

import torch.nn.functional
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fused_sce import functional

__all__ = ["patch_torch", "unpatch_torch"]

Function = Callable[..., Tensor]

# The losses of torch.nn.functional that have a fused twin of the same name and signature in fused_sce.functional.
# torch.nn's modules look them up there at each call, and so does other people's code that writes `F.`.
NAMES = ("binary_cross_entropy_with_logits", "multilabel_soft_margin_loss")

_lock = threading.Lock()
_originals: dict[str, Function] = {}  # torch's functions while they are replaced
_replacements: dict[str, Function] = {}


def _replacement(name: str, original: Function) -> Function:
    """The fused function with the signature and name of torch's, and as open to `__torch_function__`."""
    fused: Function = getattr(functional, name)
    names = list(inspect.signature(original).parameters)
    places = [names.index(factor) - 2 for factor in ("weight", "pos_weight") if factor in names]
    has_override, override = has_torch_function, handle_torch_function

    def call(input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        factors = [args[place] for place in places if place < len(args)]
        tensors = (input, target, *factors, kwargs.get("weight"), kwargs.get("pos_weight"))
        # The compiler knows how to ask at the ops; here it would ask about a subclass for ever.
        if not torch.compiler.is_compiling() and has_override(tensors):
            overridden: Tensor = override(replacement, tensors, input, target, *args, **kwargs)
            return overridden
        return fused(input, target, *args, **kwargs)

    # With the globals of torch's function: TorchScript compiles the source that functools.wraps points to, which is
    # torch's, and looks its names up here. (So a scripted model keeps torch's loss.)
    replacement = FunctionType(call.__code__, original.__globals__, name, None, call.__closure__)
    return functools.wraps(original)(replacement)


class _Patched:
    """What `patch_torch` returns: leaving its `with` block undoes the patch."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        unpatch_torch()


def patch_torch() -> _Patched:
    """Replace `torch.nn.functional`'s losses by the fused ones, from now on and in every thread.

    `binary_cross_entropy_with_logits` and `multilabel_soft_margin_loss` become those of `fused_sce.functional`, and
    with them `torch.nn.BCEWithLogitsLoss`, `torch.nn.MultiLabelSoftMarginLoss` and all code that calls one of the four:
    Hugging Face models, timm's losses, Keras on torch. Code that did `from torch.nn.functional import ...` before keeps
    torch's function, and so does a program that was exported before; TorchScript always compiles torch's.

    To be undone by `unpatch_torch()`, or at the end of a `with` block:

        with fused_sce.patch_torch():
            trainer.train()

    Returns:
        A context manager; the patch is in place already.

    Raises:
        RuntimeError: It is in place already.
    """
    with _lock:
        if _originals:
            raise RuntimeError(
                "patch_torch() was called while torch is patched already: call unpatch_torch() first, or leave the "
                "first `with patch_torch():` block before entering another"
            )
        for name in NAMES:
            _originals[name] = getattr(torch.nn.functional, name)
            _replacements[name] = _replacement(name, _originals[name])
        for name in NAMES:
            setattr(torch.nn.functional, name, _replacements[name])
    return _Patched()


def unpatch_torch() -> None:
    """Put torch's own losses back, see `patch_torch`.

    Raises:
        RuntimeError: They are in place, or somebody has replaced the fused ones in their turn; then nothing is changed.
    """
    with _lock:
        if not _originals:
            raise RuntimeError("unpatch_torch(): torch is not patched; patch_torch() was not called, or undone already")
        for name, replacement in _replacements.items():
            current = getattr(torch.nn.functional, name)
            if current is not replacement:
                raise RuntimeError(
                    f"unpatch_torch(): torch.nn.functional.{name} was replaced again after patch_torch(), by "
                    f"{current}: undo that first"
                )
        for name, original in _originals.items():
            setattr(torch.nn.functional, name, original)
        _originals.clear()
        _replacements.clear()
