"""Build of the compiled core: `pip install --no-build-isolation .`.

The core is two libraries without Python, on LibTorch's stable ABI: `libfused_sce.so` (schemas and CPU kernels) and,
where nvcc is, `libfused_sce_cuda.so`. One build works with every torch from 2.11 on and every Python.

Environment variables:

FUSED_SCE_CUDA          1 builds the CUDA kernels or fails with the reason, 0 leaves them out; unset builds them where
                        nvcc and a CUDA torch of the same major version are found, and says which it was.
TORCH_CUDA_ARCH_LIST    GPU architectures, as for every torch extension; unset: those of the visible GPUs, or
                        DEFAULT_ARCHS, as far as nvcc knows them.
CXX                     the C++ compiler; unset: c++. CC: the compiler that nvcc calls; unset: gcc.
CUDA_HOME, MAX_JOBS     as for every torch extension.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, __version__, setup

ROOT = Path(__file__).parent

# One for each generation: Turing, Ampere, Hopper, and Blackwell's two, for data centres and for the desk.
DEFAULT_ARCHS = ["7.5", "8.0", "9.0", "10.0", "12.0"]
# PTX beside the code, which a driver compiles for GPUs that come later, and for 11.0 (Thor), which runs no other's code
# and no PTX of 12.0. The newest that nvcc knows has it, too.
PTX_FOR = "10.0"

# The oldest torch that the core works with, as the stable ABI encodes it: 2.11.0.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]

# Vector code needs the freedom to evaluate both sides of a condition (no errno, no traps). Contraction stays off,
# because csrc/formulas writes every fused multiply-add that may be one, so that results do not depend on the compiler.
# Without debug information: with it the libraries are twice as large.
CXX_FLAGS = [
    "-std=c++17",
    *["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"],
    *["-fvisibility=hidden", *STABLE_ABI],
]
# --fmad=false for the same reason; no fast-math, ever: it flushes subnormals and loses tails.
# A host function called on the device is an error: nvcc would only warn and compile the kernel to nothing.
NVCC_FLAGS = [
    *["-O3", "--fmad=false", "--threads=2", "-Werror=cross-execution-space-call"],
    *["-Xcompiler=-fvisibility=hidden", *STABLE_ABI],
]
# From CUDA 13 on. Older versions of nvcc may not know it, and older drivers cannot read what it makes.
COMPRESS = "--compress-mode=size"
LINK_FLAGS = ["-Wl,--as-needed", "-Wl,--exclude-libs,ALL", "-s"]

if int(__version__.split(".")[0]) < 77:
    sys.exit(
        f"fused_sce: building needs setuptools 77 or newer, got {__version__}. Install it with\n"
        '    pip install "setuptools>=77"'
    )

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402  (older ones lack it)


def choose_compiler() -> None:
    """Stop where no C++17 compiles: the build itself would bury that in a hundred lines."""
    compiler = os.environ.get("CXX", "c++")  # as torch.utils.cpp_extension chooses it
    command = [compiler, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    try:
        run = subprocess.run(command, input="#include <optional>\n", capture_output=True, text=True, check=False)
    except OSError as cannot_run:
        error = str(cannot_run.strerror)
    else:
        if run.returncode == 0:
            os.environ["CXX"] = compiler  # unset, setuptools would link with the one that compiled Python
            return
        error = run.stderr.strip() or f"exit status {run.returncode}"
    origin = "from CXX" if "CXX" in os.environ else "CXX is not set"
    sys.exit(
        f"fused_sce: building needs a C++17 compiler. Tried {compiler!r} ({origin}): {error}\n"
        "Install one, for example with\n"
        "    apt install g++\n"
        "or set CXX to the name or the path of one, without options."
    )


choose_compiler()  # before torch is imported, which may warn of something else


def cuda_home() -> Path | None:
    """The CUDA toolkit: a folder with both nvcc and its headers.

    torch takes the folder above the first nvcc on the path, which is wrong where that is a link or a wrapper script.
    """
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for candidate in candidates:
        parts = ("bin/nvcc", "include/cuda_runtime.h")
        if candidate and all((Path(candidate) / part).exists() for part in parts):
            return Path(candidate)
    return None


HOME = cuda_home()
if HOME is not None:
    os.environ["CUDA_HOME"] = str(HOME)  # read by torch.utils.cpp_extension when it is imported

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    sys.exit(
        f"fused_sce: building needs torch, which could not be imported ({error}). Install torch first, then run\n"
        "    pip install --no-build-isolation .\n"
        "(with build isolation pip downloads another torch for the build alone)"
    )
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
    sys.exit(f"fused_sce: building needs torch 2.11 or newer, got {torch.__version__}. Upgrade torch first.")


def nvcc_version(home: Path) -> str:
    """Nvcc's version, as "13.0"."""
    text = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    if found is None:
        sys.exit(f"fused_sce: cannot read a version from `{home}/bin/nvcc --version`:\n{text}")
    return found.group(1)


def host_compiler_error(home: Path) -> str:
    """What nvcc says against the compiler that it calls for the code outside kernels; empty if nothing."""
    compiler = ["-ccbin", os.environ["CC"]] if "CC" in os.environ else []  # as torch.utils.cpp_extension calls it
    command = [home / "bin/nvcc", *compiler, "-E", "-x", "cu", "/dev/null"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stderr.rstrip() if run.returncode else ""


def cuda_obstacle() -> str | None:
    """Why the CUDA kernels cannot be built here; None if they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if HOME is None:
        return "no CUDA toolkit found (nvcc and cuda_runtime.h below CUDA_HOME or /usr/local/cuda)"
    version = nvcc_version(HOME)
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is {version}, but torch was built with CUDA {torch.version.cuda}: the major versions must match"
    if error := host_compiler_error(HOME):
        return f"nvcc {version} does not work with the host compiler ({os.environ.get('CC', 'gcc')}):\n{error}"
    return None


def wants_cuda() -> bool:
    """Whether to build the CUDA kernels, said aloud."""
    asked = os.environ.get("FUSED_SCE_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"fused_sce: FUSED_SCE_CUDA must be 0, 1 or unset, got {asked!r}")
    obstacle = cuda_obstacle()
    if asked == "0":
        print("fused_sce: building for the CPU only (FUSED_SCE_CUDA=0)")
        return False
    if obstacle is not None:
        if asked == "1":
            sys.exit(f"fused_sce: FUSED_SCE_CUDA=1, but {obstacle}")
        print(f"fused_sce: building for the CPU only: {obstacle}")
        return False
    os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or archs_for(HOME)
    print(f"fused_sce: building for CPU and CUDA (nvcc {nvcc_version(HOME)}, {os.environ['TORCH_CUDA_ARCH_LIST']})")
    return True


def archs_for(home: Path) -> str:
    """Architectures to build for, as TORCH_CUDA_ARCH_LIST; those that nvcc does not know are left out, said aloud."""
    command = [home / "bin/nvcc", "--list-gpu-arch"]
    listed = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    capabilities = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
    visible = [f"{major}.{minor}" for major, minor in capabilities]

    def knows(arch: str) -> bool:
        return f"compute_{arch.replace('.', '')}" in listed

    if lacking := [arch for arch in visible or DEFAULT_ARCHS if not knows(arch)]:
        print(f"fused_sce: nvcc {nvcc_version(home)} does not know the architectures {', '.join(lacking)}: left out")
    if visible and not lacking:
        return ";".join(visible)
    known = [arch for arch in DEFAULT_ARCHS if knows(arch)]
    return ";".join(f"{arch}+PTX" if arch in (PTX_FOR, known[-1]) else arch for arch in known)


def sources(pattern: str) -> list[str]:
    """Files below csrc, relative to this one."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


HEADERS = sources("**/*.h")


def cpu_library() -> Extension:
    """Schemas and CPU kernels."""
    extension = CppExtension(
        "fused_sce.libfused_sce",
        [*sources("ops/*.cpp"), *sources("cpu/*.cpp")],
        depends=HEADERS,
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=LINK_FLAGS,
        py_limited_api=True,  # no libtorch_python
    )
    extension.libraries = ["torch_cpu"]
    return extension


def cuda_library(home: Path) -> Extension:
    """CUDA kernels, with the CUDA runtime inside: which one torch brings does not matter."""
    version = nvcc_version(home)
    compress = [COMPRESS] if int(version.split(".")[0]) >= 13 else []
    extension = CUDAExtension(
        "fused_sce.libfused_sce_cuda",
        [*sources("ops/bind.cpp"), *sources("cuda/*.cpp"), *sources("cuda/*.cu")],
        define_macros=[
            ("USE_CUDA", None),  # the headers of the stable ABI then declare what is for CUDA
            ("FUSED_SCE_NVCC_VERSION", f'"{version}"'),
            ("FUSED_SCE_CUDA_ARCHS", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"'),
        ],
        depends=HEADERS,
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": [*NVCC_FLAGS, *compress]},
        extra_link_args=LINK_FLAGS,
        py_limited_api=True,
    )
    extension.libraries = ["torch_cpu", "torch_cuda", "cudart_static", "dl", "rt", "pthread"]
    return extension


def readme() -> str:
    """README.md as a package index shows it, where relative links and pictures need the address of the repository."""
    found = re.search(r'^Repository = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None

    def absolute(link: re.Match[str]) -> str:
        return f"]({found[1]}/{'raw' if link[1].endswith('.png') else 'blob'}/main/{link[1]})"

    return re.sub(r"\]\((?!\w+:|#)([^)]+)\)", absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


class Wheel(bdist_wheel):
    """A wheel for every Python: nothing in it is compiled against one."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tags of interpreter, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


LIBRARIES = [cpu_library()]
if wants_cuda():
    assert HOME is not None
    LIBRARIES.append(cuda_library(HOME))

setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    ext_modules=LIBRARIES,
    cmdclass={
        "build_ext": BuildExtension.with_options(use_ninja=True, no_python_abi_suffix=True),
        "bdist_wheel": Wheel,
    },
)
