"""Which image files can be read: found out before training, not in the middle of it."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from densenet_efficient.training.images import what_is_wrong
from densenet_efficient.training.samples import Samples, Splits, require_every_class

MAX_NAMED = 20  # files that a message lists

Read = Callable[[Any], Any]
Find = Callable[[Sequence[str]], dict[str, str]]  # as `find_unreadable`


def find_unreadable(paths: Sequence[str], read: Read) -> dict[str, str]:
    """Why each of those files that cannot be read cannot, by path. Pillow decodes outside the interpreter's lock."""
    paths = list(dict.fromkeys(paths))  # a table may list one several times

    def problem(path: str) -> str | None:
        try:
            read(path)
        except (OSError, ValueError) as error:
            return what_is_wrong(path, error)
        return None

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = track(pool.map(problem, paths), "Reading every image once", total=len(paths), transient=True)
        return {path: text for path, text in zip(paths, found, strict=True) if text is not None}


def keep_readable(splits: Splits, find: Find, skip: bool) -> Splits:
    """The splits without the files that cannot be read, which `find` gives, each of which is named.

    Raises ValueError naming them if they are not to be skipped, or if a class has no other image.
    """
    paths = [path for samples in splits.parts().values() for path in samples.sources]
    bad = find(paths) | dict(splits.strays)
    if not bad:
        return splits
    count = len(paths) + len(splits.strays)
    if not skip:
        raise ValueError(
            f"{len(bad)} of {count} files cannot be read as images: {listing(bad.values())}. "
            "Replace or remove them, or leave them out with --data.bad_files skip"
        )
    print(f"Skipping {len(bad)} of {count} files: {listing(bad.values())}")
    splits = replace(_without(splits, bad), strays={})
    require_every_class(splits, "--data.bad_files skip", "images that can be read")
    return splits


def _without(splits: Splits, bad: Container[str]) -> Splits:
    def readable(samples: Samples) -> Samples:
        return samples.subset([index for index, path in enumerate(samples.sources) if path not in bad])

    return splits.map(readable)


def listing(problems: Iterable[str]) -> str:
    lines = list(problems)
    more = [f"and {len(lines) - MAX_NAMED} more"] if len(lines) > MAX_NAMED else []
    return printable("; ".join(lines[:MAX_NAMED] + more))


def printable(text: str) -> str:
    """The text with the bytes of names that are not UTF-8 as \\xfc, for a terminal."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


@dataclass(frozen=True)
class Occurrence:
    """One of the places where a file is listed: a path in a folder, or a row of a table."""

    path: str
    part: str
    label: str

    def __str__(self) -> str:
        return f"{self.path} ({self.part}, {self.label})"


@dataclass(frozen=True)
class DataReport:
    """What `check-data` found."""

    counts: dict[str, dict[str, int]]  # images that can be read, by split and class
    unreadable: dict[str, str]  # why, by path; files of another type, or in no class folder, too
    leaks: list[list[Occurrence]]  # the same file in more than one split
    contradictions: list[list[Occurrence]]  # the same file with different labels
    repeated: list[list[Occurrence]]  # the same file several times in one split, with one label
    notes: Sequence[str] = ()  # of the splits


def examine_data(splits: Splits, read: Read) -> DataReport:
    """Of files read each one, and look for the same file in several places; count the images that can be read."""
    occurrences = _occurrences(splits)
    unreadable = find_unreadable([found.path for found in occurrences], read)
    same = _same_content(found for found in occurrences if found.path not in unreadable)
    leaks = [group for group in same if len({found.part for found in group}) > 1]
    contradictions = [group for group in same if len({found.label for found in group}) > 1]
    repeated = [group for group in same if len({(found.part, found.label) for found in group}) == 1]
    counts = _counts(_without(splits, unreadable) if unreadable else splits)
    return DataReport(counts, unreadable | dict(splits.strays), leaks, contradictions, repeated, splits.notes)


def _counts(splits: Splits) -> dict[str, dict[str, int]]:
    names = splits.class_names
    return {
        part: dict(zip(names, samples.indicators(len(names)).sum(0).int().tolist(), strict=True))
        for part, samples in splits.parts().items()
    }


def _occurrences(splits: Splits) -> list[Occurrence]:
    """Of every file in the splits; none of images in memory."""

    def name(label: Tensor) -> str:
        return splits.class_names[label] if label.dim() == 0 else "|".join(compress(splits.class_names, label))

    return [
        Occurrence(source, part, name(label))
        for part, samples in splits.parts().items()
        for source, label in zip(samples.sources, samples.labels, strict=True)
        if isinstance(source, str)
    ]


def _same_content(occurrences: Iterable[Occurrence]) -> list[list[Occurrence]]:
    """Those of files with the same bytes. Only files of the same size are read."""
    by_size: dict[int, list[Occurrence]] = defaultdict(list)
    for found in occurrences:
        by_size[Path(found.path).stat().st_size].append(found)
    by_content: dict[bytes, list[Occurrence]] = defaultdict(list)
    for group in by_size.values():
        if len(group) > 1:
            for found in group:
                by_content[hashlib.sha256(Path(found.path).read_bytes()).digest()].append(found)
    return [group for group in by_content.values() if len(group) > 1]


def print_data_report(report: DataReport, in_memory: bool) -> int:
    """Print it as tables and lines; 1 if there is anything that spoils a training, else 0."""
    console = Console()
    table = Table(title="Images by class and split")
    table.add_column("class")
    for part in report.counts:
        table.add_column(part, justify="right")
    for name in next(iter(report.counts.values())):
        table.add_row(name, *(str(counts[name]) for counts in report.counts.values()))
    console.print(table)
    if in_memory:
        return 0
    kinds = {
        "In more than one split": report.leaks,
        "With different labels": report.contradictions,
        "Repeated": report.repeated,
    }
    for title, groups in kinds.items():
        for group in groups:
            print(printable(f"{title}: {' = '.join(map(str, group))}"))
    for note in report.notes:
        print(printable(note))
    for problem in report.unreadable.values():
        print(printable(f"Unreadable: {problem}"))
    print(
        f"{len(report.unreadable)} files cannot be read, {len(report.leaks)} are in more than one split, "
        f"{len(report.repeated)} are repeated, {len(report.contradictions)} have different labels"
    )
    return 1 if report.unreadable or report.leaks or report.contradictions else 0
