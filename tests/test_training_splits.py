"""Which images are to train on, to validate by and to test with: splits by class and patient, and test images only."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from training_cases import fails, fit, make_images, make_patients, write_table

from densenet_efficient.cli import main
from densenet_efficient.training.data import CSVData, FolderData
from densenet_efficient.training.samples import Samples, Splits, require_every_class
from densenet_efficient.training.splits import stratified_split


def test_each_split_has_its_share_of_each_class() -> None:
    labels = np.eye(3)[[0] * 50 + [1] * 20 + [2] * 7]
    parts = stratified_split(labels, (0.6, 0.2, 0.2), seed=0)
    assert sorted(index for part in parts for index in part) == list(range(77))
    for part, fraction in zip(parts, (0.6, 0.2, 0.2), strict=True):
        assert np.abs(labels[part].sum(0) - fraction * labels.sum(0)).max() < 1
    assert parts == stratified_split(labels, (0.6, 0.2, 0.2), seed=0)
    assert parts != stratified_split(labels, (0.6, 0.2, 0.2), seed=1)
    assert parts == [sorted(part) for part in parts]


def test_what_no_share_decides_keeps_the_sizes_of_the_splits() -> None:
    """Of each of ten classes the third image, of which both lack half."""
    parts = stratified_split(np.eye(10)[np.arange(30) // 3], (0.5, 0.5), seed=0)
    assert [len(part) for part in parts] == [15, 15]


def test_a_rounding_decides_no_share() -> None:
    """Of each of two classes both lack half an image, one of them more by the last bit of 0.55 * 50."""
    parts = stratified_split(np.eye(2)[np.arange(100) // 50], (0.55, 0.45), seed=0)
    assert [len(part) for part in parts] == [55, 45]


@pytest.mark.parametrize("counts", [(5, 40), (40, 5), (0, 40), (0, 0)])
def test_images_without_a_finding_fill_the_splits(counts: tuple[int, int]) -> None:
    findings = np.zeros((100, 2))
    findings[: counts[0], 0] = findings[counts[0] : sum(counts), 1] = 1
    for seed in range(4):
        parts = stratified_split(findings, (0.7, 0.3), seed)
        assert np.abs(findings[parts[1]].sum(0) - 0.3 * np.array(counts)).max() < 1
        assert [len(part) for part in parts] == [70, 30]


def test_patients_without_a_finding_count_by_their_images() -> None:
    patients = ["many"] * 30 + [str(number // 3) for number in range(60)]
    for seed in range(3):
        parts = stratified_split(np.zeros((90, 2)), (0.5, 0.5), seed, patients)
        assert abs(len(parts[0]) - 45) <= 6  # two of the others


def test_patients_without_a_finding_take_no_place_of_those_with_one() -> None:
    patients = [str(number // 8) for number in range(24)] + [f"healthy {number // 4}" for number in range(120)]
    findings = np.eye(1)[[0] * 24].tolist() + [[0.0]] * 120
    for seed in range(3):
        parts = stratified_split(np.array(findings), (0.8, 0.1, 0.1), seed, patients)
        assert [np.array(findings)[part].sum() for part in parts] == [8, 8, 8]


def test_groups_stay_whole_and_several_labels_stay_balanced() -> None:
    generator = np.random.default_rng(0)
    labels = (generator.random((400, 4)) < (0.5, 0.3, 0.1, 0.05)).astype(float)
    groups = [f"patient {number}" for number in generator.integers(0, 120, 400)]
    parts = stratified_split(labels, (0.7, 0.3), seed=0, groups=groups)
    assert not {groups[index] for index in parts[0]} & {groups[index] for index in parts[1]}
    shares = labels[parts[1]].sum(0) / labels.sum(0)
    assert np.abs(shares - 0.3).max() < 0.05


def random_patients(generator: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """Classes of 3 to 6 patients with 3 to 11 images each, and a few patients with images of two classes."""
    classes = int(generator.integers(2, 6))
    held = [[name] for name in range(classes) for _ in range(generator.integers(3, 7))]
    held += [list(generator.choice(classes, 2, replace=False)) for _ in range(generator.integers(0, 3))]
    rows = [
        (name, str(patient)) for patient, names in enumerate(held) for name in names * int(generator.integers(3, 12))
    ]
    return np.eye(classes)[[name for name, _ in rows]], [patient for _, patient in rows]


# And the mean shares of the splits, each of which must have one of a class's 3 to 6 patients.
PATIENTS_DIVIDED = [
    ((0.7, 0.15, 0.15), (0.6, 0.2, 0.2)),
    ((0.8, 0.2, 0.0), (0.8, 0.2, 0.0)),
    ((0.98, 0.01, 0.01), (0.6, 0.2, 0.2)),
    ((0.1, 0.8, 0.1), (0.2, 0.6, 0.2)),
]


@pytest.mark.parametrize(("fractions", "expected"), PATIENTS_DIVIDED)
def test_every_split_gets_a_class_of_which_there_are_patients_enough(
    fractions: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    shares = []
    for seed in range(300):
        labels, patients = random_patients(np.random.default_rng(seed))
        parts = stratified_split(labels, fractions, seed, patients)
        assert parts == stratified_split(labels, fractions, seed, patients)
        held = [{patients[index] for index in part} for part in parts]
        assert sum(map(len, held)) == len(set().union(*held)) == len(set(patients))
        used = [part for part, fraction in zip(parts, fractions, strict=True) if fraction]
        assert all(labels[part].any(0).all() for part in used)
        shares.append([len(part) / len(labels) for part in parts])
    assert np.abs(np.mean(shares, 0) - expected).max() < 0.03


@pytest.mark.parametrize("images", [(2, 5), (5, 2), (1, 40)])
def test_two_patients_are_divided(images: tuple[int, int]) -> None:
    patients = ["first"] * images[0] + ["second"] * images[1]
    for seed in range(4):
        parts = stratified_split(np.ones((len(patients), 1)), (0.8, 0.2, 0.0), seed, patients)
        assert [len({patients[index] for index in part}) for part in parts] == [1, 1, 0]


def test_images_to_validate_and_test_with_are_not_enough() -> None:
    """As where none of those to train on can be read."""
    some = Samples(["a", "b"], torch.tensor([0, 1]))
    splits = Splits(["bright", "dark"], some.subset([]), some, some)
    assert not splits.only_test and list(splits.parts()) == ["train", "validation", "test"]
    with pytest.raises(ValueError, match=r"^here: class bright, dark: no image in the train split; it needs more$"):
        require_every_class(splits, "here", "more")


# ---- images to test with only ----


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, in run/, and the images of another hospital, in images/, with a table of them."""
    folder = tmp_path_factory.mktemp("hospitals")
    one_epoch = ("--trainer.max_epochs", "1", "--data.class_weights", "true")
    assert fit(make_images(folder / "first"), folder / "run", *one_epoch) == 0
    images = make_images(folder / "images", per_class=3)
    rows = [{"path": path.relative_to(images), "label": path.parent.name} for path in sorted(images.rglob("*.png"))]
    write_table(images / "table.csv", [row | {"split": "test"} for row in rows])
    return folder


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("images", ("--data.test_fraction", "1")),
        ("images", ("--data.test_fraction", "1", "--data.bad_files", "skip")),
        ("images/table.csv", ("--data.split_column", "split")),
        ("images/table.csv", ("--data.test_fraction", "1")),
    ],
)
def test_all_images_of_another_hospital_are_tested(
    name: str, options: tuple[str, ...], hospital: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(hospital / name), "--data.image_size", "8", "--data.num_workers", "0", *options]
    model = ["--model.network", "densenet-bc-40-12", "--data.class_weights", "true", "--trainer.accelerator", "cpu"]
    checkpoint = ["--ckpt_path", str(hospital / "run" / "best.ckpt"), "--output", str(tmp_path / "out")]
    assert main(["test", *data, *model, *checkpoint]) == 0
    tested = json.loads((tmp_path / "out" / "test" / "metrics.json").read_text())["evaluation"]
    assert (tested["images"], tested["split"], tested["chose_epoch"]) == (6, "test", False)
    assert "6 images of the test split" in capsys.readouterr().out
    assert main(["check-data", *data]) == 0
    assert "train" not in capsys.readouterr().out
    for command in ("fit", "validate"):
        error = fails([command, *data, *model, *checkpoint], capsys)
        assert "all images are of the test split" in error and "evaluate them with the command test" in error


def test_images_in_named_splits_are_tested_with_all_of_them(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        make_images(tmp_path / "images" / split, per_class=2)
    splits = FolderData(tmp_path / "images", test_fraction=1, image_size=8, batch_size=2).splits
    assert splits.only_test and splits.test is not None and len(splits.test) == 12
    rows = [{"path": f"{name}/{n}.png", "label": name, "split": "train"} for name in ("bright", "dark") for n in (0, 1)]
    table = write_table(tmp_path / "images" / "train" / "table.csv", rows)
    splits = CSVData(table, split_column="split", test_fraction=1, image_size=8, batch_size=2).splits
    assert splits.only_test and splits.test is not None and len(splits.test) == 4
    for data, options in ((tmp_path / "images", {}), (table, {"split_column": "split"})):
        kind = CSVData if options else FolderData
        with pytest.raises(ValueError, match=r"names its splits, .*: expected 0, or 1 to test with all, got 0.2"):
            kind(data, test_fraction=0.2, image_size=8, batch_size=2, **options)
        with pytest.raises(ValueError, match=r"got 0.2; give --data.test_fraction 0 where a recipe takes a share$"):
            kind(data, test_fraction=0.2, image_size=8, batch_size=2, **options)


def test_what_systems_leave_among_images_is_no_class(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    make_images(images / "bright", names=("@eaDir", "__MACOSX"))
    make_images(tmp_path / "more", names=("@eaDir", "$RECYCLE.BIN"))
    for path in (tmp_path / "more").iterdir():
        path.rename(images / path.name)
    (images / "dark" / "THUMBS.DB").write_bytes(b"")
    splits = FolderData(images, image_size=8, batch_size=2).splits
    assert splits.class_names == ["bright", "dark"]
    assert sum(map(len, splits.parts().values())) == 12


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("path;label;age (years, months)\n0.png;dark;40\n", "save it with commas between the cells, in place of ';'"),
        ("path,label\nbright\\0.png,bright\ndark\\0.png,dark\n", "write them with / between folders"),
        ("path,label\nbright/0.png ,bright\ndark/0.png ,dark\n", "remove the blanks around them"),
    ],
)
def test_tables_of_other_programs(text: str, remedy: str, tmp_path: Path) -> None:
    table = make_images(tmp_path / "images") / "table.csv"
    table.write_text(text)
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(remedy)):
        CSVData(table, image_size=8, batch_size=2)


def test_a_table_as_excel_writes_it(tmp_path: Path) -> None:
    """It names its separator, and ends in rows of nothing."""
    table = make_images(tmp_path / "images") / "table.csv"
    rows = [f"{name}/{number}.png,{name}" for name in ("bright", "dark") for number in range(6)]
    table.write_bytes("\r\n".join(["sep=,", "path,label", *rows, ",", ",", ""]).encode("utf-8-sig"))
    splits = CSVData(table, image_size=8, batch_size=2).splits
    assert sum(map(len, splits.parts().values())) == 12


def test_a_file_of_two_groups_is_named(tmp_path: Path) -> None:
    rows = make_patients(tmp_path)
    table = write_table(tmp_path / "table.csv", [*rows, rows[0] | {"patient": "another"}, rows[1]])
    message = r"table.csv:22: .*bright/0.png is of group another, and of bright 0 at .*table.csv:2; correct one of them"
    with pytest.raises(ValueError, match=message):
        CSVData(table, group_column="patient", image_size=8, batch_size=4, num_workers=0)


def test_classes_that_one_split_alone_can_have_are_shared_among_them() -> None:
    parts = stratified_split(np.eye(2), (0.7, 0.3), seed=0)
    assert [len(part) for part in parts] == [1, 1]


def test_a_split_is_the_same_on_every_machine() -> None:
    """NumPy sorts what is equal in an order that depends on the processor, unless it is asked not to."""
    labels = np.eye(2)[[0] * 25 + [1] * 15]
    assert stratified_split(labels, (0.8, 0.2), seed=0)[1] == [5, 12, 15, 16, 19, 29, 31, 36]
