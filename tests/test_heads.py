"""Heads and replace_head, on every torchvision family of classifiers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fused_sce
from fused_sce import MultiClassHead, MultiLabelHead, replace_head

torchvision = pytest.importorskip("torchvision", reason="needs a torch build that torchvision has wheels for")


class Backbone(nn.Module):
    """A model small enough to run: features and a head under any name."""

    def __init__(self, name: str, head: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
        self.name = name
        self.add_module(name, head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.name)(self.features(x))


@pytest.mark.parametrize(
    ("arch", "where"),
    [
        ("resnet18", "fc"),
        ("resnext50_32x4d", "fc"),
        ("shufflenet_v2_x0_5", "fc"),
        ("regnet_y_400mf", "fc"),
        ("densenet121", "classifier"),
        ("vgg11", "classifier.6"),
        ("alexnet", "classifier.6"),
        ("mobilenet_v2", "classifier.1"),
        ("mobilenet_v3_small", "classifier.3"),
        ("efficientnet_b0", "classifier.1"),
        ("mnasnet0_5", "classifier.1"),
        ("convnext_tiny", "classifier.2"),
        ("vit_b_32", "heads.head"),
        ("swin_t", "head"),
        ("maxvit_t", "classifier.5"),
    ],
)
def test_torchvision_models(arch: str, where: str) -> None:
    # on the meta device: the structure without the weights; RegNet computes its structure with tensors
    device = "cpu" if arch.startswith("regnet") else "meta"
    with torch.device(device):
        model = torchvision.models.get_model(arch, weights=None)
    old = model.get_submodule(where)
    assert replace_head(model, 7) is model
    new = model.get_submodule(where)
    assert type(new) is MultiLabelHead
    assert (new.in_features, new.out_features) == (old.in_features, 7)
    assert new.weight.device.type == device


@pytest.mark.parametrize(("arch", "size"), [("googlenet", 96), ("inception_v3", 96)])
def test_auxiliary_heads_follow(arch: str, size: int) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(arch, weights=None, init_weights=False, aux_logits=True)
    replace_head(model, 7)
    assert [m.out_features for m in model.modules() if isinstance(m, MultiLabelHead)] == (
        [7, 7] if arch == "inception_v3" else [7, 7, 7]
    )


def test_only_the_head_changes() -> None:
    model = torchvision.models.resnet18(weights=None)
    before = copy.deepcopy(model.state_dict())
    replace_head(model, 7)
    after = model.state_dict()
    assert before.keys() == after.keys()
    changed = [
        key for key in before if before[key].shape != after[key].shape or not torch.equal(before[key], after[key])
    ]
    assert changed == ["fc.weight", "fc.bias"]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", ["fc", "classifier", "head", "heads", "last_linear", "score"])
@pytest.mark.parametrize("nested", [False, True])
def test_head_names(name: str, nested: bool) -> None:
    old: nn.Module = nn.Linear(8, 3)
    if nested:
        old = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3), nn.Identity())
    model = Backbone(name, old)
    replace_head(model, 4)
    assert model(torch.randn(2, 6)).shape == (2, 4)
    assert sum(isinstance(m, MultiLabelHead) for m in model.modules()) == 1


def test_replacing_again() -> None:
    model = Backbone("fc", nn.Linear(8, 3))
    replace_head(model, 4)
    replace_head(model, 5, task="multiclass")
    assert type(model.get_submodule("fc")) is MultiClassHead
    assert model(torch.randn(2, 6)).shape == (2, 5)


def test_dtype_mode_and_records_follow_the_model() -> None:
    model = Backbone("head", nn.Linear(8, 3)).double().eval()
    model.num_classes = 3  # type: ignore[assignment]
    replace_head(model, 4, dropout=0.5)
    head = model.get_submodule("head")
    assert isinstance(head, MultiLabelHead)
    assert head.weight.dtype == torch.float64
    assert not head.training
    assert model.num_classes == 4
    assert head.num_classes == 4


def test_frozen_backbone_gets_no_gradient() -> None:
    model = replace_head(Backbone("fc", nn.Linear(8, 3)), 4, freeze_backbone=True)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]
    fused_sce.BCEWithLogitsLoss()(model(torch.randn(5, 6)), torch.ones(5, 4)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["fc.weight", "fc.bias"]


def test_model_without_a_head_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"Sequential has no head that replace_head knows.*Its parts are 0, 1"):
        replace_head(model, 4, freeze_backbone=True)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "regression"}, "task must be one of multilabel, multiclass, got 'regression'"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"init": "he"}, "init must be one of default, kaiming_normal, .*, got 'he'"),
    ],
)
def test_bad_options_leave_the_model_alone(options: dict[str, object], message: str) -> None:
    model = Backbone("fc", nn.Linear(8, 3))
    old = model.get_submodule("fc")
    with pytest.raises(ValueError, match=message):
        replace_head(model, **{"num_classes": 4, "freeze_backbone": True, **options})  # type: ignore[arg-type]
    assert model.get_submodule("fc") is old
    assert all(p.requires_grad for p in model.parameters())


def test_initialisations() -> None:
    for init, deviation in (
        ("kaiming_normal", (1 / 4096) ** 0.5),
        ("kaiming_uniform", (1 / 4096) ** 0.5),
        ("xavier_normal", (2 / (4096 + 500)) ** 0.5),
        ("xavier_uniform", (2 / (4096 + 500)) ** 0.5),
        ("zeros", 0.0),
    ):
        head = MultiLabelHead(4096, 500, init=init)
        assert head.weight.std().item() == pytest.approx(deviation, rel=0.01)
        assert not head.bias.any()
    torch.manual_seed(3)
    ours = MultiLabelHead(8, 5, init="default")
    torch.manual_seed(3)
    theirs = nn.Linear(8, 5)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


def test_dropout_only_in_training() -> None:
    head = MultiLabelHead(1000, 2, dropout=0.5)
    x = torch.ones(1, 1000)
    assert not torch.equal(head(x), head(x))
    head.eval()
    assert torch.equal(head(x), head(x))


def test_probabilities() -> None:
    x = torch.randn(3, 8)
    labels, classes = MultiLabelHead(8, 5).predict_proba(x), MultiClassHead(8, 5).predict_proba(x)
    assert labels.shape == classes.shape == (3, 5)
    assert ((labels > 0) & (labels < 1)).all()
    torch.testing.assert_close(classes.sum(-1), torch.ones(3))
