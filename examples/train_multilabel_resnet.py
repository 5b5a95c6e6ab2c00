"""Train a ResNet with one independent logistic output per label, using fused_sce's loss.

    python examples/train_multilabel_resnet.py

composes canvases of scanned digits (`digit_canvases.py`), trains a ResNet-18 to tell which of the
ten digits each one shows, and leaves metrics and pictures in `runs/multilabel`. Your own pictures:

    python examples/train_multilabel_resnet.py --images photos --labels photos.csv --pretrained

where the CSV names a picture and one 0/1/empty value per label in each row (`label_file.py`).

The same options with the same seed give the same result to the bit, on the same machine with the
same number of threads. After every epoch a checkpoint is written; a run that was killed goes on
with `--resume` and ends with the very result it would have had.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import hashlib
import math
import os
import sys
import time
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

import numpy as np
import torch
import torchvision
from digit_canvases import DigitCanvases
from label_file import LabelFileError, LabelledPictures, read_label_file
from run_checkpoint import (
    CheckpointError,
    check_configuration,
    load_checkpoint,
    save_checkpoint,
)
from run_report import (
    EpochRecord,
    Evaluation,
    label_metrics,
    label_table,
    mean_average_precision,
    write_report,
)
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import fused_sce

# The recipe, tuned on the digit canvases.
EPOCHS = 7
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
# With --pretrained: a tenth, so that the weights are adapted and not overwritten.
FINE_TUNING_RATE = LEARNING_RATE / 10
WEIGHT_DECAY = 0.05
TRAIN_CANVASES = 4096
TEST_CANVASES = 1000
CANVAS_SIZE = 48
PICTURE_SIZE = 224  # what torchvision's models were designed and pretrained for
VALIDATION_FRACTION = 0.2
# Statistics of ImageNet's pixels, red, green and blue: pretrained weights expect them taken out.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


class UsageError(Exception):
    """The options, or what they name, cannot be used; the message names the option."""


# --- The loss ------------------------------------------------------------------------------------
#
# Each takes logits, targets and known, (B, L) float32, and returns the sum over the known labels;
# the caller divides by their number. A mean by the loss itself would divide by all B·L labels and
# so count an unknown one as perfectly predicted.

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused_loss(logits: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    """`fused_sce.BCEWithLogitsLoss`: loss and gradient in one pass, right for every logit."""
    loss: Tensor = fused_sce.functional.binary_cross_entropy_with_logits(logits, targets, weight=known, reduction="sum")
    return loss


def naive_loss(logits: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    """A sigmoid, then `torch.nn.BCELoss`: no gradient is left once the sigmoid rounds to 0 or 1."""
    return F.binary_cross_entropy(torch.sigmoid(logits), targets, weight=known, reduction="sum")


def torch_loss(logits: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    """`torch.nn.BCEWithLogitsLoss`: the gradient of a label that is set is 0 from logit 17 on."""
    return F.binary_cross_entropy_with_logits(logits, targets, weight=known, reduction="sum")


LOSSES: dict[str, Loss] = {"fused": fused_loss, "naive": naive_loss, "torch": torch_loss}


# --- The options ---------------------------------------------------------------------------------


def whole_number(minimum: int) -> Callable[[str], int]:
    """A parser of option values that takes integers from `minimum` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, got {text!r}")
        return value

    return parse


def number_between(low: float, high: float) -> Callable[[str], float]:
    """A parser of option values that takes numbers between `low` and `high`, both excluded."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low < value < high:
            raise argparse.ArgumentTypeError(f"must be a number above {low:g} and below {high:g}, got {text!r}")
        return value

    return parse


def make_parser() -> argparse.ArgumentParser:
    """The command line; a default that depends on other options is None until they are known."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    model = parser.add_argument_group("model and loss")
    model.add_argument("--arch", default="resnet18", help="any torchvision classifier (resnet18)")
    model.add_argument("--pretrained", action="store_true", help="start from torchvision's ImageNet weights")
    model.add_argument(
        "--loss",
        choices=LOSSES,
        default="fused",
        help="fused: fused_sce; naive: sigmoid, then BCELoss; torch: BCEWithLogitsLoss (fused)",
    )

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=whole_number(1), default=EPOCHS, help=f"({EPOCHS})")
    training.add_argument("--batch-size", type=whole_number(2), default=BATCH_SIZE, help=f"({BATCH_SIZE})")
    training.add_argument(
        "--learning-rate",
        type=number_between(0, 10),
        help=f"the schedule's highest ({LEARNING_RATE:g}; with --pretrained {FINE_TUNING_RATE:g})",
    )
    training.add_argument("--seed", type=whole_number(0), default=0, help="of everything (0)")
    training.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (cpu)")
    training.add_argument("--threads", type=whole_number(1), help="threads on the CPU (as many as torch likes)")
    training.add_argument("--workers", type=whole_number(0), default=0, help="processes that load pictures (0)")

    data = parser.add_argument_group("data: canvases of scanned digits, or your own pictures")
    data.add_argument(
        "--image-size",
        type=whole_number(1),
        help=f"side of the pictures in pixels ({CANVAS_SIZE}; own pictures {PICTURE_SIZE})",
    )
    data.add_argument("--train-canvases", type=whole_number(2), help=f"per epoch ({TRAIN_CANVASES})")
    data.add_argument("--test-canvases", type=whole_number(1), help=f"({TEST_CANVASES})")
    data.add_argument("--images", type=Path, metavar="DIR", help="folder of your own pictures")
    data.add_argument("--labels", type=Path, metavar="FILE.csv", help="file name and one 0/1/empty per label")
    data.add_argument(
        "--validation-fraction",
        type=number_between(0, 1),
        help=f"share of your own pictures that are kept for testing ({VALIDATION_FRACTION:g})",
    )

    files = parser.add_argument_group("files")
    files.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path("runs/multilabel"),
        help="gets checkpoint, metrics and pictures (runs/multilabel)",
    )
    files.add_argument(
        "--resume",
        type=Path,
        nargs="?",
        const=Path(),  # given without a value: the checkpoint in --output
        metavar="CHECKPOINT",
        help="go on where a run stopped, from the checkpoint in --output or from this one",
    )
    return parser


def complete_options(options: argparse.Namespace) -> None:
    """Fill in the defaults that depend on other options; refuse options that do not go together."""
    own_pictures = options.images is not None
    if own_pictures != (options.labels is not None):
        given, lacking = ("--images", "--labels") if own_pictures else ("--labels", "--images")
        raise UsageError(f"{given} needs {lacking} beside it")
    canvases_only = {"train_canvases": TRAIN_CANVASES, "test_canvases": TEST_CANVASES}
    pictures_only = {"validation_fraction": VALIDATION_FRACTION}
    wrong = canvases_only if own_pictures else pictures_only
    for name in wrong:
        if getattr(options, name) is not None:
            why = "does not go with --images" if own_pictures else "needs --images and --labels"
            raise UsageError(f"--{name.replace('_', '-')} {why}")
    for name, default in (pictures_only if own_pictures else canvases_only).items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    if options.learning_rate is None:
        options.learning_rate = FINE_TUNING_RATE if options.pretrained else LEARNING_RATE
    if options.image_size is None:
        options.image_size = PICTURE_SIZE if own_pictures else CANVAS_SIZE
    # scikit-learn's splitters take seeds of 32 bits.
    if options.seed >= 2**32:
        raise UsageError(f"--seed must be below 2**32, got {options.seed}")
    if options.resume == Path():
        options.resume = options.output / "checkpoint.pt"


def open_device(name: str) -> torch.device:
    """The device `name`, once it is certain that a tensor can be put there."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name!r} cannot be used: {reason}") from error
    if device.type == "cuda":
        # The same seed must give the same result there, too.
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
    return device


# --- The data ------------------------------------------------------------------------------------

PictureSet = DigitCanvases | LabelledPictures


@dataclass(frozen=True)
class Data:
    """What is trained and tested on; `sha256` is the label file's, if there is one."""

    train: PictureSet
    test: PictureSet
    labels: tuple[str, ...]
    sha256: str | None


def load_data(options: argparse.Namespace) -> Data:
    """The user's own pictures if there are any, else canvases of digits."""
    return load_canvases(options) if options.images is None else load_pictures(options)


def load_canvases(options: argparse.Namespace) -> Data:
    """Canvases of digits; those for training and those for testing come from different scans."""
    size, seed = options.image_size, options.seed
    try:
        train = DigitCanvases(train=True, count=options.train_canvases, image_size=size, seed=seed)
        test = DigitCanvases(train=False, count=options.test_canvases, image_size=size, seed=seed)
    except ValueError as error:
        raise UsageError(f"--image-size: {error}") from error
    return Data(train, test, train.labels, None)


def load_pictures(options: argparse.Namespace) -> Data:
    """The user's own pictures, a random part of which is kept for testing."""
    if not options.images.is_dir():
        raise UsageError(f"--images: no such folder: {options.images}")
    try:
        label_file = read_label_file(options.labels, options.images)
    except LabelFileError as error:
        raise UsageError(f"--labels: {error}") from error
    count = len(label_file.pictures)
    test_count = max(1, round(count * options.validation_fraction))
    if count - test_count < 2:
        raise UsageError(
            f"--labels: {options.labels}: {count} pictures, of which --validation-fraction "
            f"{options.validation_fraction:g} keeps {test_count}: too few are left to train on"
        )
    train_rows, test_rows = train_test_split(range(count), test_size=test_count, random_state=options.seed)
    test = LabelledPictures(label_file, test_rows, options.image_size)
    if not test.targets.any():
        raise UsageError(
            f"--labels: {options.labels}: none of the {test_count} pictures kept for testing has "
            "a 1, which leaves nothing to measure; raise --validation-fraction"
        )
    train = LabelledPictures(label_file, train_rows, options.image_size)
    if not train.known.any():
        raise UsageError(f"--labels: {options.labels}: no label is known of a picture to train on")
    return Data(train, test, label_file.labels, label_file.sha256)


def shuffled_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The indices of one epoch in random order, by batches: a function of the arguments alone."""
    order = np.random.default_rng([seed, epoch]).permutation(count).tolist()
    batches = [order[start : start + batch_size] for start in range(0, count, batch_size)]
    # A batch norm over a 1x1 feature map has no variance to divide by if the batch is one picture.
    if len(batches) > 1 and len(batches[-1]) == 1:
        last = batches.pop()
        batches[-1] += last
    return batches


def to_input(pictures: Tensor, device: torch.device) -> Tensor:
    """(B, 1 or 3, H, W) uint8 to (B, 3, H, W) float32 as torchvision's models expect it.

    It is channels last in memory: that is the layout in which the CPU's convolutions are fastest,
    a ResNet-18 on 48x48 pixels by up to 1.4 times.
    """
    pixels = pictures.to(device, non_blocking=True).float().div_(255).expand(-1, 3, -1, -1)
    mean = torch.tensor(PIXEL_MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(PIXEL_STD, device=device).view(3, 1, 1)
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


# --- The model -----------------------------------------------------------------------------------


def build_model(options: argparse.Namespace, label_count: int) -> nn.Module:
    """A torchvision model, on the CPU, whose head gives one logit per label."""
    known_archs = torchvision.models.list_models(module=torchvision.models)
    if options.arch not in known_archs:
        near = difflib.get_close_matches(options.arch, known_archs)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"--arch: torchvision has no classifier {options.arch!r}{hint}")
    try:
        model: nn.Module = torchvision.models.get_model(options.arch, weights="DEFAULT" if options.pretrained else None)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"--pretrained: no weights for {options.arch}: {error}") from error
    try:
        model = fused_sce.replace_head(model, label_count)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UsageError(f"--arch {options.arch}: {error}") from error
    check_model(model, options, label_count)
    return model.to(memory_format=torch.channels_last)


def logits_of(model: nn.Module, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) to logits (B, L).

    GoogLeNet and Inception return those of their auxiliary heads beside them in training. These are
    left out: batch norm has made them needless.
    """
    output = model(pictures)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def check_model(model: nn.Module, options: argparse.Namespace, label_count: int) -> None:
    """Try a copy of `model` on two pictures: many have a minimal size, some only one size."""
    trial = copy.deepcopy(model).train()
    pictures = torch.zeros(2, 3, options.image_size, options.image_size)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = logits_of(trial, pictures)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UsageError(
            f"--arch {options.arch} cannot take pictures of --image-size {options.image_size}: {error}"
        ) from error
    if logits.shape != (2, label_count):
        raise UsageError(f"--arch {options.arch} does not return one logit per label")


def weights_sha256(model: nn.Module) -> str:
    """One number for all weights and buffers: equal only if every bit of them is."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# --- The run -------------------------------------------------------------------------------------


class Run:
    """A model in training: everything that changes from step to step, and how to save it."""

    def __init__(self, options: argparse.Namespace, data: Data, device: torch.device) -> None:
        torch.manual_seed(options.seed)
        self.model = build_model(options, len(data.labels)).to(device)
        self.loss = LOSSES[options.loss]
        self.data = data
        self.device = device
        self.options = options
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.learning_rate, weight_decay=WEIGHT_DECAY)
        steps = len(self._batches(epoch=1))
        # With torch's own share of warm-up, 0.3: a 1/n divides by zero in a run of n steps.
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            max_lr=options.learning_rate,
            epochs=options.epochs,
            steps_per_epoch=steps,
        )
        self.history: list[EpochRecord] = []

    def _batches(self, epoch: int) -> list[list[int]]:
        return shuffled_batches(len(self.data.train), self.options.batch_size, self.options.seed, epoch)

    def train_epoch(self, epoch: int) -> float:
        """One pass over the training pictures; returns the mean loss over the known labels."""
        self.model.train()
        self.data.train.set_epoch(epoch)
        loader = DataLoader(
            self.data.train,
            batch_sampler=self._batches(epoch),
            num_workers=self.options.workers,
            pin_memory=self.device.type == "cuda",
        )
        # In float64 and on the device: exact enough to compare runs, and no step waits for it.
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        count = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in tqdm(loader, desc=f"epoch {epoch}", unit="batch", leave=False, mininterval=1):
            loss, known_count = self.train_step(*batch)
            self.scheduler.step()
            total += loss
            count += known_count
        return float(total / count)

    def train_step(self, pictures: Tensor, targets: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the optimiser; returns the loss summed over the known labels, and their number."""
        weight = known.to(self.device, non_blocking=True)
        logits = logits_of(self.model, to_input(pictures, self.device))
        loss = self.loss(logits, targets.to(self.device, non_blocking=True), weight)
        known_count = weight.sum()
        self.optimizer.zero_grad(set_to_none=True)
        # A batch of which nothing is known has loss 0 and must not divide 0 by 0.
        (loss / known_count.clamp(min=1)).backward()
        self.optimizer.step()
        return loss.detach(), known_count

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """The model as it is, on all test pictures."""
        self.model.eval()
        loader = DataLoader(self.data.test, batch_size=self.options.batch_size, num_workers=self.options.workers)
        total = 0.0
        batches = []
        for pictures, targets, known in tqdm(loader, desc="testing", unit="batch", leave=False, mininterval=1):
            logits = logits_of(self.model, to_input(pictures, self.device))
            total += float(self.loss(logits, targets.to(self.device), known.to(self.device)))
            batches.append((logits.cpu(), targets, known))
        logits, targets, known = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return Evaluation(total / float(known.sum()), logits, targets, known)

    def save(self, file: Path, configuration: dict[str, Any]) -> None:
        """Replace `file` by all that the rest of the run depends on."""
        save_checkpoint(
            file,
            {
                "configuration": configuration,
                "environment": self._environment(),
                "history": [asdict(record) for record in self.history],
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                # Used by the dropout that some models contain.
                "random": torch.get_rng_state(),
                "random_cuda": torch.cuda.get_rng_state_all() if self._on_cuda() else [],
            },
        )

    def load(self, file: Path, configuration: dict[str, Any]) -> None:
        """Become what was saved in `file`; raise CheckpointError if that was another run."""
        state = load_checkpoint(file)
        check_configuration(file, state["configuration"], configuration)
        for name, value in self._environment().items():
            if state["environment"][name] != value:
                print(
                    f"note: {file} was written with {name} {state['environment'][name]}, now it is "
                    f"{value}: the result may differ in its last bits",
                    file=sys.stderr,
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.history = [EpochRecord(**record) for record in state["history"]]
        torch.set_rng_state(state["random"])
        if self._on_cuda() and len(state["random_cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["random_cuda"])

    def _on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def _environment(self) -> dict[str, Any]:
        """What may change between two runs of the same configuration at the price of some bits."""
        return {
            "--device": str(self.device),
            "--threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }


def configuration_of(options: argparse.Namespace, data: Data) -> dict[str, Any]:
    """The options that decide the result, by the name under which a user knows them."""
    names = ["arch", "pretrained", "loss", "epochs", "batch_size", "learning_rate", "seed"]
    names += ["image_size", "train_canvases", "test_canvases", "validation_fraction"]
    configuration = {f"--{name.replace('_', '-')}": getattr(options, name) for name in names}
    # By its content: the file may have moved, but it must not have changed.
    configuration["--labels, whose sha256 is"] = data.sha256
    return configuration


TABLE_HEADER = "epoch  learning rate  train loss  test loss     mAP  seconds"


def table_row(record: EpochRecord) -> str:
    """The line under TABLE_HEADER for one epoch."""
    return (
        f"{record.epoch:>5}  {record.learning_rate:>13.2e}  {record.train_loss:>10.4f}"
        f"  {record.test_loss:>9.4f}  {record.mean_average_precision:>6.4f}"
        f"  {record.seconds:>7.1f}"
    )


def train(options: argparse.Namespace) -> None:
    """Everything the options ask for; raises UsageError, before any training, if it cannot be."""
    complete_options(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = open_device(options.device)
    data = load_data(options)
    configuration = configuration_of(options, data)
    run = Run(options, data, device)
    if options.resume is not None:
        try:
            run.load(options.resume, configuration)
        except CheckpointError as error:
            raise UsageError(f"--resume: {error}") from error
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output: {options.output}: {error.strerror}") from error
    if not os.access(options.output, os.W_OK | os.X_OK):
        raise UsageError(f"--output: {options.output}: not writable")

    print(
        f"{options.arch}, {options.loss} loss, {len(data.labels)} labels, "
        f"{len(data.train)} train and {len(data.test)} test pictures"
    )
    print(TABLE_HEADER)
    for record in run.history:
        print(table_row(record))
    evaluation = None
    for epoch in range(len(run.history) + 1, options.epochs + 1):
        start = time.perf_counter()
        train_loss = run.train_epoch(epoch)
        evaluation = run.evaluate()
        if not (math.isfinite(train_loss) and math.isfinite(evaluation.loss)):
            # The last checkpoint stays as it is.
            raise SystemExit(
                f"the loss is no longer finite in epoch {epoch} (train {train_loss}, test "
                f"{evaluation.loss}): try a smaller --learning-rate than {options.learning_rate:g}"
            )
        record = EpochRecord(
            epoch=epoch,
            learning_rate=float(run.scheduler.get_last_lr()[0]),
            train_loss=train_loss,
            test_loss=evaluation.loss,
            mean_average_precision=mean_average_precision(label_metrics(evaluation, data.labels)),
            seconds=time.perf_counter() - start,
        )
        run.history.append(record)
        run.save(options.output / "checkpoint.pt", configuration)
        print(table_row(record), flush=True)

    # A run that was resumed after its last epoch has trained nothing and must look once more.
    evaluation = evaluation or run.evaluate()
    metrics = write_report(
        options.output,
        configuration=configuration,
        weights_sha256=weights_sha256(run.model),
        history=run.history,
        evaluation=evaluation,
        labels=data.labels,
        pictures=data.test,
    )
    print(f"\n{label_table(metrics)}\n")
    print(
        f"mAP {mean_average_precision(metrics):.4f} after "
        f"{sum(record.seconds for record in run.history):.0f} s; see {options.output}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as `arguments` say, the command line's if None; exit with status 2 on unusable ones."""
    parser = make_parser()
    try:
        train(parser.parse_args(arguments))
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
