"""Debian's dependencies: from apt's lists to files, from files to scores, and what is said where that cannot be."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
import debian_packages
import train_debian_dependencies
from debian_packages import DataError, Package, Rows, make, needed, read_packages, read_rows, write_data
from scipy.sparse import csr_matrix
from sklearn.datasets import load_svmlight_file
from sklearn.metrics import ndcg_score
from train_debian_dependencies import CHUNK_BYTES, TextClassifier, peak_of_loss, scores

LIST = """\
Package: player
Source: music (1.2-3)
Version: 1.2
Depends: libc6 (>= 2.36), sound:any (<< 2) | silence [amd64],
 g++ | c++-compiler
Recommends: fonts-mono
Suggests: games
Description: plays music
Description-md5: aa
Section: sound

Package: sound
Description: makes noise
Section: libs
"""
TRANSLATION = """\
Package: player
Description-md5: aa
Description-en: plays music
 in a terminal.
 .
 Package: this is no field.
"""


def packages(sources: int = 12) -> list[Package]:
    """Two packages of each source, whose texts and needs are those of no other, but for the need of libc6."""
    return [
        Package(f"of source{source}", f"source{source}", frozenset({"libc6", f"lib{source}", f"rare{source}{twin}"}))
        for source in range(sources)
        for twin in "ab"
    ]


# --- From apt's lists to files -------------------------------------------------------------------


def test_what_a_list_says_of_a_package() -> None:
    player, sound = read_packages([LIST], [TRANSLATION])
    assert player.needs == {"libc6", "sound", "g++", "fonts-mono"}
    assert player.text == "plays music\n in a terminal.\n .\n Package: this is no field. sound"
    assert (player.source, sound.source) == ("music", "sound")
    assert (sound.text, sound.needs) == ("makes noise libs", frozenset())


def test_the_last_list_counts() -> None:
    newer = "Package: sound\nDepends: libc6\n"
    assert [len(package.needs) for package in read_packages([LIST, newer], [])] == [4, 1]


def test_first_of_alternatives() -> None:
    assert needed("a | b, c (>= 1.0) | d,e:any") == ["a", "c", "e"]
    assert needed("") == []


def test_a_source_is_in_one_file_only(tmp_path: Path) -> None:
    write_data([*packages(), Package("needs nothing that another one needs", "odd", frozenset({"odd"}))], tmp_path)
    train, test = (read_rows(tmp_path / file) for file in ("train.txt", "test.txt"))
    labels = (tmp_path / "labels.txt").read_text().split()
    assert labels == sorted(["libc6", *(f"lib{source}" for source in range(12))])  # those of two packages
    assert len(train) + len(test) == 24
    in_train, in_test = ({labels[column] for column in rows.labels.indices} for rows in (train, test))
    assert in_train & in_test == {"libc6"}
    assert in_train | in_test == set(labels)
    # A text of two words: each, and the pair.
    assert np.diff(train.features.indptr).tolist() == [3] * len(train)


def test_features_count_words(tmp_path: Path) -> None:
    texts = ["red red blue", "C++ 3d"]
    write_data([Package(text, text[:1], frozenset({"libc6"})) for text in texts], tmp_path)
    files = [tmp_path / "train.txt", tmp_path / "test.txt"]
    values = [load_svmlight_file(skip_header(file), multilabel=True)[0].data.tolist() for file in files]
    assert sorted(map(sorted, values)) == [[1, 1, 1], [1, 1, 1, 2]]


def test_too_few_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="apt's lists have 2 packages: too few"):
        write_data(packages(sources=1), tmp_path)


def skip_header(file: Path) -> Any:
    stream = file.open("rb")
    stream.readline()
    return stream


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the only one on the path, with apt's programs: they know the lists Packages and Translations in it."""
    folder = tmp_path / "apt"
    folder.mkdir()
    place = shlex.quote(str(folder))
    needs = "".join(
        f"Package: p{index}\nDescription-md5: m{index}\nDepends: libc6, {'awk' * (index % 2)}\n\n" for index in range(9)
    )
    (folder / "Packages").write_text(needs)
    (folder / "Translations").write_text("Description-md5: m1\nDescription-en: long text\n")
    (folder / "Release").write_text("not to be read")
    targets = f'for kind in Release Packages Translations; do test -e {place}/$kind && echo "$kind {place}/$kind"; done'
    script(folder / "apt-get", f"{targets}; exit 0")
    script(folder / "apt-helper", '[ "$1" = cat-file ] && exec /bin/cat "$2"')
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(debian_packages, "APT_HELPER", str(folder / "apt-helper"))
    return folder


def script(file: Path, line: str) -> None:
    file.write_text(f"#!/bin/sh\n{line}\n")
    file.chmod(0o755)


def test_makes_a_folder_once(apt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data" / "debian"
    debian_packages.main([str(folder)])
    assert (folder / "labels.txt").read_text() == "awk\nlibc6\n"
    assert len(read_rows(folder / "train.txt")) + len(read_rows(folder / "test.txt")) == 9
    assert capsys.readouterr().out == "9 of 9 packages, 2 labels, 1.4 a package\n"
    (apt / "apt-get").unlink()
    debian_packages.main([str(folder)])
    assert "is complete already" in capsys.readouterr().out
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("Packages", "no list of packages here; fetch it: sudo apt-get update -o Acquire::Languages=en"),
        ("Translations", "no list of English descriptions here; fetch it: sudo apt-get update"),
        ("apt-get", "apt-get is not there: a machine with Debian or Ubuntu is needed"),
        ("apt-helper", "apt-helper is not there"),
    ],
)
def test_without_apt_or_its_lists(
    gone: str, message: str, apt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (apt / gone).unlink()
    with pytest.raises(SystemExit, match="2"):
        debian_packages.main([str(tmp_path / "debian")])
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [apt]


def test_says_what_apt_says(apt: Path, tmp_path: Path) -> None:
    script(apt / "apt-helper", "echo no such list >&2; exit 100")
    with pytest.raises(DataError, match=r"apt-helper cat-file .*/Packages failed: no such list"):
        make(tmp_path / "debian")


def test_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").touch()
    with pytest.raises(DataError, match="holds something else, or not all: remove it"):
        make(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis"]


# --- From files to numbers -----------------------------------------------------------------------

ROWS = ["0,2 1:.5 4:1.5", " 0:2", "3:-1e0 1:+3.", "1", "", "2,1,2  4:1 0:1 4:2 "]


def test_reads_what_scikit_learn_reads(tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_text("\n".join(["4 5 3", ROWS[0], ROWS[1], "1:3. 3:-1e0", ROWS[3], ""]))
    rows = read_rows(file)
    features, labels = load_svmlight_file(skip_header(file), multilabel=True, n_features=5, zero_based=True)
    expected = features.toarray() / np.maximum(np.abs(features.toarray()).sum(1, keepdims=True), 1e-9)
    np.testing.assert_allclose(rows.features.toarray(), expected, rtol=1e-6)
    assert rows.features.dtype == np.float32
    assert [tuple(row.nonzero()[0]) for row in rows.labels.toarray()] == labels


def test_reads_rows_in_any_order(tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_bytes("\r\n".join(["6 5 3", *ROWS]).encode())
    rows = read_rows(file)
    assert rows.labels.toarray().tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 1, 1]]
    assert rows.features.toarray().tolist() == [
        [0, 0.25, 0, 0, 0.75],
        [1, 0, 0, 0, 0],
        [0, 0.75, 0, -0.25, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0.25, 0, 0, 0, 0.75],
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "line 1: must be the numbers of rows, features and labels"),
        (["1,2 3:4"], "line 1: must be the numbers"),
        (["3 9 9", "1 1:1", "2 2:2"], "2 rows follow the first line, which says 3"),
        (["0 9 9"], "0 rows follow the first line, which says 0; there must be one at least"),
        (["2 9 9", "1 1:1", "2 2:2", "3 3:3"], "3 rows follow"),
        (["2 9 9", "1 1:1", "1,,2 2:2"], "line 3: must be label,label,… feature:value"),
        (["2 9 9", "1 1:1", "1.5 2:2"], "line 3: must be"),
        (["2 9 9", "1 1:1 2", "1 2:2"], "line 2: must be"),
        (["2 9 9", "1 1:nan", "1 2:2"], "line 2: must be"),
        (["2 9 9", "1 -1:1", "1 2:2"], "line 2: must be"),
        (["2 9 9", "1 1:1", " 2:2:2"], "line 3: must be"),
        (["3 9 9", "1 1:1", " ", "1,9 2:2"], "line 4: label 9 is not below 9, their number by the first line"),
        (["3 9 9", "1,2 1:1 9:1", " ", "1 2:2"], "line 2: feature 9 is not below 9"),
        (["3 9 9", "1 1:1", " ", "1 99999999999999999999:2"], "line 4: feature 100000000000000000000 is not below 9"),
        (["2 9 9", "1 1:1", "1 2:1 3:1e999"], "line 3: the value of feature 3 must be finite, got inf"),
    ],
)
def test_refuses_malformed_files(lines: list[str], message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(DataError) as info:
        read_rows(file)
    assert str(info.value).startswith(f"{file}: {message}")


# --- From numbers to scores ----------------------------------------------------------------------


def test_scores_by_hand() -> None:
    labels = csr_matrix(np.array([[1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]]))
    got = scores(np.array([[0, 1, 2, 3, 4], [4, 5, 3, 2, 1]]), labels)
    second, third = 1 / np.log2(3), 1 / np.log2(4)
    ndcg = ((1 + third) / (1 + second) + second) / 2
    assert got == pytest.approx({"P@1": 1 / 2, "P@3": 3 / 6, "P@5": 3 / 10, "nDCG@3": ndcg, "nDCG@5": ndcg})


def test_scores_are_scikit_learns() -> None:
    random = np.random.default_rng(0)
    labels, logits = random.random((50, 20)) < 0.15, random.random((50, 20))
    labels[0], labels[1] = False, True
    got = scores(np.argsort(-logits, axis=1)[:, :5], csr_matrix(labels.astype(float)))
    for k in (3, 5):
        assert got[f"nDCG@{k}"] == pytest.approx(ndcg_score(labels, logits, k=k))
    assert got["P@1"] == pytest.approx(ndcg_score(labels, logits, k=1))  # what the table leaves out


# --- Training ------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with rows whose features are their labels', and label 0, which all rows have."""
    random = np.random.default_rng(0)
    for name, count in (("train", 60), ("test", 20)):
        drawn = [sorted({0, *random.integers(1, 12, size=2)}) for _ in range(count)]
        lines = [f"{','.join(map(str, row))} {' '.join(f'{label}:1' for label in row[1:])}" for row in drawn]
        (tmp_path / f"{name}.txt").write_text("\n".join([f"{count} 12 12", *lines]))
    return tmp_path


def arguments(data: Path, *more: str, checkpoint: str = "a.pt") -> list[str]:
    files = ["--train", str(data / "train.txt"), "--test", str(data / "test.txt")]
    return [*files, "--checkpoint", str(data / checkpoint), "--batch-size", "8", "--width", "8", *more]


def train(data: Path, *more: str, checkpoint: str = "a.pt") -> dict[str, Any]:
    train_debian_dependencies.main(arguments(data, *more, checkpoint=checkpoint))
    saved: dict[str, Any] = torch.load(data / checkpoint, weights_only=True)
    return saved


def test_learns_and_resumes_to_the_bit(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--epochs", "4", "--learning-rate", "0.05")
    whole = train(data, *options)
    out = capsys.readouterr().out
    assert whole["history"][-1]["nDCG@3"] > 0.95
    popular = out.splitlines()[5].split()
    assert (popular[0], popular[1]) == ("popular", "1.000")
    assert float(popular[2]) < 0.6

    calls, loss = 0, TextClassifier.loss

    def dies(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 20:  # in the third epoch of 8 batches
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(TextClassifier, "loss", dies)
    with pytest.raises(KeyboardInterrupt):
        train(data, *options, checkpoint="b.pt")
    assert len(torch.load(data / "b.pt", weights_only=True)["history"]) == 2
    resumed = train(data, *options, "--resume", checkpoint="b.pt")
    for one, other in zip(whole["history"], resumed["history"], strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), name


def test_loss_takes_less_memory_than_dense_logits() -> None:
    rows, labels, width = 256, 20_000, 4
    features = csr_matrix(np.ones((rows, 1), np.float32))
    targets = csr_matrix((np.ones(rows), np.arange(rows), np.arange(rows + 1)), (rows, labels))
    model = TextClassifier(1, width, torch.full((labels,), 0.1))
    peak = peak_of_loss(model, Rows(features, targets, ""), np.arange(rows))
    gradients = labels * (width + 1) * 4
    assert gradients < peak < gradients + 2 * CHUNK_BYTES < rows * labels * 4


def test_refuses_a_checkpoint_of_other_options(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(data, "--epochs", "1")
    content = (data / "a.pt").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        train(data, "--resume", "--seed", "1")
    assert f"--resume: {data / 'a.pt'}: was written with --seed 0, not 1" in capsys.readouterr().err
    with (data / "test.txt").open("a") as file:
        file.write("\n")
    with pytest.raises(SystemExit, match="2"):
        train(data, "--resume")
    assert "was written with --test with sha256" in capsys.readouterr().err
    assert (data / "a.pt").read_bytes() == content
    (data / "test.txt").write_text((data / "test.txt").read_text()[:-1])
    whole = torch.load(data / "a.pt", weights_only=True)
    for broken in ({"model": {}}, {"optimizers": []}, {"optimizers": [{}, {}]}, {"history": None}):
        torch.save(whole | broken, data / "a.pt")
        with pytest.raises(SystemExit, match="2"):
            train(data, "--resume")
        assert f"--resume: {data / 'a.pt'}: is not a checkpoint of this program: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("test", "more", "message"),
    [
        ("1 12 11\n1 1:1", [], "has 11 labels, but "),
        ("1 9 12\n1 1:1", [], "has 9 features, but "),
        ("1 12 12\n 1:1", [], "test.txt: no row has a label"),
        ("1 12 12\n1 1;1", [], "test.txt: line 2: must be label"),
        (None, [], "--test: {data}/test.txt: cannot be read: No such file or directory"),
        ("1 12 12\n1 1:1", ["--checkpoint", "{data}"], "--checkpoint: {data}: cannot be written: Is a directory"),
        ("1 12 12\n1 1:1", ["--resume"], "--resume: {data}/a.pt: cannot be read: No such file or directory"),
        ("1 12 12\n1 1:1", ["--epochs", "0"], "argument --epochs: must be a whole number of at least 1, got '0'"),
    ],
)
def test_refuses_before_training(
    test: str | None, more: list[str], message: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "test.txt").unlink()
    if test is not None:
        (data / "test.txt").write_text(test)
    with pytest.raises(SystemExit, match="2"):
        train(data, *(word.format(data=data) for word in more))
    captured = capsys.readouterr()
    assert message.format(data=data) in captured.err
    assert captured.out == ""
    assert not (data / "a.pt").exists()


def test_says_how_to_make_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for given, message in (
        ([], "runs/debian/train.txt: cannot be read: No such file or directory; make it: python examples/"),
        (["--train", "mine.txt"], "--train and --test: give both, or none"),
    ):
        with pytest.raises(SystemExit, match="2"):
            train_debian_dependencies.main(given)
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
