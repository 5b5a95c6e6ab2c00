"""The compiled core: what it was built for, build options, the self-check."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_sce
from fused_sce import _library

ROOT = Path(__file__).parent.parent
LIBRARIES = sorted(Path(_library.__file__).parent.glob("libfused_sce*.so"))


def test_libraries_need_only_what_every_torch_has() -> None:
    # No Python, no CUDA runtime of torch's, no C++ symbol of torch: the C functions of the stable ABI.
    if shutil.which("readelf") is None or shutil.which("nm") is None:
        pytest.skip("needs binutils")
    assert LIBRARIES
    for library in LIBRARIES:
        dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
        torchs = {name for name in needed if "torch" in name or "c10" in name or "cuda" in name or "python" in name}
        assert torchs <= {"libtorch_cpu.so", "libtorch_cuda.so"}, (library, needed)
        assert "libtorch_cuda.so" not in needed or "cuda" in library.name
        symbols = subprocess.run(["nm", "-D", "-u", library], capture_output=True, text=True, check=True).stdout
        for symbol in symbols.split():
            assert not re.match(r"_ZNK?(2at|3c10|5torch)|Py", symbol), (library, symbol)


def test_core_includes_stable_headers_only() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu"):
            torchs = re.findall(r"#include [<\"]((?:torch|ATen|c10|Python|pybind11)[^>\"]*)", path.read_text())
            in_op_layer = path.parent.name == "ops" or path.name == "op.cpp"
            for header in torchs:
                assert in_op_layer, f"{path} includes {header}"
                assert header.startswith(("torch/csrc/stable/", "torch/headeronly/")), f"{path} includes {header}"


def error_of_import(folder: Path) -> str:
    """What `import fused_sce` prints where the package lies in a folder of its own."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", "import fused_sce"]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    return run.stderr


def test_a_core_that_is_missing_or_broken_says_so(tmp_path: Path) -> None:
    package = tmp_path / "fused_sce"
    package.mkdir()
    for path in Path(fused_sce.__file__).parent.glob("*.py"):
        shutil.copy(path, package)
    error = error_of_import(tmp_path)
    assert "fused_sce's core is not built" in error
    assert "pip install --no-build-isolation" in error
    (package / "libfused_sce.so").write_text("no library")
    assert f"cannot be loaded into torch {torch.__version__}; it needs torch 2.11 or newer" in error_of_import(tmp_path)


def run_setup(**environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py up to the point where it would build."""
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_cuda_switch() -> None:
    off = run_setup(FUSED_SCE_CUDA="0")
    assert off.returncode == 0, off.stderr
    assert "building for the CPU only (FUSED_SCE_CUDA=0)" in off.stdout
    assert off.stdout.splitlines()[-1] == fused_sce.__version__  # what the wheel is called
    wrong = run_setup(FUSED_SCE_CUDA="yes")
    assert wrong.returncode != 0
    assert "FUSED_SCE_CUDA must be 0, 1 or unset, got 'yes'" in wrong.stderr


def fake_nvcc(folder: Path, script: str) -> str:
    """A CUDA toolkit whose nvcc is a shell script."""
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "include/cuda_runtime.h").touch()
    write_program(folder / "bin/nvcc", script)
    return str(folder)


def write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_forced_cuda_fails_with_the_reason(tmp_path: Path) -> None:
    # a toolkit of a CUDA version that no torch is built with
    toolkit = fake_nvcc(tmp_path / "cuda", "echo 'Cuda compilation tools, release 9.2, V9.2.148'")
    forced = run_setup(FUSED_SCE_CUDA="1", CUDA_HOME=toolkit)
    assert forced.returncode != 0
    assert "FUSED_SCE_CUDA=1, but " in forced.stderr
    assert "nvcc is 9.2" in forced.stderr or "a build without CUDA" in forced.stderr
    left_to_setup = run_setup(FUSED_SCE_CUDA="", CUDA_HOME=toolkit)
    assert left_to_setup.returncode == 0, left_to_setup.stderr
    assert "building for the CPU only: " in left_to_setup.stdout


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch with CUDA")
def test_nvcc_without_a_host_compiler(tmp_path: Path) -> None:
    version = f"echo 'release {torch.version.cuda}, V{torch.version.cuda}'"
    error = 'echo "$2: No such file or directory" >&2; exit 1'
    toolkit = fake_nvcc(tmp_path / "cuda", f'[ "$1" = --version ] && {version} || {{ {error}; }}')
    reason = (
        f"nvcc {torch.version.cuda} does not work with the host compiler (/nowhere/gcc):\n"
        "/nowhere/gcc: No such file or directory\n"
    )
    forced = run_setup(FUSED_SCE_CUDA="1", CUDA_HOME=toolkit, CC="/nowhere/gcc")
    assert forced.returncode == 1
    assert f"FUSED_SCE_CUDA=1, but {reason}" in forced.stderr
    left_to_setup = run_setup(FUSED_SCE_CUDA="", CUDA_HOME=toolkit, CC="/nowhere/gcc")
    assert left_to_setup.returncode == 0, left_to_setup.stderr
    assert f"building for the CPU only: {reason}" in left_to_setup.stdout


@pytest.mark.skipif(torch.version.cuda is None or torch.cuda.is_available(), reason="needs CUDA in torch, and no GPU")
def test_nvcc_that_lacks_architectures(tmp_path: Path) -> None:
    for number, (known, archs, said) in enumerate(
        (
            ("75 80 90 100 110 120", "7.5;8.0;9.0;10.0+PTX;12.0+PTX", ""),
            ("50 75 80 90", "7.5;8.0;9.0+PTX", "does not know the architectures 10.0, 12.0: left out\n"),
        )
    ):
        listed = " ".join(f"compute_{arch}" for arch in known.split())
        script = f"case $1 in --list-gpu-arch) echo {listed};; *) echo 'release {torch.version.cuda}, V1';; esac"
        toolkit = fake_nvcc(tmp_path / str(number), script)
        run = run_setup(FUSED_SCE_CUDA="1", CUDA_HOME=toolkit, TORCH_CUDA_ARCH_LIST="")
        assert run.returncode == 0, run.stderr
        assert f"building for CPU and CUDA (nvcc {torch.version.cuda}, {archs})" in run.stdout
        assert said in run.stdout
        assert ("left out" in run.stdout) == bool(said)


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    old = tmp_path / "old-g++"
    write_program(old, "echo 'error: unrecognized option -std=c++17' >&2; exit 1")
    silent = tmp_path / "silent-g++"
    write_program(silent, "exit 3")
    for variables, tried in (
        ({"PATH": str(tmp_path)}, "'c++' (CXX is not set): No such file or directory"),
        ({"CXX": "/nowhere/g++"}, "'/nowhere/g++' (from CXX): No such file or directory"),
        ({"CXX": "g++ -m64"}, "'g++ -m64' (from CXX): No such file or directory"),
        ({"CXX": str(old)}, f"'{old}' (from CXX): error: unrecognized option -std=c++17"),
        ({"CXX": str(silent)}, f"'{silent}' (from CXX): exit status 3"),
    ):
        run = run_setup(**variables)
        assert run.returncode == 1
        assert run.stdout == ""
        lines = run.stderr.splitlines()
        assert lines[0] == f"fused_sce: building needs a C++17 compiler. Tried {tried}"
        assert lines[2].strip() == "apt install g++"
        assert len(lines) == 4


def test_old_build_requirements(tmp_path: Path) -> None:
    for name, version, needed in (("setuptools", "65.5.0", "setuptools 77"), ("torch", "2.10.1+cpu", "torch 2.11")):
        package = tmp_path / name / name
        (package / "utils").mkdir(parents=True)
        names = "Extension = setup = BuildExtension = CppExtension = CUDAExtension = None"
        (package / "__init__.py").write_text(f"__version__ = {version!r}\n{names}\n")
        (package / "utils/cpp_extension.py").write_text(names)
        run = run_setup(PYTHONPATH=str(tmp_path / name))
        assert run.returncode == 1
        assert run.stderr.startswith(f"fused_sce: building needs {needed} or newer, got {version}. ")
        assert "Traceback" not in run.stderr


def test_self_check_command() -> None:
    run = subprocess.run([sys.executable, "-m", "fused_sce"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for fact in (fused_sce.__version__, torch.__version__, "CPU kernels", "CUDA kernels", "passed"):
        assert fact in run.stdout


def test_unknown_instruction_set() -> None:
    error = f"FUSED_SCE_ISA=sse9: this build and processor offer {_library.build_facts()['isas']}"
    environment = {**os.environ, "FUSED_SCE_ISA": "sse9"}
    command = [sys.executable, "-m", "fused_sce"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", f"{error}\n")
    code = (
        "import torch, fused_sce\n"
        "for n in 8, 100_000:\n"
        "    try: fused_sce.BCEWithLogitsLoss()(torch.randn(n, requires_grad=True), torch.rand(n))\n"
        "    except ValueError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == f"{error}\n" * 2


def test_why_there_are_no_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_sce import __main__ as command

    monkeypatch.setattr(_library, "has_cuda_kernels", False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert command.versions()["CUDA kernels"] == f"none: torch {torch.__version__} has no CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert command.versions()["CUDA kernels"] == "none: fused_sce was built for the CPU only"
    with pytest.warns(UserWarning, match="right but not fused: fused_sce was built for the CPU only"):
        fused_sce._calls._warn_without_kernels.__wrapped__("cuda")


def test_self_check_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_sce import __main__ as command

    torchs = torch.nn.functional.binary_cross_entropy_with_logits
    monkeypatch.setattr(fused_sce.functional, "sigmoid_cross_entropy", torchs)
    failures = command.self_check("cpu")
    assert any("gradient of logit 40, target 1 is" in failure for failure in failures)


def test_a_loss_does_not_import_the_onnx_exporter() -> None:
    code = (
        "import sys, torch, fused_sce; before = 'torch.onnx' in sys.modules\n"
        "fused_sce.BCEWithLogitsLoss()(torch.randn(2, 3, requires_grad=True), torch.rand(2, 3)).backward()\n"
        "assert before or 'torch.onnx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
