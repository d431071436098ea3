"""The intervals of an evaluation: of patients where they are named, and where all bootstrap samples agree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from densenet_efficient.training.evaluation import Evaluation, summarise
from densenet_efficient.training.finish import _summary_table


def evaluation(right: list[bool], positives: int) -> Evaluation:
    """Images of which the first so many are of class b."""
    labels = np.eye(2)[[1] * positives + [0] * (len(right) - positives)]
    given = np.where(np.array(right)[:, None], labels, 1 - labels)
    return Evaluation(["a", "b"], False, 0.1 + 0.8 * given, labels, [""] * len(right), "test")


@pytest.mark.parametrize(("right", "bounds"), [(True, (0.2065, 1.0)), (False, (0.0, 0.7935))])
def test_one_image_tells_little(right: bool, bounds: tuple[float, float]) -> None:
    recall = summarise(evaluation([right, *[True] * 20], positives=1))["classes"]["b"]["recall"]
    assert recall["value"] == right and (recall["low"], recall["high"]) == pytest.approx(bounds, abs=1e-4)


def test_where_all_are_right_a_share_has_wilsons_interval_and_others_none() -> None:
    summary = summarise(evaluation([True] * 21, positives=5))
    assert summary["accuracy"] == {"value": 1.0, "low": pytest.approx(0.8454, abs=1e-4), "high": 1.0}
    assert summary["classes"]["b"]["precision"]["low"] == pytest.approx(0.5655, abs=1e-4)
    for figure in (summary["macro_f1"], summary["classes"]["b"]["f1"], summary["classes"]["b"]["auroc"]):
        assert figure == {"value": 1.0, "low": None, "high": None}


def test_patients_are_drawn_and_not_their_images() -> None:
    """Ten patients of ten images, who are right or wrong as a whole, say as much as ten images."""
    alone = evaluation([True] * 7 + [False] * 3, positives=5)
    images = evaluation([True] * 70 + [False] * 30, positives=50)
    patients = replace(images, groups=[str(number // 10) for number in range(100)])
    widths = [
        summarise(one)["accuracy"]["high"] - summarise(one)["accuracy"]["low"] for one in (alone, images, patients)
    ]
    assert widths[2] == pytest.approx(widths[0], abs=0.11) and widths[1] < widths[2] / 2
    each_its_own = replace(alone, groups=[str(number) for number in range(10)])
    every = [summarise(one) for one in (alone, images, patients, each_its_own)]
    assert [summary["grouped"] for summary in every] == [False, False, True, False]
    assert [summary["images"] for summary in every] == [10, 100, 100, 10]


def test_one_patient_is_one_whatever_its_images() -> None:
    images = evaluation([True] * 20, positives=10)
    accuracy = summarise(replace(images, groups=["only"] * 20))["accuracy"]
    assert accuracy == {"value": 1.0, "low": pytest.approx(0.2065, abs=1e-4), "high": 1.0}


@pytest.mark.parametrize("count", range(1, 60))
@pytest.mark.parametrize("right", [True, False])
def test_a_share_lies_within_its_interval(right: bool, count: int) -> None:
    accuracy = summarise(evaluation([right] * count, positives=count // 2))["accuracy"]
    assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1


def test_samples_that_differ_by_rounding_alone_have_no_interval() -> None:
    """Of each of three classes the one patient has it nine times, once given, so that every F1 is a fifth.

    The mean of three fifths is none by a rounding; that of the classes of two patients is.
    """
    labels = np.eye(3)[np.arange(27) // 9]
    given = labels * (np.arange(27) % 9 == 0)[:, None]
    patients = [str(number // 9) for number in range(27)]
    summary = summarise(Evaluation(["a", "b", "c"], True, given, labels, [""] * 27, "test", groups=patients))
    assert summary["macro_f1"] == {"value": pytest.approx(0.2), "low": None, "high": None}


def test_a_class_that_is_given_but_never_right_lowers_the_mean_of_the_samples_that_give_it() -> None:
    """The others, about every third, are perfect."""
    one = evaluation([True] * 21, positives=5)
    probabilities = np.c_[one.probabilities, np.zeros(21)]
    probabilities[-1] = 0, 0, 1
    labels = np.c_[one.labels, np.zeros(21)]
    summary = summarise(Evaluation(["a", "b", "none"], False, probabilities, labels, one.sources, "test"))
    assert summary["macro_f1"]["value"] < 0.67 and summary["macro_f1"]["high"] == 1


def test_areas_of_a_hundred_classes_have_intervals() -> None:
    labels = np.eye(100)[np.arange(200) % 100]
    scores = np.random.default_rng(0).random((200, 100))
    summary = summarise(Evaluation([str(k) for k in range(100)], True, scores, labels, [""] * 200, "test"))
    assert all(entry["auroc"]["low"] < entry["auroc"]["high"] for entry in summary["classes"].values())


def test_a_class_has_as_many_images_as_labels() -> None:
    classes = summarise(evaluation([False] * 3 + [True] * 4, positives=5))["classes"]
    assert [classes[name]["images"] for name in "ab"] == [2, 5]


def printed(one: Evaluation) -> list[tuple[str, ...]]:
    """The rows that a run prints at its end."""
    columns = [map(str, column.cells) for column in _summary_table(summarise(one)).columns]
    return list(zip(*columns, strict=True))


def test_what_is_printed_of_single_labels() -> None:
    """An interval that begins at zero too; none where all samples agree, and no area of images of one class."""
    assert printed(evaluation([True] * 21, positives=5)) == [
        ("accuracy", "100.00%", "84.54% to 100.00%"),
        ("balanced accuracy", "100.00%", ""),
        ("macro f1", "100.00%", ""),
        ("mean area under the ROC curve", "1.0000", ""),
    ]
    rows = printed(evaluation([False] * 21, positives=0))
    assert rows[0] == ("accuracy", "0.00%", "0.00% to 15.46%")
    assert [name for name, _, _ in rows] == ["accuracy", "balanced accuracy", "macro f1"]


def test_what_is_printed_of_several_labels() -> None:
    several = replace(evaluation([True] * 21, positives=5), multi_label=True)
    assert [name for name, _, _ in printed(several)] == [
        "all labels right",
        "macro f1",
        "mean area under the ROC curve",
    ]
