"""The README's map of the rooms is true, and no room is overfull."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("benchmarks", "csrc", "densenet_efficient", "docs", "tests")
SOURCES = {".cpp", ".cu", ".cuh", ".h", ".j2", ".md", ".py", ".pyi", ".yaml"}
MOST_LINES = 500


def sources():
    return [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES]


def rooms():
    """The files and folders of the map. A name without a folder lies beside the first of its row."""
    table = (ROOT / "README.md").read_text().partition("## The house\n")[2]
    for row in re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE):
        first, *others = re.findall(r"`(.+?)`", row)
        yield ROOT / first
        for name in others:
            yield (ROOT if "/" in name.strip("/") else (ROOT / first).parent) / name


def test_every_room_of_the_map_exists():
    found = list(rooms())
    assert len(found) > 40
    assert not [room for room in found if not room.exists()]


def test_every_source_lies_in_a_room_of_the_map():
    found = set(rooms())
    assert not [path for path in sources() if not found & {path, *path.parents}]


def test_no_source_is_longer_than_a_reader_bears():
    lengths = {path: len(path.read_text().splitlines()) for path in sources()}
    assert {path for path, lines in lengths.items() if lines > MOST_LINES} == set()
