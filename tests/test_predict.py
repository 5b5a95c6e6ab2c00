"""The training example on the user's own pictures, and the prediction of their labels with its checkpoint."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torchvision")
import label_file
import pandas as pd
import predict
import run_report
import train_multilabel_resnet as example
from matplotlib import pyplot as plt

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
    """A folder with pictures, and beside it two label files, of these and of some of them for testing."""
    folder = tmp_path_factory.mktemp("own") / "pictures"
    folder.mkdir()
    values, pixels = random.Random(0), np.random.default_rng(0)
    rows = []
    for index in range(PICTURES):
        shape = [(40, 30, 3), (30, 40), (20, 50, 4)][index % 3]
        Image.fromarray(pixels.integers(256, size=shape, dtype=np.uint8)).save(folder / f"{index}.png")
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


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The output of a run with a test file."""
    output = folder.parent / "output"
    options = options_for(folder, "--test-labels", str(folder.parent / "test.csv"), "--pos-weight", "auto")
    example.main([*options, "--output", str(output)])
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
    data = data_of(options_for(folder, "--test-labels", str(folder.parent / "test.csv")))
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
    options = options_for(folder, "--test-labels", str(folder.parent / "test.csv"), "--pos-weight", "auto")
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
        (["0.png,1,x", "1.png,0,x"], ["--group-column", "g"], f"--labels: {file}: 1 groups in column 'g', of which"),
        ([f"{n}.png,0,x" for n in range(9)], ["--ignore", "x"], "none of the 2 validation pictures has a 1"),
        ([f"{n}.png,{n % 2},1" for n in range(9)], ["--test-labels", tmp_path / "gone"], "--test-labels: "),
        ([f"{n}.png,1,1" for n in range(9)], ["--test-labels", file, "--test-images", "no"], "--test-images: no such"),
    ]:
        file.write_text("\n".join(["file,cat,g", *lines]))
        assert expected in error_of(capsys, *options, *further)
    assert [path.name for path in tmp_path.iterdir()] == ["labels.csv"]


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


def test_prints_the_table_without_output(trained: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    predict.main([str(trained / "checkpoint.pt"), str(folder / "3.png"), str(folder / "1.png")])
    header, *rows = csv.reader(capsys.readouterr().out.splitlines(keepends=True))
    assert header == ["picture", *NAMES, "labels"]
    assert [row[0] for row in rows] == [str(folder / "3.png"), str(folder / "1.png")]


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
    assert error(picture, configuration={"--seed": 0}) == f"{file}: its configuration lacks '--arch'\n"
    weights = dict(whole["state_dict"])
    del weights["model.classifier.1.bias"]
    assert 'Missing key(s) in state_dict: "model.classifier.1.bias"' in error(picture, state_dict=weights)
    assert error(tmp_path / "gone.png") == f"no such picture or folder: {tmp_path}/gone.png\n"
    assert error("x" * 5000) == f"no such picture or folder: {'x' * 5000}\n"
    (tmp_path / "empty").mkdir()
    assert error(tmp_path / "empty") == f"no pictures in {tmp_path}/empty\n"
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:200])
    assert error(picture, broken).startswith(f"picture {broken}: ")
    assert error(picture, "--device", "meta").startswith("--device 'meta' cannot be used")
    assert error(picture, "--batch-size", "0").startswith("argument --batch-size: must be a whole number")
    file.write_text("text")
    assert error_of(capsys, "predict", file, picture).startswith(f"{file}: is not a checkpoint")
    assert not output.exists()
