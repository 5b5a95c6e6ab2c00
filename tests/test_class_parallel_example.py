"""The example of labels divided among processes: its checkpoints, and what happens when a process dies.

What runs in several processes is in class_parallel_worker.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import class_parallel_worker as worker
import pytest
import torch
import train_class_parallel as example
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.testing import assert_close

ROOT = Path(__file__).resolve().parents[1]
# Many times what it takes: for a machine that has other work.
TIMEOUT = 300


def run(folder: Path, *command: str) -> str:
    """The output of a Python program."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT}/examples",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(output: str) -> list[tuple[int, float]]:
    found = re.findall(r"^step +(\d+)  loss ([\d.]+)$", output, flags=re.MULTILINE)
    return [(int(step), float(loss)) for step, loss in found]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what groups of processes left."""
    folder = tmp_path_factory.mktemp("results")
    run(folder, worker.__file__, str(folder))
    return folder


def test_trains_as_one_process(results: Path) -> None:
    output = (results / "undisturbed.txt").read_text()
    assert "301 labels on 2 processes (cpu), 151 on the first" in output
    assert [step for step, _ in losses(output)] == list(range(1, 13))
    assert losses(output)[-1][1] < 0.8 * losses(output)[0][1]
    assert "the same training in one process: the same result" in output
    assert [path.name for path in (results / "undisturbed").iterdir()] == ["step-00000012"]


def test_goes_on_with_another_number_of_processes(results: Path) -> None:
    saved_file = results / "saved.pt"
    dcp_to_torch_save(results / "undisturbed/step-00000012", saved_file)
    saved, loaded = (torch.load(file) for file in (saved_file, results / "loaded.pt"))
    assert saved.pop("options") == {"labels": 301, "features": 16, "hidden": 8, "batch": 32}
    assert loaded["model"]["head.weight"].shape == (301, 8)
    assert loaded["optimizer"]["state"]["head.bias"]["exp_avg_sq"].shape == (301,)
    assert loaded["optimizer"].pop("param_groups") == saved["optimizer"].pop("param_groups")
    assert_close(loaded, saved, rtol=0, atol=0)

    output = (results / "resumed.txt").read_text()
    assert "301 labels on 3 processes (cpu), 101 on the first\ngoes on after step 12" in output
    assert [step for step, _ in losses(output)] == [13, 14, 15, 16]
    assert "the same training in one process: the same result" in output


def test_a_process_whose_fellow_ended_stops(results: Path) -> None:
    ends = json.loads((results / "ends.json").read_text())
    # For one that is silent it waits as long as it was told, for one whose connection broke it does not wait.
    for name, timeout in worker.TIMEOUTS.items():
        assert [step for step, _ in losses((results / f"{name}.txt").read_text())] == [1, 2]
        assert ends[name]["status"] == 1
        assert ends[name]["seconds"] < 30, timeout


def test_torchrun_restarts_after_a_process_died_in_a_save(results: Path, tmp_path: Path) -> None:
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]  # --standalone: a free port
    steps = ["--steps", "12", "--checkpoint", str(tmp_path / "checkpoint")]
    output = run(tmp_path, "-m", "torch.distributed.run", *options, worker.__file__, *steps)
    undisturbed = losses((results / "undisturbed.txt").read_text())
    # Half of the checkpoint of step 10 was written: it goes on from the one before, with the very same losses.
    assert losses(output) == undisturbed[:10] + undisturbed[5:]
    assert f"goes on after step 5 of {tmp_path / 'checkpoint'}" in output
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-00000012"]


def start_alone(options: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The example in this process, the only one of its group."""
    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": worker.get_free_port()}
    for name, value in {**ranks, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    try:
        return example.main(options)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "300", "--batch", "31"], "was written with --labels 301, not 300; --batch 32, not 31"),
        (["--steps", "11"], "is beyond --steps 11"),
    ],
)
def test_a_checkpoint_of_other_options(
    options: list[str], message: str, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = results / "undisturbed"
    with pytest.raises(SystemExit, match=f"{checkpoint / 'step-00000012'} {message}"):
        start_alone([*worker.OPTIONS, *options, "--checkpoint", str(checkpoint)], monkeypatch)
    assert (checkpoint / "step-00000012/.metadata").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "torchrun --nproc-per-node 2"),
        (["--steps", "0"], "argument --steps: must be a whole number of at least 1, got '0'"),
        (["--labels", "many"], "argument --labels: invalid int value: 'many'"),
    ],
)
def test_explains_errors(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as exit_:
        example.main(options)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_explains_errors_before_it_joins_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for options, message in (
        (["--labels", "3"], "--labels 3 is less than the 4 labels of a sample"),
        (["--checkpoint", str(tmp_path / "file")], f"argument --checkpoint: {tmp_path / 'file'}: File exists"),
    ):
        with pytest.raises(SystemExit):
            start_alone(options, monkeypatch)
        assert message in capsys.readouterr().err


def test_refuses_restarts_with_the_store_of_those_that_died(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(SystemExit):
        start_alone([], monkeypatch)
    assert "needs the environment variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err
