"""How can a softmax output layer be replaced with a logistic layer, in Keras?

    python examples/recipes/keras_logistic_output.py

For Keras 3 on its torch backend. A softmax output picks one class; logistic outputs answer one yes-or-no question each,
any number of them with yes. Replacing one by the other takes three changes:

* the output layer, without an activation: the model returns logits, of which `keras.ops.sigmoid` makes probabilities;
* the loss: `FusedSigmoidCrossentropy` from this file, in place of a categorical cross-entropy;
* the metrics: `keras.metrics.BinaryAccuracy(threshold=0.0)`, as a logit of 0 is a probability of 0.5.

The program does it to a Sequential and a functional model, and shows what a categorical cross-entropy does to labels
that do not exclude one another: pictures without any label teach it nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

# Keras reads this once, when it is first imported.
os.environ.setdefault("KERAS_BACKEND", "torch")

import digits
import keras
import torch
from recipe_tools import parse_options
from torch import Tensor

import fused_sce


@keras.saving.register_keras_serializable(package="fused_sce")
class FusedSigmoidCrossentropy(keras.losses.Loss):  # type: ignore[misc]  # Keras has no types
    """Sigmoid cross-entropy of logits, fused and right for every float, as a Keras loss.

    Stands in for `keras.losses.BinaryCrossentropy(from_logits=True)`: same values, and the same `reduction`, `dtype`,
    sample weights and masks; saved and loaded with a model. `label_smoothing` in [0, 1] moves targets towards 0.5.

    Shape:
        y_true (N, ..., C), 0 to 1, and y_pred (N, ..., C), logits -> (N, ...), the mean over the last axis, then
        reduced. For a single output, one of them may lack the last axis.

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
        if (backend := keras.config.backend()) != "torch":
            raise RuntimeError(f"Keras runs on its {backend} backend: set KERAS_BACKEND=torch before it is imported")
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
            shapes = f"{tuple(y_true.shape)} and {tuple(y_pred.shape)}"
            raise ValueError(f"y_true and y_pred must have the same shape, got {shapes}")
        if self.label_smoothing:
            y_true = y_true * (1.0 - self.label_smoothing) + 0.5 * self.label_smoothing
        return fused_sce.functional.multilabel_soft_margin_loss(y_pred, y_true, reduction="none")

    def get_config(self) -> dict[str, Any]:
        """The arguments, for `from_config` and for saved models."""
        return {**super().get_config(), "label_smoothing": self.label_smoothing, "dtype": self.dtype}


def softmax_model(kind: str, num_classes: int) -> keras.Model:
    """A "Sequential" or "functional" model: pixels (N, 64) -> probabilities (N, num_classes), which sum to 1."""
    inputs = keras.Input((64,))
    hidden, output = keras.layers.Dense(64, activation="relu"), keras.layers.Dense(num_classes, activation="softmax")
    if kind == "Sequential":
        return keras.Sequential([inputs, hidden, output])
    return keras.Model(inputs, output(hidden(inputs)))


def with_logistic_output(model: keras.Model, num_labels: int, loss: Any) -> keras.Model:
    """A model with the layers of `model`, but a last one that returns logits (N, num_labels), compiled with `loss`.

    The layers are shared, weights included: training it trains them in `model` too.
    """
    output = keras.layers.Dense(num_labels)
    if isinstance(model, keras.Sequential):
        new = keras.Sequential([keras.Input(model.input_shape[1:]), *model.layers[:-1], output])
    else:
        new = keras.Model(model.inputs, output(model.layers[-1].input))
    right = keras.metrics.BinaryAccuracy(name="right", threshold=0.0)
    new.compile(optimizer=keras.optimizers.Adam(3e-3), loss=loss, metrics=[right])
    return new


def categorical(y_true: Tensor, y_pred: Tensor) -> Any:
    """The mistake: a categorical cross-entropy on the sigmoids of labels that may go together."""
    return keras.losses.categorical_crossentropy(y_true, keras.ops.sigmoid(y_pred))


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[list[float], float]]:
    """Run the recipe; returns, by name of a logistic model, the loss of each epoch and the share of right labels."""
    options = parse_options(__doc__, argv, epochs=5)
    train, test = digits.load_scans(options.seed)
    pixels, test_pixels = train.grey.flatten(1).numpy(), test.grey.flatten(1).numpy()
    labels, test_labels = (digits.attributes(scans.digits).float().numpy() for scans in (train, test))
    fused, results = FusedSigmoidCrossentropy(), {}

    print("Ten classes under a softmax, then four labels with logistic outputs on the same layers:")
    for kind, loss_name, loss in (
        ("Sequential", "fused", fused),
        ("functional", "fused", fused),
        ("functional", "categorical", categorical),
    ):
        keras.utils.set_random_seed(options.seed)
        with keras.device(options.device):
            softmax = softmax_model(kind, 10)
            softmax.compile(optimizer=keras.optimizers.Adam(3e-3), loss="sparse_categorical_crossentropy")
            softmax.fit(pixels, train.digits.numpy(), epochs=options.epochs, verbose=0)
            model = with_logistic_output(softmax, len(digits.ATTRIBUTES), loss)
            losses = model.fit(pixels, labels, epochs=options.epochs, verbose=0).history["loss"]
            right = model.evaluate(test_pixels, test_labels, verbose=0, return_dict=True)["right"]
        name = f"{kind}, {loss_name} loss"
        results[name] = losses, right
        print(f"  {name:28} loss {losses[0]:.4f} -> {losses[-1]:.4f}, {right:.3f} of the labels right on tests")

    print("\nGradients for a picture without any label, all logits 2:")
    own = keras.losses.BinaryCrossentropy(from_logits=True)
    for name, loss in (("fused", fused), ("Keras's own", own), ("categorical", categorical)):
        logits = torch.full((1, 4), 2.0, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(torch.zeros(1, 4), logits).sum(), logits)
        print(f"  {name:11}", [round(part, 4) for part in gradient[0].tolist()])
    return results


if __name__ == "__main__":
    main()
