"""Debian's package descriptions, and the packages that each one depends on or recommends: text with 22,000 labels.

    sudo apt-get update -o Acquire::Languages=en
    python examples/debian_packages.py FOLDER

reads the lists of packages that apt has on a machine with Debian or Ubuntu, and writes FOLDER/train.txt and
FOLDER/test.txt in the format of the Extreme Classification Repository: a first line `rows features labels`, then

    label,label,… feature:value feature:value …

one package a line, numbers from 0. FOLDER/labels.txt has the name of each label, one a line. A feature is a word of the
description, a pair of neighbouring words, or the package's section, hashed; its value is how often it occurs. The
packages of one source, whose descriptions are alike, are all in one of the two files.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from sklearn.datasets import dump_svmlight_file
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.model_selection import GroupShuffleSplit
from sklearn.preprocessing import MultiLabelBinarizer, normalize

FILES = ("train.txt", "test.txt", "labels.txt")
APT_HELPER = "/usr/lib/apt/apt-helper"  # reads a list, however it is compressed
ENGLISH = ("-o", "Acquire::Languages=en")
# A label that occurs once is in one of the two files only: it cannot be learned, or not be tested.
MIN_PACKAGES = 2
TEST_FRACTION = 0.1
# There are a million words and pairs, of which most occur once.
FEATURES = 2**17

Array = npt.NDArray[Any]
NUMBER = rb"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
ROW = re.compile(rb"\s*(?P<labels>\d+(?:,\d+)*(?!\S))?(?P<features>(?:\s*\d+:" + NUMBER + rb"(?!\S))*)\s*")


class DataError(Exception):
    """The data cannot be made, or not be read; the message says why, and what would help."""


@dataclass(frozen=True)
class Package:
    """What is used of a package; `source` is the source package that it is built from."""

    text: str
    source: str
    needs: frozenset[str]


def read_lists() -> tuple[list[str], list[str]]:
    """The text of apt's lists of packages, and of those of their English descriptions; raises DataError."""

    def run(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, check=True, encoding="utf-8", errors="replace").stdout
        except FileNotFoundError as error:
            raise DataError(f"{command[0]} is not there: a machine with Debian or Ubuntu is needed") from error
        except subprocess.CalledProcessError as error:
            raise DataError(f"{' '.join(command)} failed: {error.stderr.strip()}") from error

    targets = run("apt-get", "indextargets", *ENGLISH, "--format", "$(CREATED_BY) $(FILENAME)").splitlines()
    found: dict[str, list[str]] = {"Packages": [], "Translations": []}
    for kind, _, file in (target.partition(" ") for target in targets):
        if kind in found:
            found[kind].append(run(APT_HELPER, "cat-file", file))
    for kind, what in (("Packages", "packages"), ("Translations", "English descriptions")):
        if not found[kind]:
            raise DataError(f"apt has no list of {what} here; fetch it: sudo apt-get update {' '.join(ENGLISH)}")
    return found["Packages"], found["Translations"]


def paragraphs(text: str) -> Iterator[dict[str, str]]:
    """The fields of each paragraph of a list; a line that begins with a space continues a field."""
    for paragraph in text.split("\n\n"):
        yield dict(re.findall(r"^([^\s:]+):[ \t]*(.*(?:\n[ \t].*)*)", paragraph, re.MULTILINE))


def needed(relations: str) -> list[str]:
    """The packages that a field such as Depends names; of alternatives the first, which is the one that apt prefers."""
    return re.findall(r"(?:^|,)\s*([a-z0-9][a-z0-9+.-]*)", relations)


def read_packages(lists: Iterable[str], descriptions: Iterable[str]) -> list[Package]:
    """The packages in `lists`; of several with the same name, the last one."""
    english = {
        fields.get("Description-md5"): fields["Description-en"]
        for text in descriptions
        for fields in paragraphs(text)
        if "Description-en" in fields
    }
    packages = {}
    for fields in (fields for text in lists for fields in paragraphs(text) if "Package" in fields):
        name, short = fields["Package"], fields.get("Description", "")
        packages[name] = Package(
            text=f"{english.get(fields.get('Description-md5'), short)} {fields.get('Section', '')}",
            source=fields.get("Source", name).split(" ")[0],  # a version may follow
            needs=frozenset(needed(fields.get("Depends", "")) + needed(fields.get("Recommends", ""))),
        )
    return list(packages.values())


def write_data(packages: Sequence[Package], folder: Path) -> None:
    """Make the files in `folder`, of the packages that need one of the labels; raises DataError if there are none."""
    counts = Counter(name for package in packages for name in package.needs)
    labels = sorted(name for name, count in counts.items() if count >= MIN_PACKAGES)
    known = set(labels)
    used = [package for package in packages if package.needs & known]
    sources = [package.source for package in used]
    if len(set(sources)) < 2:
        raise DataError(f"apt's lists have {len(packages)} packages: too few for a part to train on and one to test")
    words = HashingVectorizer(
        token_pattern=r"[a-z0-9+#.]+", ngram_range=(1, 2), n_features=FEATURES, alternate_sign=False, norm=None
    )
    features = words.transform(package.text for package in used)
    targets = MultiLabelBinarizer(classes=labels, sparse_output=True).fit_transform(
        [package.needs & known for package in used]
    )
    split = GroupShuffleSplit(1, test_size=TEST_FRACTION, random_state=0).split(used, groups=sources)
    for file, rows in zip(FILES, next(split), strict=False):
        write_rows(folder / file, features[rows], targets[rows])
    (folder / FILES[2]).write_text("".join(f"{label}\n" for label in labels))
    print(f"{len(used)} of {len(packages)} packages, {len(labels)} labels, {targets.nnz / len(used):.1f} a package")


def write_rows(file: Path, features: Any, targets: Any) -> None:
    """Write features (N, D) and targets (N, L), which are 0 or 1, in the format of extreme classification."""
    with file.open("wb") as stream:
        stream.write(b"%d %d %d\n" % (*features.shape, targets.shape[1]))
        dump_svmlight_file(features, targets, stream, multilabel=True)


@dataclass(frozen=True)
class Rows:
    """A data file of N rows: features (N, D), the absolute values of a row adding up to 1; labels (N, L), 0 or 1."""

    features: Any  # scipy's csr_matrix, float32
    labels: Any
    sha256: str  # of the file's bytes

    def __len__(self) -> int:
        return int(self.labels.shape[0])


def read_rows(file: Path) -> Rows:
    """Read a file of this format; raises DataError, which names the line, if something is wrong with it."""

    def error(problem: str, line: int | None = None) -> DataError:
        return DataError(f"{file}: {f'line {line}: ' * (line is not None)}{problem}")

    try:
        content = file.read_bytes()
    except OSError as cause:
        raise error(f"cannot be read: {cause.strerror}") from cause
    lines = content.splitlines()
    header = re.fullmatch(rb"\s*(\d+)\s+(\d+)\s+(\d+)\s*", lines.pop(0)) if lines else None
    if header is None:
        raise error("must be the numbers of rows, features and labels", 1)
    count, num_features, num_labels = map(int, header.groups())
    if len(lines) != count or count == 0:
        raise error(f"{len(lines)} rows follow the first line, which says {count}; there must be one at least")
    features, labels = [], []
    for index, line in enumerate(lines):
        row = ROW.fullmatch(line)
        if row is None:
            raise error("must be label,label,… feature:value feature:value …", index + 2)
        features.append(row["features"])
        labels.append(row["labels"] or b"")

    def matrix(what: str, columns: Array, values: Array, counts: list[int], width: int) -> Any:
        """The values as csr_matrix (count, width), if the columns are in range."""
        starts = np.cumsum([0, *counts])
        wrong = np.flatnonzero((columns >= width) | ~np.isfinite(values))[:1]
        if wrong.size:
            line = int(np.searchsorted(starts, wrong[0], side="right")) + 1
            column, value = columns[wrong[0]], values[wrong[0]]
            if column >= width:
                raise error(f"{what} {column:.0f} is not below {width}, their number by the first line", line)
            raise error(f"the value of {what} {column:.0f} must be finite, got {value}", line)
        result = csr_matrix((values, columns.astype(np.int32), starts), (count, width))
        result.sum_duplicates()
        return result

    # Not load_svmlight_file: it names no line, takes 1.5 for a label, and refuses features that are not sorted.
    pairs = np.fromstring(b" ".join(features).replace(b":", b" "), sep=" ").reshape(-1, 2)
    inputs = matrix("feature", pairs[:, 0], pairs[:, 1], [row.count(b":") for row in features], num_features)
    listed = np.fromstring(b",".join(filter(None, labels)), sep=",")
    targets = matrix("label", listed, np.ones(len(listed)), [row.count(b",") + bool(row) for row in labels], num_labels)
    targets.data[:] = 1  # a label that is listed twice
    return Rows(normalize(inputs, norm="l1").astype(np.float32), targets, hashlib.sha256(content).hexdigest())


def make(folder: Path) -> None:
    """Make `folder` unless it is complete. Raises DataError if it cannot be made; then it is as it was."""
    folder = folder.resolve()
    try:
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            if not all((folder / file).is_file() for file in FILES):
                raise DataError(f"{folder} holds something else, or not all: remove it, or name another")
            print(f"{folder} is complete already")
            return
        packages = read_packages(*read_lists())
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside the folder, so that it can become the folder in one step.
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            write_data(packages, new)
            new.replace(folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be made: {error.strerror}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the folder that `arguments` name, the command line's if None; exit with status 2 if that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="gets train.txt, test.txt and labels.txt")
    try:
        make(parser.parse_args(arguments).folder)
    except DataError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
