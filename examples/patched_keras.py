"""A Keras 3 model on torch with Keras's own BinaryCrossentropy, as its users write it, through the fused loss.

    python examples/patched_keras.py

For a loss of one's own, with Keras's reductions and saving, see recipes/keras_logistic_output.py.
"""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "torch"  # read once, when Keras is first imported

import keras
from patched_training import BATCH, LABELS, pictures, run


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
    # Keras's figure is the mean of an epoch, which has one batch here.
    fitted = model.fit(images, labels, batch_size=BATCH, epochs=steps, shuffle=False, verbose=0)
    return list(fitted.history["loss"])


if __name__ == "__main__":
    run(train, __doc__)
