"""The recipes in examples/recipes: what each one claims, and that each one runs."""

from __future__ import annotations

import importlib
import itertools
import math
import os
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
from sklearn import datasets  # noqa: E402
from sklearn import metrics as sklearn_metrics  # noqa: E402

import fused_sce  # noqa: E402

# More threads make nothing so small faster, and much slower where the cores are busy.
QUICK = ["--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        known = torch.from_numpy(datasets.load_digits().data / 16).float()
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
        again, _ = digits.pairs(few, 20, seed=1)
        assert torch.equal(grey, again)
        assert not torch.equal(grey, digits.pairs(few, 20, seed=2)[0])
        for picture, labels in zip(grey, pair, strict=True):
            for half, label in zip(picture.split(8, dim=1), labels, strict=True):
                windows = half.unfold(0, 8, 1).transpose(1, 2)  # (9, 8, 8): one for each height
                match = (windows[:, None] == few.grey).all(dim=(2, 3)).any(dim=0)
                assert label in few.digits[match]


class TestTools:
    def test_batches_see_everything_once_before_anything_twice(self) -> None:
        seen = torch.cat(list(recipe_tools.batches(96, 6, seed=0)))
        assert seen[:96].sort().values.tolist() == seen[96:].sort().values.tolist() == list(range(96))
        assert seen[:96].tolist() != seen[96:].tolist()

    def test_batches_are_never_short(self) -> None:
        assert {len(batch) for batch in recipe_tools.batches(70, 5, seed=0)} == {32}
        assert {len(batch) for batch in recipe_tools.batches(7, 3, seed=0)} == {7}

    def test_fit_trains_what_is_not_frozen(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 2))
        model[1].requires_grad_(False)
        before = snapshot(model)
        images = torch.randn(64, 3, 2, 2)
        targets = torch.stack([images.mean(dim=(1, 2, 3)) > 0, images[:, 0, 0, 0] > 0], dim=1)
        losses = recipe_tools.fit(
            model, fused_sce.BCEWithLogitsLoss(), images, targets, steps=40, seed=0, learning_rate=0.03
        )
        assert changed(model, before) == {"3.weight", "3.bias"}
        assert len(losses) == 40
        first, last = recipe_tools.ends(losses)
        assert last < 0.8 * first

    def test_ends(self) -> None:
        assert recipe_tools.ends([float(i) for i in range(20)]) == (0.5, 18.5)
        assert recipe_tools.ends([3.0, 2.0]) == (3.0, 2.0)

    def test_refuses_to_train_for_no_steps(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            recipe_tools.resnet_options(None, ["--steps", "0"], steps=1)
        assert "--steps must be at least 1" in capsys.readouterr().err


class TestSigmoidToSoftmaxHead:
    def test_runs(self, capsys: pytest.CaptureFixture[str]) -> None:
        stages = sigmoid_to_softmax_head.main([*QUICK, "--steps", "12"])
        assert [stage.task for stage in stages] == ["multilabel", "multiclass", "multilabel"]
        assert [stage.probabilities.shape[1] for stage in stages] == [4, 10, 4]
        for stage in stages:
            first, last = recipe_tools.ends(stage.losses)
            assert last < 0.8 * first, stage.task
            sums = stage.probabilities.sum(dim=1)
            if stage.task == "multiclass":
                torch.testing.assert_close(sums, torch.ones(450))
            else:
                assert (sums - 1).abs().max() > 0.5
        # The backbone is kept: what it learnt before makes up for a new head.
        assert stages[2].losses[-1] < stages[0].losses[-1]
        assert stages[2].accuracy > stages[2].guess + 0.1
        assert "never learns" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("task", "head", "outputs"),
        [("multilabel", "MultiLabelHead", 4), ("multiclass", "MultiClassHead", 10)],
    )
    def test_only_the_head_changes(self, task: str, head: str, outputs: int) -> None:
        model = torchvision.models.resnet18()
        before = snapshot(model)
        with torch.no_grad():  # no step is taken
            sigmoid_to_softmax_head.train_with_head(model, task, steps=0, seed=0, device="cpu")
        assert type(model.fc).__name__ == head
        assert model.fc.weight.shape == (outputs, 512)
        for name, value in model.state_dict().items():
            if not name.startswith("fc."):
                assert torch.equal(value, before[name]), name

        images, _ = pictures(3)
        with torch.no_grad():
            logits = model.eval()(images)
            probabilities = sigmoid_to_softmax_head.predict_proba(model, images)
        expected = logits.sigmoid() if task == "multilabel" else logits.softmax(dim=1)
        torch.testing.assert_close(probabilities, expected)

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


class WideFeatures(nn.Module):
    """A ten-class model whose features say each class fifty times over: right, and very sure."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Identity()
        self.fc = nn.Linear(500, 10)
        with torch.no_grad():
            self.fc.bias.zero_()
            self.fc.weight.copy_(torch.eye(10).repeat_interleave(50, dim=1) * 20 / 50)


class TestNewFcLayer:
    def test_runs(self, capsys: pytest.CaptureFixture[str]) -> None:
        curves = new_fc_layer.main([*QUICK, "--steps", "10"])
        assert list(curves) == [layer.name for layer in new_fc_layer.LAYERS]
        for name, losses in curves.items():
            assert losses[-1] < 0.9 * losses[0], name
        assert "did NOT change" in capsys.readouterr().out

    @pytest.mark.parametrize("layer", new_fc_layer.LAYERS, ids=lambda layer: layer.name)
    def test_everything_else_is_left_alone(self, layer: new_fc_layer.NewLayer) -> None:
        model = torchvision.models.resnet18()
        head, before = model.fc, snapshot(model)
        new = new_fc_layer.with_layer(model, layer)

        assert model.fc is head
        assert not changed(model, before)
        for name, value in new.state_dict().items():
            if not name.startswith("fc."):
                assert torch.equal(value, before[name]), name
        assert new.fc.weight.shape == (layer.num_classes, 512)
        assert new.fc.dropout == layer.dropout
        kind = fused_sce.MultiLabelHead if layer.task == "multilabel" else fused_sce.MultiClassHead
        assert isinstance(new.fc, kind)

        # The model returns logits, which nothing holds in [0, 1] or to a sum of 1.
        images, digit = pictures(4)
        logits = new(images)
        assert logits.shape == (4, layer.num_classes)
        assert logits.min() < 0
        assert torch.isfinite(layer.loss_function(logits, layer.targets(digit)))

    def test_first_losses(self) -> None:
        images, digit = pictures(16)
        losses = new_fc_layer.first_losses(torchvision.models.resnet18(), images, digit)
        assert tuple(losses) == new_fc_layer.INITS
        assert losses["zeros"] == pytest.approx(math.log(2), rel=1e-6)
        assert all(loss > 0.5 for loss in losses.values())
        assert len(set(losses.values())) == len(losses)

    def test_no_probabilities_get_below_the_floors(self) -> None:
        for classes in (3, 10):
            floor = new_fc_layer.floor_with_softmax_inside(classes)
            assert floor == pytest.approx(math.log(math.e + classes - 1) - 1)
            outputs = (torch.randn(1000, classes) * 30).softmax(dim=1)
            losses = F.cross_entropy(outputs, outputs.argmax(dim=1), reduction="none")
            assert floor - 1e-5 <= losses.min() <= floor + 0.05
        assert new_fc_layer.floor_with_sigmoid_inside(0.0) == pytest.approx(math.log(2))
        assert new_fc_layer.floor_with_sigmoid_inside(1.0) == pytest.approx(math.log1p(1 / math.e))

    def test_dropout_behind_the_layer_destroys_what_is_right(self) -> None:
        digit = torch.arange(10).repeat(40)
        images = F.one_hot(digit).float().repeat_interleave(50, dim=1)
        nowhere, on_features, on_logits = new_fc_layer.dropout_cost(WideFeatures(), images, digit)
        assert nowhere < 1e-6
        assert on_features < 0.01
        # Every second logit of the right class becomes 0, as those of the other nine are.
        assert on_logits == pytest.approx(0.5 * math.log(10), rel=0.2)

    @pytest.mark.parametrize("optimizer_first", [True, False])
    def test_an_old_optimizer_does_not_train_a_new_layer(self, optimizer_first: bool) -> None:
        images, digit = pictures(4)
        model = torchvision.models.resnet18()
        before = snapshot(model)
        moves = new_fc_layer.head_moves(model, images, digit, optimizer_first=optimizer_first)
        assert moves is not optimizer_first
        assert not changed(model, before)


class TestFinetuneResNet50:
    def test_runs(self, capsys: pytest.CaptureFixture[str]) -> None:
        everything, classifier = finetune_resnet50.main([*QUICK, "--steps", "8"])
        assert len(everything.losses) == len(classifier.losses) == 8
        # Few steps on a network without pretrained weights; the head alone learns from the first.
        assert classifier.losses[-1] < 0.8 * classifier.losses[0]
        assert 0 < everything.average_precision <= 1
        assert "still 20 after 100 steps" in capsys.readouterr().out

    def test_the_class(self) -> None:
        model = finetune_resnet50.ResNet50(5)
        names = [type(layer).__name__ for layer in model.features]
        assert names[-1] == "AdaptiveAvgPool2d"
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

    def test_the_whole_model_learns(self) -> None:
        model = finetune_resnet50.ResNet50(4)
        images, digit = pictures(16)
        loss, targets = fused_sce.MultiLabelSoftMarginLoss(), digits.attributes(digit)
        losses = recipe_tools.fit(model, loss, images, targets, steps=10, seed=0)
        assert losses[-1] < 0.7 * losses[0]

    def test_frozen_features_keep_every_bit(self) -> None:
        model = finetune_resnet50.ResNet50(4, freeze=True)
        images, digit = pictures(8)
        before = snapshot(model)

        def train() -> None:
            loss = fused_sce.MultiLabelSoftMarginLoss()
            targets = digits.attributes(digit)
            recipe_tools.fit(model, loss, images, targets, steps=1, seed=0)

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
        naive = finetune_resnet50.lost(losses["sigmoid, then BCELoss"], count=2001)
        fused = finetune_resnet50.lost(losses["fused MultiLabelSoftMarginLoss"], count=2001)
        assert naive.count == fused.count == 4002
        assert naive.gradients > 1000
        assert naive.losses > 1000
        assert (fused.gradients, fused.losses) == (0, 0)

    def test_unlearning_a_confident_mistake(self) -> None:
        losses = finetune_resnet50.LOSSES
        assert finetune_resnet50.unlearn(losses["sigmoid, then BCELoss"]) == (100, 20.0)
        steps, end = finetune_resnet50.unlearn(losses["fused MultiLabelSoftMarginLoss"])
        assert steps in (20, 21, 22)  # gradient 1, so that each step takes 1 off
        assert end < 0

    def test_all_losses_mean_the_same(self) -> None:
        logits = 3 * torch.randn(6, 5)
        targets = (torch.rand(6, 5) < 0.5).float()
        values = [loss(logits, targets, reduction="mean") for loss in finetune_resnet50.LOSSES.values()]
        for value in values[1:]:
            torch.testing.assert_close(value, values[0])


class TestBinaryToNClasses:
    def test_runs(self, capsys: pytest.CaptureFixture[str]) -> None:
        results = binary_to_n_classes.main([*QUICK, "--steps", "14"])
        _, test = digits.load_scans()
        binary, softmax, labels = results
        threes = int((test.digits == 3).sum())
        assert [row.support for row in binary.metrics] == [threes]
        assert [row.support for row in softmax.metrics] == [int((test.digits == d).sum()) for d in (3, 5, 8)]
        assert labels.truth.shape == labels.prediction.shape == (300, 3)
        assert labels.truth.sum(axis=1).tolist() != [1] * 300  # none, one and two of them
        assert set(labels.truth.sum(axis=1).tolist()) == {0, 1, 2}
        for result in results:
            first, last = result.losses[0], result.losses[-1]
            assert last < 0.8 * first
        assert np.trace(softmax.confusion) / softmax.confusion.sum() > 0.5  # guessing: a third
        assert binary.metrics[0].f1 > 0.6  # always answering yes: 0.51

        report = sklearn_metrics.classification_report(
            softmax.truth, softmax.prediction, output_dict=True, zero_division=0.0
        )
        for index, row in enumerate(softmax.metrics):
            assert row.f1 == pytest.approx(report[str(index)]["f1-score"])
        expected = sklearn_metrics.multilabel_confusion_matrix(labels.truth, labels.prediction)
        assert labels.confusion.tolist() == expected.tolist()
        assert "precision" in capsys.readouterr().out

    @pytest.mark.parametrize("columns", [1, 3])
    def test_metrics_of_labels_by_hand(self, columns: int) -> None:
        random = np.random.default_rng(0)
        truth = random.integers(0, 2, (40, columns))
        prediction = random.integers(0, 2, (40, columns))
        prediction[:, -1] = 0 if columns > 1 else prediction[:, -1]  # a label never predicted
        names = ["a", "b", "c"][:columns]
        rows, confusion = binary_to_n_classes.class_metrics(truth, prediction, names)
        assert [row.name for row in rows] == names
        for i, row in enumerate(rows):
            t, p = truth[:, i] == 1, prediction[:, i] == 1
            counts = [[(~t & ~p).sum(), (~t & p).sum()], [(t & ~p).sum(), (t & p).sum()]]
            check_metrics(row, counts)
            assert confusion[i].tolist() == counts

    def test_metrics_of_classes_by_hand(self) -> None:
        random = np.random.default_rng(1)
        truth, prediction = random.integers(0, 3, 40), random.integers(0, 2, 40)
        # The last class is never predicted, and one more occurs nowhere at all.
        rows, confusion = binary_to_n_classes.class_metrics(truth, prediction, list("abcd"))
        assert confusion.shape == (4, 4)
        for i, j in itertools.product(range(4), range(4)):
            assert confusion[i, j] == ((truth == i) & (prediction == j)).sum()
        for i, row in enumerate(rows):
            t, p = truth == i, prediction == i
            check_metrics(row, [[0, (~t & p).sum()], [(t & ~p).sum(), (t & p).sum()]])

    def test_extending_a_binary_model(self) -> None:
        binary = fused_sce.replace_head(torchvision.models.resnet18(), 1).eval()
        with torch.no_grad():
            binary.fc.bias.fill_(0.25)
        before = snapshot(binary)
        images, _ = pictures(4)

        labels = binary_to_n_classes.to_labels(binary, 3)
        softmax = binary_to_n_classes.to_softmax(binary, 3)
        assert isinstance(labels.fc, fused_sce.MultiLabelHead)
        assert isinstance(softmax.fc, fused_sce.MultiClassHead)
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


def check_metrics(row: binary_to_n_classes.ClassMetrics, counts: Any) -> None:
    """Against their definitions, from ((_, false yes), (false no, right yes))."""
    (_, false_yes), (false_no, right_yes) = counts
    predicted, support = false_yes + right_yes, false_no + right_yes
    assert row.support == support
    assert row.precision == pytest.approx(right_yes / predicted if predicted else 0.0)
    assert row.recall == pytest.approx(right_yes / support if support else 0.0)
    total = predicted + support
    assert row.f1 == pytest.approx(2 * right_yes / total if total else 0.0)


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


def multi_hot() -> tuple[Any, Any]:
    """Pixels (1347, 64) float32 and four labels (1347, 4) float32 as NumPy arrays."""
    train, _ = digits.load_scans()
    return train.grey.flatten(1).numpy(), digits.attributes(train.digits).float().numpy()


# Keras's way of making NumPy arrays of tensors; nothing that a user of it could change.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
class TestKerasLogisticOutput:
    def test_runs(self, recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
        trainings = recipe.main([*QUICK, "--epochs", "2"])
        for name in ("Sequential", "functional", "fused"):
            first, last = trainings[name].losses
            assert last < 0.9 * first, name
        # Always answering what is most frequent: 0.55.
        assert trainings["Sequential"].right > 0.8
        assert trainings["fused"].right > trainings["categorical"].right
        assert "with sample weights" in capsys.readouterr().out

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
                recipe.gradients(lambda t, x, f=fused: f(t, x, weights), targets, logits),
                recipe.gradients(lambda t, x, f=own: f(t, x, weights), targets, logits),
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
        gradient = recipe.gradients(recipe.FusedSigmoidCrossentropy(reduction="sum"), targets, logits)
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
        model = recipe.logistic_sequential(recipe.softmax_sequential(10), 4)
        recipe.compile_logistic(model)
        before = model.evaluate(pixels[:99], labels[:99], verbose=0)
        model.save(tmp_path / "model.keras")
        loaded = recipe.keras.saving.load_model(tmp_path / "model.keras")
        assert isinstance(loaded.loss, recipe.FusedSigmoidCrossentropy)
        assert loaded.evaluate(pixels[:99], labels[:99], verbose=0) == pytest.approx(before)

    @pytest.mark.parametrize("kind", ["sequential", "functional"])
    def test_the_output_layer_is_replaced(self, recipe: Any, kind: str) -> None:
        softmax = getattr(recipe, f"softmax_{kind}")(10)
        model = getattr(recipe, f"logistic_{kind}")(softmax, 4)
        assert model.output_shape == (None, 4)
        assert model.layers[-1].activation is recipe.keras.activations.linear
        assert model.layers[-2] is softmax.layers[-2]  # kept, with its weights
        pixels, labels = multi_hot()
        # What one reads in many places, an evaluation of logits, equals a computation by hand.
        recipe.compile_logistic(model)
        loss, right = model.evaluate(pixels, labels, verbose=0)
        logits, targets = torch.as_tensor(model.predict(pixels, verbose=0)), torch.from_numpy(labels)
        assert logits.min() < 0
        assert loss == pytest.approx(float(F.binary_cross_entropy_with_logits(logits, targets)), rel=1e-5)
        assert right == pytest.approx(float(((logits > 0) == (targets == 1)).float().mean()), rel=1e-5)

    def test_fit_reduces_the_loss_and_minds_sample_weights(self, recipe: Any) -> None:
        pixels, labels = multi_hot()
        recipe.keras.utils.set_random_seed(0)
        model = recipe.logistic_functional(recipe.softmax_functional(10), 4)
        recipe.compile_logistic(model)
        kernel = model.layers[-1].kernel.numpy().copy()
        model.fit(pixels[:64], labels[:64], sample_weight=np.zeros(64), epochs=1, verbose=0)
        assert (model.layers[-1].kernel.numpy() == kernel).all()
        history = model.fit(pixels, labels, epochs=2, batch_size=32, verbose=0).history["loss"]
        assert history[1] < 0.9 * history[0]

    def test_a_categorical_loss_ignores_pictures_without_labels(self, recipe: Any) -> None:
        logits, none = torch.randn(2, 4), torch.zeros(2, 4)

        def categorical(targets: Tensor, logits: Tensor) -> Tensor:
            loss: Tensor = recipe.keras.losses.categorical_crossentropy(targets, logits.sigmoid())
            return loss

        assert not recipe.gradients(categorical, none, logits).any()
        assert (recipe.gradients(recipe.FusedSigmoidCrossentropy(), none, logits) > 0).all()
