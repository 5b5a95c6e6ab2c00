"""Build of the extension: `pip install --no-build-isolation .` against the torch that is installed.

Environment variables:

FUSED_SCE_CUDA          1 builds the CUDA kernels or fails with the reason, 0 leaves them out; unset builds them where
                        nvcc and a CUDA torch of the same major version are found, and says which it was.
TORCH_CUDA_ARCH_LIST    GPU architectures, as for every torch extension; unset: those of the visible GPUs, or
DEFAULT_ARCHS. CUDA_HOME, MAX_JOBS     as for every torch extension.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

# One per generation that nvcc 13 compiles for (Turing, Ampere, Hopper, Blackwell) and PTX for what comes later.
DEFAULT_ARCHS = "7.5;8.0;9.0;10.0;12.0+PTX"

# Vector code needs the freedom to evaluate both sides of a condition (no errno, no traps); contraction stays off
# because csrc/formulas writes every fused multiply-add that may be one, so that results do not depend on the compiler.
# Without debug information: with it the library is twice as large.
CXX_FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fvisibility=hidden"]
# --fmad=false for the same reason; no fast-math, ever: it flushes subnormals and loses tails.
# A host function called on the device is an error: nvcc would only warn and compile the kernel to nothing.
NVCC_FLAGS = ["-O3", "--compress-mode=size", "--fmad=false", "--threads=2", "-Werror=cross-execution-space-call"]


# at::parallel_for is a template, and serial where its includer is compiled without OpenMP. What GCC makes of it are
# calls of the runtime that torch has loaded, and linking one ourselves could bring a second, with threads of its own;
# other compilers call another runtime, which torch may not have.
OPENMP = ["-fopenmp"]


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
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    sys.exit(
        f"fused_sce: building needs torch, which could not be imported ({error}). Install torch first, then run\n"
        "    pip install --no-build-isolation .\n"
        "(with build isolation pip hides the installed torch and builds against another one)"
    )


def nvcc_version(home: Path) -> str:
    """Nvcc's version, as "13.0"."""
    text = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    if found is None:
        sys.exit(f"fused_sce: cannot read a version from `{home}/bin/nvcc --version`:\n{text}")
    return found.group(1)


def cuda_obstacle() -> str | None:
    """Why the CUDA kernels cannot be built here; None if they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if HOME is None:
        return "no CUDA toolkit found (nvcc and cuda_runtime.h below CUDA_HOME or /usr/local/cuda)"
    version = nvcc_version(HOME)
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is {version}, but torch was built with CUDA {torch.version.cuda}: the major versions must match"
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
    print(f"fused_sce: building for CPU and CUDA (nvcc {nvcc_version(HOME)}, {os.environ['TORCH_CUDA_ARCH_LIST']})")
    return True


def visible_archs() -> str:
    """Architectures of the GPUs here, as TORCH_CUDA_ARCH_LIST; DEFAULT_ARCHS where there is none."""
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found)) or DEFAULT_ARCHS


os.environ.setdefault("TORCH_CUDA_ARCH_LIST", visible_archs())
WITH_CUDA = wants_cuda()


class Build(BuildExtension):
    """BuildExtension that also writes fused_sce/_built_for.py, read before the extension is loaded."""

    def run(self) -> None:
        """Build, then write the file."""
        super().run()
        folder = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        (folder / "fused_sce/_built_for.py").write_text(
            '"""Written by setup.py: the torch this extension was compiled against."""\n\n'
            f'TORCH_VERSION = "{torch.__version__}"\n'
            f"TORCH_CUDA_VERSION: str | None = {torch.version.cuda!r}\n"
            f"WITH_CUDA = {WITH_CUDA}\n"
        )

    def get_outputs(self) -> list[str]:
        """The files that uninstalling removes."""
        return [*super().get_outputs(), str(Path(self.build_lib) / "fused_sce/_built_for.py")]


OPENMP_LINK = [] if cpp_extension.check_compiler_is_gcc(cpp_extension.get_cxx_compiler()) else OPENMP
SOURCES = [
    "csrc/module.cpp",
    "csrc/autograd.cpp",
    "csrc/ops.cpp",
    "csrc/shortcut.cpp",
    "csrc/cpu/avx2.cpp",
    "csrc/cpu/avx512.cpp",
    "csrc/cpu/baseline.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/pages.cpp",
]
HEADERS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))]

if WITH_CUDA:
    assert HOME is not None
    macros: list[tuple[str, str | None]] = [
        ("FUSED_SCE_WITH_CUDA", None),
        ("FUSED_SCE_CUDA_VERSION", f'"{nvcc_version(HOME)}"'),
        ("FUSED_SCE_CUDA_ARCHS", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"'),
    ]
    extension = CUDAExtension(
        "fused_sce._C",
        [*SOURCES, "csrc/cuda/kernels.cu"],
        define_macros=macros,
        depends=HEADERS,
        extra_compile_args={"cxx": CXX_FLAGS + OPENMP, "nvcc": NVCC_FLAGS},
        extra_link_args=OPENMP_LINK,
    )
else:
    extension = CppExtension(
        "fused_sce._C",
        SOURCES,
        depends=HEADERS,
        extra_compile_args={"cxx": CXX_FLAGS + OPENMP},
        extra_link_args=OPENMP_LINK,
    )

setup(ext_modules=[extension], cmdclass={"build_ext": Build.with_options(use_ninja=True)})
