"""Predictions: image files in, a CSV with probabilities out, as they are made; an interrupted run is continued."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils.data import Dataset

from densenet_efficient.files import FULL_DISK, atomic_write, prepare_directory
from densenet_efficient.training.check import listing, printable
from densenet_efficient.training.checkpoint import SavedClassifier, load_classifier, probabilities_of
from densenet_efficient.training.folders import OTHER_TYPE, list_files
from densenet_efficient.training.images import what_is_wrong
from densenet_efficient.training.loading import ReadingLoader
from densenet_efficient.training.progress import Progress
from densenet_efficient.training.signals import end_with_the_run
from densenet_efficient.training.tables import filled, read_rows, require_a_file

ORIGIN_OF_PATHS = ("root", "working_directory")  # of which the latter is empty where the former does not need it
FIRST_COLUMNS = ("path", "prediction")


class Batch(NamedTuple):
    """The images that could be read, and why the others could not."""

    images: Tensor  # [N, C, H, W]
    paths: list[str]
    problems: list[str]


class ImageFiles(Dataset[tuple[str, Any]]):
    """Path and input of each file; in place of the input of a file that cannot be read, what is wrong with it."""

    def __init__(self, paths: Sequence[str], classifier: SavedClassifier) -> None:
        self.paths, self.preprocessing = paths, classifier.preprocessing
        self.transform = self.preprocessing.transform()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        path = self.paths[index]
        try:
            image = self.preprocessing.read(path)
        except (OSError, ValueError) as error:
            return path, what_is_wrong(path, error)
        return path, self.transform(image)


def collate(items: list[tuple[str, Any]]) -> Batch:
    good = [(path, image) for path, image in items if isinstance(image, Tensor)]
    images = torch.stack([image for _, image in good]) if good else torch.empty(0)
    return Batch(images, [path for path, _ in good], [text for _, text in items if isinstance(text, str)])


class Predictor(LightningModule):
    """Probabilities [N, classes], averaged over views of each image: itself, mirrored, or the square's 8 symmetries."""

    def __init__(self, classifier: SavedClassifier, views: str) -> None:
        super().__init__()
        self.model, self.multi_label, self.views = classifier.model, classifier.multi_label, views

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if not batch.paths:
            return None
        views = [self._probabilities(view) for view in views_of(batch.images, self.views)]
        return torch.stack(views).mean(0)

    def _probabilities(self, images: Tensor) -> Tensor:
        return probabilities_of(self.model(images).float(), self.multi_label)


def views_of(images: Tensor, views: str) -> Iterator[Tensor]:
    """The images [N, C, H, W], and their symmetric copies."""
    for quarter_turns in range(4 if views == "dihedral" else 1):
        turned = images.rot90(quarter_turns, (2, 3))
        yield turned
        if views != "none":
            yield turned.flip(3)


def predict(
    checkpoint: Path,
    inputs: Sequence[Path],
    *,
    output: Path | None = None,
    views: str = "none",
    batch_size: int = 32,
    path_column: str = "path",
    root: Path | None = None,
    num_workers: int = 0,
    accelerator: str = "cpu",
    precision: Any = "32-true",
    bad_files: str = "refuse",
) -> None:
    """Classify images, folders of images and those that CSV tables list; print lines, or write the CSV `output`.

    The paths of a table are relative to `root`, or to the table's folder.

    What `output` already holds is not computed again. Raises OSError for a missing file and ValueError for one that is
    no image, unless such files are only to be named and left out; and ValueError for an `output` of another model.
    """
    classifier = load_classifier(checkpoint)
    paths = list(dict.fromkeys(path for given in inputs for path in expand(given, path_column, root)))
    given_as = ", ".join(map(str, inputs))
    if not paths:
        raise ValueError(f"{given_as}: found no image; expected image files, folders or CSV tables")
    writer: BasePredictionWriter = LineWriter(classifier, bad_files)
    if output is not None:
        if output.is_dir():
            raise IsADirectoryError(errno.EISDIR, "A folder; give --output a table in it", str(output))
        prepare_directory(output.parent)
        writer = CSVWriter(classifier, bad_files, output, views, root, paths)
        paths = [path for path in paths if path not in writer.done]
        print(f"{len(writer.done)} predictions are in {output}; {len(paths)} to go")
    if not paths:
        return
    require_a_file(given_as, paths, "--root")
    loader = ReadingLoader(
        ImageFiles(paths, classifier),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=end_with_the_run,
    )
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision,
        logger=False,
        callbacks=[writer, *([Progress()] if output is not None else [])],
        enable_progress_bar=output is not None,
        enable_checkpointing=False,
    )
    trainer.predict(Predictor(classifier, views), loader, return_predictions=False)


def expand(given: Path, path_column: str, root: Path | None = None) -> list[str]:
    """The image files that a folder holds or a CSV table lists, relative to `root`, or to the table's folder; any other
    file is an image.

    What a folder holds besides, such as an earlier table, is named.
    """
    if given.is_dir():
        images, others = list_files(given)
        if others:
            print(f"left out as {OTHER_TYPE}: {listing(map(str, others))}", file=sys.stderr)
        return [str(path) for path in images]
    if given.suffix.lower() == ".csv":
        rows = read_rows(given, {path_column: "--path_column"})
        below = given.parent if root is None else root
        return [str(below / filled(place, row, path_column)) for place, row in rows.items()]
    if not given.exists():
        raise FileNotFoundError(errno.ENOENT, "No such file; expected an image, a folder or a CSV table", str(given))
    return [str(given)]


class LineWriter(BasePredictionWriter):
    """Prints the most probable classes of each image."""

    def __init__(self, classifier: SavedClassifier, bad_files: str) -> None:
        super().__init__("batch")
        self.class_names, self.multi_label = classifier.class_names, classifier.multi_label
        self.bad_files = bad_files

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Tensor | None,
        batch_indices: Sequence[int] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        if prediction is not None:
            self.write(batch.paths, prediction.cpu())
        for problem in batch.problems:
            if self.bad_files == "refuse":
                raise ValueError(f"{problem}; leave such files out with --bad_files skip")
            print(f"skipped: {problem}", file=sys.stderr)

    def write(self, paths: list[str], probabilities: Tensor) -> None:
        for path, row in zip(paths, probabilities, strict=True):
            best = row.topk(min(3, len(row)))
            named = [(self.class_names[index], value) for index, value in zip(best.indices, best.values, strict=True)]
            top = ", ".join(f"{name} {value:.1%}" for name, value in named)
            print(printable(f"{path}: {self.decision(row)} ({named[0][1]:.1%}); top {len(named)}: {top}"))

    def decision(self, probabilities: Tensor) -> str:
        """The most probable class; of several labels per image, those of at least a half, with | between them."""
        if not self.multi_label:
            return self.class_names[int(probabilities.argmax())]
        return "|".join(name for name, value in zip(self.class_names, probabilities, strict=True) if value >= 0.5)


class CSVWriter(LineWriter):
    """Appends a row per image: its path, the decision, and the probability of each class, in a column of its name.

    A file beside it says by which weights and views, so that a table is of one model alone, and below which root.
    """

    def __init__(
        self,
        classifier: SavedClassifier,
        bad_files: str,
        path: Path,
        views: str,
        root: Path | None = None,
        paths: Iterable[str] = (),
    ) -> None:
        super().__init__(classifier, bad_files)
        self.path, self.header = path, [*FIRST_COLUMNS, *map(_column_of, classifier.class_names)]
        self.origin = {"weights_sha256": _fingerprint(classifier), "views": views}
        self.origin_of_paths = _origin_of_paths(root, paths)
        self.done = self._rows_so_far()

    def _rows_so_far(self) -> set[str]:
        """The paths of an earlier run's rows. A last row that was cut short is removed."""
        origin = self.path.with_name(f"{self.path.name}.json")
        if not self.path.exists() or self.path.stat().st_size == 0:
            return self._begin(origin)
        content = self.path.read_bytes()
        try:
            rows, end = _whole_records(content, len(self.header))
        except csv.Error:  # no table at all
            rows, end = [], 0
        if not rows or rows[0] != self.header:
            raise ValueError(
                f"{self.path}: holds something else than predictions of these classes; name another --output"
            )
        if len(rows) == 1:
            return self._begin(origin)
        theirs = self._read_origin(origin)
        paths = {name: theirs.pop(name) for name in ORIGIN_OF_PATHS if name in theirs}
        if theirs != self.origin:
            raise ValueError(
                f"{self.path}: holds predictions of other weights or --views ({origin.name} beside it tells of which); "
                "name another --output"
            )
        if paths != self.origin_of_paths and (paths or ORIGIN_OF_PATHS[0] in self.origin_of_paths):  # else an old table
            raise ValueError(
                f"{self.path}: holds predictions {_as_given(paths)}, not {_as_given(self.origin_of_paths)}; "
                "give the same, or name another --output"
            )
        if end < len(content):
            os.truncate(self.path, end)
        return {row[0] for row in rows[1:] if row}

    def _read_origin(self, origin: Path) -> dict[str, str]:
        try:
            theirs = json.loads(origin.read_bytes()) if origin.exists() else {}
        except ValueError as error:
            raise ValueError(
                f"{origin}: is damaged, and tells no more of which weights {self.path.name} is; name another --output"
            ) from error
        return theirs if isinstance(theirs, dict) else {}

    def _begin(self, origin: Path) -> set[str]:
        with atomic_write(origin) as file:
            file.write(json.dumps(self.origin | self.origin_of_paths).encode())
        with self._open("w") as file:
            csv.writer(file).writerow(self.header)
        return set()

    def _open(self, mode: Literal["w", "a"]) -> TextIO:
        """Names that are not UTF-8 are written as the bytes that they are."""
        return open(self.path, mode, newline="", encoding="utf-8", errors="surrogateescape")

    def write(self, paths: list[str], probabilities: Tensor) -> None:
        rows = [
            [path, self.decision(row), *(f"{value:.6f}" for value in row.tolist())]
            for path, row in zip(paths, probabilities, strict=True)
        ]
        try:
            with self._open("a") as file:
                csv.writer(file).writerows(rows)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            reason = f"{error.strerror}; make room, and the same command goes on"
            raise OSError(error.errno, reason, str(self.path)) from error


def _column_of(class_name: str) -> str:
    """Its own name, but for a class that is called as another column is, such as "path" of what is pathological."""
    return f"{class_name} (class)" if class_name in FIRST_COLUMNS else class_name


def _origin_of_paths(root: Path | None, paths: Iterable[str]) -> dict[str, str]:
    """What the rows' paths start with, and where that is; nothing of absolute paths without a root."""
    if root is None:
        return {} if all(map(os.path.isabs, paths)) else {ORIGIN_OF_PATHS[1]: str(Path.cwd())}
    return dict(zip(ORIGIN_OF_PATHS, (str(root), "" if root.is_absolute() else str(Path.cwd())), strict=True))


def _as_given(paths: Mapping[str, str]) -> str:
    root, folder = (paths.get(name) for name in ORIGIN_OF_PATHS)
    given = "without --root" if root is None else f"with --root {root}"
    return given + (f" (in {folder})" if folder else "")


def _whole_records(content: bytes, width: int) -> tuple[list[list[str]], int]:
    """The records of a CSV file of so many columns, without a last one that was cut short; and where they end."""
    lines = content.splitlines(keepends=True)  # of bytes: text would be divided at a U+2028 in a name too
    reader = csv.reader(line.decode(errors="surrogateescape") for line in lines)
    ends = list(accumulate(map(len, lines), initial=0))
    records = [(row, ends[reader.line_num]) for row in reader]
    if records and not (content.endswith(b"\n") and len(records[-1][0]) == width):
        records.pop()
    return [row for row, _ in records], records[-1][1] if records else 0


def _fingerprint(classifier: SavedClassifier) -> str:
    """Of the weights, and of what is done to the images."""
    digest = hashlib.sha256(repr(classifier.preprocessing).encode())
    for name, tensor in classifier.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
