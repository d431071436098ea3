"""The code in the documents runs, each document from its first block to its last."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["leaving_python.md", "features.md", "planning.md"])
def test_code_of_a_document_runs(name, tmp_path, monkeypatch, one_thread):
    """In an empty folder, which its files may fill."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = BLOCK.findall((DOCS / name).read_text())
    assert blocks
    names = {"__name__": name}
    for index, block in enumerate(blocks, start=1):
        exec(compile(block, f"{name}, block {index}", "exec"), names)
