"""The training example on the user's own pictures, and the prediction of their labels with its checkpoint."""

from __future__ import annotations

import csv
import errno
import itertools
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
import label_file
import pandas as pd
import predict
import run_report
import train_multilabel_resnet as example
from matplotlib import pyplot as plt
from PIL import Image

# Whatever matplotlib, a format string, a table or CSV could stumble over.
NAMES = ["$x$ & $", "_hidden", "100% {a}", "\N{CJK UNIFIED IDEOGRAPH-732B}", "a" * 500, 'two\nlines, "quoted"']
PICTURES = 24


@pytest.fixture(scope="module", autouse=True)
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this test's own; torch's number of threads is left to other tests as it was."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, and beside it a label file, and both of copies of some of them for testing."""
    folder = tmp_path_factory.mktemp("own") / "pictures"
    for path in (folder, folder.with_name("copies")):
        path.mkdir()
    values, pixels = random.Random(0), np.random.default_rng(0)
    rows = []
    for index in range(PICTURES):
        shape = [(40, 30, 3), (30, 40), (20, 50, 4)][index % 3]
        picture = Image.fromarray(pixels.integers(256, size=shape, dtype=np.uint8))
        for path in [folder, *[folder.with_name("copies")] * (index < 7)]:
            picture.save(path / f"{index}.png")
        rows.append([f"{index}.png", f"patient {index // 3}", *values.choices(["1", "0", ""], k=len(NAMES))])
    for name, chosen in {"train.csv": rows, "test.csv": rows[:7]}.items():
        with (folder.parent / name).open("w", newline="") as stream:
            csv.writer(stream).writerows([["file", "patient", *NAMES], *chosen])
    return folder


def options_for(folder: Path, *further: str) -> list[str]:
    """Options for one epoch on own pictures."""
    options = ["--images", str(folder), "--labels", str(folder.parent / "train.csv"), "--group-column", "patient"]
    options += ["--image-size", "32", "--arch", "squeezenet1_1", "--threads", "1", "--epochs", "1"]
    return [*options, "--batch-size", "4", "--validation-fraction", "0.5", *further]


def tested_options(folder: Path, *further: str) -> list[str]:
    """The same with a test file."""
    test = ["--test-labels", str(folder.parent / "test.csv"), "--test-images", str(folder.with_name("copies"))]
    return options_for(folder, *test, *further)


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The output of a run with a test file."""
    output = folder.parent / "output"
    example.main([*tested_options(folder, "--pos-weight", "auto"), "--output", str(output)])
    return output


def data_of(options: list[str]) -> example.Data:
    """What is trained, validated and tested on."""
    namespace = example.make_parser().parse_args(options)
    example.complete_options(namespace)
    return example.load_pictures(namespace)


def error_of(capsys: pytest.CaptureFixture[str], *options: object) -> str:
    """The message with which the example refuses `options`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        example.main([str(option) for option in options])
    assert exit_info.value.code == 2
    return capsys.readouterr().err.split("error: ", 1)[1]


# --- Training ------------------------------------------------------------------------------------


def test_reports_on_the_test_file_with_tuned_thresholds(folder: Path, trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    data = data_of(tested_options(folder))
    targets = torch.stack([target for _, target in map(data.tested.__getitem__, range(7))])
    assert len(data.tested) == 7
    assert [label["known"] for label in metrics["labels"]] == (targets != -1).sum(dim=0).tolist()
    assert [label["positives"] for label in metrics["labels"]] == (targets == 1).sum(dim=0).tolist()
    assert metrics["test_loss"] != metrics["epochs"][-1]["validation_loss"]
    thresholds = torch.load(trained / "checkpoint.pt", weights_only=True)["thresholds"]
    assert [label["threshold"] for label in metrics["labels"]] == pytest.approx(thresholds.sigmoid().tolist())
    assert (thresholds != 0).any()


def test_names_of_labels_survive(trained: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert [label["label"] for label in metrics["labels"]] == NAMES
    assert len(list(trained.glob("*.png"))) == 3

    # Resumed with nothing left to train: the same bytes, and nothing but its table is printed.
    options = tested_options(folder, "--pos-weight", "auto")
    again = trained.with_name("again")
    example.main([*options, "--output", str(again), "--resume", str(trained / "checkpoint.pt")])
    assert (again / "metrics.json").read_bytes() == (trained / "metrics.json").read_bytes()
    printed = capsys.readouterr()
    assert "warning" not in printed.err
    assert ' two\\nlines, "quoted" ' in printed.out
    assert f"\n{'a' * 29}…  " in printed.out


def test_drawings_show_names_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(-1, 2, (40, len(NAMES)), generator=generator, dtype=torch.int8)
    evaluation = run_report.Evaluation(0.5, torch.randn(targets.shape, generator=generator), targets)
    pictures = [(torch.zeros(3, 8, 8, dtype=torch.uint8), target) for target in targets]
    half = torch.zeros(len(NAMES))
    with plt.rc_context({"text.parse_math": False}):
        curve = run_report._precision_recall(evaluation, run_report.label_metrics(evaluation, NAMES, half))
        grid = run_report._predictions(evaluation, NAMES, half, pictures)
    legend = [text.get_text()[6:] for text in curve.legends[0].get_texts()]
    assert legend == [*NAMES[:4], "a" * 29 + "…", 'two\\nlines, "quoted"']
    titles = [axes.title for axes in grid.axes]
    assert not any(title.get_parse_math() for title in titles)
    lines = [line for title in titles for line in title.get_text().splitlines()]
    assert any("_hidden" in line for line in lines)
    assert max(map(len, lines)) <= 26
    plt.close("all")


def test_predictions_of_many_labels_stay_readable() -> None:
    targets = torch.ones(3, 500, dtype=torch.int8)
    evaluation = run_report.Evaluation(0.5, torch.ones(3, 500), targets)
    pictures = [(torch.zeros(1, 8, 8, dtype=torch.uint8), target) for target in targets]
    grid = run_report._predictions(evaluation, [f"label {n}" for n in range(500)], torch.zeros(500), pictures)
    assert grid.axes[0].title.get_text() == "true label 0, label 1, la…\nsaid label 0, label 1, la…"
    plt.close("all")


def test_groups_stay_together(folder: Path) -> None:
    data = data_of(options_for(folder))
    train, kept = ({int(path.stem) // 3 for path in part.pictures} for part in data.parts.values())
    assert len(train) == len(kept) == 4
    assert not train & kept
    other = data_of(options_for(folder, "--seed", "2"))
    assert {int(path.stem) // 3 for path in other.parts["train"].pictures} != train


def test_refuses_what_leaves_nothing_to_train_or_to_measure(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, options = tmp_path / "labels.csv", ["--images", folder, "--labels", tmp_path / "labels.csv"]
    options += ["--labels-from", "cat:cat", "--output", tmp_path / "new"]
    for lines, further, expected in [
        (["0.png,1,x", "1.png,0,x"], [], f"--labels: {file}: 2 pictures, of which --validation-fraction 0.2 is kept"),
        (["0.png,1,x", "1.png,0,x"], ["--group-column", "g"], f"--labels: {file}: 1 group, of which"),
        ([f"{n}.png,0,x" for n in range(9)], ["--ignore", "x"], "none of the 2 validation pictures has a 1"),
        ([f"{n}.png,{n % 2},1" for n in range(9)], ["--test-labels", tmp_path / "gone"], "--test-labels: "),
        ([f"{n}.png,1,1" for n in range(9)], ["--test-labels", file, "--test-images", "no"], "--test-images: no such"),
        ([f"{n}.png,1,1" for n in range(9)], ["--test-labels", file], f"{file}: names 9 pictures, such as {folder}/0"),
    ]:
        file.write_text("\n".join(["file,cat,g", *lines]))
        assert expected in error_of(capsys, *options, *further)
    assert [path.name for path in tmp_path.iterdir()] == ["labels.csv"]


def test_all_is_checked_before_the_pictures_are_decoded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(example, "white_of", lambda pictures, places: pytest.fail("decoded"))
    for option, value in [
        ("--arch", "resnet19"),
        ("--resume", str(tmp_path / "gone.pt")),
        ("--pos-weight", str(tmp_path / "file")),
        ("--test-labels", str(tmp_path / "gone.csv")),
        ("--output", str(tmp_path / "file" / "new")),
    ]:
        assert error_of(capsys, *options_for(folder), option, value).startswith(option)


def test_a_broken_picture_is_named_with_its_line_or_by_itself_in_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, output = tmp_path / "broken.png", tmp_path / "new"
    broken.touch()
    copy = tmp_path / "labels.csv"
    copy.write_text((folder.parent / "train.csv").read_text() + f"\n{broken},z{',1' * len(NAMES)}\n")
    options = [*options_for(folder), "--labels", copy, "--output", output]
    line = len(copy.read_text().splitlines())
    assert error_of(capsys, *options) == f"--labels: {copy}: line {line}: picture {broken}: the file is empty\n"
    assert not output.exists()
    # It breaks after the check, and what a process says of it is as short. Seed 0 trains on it.
    monkeypatch.setattr(example, "white_of", lambda pictures, places: 255)
    message = error_of(capsys, *options, "--workers", "1", "--validation-fraction", "0.1", "--seed", "0")
    assert message == f"{broken}: cannot identify image file '{broken}'\n"


def test_says_which_labels_cannot_be_learned(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("file,cat,a,b,c,d,e,f\n" + "".join(f"{n}.png,1{',0' * 6}\n" for n in range(9)))
    options = example.make_parser().parse_args(["--images", str(folder), "--labels", str(file), "--device", "cpu:0"])
    example.complete_options(options)
    data = example.load_pictures(options)
    note = "note: labels without a positive in the training part (6): a, b, c, d, e, …\n"
    assert capsys.readouterr().err.startswith(note)
    # Memory is pinned for a GPU alone.
    assert not example.Batches(options, data, None).loader(data.tested).pin_memory


def test_shows_predictions_from_all_over_the_part_the_likeliest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_report, "GRID_ROWS", 1)
    targets = torch.zeros(100, 8, dtype=torch.int8)
    logits = torch.arange(8.0).repeat(100, 1)
    seen = []

    class Pictures:
        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append(int(index))
            return torch.zeros(1, 8, 8, dtype=torch.uint8), targets[index]

    evaluation = run_report.Evaluation(0.5, logits, targets)
    grid = run_report._predictions(evaluation, list("abcdefgh"), torch.full((8,), 4.0), Pictures())
    assert (len(seen), seen[0], seen[-1]) == (8, 0, 99)
    assert {b - a for a, b in itertools.pairwise(seen)} == {14, 15}
    assert grid.axes[0].title.get_text() == "true none\nsaid h, g, f, e"
    plt.close("all")


# --- Predicting ----------------------------------------------------------------------------------


def test_predicts_what_training_has_measured(trained: Path, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "predicted.csv"
    example.main(["predict", str(trained / "checkpoint.pt"), str(folder), "--output", str(file)])
    table = pd.read_csv(file, keep_default_na=False)
    assert list(table.columns) == ["picture", *NAMES, "labels"]
    assert list(table["picture"]) == sorted(str(path) for path in folder.iterdir())

    checkpoint = torch.load(trained / "checkpoint.pt", weights_only=True)
    thresholds = checkpoint["thresholds"].sigmoid().numpy()
    differences = table[NAMES].to_numpy() - thresholds
    said = np.array([[name in labels.split("|") for name in NAMES] for labels in table["labels"]])
    clear = abs(differences) > 1e-6  # the probabilities are rounded
    assert clear.mean() > 0.9
    assert (said == (differences > 0))[clear].all()
    # The F1 of the report, from these predictions.
    metrics = json.loads((trained / "metrics.json").read_text())["labels"]
    test = label_file.read_label_file(
        folder.parent / "test.csv", folder, label_file.Reading(group_column="patient"), labels=NAMES
    )
    table = table.set_index("picture").loc[[str(path) for path in test.pictures]]
    for index, name in enumerate(NAMES):
        known, truth = (test.targets[:, index] != -1).numpy(), (test.targets[:, index] == 1).numpy()
        said = np.array([name in labels.split("|") for labels in table["labels"]])
        right = (said & truth).sum()
        if truth.any():
            f1 = 2 * right / (truth.sum() + (said & known).sum())
            assert metrics[index]["f1"] == pytest.approx(f1)


def test_prints_the_table_without_output(
    trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    arguments = [str(trained / "checkpoint.pt"), str(folder / "3.png"), str(folder / "1.png")]
    predict.main(arguments)
    header, *rows = csv.reader(capfd.readouterr().out.splitlines(keepends=True))
    assert header == ["picture", *NAMES, "labels"]
    assert [row[0] for row in rows] == [str(folder / "3.png"), str(folder / "1.png")]
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        with pytest.raises(SystemExit):
            predict.main(arguments)
    expected = f"error: standard output: cannot be written: {os.strerror(errno.ENOSPC)}\n"
    assert capfd.readouterr().err.endswith(expected)


def test_predicts_the_pictures_of_a_folder_whatever_they_are_called(
    trained: Path, folder: Path, tmp_path: Path
) -> None:
    content = (folder / "1.png").read_bytes()
    names = [b"caf\xe9.png", b"b.PNG", b".hidden.png", b".thumbnails/a.png", b"sub/a.png", b"notes.txt", b"a.pdf"]
    photos = tmp_path / "photos"
    for name in names:
        path = photos / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (photos / "folder.png").mkdir()
    predict.main([str(trained / "checkpoint.pt"), str(photos), "--output", str(tmp_path / "new.csv")])
    written = (tmp_path / "new.csv").read_bytes()
    found = [line.split(b",")[0] for line in written.splitlines() if line.startswith(bytes(tmp_path))]
    assert found == [bytes(photos) + b"/" + name for name in (b"b.PNG", b"caf\xe9.png", b"sub/a.png")]


def test_refuses_what_it_cannot_predict_with(
    trained: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = torch.load(trained / "checkpoint.pt", weights_only=True)
    file, output = tmp_path / "bad.pt", tmp_path / "new.csv"

    def error(*pictures: object, **changed: Any) -> str:
        torch.save({key: value for key, value in (whole | changed).items() if value is not None}, file)
        return error_of(capsys, "predict", file, *pictures, "--output", output)

    picture = folder / "0.png"
    assert (
        error(picture, configuration=None) == f"{file}: is not a checkpoint of this program: it has no configuration\n"
    )
    assert error(picture, thresholds=None) == f"{file}: is not a checkpoint of this program: it has no thresholds\n"
    assert (
        error(picture, configuration={"--seed": 0})
        == f"{file}: its parts do not fit together: KeyError: 'grey value of white'\n"
    )
    weights = dict(whole["state_dict"])
    del weights["model.classifier.1.bias"]
    assert 'Missing key(s) in state_dict: "model.classifier.1.bias"' in error(picture, state_dict=weights)
    assert error(tmp_path / "gone.png") == f"no such picture or folder: {tmp_path}/gone.png\n"
    assert error("x" * 5000) == f"no such picture or folder: {'x' * 5000}\n"
    (tmp_path / "empty").mkdir()
    assert error(tmp_path / "empty") == f"no pictures in {tmp_path}/empty\n"
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:200])
    with pytest.MonkeyPatch.context() as patch:  # before the first is predicted
        patch.setattr(predict.Classifier, "forward", lambda self, pictures: pytest.fail("predicted"))
        assert error(picture, broken).startswith(f"picture {broken}: ")
        for path in (tmp_path, tmp_path / "no" / "new.csv"):
            message = error_of(capsys, "predict", trained / "checkpoint.pt", picture, "--output", path)
            assert message == f"--output: {path}: is a folder, or its folder is not there or not writable\n"
    assert error(picture, "--device", "meta").startswith("--device 'meta' cannot be used")
    assert error(picture, "--batch-size", "0").startswith("argument --batch-size: must be a whole number")
    file.write_text("text")
    assert error_of(capsys, "predict", file, picture).startswith(f"{file}: is not a checkpoint")
    assert not output.exists()
