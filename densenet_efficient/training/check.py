"""Which image files can be read: found out before training, not in the middle of it."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from densenet_efficient.training.samples import Samples, Splits, require_every_class

MAX_NAMED = 20  # files that a message lists

Read = Callable[[Any], Any]


def find_unreadable(paths: Sequence[str], read: Read) -> dict[str, str]:
    """Why each of those files that cannot be read cannot, by path. Pillow decodes outside the interpreter's lock."""

    def problem(path: str) -> str | None:
        try:
            read(path)
        except (OSError, ValueError) as error:
            return f"{path}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        return None

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = track(pool.map(problem, paths), "Reading every image once", total=len(paths), transient=True)
        return {path: text for path, text in zip(paths, found, strict=True) if text is not None}


def keep_readable(splits: Splits, read: Read, skip: bool) -> Splits:
    """The splits without the files that cannot be read, each of which is named.

    Raises ValueError naming them if they are not to be skipped, or if a class has no other image.
    """
    paths = [path for samples in splits.parts().values() for path in samples.sources]
    bad = find_unreadable(paths, read) | dict(splits.strays)
    if not bad:
        return splits
    count = len(paths) + len(splits.strays)
    if not skip:
        raise ValueError(
            f"{len(bad)} of {count} files cannot be read as images: {listing(bad.values())}. "
            "Replace or remove them, or leave them out with --data.bad_files skip"
        )
    print(f"Skipping {len(bad)} of {count} files: {listing(bad.values())}")

    def readable(samples: Samples) -> Samples:
        return samples.subset([index for index, path in enumerate(samples.sources) if path not in bad])

    splits = splits.map(readable)
    require_every_class(splits, "--data.bad_files skip", "images that can be read")
    return splits


def listing(problems: Iterable[str]) -> str:
    lines = list(problems)
    more = [f"and {len(lines) - MAX_NAMED} more"] if len(lines) > MAX_NAMED else []
    return "; ".join(lines[:MAX_NAMED] + more)


@dataclass(frozen=True)
class DataReport:
    """What `check-data` found."""

    counts: dict[str, dict[str, int]]  # images by split and class
    unreadable: dict[str, str]  # why, by path; files of another type, or in no class folder, too
    leaks: list[list[str]]  # the same file under several paths, in more than one split
    repeated: list[list[str]]  # the same file under several paths of one split


def examine_data(splits: Splits, read: Read) -> DataReport:
    """Count the images, and of files read each one and look for the same file in several places."""
    parts = splits.parts()
    counts = {
        part: dict(
            zip(splits.class_names, samples.indicators(len(splits.class_names)).sum(0).int().tolist(), strict=True)
        )
        for part, samples in parts.items()
    }
    split_of = {path: part for part, samples in parts.items() for path in samples.sources if isinstance(path, str)}
    unreadable = find_unreadable(list(split_of), read)
    leaks: list[list[str]] = []
    repeated: list[list[str]] = []
    for paths in _same_content(path for path in split_of if path not in unreadable):
        (leaks if len({split_of[path] for path in paths}) > 1 else repeated).append(paths)
    return DataReport(counts, unreadable | dict(splits.strays), leaks, repeated)


def _same_content(paths: Iterable[str]) -> list[list[str]]:
    """Paths of files with the same bytes. Only files of the same size are read."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for path in paths:
        by_size[Path(path).stat().st_size].append(path)
    by_content: dict[bytes, list[str]] = defaultdict(list)
    for group in by_size.values():
        if len(group) > 1:
            for path in group:
                by_content[hashlib.sha256(Path(path).read_bytes()).digest()].append(path)
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
    for title, groups in (("In more than one split", report.leaks), ("Repeated", report.repeated)):
        for paths in groups:
            print(f"{title}: {' = '.join(paths)}")
    for problem in report.unreadable.values():
        print(f"Unreadable: {problem}")
    print(
        f"{len(report.unreadable)} files cannot be read, {len(report.leaks)} are in more than one split, "
        f"{len(report.repeated)} are repeated"
    )
    return 1 if report.unreadable or report.leaks else 0
