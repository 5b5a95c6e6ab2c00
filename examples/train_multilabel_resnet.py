"""Train a ResNet with one independent logistic output per label, using fused_sce's loss.

    python examples/train_multilabel_resnet.py

composes canvases of scanned digits (`digit_canvases.py`), trains a ResNet-18 to tell which of the ten digits each one
shows, and leaves a checkpoint, metrics and pictures in `runs/multilabel`. Your own pictures (`label_file.py`):

    python examples/train_multilabel_resnet.py --images photos --labels photos.csv --pretrained
    python examples/train_multilabel_resnet.py predict runs/multilabel/checkpoint.pt new_photos

The same options with the same seed give the same result to the bit on a CPU, on the same machine with the same number
of threads. A run that was killed goes on after its last whole epoch with `--resume`, to the very same result.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Read when torch is loaded, so set before. A thread that waits for another soon sleeps instead of spinning on: before
# Lightning, a step took the same time on two idle cores, and 0.6 of it where other work kept one of them busy.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# cuBLAS is deterministic only with this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import lightning
import numpy as np
import numpy.typing as npt
import pandas as pd
import predict
import torch
from classifier import LOSSES, Classifier, UsageError, check_arch, environment, number, open_device
from digit_canvases import LABELS as DIGIT_LABELS
from digit_canvases import DigitCanvases
from label_file import UNKNOWN, LabelFile, LabelFileError, add_options, counted, read_label_file, reading_of
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from pictures import WHITE, WHITES, LabelledPictures, PictureError, white_of
from run_checkpoint import OF_THE_RUN, CheckpointError, WholeCheckpoints, check_configuration, read_checkpoint
from run_report import REPORT, TABLE_HEADER, TABLE_ROW, label_table, mean_average_precision, shown, write_report
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


def make_parser() -> argparse.ArgumentParser:
    """The command line; a default that depends on other options is None until they are known."""
    usage = "%(prog)s [OPTIONS], which --help lists, or %(prog)s predict CHECKPOINT PICTURES"
    parser = argparse.ArgumentParser(usage=usage, description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument_group("model and loss").add_argument
    add("--arch", default="resnet18", help="any torchvision classifier (resnet18)")
    add("--pretrained", action="store_true", help="start from torchvision's ImageNet weights")
    losses = "fused_sce's fused, focal and asymmetric; naive: sigmoid, then BCELoss; torch: BCEWithLogitsLoss (fused)"
    add("--loss", choices=LOSSES, default="fused", help=losses)
    weights = "factor of each label's positives: a file with columns label and weight; or auto, its negatives over its "
    weights += "positives in the training part, a count of 0 taken as 1"
    add("--pos-weight", metavar="auto|FILE.csv", help=weights)

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1), default=EPOCHS, help=f"({EPOCHS})")
    add("--batch-size", type=number(int, 2), default=BATCH_SIZE, help=f"({BATCH_SIZE})")
    rate = f"the schedule's highest ({LEARNING_RATE:g}; with --pretrained {FINE_TUNING_RATE:g})"
    add("--learning-rate", type=number(float, 1e-12, 10), help=rate)
    add("--seed", type=number(int, 0, 2**32), default=0, help="of everything (0)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, … (cpu)")
    add("--threads", type=number(int, 1), help="threads on the CPU (as many as torch likes)")
    add("--workers", type=number(int, 0), default=0, help="processes that load pictures (0)")

    add = parser.add_argument_group("data: canvases of scanned digits, or your own pictures").add_argument
    size = f"side of the pictures in pixels ({CANVAS_SIZE}; own pictures {PICTURE_SIZE})"
    add("--image-size", type=number(int, 1), help=size)
    add("--train-canvases", type=number(int, 2), help=f"per epoch ({TRAIN_CANVASES})")
    add("--test-canvases", type=number(int, 1), help=f"({TEST_CANVASES})")
    add("--images", type=Path, metavar="DIR", help="folder of your own pictures")
    add("--labels", type=Path, metavar="FILE.csv", help="their labels")
    kept = "share of your own pictures (with --group-column, of the groups) that is kept to look at after every epoch "
    add("--validation-fraction", type=number(float, 1e-9, 1), help=f"{kept}({VALIDATION_FRACTION:g})")
    tested = "labels of pictures for the final report (default: the validation part)"
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
    """Fill in the defaults that depend on other options; refuse options that cannot be right, whatever the data."""
    check_arch(options.arch)
    there = next(path for path in (options.output, *options.output.parents) if os.path.exists(path))
    if not (os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)):
        raise UsageError(f"--output: {options.output}: {there} is not a folder, or not writable")
    own_pictures = options.images is not None
    for given, lacking in (("images", "labels"), ("labels", "images"), ("test_images", "test_labels")):
        if getattr(options, given) is not None and getattr(options, lacking) is None:
            raise UsageError(f"{option_of(given)} needs {option_of(lacking)} beside it")
    options.reading = reading_of(options)
    of_canvases = {"train_canvases": TRAIN_CANVASES, "test_canvases": TEST_CANVASES}
    of_pictures = {"validation_fraction": VALIDATION_FRACTION, "test_labels": None, "test_images": None}
    of_pictures |= dict.fromkeys(asdict(options.reading))
    right, wrong = (of_pictures, of_canvases) if own_pictures else (of_canvases, of_pictures)
    for name in wrong:
        if getattr(options, name) is not None:
            why = "does not go with --images" if own_pictures else "needs --images and --labels"
            raise UsageError(f"{option_of(name)} {why}")
    if options.pos_weight is not None and options.loss in ("focal", "asymmetric"):
        raise UsageError(f"--pos-weight does not go with --loss {options.loss}, which has weights of its own")
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


PictureSet = DigitCanvases | LabelledPictures


@dataclass(frozen=True)
class Data:
    """The `parts` that are trained on, validated and perhaps tested on: "train", "validation" and "test".

    `sources` is what decides the result and is not an option: the content of files. `pos_weight` (L,) is float32.
    """

    parts: dict[str, PictureSet]
    labels: tuple[str, ...]
    pos_weight: Tensor | None
    sources: dict[str, object]
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
    of_weights = range(len(train)) if options.pos_weight == "auto" else range(1)  # each must be composed
    pos_weight = pos_weight_of(options, DIGIT_LABELS, torch.stack([train[index][1] for index in of_weights]))
    parts: dict[str, PictureSet] = {"train": train, "validation": test}
    return Data(parts, DIGIT_LABELS, pos_weight, {WHITE: WHITES[0]}, "canvases of digits, 10 labels")


def read_labels(kind: str, options: argparse.Namespace, like: LabelFile | None = None) -> LabelFile:
    """The file of --labels, or with "test_" as `kind` that of --test-labels."""
    file, images = getattr(options, f"{kind}labels"), getattr(options, f"{kind}images")
    if not os.path.isdir(images):
        raise UsageError(f"{option_of(f'{kind}images')}: no such folder: {images}")
    how, labels = (like.how, like.labels) if like else (options.reading, None)
    try:
        return read_label_file(file, images, how, labels=labels)
    except LabelFileError as error:
        raise UsageError(f"{option_of(f'{kind}labels')}: {error}") from error


def load_pictures(options: argparse.Namespace) -> Data:
    """The user's own pictures, a random part of which is kept for validation, and those of the test file."""
    content = read_labels("", options)
    files = {f"--labels: {options.labels}": content}
    train_rows, kept_rows = split(content, options)
    chosen = {"train": (content, train_rows), "validation": (content, kept_rows)}
    # By their content: the files may have moved, but must not have changed.
    sources: dict[str, object] = {"--labels with sha256": content.sha256}
    if options.test_labels is not None:
        test = files[f"--test-labels: {options.test_labels}"] = read_labels("test_", options, content)
        own = set(map(os.path.realpath, content.pictures))
        if both := [picture for picture in test.pictures if os.path.realpath(picture) in own]:
            many = f"{counted(len(both), 'picture')}, such as {both[0]}"
            raise UsageError(f"--test-labels: {options.test_labels}: names {many}, that --labels names, too")
        chosen["test"] = test, np.arange(len(test.pictures))
        sources["--test-labels with sha256"] = test.sha256
    targets = {name: source.targets[torch.from_numpy(rows)] for name, (source, rows) in chosen.items()}
    for name, values in targets.items():
        file = list(files)[name == "test"]
        if name == "train" and not (values != UNKNOWN).any():
            raise UsageError(f"{file}: no label is known of a picture to train on")
        if name != "train" and not (values == 1).any():
            raise UsageError(f"{file}: none of the {len(values)} {name} pictures has a 1: there is nothing to measure")
    has_none = (targets["train"] != 1).all(dim=0).tolist()
    if lacking := [shown(label) for label in itertools.compress(content.labels, has_none)]:
        first = ", ".join(lacking[:5]) + ", …" * (len(lacking) > 5)
        print(f"note: labels without a positive in the training part ({len(lacking)}): {first}", file=sys.stderr)
    pos_weight = pos_weight_of(options, content.labels, targets["train"])

    # Last, as it takes longest.
    pictures = [picture for source in files.values() for picture in source.pictures]
    lines = [f"{file}: line {line}: picture" for file, source in files.items() for line in source.lines]
    white = white_of(pictures, [f"{line} {picture}" for line, picture in zip(lines, pictures, strict=True)])
    parts: dict[str, PictureSet] = {
        name: LabelledPictures([source.pictures[row] for row in rows], targets[name], options.image_size, white)
        for name, (source, rows) in chosen.items()
    }
    return Data(parts, content.labels, pos_weight, sources | {WHITE: white}, content.description)


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
        what = counted(len(set(groups)), "picture" if content.groups is None else "group")
        kept = f"of which --validation-fraction {fraction:g} is kept: too few are left to train on"
        raise UsageError(f"--labels: {options.labels}: {what}, {kept}") from error
    return train_rows, kept_rows


class Batches(lightning.LightningDataModule):
    """The pictures in batches, for the epoch that `classifier` has come to."""

    def __init__(self, options: argparse.Namespace, data: Data, classifier: Classifier) -> None:
        super().__init__()
        self.options, self.data, self.classifier = options, data, classifier

    def on_exception(self, exception: BaseException) -> None:
        """Take the progress bar off the screen."""
        self.classifier.bar.close()

    def loader(self, pictures: PictureSet, **how: Any) -> DataLoader[Any]:
        """The batches of one part."""
        how |= {"num_workers": self.options.workers, "pin_memory": torch.device(self.options.device).type == "cuda"}
        # With a generator of its own it leaves alone the random numbers that dropout draws.
        return DataLoader(pictures, self.options.batch_size, generator=torch.Generator(), **how)

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


def pos_weight_of(options: argparse.Namespace, labels: Sequence[str], targets: Tensor) -> Tensor | None:
    """The factor of each label's positives, (L,) float32, or None; `targets` (N, L) are those of the training part."""
    if options.pos_weight is None:
        return None
    if options.pos_weight != "auto":
        return read_pos_weight(Path(options.pos_weight), labels)
    negatives, positives = ((targets == value).sum(dim=0).clamp(min=1) for value in (0, 1))
    return negatives / positives


def read_pos_weight(file: Path, labels: Sequence[str]) -> Tensor:
    """The weights in `file`, one row `label,weight` for each of `labels`, in their order, (L,) float32."""
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"--pos-weight: {file}: cannot be read: {getattr(error, 'strerror', error)}") from error
    if list(table.columns) != ["label", "weight"]:
        raise UsageError(f"--pos-weight: {file}: the header must be label,weight")
    weights = pd.to_numeric(table.set_index("label")["weight"], errors="coerce")
    given = weights.index
    wrong = [*given.symmetric_difference(labels), *given[given.duplicated() | ~weights.between(1e-30, 1e30)]]
    if wrong:
        needed = "every label of this run, and no other, needs one weight, positive and finite"
        raise UsageError(f"--pos-weight: {file}: {needed}; see {', '.join(map(repr, wrong[:10]))}")
    return torch.tensor(weights.loc[list(labels)].to_numpy(np.float32))


def configuration_of(options: argparse.Namespace, data: Data) -> dict[str, Any]:
    """What decides the result, by the name under which a user knows it."""
    names = ["arch", "pretrained", "loss", "epochs", "batch_size", "learning_rate", "seed"]
    names += ["image_size", "train_canvases", "test_canvases", "validation_fraction", *asdict(options.reading)]
    configuration = {option_of(name): getattr(options, name) for name in names}
    digest = None if data.pos_weight is None else hashlib.sha256(data.pos_weight.numpy().tobytes()).hexdigest()
    return configuration | {"--pos-weight with sha256": digest} | data.sources


def make_trainer(options: argparse.Namespace, device: torch.device) -> lightning.Trainer:
    """Lightning's loop, quiet and without files of its own."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    return lightning.Trainer(
        accelerator=device.type,
        devices=1 if device.type == "cpu" else [device.index or 0],
        # It would otherwise take that of a cluster's job for several processes.
        plugins=[WholeCheckpoints(), LightningEnvironment()],
        max_epochs=options.epochs,
        reload_dataloaders_every_n_epochs=1,
        deterministic="warn" if device.type == "cuda" else None,
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
    trainer = make_trainer(options, device)
    file, resume = options.output / "checkpoint.pt", options.resume
    checkpoint = None if resume is None else read_checkpoint(resume, OF_THE_RUN)
    data = load_canvases(options) if options.images is None else load_pictures(options)
    configuration, further = configuration_of(options, data), {"pos_weight": data.pos_weight, "checkpoint_file": file}
    if checkpoint is None:
        classifier = Classifier(configuration, data.labels, **further)
    else:
        classifier = Classifier.trained(checkpoint, resume, **further)
        check_configuration(resume, classifier.configuration, configuration)
        for name, value in dict(checkpoint["environment"]).items() - environment(device).items():
            print(f"note: {resume} was written with {name} {value}: last bits may differ", file=sys.stderr)
    options.output.mkdir(parents=True, exist_ok=True)
    if resume != file:
        for name in REPORT:  # that of another run must not stand beside this one's checkpoint
            (options.output / name).unlink(missing_ok=True)

    counts = ", ".join(f"{len(part)} {name}" for name, part in data.parts.items())
    print(data.description, f"{counts} pictures; {options.arch}, {options.loss} loss", sep="\n")
    print(TABLE_HEADER, *(TABLE_ROW.format(**asdict(record)) for record in classifier.history), sep="\n")
    batches = Batches(options, data, classifier)
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
    except (UsageError, LabelFileError) as error:
        parser.error(str(error))
    except PictureError as error:  # in the training, a worker process puts its traceback before
        parser.error(str(error).rpartition("PictureError: ")[2].strip())
    except CheckpointError as error:
        parser.error(f"--resume: {error}")
    except SIGTERMException:  # Lightning ends the batch, and would exit as if all were done
        raise SystemExit(128 + signal.SIGTERM) from None
    except OSError as error:  # everything that is read has been checked before
        parser.error(f"--output: {options.output}: {error.strerror}")


if __name__ == "__main__":
    main()
