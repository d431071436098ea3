"""The code in the documents runs, each document from its first block to its last; their site is whole."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["tutorial.md", "convert.md", "leaving_python.md", "features.md", "planning.md"])
def test_code_of_a_document_runs(name, tmp_path, monkeypatch, one_thread):
    """In an empty folder, which its files may fill."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = BLOCK.findall((DOCS / name).read_text())
    assert blocks
    names = {"__name__": name}
    for index, block in enumerate(blocks, start=1):
        exec(compile(block, f"{name}, block {index}", "exec"), names)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """A copy of what the site is built from."""
    folder = tmp_path_factory.mktemp("documents")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    shutil.copytree(DOCS, folder / "docs")
    shutil.copytree(ROOT / "densenet_efficient", folder / "densenet_efficient", ignore=shutil.ignore_patterns("*.so"))
    return folder


def build_site(folder):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_site_is_built_and_needs_no_network(documents):
    result = build_site(documents)
    assert result.returncode == 0, result.stderr
    pages = list((documents / "build/site").glob("*.html"))
    assert {page.stem for page in pages} == {page.stem for page in DOCS.glob("*.md")} | {"404"}
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]*)"|<link rel="stylesheet" href="([^"]*)"', text)
        assert not [source for pair in loaded for source in pair if source.startswith(("http", "//"))], page
    mathematics = (documents / "build/site/mathematics.html").read_text()
    assert mathematics.count("<math") > 20
    assert "arithmatex" not in mathematics


@pytest.mark.parametrize("target", ["absent.md", "tutorial.md#absent", "pictures/absent.svg", "../README.md"])
def test_a_broken_link_ends_the_build(documents, target):
    page = documents / "docs/index.md"
    text = page.read_text()
    page.write_text(f"{text}\n[broken]({target})\n")
    result = build_site(documents)
    page.write_text(text)
    assert result.returncode != 0
    assert target.partition("#")[0] in result.stderr


def test_every_figure_is_drawn_and_shown():
    text = (DOCS / "mathematics.md").read_text()
    shown = set(re.findall(r"\]\(pictures/(.*?)\.svg\)", text))
    names = {"__name__": "figures", "__file__": str(DOCS / "scripts/figures.py")}
    exec((DOCS / "scripts/figures.py").read_text(), names)
    assert shown == names["FIGURES"].keys() == {path.stem for path in (DOCS / "pictures").glob("*.svg")}
