"""Count the instructions per element of the CUDA kernels' main loops, in the machine code; needs no GPU.

    python tools/count_instructions.py                     # the extension as it is built
    python tools/count_instructions.py sum.o elements.o --arch sm_90

Memory bounds a kernel only if the kernel can issue its instructions while the operands arrive. 132 multiprocessors
(H200) issue 4 instructions for 32 threads in each cycle. At 1.75 GHz these are 34 per element of bfloat16 logits, uint8
targets and bfloat16 gradients (5 bytes, so that 4.3 TB/s bring 8.6e11 elements per second), and 83 for float32 (12).

Lists the kernels that make a gradient. Each element needs one reciprocal of the special-function unit (MUFU.RCP), so
these count the elements of a loop. The main loop is the one with the most. Instructions of a rarely taken branch inside
the loop are counted too.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
ELEMENT = "MUFU.RCP"
FEWEST = 4  # elements of a main loop: a thread takes at least two groups of two


@dataclass
class Loop:
    """The main loop of a kernel."""

    kernel: str
    arch: str
    instructions: int
    elements: int

    @property
    def per_element(self) -> float:
        """Instructions for each element."""
        return self.instructions / self.elements


def cuobjdump() -> str:
    """The path of NVIDIA's disassembler, from the CUDA toolkit or from the Triton package that torch installs."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    triton = find_spec("triton")
    places = [Path("/usr/local/cuda/bin")]
    if triton and triton.submodule_search_locations:
        places.append(Path(triton.submodule_search_locations[0]) / "backends/nvidia/bin")
    for place in places:
        if (place / "cuobjdump").exists():
            return str(place / "cuobjdump")
    raise FileNotFoundError("cuobjdump is neither on the path, nor in /usr/local/cuda/bin, nor in the triton package")


def demangled(names: list[str]) -> list[str]:
    """Demangled C++ names without their arguments; unchanged if there is no c++filt."""
    tool = shutil.which("c++filt")
    if not tool:
        return names
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    shorter = []
    for name in text.splitlines():
        start = re.sub(r"^void |fused_sce::(cuda::)?|\(anonymous namespace\)::", "", name)
        shorter.append(start.split(">(")[0] + ">" if ">(" in start else start)
    return shorter


def kernels(listing: str) -> Iterator[tuple[str, str, list[tuple[int, str]]]]:
    """Name, architecture, and (address, instruction) of each kernel of a disassembly."""
    arch, name = "", ""
    code: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if line.startswith("arch = "):
            found = line.removeprefix("arch = ").strip()
        elif "Function : " in line:
            if name:
                yield name, arch, code
            name, arch, code = line.split("Function : ")[1].strip(), found, []
        elif (match := INSTRUCTION.match(line)) and name:
            code.append((int(match[1], 16), match[2]))
    if name:
        yield name, arch, code


def main_loop(name: str, arch: str, code: list[tuple[int, str]]) -> Loop | None:
    """The loop with the most elements and, of those, the fewest instructions; None if none has FEWEST."""
    loops = []
    for address, instruction in code:
        jump = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", instruction)
        if not jump or int(jump[1], 16) > address:
            continue
        body = [text for at, text in code if int(jump[1], 16) <= at <= address]
        loops.append((sum(ELEMENT in text for text in body), -len(body)))
    elements, instructions = max(loops, default=(0, 0))
    return Loop(name, arch, -instructions, elements) if elements >= FEWEST else None


def main_loops(binaries: list[Path], arch: str | None = None) -> list[Loop]:
    """The main loop of each kernel of object files or libraries that has one."""
    loops = []
    for binary in binaries:
        command = [cuobjdump(), "--dump-sass", *(["--gpu-architecture", arch] if arch else []), str(binary)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = [main_loop(*kernel) for kernel in kernels(listing)]
        loops += [loop for loop in found if loop]
    for loop, name in zip(loops, demangled([loop.kernel for loop in loops]), strict=True):
        loop.kernel = name
    return loops


def built_library() -> Path:
    """The library of CUDA kernels that `import fused_sce` loads."""
    spec = find_spec("fused_sce")
    library = Path(spec.origin or "").parent / "libfused_sce_cuda.so" if spec else None
    if library is None or not library.exists():
        raise FileNotFoundError("the CUDA kernels are not built; give the path of an object file or library")
    return library


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "binaries", type=Path, nargs="*", help="object files or libraries (default: the built CUDA kernels)"
    )
    parser.add_argument("--arch", help="as sm_90; default: all in the file")
    options = parser.parse_args(arguments)
    loops = main_loops(options.binaries or [built_library()], options.arch)
    if not loops:
        print("no kernel with a loop over elements found", file=sys.stderr)
        return 1
    print(f"{'':8}{'per element':>12}{'loop':>6}  kernel")
    for loop in sorted(loops, key=lambda loop: (loop.arch, loop.kernel)):
        print(f"{loop.arch:8}{loop.per_element:12.1f}{loop.instructions:6}  {loop.kernel}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
