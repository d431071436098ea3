"""The figures of a report against scikit-learn's, and the page."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from sklearn import metrics
from torch import nn
from training_cases import fails, fit, make_images, make_patients, write_table

from densenet_efficient.cli import main
from densenet_efficient.training import pictures, report
from densenet_efficient.training.checkpoint import (
    ENTRY,
    TrainingImages,
    check_fits,
    describe_classifier,
    load_classifier,
    marks_of,
    read_checkpoint,
)
from densenet_efficient.training.comparison import _accuracy
from densenet_efficient.training.evaluation import (
    MAX_RESAMPLED_AREAS,
    Evaluation,
    aurocs,
    calibration,
    roc_cells,
    roc_curve,
    summarise,
    worst_mistakes,
)
from densenet_efficient.training.pictures import Mistake, draw_memory
from densenet_efficient.training.report import write_report


def evaluation(multi_label: bool = False, count: int = 200, classes: int = 4) -> Evaluation:
    """Random answers that are right more often than not, with ties."""
    generator = np.random.default_rng(0)
    right = generator.integers(0, classes, count)
    labels = np.eye(classes)[right] if not multi_label else (generator.random((count, classes)) < 0.3).astype(float)
    logits = generator.normal(size=(count, classes)) + labels
    probabilities = 1 / (1 + np.exp(-logits))
    if not multi_label:
        probabilities /= probabilities.sum(1, keepdims=True)
    names = [f"class {index}" for index in range(classes)]
    return Evaluation(names, multi_label, probabilities.round(2), labels, [f"{i}.png" for i in range(count)], "test")


def test_figures_of_single_labels() -> None:
    one = evaluation()
    right, given = one.labels.argmax(1), one.probabilities.argmax(1)
    summary = summarise(one)
    assert summary["accuracy"]["value"] == pytest.approx(metrics.accuracy_score(right, given))
    assert summary["balanced_accuracy"]["value"] == pytest.approx(metrics.balanced_accuracy_score(right, given))
    assert summary["macro_f1"]["value"] == pytest.approx(metrics.f1_score(right, given, average="macro"))
    for index, entry in enumerate(summary["classes"].values()):
        area = metrics.roc_auc_score(one.labels[:, index], one.probabilities[:, index])
        assert entry["auroc"]["value"] == pytest.approx(area)
        assert entry["auroc"]["low"] < area < entry["auroc"]["high"]
        assert entry["precision"]["value"] == pytest.approx(metrics.precision_score(right == index, given == index))
    assert summary["confusion"] == metrics.confusion_matrix(right, given).tolist()


def test_figures_of_several_labels() -> None:
    several = evaluation(multi_label=True)
    summary = summarise(several)
    decisions = several.probabilities >= 0.5
    assert summary["accuracy"]["value"] == pytest.approx(metrics.accuracy_score(several.labels, decisions))
    assert summary["macro_f1"]["value"] == pytest.approx(metrics.f1_score(several.labels, decisions, average="macro"))
    assert summary["macro_auroc"] == pytest.approx(metrics.roc_auc_score(several.labels, several.probabilities))
    assert summary["confusion"] == metrics.multilabel_confusion_matrix(several.labels, decisions).tolist()


@pytest.mark.parametrize("multi_label", [False, True])
def test_areas_of_resampled_images(multi_label: bool) -> None:
    """With ties, and with images that were not drawn."""
    some = evaluation(multi_label)
    weights = np.random.default_rng(1).multinomial(200, np.full(200, 1 / 200), 3).astype(float)
    columns = list(zip(some.labels.T, some.probabilities.T, strict=True))
    areas = aurocs([roc_cells(scores, labels) for labels, scores in columns], weights)
    expected = [[metrics.roc_auc_score(*column, sample_weight=drawn) for column in columns] for drawn in weights]
    np.testing.assert_allclose(areas, expected, rtol=1e-12)


def test_areas_of_very_many_classes_have_no_intervals() -> None:
    many = evaluation(count=400, classes=MAX_RESAMPLED_AREAS + 1)
    summary = summarise(many)
    for index, entry in enumerate(summary["classes"].values()):
        area = metrics.roc_auc_score(many.labels[:, index], many.probabilities[:, index])
        assert entry["auroc"] == {"value": pytest.approx(area), "low": None, "high": None}
    low, value, high = (summary["macro_f1"][name] for name in ("low", "value", "high"))
    assert 0 < low < high < 1 and 0 < value < 1


def test_intervals_have_the_width_of_the_binomial() -> None:
    entry = summarise(evaluation(count=1000))["accuracy"]
    expected = 2 * 1.96 * np.sqrt(entry["value"] * (1 - entry["value"]) / 1000)
    assert (entry["high"] - entry["low"]) / expected == pytest.approx(1, abs=0.1)


def test_the_accuracy_that_is_compared_is_that_of_the_decisions() -> None:
    logits = torch.tensor([[0.0, -1.0], [-0.2, 2.0]])
    several, one = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 0])
    assert [_accuracy(nn.Identity(), [(logits, labels)], "cpu") for labels in (several, one)] == [0.75, 0.5]


def test_intervals_follow_from_the_seed() -> None:
    one = evaluation()
    first, again, other = (summarise(one, seed) for seed in (0, 0, 1))
    assert first == again and first["accuracy"] != other["accuracy"]


def test_roc_curve_and_calibration() -> None:
    one = evaluation()
    false, true = roc_curve(one.probabilities[:, 0], one.labels[:, 0])
    expected = metrics.roc_curve(one.labels[:, 0], one.probabilities[:, 0], drop_intermediate=False)
    np.testing.assert_allclose([false, true], expected[:2])
    bins, error = calibration(one)
    assert sum(entry["share"] for entry in bins) == pytest.approx(1)
    certain = Evaluation(["a", "b"], False, np.array([[0.9, 0.1]] * 10), np.eye(2)[[0] * 9 + [1]], [], "test")
    assert calibration(certain)[1] == pytest.approx(0)
    surest = replace(certain, probabilities=np.array([[1.0, 0.0]] * 10))
    assert calibration(surest)[1] == pytest.approx(0.1)
    assert 0 < error < 1


def test_a_class_without_images_is_not_defined() -> None:
    one = evaluation(classes=3)
    lacking = Evaluation(
        [*one.class_names, "none"],
        False,
        np.c_[one.probabilities, np.zeros(200)],
        np.c_[one.labels, np.zeros(200)],
        one.sources,
        "test",
    )
    summary = summarise(lacking)
    assert summary["classes"]["none"]["auroc"]["value"] is None
    assert summary["balanced_accuracy"]["value"] == pytest.approx(summarise(one)["balanced_accuracy"]["value"])


def test_resampled_images_without_a_rare_class_say_nothing_of_it() -> None:
    """A class of two images is in none of about every seventh sample, where a perfect classifier does not give it."""
    labels = np.eye(3)[[0] * 30 + [1] * 30 + [2] * 2]
    summary = summarise(Evaluation(["a", "b", "rare"], False, 0.9 * labels + 0.03, labels, [], "test"))
    perfect = {"value": 1.0, "low": None, "high": None}
    assert summary["macro_f1"] == summary["classes"]["rare"]["f1"] == perfect
    assert summary["classes"]["rare"]["precision"] == perfect | {"low": pytest.approx(0.3424, abs=1e-4), "high": 1.0}


@pytest.mark.filterwarnings("error")
def test_a_class_that_neither_is_nor_was_given_counts_as_zero() -> None:
    """As of scikit-learn's zero_division=0, also in samples without any class."""
    labels = np.array([[1.0, 0.0], [0.0, 0.0]])
    summary = summarise(Evaluation(["a", "none"], True, labels, labels, [], "test"))
    assert summary["macro_f1"]["value"] == metrics.f1_score(labels, labels, average="macro", zero_division=0) == 0.5
    assert summary["classes"]["none"]["f1"] == {"value": 0.0, "low": None, "high": None}
    missed = np.array([[0.9, 0.1]] * 6)  # the second class is there, but is never given
    summary = summarise(Evaluation(["a", "b"], False, missed, np.eye(2)[[0, 1] * 3], [], "test"))
    assert summary["classes"]["b"]["precision"] == {"value": 0.0, "low": None, "high": None}


def test_worst_mistakes_come_first() -> None:
    one = evaluation()
    mistakes = worst_mistakes(one, 5)
    assert len(mistakes) == 5
    chances = [one.probabilities[image, right] for image, given, right in mistakes if given != right]
    assert chances == sorted(chances) and len(chances) == 5
    several = evaluation(multi_label=True)
    assert all(abs(several.probabilities[i, k] - several.labels[i, k]) > 0.5 for i, k, _ in worst_mistakes(several, 5))


def test_half_a_chance_is_given_and_may_be_a_mistake() -> None:
    one = Evaluation(["a", "b"], True, np.array([[0.5, 0.1]]), np.zeros((1, 2)), ["image"], "test")
    assert one.correct.sum() == 0 and worst_mistakes(one, 5) == [(0, 0, 0)]


# ---- the page ----


class Page(HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its report, on test images of which bright and dark are exchanged, so that there are mistakes.

    One of them has a name that is not UTF-8.
    """
    folder, names = tmp_path_factory.mktemp("report"), ("bright", "grey <b>", "dark")
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        make_images(folder / "images" / part, count, names[::-1] if part == "test" else names)
    mistaken = folder / "images" / "test" / "dark" / "0.png"
    mistaken.rename(mistaken.with_name(os.fsdecode(b"caf\xe9.png")))
    assert fit(folder / "images", folder / "run", "--report", "true", "--trainer.max_epochs", "2") == 0
    return folder / "run"


def test_the_report_is_one_file_that_needs_nothing(run: Path) -> None:
    page = Page((run / "report.html").read_text())
    assert len(page.references) >= 4
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert "http" not in re.sub(r"base64,[^\"]+", "", (run / "report.html").read_text())
    assert "dark/caf\\xe9.png: dark (" in page.text
    assert "grey <b>" in page.text and "9 images of the test split" in page.text


def test_the_report_gives_its_figures_and_pictures_apart(run: Path) -> None:
    content = json.loads((run / "metrics.json").read_text())
    assert content["evaluation"]["split"] == "test" and content["evaluation"]["images"] == 9
    assert [record["epoch"] for record in content["history"]] == [1, 2]
    for name in ("curves.png", "confusion.png", "roc.png", "calibration.png", "mistakes.png"):
        with Image.open(run / name) as image:
            assert image.format == "PNG" and min(image.size) > 100


def test_the_report_of_several_labels_counts_what_is_missed(tmp_path: Path) -> None:
    several = evaluation(multi_label=True)
    summary = summarise(several)
    write_report(tmp_path, several, {"network": "any", "evaluation": summary, "versions": {}}, [], "")
    given, present = several.probabilities[:, 3] >= 0.5, several.labels[:, 3] == 1
    cells = (present & given, present & ~given, given & ~present, ~given & ~present)
    row = "".join(f"<td>{cell.sum()}</td>" for cell in cells)
    assert f"<tr><td>class 3</td>{row}</tr>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_a_run_of_weights_of_another_type_has_its_report(precision: str, tmp_path: Path) -> None:
    """With mistakes, since bright and dark are exchanged."""
    make_images(tmp_path / "images" / "train", 4)
    make_images(tmp_path / "images" / "val", 2, ("dark", "bright"))
    options = ("--trainer.precision", precision, "--trainer.max_epochs", "1", "--report", "true")
    assert fit(tmp_path / "images", tmp_path / "run", *options) == 0
    assert {"report.html", "metrics.json", "mistakes.png"} <= {path.name for path in (tmp_path / "run").iterdir()}


NAMES = [r"$\frac$", "x^{$ and $", "_private", "costs $5"]


def test_names_are_drawn_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None as mathematics, none left out of a legend."""
    figures: dict[str, Figure] = {}
    save = pictures.save_figure
    monkeypatch.setattr(
        pictures, "save_figure", lambda figure, path: (figures.update({path.name: figure}), save(figure, path))
    )
    one = replace(evaluation(), class_names=NAMES)
    mistakes = [Mistake(np.zeros((8, 8, 1), np.float32), np.zeros((8, 8), np.float32), name, name) for name in NAMES]
    write_report(tmp_path, one, {"network": "any", "evaluation": summarise(one), "versions": {}}, mistakes, "")
    for picture in ("confusion.png", "roc.png", "mistakes.png"):
        texts = [text.get_text() for text in figures[picture].findobj(Text)]
        assert not any(map(is_math_text, texts))
        shown = [text.replace(r"\$", "$").strip("\u200b") for text in texts]
        assert all(any(text.startswith(name) for text in shown) for name in NAMES)


def test_curves_of_the_hardest_of_many_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: figures.append(figure))
    one = evaluation(classes=10)
    areas = {name: 0.5 + index / 20 for index, name in enumerate(one.class_names)}
    pictures.draw_roc(one, areas, tmp_path / "roc.png")
    legend = figures[0].axes[0].get_legend()
    assert legend is not None
    assert [text.get_text().rsplit("  ")[0] for text in legend.get_texts()] == one.class_names[:8]


needs_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="no chromium; Debian's package of this name brings it"
)


def in_browser(page: Path, *options: str) -> str:
    """What Chromium says of a page, without a network."""
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        profile,
    ]
    return subprocess.run(
        [*command, *options, f"file://{page}"], capture_output=True, text=True, timeout=120, check=True
    ).stdout


@needs_chromium
def test_the_report_on_a_screen(run: Path, tmp_path: Path) -> None:
    """Its figures' bars, the confusion matrix and the curves have their colours, and nothing stands beside the page."""
    shutil.copy(run / "report.html", tmp_path / "page.html")
    in_browser(tmp_path / "page.html", "--window-size=1100,3000", f"--screenshot={tmp_path / 'page.png'}")
    with Image.open(tmp_path / "page.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (3000, 1100, 3)
    ink = (pixels.min(2) < 250).any(0).nonzero()[0]
    assert ink[0] > 20 and ink[-1] < 1080
    for colour in ((0, 114, 178), (26, 26, 26)):  # the accent, and the text
        assert (np.abs(pixels - colour).max(2) < 8).sum() > 500


@needs_chromium
def test_the_report_in_a_browser(run: Path, tmp_path: Path) -> None:
    """Every picture is decoded and the figures are seen."""
    page = (run / "report.html").read_text()
    probe = "<script>document.title = [...document.images].map(i => i.naturalWidth).join()</script>"
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{probe}</body>"))
    shown = in_browser(tmp_path / "page.html", "--dump-dom")
    title = re.search(r"<title>([\d,]+)</title>", shown)
    assert title is not None
    widths = [int(width) for width in title[1].split(",")]
    assert len(widths) == len(Page(page).references) and min(widths) > 100


def test_the_memory_picture_is_a_png(tmp_path: Path) -> None:
    draw_memory(
        {22: {"naive": 4.0, "efficient": 1.0}, 40: {"naive": 9.0, "efficient": 1.5}}, "none", tmp_path / "a.png"
    )
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and min(image.size) > 400


# ---- what a checkpoint says of its training ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of two classes, and a run of them."""
    folder = tmp_path_factory.mktemp("trained")
    make_images(folder / "images", per_class=5)
    assert fit(folder / "images", folder / "run", "--trainer.max_epochs", "1") == 0
    return folder


def claims_of_a_test(folder: Path, checkpoint: Path, *options: str) -> tuple[int | None, str]:
    """How many images the model was trained on by metrics.json, and the first paragraph of the report."""
    config = ("--config", str(folder / "run" / "config.yaml"), "--output", str(folder / "run"))
    assert main(["test", *config, "--ckpt_path", str(checkpoint), "--report", "true", *options]) == 0
    page = (folder / "run" / "test" / "report.html").read_text()
    summary = json.loads((folder / "run" / "test" / "metrics.json").read_text())["evaluation"]
    return summary["trained_on"], page[page.index("<p>Figures") : page.index("</p>")]


def test_images_that_a_model_was_trained_on_are_counted(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a folder that has grown since and is elsewhere, so that the images are divided anew."""
    folder = shutil.copytree(trained, tmp_path / "moved")
    best, images = folder / "run" / "best.ckpt", ("--data.folder", str(folder / "images"))
    count, sentence = claims_of_a_test(folder, best, *images)
    assert count == 0 and "which the model was not trained on" in sentence
    assert "the model was trained on" not in capfd.readouterr().err
    for index in range(5, 13):
        Image.new("RGB", (12 + index, 10)).save(folder / "images" / "dark" / f"a{index}.png")
    count, sentence = claims_of_a_test(folder, best, *images, "--data.validation_fraction", "0.6")
    assert count and f"<b>the model was trained on {count} of them</b>" in sentence and "not trained" not in sentence
    assert f"the model was trained on {count} of the " in capfd.readouterr().err
    config = ("--config", str(folder / "run" / "config.yaml"), "--ckpt_path", str(best))
    assert main(["validate", *config, *images, "--data.validation_fraction", "0.6"]) == 0
    assert f"the model was trained on {count} of the " in capfd.readouterr().err


def test_mistakes_are_looked_at_as_they_were_made(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, grad_cam = [], report.grad_cam

    def observed(model: nn.Module, images: torch.Tensor, **options: Any) -> torch.Tensor:
        training.append(model.training)
        return grad_cam(model, images, **options)

    monkeypatch.setattr(report, "worst_mistakes", lambda *_: [(0, 0, 1)])
    monkeypatch.setattr(report, "grad_cam", observed)
    folder = shutil.copytree(trained, tmp_path / "mistaken")
    claims_of_a_test(folder, folder / "run" / "best.ckpt")
    assert training == [False]


def test_of_an_earlier_checkpoint_nothing_is_claimed(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "earlier")
    content = read_checkpoint(folder / "run" / "best.ckpt")
    assert len(content[ENTRY].pop("trained_on")) == 8
    torch.save(content, folder / "earlier.ckpt")
    count, sentence = claims_of_a_test(folder, folder / "earlier.ckpt")
    assert count is None and "trained on" not in sentence


def test_a_checkpoint_is_evaluated_with_its_own_epsilon(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "keras")
    content = read_checkpoint(folder / "run" / "best.ckpt")
    content[ENTRY]["config"]["norm_eps"] = 0.5
    torch.save(content, folder / "keras.ckpt")
    claims_of_a_test(folder, folder / "keras.ckpt")
    assert json.loads((folder / "run" / "test" / "metrics.json").read_text())["config"]["norm_eps"] == 0.5


def test_a_continuation_with_another_split_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = make_patients(tmp_path / "images")
    for row in rows:
        row["split"] = "val" if row["path"].endswith(("8.png", "9.png")) else "train"
    table, run = tmp_path / "images" / "table.csv", tmp_path / "run"
    options = ("--data.split_column", "split")
    assert fit(write_table(table, rows), run, *options, "--trainer.max_epochs", "1") == 0
    for row in rows:
        row["split"] = "val" if row["path"].endswith(("7.png", "8.png")) else "train"
    write_table(table, rows)
    assert fit(table, run, *options, "--trainer.max_epochs", "2", "--ckpt_path", "last") == 0
    assert "the model was trained on 2 of the 4 images of the validation split" in capfd.readouterr().err
    assert len(read_checkpoint(run / "last.ckpt")[ENTRY]["trained_on"]) == 18
    assert fit(table, run, *options, "--trainer.max_epochs", "3", "--ckpt_path", "last") == 0
    assert "the model was trained on 2 of the 4 images of the validation split" in capfd.readouterr().err


def test_images_are_told_apart(tmp_path: Path) -> None:
    """Files by their paths from the root and their sizes, others by their pixels; what is missing is no error."""
    for name, content in (("a.png", b"1"), ("b.png", b"1"), ("c.png", b"12")):
        (tmp_path / name).write_bytes(content)
    sources = [str(tmp_path / name) for name in ("a.png", "b.png", "c.png", "missing.png")]
    marks = marks_of(sources, tmp_path)
    assert len(marks.unique()) == 4 and marks.dtype == torch.int64
    (tmp_path / "c.png").write_bytes(b"1")
    assert (marks_of(sources, tmp_path) == marks).tolist() == [True, True, False, True]
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    assert torch.equal(marks_of(list(pixels), tmp_path), marks_of(pixels.copy(), tmp_path))
    assert len(marks_of(pixels, tmp_path).unique()) == 3


def test_an_image_that_is_in_both_splits_is_not_one_of_another_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 2, 2)
    images = TrainingImages(marks_of(pixels[:3], tmp_path))
    for train, said in ((pixels[:3], ""), (pixels[:2], "the model was trained on 1 of the 2 images of the validation")):
        splits = SimpleNamespace(train=SimpleNamespace(sources=train), validation=SimpleNamespace(sources=pixels[2:]))
        data = SimpleNamespace(splits=splits, root=tmp_path)
        images.begin(SimpleNamespace(datamodule=data, is_global_zero=True))
        error = capsys.readouterr().err
        assert error.startswith(said) and bool(error) == bool(said)


@pytest.mark.parametrize("command", ["validate", "test"])
@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (("--data.image_size", "16"), "(image_size 8, not 16); give"),
        (("--data.stretch", "true"), "stretch False, not True"),
        (("--data.mean", "[0.5, 0.5, 0.5]", "--data.std", "[1, 1, 1]"), "mean (0.485, 0.456, 0.406), not (0.5, "),
    ],
)
def test_other_input_than_that_of_the_training_is_refused(
    command: str, options: tuple[str, ...], difference: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = trained / "run" / "config.yaml"
    error = fails([command, "--config", str(config), "--ckpt_path", "best", *options], capsys)
    assert difference in error
    assert f"give the --data options it was trained with, as --config {config} does" in error


def test_other_labels_than_those_of_the_training_are_refused(trained: Path) -> None:
    saved = load_classifier(trained / "run" / "best.ckpt")
    with pytest.raises(ValueError, match=r"^best.ckpt: .* \(multi_label True, not False\); give the --data options"):
        check_fits("best.ckpt", describe_classifier(replace(saved, multi_label=True)), saved)


def test_a_checkpoint_from_before_an_option_fits(trained: Path) -> None:
    saved = load_classifier(trained / "run" / "best.ckpt")
    theirs = describe_classifier(saved)
    theirs["config"] = {name: value for name, value in theirs["config"].items() if name != "spatial_dims"}
    check_fits("best.ckpt", theirs, saved)
