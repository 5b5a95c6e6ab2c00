"""Check that each public name has a docstring, and an entry in the built API reference.

    mkdocs build --strict && python tools/check_docs.py

Prints each name that lacks one. The exit status is 1 if any does.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from mkdocstrings import Inventory

import fused_sce
from fused_sce import functional, heads, losses, reference

INVENTORY = Path(__file__).parent.parent / "output/docs/objects.inv"


def public_names() -> Iterator[tuple[str, object]]:
    """The public modules, functions, classes and methods, by their full names."""
    for module in (fused_sce, functional, heads, losses, reference):
        defined = (name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__)
        for name in getattr(module, "__all__", list(defined)):
            if name.startswith("_"):
                continue
            value = getattr(module, name)
            yield f"{module.__name__}.{name}", value
            if inspect.isclass(value):
                for method, function in vars(value).items():
                    if inspect.isfunction(function) and not method.startswith("_") and method != "extra_repr":
                        yield f"{module.__name__}.{name}.{method}", function


def main() -> int:
    """Print what is missing; 0 if nothing is."""
    with INVENTORY.open("rb") as file:
        entries = Inventory.parse_sphinx(file)
    missing = []
    for name, value in public_names():
        if not (value.__doc__ or "").strip():
            missing.append(f"{name} has no docstring")
        elif name not in entries:
            missing.append(f"{name} has no entry in the API reference: add it to docs/api.md")
    print("\n".join(missing) or f"{len(list(public_names()))} public names have a docstring and an entry")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
