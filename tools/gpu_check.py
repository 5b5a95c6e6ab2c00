"""Prove the CUDA kernels on the GPU of this machine: build, test, sanitize, measure.

    make gpu-check OUT=output/gpu            # or: python tools/gpu_check.py output/gpu

Needs an NVIDIA GPU, its toolkit (nvcc, compute-sanitizer), torch 2.11 or newer with ninja, pytest, mpmath, numpy and
matplotlib; no network. First the core is built in place for the GPUs of the machine. Then the GPU-marked tests run
and, at the same time, every kernel once under each of compute-sanitizer's tools. Last the benchmark runs alone. After a
failed build nothing else runs; any other failure stops no other step. Writes into the folder, which is created if
necessary:

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
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BUDGET = 540.0  # seconds for all steps
# Seconds reserved for the benchmark: four groups of 6 seconds, and torch.compile before the first.
BENCHMARK = 110.0
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OTHER_TESTS = (
    "example",
    "recipes",
    "heads",
    "label_file",
    "pictures",
    "predict",
)  # they test models: more packages, no GPU

Report = dict[str, Any]


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
        # In a process group of its own, so that the step's children are killed with it.
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return Outcome(step.name, held=False, seconds=0.0, note=str(error))
    try:
        output, _ = process.communicate(timeout=limit)
        note = "" if process.returncode == 0 else f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        note = f"stopped after {limit:.0f} s"
    return Outcome(step.name, not note, time.monotonic() - start, note, output)


def build() -> Step:
    """Compile the core in place; fails if the CUDA kernels cannot be compiled."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    return Step("build", ["env", "FUSED_SCE_CUDA=1", "NVCC_APPEND_FLAGS=--split-compile=0", *command])


def checks(out: Path) -> list[Step]:
    """The steps that run at the same time: the self-check, the tests, and the sanitizers."""
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
    """The path of compute-sanitizer, in the toolkit or on PATH."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for place in filter(None, homes):
        if (Path(place) / "bin/compute-sanitizer").exists():
            return str(Path(place) / "bin/compute-sanitizer")
    return shutil.which("compute-sanitizer")


def gpu_facts() -> dict[str, str]:
    """The GPU and the versions, from a process of its own: this program runs without torch."""
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
    """The commit that is checked out, or "unknown"."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def read_tests(junit: Path) -> tuple[dict[str, int], list[str]]:
    """From a JUnit file the numbers of tests, failures, errors and skipped, and the names of failed tests.

    Both are empty if the file is missing or incomplete.
    """
    try:
        root = ElementTree.parse(junit).getroot()
    except (OSError, ElementTree.ParseError):
        return {}, []
    suites = list(root.iter("testsuite"))
    counts = {
        key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    }
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in root.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return counts, failed


def read_speed(path: Path) -> dict[str, Any]:
    """The benchmark's results; empty if the file is missing or incomplete."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def summary(report: Report, outcomes: list[Outcome]) -> str:
    """One page of Markdown."""
    facts, speed = report["environment"], report["speed"]
    lines = [f"# {facts['card']}, {facts['date']}", ""]
    lines += [", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("card", "date")), ""]
    lines += ["| step | held | seconds | |", "| --- | --- | ---: | --- |"]
    lines += [f"| {o.name} | {'yes' if o.held else '**no**'} | {o.seconds:.0f} | {o.note} |" for o in outcomes]
    if report["tests"]:
        lines += ["", ", ".join(f"{number} {name}" for name, number in report["tests"].items()) + "."]
        lines += [f"* failed: `{name}`" for name in report["failed_tests"][:20]]
    if speed:
        lines += ["", "| forward + backward | against | ratio | bar | met |", "| --- | --- | ---: | --- | --- |"]
        for line in speed["lines"]:
            bar = f"at {'least' if line['at_least'] else 'most'} {line['bar']:g}"
            met = "yes" if line["met"] else "**no**"
            lines.append(f"| {line['group']} | {line['work']} | {line['ratio']:.3g} | {bar} | {met} |")
    if "launches" in speed:
        counted = ", ".join(f"{name} {count:g}" for name, count in speed["launches"].items())
        lines += ["", f"Kernels launched, forward + backward: {counted}."]
    if speed:
        lines += ["", f"| medians (large: {speed['environment']['elements']} elements) | µs |", "| --- | ---: |"]
        for group, times in speed["median_seconds"].items():
            lines += [f"| {group}: {name} | {median * 1e6:,.1f} |" for name, median in times.items()]
    return "\n".join(lines) + "\n"


def write_log(path: Path, outcomes: list[Outcome]) -> None:
    """Write the output of every step."""
    with path.open("w") as log:
        for outcome in outcomes:
            log.write(f"==== {outcome.name}: {'held' if outcome.held else 'DID NOT HOLD'} {outcome.note}\n")
            log.write(outcome.output.rstrip() + "\n\n")


def run_all(out: Path, budget: float) -> list[Outcome]:
    """Run every step within `budget` seconds."""
    end = time.monotonic() + budget

    def left(reserved: float = 0.0) -> float:
        return end - time.monotonic() - reserved

    outcomes = [run(build(), left(BENCHMARK))]
    report_progress(outcomes[0])
    steps = checks(out)
    if outcomes[0].held:
        # At the same time, because each spends most of its time in Python on the CPU.
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
    """Print how a step ended, and the last lines of its output if it failed."""
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
    counts, failed = read_tests(out / "tests.xml")
    report: Report = {
        "environment": facts,
        "steps": [{"name": o.name, "held": o.held, "seconds": round(o.seconds, 1), "note": o.note} for o in outcomes],
        "tests": counts,
        "failed_tests": failed,
        "speed": read_speed(out / "gpu_speed.json"),
    }
    (out / "gpu_speed.json").unlink(missing_ok=True)  # it is in the report
    name = f"gpu_{re.sub(r'[^A-Za-z0-9]+', '_', facts['card'])}_{facts['date']}"
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / f"{name}.md").write_text(summary(report, outcomes))
    print(f"\nwritten: {out}/{name}.md, {name}.json, tests.xml, log.txt, gpu_speed.png")
    return 0 if all(outcome.held for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
