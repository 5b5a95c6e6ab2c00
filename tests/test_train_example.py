"""The training example, end to end on a handful of tiny pictures.

What is promised there is proven here: the files it leaves, the same result for the same seed and
for a run that was killed and resumed, and a clear error, before anything is touched, for every kind
of bad input.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

torchvision = pytest.importorskip("torchvision")
import digit_canvases  # noqa: E402
import label_file  # noqa: E402
import run_checkpoint  # noqa: E402
import run_report  # noqa: E402
import train_multilabel_resnet as example  # noqa: E402

# Two epochs of four steps: the smallest run that has a middle of its second epoch.
TINY = ["--train-canvases", "16", "--test-canvases", "12", "--batch-size", "4", "--epochs", "2"]
TINY += ["--image-size", "32"]
# More threads make nothing so small faster, and much slower where the cores are busy.
TINY += ["--threads", "1"]
REPORT = {"metrics.json", "timing.json", "curves.png", "precision_recall.png", "predictions.png"}


@pytest.fixture(scope="module", autouse=True)
def keep_threads() -> Iterator[None]:
    """Leave torch's number of threads to other tests as it was."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(output: Path, *options: str, draw: bool = False) -> dict[str, Any]:
    """Run the example in this process and return its metrics; drawing is half of the time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ["_draw_curves", "_draw_precision_recall", "_draw_predictions"]:
            if not draw:
                patch.setattr(run_report, name, lambda *arguments: None)
        example.main([*options, "--output", str(output)])
    metrics: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    return metrics


def error_of(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The message with which the example refuses `options`."""
    with pytest.raises(SystemExit) as exit_info:
        example.main(options)
    assert exit_info.value.code == 2
    return capsys.readouterr().err.split("error: ", 1)[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a whole tiny run."""
    output = tmp_path_factory.mktemp("uninterrupted")
    run(output, *TINY, draw=True)
    return output


# --- The run and its files -----------------------------------------------------------------------


def test_leaves_checkpoint_metrics_and_pictures(uninterrupted: Path) -> None:
    assert {file.name for file in uninterrupted.iterdir()} == REPORT | {"checkpoint.pt"}
    for picture in uninterrupted.glob("*.png"):
        with Image.open(picture) as image:
            pixels = np.asarray(image.convert("L"))
        assert pixels.std() > 1, f"{picture.name} is blank"

    metrics = json.loads((uninterrupted / "metrics.json").read_text())
    assert [label["label"] for label in metrics["labels"]] == list("0123456789")
    assert [epoch["epoch"] for epoch in metrics["epochs"]] == [1, 2]
    assert metrics["epochs"][-1]["mean_average_precision"] == metrics["mean_average_precision"]
    assert metrics["epochs"][-1]["test_loss"] == metrics["test_loss"]
    assert len(json.loads((uninterrupted / "timing.json").read_text())["seconds_per_epoch"]) == 2


def test_same_seed_same_bytes_and_another_seed_not(uninterrupted: Path, tmp_path: Path) -> None:
    first = json.loads((uninterrupted / "metrics.json").read_text())
    run(tmp_path / "again", *TINY)
    assert (tmp_path / "again" / "metrics.json").read_bytes() == (uninterrupted / "metrics.json").read_bytes()
    assert run(tmp_path / "other", *TINY, "--seed", "1")["weights_sha256"] != first["weights_sha256"]


def test_every_epoch_shows_new_train_canvases_and_the_same_test_canvases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_input = example.to_input
    shown: list[bytes] = []

    def recorded(pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
        shown.extend(picture.numpy().tobytes() for picture in pictures)
        return to_input(pictures, device)

    monkeypatch.setattr(example, "to_input", recorded)
    run(tmp_path, *TINY)
    assert len(shown) == 2 * (16 + 12)
    assert len(set(shown)) == 2 * 16 + 12


def test_every_loss_gives_the_same_curve(tmp_path: Path) -> None:
    # One epoch of four steps. The losses differ in their last bits; Adam's first steps have the
    # size of the learning rate whatever the gradient's, so that the smallest gradients, which are
    # noise, turn last bits into steps. A small learning rate keeps that below the tolerance, which
    # is in turn far below what a wrong divisor or a wrong gradient would do.
    options = [*TINY, "--epochs", "1", "--learning-rate", "1e-4"]
    fused, naive, torchs = (
        run(tmp_path / loss, *options, "--loss", loss)["epochs"][0] for loss in ("fused", "naive", "torch")
    )
    for other in (naive, torchs):
        assert other["train_loss"] == pytest.approx(fused["train_loss"], rel=1e-3)
        assert other["test_loss"] == pytest.approx(fused["test_loss"], rel=1e-3)


def test_the_losses_are_sums_over_known_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, generator=generator)
    targets = torch.randint(2, (7, 5), generator=generator).float()
    known = torch.randint(2, (7, 5), generator=generator).float()
    exact_input = logits.double().requires_grad_()
    exact = (torch.nn.functional.softplus(exact_input) - exact_input * targets) * known
    (exact_gradient,) = torch.autograd.grad(exact.sum(), exact_input)
    for name, loss in example.LOSSES.items():
        input = logits.clone().requires_grad_()
        value = loss(input, targets, known)
        (gradient,) = torch.autograd.grad(value, input)
        torch.testing.assert_close(value.detach().double(), exact.sum().detach(), msg=name)
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-6)
        assert (gradient[known == 0] == 0).all()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(example.LOSSES, "torch", lambda x, t, known: x.sum() * float("nan"))
    with pytest.raises(SystemExit, match=r"no longer finite in epoch 1.*--learning-rate"):
        run(tmp_path, *TINY, "--loss", "torch")
    assert not (tmp_path / "checkpoint.pt").exists()


# --- Resuming ------------------------------------------------------------------------------------

# Runs the example and kills its process, as a machine does that is taken away: in the middle of the
# second epoch (7th call of the loss: 4 steps and 3 test batches of the first epoch come before).
KILLED_IN_SECOND_EPOCH = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import train_multilabel_resnet as example
calls, fused_loss = 0, example.LOSSES["fused"]
def loss(logits, targets, known):
    global calls
    calls += 1
    if calls == 4 + 3 + 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return fused_loss(logits, targets, known)
example.LOSSES["fused"] = loss
example.main()
"""


def test_killed_in_mid_epoch_and_resumed_ends_the_same(uninterrupted: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED_IN_SECOND_EPOCH, str(EXAMPLES)]
    killed = subprocess.run([*command, *TINY, "--output", str(output)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert {file.name for file in output.iterdir()} == {"checkpoint.pt"}

    run(output, *TINY, "--resume")
    assert (output / "metrics.json").read_bytes() == (uninterrupted / "metrics.json").read_bytes()

    # Resumed once more, with nothing left to train: the same report again.
    (output / "metrics.json").unlink()
    elsewhere = tmp_path / "elsewhere"
    run(elsewhere, *TINY, "--resume", str(output / "checkpoint.pt"))
    assert (elsewhere / "metrics.json").read_bytes() == (uninterrupted / "metrics.json").read_bytes()


def test_dropout_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A ResNet draws no random numbers in training; this loss does, from the generator of dropout.
    def noisy(logits: torch.Tensor, targets: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        return example.torch_loss(torch.nn.functional.dropout(logits), targets, known)

    monkeypatch.setitem(example.LOSSES, "torch", noisy)
    options = [*TINY, "--loss", "torch"]
    whole = run(tmp_path / "whole", *options)

    evaluate = example.Run.evaluate
    epochs: list[int] = []

    def interrupted(self: example.Run) -> run_report.Evaluation:
        epochs.append(len(epochs))
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return evaluate(self)

    with monkeypatch.context() as patch:
        patch.setattr(example.Run, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", *options)
    torch.manual_seed(12345)
    assert run(tmp_path / "parts", *options, "--resume") == whole


def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "checkpoint.pt"
    run_checkpoint.save_checkpoint(file, {"epoch": 1})

    def half_written(state: object, stream: Any) -> None:
        stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OSError, match="disk full"):
        run_checkpoint.save_checkpoint(file, {"epoch": 2})
    assert run_checkpoint.load_checkpoint(file)["epoch"] == 1


def test_refuses_a_checkpoint_of_other_options(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(uninterrupted / "checkpoint.pt")
    options = [*TINY, "--epochs", "3", "--loss", "naive", "--output", str(tmp_path / "new")]
    message = error_of(capsys, *options, "--resume", checkpoint)
    assert f"--resume: {checkpoint}: was written with" in message
    assert "--loss fused, not naive" in message
    assert "--epochs 2, not 3" in message
    assert "--seed" not in message
    assert not (tmp_path / "new").exists()


def test_refuses_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "checkpoint.pt"
    options = [*TINY, "--output", str(tmp_path), "--resume"]
    assert f"--resume: {file}: cannot be read: No such file" in error_of(capsys, *options)
    file.write_text("not a checkpoint")
    assert f"--resume: {file}: is not a checkpoint" in error_of(capsys, *options)
    torch.save({"model": {}}, file)
    assert f"--resume: {file}: is not a checkpoint" in error_of(capsys, *options)


# --- The canvases --------------------------------------------------------------------------------


def test_train_and_test_canvases_show_different_scans() -> None:
    train, test = (
        digit_canvases.DigitCanvases(train=train, count=1, image_size=48, seed=3).scans for train in (True, False)
    )
    assert not set(train.ids) & set(test.ids)
    assert sorted([*train.ids, *test.ids]) == list(range(1797))
    assert set(train.digits) == set(test.digits) == set(range(10))
    # By their pixels, too. The scans themselves hold a few that are equal to the bit; none of them
    # may stand on both sides unless scikit-learn has it twice.
    seen = {picture.tobytes() for picture in train.pictures}
    assert not any(picture.tobytes() in seen for picture in test.pictures)


def test_canvases_depend_on_seed_part_epoch_and_index_alone() -> None:
    def canvases(train: bool, seed: int = 0, epoch: int = 1) -> list[bytes]:
        pictures = digit_canvases.DigitCanvases(train=train, count=8, image_size=48, seed=seed)
        pictures.set_epoch(epoch)
        # Backwards: the order must not matter.
        return [pictures[index][0].numpy().tobytes() for index in reversed(range(8))][::-1]

    assert canvases(True) == canvases(True)
    assert len(set(canvases(True) + canvases(True, epoch=2) + canvases(True, seed=1))) == 24
    assert canvases(False) == canvases(False, epoch=2)


def test_a_canvas_shows_one_to_four_digits_and_says_which() -> None:
    pictures = digit_canvases.DigitCanvases(train=True, count=200, image_size=48, seed=0)
    sizes = set()
    for picture, targets, known in (pictures[index] for index in range(len(pictures))):
        assert picture.shape == (1, 48, 48)
        assert picture.dtype == torch.uint8
        assert targets.shape == (10,)
        assert known.eq(1).all()
        sizes.add(int(targets.sum()))
    assert sizes == {1, 2, 3, 4}


def test_batches_hold_every_picture_once_and_none_holds_just_one() -> None:
    for count in (2, 5, 8, 9):
        batches = example.shuffled_batches(count, 4, seed=0, epoch=1)
        assert sorted(index for batch in batches for index in batch) == list(range(count))
        assert min(map(len, batches)) > 1
    assert example.shuffled_batches(9, 4, 0, 1) != example.shuffled_batches(9, 4, 0, 2)


# --- The user's own pictures ---------------------------------------------------------------------

Pictures = Callable[[Sequence[str]], list[str]]


@pytest.fixture
def own(tmp_path: Path) -> Pictures:
    """Writes the lines of a label file, beside twelve pictures, and returns the options for it."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(12):
        # Colour, grey and transparent ones, none of them square.
        shape = [(40, 30, 3), (30, 40), (20, 50, 4)][index % 3]
        pixels = random.integers(256, size=shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")

    def write(lines: Sequence[str]) -> list[str]:
        file = tmp_path / "labels.csv"
        file.write_text("\n".join(lines) + "\n")
        return [
            "--images",
            str(folder),
            "--labels",
            str(file),
            "--image-size",
            "32",
            "--threads",
            "1",
        ]

    return write


def rows(*values: str) -> list[str]:
    """A label file with two labels, `values` of the first pictures and 1,0 of the others."""
    return ["file,cat,dog", *(f"{i}.png,{v}" for i, v in enumerate([*values, *["1,0"] * 12][:12]))]


def test_own_pictures_with_unknown_labels(own: Pictures, tmp_path: Path) -> None:
    options = own(rows("1,", ",1", "0,0", "0,", ",", "1,1", ",0"))
    options += ["--batch-size", "4", "--epochs", "1", "--validation-fraction", "0.5"]
    metrics = run(tmp_path / "first", *options, draw=True)
    assert [label["label"] for label in metrics["labels"]] == ["cat", "dog"]

    # The metrics count exactly the known values of the pictures that were kept for testing.
    train, test = parts(options)
    assert len(train) == len(test) == 6
    known = test.known.sum(dim=0).tolist()
    assert [label["known"] for label in metrics["labels"]] == known
    assert [label["positives"] for label in metrics["labels"]] == (test.targets.sum(dim=0).tolist())
    assert 0 < sum(known) < 12
    assert not set(train.pictures) & set(test.pictures)
    assert run(tmp_path / "second", *options) == metrics
    assert parts([*options, "--seed", "1"])[1].pictures != test.pictures


def parts(
    options: Sequence[str],
) -> tuple[label_file.LabelledPictures, label_file.LabelledPictures]:
    """The pictures to train and to test on."""
    namespace = example.make_parser().parse_args(options)
    example.complete_options(namespace)
    data = example.load_data(namespace)
    assert isinstance(data.train, label_file.LabelledPictures)
    assert isinstance(data.test, label_file.LabelledPictures)
    return data.train, data.test


def test_what_is_unknown_is_left_out_of_the_metrics() -> None:
    logits = torch.tensor([[3.0, -1.0], [2.0, 1.0], [1.0, 2.0], [-1.0, 3.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    known = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    evaluation = run_report.Evaluation(0.0, logits, targets, known)
    first, second = run_report.label_metrics(evaluation, ["a", "b"])
    # The second picture would be a false positive, between the two true ones.
    assert first == run_report.LabelMetrics("a", 3, 2, 1.0, 1.0, 1.0, 1.0)
    # Without a single positive there is nothing to recall.
    assert second == run_report.LabelMetrics("b", 3, 0, None, None, None, None)
    assert run_report.mean_average_precision([first, second]) == 1.0


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (rows("1,0", "1,0", "1,2"), "line 4: 'dog' must be 0, 1 or empty, got '2'"),
        (rows("1,0", "1,0", "1,yes"), "line 4: 'dog' must be 0, 1 or empty, got 'yes'"),
        (rows("1,0", "1"), "line 3: 2 values, but the header has 3"),
        (rows("1,0", "1,0,1"), "line 3: 4 values, but the header has 3"),
        ([*rows(), "gone.png,1,0"], "line 14: no picture 'gone.png' in "),
        ([*rows(), "", "gone.png,1,0"], "line 15: no picture 'gone.png' in "),
        ([*rows(), ",1,0"], "line 14: no picture is named"),
        ([*rows(), "./3.png,1,0"], "line 14: '3.png' is already on line 5"),
        ([*rows(), "broken.png,1,0"], "line 14: picture "),
        ([*rows(), '"0.png,1,0'], "line 14: unexpected end of data"),
        (["file,cat,dog"], "has a header but no rows"),
        ([], "is empty"),
        (["file;cat;dog", "0.png;1;0"], "line 1: the header must name a file column and at least"),
        (["file,cat,", "0.png,1,0"], "line 1: column 3 has no name"),
        (["file,cat,cat", "0.png,1,0"], "line 1: 2 columns are called 'cat'"),
        ([rows()[0], *(f"{i}.png,1," for i in range(12))], "no row has a value for 'dog'"),
        (rows()[:3], "too few are left to train on"),
        (rows(*["0,0"] * 12), "none of the 2 pictures kept for testing has a 1"),
    ],
)
def test_refuses_a_bad_label_file(
    lines: list[str],
    expected: str,
    own: Pictures,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = (tmp_path / "pictures" / "0.png").read_bytes()
    (tmp_path / "pictures" / "broken.png").write_bytes(whole[: len(whole) // 2])
    message = error_of(capsys, *own(lines), "--output", str(tmp_path / "new"))
    assert message.startswith(f"--labels: {tmp_path / 'labels.csv'}")
    assert expected in message
    assert not (tmp_path / "new").exists()


def test_reports_several_problems_at_once(own: Pictures, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, *own(rows(*["2,0"] * 12)))
    assert "line 2: 'cat'" in message
    assert "line 11: 'cat'" in message
    assert "line 12" not in message
    assert "and 2 more problems" in message


def test_reads_what_spreadsheets_write(own: Pictures, tmp_path: Path) -> None:
    options = own([])
    text = "\r\n".join(['file,"cat, big",dog', '"0.png", 1 ,0', "1.png,,1", ""])
    (tmp_path / "labels.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    content = label_file.read_label_file(tmp_path / "labels.csv", Path(options[1]))
    assert content.labels == ("cat, big", "dog")
    assert content.targets.tolist() == [[1, 0], [0, 1]]
    assert content.known.tolist() == [[1, 1], [0, 1]]
    (tmp_path / "labels.csv").write_bytes(b"file,cat\n0.png,1\n\xe9.png,1\n")
    with pytest.raises(label_file.LabelFileError, match="line 3: not UTF-8"):
        label_file.read_label_file(tmp_path / "labels.csv", Path(options[1]))


# --- Options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--epochs", "0"], "argument --epochs: must be a whole number of at least 1, got '0'"),
        (["--batch-size", "1.5"], "argument --batch-size: must be a whole number of at least 2"),
        (["--learning-rate", "-1"], "argument --learning-rate: must be a number above 0"),
        (["--seed", "4294967296"], "--seed must be below 2**32, got 4294967296"),
        (["--loss", "mse"], "argument --loss: invalid choice: 'mse'"),
        (["--arch", "resnet19"], "--arch: torchvision has no classifier 'resnet19'; did you mean"),
        (["--device", "abacus"], "--device 'abacus' cannot be used"),
        (["--image-size", "20"], "--image-size: a canvas needs a side of at least 24 pixels"),
        (["--arch", "alexnet", "--image-size", "24"], "cannot take pictures of --image-size 24"),
        (["--images", "nowhere"], "--images needs --labels beside it"),
        (["--labels", "nowhere.csv"], "--labels needs --images beside it"),
        (["--images", "nowhere", "--labels", "x.csv"], "--images: no such folder: nowhere"),
        (["--images", ".", "--labels", "nowhere.csv"], "nowhere.csv: cannot be read: No such"),
        (
            ["--images", ".", "--labels", "x.csv", "--test-canvases", "5"],
            "--test-canvases does not go with --images",
        ),
        (["--validation-fraction", "0.5"], "--validation-fraction needs --images and --labels"),
        (["--output", "file", "--train-canvases", "2"], "--output: file: File exists"),
    ],
)
def test_refuses_bad_options(
    options: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert expected in error_of(capsys, *options)
    assert os.listdir(tmp_path) == ["file"]


def test_says_when_pretrained_weights_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(arch: str, weights: str | None) -> torch.nn.Module:
        assert weights == "DEFAULT"
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    message = error_of(capsys, *TINY, "--pretrained")
    assert message.startswith("--pretrained: no weights for resnet18: no network")
