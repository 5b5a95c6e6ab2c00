"""A Keras 3 model on torch with Keras's own BinaryCrossentropy, as its users write it, through the fused loss.

    python examples/patched_keras.py

For a loss of one's own, with Keras's reductions and saving, see recipes/keras_logistic_output.py.
"""

from __future__ import annotations

import os
import sys

os.environ["KERAS_BACKEND"] = "torch"  # read once, when Keras is first imported

import keras
from patched_training import LABELS, Training, pictures, run

BATCH = 16


class Losses(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    """Keeps the loss of each batch; Keras's own figure is the mean of the epoch so far."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """Called by Keras, here after each batch, as an epoch has one."""
        self.losses.append(float(logs["loss"]))


def train(steps: int) -> list[float]:
    """The loss of each step; the same batch each time."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Conv2D(16, 3, strides=2, activation="relu", data_format="channels_first"),
            keras.layers.Conv2D(32, 3, strides=2, activation="relu", data_format="channels_first"),
            keras.layers.GlobalAveragePooling2D(data_format="channels_first"),
            keras.layers.Dense(LABELS),
        ]
    )
    model.compile(optimizer=keras.optimizers.Adam(1e-3), loss=keras.losses.BinaryCrossentropy(from_logits=True))
    images, labels = pictures(BATCH)
    losses = Losses()
    model.fit(images, labels, batch_size=BATCH, epochs=steps, shuffle=False, verbose=0, callbacks=[losses])
    return losses.losses


def main(arguments: list[str] | None = None) -> tuple[Training, Training]:
    """Train with torch's loss and with the fused one."""
    return run(train, arguments, (__doc__ or "").split("\n")[0])


if __name__ == "__main__":
    main(sys.argv[1:])
