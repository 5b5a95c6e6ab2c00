"""The recipes in examples/recipes: what each one claims, and that each one runs."""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

torchvision = pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

import binary_to_n_classes  # noqa: E402
import digits  # noqa: E402
import finetune_resnet50  # noqa: E402
import new_fc_layer  # noqa: E402
import recipe_tools  # noqa: E402
import sigmoid_to_softmax_head  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from sklearn.metrics import f1_score  # noqa: E402

import fused_sce  # noqa: E402

# More threads make nothing so small faster, and much slower where the cores are busy.
QUICK = ["--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_network(num_features: int, *, weights: str | None = None, **options: Any) -> nn.Sequential:
    """Stands in for a ResNet: images (N, 3, 32, 32) -> features (N, num_features) -> logits (N, 1000)."""
    assert weights is None
    channels = num_features // 4
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 64, 8, stride=4),
            bn1=nn.BatchNorm2d(64),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(64, channels, 3),
            bn2=nn.BatchNorm2d(channels),
            relu2=nn.ReLU(),
            avgpool=nn.AdaptiveAvgPool2d(2),
            flatten=nn.Flatten(),
            fc=nn.Linear(num_features, 1000),
        )
    )


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of two convolutions: what the recipes claim holds for these too."""
    monkeypatch.setattr(torchvision.models, "resnet18", functools.partial(small_network, 512))
    monkeypatch.setattr(torchvision.models, "resnet50", functools.partial(small_network, 2048))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the parameters and buffers that differ from `before` in any bit."""
    after = module.state_dict()
    assert after.keys() == before.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def pictures(count: int) -> tuple[Tensor, Tensor]:
    """The first train pictures (count, 3, 32, 32) and their digits (count,)."""
    train, _ = digits.load_scans()
    return digits.images(train.grey[:count]), train.digits[:count]


class TestDigits:
    def test_train_and_test_scans_are_all_scans_once(self) -> None:
        train, test = digits.load_scans(seed=3)
        assert (len(train.digits), len(test.digits)) == (1347, 450)
        both = torch.cat([train.grey, test.grey]).flatten(1)
        known = torch.from_numpy(load_digits().data / 16).float()
        assert sorted(both.tolist()) == sorted(known.tolist())

    def test_images_are_normalised_grey(self) -> None:
        train, _ = digits.load_scans()
        images = digits.images(train.grey[:5])
        assert (images.shape, images.dtype) == ((5, 3, 32, 32), torch.float32)
        grey = images * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        grey = grey + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        torch.testing.assert_close(grey[:, :1].expand(-1, 3, -1, -1), grey)  # all channels alike
        # Interpolation blurs, so that averages over squares of 4 x 4 pixels only resemble the scan.
        small = F.avg_pool2d(grey[:, 0], 4)
        for picture, scan in zip(small, train.grey[:5], strict=True):
            assert torch.corrcoef(torch.stack([picture.flatten(), scan.flatten()]))[0, 1] > 0.95

    def test_attributes(self) -> None:
        for digit, row in enumerate(digits.attributes(torch.arange(10)).tolist()):
            expected = [digit % 2 == 0, digit in (2, 3, 5, 7), digit > 4, digit in (0, 6, 8, 9)]
            assert row == expected, digit

    def test_shown(self) -> None:
        shown = digits.shown(torch.tensor([[3, 8], [8, 8], [0, 1]]), [3, 5, 8])
        assert shown.tolist() == [[True, False, True], [False, False, True], [False] * 3]

    def test_a_pair_shows_the_two_scans_it_is_labelled_with(self) -> None:
        train, _ = digits.load_scans()
        few = digits.Scans(train.grey[:12], train.digits[:12])
        grey, pair = digits.pairs(few, 20, seed=1)
        assert grey.shape == (20, 16, 16)
        assert torch.equal(grey, digits.pairs(few, 20, seed=1)[0])
        assert not torch.equal(grey, digits.pairs(few, 20, seed=2)[0])
        for picture, labels in zip(grey, pair, strict=True):
            assert not picture[:4].any()
            assert not picture[12:].any()
            for half, label in zip(picture[4:12].split(8, dim=1), labels, strict=True):
                match = (half == few.grey).all(dim=(1, 2))
                assert label in few.digits[match]


class TestTools:
    def test_everything_is_seen_once_before_anything_twice(self) -> None:
        seen = []
        images = torch.arange(96.0).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3, 1))
        model[0].register_forward_hook(lambda module, inputs, output: seen.append(output[:, 0]))
        recipe_tools.fit(model, F.mse_loss, images, torch.zeros(96, 1), steps=6)
        assert [len(batch) for batch in seen] == [32] * 6
        first, second = torch.cat(seen).split(96)
        assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(96))
        assert first.tolist() != second.tolist()

    @pytest.mark.parametrize(("count", "size"), [(70, 32), (7, 7)])
    def test_batches_are_never_short(self, count: int, size: int) -> None:
        def loss(output: Tensor, target: Tensor) -> Tensor:
            assert len(output) == len(target) == size
            return F.mse_loss(output, target)

        model = nn.Sequential(nn.Flatten(), nn.Linear(3, 1))
        assert len(recipe_tools.fit(model, loss, torch.zeros(count, 3, 1, 1), torch.zeros(count, 1), steps=5)) == 5

    def test_fit_trains_what_is_not_frozen(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 2))
        model[1].requires_grad_(False)
        before = snapshot(model)
        images = torch.randn(64, 3, 2, 2)
        targets = torch.stack([images.mean(dim=(1, 2, 3)) > 0, images[:, 0, 0, 0] > 0], dim=1)
        losses = recipe_tools.fit(model, fused_sce.BCEWithLogitsLoss(), images, targets, steps=40, learning_rate=0.03)
        assert changed(model, before) == {"3.weight", "3.bias"}
        assert len(losses) == 40
        assert losses[-1] < 0.8 * losses[0]

    def test_predict_evaluates(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3, 2)).train()
        images = torch.randn(5, 3, 1, 1)
        outputs = recipe_tools.predict(model, images)
        assert not outputs.requires_grad
        torch.testing.assert_close(outputs, model[2](images.flatten(1)).detach())

    def test_progress(self) -> None:
        assert recipe_tools.progress([float(i) for i in range(20)]) == "loss 0.500 -> 18.500"
        assert recipe_tools.progress([3.0, 2.0]) == "loss 3.000 -> 2.000"

    @pytest.mark.parametrize("option", ["steps", "threads"])
    def test_counts_are_at_least_one(self, option: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            recipe_tools.parse_options(None, [f"--{option}", "0"], steps=1)
        assert f"--{option}: must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.usefixtures("_small")
class TestSigmoidToSoftmaxHead:
    def test_runs(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        backbones = []  # before and after each training

        def fit(model: nn.Module, *args: Any, **options: Any) -> list[float]:
            backbones.append(snapshot(recipe_tools.backbone(model)))
            losses = recipe_tools.fit(model, *args, **options)
            backbones.append(snapshot(recipe_tools.backbone(model)))
            return losses

        monkeypatch.setattr(sigmoid_to_softmax_head, "fit", fit)
        results = sigmoid_to_softmax_head.main([*QUICK, "--steps", "20"])
        first, softmax, second = results
        assert [probabilities.shape for _, probabilities, _, _ in results] == [(450, 4), (450, 10), (450, 4)]
        for losses, _, _, _ in results:
            assert losses[-1] < 0.8 * losses[0]
        torch.testing.assert_close(softmax[1].sum(dim=1), torch.ones(450))
        for _, probabilities, _, _ in (first, second):
            assert (probabilities.sum(dim=1) - 1).abs().max() > 0.5
        # The backbone goes on from where the training before has left it.
        new, *kept, _ = backbones
        for before, after in ((kept[0], kept[1]), (kept[2], kept[3])):
            assert all(torch.equal(before[name], after[name]) for name in before)
        assert not torch.equal(new["0.weight"], kept[0]["0.weight"])
        assert second[2] > second[3] + 0.1  # better than guessing
        assert "never learns" in capsys.readouterr().out

    @pytest.mark.parametrize("task", ["multilabel", "multiclass"])
    def test_probabilities(self, task: str) -> None:
        model = torchvision.models.resnet18()
        images, _ = pictures(3)
        probabilities = sigmoid_to_softmax_head.predict_proba(model, images, task)
        with torch.no_grad():
            logits = model.eval()(images)
        expected = logits.sigmoid() if task == "multilabel" else logits.softmax(dim=1)
        torch.testing.assert_close(probabilities, expected)

    def test_accuracy(self) -> None:
        labels = torch.tensor([[True, False], [False, False], [False, True], [False, True], [False, True]])
        probabilities = torch.tensor([[0.9, 0.9], [0.1, 0.9], [0.9, 0.9], [0.1, 0.9], [0.1, 0.9]])
        assert sigmoid_to_softmax_head.accuracy(probabilities, labels) == pytest.approx((0.7, 0.7))
        classes = torch.tensor([2, 1, 1, 0])
        assert sigmoid_to_softmax_head.accuracy(F.one_hot(torch.tensor([2, 1, 0, 0])), classes) == (0.75, 0.5)

    def test_a_softmax_over_one_output_says_and_learns_nothing(self) -> None:
        logits = torch.tensor([[-30.0], [0.0], [7.0]])
        probabilities, gradient = sigmoid_to_softmax_head.softmax_over_one_output(logits)
        assert probabilities.tolist() == [[1.0]] * 3
        assert gradient.abs().tolist() == [[0.0]] * 3

    @pytest.mark.parametrize("bias", [True, False])
    def test_one_sigmoid_output_is_a_softmax_over_two(self, bias: bool) -> None:
        head = nn.Linear(6, 1, bias=bias)
        features = 3 * torch.randn(50, 6)
        yes = head(features).sigmoid()
        softmax = sigmoid_to_softmax_head.softmax_from_sigmoid(head)
        torch.testing.assert_close(softmax.predict_proba(features), torch.cat([1 - yes, yes], 1))
        sigmoid = sigmoid_to_softmax_head.sigmoid_from_softmax(softmax)
        assert torch.equal(sigmoid.weight, head.weight)
        assert torch.equal(sigmoid.bias, head.bias if bias else torch.zeros(1))

    @pytest.mark.parametrize("bias", [True, False])
    def test_a_softmax_over_two_is_one_sigmoid_output(self, bias: bool) -> None:
        head = nn.Linear(6, 2, bias=bias)
        features = 3 * torch.randn(50, 6)
        sigmoid = sigmoid_to_softmax_head.sigmoid_from_softmax(head)
        expected = head(features).softmax(dim=1)[:, 1:]
        torch.testing.assert_close(sigmoid.predict_proba(features), expected)

    def test_heads_of_another_size_are_refused(self) -> None:
        with pytest.raises(ValueError, match="one output is needed, got 3"):
            sigmoid_to_softmax_head.softmax_from_sigmoid(nn.Linear(6, 3))
        with pytest.raises(ValueError, match="two outputs is needed, got 1"):
            sigmoid_to_softmax_head.sigmoid_from_softmax(nn.Linear(6, 1))


@pytest.mark.usefixtures("_small")
class TestNewFcLayer:
    def test_runs(self, capsys: pytest.CaptureFixture[str]) -> None:
        curves = new_fc_layer.main([*QUICK, "--steps", "20"])
        assert list(curves) == list(new_fc_layer.LAYERS)
        for name, losses in curves.items():
            assert losses[-1] < 0.9 * losses[0], name
        assert "did NOT change" in capsys.readouterr().out

    @pytest.mark.parametrize("name", list(new_fc_layer.LAYERS))
    def test_everything_else_is_left_alone(self, name: str) -> None:
        layer, loss_function, targets = new_fc_layer.LAYERS[name]
        model = torchvision.models.resnet18()
        before = snapshot(model)
        fused_sce.replace_head(model, **layer)
        for key, value in model.state_dict().items():
            if not key.startswith("fc."):
                assert torch.equal(value, before[key]), key
        assert model.fc.weight.shape == (layer["num_classes"], 512)
        assert getattr(model.fc, "dropout", 0.0) == layer.get("dropout", 0.0)

        # The model returns logits, which nothing holds in [0, 1] or to a sum of 1.
        images, digit = pictures(4)
        logits = model(images)
        assert logits.shape == (4, layer["num_classes"])
        assert logits.min() < 0
        assert torch.isfinite(loss_function(logits, targets(digit)))

    def test_first_losses(self) -> None:
        _, digit = pictures(16)
        features = torch.rand(16, 512)
        losses = new_fc_layer.first_losses(features, digits.attributes(digit))
        assert losses["zeros"] == pytest.approx(math.log(2), rel=1e-6)
        assert all(loss > 0.5 for loss in losses.values())
        assert len(set(losses.values())) == len(losses) == 6

    def test_no_probabilities_get_below_the_floors(self) -> None:
        floors = new_fc_layer.floors()
        for classes in (3, 10):
            floor = floors[f"softmax, {classes} classes"]
            assert floor == pytest.approx(math.log(math.e + classes - 1) - 1)
            outputs = (torch.randn(1000, classes) * 30).softmax(dim=1)
            losses = F.cross_entropy(outputs, outputs.argmax(dim=1), reduction="none")
            assert floor - 1e-5 <= losses.min() <= floor + 0.05
        assert floors["sigmoid, target 0"] == pytest.approx(math.log(2))
        assert floors["sigmoid, target 1"] == pytest.approx(math.log1p(1 / math.e))

    def test_dropout_behind_the_layer_destroys_what_is_right(self) -> None:
        # Features that say each class fifty times over: the layer is right, and very sure.
        digit = torch.arange(10).repeat(40)
        features = F.one_hot(digit).float().repeat_interleave(50, dim=1)
        fc = nn.Linear(500, 10)
        with torch.no_grad():
            fc.bias.zero_()
            fc.weight.copy_(torch.eye(10).repeat_interleave(50, dim=1) * 20 / 50)
        costs = new_fc_layer.dropout_cost(fc, features, digit)
        assert costs["nowhere"] < 1e-6
        assert costs["on the features"] < 0.01
        # Every second logit of the right class becomes 0, as those of the other nine are.
        assert costs["on the logits"] == pytest.approx(0.5 * math.log(10), rel=0.2)

    @pytest.mark.parametrize("optimizer_first", [True, False])
    def test_an_old_optimizer_does_not_train_a_new_layer(self, optimizer_first: bool) -> None:
        images, digit = pictures(4)
        model = torchvision.models.resnet18()
        before = snapshot(model)
        moves = new_fc_layer.head_moves(model, images, digit, optimizer_first=optimizer_first)
        assert moves is not optimizer_first
        assert not changed(model, before)


class TestFinetuneResNet50:
    @pytest.mark.usefixtures("_small")
    def test_runs(self, capsys: pytest.CaptureFixture[str]) -> None:
        (everything, precision), (classifier, _) = finetune_resnet50.main([*QUICK, "--steps", "20"])
        assert len(everything) == len(classifier) == 20
        assert everything[-1] < 0.9 * everything[0]
        assert classifier[-1] < 0.8 * classifier[0]
        assert precision > 0.5
        printed = capsys.readouterr().out
        assert printed.count("still there after 100 steps") == 1
        assert printed.count("unlearnt in 21 steps") == 3

    def test_the_class(self) -> None:
        model = finetune_resnet50.ResNet50(5)
        names = [type(layer).__name__ for layer in model.features]
        assert names[-2:] == ["AdaptiveAvgPool2d", "Flatten"]
        assert "Linear" not in names
        assert isinstance(model.classifier, fused_sce.MultiLabelHead)
        # kaiming_normal_: normal, with a variance of 1 over the number of features.
        assert model.classifier.weight.shape == (5, 2048)
        assert model.classifier.weight.std().item() * 2048**0.5 == pytest.approx(1, abs=0.03)
        assert model.classifier.bias.tolist() == [0.0] * 5

        images, _ = pictures(4)
        with torch.no_grad():
            logits = model.eval()(images)
            probabilities = model.predict_proba(images)
        assert logits.shape == (4, 5)
        assert logits.min() < 0
        torch.testing.assert_close(probabilities, logits.sigmoid())

    @pytest.mark.usefixtures("_small")
    def test_frozen_features_keep_every_bit(self) -> None:
        model = finetune_resnet50.ResNet50(4, freeze=True)
        images, digit = pictures(8)
        before = snapshot(model)

        def train() -> None:
            loss = fused_sce.MultiLabelSoftMarginLoss()
            targets = digits.attributes(digit)
            recipe_tools.fit(model, loss, images, targets, steps=1)

        train()
        assert (model.training, model.features.training) == (True, False)
        assert changed(model, before) == {"classifier.weight", "classifier.bias"}

        model.freeze(False)
        assert model.features.training
        train()
        names = changed(model, before)
        # Everything trains now, batch normalisation's running statistics included.
        for part in ("0.weight", "1.weight", "1.running_mean", "1.num_batches_tracked"):
            assert f"features.{part}" in names

        model.freeze()
        assert not any(layer.training for layer in model.features.modules())
        assert not any(parameter.requires_grad for parameter in model.features.parameters())
        assert all(parameter.requires_grad for parameter in model.classifier.parameters())

    def test_lost_gradients(self) -> None:
        losses = finetune_resnet50.LOSSES
        gradients, wrong = finetune_resnet50.lost(losses["sigmoid, then BCELoss"], count=2001)
        assert 1000 < gradients < 4002
        assert 1000 < wrong < 4002
        assert finetune_resnet50.lost(losses["fused MultiLabelSoftMarginLoss"], count=2001) == (0, 0)

    def test_unlearning_a_confident_mistake(self) -> None:
        losses = finetune_resnet50.LOSSES
        assert finetune_resnet50.unlearn(losses["sigmoid, then BCELoss"]) is None
        # The gradient is 1, so that each step takes 1 off.
        assert finetune_resnet50.unlearn(losses["fused MultiLabelSoftMarginLoss"]) in (20, 21, 22)

    def test_all_losses_mean_the_same(self) -> None:
        logits = 3 * torch.randn(6, 5)
        targets = (torch.rand(6, 5) < 0.5).float()
        values = [loss(logits, targets, reduction="mean") for loss in finetune_resnet50.LOSSES.values()]
        for value in values[1:]:
            torch.testing.assert_close(value, values[0])


@pytest.mark.usefixtures("_small")
class TestBinaryToNClasses:
    def test_runs(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(binary_to_n_classes, "TEST_PAIRS", 100)
        results = binary_to_n_classes.main([*QUICK, "--steps", "20"])
        _, test = digits.load_scans()
        (_, threes, three_answers), (_, classes, class_answers), (_, labels, label_answers) = results
        classes_shown = test.digits[torch.isin(test.digits, torch.tensor([3, 5, 8]))]
        assert torch.tensor([3, 5, 8])[classes].tolist() == classes_shown.tolist()
        assert threes.tolist() == (classes_shown == 3).tolist()
        assert labels.shape == label_answers.shape == (100, 3)
        assert set(labels.sum(dim=1).tolist()) == {0, 1, 2}  # none, one and two of them
        for losses, _, _ in results:
            assert losses[-1] < 0.8 * losses[0]
        assert (class_answers == classes).float().mean() > 0.5  # guessing: a third
        assert f1_score(threes, three_answers) > 0.6  # always answering yes: 0.51
        assert capsys.readouterr().out.count("precision") == 3

    def test_report_of_labels(self) -> None:
        truth = torch.tensor([[True, False, False], [True, True, False], [False, True, True], [False, False, True]])
        answers = torch.tensor([[True, True, False], [False, True, False], [False, True, False], [True, False, False]])
        text = binary_to_n_classes.report(truth, answers, ["a", "b", "c"])
        rows = [line.split() for line in text.splitlines()]
        for row in (["a", "0.50", "0.50", "0.50", "2"], ["b", "0.67", "1.00", "0.80", "2"]):
            assert row in rows
        assert ["c", "0.00", "0.00", "0.00", "2"] in rows  # never answered
        for row in (["a", "1", "1", "1", "1"], ["b", "1", "1", "0", "2"], ["c", "2", "0", "2", "0"]):
            assert row in rows

    def test_report_of_classes(self) -> None:
        truth, answers = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 0, 1, 1, 1, 0])
        # "c" is never answered, and "d" occurs nowhere at all.
        text = binary_to_n_classes.report(truth, answers, list("abcd"))
        rows = [line.split() for line in text.splitlines()]
        for row in (["a", "0.67", "0.67", "0.67", "3"], ["b", "0.33", "1.00", "0.50", "1"]):
            assert row in rows
        for name, support in (("c", "2"), ("d", "0")):
            assert [name, "0.00", "0.00", "0.00", support] in rows
        for row in (["a", "2", "1", "0", "0"], ["b", "0", "1", "0", "0"], ["c", "1", "1", "0", "0"]):
            assert row in rows
        assert ["d", "0", "0", "0", "0"] in rows

    def test_extending_a_binary_model(self) -> None:
        binary = fused_sce.replace_head(torchvision.models.resnet18(), 1).eval()
        with torch.no_grad():
            binary.fc.bias.fill_(0.25)
        before = snapshot(binary)
        images, _ = pictures(4)

        labels = binary_to_n_classes.to_labels(binary, 3)
        with torch.no_grad():
            old, new = binary(images), labels.eval()(images)
        assert new.shape == (4, 3)
        torch.testing.assert_close(new[:, :1], old)
        assert not torch.isclose(new[:, 1:], old).any()
        assert not changed(binary, before)

        with torch.no_grad():
            labels.fc.weight.fill_(1.0)
            labels.conv1.weight.fill_(1.0)
        assert not changed(binary, before)  # copies share nothing


@pytest.fixture(scope="module")
def recipe() -> Any:
    """The Keras recipe's module; Keras is imported here only, as it takes its time."""
    os.environ["KERAS_BACKEND"] = "torch"  # whatever the user's own choice: it is what is tested
    keras = pytest.importorskip("keras")
    assert keras.config.backend() == "torch"
    return importlib.import_module("keras_logistic_output")


def logits_and_targets(*shape: int) -> tuple[Tensor, Tensor]:
    """Logits and targets 0 or 1, both float32 of this shape."""
    return 3 * torch.randn(shape), (torch.rand(shape) < 0.4).float()


def gradients(loss: Any, targets: Tensor, logits: Tensor) -> Tensor:
    """The gradient of `loss(targets, logits)`, summed, for the logits."""
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(targets, logits).sum(), logits)[0]


def multi_hot() -> tuple[Any, Any]:
    """Pixels (1347, 64) float32 and four labels (1347, 4) float32 as NumPy arrays."""
    train, _ = digits.load_scans()
    return train.grey.flatten(1).numpy(), digits.attributes(train.digits).float().numpy()


# Keras's way of making NumPy arrays of tensors; nothing that a user of it could change.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
class TestKerasLogisticOutput:
    def test_runs(self, recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
        trainings = recipe.main([*QUICK, "--epochs", "2"])
        for kind in ("Sequential", "functional"):
            losses, right = trainings[f"{kind}, fused loss"]
            assert losses[-1] < 0.9 * losses[0], kind
            assert right > 0.8  # always answering what is most frequent: 0.55
            assert right > trainings["functional, categorical loss"][1]
        assert "categorical [0.0, 0.0, 0.0, 0.0]" in capsys.readouterr().out

    @pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "mean_with_sample_weight", "none", None])
    @pytest.mark.parametrize("shape", [(7, 5), (4, 3, 5), (7, 1)])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_equals_keras_own(self, recipe: Any, reduction: str | None, shape: tuple[int, ...], weighted: bool) -> None:
        logits, targets = logits_and_targets(*shape)
        weights = torch.rand(shape[:-1]) if weighted else None
        for smoothing in (0.0, 0.2):
            fused = recipe.FusedSigmoidCrossentropy(smoothing, reduction)
            own = recipe.keras.losses.BinaryCrossentropy(
                from_logits=True, label_smoothing=smoothing, reduction=reduction
            )
            torch.testing.assert_close(fused(targets, logits, weights), own(targets, logits, weights))
            torch.testing.assert_close(
                gradients(lambda t, x, f=fused: f(t, x, weights), targets, logits),
                gradients(lambda t, x, f=own: f(t, x, weights), targets, logits),
            )

    def test_a_sample_weight_counts(self, recipe: Any) -> None:
        logits, targets = logits_and_targets(4, 3)
        per_sample = recipe.FusedSigmoidCrossentropy(reduction=None)(targets, logits)
        expected = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
        torch.testing.assert_close(per_sample, expected)
        weights = torch.tensor([0.0, 1.0, 2.0, 5.0])
        torch.testing.assert_close(
            recipe.FusedSigmoidCrossentropy()(targets, logits, weights), (expected * weights).sum() / 4
        )

    def test_a_mask_counts(self, recipe: Any) -> None:
        keras = recipe.keras
        logits, targets = logits_and_targets(2, 3, 4)
        mask = torch.tensor([[True, True, False], [True, False, False]])
        keras.src.backend.set_keras_mask(logits, mask)
        fused = recipe.FusedSigmoidCrossentropy()(targets, logits)
        own = keras.losses.BinaryCrossentropy(from_logits=True)(targets, logits)
        torch.testing.assert_close(fused, own)
        expected = F.binary_cross_entropy_with_logits(logits[mask], targets[mask])
        torch.testing.assert_close(fused, expected)

    def test_one_output_with_and_without_its_axis(self, recipe: Any) -> None:
        logits, targets = logits_and_targets(6, 1)
        loss = recipe.FusedSigmoidCrossentropy(reduction=None)
        expected = loss(targets, logits)
        assert expected.shape == (6,)
        assert torch.equal(loss(targets[:, 0], logits), expected)
        assert torch.equal(loss(targets, logits[:, 0]), expected)

    def test_confident_outputs_keep_their_gradient(self, recipe: Any) -> None:
        logits = torch.tensor([[20.0, -20.0], [60.0, -60.0]])
        targets = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        gradient = gradients(recipe.FusedSigmoidCrossentropy(reduction="sum"), targets, logits)
        expected = torch.tensor([[-1.0, 1.0]]) * torch.exp(-logits.double().abs()) / 2
        torch.testing.assert_close(gradient.double(), expected.double(), rtol=1e-6, atol=0)

    def test_errors(self, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got 1.5"):
            recipe.FusedSigmoidCrossentropy(label_smoothing=1.5)
        with pytest.raises(ValueError, match=r"same shape, got \(4, 3\) and \(4, 2\)"):
            recipe.FusedSigmoidCrossentropy()(torch.zeros(4, 3), torch.zeros(4, 2))
        with pytest.raises(ValueError, match=r"same shape, got \(4,\) and \(4, 2\)"):
            recipe.FusedSigmoidCrossentropy()(torch.zeros(4), torch.zeros(4, 2))
        monkeypatch.setattr(recipe.keras.config, "backend", lambda: "jax")
        with pytest.raises(RuntimeError, match=r"jax backend.*KERAS_BACKEND=torch"):
            recipe.FusedSigmoidCrossentropy()

    def test_config_round_trip(self, recipe: Any) -> None:
        losses = recipe.keras.losses
        loss = recipe.FusedSigmoidCrossentropy(0.1, "sum", "mine", "float64")
        assert loss.get_config() == {
            "label_smoothing": 0.1,
            "reduction": "sum",
            "name": "mine",
            "dtype": "float64",
        }
        logits, targets = logits_and_targets(5, 4)
        for again in (
            recipe.FusedSigmoidCrossentropy.from_config(loss.get_config()),
            losses.deserialize(losses.serialize(loss)),
        ):
            assert isinstance(again, recipe.FusedSigmoidCrossentropy)
            assert again.get_config() == loss.get_config()
            value = again(targets, logits)
            assert value.dtype == torch.float64
            assert torch.equal(value, loss(targets, logits))

    def test_a_compiled_model_is_saved_with_its_loss(self, recipe: Any, tmp_path: Any) -> None:
        pixels, labels = multi_hot()
        model = recipe.with_logistic_output(
            recipe.softmax_model("Sequential", 10), 4, recipe.FusedSigmoidCrossentropy()
        )
        before = model.evaluate(pixels[:99], labels[:99], verbose=0)
        model.save(tmp_path / "model.keras")
        loaded = recipe.keras.saving.load_model(tmp_path / "model.keras")
        assert isinstance(loaded.loss, recipe.FusedSigmoidCrossentropy)
        assert loaded.evaluate(pixels[:99], labels[:99], verbose=0) == pytest.approx(before)

    @pytest.mark.parametrize("kind", ["Sequential", "functional"])
    def test_the_output_layer_is_replaced(self, recipe: Any, kind: str) -> None:
        softmax = recipe.softmax_model(kind, 10)
        assert isinstance(softmax, recipe.keras.Sequential) == (kind == "Sequential")
        model = recipe.with_logistic_output(softmax, 4, recipe.FusedSigmoidCrossentropy())
        assert model.output_shape == (None, 4)
        assert model.layers[-1].activation is recipe.keras.activations.linear
        assert model.layers[-2] is softmax.layers[-2]  # kept, with its weights
        pixels, labels = multi_hot()
        # What one reads in many places, an evaluation of logits, equals a computation by hand.
        loss, right = model.evaluate(pixels, labels, verbose=0)
        logits, targets = torch.as_tensor(model.predict(pixels, verbose=0)), torch.from_numpy(labels)
        assert logits.min() < 0
        assert loss == pytest.approx(float(F.binary_cross_entropy_with_logits(logits, targets)), rel=1e-5)
        assert right == pytest.approx(float(((logits > 0) == (targets == 1)).float().mean()), rel=1e-5)

    def test_sample_weights_of_zero_teach_nothing(self, recipe: Any) -> None:
        pixels, labels = multi_hot()
        model = recipe.with_logistic_output(
            recipe.softmax_model("functional", 10), 4, recipe.FusedSigmoidCrossentropy()
        )
        kernel = model.layers[-1].kernel.numpy().copy()
        for weight, same in ((0.0, True), (1.0, False)):
            model.fit(pixels[:64], labels[:64], sample_weight=np.full(64, weight), epochs=1, verbose=0)
            assert (model.layers[-1].kernel.numpy() == kernel).all() == same

    def test_a_categorical_loss_ignores_pictures_without_labels(self, recipe: Any) -> None:
        logits, none = torch.randn(2, 4), torch.zeros(2, 4)
        assert not gradients(recipe.categorical, none, logits).any()
        assert (gradients(recipe.FusedSigmoidCrossentropy(), none, logits) > 0).all()
