"""The private names of torch that the package uses: torch has each of them, and one file has them all.

The list is read, not imported: without one of its names fused_sce may not be importable, and this says which.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).parent.parent / "fused_sce"
if not PACKAGE.exists():  # the tests of a wheel, which is installed
    PACKAGE = Path(str(importlib.util.find_spec("fused_sce").origin)).parent  # type: ignore[union-attr]
FILE = PACKAGE / "_torch_private.py"
TREE = ast.parse(FILE.read_text())
LIST = next(
    node.value
    for node in TREE.body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NAMES" and isinstance(node.value, ast.Dict)
)
NAMES: list[str] = list(ast.literal_eval(LIST))
OF_NAMED_TUPLES = {"_asdict", "_fields", "_replace"}


def torch_has(name: str) -> bool:
    """Whether a name can be found in torch: in a module, a class, or the instances of a class."""
    place, *parts = name.split(".")
    found: object = importlib.import_module(place)
    for part in parts:
        place = f"{place}.{part}"
        if inspect.ismodule(found) and not hasattr(found, part):
            try:
                importlib.import_module(place)
            except ModuleNotFoundError:
                return False
        if hasattr(found, part):
            found = getattr(found, part)
        else:
            return place == name and gives_its_instances(found, part)
    return True


def gives_its_instances(found: object, attribute: str) -> bool:
    try:
        source = inspect.getsource(found)  # type: ignore[arg-type]
    except (OSError, TypeError):  # no class, or one that is written in C++
        return False
    return re.search(rf"\bself\.{attribute}\b", source) is not None


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def dotted(node: ast.expr) -> str:
    """A name and its attributes; attributes alone where they are those of a call, an item, ..."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def private_names(tree: ast.AST) -> Iterator[str]:
    """The private names that a program uses: from their module on where it imports that, else with a point ahead."""
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {name.asname or name.name.split(".")[0]: name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    yield from filter(is_private, modules.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, *attributes = dotted(node).split(".")
            name = ".".join([modules[root], *attributes]) if root in modules else f".{node.attr}"
            if is_private(name):
                yield name


def own_names(tree: ast.AST) -> set[str]:
    """What the classes of a program define: their functions and variables, and what is assigned to `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for part in ast.walk(node):
                if isinstance(part, ast.FunctionDef):
                    names.add(part.name)
                elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    names.add(part.id)
                elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                    names.add(part.attr)
    return names


def torchs_private_names(tree: ast.AST) -> set[str]:
    import fused_sce  # noqa: F401  its ops

    own = own_names(tree) | OF_NAMED_TUPLES
    names = set()
    for name in private_names(tree):
        if name.startswith(("fused_sce.", "torch.ops.fused_sce.")) or (name.startswith(".") and name[1:] in own):
            continue
        if not (name.startswith(".") and hasattr(torch.ops.fused_sce, name[1:])):
            names.add(name)
    return names


@pytest.mark.parametrize("name", NAMES)
def test_torch_has(name: str) -> None:
    assert torch_has(name), f"torch {torch.__version__} has no {name}, which fused_sce/_torch_private.py uses"


@pytest.mark.parametrize(
    "name", ["torch._C._gone", "torch._gone.name", "torch.Tensor._gone", "torch.nn.Module._buffer"]
)
def test_a_name_that_is_gone_is_missed(name: str) -> None:
    assert not torch_has(name)


def test_one_file_has_them_all() -> None:
    others = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.glob("*.py")) if path != FILE}
    last_parts = {name.rpartition(".")[2] for name in NAMES}
    for path, tree in others.items():
        texts = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        found = torchs_private_names(tree) | {name for name in texts & last_parts if is_private(name)}
        assert not found, f"{path.name} uses {found}: bind them in {FILE.name}"


def test_the_list_is_what_the_file_uses() -> None:
    for name in torchs_private_names(TREE):
        is_listed = any(
            f"{name}.".startswith(f"{entry}.") or f"{entry}.".startswith(f"{name}.") or f"{name}." in f".{entry}."
            for entry in NAMES
        )
        assert is_listed, f"{name} is not in NAMES"
    words = {node.attr for node in ast.walk(TREE) if isinstance(node, ast.Attribute)}
    words |= {name.name for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom) for name in node.names}
    in_list = set(ast.walk(LIST))
    texts = (node for node in ast.walk(TREE) if isinstance(node, ast.Constant) and node not in in_list)
    words |= {str(node.value) for node in texts}
    unused = [name for name in NAMES if name.rpartition(".")[2] not in words]
    assert not unused


def test_private_names_are_found() -> None:
    program = """
import torch
from torch._a import b
from torch.c import _d, e as f
from fused_sce import _calls

class Ours(torch.nn.Module):
    def __init__(self):
        self._mine = torch._C.g()
    def _read(self, tensor):
        return self._read, self._mine, self._theirs, tensor._h, _d.i, f.j, _calls._k, torch.ops.fused_sce._count
"""
    found = {"torch._a.b", "torch.c._d", "torch.c._d.i", "torch._C", "torch._C.g", "._theirs", "._h"}
    assert torchs_private_names(ast.parse(program)) == found
