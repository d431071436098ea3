"""What the pictures of a run show, and the curves and captions that they are drawn of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from densenet_efficient.training import pictures, report
from densenet_efficient.training.evaluation import Evaluation, calibration, summarise, worst_mistakes
from densenet_efficient.training.pictures import Mistake

NOWHERE = Path("nowhere.png")

# One image of class a is given right, one is taken for b; the two of b are given right.
ONE = Evaluation(
    ["a", "b"], False, np.array([[0.9, 0.1], [0.3, 0.7], [0.4, 0.6], [0.2, 0.8]]), np.eye(2)[[0, 0, 1, 1]],
    ["0.png", "1.png", "2.png", np.zeros((2, 2))], "test",
)  # fmt: skip
SEVERAL = Evaluation(["a", "b"], True, np.array([[0.9, 0.2], [0.7, 0.4]]), np.eye(2), ["0.png", "1.png"], "test")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would be saved."""
    figures: list[Figure] = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def lines_of(axes: Axes) -> dict[str, list[list[float]]]:
    """The points of each line that has a label."""
    lines = {str(line.get_label()): np.asarray(line.get_xydata()) for line in axes.lines}
    return {label: points.tolist() for label, points in lines.items() if not label.startswith("_")}


def test_curves_are_of_the_loss_and_of_the_accuracy_in_percent(drawn: list[Figure]) -> None:
    """Both of the training and of the validation, which the second epoch had none of."""
    first = {"epoch": 1, "train_loss": 2.0, "val_loss": 3.0, "train_accuracy": 0.25, "val_accuracy": 0.5}
    pictures.draw_curves([first, {"epoch": 2, "train_loss": 1.0, "train_accuracy": 0.75}], NOWHERE)
    losses, accuracies = map(lines_of, drawn[0].axes)
    assert losses["training (augmented)"] == [[1, 2], [2, 1]]
    assert accuracies["training (augmented)"] == [[1, 25], [2, 75]]
    np.testing.assert_array_equal(losses["validation"], [[1, 3], [2, np.nan]])
    np.testing.assert_array_equal(accuracies["validation"], [[1, 50], [2, np.nan]])


def test_the_confusion_matrix_has_its_counts_and_the_colours_of_their_shares_of_a_row(drawn: list[Figure]) -> None:
    one = replace(ONE, class_names=["a", "b", "none"])
    one = replace(one, probabilities=np.c_[ONE.probabilities, np.zeros(4)], labels=np.c_[ONE.labels, np.zeros(4)])
    pictures.draw_confusion(one, NOWHERE)
    axes = drawn[0].axes[0]
    counts = {(text.get_position()[::-1]): text.get_text() for text in axes.texts}
    assert [counts[row, column] for row in range(3) for column in range(3)] == list("110020000")
    assert np.asarray(axes.images[0].get_array()).tolist() == [[0.5, 0.5, 0], [0, 1, 0], [0, 0, 0]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "right")


@pytest.mark.parametrize(("classes", "written"), [(20, 400), (21, 0)])
def test_of_many_classes_no_counts_are_written(classes: int, written: int, drawn: list[Figure]) -> None:
    names = [str(number) for number in range(classes)]
    every = np.eye(classes)
    pictures.draw_confusion(Evaluation(names, False, every, every, names, "test"), NOWHERE)
    assert len(drawn[0].axes[0].texts) == written


def test_each_class_has_its_own_roc_curve_but_for_one_without_an_area(drawn: list[Figure]) -> None:
    """An area of zero is one. Here it is made of its curve."""
    scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.6, 0.5], [0.1, 0.4, 0.5], [0.6, 0.2, 0.5]])
    labels = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    one = Evaluation(["a", "b", "c"], True, scores, labels, [""] * 4, "test")
    pictures.draw_roc(one, {"a": 1.0, "b": 0.333, "c": None}, NOWHERE)
    axes = drawn[0].axes[0]
    assert lines_of(axes) == {
        "b  0.333": [[0, 0], [1 / 3, 0], [2 / 3, 0], [2 / 3, 1], [1, 1]],
        "a  1.000": [[0, 0], [0, 1], [1 / 3, 1], [2 / 3, 1], [1, 1]],
    }
    assert list(lines_of(axes)) == ["b  0.333", "a  1.000"]  # the hardest first
    assert axes.get_title(loc="left") == "ROC, each class against the others"
    pictures.draw_roc(one, {"b": 0.0}, NOWHERE)
    assert list(lines_of(drawn[1].axes[0])) == ["b  0.000"]


@pytest.mark.parametrize(("classes", "more"), [(8, ""), (9, ": the 8 hardest")])
def test_the_title_says_that_curves_are_left_out(classes: int, more: str, drawn: list[Figure]) -> None:
    names = [str(number) for number in range(classes)]
    one = Evaluation(names, False, np.eye(classes), np.eye(classes), names, "test")
    pictures.draw_roc(one, dict.fromkeys(names, 1.0), NOWHERE)
    assert drawn[0].axes[0].get_title(loc="left") == f"ROC, each class against the others{more}"


def test_confidence_of_several_labels_is_that_in_each_of_them() -> None:
    """Each of the four is alone in its bin: a finding is there or is not, whatever was decided."""
    bins, error = calibration(SEVERAL)
    assert [(entry["confidence"], entry["right"]) for entry in bins] == [(0.2, 0), (0.4, 1), (0.7, 0), (0.9, 1)]
    assert error == pytest.approx((0.2 + 0.6 + 0.7 + 0.1) / 4)


def test_the_calibration_shows_how_often_each_confidence_is_right(drawn: list[Figure]) -> None:
    """Each of the four images is alone in its bin."""
    pictures.draw_calibration(ONE, NOWHERE)
    curve, shares = drawn[0].axes
    assert np.asarray(curve.lines[-1].get_xydata()).tolist() == [[0.6, 1], [0.7, 0], [0.8, 1], [0.9, 1]]
    assert [bar.get_height() for bar in shares.patches] == [25] * 4  # percent


def test_each_mistake_is_shown_alone_and_with_where_it_was_seen(drawn: list[Figure]) -> None:
    """In rows of four."""
    images = [np.full((2, 3, channels), 0.5, np.float32) for channels in (1, 3, 3, 3, 3)]
    seen = [np.full((2, 3), number / 10, np.float32) for number in range(5)]
    mistakes = [Mistake(image, where, f"{k}", "") for k, (image, where) in enumerate(zip(images, seen, strict=True))]
    pictures.draw_mistakes(mistakes, NOWHERE)
    grid = np.array(drawn[0].axes).reshape(2, 8)
    shown = [[[np.asarray(one.get_array()) for one in axes.images] for axes in row] for row in grid]
    assert [[len(one) for one in row] for row in shown] == [[1, 2] * 4, [1, 2] + [0] * 6]
    assert [one[0].shape for one in shown[0][:3]] == [(2, 3), (2, 3), (2, 3, 3)]
    assert [one[1][0, 0] for one in (*shown[0][1::2], shown[1][1])] == [where[0, 0] for where in seen]
    assert [axes.get_title(loc="left") for axes in grid[:, ::2].flat] == ["0", "1", "2", "3", "4", "", "", ""]


def test_memory_is_drawn_in_order_of_the_depths(drawn: list[Figure]) -> None:
    pictures.draw_memory({40: {"naive": 9.0, "efficient": 1.5}, 22: {"naive": 4.0, "efficient": 1.0}}, "none", NOWHERE)
    axes = drawn[0].axes[0]
    assert [np.asarray(line.get_xydata()).tolist() for line in axes.lines] == [[[22, 4], [40, 9]], [[22, 1], [40, 1.5]]]
    assert [text.get_text() for text in axes.texts] == ["naive\n9.0 MiB", "efficient\n1.5 MiB"]
    assert "checkpointing none" in axes.get_xlabel()


def test_learning_rates_are_drawn_by_their_magnitude(drawn: list[Figure]) -> None:
    pictures.draw_learning_rates([1e-4, 1e-2], [2.0, 1.0], 2e-3, NOWHERE)
    axes = drawn[0].axes[0]
    assert axes.get_xscale() == "log"
    assert lines_of(axes)["suggestion 0.002"] == [[0.002, 0], [0.002, 1]]


def test_a_report_has_the_pictures_of_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several labels no confusion matrix, without an epoch no curves, without a mistake none of them."""
    draw_roc, seen = report.draw_roc, []

    def observed(evaluation: Evaluation, areas: Mapping[str, float | None], path: Path) -> None:
        seen.append(areas)
        draw_roc(evaluation, areas, path)

    monkeypatch.setattr(report, "draw_roc", observed)
    metrics = {"network": "any", "evaluation": summarise(SEVERAL), "versions": {}}
    written = report.write_report(tmp_path, SEVERAL, metrics, [], "")
    assert written == ["roc.png", "calibration.png", "metrics.json", "report.html"]
    assert seen == [{"a": 1, "b": 1}]


# ---- mistakes ----


def test_a_mistake_is_captioned_by_what_it_is_and_what_it_was_taken_for() -> None:
    assert worst_mistakes(ONE, 5) == [(1, 1, 0)]
    assert report._caption(ONE, 1, 1, 0) == "a (30%)\ntaken for b (70%)"
    assert [report._caption(SEVERAL, 1, k, k) for k in (0, 1)] == ["a is not there, given 70%", "b is there, given 40%"]


def test_the_most_confident_mistakes_come_first() -> None:
    """By what is left for the right class, not by what the one given has."""
    scores = np.array([[0.1, 0.8, 0.1], [0.05, 0.5, 0.45], [0.3, 0.4, 0.3]])
    one = Evaluation(["a", "b", "c"], False, scores, np.eye(3)[[0, 0, 0]], [""] * 3, "test")
    assert worst_mistakes(one, 2) == [(1, 1, 0), (0, 1, 0)]
    assert [worst_mistakes(SEVERAL, count) for count in (1, 5)] == [[(1, 0, 0)], [(1, 0, 0), (1, 1, 1)]]


def test_a_file_is_named_by_its_path_and_an_image_without_one_by_its_number() -> None:
    assert [report._source(ONE, image) for image in (2, 3)] == ["2.png", "image 3 of the test split"]
