"""Heads and replace_head, on every torchvision family of classifiers."""

from __future__ import annotations

import copy
import io
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def outputs(model: nn.Module) -> list[int]:
    """The number of outputs of every linear layer and convolution."""
    return [m.weight.shape[0] for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]


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
    assert type(new) is nn.Linear
    assert (new.in_features, new.out_features) == (old.in_features, 7)
    assert new.weight.device.type == device


@pytest.mark.parametrize(("arch", "size"), [("googlenet", 96), ("inception_v3", 96)])
def test_auxiliary_heads_follow(arch: str, size: int) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(arch, weights=None, init_weights=False, aux_logits=True)
    replace_head(model, 7)
    assert outputs(model).count(7) == (2 if arch == "inception_v3" else 3)
    assert 1000 not in outputs(model)


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
    assert outputs(model).count(4) == 1


def test_replacing_again() -> None:
    model = Backbone("fc", nn.Linear(8, 3))
    replace_head(model, 4, dropout=0.5)
    assert type(model.get_submodule("fc")) is MultiLabelHead
    replace_head(model, 5, task="multiclass", dropout=0.5)
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


def test_a_model_that_was_built_without_a_head_says_so() -> None:
    model = Backbone("head", nn.Identity())
    kept(
        model,
        lambda: replace_head(model, 4),
        r"its head .torch.nn.modules.linear.Identity. has no linear layer of torch.nn. Build the model with a",
    )


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
        (
            {"num_classes": ["cat", "dog"]},
            r"num_classes must be an int, got list \['cat', 'dog'\]; give their number, 2",
        ),
        ({"num_classes": "5"}, "num_classes must be an int, got str '5'"),
        ({"num_classes": True}, "num_classes must be an int, got bool True"),
        ({"num_classes": 5.0}, "num_classes must be an int, got float 5.0"),
        ({"dropout": "0.5"}, r"dropout must be a float in \[0, 1\), got str '0.5'"),
        ({"dropout": None}, r"dropout must be a float in \[0, 1\), got NoneType None"),
        ({"head": 3}, "head must be the name of a layer, or a list of names, got 3"),
        ({"head": []}, r"head must be the name of a layer, or a list of names, got \[\]"),
        (
            {"head": "fc2"},
            "head must name a linear layer or a .*, got 'fc2': there is no such part. .* are .*fc",
        ),
        (
            {"head": "features.1"},
            "got 'features.1': that is a BatchNorm1d. The last ones of Backbone are features.0, fc",
        ),
    ],
)
def test_bad_options_leave_the_model_alone(options: dict[str, object], message: str) -> None:
    model = Backbone("fc", nn.Linear(8, 3))
    old = model.get_submodule("fc")
    with pytest.raises((ValueError, TypeError), match=message):
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


def test_a_model_that_is_none() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        replace_head("resnet18", 4)  # type: ignore[type-var]


def test_numpy_integers_count() -> None:
    model = replace_head(Backbone("fc", nn.Linear(8, 3)), torch.tensor(4).numpy()[()])  # type: ignore[arg-type]
    assert model(torch.randn(2, 6)).shape == (2, 4)


def test_a_lazy_head_must_have_seen_a_batch() -> None:
    model = Backbone("fc", nn.LazyLinear(3))
    with pytest.raises(
        ValueError, match=r"the head fc .LazyLinear. does not know its input size yet: run the model once"
    ):
        replace_head(model, 4)
    model(torch.randn(2, 6))
    assert replace_head(model, 4)(torch.randn(2, 6)).shape == (2, 4)


# --- Several heads -------------------------------------------------------------------------------


class TwoHeads(nn.Module):
    """Two heads whose outputs are averaged, as distilled models do."""

    def __init__(self, **heads: nn.Module) -> None:
        super().__init__()
        self.features = nn.Linear(6, 8)
        self.names = list(heads)
        for name, head in heads.items():
            self.add_module(name, head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        return torch.stack([self.get_submodule(name)(x) for name in self.names]).mean(dim=0)


def kept(model: nn.Module, act: Callable[[], object], message: str) -> None:
    """`act` raises ValueError and leaves the model as it was."""
    before = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        act()
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == before


# 3 labels as before: shapes alone would not show an old head that is averaged in.
@pytest.mark.parametrize("labels", [3, 4])
def test_several_heads_are_replaced_or_refused(labels: int) -> None:
    model = TwoHeads(head=nn.Linear(8, 3), head_dist=nn.Linear(8, 3))
    replace_head(model, labels, init="zeros", freeze_backbone=True)
    assert torch.equal(model(torch.randn(2, 6)), torch.zeros(2, labels))
    assert sum(p.requires_grad for p in model.parameters()) == 4

    model = TwoHeads(head=nn.Linear(8, 3), student=nn.Linear(8, 3))
    kept(
        model,
        lambda: replace_head(model, labels, freeze_backbone=True),
        r"seems to have several heads: head, student.* head=\['head', 'student'\]",
    )
    replace_head(model, labels, head=["head", "student"], init="zeros")
    assert torch.equal(model(torch.randn(2, 6)), torch.zeros(2, labels))


@pytest.mark.parametrize(
    "heads",
    [
        nn.ModuleDict({"colour": nn.Linear(8, 7), "shape": nn.Linear(8, 3)}),
        nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)]),
        nn.ModuleDict({"a": nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)), "b": nn.Linear(8, 3)}),
    ],
)
def test_a_collection_of_heads_is_refused(heads: nn.Module) -> None:
    model = Backbone("heads", heads)
    kept(model, lambda: replace_head(model, 3, freeze_backbone=True), "seems to have several heads: heads")
    kept(model, lambda: replace_head(model, 3, head="heads", freeze_backbone=True), "seems to have several heads")


def test_hidden_layers_are_no_heads() -> None:
    model = Backbone("head", nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 3)))
    hidden = model.get_submodule("head.0")
    replace_head(model, 4)
    assert model.get_submodule("head.0") is hidden
    assert model(torch.randn(2, 6)).shape == (2, 4)


@pytest.mark.parametrize("head", [None, "fc", "output"])
def test_a_head_with_two_names_is_replaced_under_both(head: str | None) -> None:
    model = Backbone("fc", nn.Linear(8, 3))
    model.output = model.fc
    replace_head(model, 3, head=head, init="zeros")
    assert model.output is model.fc
    assert not model.fc.weight.any()


def test_shared_parts() -> None:
    resnet = torchvision.models.resnet18(weights=None)
    parts = OrderedDict(backbone=resnet, features=nn.Sequential(*list(resnet.children())[:-1]), fc=nn.Linear(512, 3))
    model = replace_head(nn.Sequential(parts), 4)
    assert (model.get_submodule("fc").out_features, resnet.fc.out_features) == (4, 1000)


class Parts(nn.Module):
    """Parts in the order in which they are given; what uses them is not said."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


@pytest.mark.parametrize("outputs_of_head", [3, 4])  # replaced by 4
def test_a_layer_in_front_of_the_head_may_have_a_heads_name(outputs_of_head: int) -> None:
    model = Parts(body=nn.Linear(6, 8), fc=nn.Linear(8, 16), classifier=nn.Linear(16, outputs_of_head))
    fc = model.get_submodule("fc")
    replace_head(model, 4, init="zeros")
    assert model.get_submodule("fc") is fc
    assert not model.get_submodule("classifier").weight.any()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"head": nn.Linear(8, 5), "classifier": nn.Linear(8, 3)}, "seems to have several heads: classifier, head"),
        ({"fc": nn.Linear(8, 16), "out": nn.Linear(16, 3)}, r"fc of Parts does not seem.*as out .Linear. reads 16"),
        ({"last_linear": nn.Linear(8, 16), "last_bn": nn.BatchNorm1d(16)}, "as last_bn .BatchNorm1d. reads 16 values"),
        ({"fc": nn.Linear(8, 3), "norm": nn.LayerNorm(3)}, "as norm .LayerNorm. reads 3 values"),
        (
            {"head": Parts(out=nn.Linear(16, 3), hidden=nn.Linear(8, 16))},
            "seems to have several heads: head.out, head.hid",
        ),
        ({"head": Parts(proj=nn.Conv2d(8, 16, 1), out=nn.Conv2d(16, 3, 3))}, "as head.out .Conv2d. reads 16 values"),
        ({"fc": nn.Linear(8, 3), "out": nn.Sequential(nn.Sigmoid())}, "beside the head fc stands out .Sequential"),
        ({"classifier": nn.Linear(8, 3), "module": nn.Linear(8, 3)}, "seems to have several heads: classifier, module"),
    ],
)
def test_doubts_are_refused(parts: dict[str, nn.Module], message: str) -> None:
    model = Parts(body=nn.Linear(6, 8), **parts)
    kept(model, lambda: replace_head(model, 3, freeze_backbone=True), message)


@pytest.mark.parametrize("arch", ["inception_next_atto", "hgnet_tiny", "resnet50_clip", "vit_tiny_patch16_224"])
def test_timm_models_without_a_classifier_are_refused(arch: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(arch, pretrained=False, num_classes=0)
    kept(model, lambda: replace_head(model, 7, freeze_backbone=True), "Build the model with a classifier")


@pytest.mark.parametrize(
    ("arch", "heads"),
    [
        ("deit_tiny_distilled_patch16_224", ["head", "head_dist"]),
        ("crossvit_9_240", ["head.0", "head.1"]),
        ("levit_128s", ["head.linear", "head_dist.linear"]),
        ("levit_384_s8", ["head.linear", "head_dist.linear"]),  # timm states only the first
        ("efficientformer_l1", ["head", "head_dist"]),
        ("repvit_m1", ["head.head.l", "head.head_dist.l"]),
        ("resnetv2_50", ["head.fc"]),
        ("resnet18", ["fc"]),
    ],
)
def test_timm_models(arch: str, heads: list[str]) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = replace_head(timm.create_model(arch, pretrained=False), 7, freeze_backbone=True)
        trained = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
        assert trained == set(heads)
        assert 1000 not in outputs(model)
        assert model.num_classes == 7
        # timm's own way of doing it goes on working, and so does ours after it
        model.reset_classifier(5)
        assert model.num_classes == 5
        replace_head(model, 6)
        assert not {1000, 7, 5} & set(outputs(model))
        assert model.eval()(torch.zeros(1, *model.pretrained_cfg["input_size"])).shape == (1, 6)


def small_hugging_face_model(kind: str) -> Any:
    """A model of a few thousand weights, and what it takes."""
    transformers = pytest.importorskip("transformers")
    conv = {"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}
    levit = {"hidden_sizes": [16, 16, 16], "num_attention_heads": [1, 1, 1], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}
    vit = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "image_size": 32}
    bert = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 11,
    }
    text = {"d_model": 8, "vocab_size": 11, "pad_token_id": 0, "eos_token_id": 2, "num_heads": 1, "d_ff": 8, "d_kv": 8}
    text |= {
        "encoder_attention_heads": 1,
        "decoder_attention_heads": 1,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "num_layers": 1,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
    }
    config, model, arguments = {
        "resnet": ("ResNetConfig", "ResNetForImageClassification", conv),
        "levit": ("LevitConfig", "LevitForImageClassificationWithTeacher", levit),
        "deit": ("DeiTConfig", "DeiTForImageClassificationWithTeacher", vit),
        "gpt2": (
            "GPT2Config",
            "GPT2ForSequenceClassification",
            {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 11},
        ),
        "bert": ("BertConfig", "BertForSequenceClassification", bert),
        "questions": ("BertConfig", "BertForQuestionAnswering", bert),
        "yolos": ("YolosConfig", "YolosForObjectDetection", vit | {"image_size": [32, 32]}),
        "bart": ("BartConfig", "BartForSequenceClassification", text),
        "t5": ("T5Config", "T5ForSequenceClassification", text),
    }[kind]
    return getattr(transformers, model)(getattr(transformers, config)(num_labels=3, **arguments))


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("resnet", ["classifier.1"]),
        ("levit", ["classifier.linear", "classifier_distill.linear"]),
        ("deit", ["cls_classifier", "distillation_classifier"]),
        ("bart", ["classification_head.out_proj"]),
        ("t5", ["classification_head.out_proj"]),
        ("gpt2", ["score"]),  # without a bias, which a saved model could not give back
    ],
)
def test_hugging_face_models_are_saved_and_loaded(kind: str, heads: list[str], tmp_path: Path) -> None:
    model = small_hugging_face_model(kind)
    replace_head(model, 7, freeze_backbone=True)
    assert {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad} == set(heads)
    assert model.config.num_labels == getattr(model, "num_labels", 7) == len(model.config.id2label) == 7
    assert model.config.problem_type == "multi_label_classification"
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.problem_type == "multi_label_classification"
    assert loaded.config.label2id == {f"LABEL_{i}": i for i in range(7)}
    for name in heads:
        assert loaded.get_submodule(name).state_dict().keys() == model.get_submodule(name).state_dict().keys()
        assert torch.equal(loaded.get_submodule(name).weight, model.get_submodule(name).weight)
    if kind == "resnet":
        labels = torch.tensor([[1.0] * 7])
        output = loaded(pixel_values=torch.randn(1, 3, 32, 32), labels=labels)
        expected = nn.functional.binary_cross_entropy_with_logits(output.logits, labels)
        torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("kind", ["questions", "yolos"])
def test_hugging_face_models_that_are_no_classifiers_are_refused(kind: str) -> None:
    model = small_hugging_face_model(kind)
    kept(model, lambda: replace_head(model, 7, freeze_backbone=True), "it is no classifier")


def test_records_belong_to_their_head() -> None:
    inner = small_hugging_face_model("bert")
    model = Parts(model=inner, aux=nn.Linear(8, 5))
    model.num_classes = 3  # type: ignore[assignment]
    replace_head(model, 9, head="aux")
    assert (model.num_classes, inner.config.num_labels) == (3, 3)
    replace_head(model, 7, head="model.bert.pooler.dense")
    assert (model.num_classes, inner.config.num_labels) == (3, 3)
    replace_head(model, 7, head="model.classifier")
    assert (model.num_classes, inner.num_labels, inner.config.num_labels) == (7, 7, 7)
    assert inner.config.problem_type == "multi_label_classification"


def test_the_names_of_labels_stay_where_their_number_does() -> None:
    model = small_hugging_face_model("resnet")
    model.config.id2label = {0: "cat", 1: "dog", 2: "owl"}
    replace_head(model, 3, task="multiclass")
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert model.config.problem_type == "single_label_classification"


# --- What stands behind the head -----------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Softmax(dim=1), nn.ReLU(), nn.Sequential(nn.Tanh())])
def test_an_activation_behind_the_head_is_removed(activation: nn.Module) -> None:
    model = Backbone("fc", nn.Sequential(nn.Linear(8, 3), activation, nn.Flatten()))
    with pytest.warns(UserWarning, match=r"replace_head removed fc\.1.*the model returns logits"):
        replace_head(model, 2)
    x = torch.randn(9, 6)
    logits = model.get_submodule("fc.0")(model.get_submodule("features")(x))
    assert torch.equal(model.eval()(x), model.get_submodule("fc.0")(model.get_submodule("features")(x)))
    assert logits.shape == (9, 2)


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_changes_nothing() -> None:
    model = Backbone("fc", nn.Sequential(nn.Linear(8, 3), nn.Sigmoid()))
    before = list(model.modules())
    with pytest.raises(UserWarning, match="replace_head removed"):
        replace_head(model, 4, freeze_backbone=True)
    assert list(model.modules()) == before
    assert all(p.requires_grad for p in model.parameters())


def test_squeezenet_returns_logits_of_both_signs() -> None:
    model = torchvision.models.squeezenet1_1(weights=None)
    with pytest.warns(UserWarning, match=r"replace_head removed classifier\.2 .ReLU"):
        replace_head(model, 7)
    logits = model.eval()(torch.randn(4, 3, 64, 64))
    assert logits.shape == (4, 7)
    assert logits.min() < 0 < logits.max()


def test_a_sigmoid_beside_the_head_is_asked_about() -> None:
    model = Backbone("fc", nn.Linear(8, 3))
    model.activation = nn.Sigmoid()
    kept(model, lambda: replace_head(model, 4), 'beside the head fc stands activation .Sigmoid.*say head="fc"')
    replace_head(model, 4, head="fc")
    assert type(model.activation) is nn.Sigmoid


def test_parameters_behind_the_head_are_refused() -> None:
    model = Backbone("fc", nn.Sequential(nn.Linear(8, 3), nn.Sigmoid(), nn.BatchNorm1d(3)))
    kept(model, lambda: replace_head(model, 4), r"behind the head fc\.0 stands fc\.2 .BatchNorm1d")
    assert type(model.get_submodule("fc.1")) is nn.Sigmoid


# --- Which layer ---------------------------------------------------------------------------------


def test_a_head_by_its_name() -> None:
    def wrapped(head: nn.Module) -> nn.Module:
        return nn.Sequential(OrderedDict(backbone=Backbone("fc", head), flatten=nn.Flatten()))

    model = wrapped(nn.Linear(8, 3))
    kept(model, lambda: replace_head(model, 4), 'Its parts are backbone, flatten.*such as head="backbone.fc"')
    for name in ("backbone.fc", "backbone"):  # a container stands for its last layer
        assert replace_head(wrapped(nn.Linear(8, 3)), 4, head=name)(torch.randn(2, 6)).shape == (2, 4)
    sequence = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    assert replace_head(sequence, 4, head="2")(torch.randn(2, 6)).shape == (2, 4)
    assert replace_head(Backbone("_fc", nn.Linear(8, 3)), 4)(torch.randn(2, 6)).shape == (2, 4)


def test_wrappers_name_what_they_wrap() -> None:
    parallel = nn.DataParallel(Backbone("fc", nn.Linear(8, 3)))
    kept(parallel, lambda: replace_head(parallel, 4), "DataParallel wraps a model: replace the head of its .module")
    replace_head(parallel, 4, head="module.fc")
    assert parallel.module.fc.out_features == 4
    compiled = torch.compile(Backbone("fc", nn.Linear(8, 3)))
    kept(compiled, lambda: replace_head(compiled, 4), "replace the head of its ._orig_mod")


@pytest.mark.parametrize(("arch", "shape"), [("squeezenet1_1", (3, 64, 64)), ("s3d", (3, 16, 224, 224))])
def test_convolution_heads(arch: str, shape: tuple[int, ...]) -> None:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision.models.get_model(arch, weights=None)
        kept(model, lambda: replace_head(model, 7, dropout=0.5), "dropout must be 0 for the head classifier.1, a conv")
        assert replace_head(model, 7)(torch.zeros(2, *shape)).shape == (2, 7)
        assert type(model.get_submodule("classifier.1")) is (nn.Conv3d if arch == "s3d" else nn.Conv2d)


# --- What tools make of it -----------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_heads_are_scripted(dropout: float) -> None:
    head = MultiLabelHead(8, 4, dropout=dropout).eval()
    x = torch.randn(3, 8)
    assert torch.equal(torch.jit.script(head)(x), head(x))
    assert torch.equal(torch.jit.script(nn.Sequential(nn.Linear(8, 8), head))[1](x), head(x))


def test_replaced_heads_need_nothing_of_ours_to_be_loaded() -> None:
    for head in (nn.Linear(8, 3), nn.Sequential(nn.Linear(8, 3))):
        model = replace_head(nn.Sequential(OrderedDict(fc=head)), 4)
        stream = io.BytesIO()
        torch.save(model, stream)
        assert b"fused_sce" not in stream.getvalue()


@pytest.mark.parametrize("way", ["dynamic", "static", "qat", "fx"])
@pytest.mark.filterwarnings("ignore")  # torch.ao.quantization is deprecated, and still what most people use
def test_heads_are_quantised(way: str) -> None:
    from torch.ao import quantization as q
    from torch.ao.quantization import quantize_fx

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant = q.QuantStub(), q.DeQuantStub()
            self.body, self.fc = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.dequant(self.fc(self.body(self.quant(x)).relu()))

    torch.manual_seed(0)
    model, x = replace_head(Small(), 4), 2 * torch.rand(64, 6) - 1
    expected = model(x)
    if way == "dynamic":
        quantised = q.quantize_dynamic(model, {nn.Linear})
    elif way == "fx":
        prepared = quantize_fx.prepare_fx(model.eval(), q.get_default_qconfig_mapping("onednn"), (x,))
        prepared(x)
        quantised = quantize_fx.convert_fx(prepared)
    else:
        engine = "onednn"
        model.qconfig = q.get_default_qat_qconfig(engine) if way == "qat" else q.get_default_qconfig(engine)
        prepared = q.prepare_qat(model.train()) if way == "qat" else q.prepare(model.eval())
        prepared(x)
        quantised = q.convert(prepared.eval())
    assert "quantized" in type(quantised.fc).__module__
    assert (quantised(x) - expected).abs().mean() < 0.05 * expected.abs().max()
