"""The benchmark programs run, and write what they print."""

from __future__ import annotations

import json
from pathlib import Path

import compare_losses
import compare_numerics
import pytest


def test_compare_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shapes", "4x3", "--seconds", "0", "--output", str(tmp_path)]
    assert compare_losses.main(arguments) == 0
    results = json.loads((tmp_path / "compare_losses.json").read_text())
    printed = capsys.readouterr().out
    figures = results["figures"]
    assert {figure["loss"] for figure in figures} == set(compare_losses.losses())
    assert {figure["backward"] for figure in figures} == {False, True}
    for figure in figures:
        assert figure["loss"] in printed
        assert figure["rounds"] >= compare_losses.MIN_ROUNDS
        assert figure["seconds_20"] <= figure["seconds"] <= figure["seconds_80"]
        # 4 x 3 float32: two reads, and with backward one write
        moved = 12 * 4 * (3 if figure["backward"] else 2)
        assert figure["gigabytes_per_second"] == pytest.approx(moved / figure["seconds"] / 1e9)
        if figure["loss"] == compare_losses.FUSED:
            assert figure["ratio_to_fused"] == 1
    assert results["environment"]["threads"] == "1"
    assert (tmp_path / "compare_losses.png").stat().st_size > 10_000


@pytest.mark.parametrize("shape", ["256", "0x3", "axb", "2x3x4"])
def test_wrong_shape_is_refused(shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        compare_losses.main(["--shapes", shape, "--output", str(tmp_path / "new")])
    assert caught.value.code == 2
    assert repr(shape) in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_compare_numerics(tmp_path: Path) -> None:
    assert compare_numerics.main(["--step", "30011", "--output", str(tmp_path)]) == 0
    rows = {row["loss"]: row for row in json.loads((tmp_path / "compare_numerics.json").read_text())["rows"]}
    ours, torchs = rows["fused_sce"], rows["torch BCEWithLogitsLoss"]
    assert ours["worst_loss_ulp"] <= 2
    assert ours["worst_gradient_ulp"] <= 2
    assert ours["lost_losses"] == ours["lost_gradients"] == 0
    # the same count finds what torch is known to lose (pytorch#195529)
    assert torchs["lost_losses"] > 100
    assert torchs["lost_gradients"] > 100
