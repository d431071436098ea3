"""What `convert` did to a model, as a table."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """One module: its path in the model, its class, and what it does now or why it was left."""

    path: str
    kind: str
    note: str


@dataclass
class Report:
    """What was replaced and what was left, each in the order of the model's modules; ``str`` gives a table."""

    replaced: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [("", "module", "class", "")]
        rows += [("replaced", entry.path or "(the model)", entry.kind, entry.note) for entry in self.replaced]
        rows += [("left", entry.path or "(the model)", entry.kind, entry.note) for entry in self.left]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]).rstrip() for row in rows]
        return "\n".join(lines)
