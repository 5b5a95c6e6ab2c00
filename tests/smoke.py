"""A few lines of use, for an installed wheel: needs torch alone. `make try-wheel` runs it first."""

from __future__ import annotations

import torch

import fused_sce

logits = torch.randn(8, 80, requires_grad=True)
labels = torch.rand(8, 80) < 0.05
loss = fused_sce.BCEWithLogitsLoss(pos_weight=torch.full((80,), 3.0))(logits, labels)
loss.backward()
expected = torch.nn.BCEWithLogitsLoss(pos_weight=torch.full((80,), 3.0))(logits, labels.float())
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(logits.grad, torch.autograd.grad(expected, logits)[0])
with fused_sce.patch_torch():
    bce = torch.nn.BCEWithLogitsLoss()(logits, labels.float())
    torch.testing.assert_close(torch.nn.MultiLabelSoftMarginLoss()(logits, labels.float()), bce)
print(f"fused_sce {fused_sce.__version__} from {fused_sce.__file__}: works")
