"""Sigmoid cross-entropy for multi-label models, fused in C++ and CUDA, right for every float.

A drop-in for `torch.nn.BCEWithLogitsLoss` and `torch.nn.MultiLabelSoftMarginLoss`: import them from here. The same
functions in plain torch are in `fused_sce.reference`.
"""

from fused_sce import functional, reference
from fused_sce._patch import patch_torch, unpatch_torch
from fused_sce.heads import MultiClassHead, MultiLabelHead, replace_head
from fused_sce.losses import (
    AsymmetricLoss,
    BCEWithLogitsLoss,
    LinearSigmoidCrossEntropyLoss,
    MultiLabelSoftMarginLoss,
    SigmoidCrossEntropyLoss,
    SigmoidFocalLoss,
)

__version__ = "0.1.0"  # the only place, from which pyproject.toml takes it

__all__ = [
    "AsymmetricLoss",
    "BCEWithLogitsLoss",
    "LinearSigmoidCrossEntropyLoss",
    "MultiClassHead",
    "MultiLabelHead",
    "MultiLabelSoftMarginLoss",
    "SigmoidCrossEntropyLoss",
    "SigmoidFocalLoss",
    "__version__",
    "functional",
    "patch_torch",
    "reference",
    "replace_head",
    "unpatch_torch",
]
