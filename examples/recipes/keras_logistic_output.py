"""How can a softmax output layer be replaced with a logistic layer, in Keras?

    python examples/recipes/keras_logistic_output.py

For Keras 3 on its torch backend. A softmax output picks one class; logistic outputs answer one
yes-or-no question each, any number of them with yes. Replacing one by the other takes three changes:

* the output layer, without an activation: the model returns logits, and `keras.ops.sigmoid` makes
  probabilities of them where they are shown;
* the loss: `FusedSigmoidCrossentropy` from this file, in place of a categorical cross-entropy;
* the metrics: "accuracy" would compare the largest output with the largest target. Use
  `keras.metrics.BinaryAccuracy(threshold=0.0)`: a logit of 0 is a probability of 0.5.

The program does it to a trained Sequential and a trained functional model, compares the loss with
Keras's own, and shows what a categorical cross-entropy does to labels that do not exclude one
another: pictures without any label teach it nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Keras reads this once, when it is first imported.
os.environ.setdefault("KERAS_BACKEND", "torch")

import digits
import keras
import numpy as np
import numpy.typing as npt
import torch
from recipe_tools import option_parser
from torch import Tensor

import fused_sce


@keras.saving.register_keras_serializable(package="fused_sce")
class FusedSigmoidCrossentropy(keras.losses.Loss):  # type: ignore[misc]  # Keras has no types
    """Sigmoid cross-entropy of logits, fused and right for every float, as a Keras loss.

    Stands in for `keras.losses.BinaryCrossentropy(from_logits=True)`: same values, same
    `reduction`, `sample_weight` and masks, and it is saved and loaded with a model.

    Args:
        label_smoothing: in [0, 1]; moves targets towards 0.5 by this fraction of the way.
        reduction: of the values per sample, as in every Keras loss.
        name: of the loss.
        dtype: what logits and targets are converted to; `keras.config.floatx()` if not given.

    Shape:
        y_true (N, ..., C), 0 to 1, and y_pred (N, ..., C), logits -> (N, ...), the mean over the
        last axis, then reduced. For a single output, one of them may lack the last axis.

    Raises:
        RuntimeError: Keras runs on another backend than torch.
        ValueError: `label_smoothing` is out of its range, or the shapes do not match.
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "fused_sigmoid_crossentropy",
        dtype: Any = None,
    ) -> None:
        backend = keras.config.backend()
        if backend != "torch":
            raise RuntimeError(
                "FusedSigmoidCrossentropy computes on torch tensors, but Keras runs on its "
                f"{backend} backend. Set the environment variable KERAS_BACKEND=torch before "
                "Keras is imported, or use keras.losses.BinaryCrossentropy(from_logits=True)"
            )
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.label_smoothing = label_smoothing

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """One loss per sample; Keras weights and reduces them."""
        if y_true.ndim + 1 == y_pred.ndim and y_pred.shape[-1] == 1:
            y_true = y_true.unsqueeze(-1)
        elif y_pred.ndim + 1 == y_true.ndim and y_true.shape[-1] == 1:
            y_pred = y_pred.unsqueeze(-1)
        if y_true.shape != y_pred.shape:
            raise ValueError(
                f"y_true and y_pred must have the same shape, got {tuple(y_true.shape)} and {tuple(y_pred.shape)}"
            )
        if self.label_smoothing:
            y_true = y_true * (1.0 - self.label_smoothing) + 0.5 * self.label_smoothing
        losses: Tensor = fused_sce.functional.multilabel_soft_margin_loss(y_pred, y_true, reduction="none")
        return losses

    def get_config(self) -> dict[str, Any]:
        """The arguments, for `from_config` and for saved models."""
        config: dict[str, Any] = super().get_config()
        return {**config, "label_smoothing": self.label_smoothing, "dtype": self.dtype}


Array = npt.NDArray[np.float32]
NUM_PIXELS = 64


def softmax_sequential(num_classes: int) -> keras.Sequential:
    """Pixels (N, 64) -> probabilities of classes that exclude one another (N, num_classes)."""
    return keras.Sequential(
        [
            keras.Input((NUM_PIXELS,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(num_classes, activation="softmax"),
        ]
    )


def softmax_functional(num_classes: int) -> keras.Model:
    """The same model, made with the functional API."""
    inputs = keras.Input((NUM_PIXELS,))
    hidden = keras.layers.Dense(64, activation="relu")(inputs)
    outputs = keras.layers.Dense(num_classes, activation="softmax")(hidden)
    return keras.Model(inputs, outputs)


def logistic_sequential(model: keras.Sequential, num_labels: int) -> keras.Sequential:
    """A model with the layers of `model`, weights included, and a logistic output layer.

    It returns logits (N, num_labels). The layers are shared: training it trains them in `model` too.
    """
    return keras.Sequential([keras.Input(model.input_shape[1:]), *model.layers[:-1], keras.layers.Dense(num_labels)])


def logistic_functional(model: keras.Model, num_labels: int) -> keras.Model:
    """As `logistic_sequential`, for a functional model whose last layer is its output layer."""
    return keras.Model(model.inputs, keras.layers.Dense(num_labels)(model.layers[-1].input))


def compile_logistic(model: keras.Model, loss: Any = None) -> None:
    """Compile a model that returns logits; the fused loss unless another is given."""
    model.compile(
        optimizer=keras.optimizers.Adam(3e-3),
        loss=FusedSigmoidCrossentropy() if loss is None else loss,
        metrics=[keras.metrics.BinaryAccuracy(name="right", threshold=0.0)],
    )


def compile_categorical(model: keras.Model) -> None:
    """The mistake: a categorical cross-entropy on the sigmoids of labels that may go together."""

    def loss(y_true: Tensor, y_pred: Tensor) -> Any:
        return keras.losses.categorical_crossentropy(y_true, keras.ops.sigmoid(y_pred))

    compile_logistic(model, loss)


def gradients(loss: Any, y_true: Tensor, logits: Tensor) -> Tensor:
    """The gradient of `loss(y_true, logits)`, summed, for the logits; their shape."""
    logits = logits.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(y_true, logits).sum(), logits)
    return gradient


@dataclass(frozen=True)
class Training:
    """Loss after each epoch, and the share of labels that are right on tests."""

    losses: list[float]
    right: float


def fit_and_test(model: keras.Model, train: tuple[Array, Array], test: tuple[Array, Array], epochs: int) -> Training:
    """Train a compiled model on (pixels, targets) and evaluate it on such a pair."""
    history = model.fit(*train, epochs=epochs, batch_size=32, verbose=0)
    results = model.evaluate(*test, verbose=0, return_dict=True)
    return Training(history.history["loss"], float(results["right"]))


def main(argv: Sequence[str] | None = None) -> dict[str, Training]:
    """Run the recipe; returns the training of each logistic model."""
    parser = option_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=8, help="per training (default %(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    keras.utils.set_random_seed(options.seed)
    with keras.device(options.device):
        return _run(options.epochs, options.seed)


def _run(epochs: int, seed: int) -> dict[str, Training]:
    scans, test_scans = digits.load_scans(seed)
    pixels, test_pixels = (part.grey.flatten(1).numpy() for part in (scans, test_scans))
    classes = scans.digits.numpy()
    labels, test_labels = (digits.attributes(part.digits).float().numpy() for part in (scans, test_scans))
    train, test = (pixels, labels), (test_pixels, test_labels)

    print("Ten classes under a softmax, then four labels with logistic outputs on the same layers:")
    trainings = {}
    for name, softmax, replace in (
        ("Sequential", softmax_sequential(10), logistic_sequential),
        ("functional", softmax_functional(10), logistic_functional),
    ):
        softmax.compile(optimizer=keras.optimizers.Adam(3e-3), loss="sparse_categorical_crossentropy")
        softmax.fit(pixels, classes, epochs=epochs, batch_size=32, verbose=0)
        model = replace(softmax, labels.shape[1])
        compile_logistic(model)
        training = trainings[name] = fit_and_test(model, train, test, epochs)
        print(
            f"  {name}: loss {training.losses[0]:.4f} -> {training.losses[-1]:.4f}, "
            f"{training.right:.3f} of the labels right on tests"
        )

    logits = torch.as_tensor(model.predict(test_pixels, verbose=0))
    targets = torch.from_numpy(test_labels)
    weights = np.linspace(0.0, 2.0, len(targets), dtype=np.float32)
    fused = FusedSigmoidCrossentropy()
    own = keras.losses.BinaryCrossentropy(from_logits=True)
    print("\nThe same values as keras.losses.BinaryCrossentropy(from_logits=True):")
    print(f"  on tests             {float(fused(targets, logits)):.6f} {float(own(targets, logits)):.6f}")
    print(
        f"  with sample weights  {float(fused(targets, logits, weights)):.6f} "
        f"{float(own(targets, logits, weights)):.6f}"
    )

    print("\nGradients for a logit of 20 (fused; Keras on logits; Keras behind a sigmoid):")
    on_sigmoid = keras.losses.BinaryCrossentropy()
    for target in (0.0, 1.0):
        row = [
            gradients(loss, torch.tensor([[target]]), torch.tensor([[20.0]])).item()
            for loss in (fused, own, lambda t, x: on_sigmoid(t, torch.sigmoid(x)))
        ]
        print(f"  target {target:.0f}: " + "  ".join(f"{value:9.2e}" for value in row))

    print("\nLabels that do not exclude one another, same model, same start:")
    for name, compile_model in (("fused", compile_logistic), ("categorical", compile_categorical)):
        keras.utils.set_random_seed(seed)
        model = logistic_functional(softmax_functional(10), labels.shape[1])
        compile_model(model)
        training = trainings[name] = fit_and_test(model, train, test, epochs)
        print(f"  {name + ' cross-entropy':26} {training.right:.3f} of the labels right on tests")
    none = torch.zeros(1, 4)
    print("  gradients for a picture without any label, all logits 2:")
    for name, loss in (
        ("fused", fused),
        ("categorical", lambda t, x: keras.losses.categorical_crossentropy(t, torch.sigmoid(x))),
    ):
        values = gradients(loss, none, torch.full((1, 4), 2.0)).flatten().tolist()
        print(f"    {name:12}", [round(value, 4) for value in values])
    return trainings


if __name__ == "__main__":
    main()
