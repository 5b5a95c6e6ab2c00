"""Train on text with tens of thousands of labels: what does a Debian package depend on, by its description?

    python examples/debian_packages.py runs/debian
    python examples/train_debian_dependencies.py

The model is a weighted mean of the embeddings of a text's words and pairs of words, and a `MultiLabelHead` whose loss
never makes the logits of all labels at once. Any other data in the format of the Extreme Classification Repository, or
of scikit-learn's `load_svmlight_file(multilabel=True)` with the repository's first line, go straight in:

    python examples/train_debian_dependencies.py --train eurlex_train.txt --test eurlex_test.txt

The same options with the same seed give the same result to the bit, on the same machine with the same number of
threads. A run that was killed goes on after its last whole epoch with `--resume`, to the very same result.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Read when torch is loaded. Its profiler would say on the screen that it starts, and that it found no GPU.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import numpy as np
import torch
from classifier import UsageError, environment, number
from debian_packages import Array, DataError, Rows, read_rows
from run_checkpoint import CheckpointError, check_configuration, read_checkpoint, write_atomically
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from fused_sce import LinearSigmoidCrossEntropyLoss, MultiLabelHead

DATA = Path("runs/debian")
RANKS = (1, 3, 5)  # of precision and nDCG
# The recipe of a trial on Debian's descriptions.
EPOCHS = 4
BATCH_SIZE = 256
WIDTH = 128
LEARNING_RATE = 0.01
EMBEDDING_FACTOR = 5  # between the learning rates of embeddings and head: few batches have a word
# Of the logits that are there at once. From 0.5 to 64 MiB none was faster, and it is less than the head's gradients.
CHUNK_BYTES = 4 * 2**20
IN_CHECKPOINT = ("configuration", "environment", "history", "model", "optimizers")


def read_data(options: argparse.Namespace) -> tuple[Rows, Rows]:
    """The rows to train on and those to test on; UsageError if they cannot be used."""
    parts = []
    for option, file in (("--train", options.train), ("--test", options.test)):
        try:
            parts.append(read_rows(file))
        except DataError as error:
            is_ours = file.parent == DATA and not file.exists()
            hint = f"; make it: python examples/debian_packages.py {DATA}" * is_ours
            raise UsageError(f"{option}: {error}{hint}") from error
        if parts[-1].labels.nnz == 0:
            raise UsageError(f"{option}: {file}: no row has a label")
    train, test = parts
    for what in ("features", "labels"):
        ours, theirs = getattr(train, what).shape[1], getattr(test, what).shape[1]
        if ours != theirs:
            raise UsageError(f"--test: {options.test}: has {theirs} {what}, but {options.train} has {ours}")
    if train.labels.shape[1] < RANKS[-1]:
        raise UsageError(f"--train: {options.train}: has {train.labels.shape[1]} labels; needs {RANKS[-1]} at least")
    return train, test


class TextClassifier(nn.Module):
    """Embeddings of features, their mean by the features' values, and a head for the labels.

    `frequencies` (L,) is the share of the training rows that have each label: what the head predicts at first.
    """

    def __init__(self, num_features: int, width: int, frequencies: Tensor) -> None:
        super().__init__()
        # The values of a row add up to 1, so their sum is a mean.
        self.embedding = nn.EmbeddingBag(num_features, width, mode="sum", sparse=True, include_last_offset=True)
        loss = LinearSigmoidCrossEntropyLoss(
            reduction="sum_classes", target_format="index_list", chunk_bytes=CHUNK_BYTES
        )
        self.head = MultiLabelHead(width, len(frequencies), fused_loss=loss)
        with torch.no_grad():
            self.head.bias.copy_(frequencies.logit())

    def forward(self, features: Any) -> Tensor:
        """Features, csr_matrix (B, D), to their embedding (B, width)."""
        indices, starts, values = map(torch.from_numpy, (features.indices, features.indptr, features.data))
        embedded: Tensor = self.embedding(indices, starts, per_sample_weights=values)
        return embedded

    def loss(self, rows: Rows, batch: Array) -> Tensor:
        """The loss of the rows `batch`, summed over the labels, averaged over the rows."""
        loss: Tensor = self.head(self(rows.features[batch]), index_list(rows.labels[batch]))
        return loss

    @torch.no_grad()
    def best(self, rows: Rows, batch: Array, k: int) -> Tensor:
        """The k likeliest labels of the rows `batch`, (B, k), the likeliest first."""
        return self.head.predict(self(rows.features[batch]), k)[1]


def index_list(labels: Any) -> Tensor:
    """The labels of each row of a csr_matrix (B, L), padded with -1: (B, K)."""
    rows = np.split(labels.indices, labels.indptr[1:-1])
    return pad_sequence(list(map(torch.from_numpy, rows)), batch_first=True, padding_value=-1)


def scores(best: Array, labels: Any) -> dict[str, float]:
    """Precision and nDCG of the labels `best` (N, K), the likeliest first, by the true ones, csr_matrix (N, L).

    nDCG@1 is P@1. A row without labels counts as 0.
    """
    rows = np.arange(len(best)).repeat(best.shape[1])
    hits = np.asarray(labels[rows, best.ravel()]).reshape(best.shape)
    discounts = 1 / np.log2(np.arange(best.shape[1]) + 2)
    found = (hits * discounts).cumsum(axis=1)
    possible = discounts.cumsum()
    counts: Array = np.diff(labels.indptr).clip(min=1)
    result = {f"P@{k}": hits[:, :k].mean() for k in RANKS}
    result |= {f"nDCG@{k}": (found[:, k - 1] / possible[counts.clip(max=k) - 1]).mean() for k in RANKS[1:]}
    return {name: float(value) for name, value in result.items()}


def popular_scores(train: Rows, test: Rows) -> dict[str, float]:
    """The scores of the labels that are most frequent in training, whatever the text."""
    counts = np.asarray(train.labels.sum(axis=0)).ravel()
    best = np.argsort(-counts, kind="stable")[: RANKS[-1]]
    return scores(np.tile(best, (len(test), 1)), test.labels)


def peak_of_loss(model: TextClassifier, rows: Rows, batch: Array) -> int:
    """Bytes that the loss of a batch and its gradients, by the head's weights among others, take at their peak."""
    embedded, target = model(rows.features[batch]).detach().requires_grad_(), index_list(rows.labels[batch])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model.head(embedded, target).backward()
    model.zero_grad()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max())


TABLE_HEADER = "  epoch      loss     P@1    P@3    P@5  nDCG@3  nDCG@5  seconds"
TABLE_ROW = "{epoch:>7}  {loss:>8}  {P@1:>6.3f} {P@3:>6.3f} {P@5:>6.3f}  {nDCG@3:>6.3f}  {nDCG@5:>6.3f}  {seconds:>7}"


class Run:
    """A training: its model and optimizers, and a record of each epoch that it has behind it."""

    def __init__(self, options: argparse.Namespace, train: Rows, test: Rows) -> None:
        self.options, self.train, self.test = options, train, test
        self.history: list[dict[str, Any]] = []
        # What decides the result, by the name under which a user knows it. More epochs can follow those of a run.
        names = ("batch_size", "width", "learning_rate", "seed")
        self.configuration: dict[str, Any] = {f"--{name.replace('_', '-')}": getattr(options, name) for name in names}
        self.configuration |= {"--train with sha256": train.sha256, "--test with sha256": test.sha256}
        torch.manual_seed(options.seed)
        counts = torch.from_numpy(np.asarray(train.labels.sum(axis=0)).ravel())
        # As if each label had half a row more: none is impossible, none certain.
        self.model = TextClassifier(train.features.shape[1], options.width, (counts + 0.5) / (len(train) + 1))
        rate = options.learning_rate
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.SparseAdam(self.model.embedding.parameters(), lr=EMBEDDING_FACTOR * rate),
            torch.optim.Adam(self.model.head.parameters(), lr=rate, fused=True),
        )

    def batches(self, rows: Array) -> list[Array]:
        """The rows, batch by batch."""
        return np.split(rows, range(self.options.batch_size, len(rows), self.options.batch_size))

    def epoch(self) -> dict[str, Any]:
        """Train on all rows once, in an order that only seed and epoch decide; the record of it."""
        start, epoch, total = time.perf_counter(), len(self.history) + 1, 0.0
        order = np.random.default_rng([self.options.seed, epoch]).permutation(len(self.train))
        for batch in tqdm(self.batches(order), desc=f"epoch {epoch}", unit="batch", leave=False, disable=None):
            loss = self.model.loss(self.train, batch)
            self.model.zero_grad()
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
            total += loss.item() * len(batch)
        seconds = time.perf_counter() - start
        best = [self.model.best(self.test, batch, RANKS[-1]) for batch in self.batches(np.arange(len(self.test)))]
        record = {"epoch": epoch, "loss": total / len(self.train), "seconds": seconds}
        return record | scores(torch.cat(best).numpy(), self.test.labels)

    def save(self) -> None:
        """Replace the checkpoint by one of this moment."""
        content = io.BytesIO()
        values = (
            self.configuration,
            environment(torch.device("cpu")),
            self.history,
            self.model.state_dict(),
            [optimizer.state_dict() for optimizer in self.optimizers],
        )
        torch.save(dict(zip(IN_CHECKPOINT, values, strict=True)), content)
        write_atomically(self.options.checkpoint, content.getvalue())

    def resume(self) -> None:
        """Go on from the checkpoint; raises CheckpointError if it is of another run."""
        file = self.options.checkpoint
        saved = read_checkpoint(file, IN_CHECKPOINT)
        try:
            check_configuration(file, saved["configuration"], self.configuration)
            self.model.load_state_dict(saved["model"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.history = list(saved["history"])
            now = environment(torch.device("cpu"))
            changed = {name: value for name, value in saved["environment"].items() if value != now.get(name)}
        except CheckpointError:
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: is not a checkpoint of this program: {error}") from error
        for name, value in changed.items():
            print(f"note: {file} was written with {name} {value}: last bits may differ", file=sys.stderr)


def print_row(record: dict[str, Any]) -> None:
    """Print a line of the table."""
    numbers = {"loss": f"{record['loss']:.4f}", "seconds": f"{record['seconds']:.1f}"} if "loss" in record else {}
    print(TABLE_ROW.format(**{"loss": "", "seconds": ""} | record | numbers), flush=True)


def train(options: argparse.Namespace) -> None:
    """Everything the options ask for; raises UsageError or CheckpointError, before any training, if it cannot be."""
    if (options.train is None) != (options.test is None):
        raise UsageError("--train and --test: give both, or none for Debian's descriptions")
    options.train, options.test = options.train or DATA / "train.txt", options.test or DATA / "test.txt"
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    run = Run(options, *read_data(options))
    if options.resume:
        run.resume()
    try:
        options.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        run.save()  # before any training: if it cannot be written, better now
    except OSError as error:
        raise UsageError(f"--checkpoint: {options.checkpoint}: cannot be written: {error.strerror}") from error

    count, labels = run.train.labels.shape
    print(f"{count} rows to train on, {len(run.test)} to test on; {run.train.features.shape[1]} features")
    print(f"{labels} labels, {run.train.labels.nnz / count:.1f} a row")
    first = run.batches(np.arange(count))[0]
    of_loss, dense = peak_of_loss(run.model, run.train, first), 2 * len(first) * labels * run.model.head.weight.itemsize
    print(f"the loss of {len(first)} rows and its gradients take {of_loss / 1e6:.1f} MB at their peak,")
    print(f"dense logits and their gradient alone would take {dense / 1e6:.1f} MB")
    print(TABLE_HEADER)
    print_row({"epoch": "popular"} | popular_scores(run.train, run.test))
    for record in run.history:
        print_row(record)
    while len(run.history) < options.epochs:
        run.history.append(run.epoch())
        run.save()
        print_row(run.history[-1])
    print("popular: the labels that are most frequent in training, whatever the text")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0], allow_abbrev=False)
    add = parser.add_argument
    add("--train", type=Path, metavar="FILE", help=f"rows to train on ({DATA / 'train.txt'})")
    add("--test", type=Path, metavar="FILE", help=f"rows to test on after every epoch ({DATA / 'test.txt'})")
    add("--epochs", type=number(int, 1), default=EPOCHS, help=f"({EPOCHS})")
    add("--batch-size", type=number(int, 1, 2**16), default=BATCH_SIZE, help=f"({BATCH_SIZE})")
    add("--width", type=number(int, 1), default=WIDTH, help=f"of the embeddings ({WIDTH})")
    rate = f"the head's; that of the embeddings is {EMBEDDING_FACTOR} times as high ({LEARNING_RATE:g})"
    add("--learning-rate", type=number(float, 1e-12, 10), default=LEARNING_RATE, help=rate)
    add("--seed", type=number(int, 0, 2**32), default=0, help="of everything (0)")
    add("--threads", type=number(int, 1), help="(as many as torch likes)")
    file = Path("runs/debian_dependencies.pt")
    add("--checkpoint", type=Path, metavar="FILE", default=file, help=f"written after every epoch ({file})")
    add("--resume", action="store_true", help="go on from the checkpoint, perhaps for more epochs")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as `arguments` say, the command line's if None; exit with status 2 on unusable ones."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        train(options)
    except UsageError as error:
        parser.error(str(error))
    except CheckpointError as error:
        parser.error(f"--resume: {error}")


if __name__ == "__main__":
    main()
