"""What the documentation takes from outside of docs/, for mkdocs.

README.md is its first page, and the pictures and tables of benchmarks/results are files of it. A link to another file
of the repository, such as `../examples/predict.py`, works where the sources are read, and here it leads there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
import tomllib
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
RESULTS = "benchmarks/results"
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")  # the path of a Markdown link or picture


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is no file of docs/."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    for path in (ROOT / RESULTS).iterdir():
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that leave docs/ into those that work here; a file that is not there stays, and fails the build."""
    docs = Path(config.docs_dir)
    folder = ROOT if page.file.src_uri == "index.md" else docs

    def here(link: re.Match[str]) -> str:
        path = (folder / link[1]).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            return link[1]
        if path.is_relative_to(docs):
            return str(path.relative_to(docs))
        if path.parent == ROOT / RESULTS:
            return f"results/{path.name}"
        return f"{REPOSITORY}/blob/main/{path.relative_to(ROOT)}"

    return LINK.sub(here, markdown)


class LossesReturnTensors(griffe.Extension):
    """The functions of fused_sce.functional describe a call, and their decorator makes losses of them."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Show what the decorated function returns."""
        if str(func.returns) == "Call":
            func.returns = "Tensor"
