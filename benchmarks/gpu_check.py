"""Prove the CUDA kernels on the GPU of this machine: build, test, sanitize, measure.

    make gpu-check OUT=output/gpu            # or: python benchmarks/gpu_check.py output/gpu

Needs an NVIDIA GPU, its toolkit (nvcc, compute-sanitizer), torch 2.11 or newer with ninja, pytest, mpmath, numpy and
matplotlib; no network. The extension is built in place for the GPUs at hand; then the GPU-marked tests run, and beside
them one small run of every kernel under each of compute-sanitizer's tools; then, alone on the machine, the benchmark. A
step that fails does not stop the others. Writes into the folder, which is made if need be:

    gpu_CARD_DATE.md      one page: what held and what did not
    gpu_CARD_DATE.json    the same for programs, with every measured time
    gpu_speed.png         the times as bars
    tests.xml             JUnit
    log.txt               all output of all steps

The exit status is 0 if every step held, which for the benchmark means every line of gpu_speed.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUDGET = 540.0  # seconds for all steps: nine minutes
# What is kept for the benchmark: four groups of 6 seconds, and torch.compile at work before the first.
BENCHMARK = 110.0
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OTHER_TESTS = ("example", "recipes", "heads")  # about models: they need more packages, and no GPU


@dataclass
class Step:
    """A command, and what it is for."""

    name: str
    command: list[str]
    obstacle: str = ""  # why it cannot run here


@dataclass
class Outcome:
    """How a step ended."""

    name: str
    held: bool
    seconds: float
    note: str
    output: str = ""


def run(step: Step, limit: float) -> Outcome:
    """Run one step for at most `limit` seconds."""
    if step.obstacle:
        return Outcome(step.name, held=False, seconds=0.0, note=f"not run: {step.obstacle}")
    if limit <= 0:
        return Outcome(step.name, held=False, seconds=0.0, note="not run: no time left")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(
            step.command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=limit,
            check=False,
        )
        note = "" if done.returncode == 0 else f"exit status {done.returncode}"
        held, output = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as late:
        held, note = False, f"stopped after {limit:.0f} s"
        output = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
    except OSError as error:
        held, note, output = False, str(error), ""
    return Outcome(step.name, held, time.monotonic() - start, note, output)


def build() -> Step:
    """Compile the extension in place, with the kernels or not at all."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    return Step("build", ["env", "FUSED_SCE_CUDA=1", "NVCC_APPEND_FLAGS=--split-compile=0", *command])


def checks(out: Path) -> list[Step]:
    """What may run at the same time: the self-check, the tests, and the sanitizers."""
    files = sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))
    ignored = [f"--ignore=tests/{name}" for name in files if any(other in name for other in OTHER_TESTS)]
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={out / 'tests.xml'}"]
    steps = [
        Step("self-check", [sys.executable, "-m", "fused_sce"]),
        Step("tests", [*tests, "--durations=10", *ignored]),
    ]
    sanitizer = find_sanitizer()
    for tool in TOOLS:
        command = [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "3"]
        steps.append(
            Step(
                f"compute-sanitizer {tool}",
                [*command, sys.executable, "tests/every_kernel.py"],
                obstacle="" if sanitizer else "compute-sanitizer is neither on the path nor in the CUDA toolkit",
            )
        )
    return steps


def benchmark(out: Path) -> Step:
    """Measure, and check every line."""
    return Step("benchmark", [sys.executable, "benchmarks/gpu_speed.py", "--strict", "--output", str(out)])


def find_sanitizer() -> str | None:
    """compute-sanitizer, on the path or in the toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for place in filter(None, homes):
        if (Path(place) / "bin/compute-sanitizer").exists():
            return str(Path(place) / "bin/compute-sanitizer")
    return shutil.which("compute-sanitizer")


def gpu_facts() -> dict[str, str]:
    """The GPU and the versions, asked in another process: this one needs no torch."""
    code = (
        "import json, torch; p = torch.cuda.get_device_properties(0); print(json.dumps({'card': p.name, "
        "'memory': f'{p.total_memory / 2**30:.0f} GiB', 'multiprocessors': str(p.multi_processor_count), "
        "'capability': f'{p.major}.{p.minor}', 'torch': torch.__version__, 'cuda': torch.version.cuda}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"torch sees no GPU:\n{done.stderr.strip()}")
    return dict(json.loads(done.stdout))


def commit() -> str:
    """The commit that is checked out, if git says one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def test_counts(junit: Path) -> dict[str, int]:
    """Tests, failures, errors and skipped of a JUnit file; empty if there is none."""
    if not junit.exists():
        return {}
    suites = list(ElementTree.parse(junit).getroot().iter("testsuite"))
    return {key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")}


def failed_tests(junit: Path) -> list[str]:
    """Names of the tests that did not pass."""
    if not junit.exists():
        return []
    cases = ElementTree.parse(junit).getroot().iter("testcase")
    return [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]


def summary(report: dict[str, object], outcomes: list[Outcome], speed: dict[str, object], junit: Path) -> str:
    """One page of Markdown."""
    facts = report["environment"]
    assert isinstance(facts, dict)
    lines = [f"# {facts['card']}, {facts['date']}", ""]
    lines += [", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("card", "date")), ""]
    lines += ["| step | held | seconds | |", "| --- | --- | ---: | --- |"]
    lines += [f"| {o.name} | {'yes' if o.held else '**no**'} | {o.seconds:.0f} | {o.note} |" for o in outcomes]
    counts = test_counts(junit)
    if counts:
        lines += ["", ", ".join(f"{number} {name}" for name, number in counts.items()) + "."]
        lines += [f"* failed: `{name}`" for name in failed_tests(junit)[:20]]
    promises = speed.get("lines")
    if isinstance(promises, list):
        lines += ["", "| forward + backward | against | ratio | bar | met |", "| --- | --- | ---: | --- | --- |"]
        for line in promises:
            bar = f"at {'least' if line['at_least'] else 'most'} {line['bar']:g}"
            met = "yes" if line["met"] else "**no**"
            lines.append(f"| {line['group']} | {line['work']} | {line['ratio']:.3g} | {bar} | {met} |")
    launches = speed.get("launches")
    if isinstance(launches, dict):
        counted = ", ".join(f"{name} {count:g}" for name, count in launches.items())
        lines += ["", f"Kernels launched, forward + backward: {counted}."]
    medians = speed.get("median_seconds")
    if isinstance(medians, dict):
        elements = speed["environment"]["elements"]  # type: ignore[index]
        lines += ["", f"| medians (large: {elements} elements) | µs |", "| --- | ---: |"]
        lines += [
            f"| {group}: {name} | {median * 1e6:,.1f} |"
            for group, times in medians.items()
            for name, median in times.items()
        ]
    return "\n".join(lines) + "\n"


def write_log(path: Path, outcomes: list[Outcome]) -> None:
    """All output, step by step."""
    with path.open("w") as log:
        for outcome in outcomes:
            log.write(f"==== {outcome.name}: {'held' if outcome.held else 'DID NOT HOLD'} {outcome.note}\n")
            log.write(outcome.output.rstrip() + "\n\n")


def run_all(out: Path, budget: float) -> list[Outcome]:
    """Every step, as far as the time goes."""
    end = time.monotonic() + budget

    def left(reserved: float = 0.0) -> float:
        return end - time.monotonic() - reserved

    outcomes = [run(build(), left(BENCHMARK))]
    report_progress(outcomes[0])
    steps = checks(out)
    if outcomes[0].held:
        # At the same time: each waits for its Python for the most part. The benchmark then has the GPU for itself.
        with ThreadPoolExecutor(max_workers=len(steps)) as pool:
            limit = left(BENCHMARK)
            for outcome in pool.map(lambda step: run(step, limit), steps):
                outcomes.append(outcome)
                report_progress(outcome)
        outcomes.append(run(benchmark(out), left()))
        report_progress(outcomes[-1])
    else:
        names = [step.name for step in [*steps, benchmark(out)]]
        outcomes += [Outcome(name, held=False, seconds=0.0, note="not run: the build failed") for name in names]
    return outcomes


def report_progress(outcome: Outcome) -> None:
    """Say how a step ended, and the end of its output if it failed."""
    print(f"{outcome.name:28}{'held' if outcome.held else 'DID NOT HOLD':14}{outcome.seconds:6.0f} s  {outcome.note}")
    if not outcome.held:
        for line in outcome.output.strip().splitlines()[-15:]:
            print(f"    {line}")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """Run all steps and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the report")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all steps")
    options = parser.parse_args(arguments)
    try:
        facts = gpu_facts()
    except RuntimeError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for stale in ("tests.xml", "gpu_speed.json", "gpu_speed.png"):
        (out / stale).unlink(missing_ok=True)

    facts = {**facts, "date": datetime.date.today().isoformat(), "commit": commit()}
    outcomes = run_all(out, options.budget)
    write_log(out / "log.txt", outcomes)
    measured = out / "gpu_speed.json"
    speed = json.loads(measured.read_text()) if measured.exists() else {}
    measured.unlink(missing_ok=True)  # it is in the report
    report: dict[str, object] = {
        "environment": facts,
        "steps": [{"name": o.name, "held": o.held, "seconds": round(o.seconds, 1), "note": o.note} for o in outcomes],
        "tests": test_counts(out / "tests.xml"),
        "failed_tests": failed_tests(out / "tests.xml"),
        "speed": speed,
    }
    name = f"gpu_{re.sub(r'[^A-Za-z0-9]+', '_', facts['card'])}_{facts['date']}"
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / f"{name}.md").write_text(summary(report, outcomes, speed, out / "tests.xml"))
    print(f"\nwritten: {out}/{name}.md, {name}.json, tests.xml, log.txt, gpu_speed.png")
    return 0 if all(outcome.held for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
