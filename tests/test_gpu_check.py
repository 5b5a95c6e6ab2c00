"""`make gpu-check` itself, without a GPU: its steps are played by other commands."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import gpu_speed
import pytest
import torch

FACTS = {"card": "NVIDIA Test-1 (40GB)", "memory": "40 GiB", "torch": "2.11.0", "cuda": "13.0"}

JUNIT = """<testsuites><testsuite tests="5" failures="1" errors="1" skipped="1">
<testcase classname="tests.test_a" name="one"/>
<testcase classname="tests.test_a" name="two[cuda]"><failure>no</failure></testcase>
<testcase classname="tests.test_b" name="three"><error>no</error></testcase>
<testcase classname="tests.test_b" name="four"><skipped/></testcase>
<testcase classname="tests.test_b" name="five"/></testsuite></testsuites>"""


def says(text: str, status: int = 0) -> list[str]:
    return [sys.executable, "-c", f"print({text!r}); raise SystemExit({status})"]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The commands of the steps by name, all of which hold; to be changed by tests."""
    commands = {
        "build": says("built"),
        "tests": says("1 passed"),
        "sanitizer": says("0 errors"),
        "benchmark": says("met"),
    }
    monkeypatch.setattr(gpu_check, "gpu_facts", lambda: FACTS)
    monkeypatch.setattr(gpu_check, "build", lambda: gpu_check.Step("build", commands["build"]))
    monkeypatch.setattr(
        gpu_check, "checks", lambda out: [gpu_check.Step(name, commands[name]) for name in ("tests", "sanitizer")]
    )
    monkeypatch.setattr(gpu_check, "benchmark", lambda out: gpu_check.Step("benchmark", commands["benchmark"]))
    return commands


def report_in(folder: Path) -> tuple[dict[str, object], str]:
    """The JSON and the page that one run left."""
    (written,) = folder.glob("gpu_NVIDIA_Test_1_40GB_*.json")
    return json.loads(written.read_text()), written.with_suffix(".md").read_text()


def results_of(report: dict[str, object]) -> dict[str, bool]:
    steps = report["steps"]
    assert isinstance(steps, list)
    return {step["name"]: step["held"] for step in steps}


@pytest.mark.usefixtures("steps")
def test_all_steps_hold(tmp_path: Path) -> None:
    assert gpu_check.main([str(tmp_path / "new" / "folder")]) == 0
    report, page = report_in(tmp_path / "new" / "folder")
    assert results_of(report) == {"build": True, "tests": True, "sanitizer": True, "benchmark": True}
    assert "NVIDIA Test-1 (40GB)" in page
    assert "**no**" not in page
    assert "built" in (tmp_path / "new/folder/log.txt").read_text()


@pytest.mark.parametrize("failing", ["tests", "sanitizer", "benchmark"])
def test_a_failure_is_reported_and_stops_nothing(
    failing: str, steps: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps[failing] = says("what went wrong", 3)
    assert gpu_check.main([str(tmp_path)]) == 1
    report, page = report_in(tmp_path)
    held = results_of(report)
    assert held.pop(failing) is False
    assert all(held.values())
    assert len(held) == 3
    assert f"| {failing} | **no** |" in page
    assert "exit status 3" in page
    assert "what went wrong" in capsys.readouterr().out
    assert "what went wrong" in (tmp_path / "log.txt").read_text()


def test_after_a_failed_build_nothing_is_called_held(steps: dict[str, list[str]], tmp_path: Path) -> None:
    steps["build"] = says("no nvcc", 1)
    assert gpu_check.main([str(tmp_path)]) == 1
    report, page = report_in(tmp_path)
    assert set(results_of(report).values()) == {False}
    assert page.count("not run: the build failed") == 3


def test_a_step_that_hangs_is_stopped(
    steps: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "BENCHMARK", 1.0)
    steps["tests"] = [sys.executable, "-uc", "import time; print('so far', flush=True); time.sleep(60)"]
    assert gpu_check.main([str(tmp_path), "--budget", "5"]) == 1
    report, page = report_in(tmp_path)
    assert results_of(report) == {"build": True, "tests": False, "sanitizer": True, "benchmark": True}
    assert "stopped after" in page
    assert "so far" in (tmp_path / "log.txt").read_text()


def test_a_command_that_is_not_there(steps: dict[str, list[str]], tmp_path: Path) -> None:
    steps["sanitizer"] = ["/nowhere/compute-sanitizer"]
    assert gpu_check.main([str(tmp_path)]) == 1
    _, page = report_in(tmp_path)
    assert "No such file or directory: '/nowhere/compute-sanitizer'" in page


def test_results_of_tests_and_benchmark_are_in_the_report(steps: dict[str, list[str]], tmp_path: Path) -> None:
    speed = {
        "environment": {"elements": "4096"},
        "lines": [{"group": "large float32", "work": "eager", "ratio": 4.5, "bar": 4, "at_least": True, "met": True}],
        "median_seconds": {"large float32": {"fused": 0.0005}},
        "launches": {"fused": 2, "eager": 11},
    }
    steps["tests"] = [
        sys.executable,
        "-c",
        f"open({str(tmp_path / 'tests.xml')!r}, 'w').write({JUNIT!r}); raise SystemExit(1)",
    ]
    steps["benchmark"] = [
        sys.executable,
        "-c",
        f"open({str(tmp_path / 'gpu_speed.json')!r}, 'w').write({json.dumps(speed)!r})",
    ]
    assert gpu_check.main([str(tmp_path)]) == 1
    report, page = report_in(tmp_path)
    assert report["tests"] == {"tests": 5, "failures": 1, "errors": 1, "skipped": 1}
    assert report["failed_tests"] == ["tests.test_a::two[cuda]", "tests.test_b::three"]
    assert report["speed"] == speed
    assert "| large float32 | eager | 4.5 | at least 4 | yes |" in page
    assert "fused 2, eager 11" in page
    assert "| large float32: fused | 500.0 |" in page
    assert "`tests.test_a::two[cuda]`" in page


def test_results_of_an_earlier_run_do_not_count(steps: dict[str, list[str]], tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(JUNIT)
    (tmp_path / "gpu_speed.json").write_text("{}")
    steps["tests"] = says("did not get far", 1)
    gpu_check.main([str(tmp_path)])
    report, _ = report_in(tmp_path)
    assert report["tests"] == {}


@pytest.mark.parametrize("name", ["tests.xml", "gpu_speed.json"])
def test_half_a_result_is_none(name: str, steps: dict[str, list[str]], tmp_path: Path) -> None:
    steps["tests"] = [sys.executable, "-c", f"open({str(tmp_path / name)!r}, 'w').write('<{{'); raise SystemExit(1)"]
    assert gpu_check.main([str(tmp_path)]) == 1
    report, _ = report_in(tmp_path)
    assert report["tests"] == {}
    assert report["speed"] == {}


def test_what_a_stopped_step_had_started_is_stopped_too(tmp_path: Path) -> None:
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    outcome = gpu_check.run(gpu_check.Step("hangs", [sys.executable, "-c", parent]), limit=1)
    assert not outcome.held
    time.sleep(2)
    assert not (tmp_path / "alive").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([str(tmp_path / "new")]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_steps_name_files_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: "/usr/bin/compute-sanitizer")
    steps = [gpu_check.build(), *gpu_check.checks(tmp_path), gpu_check.benchmark(tmp_path)]
    assert [step.name for step in steps if "sanitizer" in step.name] == [
        f"compute-sanitizer {tool}" for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
    ]
    for step in steps:
        assert not step.obstacle
        for part in step.command:
            if part.endswith(".py"):
                name = part.removeprefix("--ignore=")
                assert (gpu_check.ROOT / name).exists(), part
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: None)
    missing = [step for step in gpu_check.checks(tmp_path) if "sanitizer" in step.name]
    assert all("compute-sanitizer is neither" in gpu_check.run(step, 10).note for step in missing)


def test_gpu_tests_are_collected_without_the_extras(tmp_path: Path) -> None:
    # the test step's own command, collecting only, where packages of examples and development are not installed
    (step,) = (step for step in gpu_check.checks(tmp_path) if step.name == "tests")
    missing = dict.fromkeys(["keras", "sklearn", "torchvision", "expecttest", "ziglang"])
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update({missing})\n")
    done = subprocess.run(
        [*step.command, "--collect-only", "-q"],
        cwd=gpu_check.ROOT,
        env={"PYTHONPATH": f"{tmp_path}:{gpu_check.ROOT}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    # 5: nothing left to run, all deselected where there is no GPU
    assert done.returncode in (0, 5), done.stdout + done.stderr
    assert "error" not in done.stdout.lower(), done.stdout


def test_gpu_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--elements", "4096", "--seconds", "0", "--output", str(tmp_path)]
    assert gpu_speed.main(arguments) == 0
    written = json.loads((tmp_path / "gpu_speed.json").read_text())
    assert (tmp_path / "gpu_speed.png").stat().st_size > 10_000
    assert written["environment"]["elements"] == "4096"
    printed = capsys.readouterr().out
    for line in gpu_speed.LINES:
        times = written["median_seconds"][line.group]
        (result,) = (each for each in written["lines"] if (each["group"], each["work"]) == (line.group, line.work))
        assert result["ratio"] == pytest.approx(times[line.numerator] / times[line.denominator])
        assert result["met"] == (result["ratio"] >= line.bar)
        assert line.work in printed


def test_gpu_speed_takes_the_next_buffers_each_time() -> None:
    inputs = gpu_speed.input_sets(64, torch.float32, torch.uint8, "cpu")
    first = [next(inputs) for _ in range(gpu_speed.BUFFER_SETS)]
    assert len({logits.data_ptr() for logits, _ in first}) == gpu_speed.BUFFER_SETS
    assert next(inputs)[0] is first[0][0]


def test_every_kernel_of_the_sanitizers_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(gpu_check.ROOT / "tests"))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.delenv("PYTORCH_NO_CUDA_MEMORY_CACHING", raising=False)
    import every_kernel

    every_kernel.main()
