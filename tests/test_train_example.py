"""The training example, end to end on a handful of tiny pictures.

What is promised there is proven here: the files it leaves, the same result for the same seed and for a run that was
killed and resumed, and a clear error, before anything is touched, for every kind of bad input. `test_predict.py` goes
on with the user's own pictures.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

torchvision = pytest.importorskip("torchvision")
import classifier  # noqa: E402
import digit_canvases  # noqa: E402
import run_report  # noqa: E402
import train_multilabel_resnet as example  # noqa: E402
from PIL import Image  # noqa: E402
from sklearn.metrics import precision_recall_fscore_support  # noqa: E402

# Two epochs of four steps: the smallest run that has a middle of its second epoch. The model is small, and has batch
# norm and dropout; more threads make nothing so small faster, and much slower where the cores are busy.
TINY = ["--train-canvases", "16", "--test-canvases", "12", "--batch-size", "4", "--epochs", "2"]
TINY += ["--image-size", "32", "--threads", "1", "--arch", "mobilenet_v3_small"]
REPORT = {"metrics.json", "timing.json", "curves.png", "precision_recall.png", "predictions.png"}


@pytest.fixture(scope="module", autouse=True)
def keep_threads() -> Iterator[None]:
    """Leave torch's number of threads to other tests as it was."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(output: Path, *options: str) -> dict[str, Any]:
    """Run the example in this process, without drawing, and return its metrics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_report, "_draw", lambda file, drawing: None)
        example.main([*options, "--output", str(output)])
    metrics: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    return metrics


def error_of(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The message with which the example refuses `options`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        example.main(options)
    assert exit_info.value.code == 2
    return capsys.readouterr().err.split("error: ", 1)[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a whole tiny run; what it printed is in printed.txt beside it."""
    output = tmp_path_factory.mktemp("uninterrupted") / "output"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        example.main([*TINY, "--output", str(output)])
    output.with_name("printed.txt").write_text(printed.getvalue())
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
    assert {label["threshold"] for label in metrics["labels"]} == {0.5}
    assert [epoch["epoch"] for epoch in metrics["epochs"]] == [1, 2]
    assert metrics["epochs"][-1]["mean_average_precision"] == metrics["mean_average_precision"]
    assert metrics["epochs"][-1]["validation_loss"] == metrics["test_loss"]
    shares = [label["positives"] / label["known"] for label in metrics["labels"] if label["positives"]]
    assert metrics["base_rate"] == pytest.approx(sum(shares) / len(shares))
    # The learning rates of the last steps; the schedule itself is then one step further.
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=example.LEARNING_RATE, total_steps=8)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert [epoch["learning_rate"] for epoch in metrics["epochs"]] == pytest.approx([rates[3], rates[7]])
    assert len(json.loads((uninterrupted / "timing.json").read_text())["seconds_per_epoch"]) == 2


def test_prints_its_table_and_no_warnings(uninterrupted: Path) -> None:
    printed = uninterrupted.with_name("printed.txt").read_text()
    table = [line for line in printed.replace("\r", "\n").splitlines() if line.strip() and "batch/s" not in line]
    assert table[0] == "canvases of digits, 10 labels"
    assert table[1] == "16 train, 12 validation pictures; mobilenet_v3_small, fused loss"
    assert table[2] == run_report.TABLE_HEADER
    assert [line.split()[0] for line in table[3:6]] == ["1", "2", "label"]
    assert table[-1].startswith("mAP ")
    assert len(table) == 5 + 1 + 10 + 1


def test_same_seed_same_bytes_and_another_seed_not(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = classifier.Classifier.forward
    seen: list[bytes] = []

    def recorded(self: classifier.Classifier, pictures: torch.Tensor) -> torch.Tensor:
        seen.extend(picture.numpy().tobytes() for picture in pictures)
        return forward(self, pictures)

    monkeypatch.setattr(classifier.Classifier, "forward", recorded)
    first = run(tmp_path / "again", *TINY)
    assert (tmp_path / "again" / "metrics.json").read_bytes() == (uninterrupted / "metrics.json").read_bytes()
    # Every epoch shows new train canvases, and the same test canvases.
    assert len(seen) == 2 * (16 + 12)
    assert len(set(seen)) == 2 * 16 + 12
    assert run(tmp_path / "other", *TINY, "--seed", "1")["weights_sha256"] != first["weights_sha256"]


def test_the_losses_are_sums_over_known_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, generator=generator)
    targets = torch.randint(-1, 2, (7, 5), generator=generator, dtype=torch.int8)
    known, truth = targets != -1, targets.clamp(min=0)
    for pos_weight in (None, torch.rand(5, generator=generator) * 3):
        exact_input = logits.double().requires_grad_()
        factor = 1 if pos_weight is None else torch.where(targets == 1, pos_weight, 1.0)
        exact = (torch.nn.functional.softplus(exact_input) - exact_input * truth) * known * factor
        (exact_gradient,) = torch.autograd.grad(exact.sum(), exact_input)
        for name in ("fused", "naive", "torch"):
            input = logits.clone().requires_grad_()
            value = classifier.LOSSES[name](input, targets, pos_weight=pos_weight)
            (gradient,) = torch.autograd.grad(value, input)
            torch.testing.assert_close(value.detach().double(), exact.sum().detach(), msg=name)
            torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-6)
            assert (gradient[~known] == 0).all()
    p = logits.double().sigmoid()
    q = (p - 0.05).clamp(min=0)
    focal = torch.where(truth == 1, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())
    asymmetric = torch.where(truth == 1, -(1 - p) * p.log(), -(q**4) * (1 - q).log())
    for name, exact in {"focal": focal, "asymmetric": asymmetric}.items():
        value = classifier.LOSSES[name](logits, targets, pos_weight=None)
        torch.testing.assert_close(value.double(), exact[known].sum(), rtol=1e-5, atol=1e-6, msg=name)


def test_a_step_divides_by_the_known_labels_and_never_by_zero() -> None:
    options = example.make_parser().parse_args(TINY)
    example.complete_options(options)
    configuration = example.configuration_of(options, example.load_canvases(options))
    module = classifier.Classifier(configuration, ["a", "b"]).eval()
    pictures = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    one, none = (torch.tensor([targets], dtype=torch.int8) for targets in ([1, -1], [-1, -1]))
    alone, twice, unknown = (
        module.training_step((pictures[: len(targets)], targets), 0).item() for targets in (one, one.repeat(2, 1), none)
    )
    assert alone == pytest.approx(twice, rel=1e-5)
    assert alone > 0
    assert unknown == 0


def test_a_loss_that_is_not_finite_stops_the_run(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("checkpoint.pt", *REPORT):
        (tmp_path / name).write_text("previous")
    monkeypatch.setitem(classifier.LOSSES, "torch", lambda x, t, pos_weight: x.sum() * float("nan"))
    with pytest.raises(SystemExit, match=r"train loss is no longer finite in epoch 1: nan.*--learning-rate"):
        run(tmp_path, *TINY, "--loss", "torch")
    # The report of the run before goes at once: it would stand beside a checkpoint of this run.
    assert os.listdir(tmp_path) == ["checkpoint.pt"]
    assert (tmp_path / "checkpoint.pt").read_text() == "previous"


def test_says_when_the_disk_is_full(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint.pt").write_text("previous")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        assert error_of(capsys, *TINY, "--output", str(tmp_path)) == f"--output: {tmp_path}: File too large\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "checkpoint.pt").read_text() == "previous"
    assert os.listdir(tmp_path) == ["checkpoint.pt"]

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # With nothing left to train, metrics.json is the first file.
    monkeypatch.setattr(os, "fsync", full)
    options = [*TINY, "--output", str(tmp_path), "--resume", str(uninterrupted / "checkpoint.pt")]
    assert error_of(capsys, *options) == f"--output: {tmp_path}: No space left on device\n"
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


# --- Resuming ------------------------------------------------------------------------------------

# Runs the example and kills its process, as a machine does that is taken away: in the middle of the
# second epoch (10th call of the loss: 4 steps and 3 test batches of the first epoch come before).
KILLED_IN_SECOND_EPOCH = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import classifier, train_multilabel_resnet
calls, fused_loss = 0, classifier.LOSSES["fused"]
def loss(*arguments, **options):
    global calls
    calls += 1
    if calls == 4 + 3 + 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return fused_loss(*arguments, **options)
classifier.LOSSES["fused"] = loss
train_multilabel_resnet.main()
"""


def test_killed_in_mid_epoch_and_resumed_ends_the_same(uninterrupted: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED_IN_SECOND_EPOCH, str(EXAMPLES)]
    killed = subprocess.run([*command, *TINY, "--output", str(output)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert {file.name for file in output.iterdir()} == {"checkpoint.pt"}

    torch.manual_seed(12345)  # dropout's random numbers are not those that happen to come next
    run(output, *TINY, "--resume", "--workers", "1")
    assert (output / "metrics.json").read_bytes() == (uninterrupted / "metrics.json").read_bytes()

    # Resumed once more, with nothing left to train: the same report again.
    (output / "metrics.json").unlink()
    elsewhere = tmp_path / "elsewhere"
    run(elsewhere, *TINY, "--resume", str(output / "checkpoint.pt"))
    assert (elsewhere / "metrics.json").read_bytes() == (uninterrupted / "metrics.json").read_bytes()


def test_a_terminated_run_does_not_exit_as_if_it_were_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(logits: torch.Tensor, targets: torch.Tensor, pos_weight: None) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return logits.sum()

    monkeypatch.setitem(classifier.LOSSES, "torch", terminated)
    with pytest.raises(SystemExit) as exit_info:
        run(tmp_path, *TINY, "--loss", "torch")
    assert exit_info.value.code == 128 + signal.SIGTERM
    assert not any(tmp_path.iterdir())


def test_refuses_a_checkpoint_of_other_options(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(uninterrupted / "checkpoint.pt")
    options = [*TINY, "--epochs", "3", "--loss", "naive", "--pos-weight", "auto", "--output", str(tmp_path / "new")]
    message = error_of(capsys, *options, "--resume", checkpoint)
    assert f"--resume: {checkpoint}: was written with" in message
    assert "--loss fused, not naive" in message
    assert "--epochs 2, not 3" in message
    assert "--pos-weight with sha256 unset, not " in message
    assert "--seed" not in message
    assert not (tmp_path / "new").exists()


class Code:
    """Unpickled, it would run a command."""

    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def test_refuses_what_is_no_checkpoint(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "bad.pt"
    options = [*TINY, "--output", str(tmp_path / "new"), "--resume", str(file)]
    assert error_of(capsys, *options) == f"--resume: {file}: cannot be read: No such file or directory\n"
    file.write_text("not a checkpoint")
    assert f"--resume: {file}: is not a checkpoint" in error_of(capsys, *options)
    torch.save({"state_dict": Code()}, file)
    assert f"--resume: {file}: is not a checkpoint" in error_of(capsys, *options)

    whole = torch.load(uninterrupted / "checkpoint.pt", weights_only=True)
    torch.save({key: value for key, value in whole.items() if key != "configuration"}, file)
    assert error_of(capsys, *options).endswith("is not a checkpoint of this program: it has no configuration\n")
    name = "model.classifier.3.bias"
    bias = whole["state_dict"].pop(name)
    torch.save(whole, file)
    assert f'Missing key(s) in state_dict: "{name}"' in error_of(capsys, *options)
    whole["state_dict"][name] = bias[:-1]
    torch.save(whole, file)
    assert f"size mismatch for {name}" in error_of(capsys, *options)
    whole["state_dict"][name] = bias
    for key, wrong in {
        "configuration": [],
        "thresholds": torch.zeros(3),
        "history": [{"epoch": 1}],
    }.items():
        torch.save(whole | {key: wrong}, file)
        assert f"--resume: {file}: its parts do not fit together: " in error_of(capsys, *options), key
    configuration = whole["configuration"] | {"grey value of white": 4095}
    torch.save(whole | {"configuration": configuration}, file)
    assert "was written with grey value of white 4095, not 255" in error_of(capsys, *options)
    assert os.listdir(tmp_path) == ["bad.pt"]


# --- The canvases --------------------------------------------------------------------------------


def test_train_and_test_canvases_show_different_scans() -> None:
    train, test = (digit_canvases.DigitCanvases(train=train, count=1, image_size=48, seed=3) for train in (True, False))
    assert not set(train.scans) & set(test.scans)
    assert sorted([*train.scans, *test.scans]) == list(range(1797))
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
    for picture, targets in (pictures[index] for index in range(len(pictures))):
        assert picture.shape == (1, 48, 48)
        assert picture.dtype == torch.uint8
        assert targets.shape == (10,)
        assert targets.dtype == torch.int8
        sizes.add(int(targets.sum()))
    assert sizes == {1, 2, 3, 4}


def test_batches_hold_every_picture_once_and_none_holds_just_one() -> None:
    for count in (2, 5, 8, 9):
        options = example.make_parser().parse_args(["--train-canvases", str(count), "--batch-size", "4"])
        example.complete_options(options)
        data = example.load_canvases(options)
        orders = []
        for epoch in (1, 2):
            batches = example.Batches(options, data, SimpleNamespace(history=[None] * epoch))
            of_epoch = list(batches.train_dataloader().batch_sampler)
            assert min(map(len, of_epoch)) > 1
            orders.append([index for batch in of_epoch for index in batch])
            assert len(set(orders[-1])) == len(orders[-1]) == count - (count in (5, 9))
        if count > 2:
            assert orders[0] != orders[1]


# --- The report ----------------------------------------------------------------------------------


def test_what_is_unknown_is_left_out_of_the_metrics() -> None:
    logits = torch.tensor([[3.0, -1.0], [2.0, 1.0], [1.0, 2.0], [-1.0, 3.0]])
    targets = torch.tensor([[1, 0], [-1, 0], [1, 0], [0, -1]], dtype=torch.int8)
    evaluation = run_report.Evaluation(0.0, logits, targets)
    first, second = run_report.label_metrics(evaluation, ["a", "b"], torch.zeros(2))
    # The second picture would be a false positive, between the two true ones.
    assert first == run_report.LabelMetrics("a", 3, 2, 0.5, 1.0, 1.0, 1.0, 1.0)
    # Without a single positive there is nothing to recall.
    assert second == run_report.LabelMetrics("b", 3, 0, 0.5)
    assert run_report.mean_average_precision([first, second]) == 1.0
    assert run_report.base_rate([first, second]) == 2 / 3


def test_thresholds_have_the_best_f1_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 3, generator=generator) - 2
    targets = torch.randint(-1, 2, (40, 3), generator=generator, dtype=torch.int8)
    targets[:, 2] = targets[:, 2].clamp(max=0)
    evaluation = run_report.Evaluation(0.0, logits, targets)
    best = run_report.best_thresholds(evaluation)
    assert best[2] == 0
    for index, m in enumerate(run_report.label_metrics(evaluation, "abc", best)[:2]):
        truth, of_label = evaluation.of_label(index)
        of_sklearn = precision_recall_fscore_support(truth, of_label >= best[index].numpy(), average="binary")
        assert (m.precision, m.recall, m.f1) == pytest.approx(of_sklearn[:3])
    for label in (0, 1):
        scores = {
            float(logit): run_report.label_metrics(evaluation, "abc", torch.full((3,), float(logit)))[label].f1
            for logit in logits[:, label]
        }
        assert run_report.label_metrics(evaluation, "abc", best)[label].f1 == max(scores.values())
        assert float(best[label]) not in scores


def test_a_label_that_is_ranked_badly_is_not_predicted_on_everything() -> None:
    logits = torch.arange(40, dtype=torch.float32).view(40, 1).repeat(1, 2) - 50
    targets = torch.zeros(40, 2, dtype=torch.int8)
    targets[5, 0] = targets[36, 1] = 1  # F1 of 2 / 36 and of 2 / 5
    assert run_report.best_thresholds(run_report.Evaluation(0.0, logits, targets)).tolist() == [0, -14.5]


def test_the_table_of_many_labels_is_short() -> None:
    metrics = [run_report.LabelMetrics(f"label {n}", 500, n, 0.5) for n in range(300)]
    lines = run_report.label_table(metrics).splitlines()
    assert len(lines) == 1 + 20 + 1
    assert lines[1].startswith("label 299 ")
    assert lines[-1] == "and 280 more: see metrics.json"


def test_a_drawing_that_fails_is_a_warning(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object) -> None:
        raise ValueError("no font")

    monkeypatch.setattr(run_report, "_curves", broken)
    example.main([*TINY, "--output", str(tmp_path), "--resume", str(uninterrupted / "checkpoint.pt")])
    assert {file.name for file in tmp_path.iterdir()} == REPORT - {"curves.png"}
    assert capsys.readouterr().err == f"warning: {tmp_path}/curves.png was not drawn: ValueError: no font\n"


# --- Options -------------------------------------------------------------------------------------

LONG = "x" * 5000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--epochs", "0"], "argument --epochs: must be a whole number of at least 1, got '0'"),
        (["--batch-size", "1.5"], "argument --batch-size: must be a whole number of at least 2"),
        (["--learning-rate", "-1"], "argument --learning-rate: must be a number of at least 1e-12 and below 10"),
        (["--learning-rate", "nan"], "argument --learning-rate: must be a number of at least 1e-12"),
        (["--seed", "4294967296"], "--seed: must be a whole number of at least 0 and below 4294967296, got"),
        (["--loss", "mse"], "argument --loss: invalid choice: 'mse'"),
        (["--loss", "focal", "--pos-weight", "auto"], "--pos-weight does not go with --loss focal"),
        (["--pos-weight", "gone.csv"], "--pos-weight: gone.csv: cannot be read: No such file"),
        (["--arch", "resnet19"], "--arch: torchvision has no classifier 'resnet19'; did you mean"),
        (["--device", "abacus"], "--device 'abacus' cannot be used"),
        (["--device", "meta"], "--device 'meta' cannot be used: must be cpu, cuda, cuda:1"),
        (["--image-size", "20"], "--image-size: a canvas needs a side of at least 24 pixels"),
        (["--arch", "alexnet", "--image-size", "24"], "cannot take pictures of --image-size 24"),
        (["--images", "nowhere"], "--images needs --labels beside it"),
        (["--labels", "nowhere.csv"], "--labels needs --images beside it"),
        (["--images", "nowhere", "--labels", "x.csv"], "--images: no such folder: nowhere"),
        (["--images", LONG, "--labels", "x.csv"], f"--images: no such folder: {LONG}"),
        (["--images", ".", "--labels", "nowhere.csv"], "nowhere.csv: cannot be read: No such"),
        (["--images", ".", "--labels", LONG], f"--labels: {LONG}: cannot be read: File name too long"),
        (["--resume", LONG], f"--resume: {LONG}: cannot be read: File name too long"),
        (["--images", ".", "--labels", "x.csv", "--test-canvases", "5"], "--test-canvases does not go with --images"),
        (["--images", ".", "--labels", "x.csv", "--test-images", "."], "--test-images needs --test-labels"),
        (["--validation-fraction", "0.5"], "--validation-fraction needs --images and --labels"),
        (["--group-column", "patient"], "--group-column needs --images and --labels"),
        (["--output", "file", "--train-canvases", "2"], "--output: file: file is not a folder, or not writable"),
        (["--output", "file/new"], "--output: file/new: file is not a folder, or not writable"),
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
    assert expected in error_of(capsys, "--arch", "mobilenet_v3_small", *options)
    assert os.listdir(tmp_path) == ["file"]


def test_refuses_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(capsys, *TINY, "--device", "cuda:99").startswith("--device 'cuda:99' cannot be used: ")


def test_says_when_pretrained_weights_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(arch: str, weights: str | None) -> torch.nn.Module:
        assert weights == "DEFAULT"
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    message = error_of(capsys, *TINY, "--pretrained")
    assert message.startswith("--pretrained: no weights for mobilenet_v3_small: no network")


def test_weights_of_positives_are_computed_and_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = example.make_parser().parse_args([*TINY, "--pos-weight", "auto"])
    example.complete_options(options)
    data = example.load_canvases(options)
    weights = data.pos_weight
    targets = torch.stack([data.parts["train"][index][1] for index in range(16)])
    for label in range(10):
        positives = int(targets[:, label].sum())
        assert weights[label] == pytest.approx(max(16 - positives, 1) / max(positives, 1))

    file = tmp_path / "weights.csv"
    file.write_text('label,weight\n"two\nlines",2\nb,0.5\n')
    assert example.read_pos_weight(file, ["b", "two\nlines"]).tolist() == [0.5, 2]
    every = "every label of this run, and no other, needs one weight, positive and finite; see "
    for text, expected in {
        "label;weight\n": "the header must be label,weight",
        "label,weight\nb,1\nb,2,3\n": "cannot be read: Error tokenizing data",
        "": "cannot be read: No columns to parse from file",
        'label,weight\n"two\nlines",2\nb,1\nc,1\n': every + "'c'",
        'label,weight\n"two\nlines",2\nb,1\nb,2\n': every + "'b'",
        "label,weight\nb,1\n": every + "'two\\nlines'",
        **dict.fromkeys(["-1", "0", "inf", "nan", "one", " "], every + "'b'"),
    }.items():
        file.write_text(f'label,weight\n"two\nlines",2\nb,{text}\n' if text and len(text) < 5 else text)
        with pytest.raises(classifier.UsageError, match="--pos-weight: ") as caught:
            example.read_pos_weight(file, ["b", "two\nlines"])
        assert str(caught.value).startswith(f"--pos-weight: {file}: {expected}")
