"""The user's own pictures: a folder, and a CSV file that says which labels each picture has.

The first row names the columns. The first column is the picture's name, every other one a label: 1 (has it), 0 (has it
not) or empty (nobody knows). Or one column lists the labels that a picture has, called tags:

    picture,cat,dog,outdoors            picture,tags
    a.png,1,0,1                         a.png,cat|outdoors
    holiday/b.jpg,0,,1                  holiday/b.jpg,outdoors

`Reading` says what else can be read. All that is wrong with file or pictures is reported, by line, before any training.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pictures import MAX_SHOWN, SUFFIXES
from torch import Tensor

UNKNOWN = -1  # the target of a label that nobody knows: the loss ignores it
WRONG = -2  # in place of a target: a value that means nothing
# What a value in the file means, as `_plain` writes it. -1 has no place here: to some it is 0, to some "uncertain".
VALUES: dict[float | str, int] = {1: 1, "true": 1, 0: 0, "false": 0, "": UNKNOWN, "nan": UNKNOWN, "na": UNKNOWN}
UNCERTAIN = {"ignore": UNKNOWN, "positive": 1, "negative": 0}
Labels = Sequence[str] | None


class LabelFileError(ValueError):
    """A label file, or a picture that it names, cannot be used; the message says where and why."""


def _option(metavar: str | None, help: str, **more: Any) -> Any:
    return field(default=None, metadata={"metavar": metavar, "help": help, **more})


@dataclass(frozen=True)
class Reading:
    """How to read a label file: options of the command line, None if not given. Contradictions raise LabelFileError."""

    label_column: str | None = _option("NAME", "the one column that holds a list of labels, called tags")
    separator: str | None = _option("TEXT", "what stands between tags (the first of | ; , that occurs, else spaces)")
    labels_from: str | None = _option("NAMES", "the columns of labels: A: (from A on), A:B or A,B,C (all columns)")
    group_column: str | None = _option("NAME", "the column that says what a picture belongs to, such as its patient")
    uncertain: str | None = _option(None, "what -1 means: unknown, 1 or 0", choices=UNCERTAIN)
    negative: str | None = _option("VALUE", "a further value that means 0; among tags, one that means none")
    ignore: str | None = _option("VALUE", "a further value that means unknown")

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
    for option in fields(Reading):
        group.add_argument(f"--{option.name.replace('_', '-')}", **option.metadata)


def reading_of(options: argparse.Namespace) -> Reading:
    """Collect what `add_options` added."""
    return Reading(**{option.name: getattr(options, option.name) for option in fields(Reading)})


@dataclass(frozen=True)
class LabelFile:
    """A label file of N pictures, each of which is there once, and L labels."""

    labels: tuple[str, ...]
    pictures: tuple[Path, ...]
    targets: Tensor  # (N, L) int8: 1, 0 or UNKNOWN
    lines: tuple[int, ...]  # on which the pictures stand first
    groups: tuple[str, ...] | None  # of the pictures, if --group-column was given
    sha256: str  # of the file's bytes
    how: Reading  # how the file was read: with label_column and separator as they were found
    description: str  # says the same in words


def read_label_file(file: Path, images: Path, how: Reading = Reading(), *, labels: Labels = None) -> LabelFile:
    """Read a label file; where a picture has several rows, unite their tags, and prefer known values to unknown ones.

    Args:
        file: UTF-8; its columns are separated by commas, or by semicolons or tabs if the header has no comma.
        images: the folder of the pictures; `file` may leave out extension and subfolder if one picture can be meant.
        how: how to read it.
        labels: the labels that the file must have, and no others, in the order in which they are returned; a file of
            tags may lack some, and the group column may be lacking. If it is None, every label must be known of some
            picture.

    Raises:
        LabelFileError: if anything is wrong with the file, or if a picture is missing.
    """
    folder = _Folder(images)
    table = _Table(file, how, folder)
    found = [folder.find(name) for name in table.cells[0]]
    table.problems += [(line, why) for line, (_, why) in zip(table.cells.index, found, strict=True) if why]
    # Only a file that gives the labels is split. In another one the column has no meaning, but is no label either.
    has_groups = how.group_column is not None and (labels is None or how.group_column in table.header[1:])
    group = table.column("--group-column", str(how.group_column)) if has_groups else None
    columns, are_tags = table.label_columns(group)
    read = table.read_tags if are_tags else table.read_values
    names, targets, description = read(columns, labels)
    _raise_if_any(file, table.problems)

    picture_of, pictures = pd.factorize(np.array([path for path, _ in found], dtype=object))
    first = np.unique(picture_of, return_index=True)[1]
    if len(pictures) < len(found):
        if not are_tags:
            table.report_contradictions(names, targets, picture_of)
        targets = pd.DataFrame(targets).groupby(picture_of).max().to_numpy()  # UNKNOWN < 0 < 1
    groups = None
    if group is not None and labels is None:
        groups = tuple(table.read_groups(group, first[picture_of])[first])
    _raise_if_any(file, table.problems)
    unknown = [name for name, known in zip(names, (targets != UNKNOWN).any(axis=0), strict=True) if not known]
    if unknown and labels is None:
        raise table.error(f"no row has a value for {_listed(unknown)}")
    return LabelFile(
        labels=tuple(names),
        pictures=tuple(map(Path, pictures)),
        targets=torch.tensor(targets),
        lines=tuple(table.cells.index[first].tolist()),
        groups=groups,
        sha256=table.sha256,
        how=table.how,
        description=f"{counted(len(pictures), 'picture')}, {counted(len(names), 'label')}: {description}",
    )


class _Table:
    """A label file as text: `header`, and `cells`, whose index is the line of each row, which pandas would not tell."""

    def __init__(self, file: Path, how: Reading, folder: _Folder) -> None:
        self.file, self.how = file, how
        self.problems: list[tuple[int, str]] = []  # a line, and what is wrong there
        try:
            content = file.read_bytes()
            self._text = content.decode("utf-8-sig")  # without the byte order mark that spreadsheets put in front
        except OSError as error:
            raise self.error(f"cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise self.error(f"line {line}: not UTF-8 text; save the file as CSV in UTF-8") from error
        self.sha256 = hashlib.sha256(content).hexdigest()
        widths = {mark: len(next(self._rows(mark, strict=False), (0, []))[1]) for mark in ",;\t"}
        rows = self._rows(next((mark for mark in widths if widths[mark] > 1), ","), strict=True)
        line, self.header = next(rows, (0, []))
        if not self.header:
            raise self.error("is empty; it needs a header and one row per picture")
        name, width = self.header[0], len(self.header)
        if name.lower().endswith(SUFFIXES) or name in folder.by_name:
            raise self.error(f"line {line}: {_shown(name)} is a picture, but the first row must name the columns")
        if width < 2:
            needs = "a column of pictures and at least one of labels, separated by commas, semicolons or tabs"
            raise self.error(f"line {line}: the header must name {needs}, got {_shown(name)}")
        whole = {}
        for line, row in rows:
            if len(row) == width:
                whole[line] = row
            else:
                hint = "; a value with a separator in it must stand in quotes" if len(row) > width else ""
                self.problems.append((line, f"{len(row)} values, but the header has {width}{hint}"))
        if not whole:
            _raise_if_any(file, self.problems)
            raise self.error("has a header but no rows")
        self.cells = pd.DataFrame.from_dict(whole, orient="index", dtype=object)

    def _rows(self, delimiter: str, strict: bool) -> Iterator[tuple[int, list[str]]]:
        """The rows that are not blank, each with the number of its first line."""
        reader, line = csv.reader(io.StringIO(self._text, newline=""), delimiter=delimiter, strict=strict), 1
        try:
            for row in reader:
                if row:
                    yield line, [value.strip() for value in row]
                line = reader.line_num + 1
        except csv.Error as error:
            raise self.error(f"line {line}: {error}") from error

    def error(self, problem: str) -> LabelFileError:
        return LabelFileError(f"{self.file}: {problem}")

    def report(self, row: int | np.integer[Any], problem: str) -> None:
        self.problems.append((self.cells.index[row], problem))

    def column(self, option: str, name: str) -> int:
        """Where the column `name` stands; it is not the first, which names the pictures."""
        others = self.header[1:]
        if (count := others.count(name)) != 1:
            raise self.error(f"{option} {_shown(name)}: {count or 'no'} columns have this name, of {_listed(others)}")
        return self.header.index(name, 1)

    def label_columns(self, group: int | None) -> tuple[list[int], bool]:
        """Where the labels stand, and whether it is one column of tags rather than columns of values."""
        header, how = self.header, self.how
        if how.label_column is not None:
            return [self.column("--label-column", how.label_column)], True
        columns = list(range(1, len(header))) if how.labels_from is None else self._columns_from(how.labels_from)
        columns = [column for column in columns if column != group]
        if not columns:
            raise self.error("there is no column of labels beside that of --group-column")
        counts = Counter(header[column] for column in columns)
        wrong = [f"column {column + 1} has no name" for column in columns if not header[column]]
        wrong += [f"{count} columns are called {_shown(name)}" for name, count in counts.items() if name and count > 1]
        _raise_if_any(self.file, [(1, f"{problem}; see --labels-from and --label-column") for problem in wrong])
        if how.separator is not None and len(columns) > 1:
            raise self.error("--separator: which column holds the tags? Name it with --label-column")
        if how.labels_from is not None or len(columns) > 1:
            return columns, False
        # Nothing in a column of tags is a number or a truth, unless the options say that it holds tags.
        values = {_plain(value) for value in self.cells[columns[0]].unique() if value}
        are_tags = bool(values) and not any(isinstance(value, float) or value in VALUES for value in values)
        return columns, are_tags or how.separator is not None

    def _columns_from(self, text: str) -> list[int]:
        """What --labels-from names."""
        option, others = "--labels-from", self.header[1:]
        rows = list(csv.reader(io.StringIO(text, newline="")))  # so that a name with a comma in it can be quoted
        names = [name.strip() for name in rows[0]] if len(rows) == 1 else []
        if names and set(names) <= set(others):
            return [self.column(option, name) for name in names]
        parts = text.split(":")
        for count in range(1, len(parts)):  # names may hold a colon, too
            first, last = ":".join(parts[:count]).strip(), ":".join(parts[count:]).strip()
            if first in others and last in (*others, ""):
                start, end = self.column(option, first), self.column(option, last) if last else len(others)
                if start <= end:
                    return list(range(start, end + 1))
        expected = f"{option} must be 'A:', 'A:B' or 'A,B,C' with names of columns from left to right"
        raise self.error(f"{expected}, got {_shown(text)}; there are {_listed(others)}")

    def read_tags(self, columns: Sequence[int], labels: Labels) -> tuple[list[str], np.ndarray, str]:
        """The labels, the target of each row and label, int8, and what was read in words."""
        how, name = self.how, self.header[columns[0]]
        if how.uncertain is not None:
            raise self.error(f"--uncertain: {_shown(name)} holds tags, where -1 means nothing")
        cells = self.cells[columns[0]].reset_index(drop=True)
        # With a tag a row, and several rows of a picture, a space is part of a tag.
        marks = "|;,\0" if self.cells[0].duplicated().any() else "|;, "
        separator = how.separator or next(
            (mark for mark in marks if cells.str.contains(mark, regex=False).any()), marks[3]
        )
        unknown = (cells == how.ignore).to_numpy()
        tags = cells[~unknown & (cells != how.negative)].str.split(separator, regex=False).explode().str.strip()
        tags = tags[~tags.isin(["", how.negative, how.ignore])]
        names = sorted(tags.unique()) if labels is None else list(labels)
        if not names:
            raise self.error(f"no row has a tag in column {_shown(name)}")
        codes = pd.Index(names, dtype=object).get_indexer(tags)
        for row, tag in tags[codes < 0].items():
            self.report(row, f"{_shown(tag)} is none of the labels {_listed(names)}")
        targets = np.zeros((len(cells), len(names)), dtype=np.int8)
        targets[tags.index[codes >= 0], codes[codes >= 0]] = 1
        targets[unknown] = UNKNOWN
        self.how = replace(how, label_column=name, separator=separator)
        between = {" ": "separated by spaces", "\0": "one a row"}.get(separator, f"separated by {separator!r}")
        return names, targets, f"tags of column {_shown(name)}, {between}"

    def read_values(self, columns: Sequence[int], labels: Labels) -> tuple[list[str], np.ndarray, str]:
        """The same for columns of values."""
        place = {self.header[column]: column for column in columns}
        names = list(place if labels is None else labels)
        lacking, further = [name for name in names if name not in place], [name for name in place if name not in names]
        if lacking or further:
            wrong = f"lacks the labels {_listed(lacking)}" if lacking else f"has further labels {_listed(further)}"
            raise self.error(f"{wrong}; expected are {_listed(names)}")
        cells = self.cells[[place[name] for name in names]].to_numpy()
        codes, values = pd.factorize(cells.ravel())
        meanings = self.how.meanings()
        meant = np.array([meanings.get(_plain(value), WRONG) for value in values], dtype=np.int8)
        targets = meant[codes].reshape(cells.shape)
        for row, label in np.argwhere(targets == WRONG):
            value = cells[row, label]
            options = "--label-column, --labels-from, --group-column, --ignore"
            wrong = f"must be 0, 1 or empty, got {_shown(value)} (or see {options})"
            if _plain(value) == -1:
                wrong = "is -1: say what it means, with --uncertain ignore, positive or negative, or with --negative -1"
            self.report(row, f"{_shown(names[label])} {wrong}")
        return names, targets, f"columns {_listed(names)}"

    def report_contradictions(self, names: Sequence[str], targets: np.ndarray, picture_of: np.ndarray) -> None:
        """Report every 0 where another row of the same picture has a 1."""
        ones = pd.DataFrame(targets == 1, index=self.cells.index).groupby(picture_of)
        has_one, lines = ones.any().to_numpy()[picture_of], ones.idxmax().to_numpy()[picture_of]
        for row, label in np.argwhere((targets == 0) & has_one):
            self.report(row, f"{_shown(names[label])} is 0, but 1 on line {lines[row, label]} for the same picture")

    def read_groups(self, group: int, first_row: np.ndarray) -> np.ndarray:
        """The group of each row; there must be one, that of the `first_row` of the same picture."""
        name, groups = _shown(self.header[group]), np.asarray(self.cells[group])
        self.problems += [(line, f"{name} is empty") for line in self.cells.index[groups == ""]]
        for row in np.flatnonzero(groups != groups[first_row]):
            there = f"{_shown(groups[first_row[row]])} on line {self.cells.index[first_row[row]]}"
            self.report(row, f"{name} is {_shown(groups[row])}, but {there} for the same picture")
        return groups


class _Folder:
    """The pictures below a folder. It is listed once, however many rows ask for one."""

    def __init__(self, images: Path) -> None:
        self._images = images
        self.by_name: defaultdict[str, list[str]] = defaultdict(list)  # paths below the folder, by `_spellings`
        for directory, _, names in os.walk(images):
            below = os.path.relpath(directory, images)
            for name in names:
                for spelling in _spellings(name):
                    self.by_name[spelling].append(os.path.normpath(os.path.join(below, name)))

    def find(self, name: str) -> tuple[str, str]:
        """The path of the one picture called `name`, and ""; or "", and why there is none."""
        if not name:
            return "", "no picture is named"
        wanted = os.path.normpath(name.replace("\\", "/"))
        below, base = os.path.split(wanted)
        near = self.by_name.get(_spellings(base)[0], [])
        found = (
            [path for path in near if path == wanted]
            or [path for path in near if os.path.dirname(path) == below]
            or [path for path in near if not below or f"/{os.path.dirname(path)}".endswith(f"/{below}")]
        )
        if len(found) > 1:
            return "", f"{_shown(name)} is the name of {len(found)} pictures: {_listed(sorted(found))}"
        # What is not found so may be an absolute path, or one that leads through ".." or a link.
        path = os.path.join(self._images, found[0]) if found else os.path.normpath(os.path.join(self._images, name))
        return (path, "") if found or os.path.isfile(path) else ("", f"no picture {_shown(name)} in {self._images}")


def _spellings(name: str) -> list[str]:
    """How a picture may be called: with its extension in lower case, and without."""
    stem, suffix = os.path.splitext(name)
    return [stem + suffix.lower(), stem] if suffix.lower() in SUFFIXES else [name]


def _plain(value: str) -> float | str:
    """One spelling for 1 and 1.0, and for True and TRUE."""
    try:
        number = float(value)
    except ValueError:
        number = np.nan
    return value.strip().lower() if np.isnan(number) else number


def counted(number: int, noun: str) -> str:
    """The number with its noun."""
    return f"{number} {noun}{'s' * (number != 1)}"


def _shown(text: str) -> str:
    """In quotes, and not longer than a line."""
    return repr(text if len(text) <= 80 else text[:80] + "…")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(map(_shown, names[:MAX_SHOWN])) + more


def _raise_if_any(file: Path, problems: Sequence[tuple[int, str]]) -> None:
    if problems:
        shown = [f"{file}: line {line}: {problem}" for line, problem in sorted(problems)[:MAX_SHOWN]]
        if len(problems) > MAX_SHOWN:
            shown.append(f"{file}: and {len(problems) - MAX_SHOWN} more problems")
        raise LabelFileError("\n".join(shown))
