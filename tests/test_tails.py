"""The experiments of examples/tails.py, small: which training stalls, which does not, and where nothing changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")

import tails


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the program: these models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def outcomes(runs: tails.Runs, name: str) -> list[float]:
    return [run.outcome[name] for run in runs.values()]


def test_rare_label() -> None:
    runs = tails.rare_label(seed=0, items=10_000, steps=300)
    theirs, ours, *float32 = outcomes(runs, "mean logit")
    assert theirs < 6.5
    assert min(ours, *float32) > 7
    theirs, ours, *float32 = outcomes(runs, "pairs in order")
    assert theirs < 0.9 < ours
    assert float32 == [1, 1]


def test_late_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tails, "START", -25.0)
    runs = tails.late_labels(seed=0, stages=1, stage=30, steps=320)
    assert max(outcomes(runs, "nearest logit before")) < -18.4
    theirs, ours = outcomes(runs, "F1")
    assert theirs == 0
    assert ours > 0.05


def test_late_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tails, "START", -20.0)
    runs = tails.late_negatives(seed=0, stages=1, stage=30, steps=320)
    assert min(outcomes(runs, "nearest logit before")) > tails.FLOAT32_STALL
    theirs, torchs, ours = outcomes(runs, "F1")
    assert theirs == 0
    assert min(torchs, ours) > 0.05


def test_nan(tmp_path: Path) -> None:
    runs = tails.nan(seed=0, steps=10, start=20.0)
    assert {name for name, run in runs.items() if "NaN after step" in run.outcome} == {
        "torchvision focal, float32",
        "torchvision focal, bfloat16",
        "sigmoid + BCELoss, float16",
    }
    assert "| fused_sce, float16 | never | " in tails.table([runs])
    tails.draw({name: [runs] for name in tails.EXPERIMENTS}, tmp_path / "tails.png")
    assert (tmp_path / "tails.png").stat().st_size > 10_000


def test_no_difference() -> None:
    f1 = outcomes(tails.no_difference(seed=0, steps=80), "F1")
    assert f1[1::2] == pytest.approx(f1[::2], abs=0.02)
    assert min(f1) > 0.1
