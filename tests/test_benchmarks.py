"""The benchmark programs run, and write what they print."""

from __future__ import annotations

import json
from pathlib import Path

import call_overhead
import compare_losses
import compare_numerics
import cpu_speed
import measure
import pytest
import torch


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
        assert figure["rounds"] >= measure.MIN_ROUNDS
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


def test_cpu_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"64x80 float32": cpu_speed.GROUPS["64x80 float32"], "in place": lambda: cpu_speed.kernel_alone((3, 5))}
    lines = (
        cpu_speed.Line("64x80 float32", "an easy bar", "eager", "fused", 1e-6),
        cpu_speed.Line("64x80 float32", "a hopeless bar", "eager", "fused", 1e6),
        cpu_speed.Line("in place", "an easy bar from above", "kernel", "add", 1e6, at_least=False),
    )
    monkeypatch.setattr(cpu_speed, "GROUPS", small)
    monkeypatch.setattr(cpu_speed, "LINES", lines)
    arguments = ["--seconds", "0", "--output", str(tmp_path), "--groups", *small]
    assert cpu_speed.main(arguments) == 0
    assert cpu_speed.main([*arguments, "--strict"]) == 1  # the hopeless one
    written = json.loads((tmp_path / "cpu_speed.json").read_text())
    assert [line["met"] for line in written["lines"]] == [True, False, True]
    times = written["median_seconds"]["64x80 float32"]
    assert written["lines"][0]["ratio"] == pytest.approx(times["eager"] / times["fused"])
    assert capsys.readouterr().out.count("NOT MET") == 2


def test_call_overhead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call_overhead.main(["--seconds", "0", "--output", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "call_overhead.json").read_text())
    printed = capsys.readouterr().out
    for name, times in written["median_seconds"].items():
        assert name in printed
        assert 0 < times["forward"] < times["forward + backward"]
    # one graph for the first batch size, and one for all others
    assert written["graphs"]["fused_sce.BCEWithLogitsLoss"] == 2
    assert written["graphs"]["fused_sce.MultiLabelSoftMarginLoss"] == 2


def test_train_step(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision", reason="the example's models")
    import train_step

    parser = train_step.example.make_parser()
    parser.set_defaults(arch="mobilenet_v3_small", batch_size=2, train_canvases=2, test_canvases=2)
    monkeypatch.setattr(train_step.example, "make_parser", lambda: parser)
    monkeypatch.setattr(train_step, "LABELS", (3,))
    assert train_step.main(["--seconds", "0", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "train_step.json").read_text())["rows"]
    assert [(row["labels"], row["loss"]) for row in rows] == [(3, "fused"), (3, "naive"), (3, "torch")]
    assert rows[0]["ratio_to_fused"] == 1
    printed = capsys.readouterr().out
    for row in rows:
        assert 0 < row["loss_seconds"] < row["step_seconds_20"] <= row["step_seconds"] <= row["step_seconds_80"]
        assert f"{row['step_seconds'] * 1e3:.1f}" in printed


def test_every_line_names_candidates_of_its_group() -> None:
    for group in {line.group for line in cpu_speed.LINES} - {"1024x9605 float32", "1024x9605 in place"}:
        candidates = cpu_speed.GROUPS[group]()
        assert {
            name for line in cpu_speed.LINES if line.group == group for name in (line.numerator, line.denominator)
        } <= (set(candidates))
    for line in cpu_speed.LINES:
        assert line.group in cpu_speed.GROUPS


def test_in_turns_sets_threads_and_calls_everything_equally_often() -> None:
    seen: dict[str, list[int]] = {"one": [], "two": []}
    before = torch.get_num_threads()
    times = measure.in_turns(
        {name: lambda name=name: seen[name].append(torch.get_num_threads()) for name in seen},  # type: ignore[misc]
        seconds=0,
        threads={"one": 1, "two": 2},
    )
    torch.set_num_threads(before)
    assert {name: len(samples) for name, samples in times.items()} == dict.fromkeys(seen, measure.MIN_ROUNDS)
    assert set(seen["one"]) == {1}
    assert set(seen["two"]) == {2}
