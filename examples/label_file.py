"""The user's own pictures: a folder, and a CSV file that says which labels each picture has.

The file's first row names the columns. The first column is the picture's name, and every other column is a label:
1 (has it), 0 (has it not) or empty (nobody knows):

    picture,cat,dog,outdoors
    a.png,1,0,1
    holiday/b.jpg,0,,1

Or one column lists the labels that a picture has, called tags:

    picture,tags
    a.png,cat|outdoors

OPTIONS says what else can be read. Everything that can be wrong with the file or with a picture is found here, before
any training, and is reported with the line it stands on.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import io
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from pictures import check_pictures
from torch import Tensor

UNKNOWN = -1  # the target of a label that nobody knows: the loss ignores it
WRONG = -2  # in place of a target: a value that means nothing
# What a value in the file means, as `_plain` writes it. -1 has no place here: to some it is 0, to some "uncertain".
VALUES: dict[float | str, int] = {1: 1, "true": 1, 0: 0, "false": 0, "": UNKNOWN, "nan": UNKNOWN, "na": UNKNOWN}
UNCERTAIN = {"ignore": UNKNOWN, "positive": 1, "negative": 0}
OPTIONS = {  # of the command line: what stands for the value, and what it means
    "label_column": ("NAME", "the one column that holds a list of labels, called tags"),
    "separator": ("TEXT", "what stands between tags (the first of | ; , that occurs, else spaces)"),
    "labels_from": ("NAMES", "the columns that are labels: A: (from A on), A:B (A to B) or A,B,C (all but the first)"),
    "group_column": ("NAME", "the column that says what a picture belongs to, such as its patient; it is no label"),
    "uncertain": (None, "what -1 means: unknown, 1 or 0"),
    "negative": ("VALUE", "a further value that means 0; in a column of tags, one that means that there are none"),
    "ignore": ("VALUE", "a further value that means unknown"),
}
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", ".pgm", ".ppm")
MAX_SHOWN = 10  # problems, or names: enough to see what is wrong throughout, without flooding the terminal

Problems = list[tuple[int, str]]  # a line, and what is wrong there
Targets = npt.NDArray[np.int8]


class LabelFileError(ValueError):
    """A label file, or a picture that it names, cannot be used; the message says where and why."""


@dataclass(frozen=True)
class Reading:
    """How a label file is to be read, in the words of OPTIONS; None means as usual, or as the file shows.

    Raises:
        LabelFileError: if two of them contradict each other.
    """

    label_column: str | None = None
    separator: str | None = None
    labels_from: str | None = None
    group_column: str | None = None
    uncertain: str | None = None
    negative: str | None = None
    ignore: str | None = None

    def __post_init__(self) -> None:
        if self.separator == "":
            raise LabelFileError("--separator: must not be empty")
        for option, value in (("--label-column", self.label_column), ("--separator", self.separator)):
            if value is not None and self.labels_from is not None:
                raise LabelFileError(f"{option} is for one column of tags, --labels-from for columns of values")
        self.meanings()

    def meanings(self) -> dict[float | str, int]:
        """What each value means, as `_plain` writes it."""
        if self.uncertain not in (None, *UNCERTAIN):
            raise LabelFileError(f"--uncertain must be one of {', '.join(UNCERTAIN)}, got {self.uncertain!r}")
        stated: dict[float | str, int] = {} if self.uncertain is None else {-1: UNCERTAIN[self.uncertain]}
        for option, value, meaning in (("--negative", self.negative, 0), ("--ignore", self.ignore, UNKNOWN)):
            if value is not None and stated.setdefault(_plain(value), meaning) != meaning:
                raise LabelFileError(f"{option} {value}: another option gives {value} another meaning")
        return {**VALUES, **stated}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `reading_of` reads."""
    group = parser.add_argument_group("how the label file is read")
    for name, (metavar, meaning) in OPTIONS.items():
        choices = UNCERTAIN if name == "uncertain" else None
        group.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, choices=choices, help=meaning)


def reading_of(options: argparse.Namespace) -> Reading:
    """Collect what `add_options` added; raise LabelFileError where options contradict each other."""
    return Reading(**{name: getattr(options, name) for name in OPTIONS})


@dataclass(frozen=True)
class LabelFile:
    """A label file of N pictures, each of which is there once, and L labels.

    `targets` (N, L) int8 holds 1, 0 or UNKNOWN. `lines` are those on which the pictures stand first. `groups` are the
    values of --group-column, if it was given. `sha256` is that of the file's bytes. `how` says how the file was read,
    with label_column and separator as they were found, and `description` says it in words.
    """

    labels: tuple[str, ...]
    pictures: tuple[Path, ...]
    targets: Tensor
    lines: tuple[int, ...]
    groups: tuple[str, ...] | None
    sha256: str
    how: Reading
    description: str


def read_and_check(
    file: Path,
    images: Path,
    how: Reading = Reading(),
    *,
    workers: int,
    remembered: Path | None,
    labels: Sequence[str] | None = None,
) -> tuple[LabelFile, int]:
    """Do what `read_label_file` and `pictures.check_pictures` do; return the file, and the value that is white.

    Raises:
        LabelFileError: if anything is wrong with the file or with a picture.
    """
    content = read_label_file(file, images, how, labels=labels)
    white, problems = check_pictures(content.pictures, workers=workers, remembered=remembered)
    _raise_if_any(file, [(content.lines[i], f"picture {content.pictures[i]}: {problem}") for i, problem in problems])
    return content, white


def read_label_file(
    file: Path, images: Path, how: Reading = Reading(), *, labels: Sequence[str] | None = None
) -> LabelFile:
    """Read a label file.

    Where a picture has several rows, their tags are put together, and a known value wins over an unknown one.

    Args:
        file: UTF-8; its columns are separated by commas, or by semicolons or tabs if the header has no comma.
        images: the folder of the pictures. The file may leave out a picture's extension, and the subfolder, if one
            picture alone can be meant.
        how: how the file is to be read.
        labels: the labels that the file must have, and no others, in the order in which they are returned; a file of
            tags may lack some. If it is None, every label must be known of some picture.

    Raises:
        LabelFileError: if anything is wrong with the file, or if a picture is missing.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise LabelFileError(f"{file}: cannot be read: {error.strerror}") from error
    folder = _Folder(images)
    table = _read_table(file, content, folder, how)
    found = [folder.find(name) for name in table.cells[0]]
    table.problems += [(line, why) for line, (_, why) in zip(table.cells.index, found, strict=True) if why]
    group = None if how.group_column is None else table.column("--group-column", how.group_column)
    columns = _label_columns(table, group)
    if _holds_tags(table, columns):
        names, targets, how = _read_tags(table, columns[0], labels)
        separator = "spaces" if how.separator == " " else repr(how.separator)
        description = f"tags of column {_shown(table.header[columns[0]])}, separated by {separator}"
    else:
        names, targets = _read_values(table, columns, labels)
        description = f"columns {_listed(names)}"
    _raise_if_any(file, table.problems)

    # From rows to pictures.
    picture_of, pictures = pd.factorize(np.array([path for path, _ in found], dtype=object))
    first = np.unique(picture_of, return_index=True)[1]
    if len(pictures) < len(found):
        rows, targets = targets, pd.DataFrame(targets).groupby(picture_of).max().to_numpy()  # UNKNOWN < 0 < 1
        if how.label_column is None:
            _report_contradictions(table, names, rows, targets, picture_of)
    groups = None if group is None else _groups(table, group, first, picture_of)
    _raise_if_any(file, table.problems)
    unknown = [name for name, known in zip(names, (targets != UNKNOWN).any(axis=0), strict=True) if not known]
    if unknown and labels is None:
        raise LabelFileError(f"{file}: no row has a value for {_listed(unknown)}")
    return LabelFile(
        labels=tuple(names),
        pictures=tuple(map(Path, pictures)),
        targets=torch.tensor(targets),
        lines=tuple(table.cells.index[first].tolist()),
        groups=groups,
        sha256=hashlib.sha256(content).hexdigest(),
        how=how,
        description=f"{len(pictures)} pictures, {len(names)} labels: {description}",
    )


# --- The table -----------------------------------------------------------------------------------


@dataclass
class _Table:
    """A label file as text. The index of `cells` is the line of each row; `problems` grows as they are found."""

    file: Path
    header: list[str]
    cells: pd.DataFrame
    how: Reading
    problems: Problems

    def column(self, option: str, name: str) -> int:
        """Where the column `name` stands; it is not the first, which names the pictures."""
        others = self.header[1:]
        if others.count(name) != 1:
            wrong = f"{others.count(name) or 'no'} columns have this name, of {_listed(others)}"
            raise LabelFileError(f"{self.file}: {option} {_shown(name)}: {wrong}")
        return self.header.index(name, 1)


def _read_table(file: Path, content: bytes, folder: _Folder, how: Reading) -> _Table:
    """Take the file apart, without pandas' own reader: that does not tell on which line a row stands."""
    try:
        text = content.decode("utf-8-sig")  # without the byte order mark that spreadsheets put in front
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise LabelFileError(f"{file}: line {line}: not UTF-8 text; save the file as CSV in UTF-8") from error
    widths = {mark: len(next(_rows(file, text, mark, strict=False), (0, []))[1]) for mark in ",;\t"}
    rows = _rows(file, text, next((mark for mark in widths if widths[mark] > 1), ","), strict=True)
    line, header = next(rows, (0, []))
    if not header:
        raise LabelFileError(f"{file}: is empty; it needs a header and one row per picture")
    if folder.looks_like_a_picture(header[0]):
        wrong = f"{_shown(header[0])} is a picture, but the first row must name the columns"
        raise LabelFileError(f"{file}: line {line}: {wrong}")
    if len(header) < 2:
        wrong = "the header must name a column of pictures and at least one of labels, separated by , ; or tabs"
        raise LabelFileError(f"{file}: line {line}: {wrong}, got {_shown(header[0])}")
    whole, problems = {}, []
    for line, row in rows:
        if len(row) == len(header):
            whole[line] = row
        else:
            hint = "; a value with a separator in it must stand in quotes" if len(row) > len(header) else ""
            problems.append((line, f"{len(row)} values, but the header has {len(header)}{hint}"))
    if not whole:
        _raise_if_any(file, problems)
        raise LabelFileError(f"{file}: has a header but no rows")
    return _Table(file, header, pd.DataFrame.from_dict(whole, orient="index", dtype=object), how, problems)


def _rows(file: Path, text: str, delimiter: str, strict: bool) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the number of its first line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=strict)
    line = 1
    try:
        for row in reader:
            if row:
                yield line, [value.strip() for value in row]
            line = reader.line_num + 1
    except csv.Error as error:
        raise LabelFileError(f"{file}: line {line}: {error}") from error


class _Folder:
    """The pictures below a folder. It is listed once, however many rows ask for one."""

    def __init__(self, images: Path) -> None:
        self._images = str(images)
        self._found: defaultdict[str, list[str]] = defaultdict(list)  # paths below the folder, by spelling of the name
        for directory, _, names in os.walk(images):
            below = os.path.relpath(directory, images)
            for name in names:
                for spelling in _spellings(name):
                    self._found[spelling].append(os.path.normpath(os.path.join(below, name)))

    def find(self, name: str) -> tuple[str, str]:
        """The path of the one picture called `name`, and ""; or "", and why there is none."""
        if not name:
            return "", "no picture is named"
        wanted = os.path.normpath(name.replace("\\", "/"))
        below, base = os.path.split(wanted)
        near = self._found.get(_spellings(base)[0], [])
        found = (
            [path for path in near if path == wanted]
            or [path for path in near if os.path.dirname(path) == below]
            or [path for path in near if not below or f"/{os.path.dirname(path)}".endswith(f"/{below}")]
        )
        if len(found) > 1:
            return "", f"{_shown(name)} is the name of {len(found)} pictures: {_listed(sorted(found))}"
        # What is not found so may be an absolute path, or one that leads through ".." or a link.
        path = os.path.normpath(os.path.join(self._images, *(found or [name])))
        return (path, "") if found or os.path.isfile(path) else ("", f"no picture {_shown(name)} in {self._images}")

    def looks_like_a_picture(self, name: str) -> bool:
        """Whether some picture has this name, or it ends as pictures' names do."""
        return name.lower().endswith(SUFFIXES) or name in self._found


def _spellings(path: str) -> list[str]:
    """How `path` may be written: with its extension in lower case, and without if it is a picture's."""
    stem, suffix = os.path.splitext(path)
    return [stem + suffix.lower(), stem] if suffix.lower() in SUFFIXES else [path]


# --- Labels --------------------------------------------------------------------------------------


def _label_columns(table: _Table, group: int | None) -> list[int]:
    """Where the labels stand: in one column of tags, or in columns of values."""
    header, how = table.header, table.how
    if how.label_column is not None:
        return [table.column("--label-column", how.label_column)]
    named = list(range(1, len(header))) if how.labels_from is None else _columns_from(table, how.labels_from)
    columns = [column for column in named if column != group]
    if not columns:
        raise LabelFileError(f"{table.file}: there is no column of labels beside that of --group-column")
    counts = Counter(header[column] for column in columns)
    wrong = [f"column {column + 1} has no name" for column in columns if not header[column]]
    wrong += [f"{count} columns are called {_shown(name)}" for name, count in counts.items() if name and count > 1]
    _raise_if_any(table.file, [(1, f"{problem}; see --labels-from and --label-column") for problem in wrong])
    return columns


def _columns_from(table: _Table, text: str) -> list[int]:
    """What --labels-from names."""
    option, others = "--labels-from", table.header[1:]
    rows = list(csv.reader(io.StringIO(text, newline="")))  # so that a name with a comma in it can be quoted
    names = [name.strip() for name in rows[0]] if len(rows) == 1 else []
    if names and set(names) <= set(others):
        return [table.column(option, name) for name in names]
    parts = text.split(":")
    for count in range(1, len(parts)):  # names may hold a colon, too
        first, last = ":".join(parts[:count]).strip(), ":".join(parts[count:]).strip()
        if first in others and last in (*others, ""):
            start, end = table.column(option, first), table.column(option, last) if last else len(others)
            if start <= end:
                return list(range(start, end + 1))
    raise LabelFileError(
        f"{table.file}: {option} must be 'A:', 'A:B' or 'A,B,C' with names of columns from left to right, "
        f"got {_shown(text)}; there are {_listed(others)}"
    )


def _plain(value: str) -> float | str:
    """One spelling for 1 and 1.0, and for True and TRUE."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    return value.strip().lower() if math.isnan(number) else number


def _holds_tags(table: _Table, columns: Sequence[int]) -> bool:
    """Whether the labels are tags: by the options, or because nothing in the only column is a number or a truth."""
    how = table.how
    if how.label_column is not None:
        return True
    if how.separator is not None:
        if len(columns) > 1:
            raise LabelFileError(f"{table.file}: --separator: which column holds the tags? Name it with --label-column")
        return True
    if how.labels_from is not None or len(columns) > 1:
        return False
    values = {_plain(value) for value in table.cells[columns[0]].unique() if value}
    return bool(values) and not any(isinstance(value, float) or value in VALUES for value in values)


def _read_tags(table: _Table, column: int, labels: Sequence[str] | None) -> tuple[list[str], Targets, Reading]:
    """The labels, the targets of each row, and how they were read."""
    how, lines, name = table.how, table.cells.index, table.header[column]
    if how.uncertain is not None:
        raise LabelFileError(f"{table.file}: --uncertain: {_shown(name)} holds tags, where -1 means nothing")
    cells = table.cells[column].reset_index(drop=True)
    separator = how.separator or next((mark for mark in "|;," if cells.str.contains(mark, regex=False).any()), " ")
    unknown = (cells == how.ignore).to_numpy()
    tags = cells[~unknown & (cells != how.negative)].str.split(separator, regex=False).explode().str.strip()
    tags = tags[tags != ""]
    names = sorted(tags.unique()) if labels is None else list(labels)
    if not names:
        raise LabelFileError(f"{table.file}: no row has a tag in column {_shown(name)}")
    codes = pd.Index(names, dtype=object).get_indexer(tags)
    for row, tag in tags[codes < 0].items():
        table.problems.append((lines[row], f"{_shown(tag)} is none of the labels {_listed(names)}"))
    targets = np.zeros((len(cells), len(names)), dtype=np.int8)
    targets[tags.index[codes >= 0], codes[codes >= 0]] = 1
    targets[unknown] = UNKNOWN
    return names, targets, dataclasses.replace(how, label_column=name, separator=separator)


def _read_values(table: _Table, columns: Sequence[int], labels: Sequence[str] | None) -> tuple[list[str], Targets]:
    """The labels, and the targets of each row."""
    place = {table.header[column]: column for column in columns}
    names = list(place if labels is None else labels)
    lacking, further = [name for name in names if name not in place], [name for name in place if name not in names]
    if lacking or further:
        wrong = f"lacks the labels {_listed(lacking)}" if lacking else f"has further labels {_listed(further)}"
        raise LabelFileError(f"{table.file}: {wrong}; expected are {_listed(names)}")
    cells = table.cells[[place[name] for name in names]].to_numpy()
    codes, values = pd.factorize(cells.ravel())
    meanings = table.how.meanings()
    targets = np.array([meanings.get(_plain(value), WRONG) for value in values], dtype=np.int8)[codes]
    targets = targets.reshape(cells.shape)
    for row, label in np.argwhere(targets == WRONG):
        value = cells[row, label]
        problem = f"must be 0, 1 or empty, got {_shown(value)} (or see --labels-from and --label-column)"
        if _plain(value) == -1:
            problem = "is -1: say what it means, with --uncertain ignore, positive or negative, or with --negative -1"
        table.problems.append((table.cells.index[row], f"{_shown(names[label])} {problem}"))
    return names, targets


# --- Rows of the same picture --------------------------------------------------------------------


def _report_contradictions(
    table: _Table, names: Sequence[str], rows: Targets, targets: Targets, picture_of: npt.NDArray[np.intp]
) -> None:
    """Report every 0 in `rows` where another row of the same picture has a 1."""
    lines = table.cells.index
    ones = pd.DataFrame(rows == 1, index=lines).groupby(picture_of).idxmax().to_numpy()  # the lines of the first 1
    for row, label in np.argwhere((rows == 0) & (targets[picture_of] == 1)):
        wrong = f"{_shown(names[label])} is 0, but 1 on line {ones[picture_of[row], label]} for the same picture"
        table.problems.append((lines[row], wrong))


def _groups(
    table: _Table, group: int, first: npt.NDArray[np.intp], picture_of: npt.NDArray[np.intp]
) -> tuple[str, ...]:
    """The group of each picture; every row must name one, the same in all rows of a picture."""
    name, lines, groups = _shown(table.header[group]), table.cells.index, table.cells[group].to_numpy()
    table.problems += [(line, f"{name} is empty") for line in lines[groups == ""]]
    for row in np.flatnonzero(groups != groups[first][picture_of]):
        other = first[picture_of[row]]
        wrong = f"is {_shown(groups[row])}, but {_shown(groups[other])} on line {lines[other]} for the same picture"
        table.problems.append((lines[row], f"{name} {wrong}"))
    return tuple(groups[first])


# --- Messages ------------------------------------------------------------------------------------


def _shown(text: str) -> str:
    """In quotes, and not longer than a line."""
    return repr(text if len(text) <= 80 else text[:80] + "…")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(map(_shown, names[:MAX_SHOWN])) + more


def _raise_if_any(file: Path, problems: Problems) -> None:
    if problems:
        shown = [f"{file}: line {line}: {problem}" for line, problem in sorted(problems)[:MAX_SHOWN]]
        more = len(problems) - len(shown)
        raise LabelFileError("\n".join(shown + [f"{file}: and {more} more problems"] * (more > 0)))
