"""What the CUDA kernels' main loops are in the machine code: instructions, loads, stores, registers. Needs no GPU.

    python tools/count_instructions.py                     # the extension as it is built
    python tools/count_instructions.py sum.o elements.o --arch sm_90

Memory bounds a kernel only if the kernel can issue its instructions while the operands arrive. 132 multiprocessors
(H200) issue 4 instructions for 32 threads in each cycle. At 1.75 GHz these are 34 per element of bfloat16 logits, uint8
targets and bfloat16 gradients (5 bytes, so that 4.3 TB/s bring 8.6e11 elements per second), and 83 for float32 (12).

Lists the kernels that make a gradient. Each element needs one reciprocal of the special-function unit (MUFU.RCP), so
these count the elements of a loop. The main loop is the one with the most. Instructions of a rarely taken branch inside
the loop are counted too.

A kernel's loads and stores of global memory are listed by their bits, 2x128 for two of 16 bytes. `last load` and
`first MUFU` are places in the loop, which starts at 0: arithmetic before the last load makes memory wait. `stack` is
what a thread spills, in bytes.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
LOAD, STORE = r"\bLDG?\.E(\S*)", r"\bSTG?\.E(\S*)"  # of global memory
RESOURCES = re.compile(r"^ Function (\S+):\n.*?REG:(\d+) STACK:(\d+)", flags=re.MULTILINE)
SPECIAL = r"\bMUFU\b"
ELEMENT = "MUFU.RCP"
FEWEST = 4  # elements of a main loop: a group of float32 logits


@dataclass
class Loop:
    """The main loop of a kernel: its instructions, and the registers and bytes of stack of the whole kernel."""

    kernel: str
    arch: str
    body: list[str]
    registers: int = 0
    stack: int = 0

    @property
    def elements(self) -> int:
        """Elements that one turn of the loop makes."""
        return sum(ELEMENT in text for text in self.body)

    @property
    def per_element(self) -> float:
        """Instructions for each element."""
        return len(self.body) / self.elements

    def places(self, pattern: str) -> list[int]:
        """Where in the loop instructions of a kind stand."""
        return [place for place, text in enumerate(self.body) if re.search(pattern, text)]

    def bits(self, pattern: str) -> Counter[int]:
        """How many instructions of a kind, LOAD or STORE, move how many bits."""
        modifiers = [match[1] for text in self.body if (match := re.search(pattern, text))]
        widths = [re.search(r"\.[US]?(8|16|64|128)\b", text) for text in modifiers]
        return Counter(int(width[1]) if width else 32 for width in widths)


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
        if jump and int(jump[1], 16) <= address:
            loops.append(Loop(name, arch, [text for at, text in code if int(jump[1], 16) <= at <= address]))
    best = max(loops, key=lambda loop: (loop.elements, -len(loop.body)), default=None)
    return best if best and best.elements >= FEWEST else None


def main_loops(binaries: list[Path], arch: str | None = None) -> list[Loop]:
    """The main loop of each kernel of object files or libraries that has one."""
    loops = []
    for binary in binaries:
        command = [cuobjdump(), "--dump-sass", "--dump-resource-usage"]
        command += [*(["--gpu-architecture", arch] if arch else []), str(binary)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for code in listing.split("Fatbin elf code:")[1:]:  # one architecture of one source
            resources = {name: (int(registers), int(stack)) for name, registers, stack in RESOURCES.findall(code)}
            for loop in filter(None, (main_loop(*kernel) for kernel in kernels(code))):
                loop.registers, loop.stack = resources[loop.kernel]
                loops.append(loop)
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
    form = "{:8}{:>12}{:>6}{:>10}{:>6}{:>10}{:>11}  {:31}{:29}{}"
    head = ("", "per element", "loop", "registers", "stack", "last load", "first MUFU", "loads", "stores", "kernel")
    print(form.format(*head))
    for loop in sorted(loops, key=lambda loop: (loop.arch, loop.kernel)):
        last, first = max(loop.places(LOAD), default="-"), min(loop.places(SPECIAL))
        moved = [
            " ".join(f"{count}x{bits}" for bits, count in sorted(loop.bits(kind).items(), reverse=True))
            for kind in (LOAD, STORE)
        ]
        numbers = (f"{loop.per_element:.1f}", len(loop.body), loop.registers, loop.stack, last, first)
        print(form.format(loop.arch, *numbers, *moved, loop.kernel))
    return 0


if __name__ == "__main__":
    sys.exit(main())
