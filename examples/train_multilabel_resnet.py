"""Train a ResNet with one independent logistic output per label, using fused_sce's loss.

    python examples/train_multilabel_resnet.py

composes canvases of scanned digits (`digit_canvases.py`), trains a ResNet-18 to tell which of the ten digits each one
shows, and leaves a checkpoint, metrics and pictures in `runs/multilabel`. Your own pictures (`label_file.py`):

    python examples/train_multilabel_resnet.py --images photos --labels photos.csv --pretrained
    python examples/train_multilabel_resnet.py predict runs/multilabel/checkpoint.pt new_photos

The same options with the same seed give the same result to the bit, on the same machine with the same number of
threads. A run that was killed goes on after its last whole epoch with `--resume`, to the very same result.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Read when torch is loaded, so set before. A thread that waits for another soon sleeps instead of
# spinning on: a step takes the same 0.21 s on two idle cores, and 0.48 s instead of 0.79 s where
# other work keeps one of them busy.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# cuBLAS is deterministic only with this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import lightning
import numpy as np
import numpy.typing as npt
import predict
import torch
from classifier import LOSSES, TABLE_HEADER, TABLE_ROW, Classifier, UsageError, environment, open_device, whole_number
from digit_canvases import LABELS as DIGIT_LABELS
from digit_canvases import DigitCanvases
from label_file import UNKNOWN, LabelFile, LabelFileError, add_options, read_and_check, reading_of
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.utilities.exceptions import SIGTERMException
from pictures import WHITE_16, LabelledPictures, PictureError
from run_checkpoint import OF_THE_RUN, CheckpointError, WholeCheckpoints, check_configuration, read_checkpoint
from run_report import label_table, mean_average_precision, write_report
from sklearn.model_selection import GroupShuffleSplit
from torch import Tensor
from torch.utils.data import DataLoader

# The recipe, tuned on the digit canvases.
EPOCHS = 7
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
# With --pretrained: a tenth, so that the weights are adapted and not overwritten.
FINE_TUNING_RATE = LEARNING_RATE / 10
TRAIN_CANVASES = 4096
TEST_CANVASES = 1000
CANVAS_SIZE = 48
PICTURE_SIZE = 224  # what torchvision's models were designed and pretrained for
VALIDATION_FRACTION = 0.2

# --- The options ---------------------------------------------------------------------------------


def number_below(high: float) -> Callable[[str], float]:
    """A parser of option values that takes numbers between 0 and `high`, both excluded."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if 0 < float(text) < high:
                return float(text)
        raise argparse.ArgumentTypeError(f"must be a number above 0 and below {high:g}, got {text!r}")

    return parse


def make_parser() -> argparse.ArgumentParser:
    """The command line; a default that depends on other options is None until they are known."""
    usage = "train_multilabel_resnet.py predict CHECKPOINT PICTURES... predicts the labels of pictures."
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], epilog=usage, allow_abbrev=False)
    add = parser.add_argument_group("model and loss").add_argument
    add("--arch", default="resnet18", help="any torchvision classifier (resnet18)")
    add("--pretrained", action="store_true", help="start from torchvision's ImageNet weights")
    losses = "fused_sce's fused, focal and asymmetric; naive: sigmoid, then BCELoss; torch: BCEWithLogitsLoss (fused)"
    add("--loss", choices=LOSSES, default="fused", help=losses)
    weights = "factor of each label's positives: a file with columns label and weight; or auto, its negatives over its "
    weights += "positives in the training part, where one is assumed if there are none"
    add("--pos-weight", metavar="auto|FILE.csv", help=weights)

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=whole_number(1), default=EPOCHS, help=f"({EPOCHS})")
    add("--batch-size", type=whole_number(2), default=BATCH_SIZE, help=f"({BATCH_SIZE})")
    rate = f"the schedule's highest ({LEARNING_RATE:g}; with --pretrained {FINE_TUNING_RATE:g})"
    add("--learning-rate", type=number_below(10), help=rate)
    add("--seed", type=whole_number(0), default=0, help="of everything (0)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, … (cpu)")
    add("--threads", type=whole_number(1), help="threads on the CPU (as many as torch likes)")
    add("--workers", type=whole_number(0), default=0, help="processes that load pictures (0)")

    add = parser.add_argument_group("data: canvases of scanned digits, or your own pictures").add_argument
    size = f"side of the pictures in pixels ({CANVAS_SIZE}; own pictures {PICTURE_SIZE})"
    add("--image-size", type=whole_number(1), help=size)
    add("--train-canvases", type=whole_number(2), help=f"per epoch ({TRAIN_CANVASES})")
    add("--test-canvases", type=whole_number(1), help=f"({TEST_CANVASES})")
    add("--images", type=Path, metavar="DIR", help="folder of your own pictures")
    add("--labels", type=Path, metavar="FILE.csv", help="their labels")
    kept = f"share of your own pictures that is kept to look at after every epoch ({VALIDATION_FRACTION:g})"
    add("--validation-fraction", type=number_below(1), help=kept)
    tested = "labels of pictures for the final report (it is on the share that is kept)"
    add("--test-labels", type=Path, metavar="FILE.csv", help=tested)
    add("--test-images", type=Path, metavar="DIR", help="folder of these pictures (that of --images)")
    add_options(parser)

    add = parser.add_argument_group("files").add_argument
    output = "gets checkpoint, metrics and pictures (runs/multilabel)"
    add("--output", type=Path, metavar="DIR", default=Path("runs/multilabel"), help=output)
    resume = "go on where a run stopped, from this checkpoint or from the one in --output"
    add("--resume", type=Path, nargs="?", const=Path(), metavar="CHECKPOINT", help=resume)
    return parser


def complete_options(options: argparse.Namespace) -> None:
    """Fill in the defaults that depend on other options; refuse options that do not go together."""
    own_pictures = options.images is not None
    if own_pictures != (options.labels is not None):
        given, lacking = ("--images", "--labels") if own_pictures else ("--labels", "--images")
        raise UsageError(f"{given} needs {lacking} beside it")
    try:
        options.reading = reading_of(options)
    except LabelFileError as error:
        raise UsageError(str(error)) from error
    of_canvases = {"train_canvases": TRAIN_CANVASES, "test_canvases": TEST_CANVASES}
    of_pictures = {"validation_fraction": VALIDATION_FRACTION, "test_labels": None, "test_images": None}
    of_pictures |= dict.fromkeys(asdict(options.reading))
    right, wrong = (of_pictures, of_canvases) if own_pictures else (of_canvases, of_pictures)
    for name in wrong:
        if getattr(options, name) is not None:
            why = "does not go with --images" if own_pictures else "needs --images and --labels"
            raise UsageError(f"{option_of(name)} {why}")
    if options.test_images is not None and options.test_labels is None:
        raise UsageError("--test-images needs --test-labels beside it")
    if options.pos_weight is not None and options.loss in ("focal", "asymmetric"):
        raise UsageError(f"--pos-weight does not go with --loss {options.loss}, which has weights of its own")
    if options.seed >= 2**32:  # scikit-learn's splitters take no more
        raise UsageError(f"--seed must be below 2**32, got {options.seed}")
    defaults = {
        **right,
        "learning_rate": FINE_TUNING_RATE if options.pretrained else LEARNING_RATE,
        "image_size": PICTURE_SIZE if own_pictures else CANVAS_SIZE,
        "test_images": options.images,
    }
    for name, default in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    if options.resume == Path():
        options.resume = options.output / "checkpoint.pt"


def option_of(name: str) -> str:
    """The option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


# --- The data ------------------------------------------------------------------------------------

PictureSet = DigitCanvases | LabelledPictures


@dataclass(frozen=True)
class Data:
    """The `parts` that are trained on, validated and perhaps tested on: "train", "validation" and "test".

    `sources` is what decides the result and is not an option: the content of files.
    """

    parts: dict[str, PictureSet]
    labels: tuple[str, ...]
    white: int
    sources: dict[str, str]
    description: str

    @property
    def tested(self) -> PictureSet:
        """What the final report is on."""
        return self.parts.get("test", self.parts["validation"])


def load_canvases(options: argparse.Namespace) -> Data:
    """Canvases of digits; those for training and those for testing come from different scans."""
    how = {"image_size": options.image_size, "seed": options.seed}
    try:
        train = DigitCanvases(train=True, count=options.train_canvases, **how)
        test = DigitCanvases(train=False, count=options.test_canvases, **how)
    except ValueError as error:
        raise UsageError(f"--image-size: {error}") from error
    return Data({"train": train, "validation": test}, DIGIT_LABELS, WHITE_16, {}, "canvases of digits, 10 labels")


def read_labels(kind: str, options: argparse.Namespace, like: LabelFile | None = None) -> tuple[LabelFile, int]:
    """The file of --labels, or with "test_" as `kind` that of --test-labels, and the grey value that is white."""
    file, images = getattr(options, f"{kind}labels"), getattr(options, f"{kind}images")
    if not os.path.isdir(images):
        raise UsageError(f"{option_of(f'{kind}images')}: no such folder: {images}")
    how, labels = (like.how, like.labels) if like else (options.reading, None)
    # Beside torch's own downloads: --output must not be touched before all is known to be right.
    remembered = Path(torch.hub.get_dir()).parent / "fused_sce" / "checked_pictures.json"
    try:
        return read_and_check(file, images, how, workers=os.cpu_count() or 1, remembered=remembered, labels=labels)
    except LabelFileError as error:
        raise UsageError(f"{option_of(f'{kind}labels')}: {error}") from error


def load_pictures(options: argparse.Namespace) -> Data:
    """The user's own pictures, a random part of which is kept for validation, and those of the test file."""
    content, white = read_labels("", options)
    train_rows, kept_rows = split(content, options)
    chosen = {"train": (content, train_rows), "validation": (content, kept_rows)}
    # By their content: the files may have moved, but must not have changed.
    sources = {"--labels with sha256": content.sha256, "--labels whose names have sha256": sha256_of(content.labels)}
    if options.test_labels is not None:
        test, test_white = read_labels("test_", options, content)
        chosen["test"], white = (test, np.arange(len(test.pictures))), max(white, test_white)
        sources["--test-labels with sha256"] = test.sha256
    parts: dict[str, PictureSet] = {}
    for name, (source, rows) in chosen.items():
        pictures, targets = [source.pictures[row] for row in rows], source.targets[torch.from_numpy(rows)]
        parts[name] = LabelledPictures(pictures, targets, options.image_size, white)
        file = f"--test-labels: {options.test_labels}" if name == "test" else f"--labels: {options.labels}"
        if name == "train" and not (targets != UNKNOWN).any():
            raise UsageError(f"{file}: no label is known of a picture to train on")
        if name != "train" and not (targets == 1).any():
            raise UsageError(f"{file}: none of the {len(rows)} {name} pictures has a 1: there is nothing to measure")
    return Data(parts, content.labels, white, sources, content.description)


def split(content: LabelFile, options: argparse.Namespace) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Random rows to train on, and those that --validation-fraction keeps; a group is never in both."""
    rows, fraction = np.arange(len(content.pictures)), options.validation_fraction
    groups = rows if content.groups is None else content.groups
    try:
        # Where every picture is a group of its own, the groups are pictures.
        splitter = GroupShuffleSplit(1, test_size=fraction, random_state=options.seed)
        train_rows, kept_rows = next(splitter.split(rows, groups=groups))
        if len(train_rows) < 2:
            raise ValueError
    except ValueError as error:
        what = "pictures" if content.groups is None else f"groups in column {options.group_column!r}"
        raise UsageError(
            f"--labels: {options.labels}: {len(set(groups))} {what}, of which --validation-fraction {fraction:g} is "
            "kept: too few are left to train on"
        ) from error
    return train_rows, kept_rows


class Batches(lightning.LightningDataModule):
    """The pictures in batches, for the epoch that `classifier` has come to."""

    def __init__(self, options: argparse.Namespace, data: Data, classifier: Classifier) -> None:
        super().__init__()
        self.options, self.data, self.classifier = options, data, classifier

    def loader(self, pictures: PictureSet, **how: Any) -> DataLoader[Any]:
        """The batches of one part."""
        options = self.options
        # With a generator of its own it leaves alone the random numbers that dropout draws.
        how |= {"num_workers": options.workers, "pin_memory": options.device != "cpu", "generator": torch.Generator()}
        return DataLoader(pictures, options.batch_size, **how)

    def train_dataloader(self) -> DataLoader[Any]:
        """Those of the epoch in random order, new canvases among them: a function of seed and epoch alone."""
        train, epoch, batch_size = self.data.parts["train"], len(self.classifier.history), self.options.batch_size
        if isinstance(train, DigitCanvases):
            train.set_epoch(epoch)
        order = np.random.default_rng([self.options.seed, epoch]).permutation(len(train)).tolist()
        # A batch norm over a 1x1 feature map has no variance to divide by if the last batch is one picture: one is left
        # out, in every epoch another.
        return self.loader(train, sampler=order, drop_last=len(train) > batch_size and len(train) % batch_size == 1)

    def val_dataloader(self) -> DataLoader[Any]:
        """Those of the validation part."""
        return self.loader(self.data.parts["validation"])


def pos_weight_of(options: argparse.Namespace, data: Data) -> Tensor | None:
    """The factor of each label's positives, (L,) float32, or None."""
    if options.pos_weight is None:
        return None
    if options.pos_weight != "auto":
        return read_pos_weight(Path(options.pos_weight), data.labels)
    train = data.parts["train"]
    if isinstance(train, LabelledPictures):
        targets = train.targets
    else:
        targets = torch.stack([train[index][1] for index in range(len(train))])
    negatives, positives = ((targets == value).sum(dim=0).clamp(min=1) for value in (0, 1))
    return negatives / positives


def read_pos_weight(file: Path, labels: Sequence[str]) -> Tensor:
    """The weights in `file`, one row `label,weight` for each of `labels`, in their order, (L,) float32."""
    weights = dict.fromkeys(labels, math.nan)
    line = 0  # the last of the row before
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            if next(reader, None) != ["label", "weight"]:
                raise ValueError("the header must be label,weight")
            line = reader.line_num
            for row in filter(None, reader):
                label, weight = row[0], float(row[1]) if len(row) == 2 else math.nan
                if not math.isnan(weights.get(label, 0)):
                    raise ValueError(f"{label!r} is no label of this run, or has a weight already")
                if not 1e-30 < weight < 1e30:
                    raise ValueError(f"must be a label and a positive, finite weight, got {','.join(row)}")
                weights[label], line = weight, reader.line_num
    except OSError as error:
        raise UsageError(f"--pos-weight: {file}: cannot be read: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise UsageError(f"--pos-weight: {file}: line {line + 1}: {error}") from error
    lacking = [label for label, weight in weights.items() if math.isnan(weight)]
    if lacking:
        raise UsageError(f"--pos-weight: {file}: has no weight for {', '.join(map(repr, lacking[:10]))}")
    return torch.tensor(list(weights.values()))


# --- The run -------------------------------------------------------------------------------------


def sha256_of(content: Sequence[object]) -> str:
    """The SHA-256 of plain values."""
    return hashlib.sha256(repr(content).encode()).hexdigest()


def configuration_of(options: argparse.Namespace, data: Data, pos_weight: Tensor | None) -> dict[str, Any]:
    """What decides the result, by the name under which a user knows it."""
    names = ["arch", "pretrained", "loss", "epochs", "batch_size", "learning_rate", "seed"]
    names += ["image_size", "train_canvases", "test_canvases", "validation_fraction", *asdict(options.reading)]
    configuration = {option_of(name): getattr(options, name) for name in names}
    digest = None if pos_weight is None else sha256_of(pos_weight.tolist())
    return configuration | {"--pos-weight with sha256": digest} | data.sources


def make_trainer(options: argparse.Namespace, device: torch.device) -> lightning.Trainer:
    """Lightning's loop, quiet and without files of its own."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    return lightning.Trainer(
        accelerator=device.type,
        devices=1 if device.type == "cpu" else [device.index or 0],
        # It would else take that of a cluster's job for several processes.
        plugins=[WholeCheckpoints(), LightningEnvironment()],
        max_epochs=options.epochs,
        reload_dataloaders_every_n_epochs=1,
        deterministic="warn" if device.type == "cuda" else None,
        benchmark=False,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,  # the classifier does it
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def train(options: argparse.Namespace) -> None:
    """Everything the options ask for; raises UsageError or CheckpointError, before any training, if it cannot be."""
    complete_options(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = open_device(options.device)
    data = load_canvases(options) if options.images is None else load_pictures(options)
    pos_weight = pos_weight_of(options, data)
    configuration = configuration_of(options, data, pos_weight)
    file, resume = options.output / "checkpoint.pt", options.resume
    if resume is None:
        classifier = Classifier(configuration, data.labels, data.white, pos_weight=pos_weight, checkpoint_file=file)
    else:
        checkpoint = read_checkpoint(resume, OF_THE_RUN)
        check_configuration(resume, checkpoint["configuration"], configuration)
        classifier = Classifier.trained(checkpoint, resume, pos_weight=pos_weight, checkpoint_file=file)
        for name, value in sorted(checkpoint["environment"].items() - environment(device).items()):
            print(f"note: {resume} was written with {name} {value}: the last bits may differ", file=sys.stderr)
    options.output.mkdir(parents=True, exist_ok=True)
    if not os.access(options.output, os.W_OK | os.X_OK):
        raise UsageError(f"--output: {options.output}: not writable")

    counts = ", ".join(f"{len(part)} {name}" for name, part in data.parts.items())
    print(data.description, f"{counts} pictures; {options.arch}, {options.loss} loss", sep="\n")
    print(TABLE_HEADER, *(TABLE_ROW.format(**asdict(record)) for record in classifier.history), sep="\n")
    trainer, batches = make_trainer(options, device), Batches(options, data, classifier)
    trainer.fit(classifier, datamodule=batches, ckpt_path=resume)
    # A run that was resumed after its last epoch has looked at nothing.
    if "test" in data.parts or classifier.evaluation is None:
        trainer.validate(classifier, batches.loader(data.tested), verbose=False)
    # Thresholds that are tuned on the pictures of the report would look better than they are.
    metrics = write_report(options.output, classifier, data.tested, tuned="test" in data.parts)
    print(f"\n{label_table(metrics)}\n")
    seconds = sum(record.seconds for record in classifier.history)
    print(f"mAP {mean_average_precision(metrics):.4f} after {seconds:.0f} s; see {options.output}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as `arguments` say, the command line's if None; exit with status 2 on unusable ones."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["predict"]:
        return predict.main(arguments[1:])
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        train(options)
    except (UsageError, PictureError) as error:
        parser.error(str(error))
    except CheckpointError as error:
        parser.error(f"--resume: {error}")
    except SIGTERMException:  # Lightning ends the batch, and would exit as if all were done
        raise SystemExit(128 + signal.SIGTERM) from None
    except OSError as error:  # everything that is read has been checked before
        parser.error(f"--output: {options.output}: {error.strerror}")


if __name__ == "__main__":
    main()
