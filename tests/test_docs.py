"""The Python code of README.md and of the pages in docs/ runs.

The blocks of a page run in order, with one namespace.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if "```python" in page.read_text(encoding="utf-8")
]


@pytest.fixture
def _one_process_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torchrun gives to a process, so that a page may call `init_process_group`."""
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process_group")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # for pages that write files
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        code = "\n" * text.count("\n", 0, block.start(1)) + block[1]  # so that errors name the line of the page
        exec(compile(code, page, "exec"), namespace)
