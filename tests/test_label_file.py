"""Label files as people have them, and what is said about those that cannot be used."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("pandas")
from label_file import LabelFile, LabelFileError, Reading, add_options, read_label_file, reading_of

Read = Callable[..., LabelFile]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.png to l.png, which nobody opens."""
    for letter in "abcdefghijkl":
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / "pictures" / f"{letter}.png").touch()
    return tmp_path / "pictures"


@pytest.fixture
def read(folder: Path, tmp_path: Path) -> Read:
    """Reads a label file with these lines; `labels` and the fields of Reading go by name."""

    def reader(*lines: str, labels: list[str] | None = None, **how: str) -> LabelFile:
        file = tmp_path / "labels.csv"
        file.write_bytes("".join(f"{line}\n" for line in lines).encode())
        return read_label_file(file, folder, Reading(**how), labels=labels)

    return reader


def refusal(read: Read, *lines: str, **how: Any) -> str:
    with pytest.raises(LabelFileError) as info:
        read(*lines, **how)
    return str(info.value)


def names(content: LabelFile) -> list[str]:
    return [picture.name for picture in content.pictures]


# --- What is read --------------------------------------------------------------------------------


def test_what_a_value_means(read: Read) -> None:
    values = ["1", "1.0", " True", "TRUE", "true ", "0", "0.0", "False", "false", "", "  ", "NaN", "nan", "NA"]
    header = ",".join(f"label {index}" for index in range(len(values)))
    content = read(f"file,{header}", f"a.png,{','.join(values)}", f"b.png{',1' * len(values)}")
    assert content.targets.tolist() == [[1] * 5 + [0] * 4 + [-1] * 5, [1] * 14]
    assert str(content.targets.dtype) == "torch.int8"
    assert content.lines == (2, 3)
    assert content.groups is None


NIH = [
    "Image Index,Finding Labels,Follow-up #,Patient ID,OriginalImage[Width,Height],",
    "a.png,Cardiomegaly|Effusion,0,007,1,2,",
    "b.png,No Finding,1,007,1,2,",
    "c.png,Effusion,0,12,1,2,",
]


def test_the_chest_x_rays_of_the_nih(read: Read) -> None:
    content = read(*NIH, label_column="Finding Labels", group_column="Patient ID")
    assert content.labels == ("Cardiomegaly", "Effusion", "No Finding")
    assert content.targets.tolist() == [[1, 1, 0], [0, 0, 1], [0, 1, 0]]
    assert content.groups == ("007", "007", "12")
    assert content.description == "3 pictures, 3 labels: tags of column 'Finding Labels', separated by '|'"
    # Among others in a list, they are no labels.
    more = ["d.png,No Finding|Hernia,0,12,1,2,"]
    content = read(*NIH, *more, label_column="Finding Labels", negative="No Finding", ignore="Effusion")
    assert content.labels == ("Cardiomegaly", "Hernia")
    assert content.targets.tolist() == [[1, 0], [0, 0], [-1, -1], [0, 1]]


@pytest.mark.parametrize(("tags", "separator"), [("haze big tree", " "), ("haze|big tree", "|")])
@pytest.mark.parametrize("how", ["seen", "stated"])
def test_tags_are_seen_by_themselves_or_stated(tags: str, separator: str, how: str, read: Read) -> None:
    stated = {"label_column": "tags", "separator": separator} if how == "stated" else {}
    content = read("image_name,tags", f"a,{tags}", "b,", "c,haze", **stated)
    assert content.labels == (("big", "haze", "tree") if separator == " " else ("big tree", "haze"))
    assert content.targets.sum(dim=1).tolist() == [len(content.labels), 0, 1]
    assert content.how == Reading(label_column="tags", separator=separator)
    assert "tags of column 'tags', separated by " + ("spaces" if separator == " " else "'|'") in content.description
    # Another file read like the first: its tags have no separator that could be seen.
    again = read("image_name,tags", "a,haze", label_column="tags", separator=separator, labels=list(content.labels))
    assert again.labels == content.labels
    assert again.targets.sum() == 1


def test_the_first_separator_that_occurs_is_taken(read: Read) -> None:
    assert read("file,tags", 'a.png,"x, y;z"').labels == ("x, y", "z")
    assert read("file,tags", 'a.png,"x, y,, y"').labels == ("x", "y")
    assert read("file;tags", "a.png;x,y").labels == ("x", "y")
    assert read("file,tags", "a.png,x and y", separator=" and ").labels == ("x", "y")
    # Numbers in the only column may be tags, but that must be said.
    assert "'tags' must be 0, 1 or empty, got '12'" in refusal(read, "file,tags", "a.png,12", "b.png,7")
    assert read("file,tags", "a.png,12", "b.png,7", label_column="tags").labels == ("12", "7")


def test_minus_one_must_be_given_a_meaning(read: Read) -> None:
    lines = ["file,cat,dog", "a.png,1,0", "b.png,-1.0,1", "c.png,0,-1"]
    message = refusal(read, *lines)
    assert "line 3: 'cat' is -1: say what it means, with --uncertain ignore" in message
    assert "--negative -1" in message
    for how, meaning in (
        ({"uncertain": "ignore"}, -1),
        ({"uncertain": "positive"}, 1),
        ({"uncertain": "negative"}, 0),
        ({"negative": "-1"}, 0),
        ({"ignore": "-1.0"}, -1),
    ):
        assert read(*lines, **how).targets.tolist() == [[1, 0], [meaning, 1], [0, meaning]]


def test_the_command_line_says_how_to_read(read: Read) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    assert reading_of(parser.parse_args([])) == Reading()
    # -1 for 0, and 0 for unknown, as some sets of partly known labels have it.
    how = reading_of(parser.parse_args(["--negative", "-1", "--ignore", "0", "--labels-from", "cat:"]))
    assert how == Reading(negative="-1", ignore="0", labels_from="cat:")
    content = read("file,age,cat", "a.png,3,1", "b.png,3,-1", "c.png,4,0", **vars(how))
    assert content.targets.tolist() == [[1], [0], [-1]]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"negative": "-1", "uncertain": "ignore"}, "--negative -1: another option gives"),
        ({"negative": "no", "ignore": "NO"}, "--ignore NO: another option gives"),
        ({"uncertain": "maybe"}, "--uncertain must be one of ignore, positive, negative, got 'maybe'"),
        ({"label_column": "a", "labels_from": "b:"}, "--label-column is for one column of tags"),
        ({"separator": ";", "labels_from": "b:"}, "--separator is for one column of tags"),
        ({"separator": ""}, "--separator: must not be empty"),
    ],
)
def test_options_that_contradict_each_other(how: dict[str, str], message: str) -> None:
    with pytest.raises(LabelFileError, match=f"^{message}"):
        Reading(**how)


@pytest.mark.parametrize(
    ("columns", "labels"),
    [
        ("cat:", ("cat", "dog:big", "owl, grey")),
        ("cat:dog:big", ("cat", "dog:big")),
        ("dog:big:", ("dog:big", "owl, grey")),
        ("dog:big", ("dog:big",)),
        ('"owl, grey", cat', ("owl, grey", "cat")),
    ],
)
def test_labels_from_some_columns(columns: str, labels: tuple[str, ...], read: Read) -> None:
    lines = ['file,age,sex,cat,dog:big,"owl, grey"', "a.png,77,f,1,0,1", "b.png,8,m,0,1,0"]
    content = read(*lines, labels_from=columns)
    assert content.labels == labels
    value = {"cat": 1, "dog:big": 0, "owl, grey": 1}
    assert content.targets.tolist() == [[value[label] for label in labels], [1 - value[label] for label in labels]]


@pytest.mark.parametrize("columns", ["cow:", "dog:cat", "cat:cow", "cow", "file,cat", "file:", "", "cat\ndog"])
def test_refuses_columns_that_are_not_there(columns: str, read: Read) -> None:
    message = refusal(read, "file,age,cat,dog", "a.png,77,1,0", labels_from=columns)
    assert (
        f"--labels-from must be 'A:', 'A:B' or 'A,B,C' with names of columns from left to right, got {columns!r}"
        in message
    )
    assert "'age', 'cat', 'dog'" in message


def test_names_as_people_write_them(folder: Path, tmp_path: Path, read: Read) -> None:
    for name in (
        "train_0.jpg",
        "B.PNG",
        "scan.1.tif",
        "raw",
        "sub/images/deep.JPG",
        "sub/twin.png",
        "twin.png",
        "twin.PNG",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (tmp_path / "beside.png").touch()
    wanted = {
        "train_0": "train_0.jpg",
        "train_0.JPG": "train_0.jpg",
        "B.png": "B.PNG",
        "scan.1": "scan.1.tif",
        "raw": "raw",
        "deep.jpg": "sub/images/deep.JPG",
        "images/deep": "sub/images/deep.JPG",
        "sub\\images\\deep.JPG": "sub/images/deep.JPG",
        "./sub//twin.png": "sub/twin.png",
        "twin.png": "twin.png",  # not the one in a subfolder
        "twin.PNG": "twin.PNG",
        "../beside.png": "../beside.png",
        str(folder / "a.png"): "a.png",
    }
    for written, meant in wanted.items():
        content = read("file,cat", f"{written},1")
        assert [picture.resolve() for picture in content.pictures] == [(folder / meant).resolve()], written
    (folder / "other").mkdir()
    (folder / "other" / "deep.jpg").touch()
    assert "line 2: 'deep.jpg' is the name of 2 pictures: 'other/deep.jpg', 'sub/images/deep.JPG'" in refusal(
        read, "file,cat", "deep.jpg,1"
    )
    (folder / "train_0.tif").touch()
    assert "'train_0' is the name of 2 pictures" in refusal(read, "file,cat", "train_0,1")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_reads_what_spreadsheets_write(separator: str, folder: Path, tmp_path: Path) -> None:
    text = "\r\n".join(["'file, or so','cat; big',dog", "'a.png', 1 ,0", "b.png,,1", ""])
    text = text.replace(",", separator).replace("cat; big", f"cat{separator} big").replace("'", '"')
    (tmp_path / "labels.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    content = read_label_file(tmp_path / "labels.csv", folder)
    assert content.labels == (f"cat{separator} big", "dog")
    assert content.targets.tolist() == [[1, 0], [-1, 1]]
    assert content.sha256 == hashlib.sha256(b"\xef\xbb\xbf" + text.encode()).hexdigest()


def test_names_of_labels_are_kept_as_they_are(read: Read) -> None:
    labels = ("$x_{1}$", "50%", "猫 🐈", "two\r\nlines", "A" * 50_000, "None")
    header = ",".join(f'"{label}"' for label in labels)
    assert read(f"file,{header}", "a.png,1,1,1,1,1,1").labels == labels
    assert set(read("file,tags", f'a.png,"{"|".join(labels)}"').labels) == set(labels)


# --- Several rows of one picture -----------------------------------------------------------------


def test_the_rows_of_a_picture_are_united(read: Read) -> None:
    content = read("file,cat,dog", "b.png,1,", "a.png,,0", "b,,0", "./a.png,,", "b.png,1,0")
    assert names(content) == ["b.png", "a.png"]
    assert content.targets.tolist() == [[1, 0], [-1, 0]]
    assert content.lines == (2, 3)
    lines = ["file,tags", "a.png,x y", "b.png,z", "a.png,z", "a.png,"]
    assert read(*lines, separator=" ").targets.tolist() == [[1, 1, 1], [0, 0, 1]]
    # A picture has several rows, so a row may be one tag, of two words.
    content = read(*lines)
    assert content.labels == ("x y", "z")
    assert content.targets.tolist() == [[1, 1], [0, 1]]
    assert content.description.endswith("one a row")


def test_the_rows_of_a_picture_must_not_contradict_each_other(read: Read) -> None:
    message = refusal(read, "file,cat,dog", "a.png,1,0", "b.png,0,1", "a.png,,1", "b.png,0,", "b.png,1,")
    assert "line 2: 'dog' is 0, but 1 on line 4 for the same picture" in message
    assert "line 3: 'cat' is 0, but 1 on line 6 for the same picture" in message
    assert "line 5: 'cat' is 0, but 1 on line 6 for the same picture" in message
    lines = ["file,cat,who", "a.png,1,me", "b.png,0,you", "a.png,1,you"]
    message = refusal(read, *lines, group_column="who")
    assert "line 4: 'who' is 'you', but 'me' on line 2 for the same picture" in message
    assert "line 3: 'who' is empty" in refusal(read, *lines[:2], "b.png,0,", group_column="who")


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["file,cat,dog", "a.png,1,0", "b.png,1,2", "c.png,1,1"], "line 3: 'dog' must be 0, 1 or empty, got '2'"),
        (["file,cat,dog", "a.png,1,0", "b.png,1,inf", "c.png,1,1"], "line 3: 'dog' must be 0, 1 or empty, got 'inf'"),
        (["file,cat,dog", "a.png,1,0", "b.png,1"], "line 3: 2 values, but the header has 3"),
        (["file,cat,dog", "a.png,1,0,"], "line 2: 4 values, but the header has 3; a value with a separator in it must"),
        (["file,cat,dog", "a.png,1,0", "gone.png,1,0"], "line 3: no picture 'gone.png' in "),
        (['file,"a', 'b"', '"a.png",1', "", "", "gone.png,1"], "line 6: no picture 'gone.png' in "),
        (["file,cat\r", '"a.png","1', '"', "\r", "gone.png,1\r"], "line 5: no picture 'gone.png' in "),
        (["file,cat", "a.png,1", f"{'x' * 5000}.png,1"], f"line 3: no picture '{'x' * 80}…' in "),
        (["file,cat", "a.png,1", "\0.png,1"], "line 3: "),
        (["file,cat,dog", ",1,0"], "line 2: no picture is named"),
        (["file,cat,dog", "a.png,1,1", '"b.png,1,0'], "line 3: unexpected end of data"),
        (["file,cat,dog"], "has a header but no rows"),
        (["file,tags", "a.png,", "b.png,"], "no row has a value for 'tags'"),
        ([], "is empty"),
        (["", "\r"], "is empty"),
        (["file", "a.png"], "line 1: the header must name a column of pictures and at least one of labels"),
        (["file,cat,", "a.png,1,0"], "line 1: column 3 has no name"),
        (["file,cat,cat", "a.png,1,0"], "line 1: 2 columns are called 'cat'"),
        (["file,cat,dog", "a.png,1,", "b.png,0,"], "no row has a value for 'dog'"),
        (["a.png,1,0", "b.png,1,0"], "line 1: 'a.png' is a picture, but the first row must name the columns"),
        (["a,haze", "b,haze"], "line 1: 'a' is a picture, but the first row must name the columns"),
        (["", "gone.JPG,1,0", "b.png,1,0"], "line 2: 'gone.JPG' is a picture, but the first row must name the columns"),
    ],
)
def test_refuses_a_bad_label_file(lines: list[str], expected: str, read: Read, tmp_path: Path) -> None:
    message = refusal(read, *lines)
    assert message.startswith(f"{tmp_path / 'labels.csv'}: ")
    assert expected in message
    assert "\n" not in message


def test_refuses_columns_that_hold_no_labels(read: Read) -> None:
    expected = (
        "line 2: 'age' must be 0, 1 or empty, got '58' (or see --label-column, --labels-from, --group-column, --ignore)"
    )
    assert expected in refusal(read, "file,cat,age", "a.png,1,58", "b.png,0,1")
    message = refusal(read, *NIH, label_column="Findings")
    assert "--label-column 'Findings': no columns have this name, of 'Finding Labels', 'Follow-up #'" in message
    assert "--label-column 'Image Index': no columns" in refusal(read, *NIH, label_column="Image Index")
    message = refusal(read, "file,cat,cat", "a.png,x,y", label_column="cat")
    assert "--label-column 'cat': 2 columns have this name" in message
    assert "--separator: which column holds the tags? Name it with --label-column" in refusal(
        read, "file,cat,dog", "a.png,1,1", separator="|"
    )
    assert "no row has a tag" in refusal(read, "file,tags", "a.png,", label_column="tags")
    assert "no row has a tag" in refusal(read, "file,tags", "a.png,none", negative="none")
    assert "--uncertain: 'tags' holds tags" in refusal(read, "file,tags", "a.png,x", uncertain="ignore")
    assert "there is no column of labels" in refusal(read, "file,who", "a.png,1", group_column="who")


def test_reports_several_problems_at_once(read: Read) -> None:
    rows = [f"{letter}.png,{value},0" for letter, value in zip("abcdefghijkl", "2" * 6 + "1" * 6, strict=True)]
    message = refusal(read, "file,cat,dog", "", *rows, "m.png,1,1", "n.png,1,1", "a.png,1", "o.png,1,1", ",3,1", ",3,1")
    lines = [int(line.split("line ")[1].split(":")[0]) for line in message.splitlines()[:-1]]
    assert lines == [3, 4, 5, 6, 7, 8, 15, 16, 17, 18]
    assert message.endswith("labels.csv: and 4 more problems")


def test_refuses_what_is_no_text_file(folder: Path, tmp_path: Path) -> None:
    def refused(content: bytes) -> str:
        (tmp_path / "labels.csv").write_bytes(content)
        with pytest.raises(LabelFileError) as info:
            read_label_file(tmp_path / "labels.csv", folder)
        return str(info.value)

    assert "line 3: not UTF-8 text" in refused(b"file,cat\na.png,1\n\xe9.png,1\n")
    assert "line 1: not UTF-8 text" in refused("file,cat\n".encode("utf-16"))
    assert "line 2: field larger than field limit" in refused(b"file,cat\n" + b"a" * 200_000)
    for file, reason in ((folder, "Is a directory"), (tmp_path / "gone.csv", "No such file")):
        with pytest.raises(LabelFileError, match=f"{file}: cannot be read: {reason}"):
            read_label_file(file, folder)


def test_a_test_file_must_have_the_labels_of_the_training_file(read: Read) -> None:
    lines = ["file,cat,dog", "a.png,1,", "b.png,1,"]
    # What is known nowhere in it cannot be measured, but does no harm.
    assert read(*lines, labels=["dog", "cat"]).targets.tolist() == [[-1, 1], [-1, 1]]
    assert "lacks the labels 'owl'; expected are 'cat', 'owl'" in refusal(read, *lines, labels=["cat", "owl"])
    assert "has further labels 'dog'; expected are 'cat'" in refusal(read, *lines, labels=["cat"])
    lines = ["file,tags", "a.png,x y", "b.png,z"]
    assert read(*lines, labels=["z", "none", "y", "x"]).targets.tolist() == [[0, 0, 1, 1], [1, 0, 0, 0]]
    assert "line 3: 'z' is none of the labels 'x', 'y'" in refusal(read, *lines, labels=["x", "y"])
    # There is nothing to split: the column of groups may be there or not.
    for header, row in (("file,who,cat", "a.png,,1"), ("file,cat", "a.png,1")):
        content = read(header, row, group_column="who", labels=["cat"])
        assert (content.targets.tolist(), content.groups) == ([[1]], None)
