"""Predict the labels of pictures with a checkpoint that `train_multilabel_resnet.py` has written.

    python examples/predict.py runs/multilabel/checkpoint.pt photos more/photo.jpg --output labels.csv

A row of the CSV is a picture: its file, the probability of every label, and in the column `labels` those that are
predicted, separated by `|`. A label is predicted where its probability reaches the threshold with the best F1 on the
validation part.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from classifier import Classifier, UsageError, number, open_device
from pictures import SUFFIXES, WHITE, LabelledPictures, PictureError, white_of
from run_checkpoint import OF_THE_MODEL, CheckpointError, read_checkpoint, write_atomically
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths`, and every picture in the folders among them that is not hidden."""
    pictures = []
    for path in paths:
        if os.path.isdir(path):
            files = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            pictures += sorted(file for file in files if not f"/{file.relative_to(path)}".count("/."))
        elif os.path.isfile(path):
            pictures.append(path)
        else:
            raise UsageError(f"no such picture or folder: {path}")
    if not pictures:
        raise UsageError(f"no pictures in {', '.join(map(str, paths))}")
    return pictures


@torch.inference_mode()
def predict(classifier: Classifier, pictures: Sequence[Path], batch_size: int) -> Tensor:
    """The logits of `pictures`, (N, L), on the CPU.

    Raises:
        PictureError: A picture cannot be read, or has values above the white of the training; the message names it.
    """
    size, white = (classifier.configuration[name] for name in ("--image-size", WHITE))
    white_of(pictures, [f"picture {picture}" for picture in pictures])  # a broken one is named before the work
    data = LabelledPictures(pictures, torch.zeros(len(pictures), 0), size, white)
    bar = tqdm(DataLoader(data, batch_size=batch_size), unit="batch", leave=False, disable=None)
    return torch.cat([classifier(batch.to(classifier.device)).cpu() for batch, _ in bar])


def table_of(pictures: Sequence[Path], logits: Tensor, classifier: Classifier) -> str:
    """The CSV."""
    predicted = [
        "|".join(label for label, is_predicted in zip(classifier.labels, row, strict=True) if is_predicted)
        for row in (logits >= classifier.thresholds).tolist()
    ]
    table = pd.DataFrame(logits.sigmoid().numpy(), columns=list(classifier.labels))
    # Not by name: a label may be called "picture", too.
    table.insert(0, "picture", [str(picture) for picture in pictures], allow_duplicates=True)
    table.insert(len(table.columns), "labels", predicted, allow_duplicates=True)
    return str(table.to_csv(index=False))


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict as `arguments` say, the command line's if None; exit with status 2 on unusable ones."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], prog="predict.py")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("pictures", type=Path, nargs="+", help="files, and folders with all that is in them")
    parser.add_argument("--output", type=Path, metavar="FILE.csv", help="(the screen)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (cpu)")
    parser.add_argument("--batch-size", type=number(int, 1), default=64, help="(64)")
    options = parser.parse_args(arguments)
    output = options.output
    try:
        if output is not None and (os.path.isdir(output) or not os.access(output.parent, os.W_OK | os.X_OK)):
            raise UsageError(f"--output: {output}: is a folder, or its folder is not there or not writable")
        device = open_device(options.device)
        pictures = find_pictures(options.pictures)
        classifier = Classifier.trained(read_checkpoint(options.checkpoint, OF_THE_MODEL), options.checkpoint)
        classifier.to(device).eval()
        table = table_of(pictures, predict(classifier, pictures, options.batch_size), classifier)
        # Names of files may be no UTF-8: Python escapes their bytes, and this gives them back.
        content = table.encode(errors="surrogateescape")
        if output is None:
            with open(sys.stdout.fileno(), "wb", closefd=False) as stream:
                stream.write(content)
        else:
            write_atomically(output, content)
    except (UsageError, CheckpointError, PictureError) as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{f'--output: {output}' if output else 'standard output'}: cannot be written: {error.strerror}")


if __name__ == "__main__":
    main()
