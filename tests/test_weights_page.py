"""docs/weights.md: its code runs as it stands there."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"(<!-- needs [^\n]*-->\n)?```python\n(.*?)```", re.DOTALL)


@pytest.mark.filterwarnings("ignore:the classifier of")
@pytest.mark.parametrize("page", ["weights.md"])
def test_code_runs(page, tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall((DOCS / page).read_text())
    assert any(needs for needs, _ in blocks)
    names = {}
    for needs, code in blocks:
        compiled = compile(code, page, "exec")
        if not needs:
            exec(compiled, names)
    assert names["inputs"].shape == (2, 3, 224, 224)
    assert [features.shape[1] for features in names["pyramid"]] == [256, 512, 1024]
    assert list(names["features"]) == ["fine", "coarse"]
